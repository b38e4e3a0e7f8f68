"""Every Triton kernel, compiled ahead of time for GPUs that are not here.

What a compiler makes of a kernel is a fact about one version of it: each version of Triton has a committed table
(benchmarks/results/triton), and this Triton's kernels must be as its table says. A Triton without a table is held to
bounds, which a warning tells.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.effort import EXHAUSTIVE
from tests.scripts import load_script
from vosops.ops._registration import HAS_TRITON

ROOT = Path(__file__).parents[2]
VERSIONS = sorted(path.stem for path in (ROOT / "benchmarks/results/triton").glob("*.json"))

if not HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)


@pytest.fixture(scope="module")
def report():
    return load_script(ROOT / "benchmarks/triton_report.py")


@pytest.fixture(scope="module", params=VERSIONS)
def rows(report, request) -> list:
    """The committed table of one version of Triton."""
    version, rows = report.from_json((report.TABLES / f"{request.param}.json").read_text())
    assert version == request.param
    return rows


def test_these_kernels_are_as_the_table_of_this_triton_says(report, tmp_path):
    """A sample of them here, all of them in `make test-all`; a process compiles what this one may only interpret."""
    import triton

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    made = tmp_path / "table.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/triton_report.py"),
        "--processes",
        "1",
        "--json",
        str(made),
    ]
    command += [] if EXHAUSTIVE else ["--sample"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    version, rows = report.from_json(made.read_text())
    assert version == report.release(triton.__version__)
    assert len(rows) == len(report.jobs(list(report.NVIDIA), sampled=not EXHAUSTIVE))
    assert report.problems(version, rows, sampled=not EXHAUSTIVE) == []
    if report.table_of(version) is None:
        warnings.warn(report.held_against(version), stacklevel=1)


def test_a_table_has_every_kernel_on_every_target(report, rows):
    """A new kernel or configuration goes into the tables of all versions: `make triton-tables`."""
    assert {(row.case, row.target) for row in rows} == set(report.jobs(list(report.NVIDIA)))


SCAN = "memory scan bf16, repair on sm_100: does not compile"
SPILLED = "memory read bf16, 8100 positions on sm_90: 96 bytes spilled, more than 64"
OUT_OF_BOUNDS = {"3.6.0": [SPILLED, SCAN], "3.7.0": [SCAN]}
"""What is known to be wrong with a version: docs/compatibility.md tells it."""


def test_nothing_is_out_of_bounds_but_what_is_known(report, rows, request):
    version = request.node.callspec.params["rows"]
    assert report.out_of_bounds(rows) == OUT_OF_BOUNDS.get(version, [])


def test_products_run_on_tensor_cores_except_in_ieee_float32(report, rows):
    """mma.sync on sm_80, wgmma on sm_90, tcgen05 on sm_100: the report counts the target's own instruction."""
    products = [row for row in rows if " match " in row.case or row.case.startswith("memory read")]
    assert {row.target for row in products} == set(report.NVIDIA)
    assert [report.label(r) for r in products if bool(r.tensor_cores) == (" ieee" in r.case)] == []


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0)])
def test_gpus_with_99_kilobytes_take_the_shapes_of_sm_80_which_fit(report, rows, monkeypatch, capability):
    from vosops.triton import _common

    def shapes() -> dict:
        return {case.name: (case.constants, case.options) for case in report.cases("sm_80")}

    expected, limit = shapes(), _common.architecture_of(capability).shared_bytes
    target = _common.Target
    monkeypatch.setattr(
        _common, "Target", lambda _, processors: target(capability[0], processors, capability[1])
    )
    assert shapes() == expected
    assert [r for r in rows if r.target == "sm_80" and r.shared_bytes > limit] == []


def test_half_precision_runs_two_programs_on_a_multiprocessor_of_an_h100(report, rows):
    """The epilogue of one program runs beside the products of the other."""
    products = [row for row in rows if row.target == "sm_90" and " match " in row.case]
    half = [row for row in products if "bf16," in row.case or "fp16," in row.case]
    assert half
    assert [report.label(row) for row in half if row.occupancy < 2] == []


def test_key_tiles_arrive_by_asynchronous_copies_of_16_bytes(report, rows):
    pipelined = [row for row in rows if " match " in row.case and "neighbors" not in row.case]
    pipelined += [row for row in rows if row.case.startswith("memory read")]
    assert {row.case.split()[0] for row in pipelined} == {"local", "global", "memory"}
    assert [report.label(row) for row in pipelined if not row.async_copies] == []


