"""The table of docs/compatibility.md says of each op, implementation and dtype how it was proved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vosops
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compatibility():
    return load_script(ROOT / "benchmarks/compatibility.py")


def run_of(card: str, date: str, *, right: bool = True) -> dict:
    """A run in which bf16 local matching by CUDA C++ was right, or wrong."""
    variants = [{"name": "vosops cpp", "right": right}, {"name": "tiled GEMM", "right": True}]
    cells = {"a": {"op": "local_matching", "mode": "bf16", "variants": variants}, "b": {"failed": "x"}}
    return {"date": date, "device": {"name": card}, "steps": {"times": {"data": {"cells": cells}}}}


def test_the_page_is_up_to_date(compatibility):
    """`python benchmarks/compatibility.py` renews it."""
    runs = [json.loads(file.read_text()) for file in sorted(compatibility.RESULTS.glob("gpu_*.json"))]
    text = compatibility.PAGE.read_text()
    assert compatibility.rewritten(text, runs, compatibility.recorded(), compatibility.recorded_arm()) == text


def test_every_op_is_listed_in_every_implementation(compatibility):
    listed = [row.split(" | ") for row in compatibility.table([]).splitlines()[2:]]
    assert [row[0].strip("| `") for row in listed if "`" in row[0]] == vosops.list_ops()
    assert len(listed) == 5 * len(vosops.list_ops())


def test_without_a_run_nothing_is_said_to_have_run_on_a_gpu(compatibility):
    assert "**" not in compatibility.table([])
    assert compatibility.gpu_proof("local_matching", "cpp", "bf16", []) is None


def test_the_newest_run_that_was_right_is_named(compatibility):
    runs = [
        run_of("A", "2026-01-01T00"),
        run_of("B", "2026-03-01T00"),
        run_of("C", "2026-05-01T00", right=False),
    ]
    assert compatibility.gpu_proof("local_matching", "cpp", "bf16", runs) == "**B, 2026-03-01**"
    for op, backend, dtype in (
        ("global_matching", "cpp", "bf16"),
        ("local_matching", "triton", "bf16"),
        ("local_matching", "cpp", "f16"),
    ):
        assert compatibility.gpu_proof(op, backend, dtype, runs) is None


def test_a_page_without_a_place_is_refused(compatibility):
    with pytest.raises(ValueError, match="lacks <!-- proofs -->"):
        compatibility.rewritten("nothing", [])
    proofs = "<!-- proofs -->\n<!-- end of proofs -->"
    with pytest.raises(ValueError, match="lacks <!-- versions -->"):
        compatibility.rewritten(proofs, [])


def cell(torch: str = "2.11.0+cu130", python: str = "3.10.20", **others) -> dict:
    """What benchmarks/matrix.py records of a cell."""
    record = {"python": python, "torch": torch, "triton": "3.6.0", "numpy": "2.3.5", "cuda": "13.0"}
    record |= {"passed": 700, "failed": 0, "skipped": 9, "installed": "wheel", "interpreted": False}
    return record | {"date": "2026-11-29", "processor": "AMD EPYC"} | others


def test_versions_that_were_run_are_listed(compatibility):
    cells = [cell(), cell("2.13.0+cpu", triton=None, failed=2, interpreted=True), cell(interpreted=True)]
    rows = compatibility.versions(cells).splitlines()[2:]
    assert rows[0].startswith("| 2.11.0+cu130 | 3.6.0 | 2.3.5 | 3.10.20 | wheel | 700 | 0 |")
    assert "| - |" in rows[1] and "| **2** |" in rows[1]
    assert "| 3.6.0, interpreted |" in rows[2]
    assert "make matrix" in compatibility.versions([])


def test_emulated_arm_processors_are_listed_with_what_failed(compatibility):
    run = {
        "processor": "max",
        "tests": "tests/ops -k core",
        "passed": 7,
        "failed": 0,
        "skipped": 2,
        "torch": "2.10.0",
    }
    run |= {"python": "3.11.2", "date": "2026-11-29", "compiler": "g++ 12", "emulator": "qemu 7.2"}
    lines = compatibility.arm([run, run | {"processor": "cortex-a76", "failed": 3}]).splitlines()
    assert lines[2] == "| `max` | `tests/ops -k core` | 7 | 0 | 2 | 2.10.0 | 3.11.2 | 2026-11-29 |"
    assert "| `cortex-a76` |" in lines[3] and "| **3** |" in lines[3]
    assert lines[-1] == "g++ 12; qemu 7.2"
    assert "make test-arm" in compatibility.arm([])
