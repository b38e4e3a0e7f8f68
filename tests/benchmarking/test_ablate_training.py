"""benchmarks/ablate_training.py: what is recorded of a training run of vosops-s, and how runs are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ablate():
    return load_script(ROOT / "benchmarks/ablate_training.py")


def test_a_run_is_described_by_its_settings_and_its_log(ablate, tmp_path):
    sources = [{"root": "/data/DAVIS", "images": None}, {"root": None, "images": "/data/sod/images"}]
    config = {
        "seed": 1,
        "options": {"backbone": "efficientnet_lite0"},
        "task": {},
        "data": {"train": sources},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "log.csv").write_text("step,loss,seconds\n50,0.5,60\n100,0.4,125\n")
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    found = ablate.described(tmp_path)
    assert (found["steps"], found["seed"]) == (100, 1)
    assert found["backbone"] == "efficientnet_lite0"
    assert found["sources"] == ["DAVIS", "sod"]


def test_differences_are_paired_and_have_an_interval(ablate, capsys):
    runs = {
        "baseline": {"scores": {"a": [0.5, 0.7], "b": [0.9, 0.9], "c": [0.1, 0.3]}},
        "changed": {"scores": {"a": [0.6, 0.8], "b": [0.9, 1.0]}},
        "none yet": {"scores": {}},
    }
    ablate.print_table(runs)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "baseline: 3 sequences, J 0.5000 F 0.6333 J&F 0.5667"
    assert second == "changed: 2 sequences, J 0.7500 F 0.9000 J&F 0.8250, +0.0750 (+0.0500 to +0.1000)"
    assert third == "none yet: no scores"