def test_gradients_usage_and_selection_of_memory_run_on_tensor_cores_in_half_precision(report, rows):
    names = ("usage", "query gradient", "key gradient", "value gradient", "scan")
    starts = tuple(f"memory {name} bf16" for name in names)
    half = [row for row in rows if row.case.startswith(starts) and row.compiles]
    assert len({row.case for row in half}) >= len(names)
    assert [report.label(row) for row in half if not row.tensor_cores] == []


def test_tensor_descriptors_are_for_architectures_whose_copy_engine_feeds_the_products(report, rows):
    """Six bulk copies on sm_90: two for each of the three stages. sm_80 has no such kernel."""
    described = [row for row in rows if "by descriptors" in row.case]
    assert {row.target for row in described} == {"sm_90", "sm_100"}
    assert len(described) == 4
    assert [(row.spill_bytes, row.async_copies >= 6) for row in described] == [(0, True)] * 4


def row(report, target: str = "sm_90", case: str = "memory read bf16", **figures):
    return report.Row(case, target, **{"warps": 4, "tensor_cores": 8, **figures})


def test_a_kernel_out_of_bounds_is_named(report):
    limit = report.SHARED_LIMIT["sm_90"]
    fine = row(report, spill_bytes=report.MOST_SPILLED, shared_bytes=limit)
    assert report.out_of_bounds([fine, row(report, "gfx942", spill_bytes=10**6, tensor_cores=0)]) == []
    assert report.out_of_bounds([row(report, spill_bytes=65)]) == [
        "memory read bf16 on sm_90: 65 bytes spilled, more than 64"
    ]
    assert report.out_of_bounds([row(report, shared_bytes=limit + 1)]) == [
        f"memory read bf16 on sm_90: {limit + 1} bytes of shared memory, more than {limit}"
    ]
    assert report.out_of_bounds([row(report, tensor_cores=0)]) == [
        "memory read bf16 on sm_90: no wgmma.mma_async"
    ]
    assert report.out_of_bounds([row(report, case="memory read ieee", tensor_cores=0)]) == []


def test_differences_from_a_table_are_named(report):
    before = [row(report), row(report, "sm_80"), row(report, case="gone")]
    now = [row(report, spill_bytes=8), row(report, case="new"), row(report, "gfx942")]
    assert report.differences(now, before) == [
        "gone on sm_90: only in the committed table",
        "memory read bf16 on sm_90: spill_bytes 0 -> 8",
        "new on sm_90: only in the new table",
    ]
    assert report.differences([row(report)], before, sampled=True) == []
    assert report.differences([row(report, case="new")], before, sampled=True) != []


def test_a_triton_without_a_table_is_held_to_bounds_and_says_so(report, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "TABLES", tmp_path)
    rows = [row(report, spill_bytes=8)]
    assert report.table_of("3.99.0") is None
    assert "3.99.0 has no table (there are no version)" in report.held_against("3.99.0")
    assert report.problems("3.99.0", rows) == []
    assert len(report.problems("3.99.0", [row(report, spill_bytes=65)])) == 1
    (tmp_path / "3.99.0.json").write_text(report.to_json("3.99.0", rows))
    assert report.problems("3.99.0+git12", rows) == []
    assert report.problems("3.99.0", [row(report)]) == ["memory read bf16 on sm_90: spill_bytes 8 -> 0"]


def test_a_kernel_that_does_not_compile_is_told(report, monkeypatch, tmp_path):
    def fail(case, target):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(report, "compile_case", fail)
    failed = report.examine(next(report.cases("sm_80")), "sm_80")
    assert report.out_of_bounds([failed]) == [f"{report.label(failed)}: does not compile"]
    assert report.from_json(report.to_json("3.99.0", [failed]))[1] == [failed]
    works = report.Row(failed.case, failed.target, 4, tensor_cores=8)
    assert f"{report.label(failed)}: compiles True -> False" in report.differences([failed], [works])


def test_a_table_is_read_as_it_was_written(report):
    rows = [row(report, spill_bytes=8), row(report, "sm_80")]
    text = report.to_json("3.99.0", [*rows, row(report, "gfx942")])
    assert report.from_json(text) == ("3.99.0", rows)
    assert len([line for line in text.splitlines() if "memory read" in line]) == 1


def test_the_sample_has_every_kernel_and_products_on_every_target(report):
    targets = list(report.NVIDIA)
    cases = {(case.name, target): case for target in targets for case in report.cases(target)}
    taken = report.jobs(targets, sampled=True)
    kernels = {case.kernel for case in cases.values()}
    assert {cases[job].kernel for job in taken} == kernels and len(taken) == len(kernels)
    assert {target for _, target in taken} == set(targets)
    assert {target for name, target in taken if cases[name, target].tensor_cores} == set(targets)
