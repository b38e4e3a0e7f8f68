"""benchmarks/bench_networks.py: what a measurement of a segmentation network holds, and where it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
SMALL = {"small": ("gridnet", {"widths": (8, 8, 8)})}


@pytest.fixture
def bench(monkeypatch):
    module = load_script(ROOT / "benchmarks/bench_networks.py")
    monkeypatch.setattr(module, "NETWORKS", SMALL)
    monkeypatch.setattr(module, "SIZES", {"1024p": (61, 90)})
    return module


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("naive", [False, True])
def test_a_measurement(bench, naive):
    found = bench.measure("small", (61, 90), naive)
    assert found["seconds"] > 0
    assert found["before"] is None or found["before"] > 0
    assert found["memory"] is None or found["memory"] >= 0


def test_what_exceeds_the_limit_is_counted(bench):
    found = bench.run("small", "1024p", True, limit=1e-6)
    assert found["seconds"] is found["memory"] is None
    assert found["counted"] >= 4 * 4 * 8 * 64 * 92  # several maps of 8 channels, of a size that is taken


def test_results_replace_earlier_ones_of_the_same_case(bench, tmp_path):
    file = tmp_path / "results.json"
    for seconds, naive in ((1, True), (2, False), (3, True)):
        bench.keep(file, {"network": "small", "size": "1024p", "naive": naive, "seconds": seconds})
    kept = json.loads(file.read_text())
    assert [(r["naive"], r["seconds"]) for r in kept["results"]] == [(False, 2), (True, 3)]
    assert kept["machine"]["torch"] == torch.__version__
