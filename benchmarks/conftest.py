"""Runs the cases of `vosops.benchmarking` under pytest-benchmark, and keeps benchmarks/results/<op>_<device>.json.

    pytest benchmarks/bench_ops.py -k local_matching          every case of an op, one thread
    pytest benchmarks/bench_ops.py -k local_matching-480p --device cuda

The comparison with the other contenders, interleaved, is in the results and in the table that each case prints
(with -s); pytest-benchmark's own table times vosops alone, for its --benchmark-compare.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from vosops import benchmarking
from vosops.io.outputs import write_text

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5


def pytest_addoption(parser):
    """Add where to measure and where to write."""
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--threads", type=int, default=1, help="CPU threads, where the case does not say")
    parser.addoption("--results", type=Path, default=RESULTS, help="folder of the JSON files")


@pytest.fixture
def run_case(request, benchmark):
    """Measure a case, shows it, keeps it among the op's results, and times vosops alone for pytest-benchmark."""

    def run(op: str, case: benchmarking.Case) -> benchmarking.Result:
        device, threads = request.config.getoption("--device"), request.config.getoption("--threads")
        suite = benchmarking.BENCHMARKS[op]
        result = benchmarking.run_case(suite, case, device=device, threads=threads)
        Console(width=120).print(*benchmarking.tables([result]))
        keep(result, request.config.getoption("--results") / f"{op}_{device}.json", device)
        ours, *others = result.variants
        benchmark.extra_info.update({v.name: round(v.speedup, 2) for v in others})
        benchmark.extra_info.update(share_of_peak=round(ours.share, 3), peak_bytes=ours.peak)
        benchmark.pedantic(suite.our_call(case, device), rounds=ROUNDS, warmup_rounds=1)
        return result

    return run


def keep(result: benchmarking.Result, file: Path, device: str) -> None:
    """Put a result into the file, in place of an earlier one of the same case."""
    earlier = json.loads(file.read_text())["results"] if file.exists() else []
    fresh = result.to_dict()
    key = ("case", "threads")
    results = [r for r in earlier if any(r[k] != fresh[k] for k in key)] + [fresh]
    report = {"machine": benchmarking.machine(device), "results": results}
    write_text(file, json.dumps(report, indent=1) + "\n")
