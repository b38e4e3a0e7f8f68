"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

from tests.effort import EXHAUSTIVE
from tests.scripts import load_script

SHARED = Path(os.environ.get("VOSOPS_TEST_DATA", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves exhaustive tests out of ordinary runs, and counts them as deselected."""
    if not EXHAUSTIVE:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
    path = SHARED / "golden/recipe.py"
    if not path.exists():
        pytest.skip(f"{path} is not here (set VOSOPS_TEST_DATA)")
    return load_script(path).apply_recipe(network.eval())
