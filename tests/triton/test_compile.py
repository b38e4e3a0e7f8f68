"""Every Triton kernel, compiled ahead of time for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vosops.ops._registration import HAS_TRITON

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks/results/triton_report.json"
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict:
    """The report of all kernels on all targets, made by a process that compiles instead of interpreting."""
    if not HAS_TRITON:
        pytest.skip("needs triton")
    written = tmp_path_factory.mktemp("report") / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        str(ROOT / "benchmarks/triton_report.py"),
        "--processes",
        "2",
        "--write",
        str(written),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    return json.loads(written.read_text())


@pytest.fixture(scope="module")
def rows(table) -> list[dict]:
    return table["rows"]


def test_the_committed_table_is_current(table):
    """benchmarks/results/triton_report.json shows regressions in review; triton_report.py --write renews it."""
    committed = json.loads(COMMITTED.read_text())
    if committed["triton"] != table["triton"]:
        pytest.skip(f"the table was made by Triton {committed['triton']}, this is {table['triton']}")
    assert committed == table


def label(row: dict) -> str:
    return f"{row['case']} on {row['target']}"


def test_nothing_is_spilled(rows):
    assert [label(row) for row in rows if row["spill_bytes"]] == []


def test_shared_memory_is_within_the_limit(rows):
    assert [label(row) for row in rows if row["shared_bytes"] > SHARED_MEMORY[row["target"]]] == []


def test_products_run_on_tensor_cores_except_in_ieee_float32(rows):
    """mma.sync on sm_80, wgmma on sm_90, tcgen05 on sm_100: the report counts the target's own instruction."""
    products = [row for row in rows if " match " in row["case"]]
    assert products
    wrong = [label(row) for row in products if bool(row["tensor_cores"]) == (" match ieee" in row["case"])]
    assert wrong == []


def test_half_precision_runs_two_programs_on_a_multiprocessor_of_an_h100(rows):
    """The epilogue of one program runs beside the products of the other."""
    products = [row for row in rows if row["target"] == "sm_90" and " match " in row["case"]]
    half = [row for row in products if "bf16," in row["case"] or "fp16," in row["case"]]
    assert half
    assert [label(row) for row in half if row["occupancy"] < 2] == []


def test_key_tiles_arrive_by_asynchronous_copies_of_16_bytes(rows):
    pipelined = [row for row in rows if " match " in row["case"] and "neighbors" not in row["case"]]
    assert [label(row) for row in pipelined if not row["async_copies"]] == []


def test_memory_is_read_by_tensor_cores_and_asynchronous_copies_except_in_ieee_float32(rows):
    reads = [row for row in rows if row["case"].startswith("memory read")]
    assert {row["case"].removeprefix("memory read ") for row in reads} >= {"bf16", "tf32", "tf32x3", "ieee"}
    wrong = [label(row) for row in reads if bool(row["tensor_cores"]) == ("ieee" in row["case"])]
    assert wrong == []
    assert [label(row) for row in reads if not row["async_copies"]] == []


def test_gradients_usage_and_selection_of_memory_run_on_tensor_cores_in_half_precision(rows):
    names = ("usage", "query gradient", "key gradient", "value gradient", "scan")
    half = [row for row in rows for name in names if row["case"].startswith(f"memory {name} bf16")]
    assert len({row["case"] for row in half}) >= len(names)
    assert [label(row) for row in half if not row["tensor_cores"]] == []
