"""Fixtures shared by all tests."""

import functools
import gc
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import interpreter
from tests.effort import EXHAUSTIVE
from tests.scripts import load_script

# Collections of young objects find nothing here, and take a tenth of the time of what runs in Python.
gc.set_threshold(50_000, 25, 100)
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.hasten()

SHARED = Path(os.environ.get("VOSOPS_TEST_DATA", Path(__file__).parents[2] / "shared"))


SLOW = (
    "cpu",
    *("emulator", "triton", "docs/test_examples", "cli/test_bench", "cli/test_demo", "cli/test_networks"),
    *(
        "cli/test_segment",
        "integrations/test_accelerate",
        "integrations/test_aot",
        "integrations/test_packages",
    ),
    *("integrations/test_trackers", "benchmarking/test_measure", "models/test_feelvos"),
    "docs/test_drawings",
    "studio/browser",
    *("models/segmentation", "models/test_lstm_icnet", "models/test_rgmp", "models/test_stm"),
    *("training/test_models", "training/test_loop"),
    *("distributed", "inference/test_load", "runs/test_fleet", "runs/test_live"),
)
"""Folders and files of tests/ that take seconds a test: whole networks, compilers, processes."""


@pytest.hookimpl(tryfirst=True)  # before -m "not slow" looks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks slow tests, and leaves exhaustive ones out of ordinary runs, counted as deselected."""
    folder = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(folder) and str(item.path.relative_to(folder)).startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    if not EXHAUSTIVE:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Keeps what is imported by now out of every later garbage collection, of which benchmarks ask for many."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    # Not torch.manual_seed: without a GPU it keeps a formatted stack for each kind of device, at every test.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def deterministic():
    """Deterministic mode, in which torch also fills uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny pictures gain nothing from threads, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden():
    """Loads a golden case of an original implementation, or skips."""

    def load(name: str) -> dict:
        path = SHARED / "golden" / name
        if not path.exists():
            pytest.skip(f"golden case {path} is not here (set VOSOPS_TEST_DATA)")
        return torch.load(path, weights_only=True)

    return load


def with_golden_weights(network: torch.nn.Module) -> torch.nn.Module:
    """The network, in eval mode, with the weights that the golden cases were made with; or skips."""
    return golden_recipe().apply_recipe(network.eval())


def golden_recipe() -> ModuleType:
    """The script that makes the weights of golden cases of their names and shapes; or skips."""
    path = SHARED / "golden/recipe.py"
    if not path.exists():
        pytest.skip(f"{path} is not here (set VOSOPS_TEST_DATA)")
    return _quick_recipe(path)


@functools.cache
def _quick_recipe(path: Path) -> ModuleType:
    """The script, which remembers the tensors of some four networks: they cost more than what is tested with them."""
    script = load_script(path)
    make = functools.lru_cache(1024)(script.recipe_array)

    def recipe_array(name: str, shape: Any) -> Any:
        array = make(name, tuple(shape))
        return None if array is None else array.copy()

    script.recipe_array = recipe_array
    return script
