"""benchmarks/gpu_report.py: the page of docs/performance-gpu.md from runs, and without any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_report
from vosops.benchmarking.gpu_cases import CELLS

ROOT = Path(__file__).parents[2]
CARD = "NVIDIA H100 80GB HBM3"


def variant(name: str, median: float, share: float | None = 0.5, right: bool = True) -> dict:
    return {
        "name": name,
        "median": median,
        "best": median,
        "runs": [median],
        "peak": 2_500_000,
        "errors": [0.0],
    } | {
        "right": right,
        "share": share,
    }


def cell(key: str, *variants: dict, **left_out: str) -> dict:
    found = next(c for c in CELLS if c.key == key)
    facts = {"op": found.op, "size": found.size.name, "mode": found.mode, "title": found.title}
    flags = {"backward": found.backward, "compiled": found.compiled, "floor": 1e-5}
    return facts | flags | {"variants": list(variants), "left_out": left_out}


def step(status: str = "passed", *reasons: str, **data) -> dict:
    return {"status": status, "reasons": list(reasons), "data": data, "seconds": 12.3}


def run(date: str = "2026-03-02T10:00:00+00:00", name: str = CARD, commit: str = "a" * 40) -> dict:
    """A run of a card: one goal met, one missed, a wrong result, a peer and an implementation that are not there."""
    cells = {
        "local_matching/480p/bf16/forward": cell(
            "local_matching/480p/bf16/forward", variant("vosops cpp", 25e-6), variant("tiled GEMM", 2e-3)
        ),
        "local_matching/480p/ieee/forward": cell(
            "local_matching/480p/ieee/forward",
            variant("vosops cpp", 200e-6, None),
            variant("running minimum", 3e-3, right=False),
            **{"vosops triton": "RuntimeError: no"},
        ),
        "local_matching/480p/ieee/forward/compiled": cell(
            "local_matching/480p/ieee/forward/compiled",
            variant("vosops cpp", 9.0),
            variant("torch.compile", 1e-3),
        ),
        "global_matching/480p/bf16/forward": {"failed": "OutOfMemoryError: too much"},
    }
    rates = {"flops_per_second": {"bf16": 7e14}, "bytes_per_second": 3e12, "product_size": 8192}
    steps = {
        "libraries": step(loaded="avx2 13000"),
        "tests-cpp": step("failed", "a test: assert 1 == 2", passed=3, skipped={"x": 2}, failures={}),
        "ceilings": step(**rates),
        "times": step("unfinished", "some are missing", cells=cells),
    }
    device = {"name": name, "capability": "9.0", "driver": "580.1"}
    versions = {"torch": "2.11.0", "python": "3.12.3", "triton": "3.6.0", "nvcc": "13.0"}
    facts = {"schema": 1, "commit": commit, "date": date, "seconds": 100.0, "command": ["x"]}
    return facts | {"device": device, "versions": versions, "steps": steps}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "gpu_h100_aaaa.json").write_text(json.dumps(run()))
    return folder


def test_without_a_run_the_page_says_so_plainly(tmp_path):
    page = tmp_path / "page.md"
    gpu_report.main(["--results", str(tmp_path), "--page", str(page)])
    assert "**No GPU has been measured yet" in page.read_text()
    assert list(tmp_path.iterdir()) == [page]


def test_the_committed_page_is_up_to_date():
    assert gpu_report.PAGE.read_text() == gpu_report.page(gpu_report.newest(gpu_report.RESULTS))


def test_the_page_of_a_run(results):
    text = gpu_report.page(gpu_report.newest(results))
    assert "No GPU has been measured" not in text
    assert f"## {CARD}" in text and "2026-03-02, commit `aaaaaaaaaaaa`" in text
    assert "| tests-cpp | failed | 12 s | a test: assert 1 == 2 |" in text
    assert "| runtime | not run |" in text
    assert "a copy moves 3 TB/s" in text and "bf16 700 TFLOP/s" in text
    assert "`global_matching/480p/bf16/forward` failed: OutOfMemoryError: too much" in text


def test_goals_say_what_was_reached_and_what_was_not(results):
    text = gpu_report.page(gpu_report.newest(results))
    assert (
        "| `local_matching/480p/bf16/forward` | 30 µs | 25 µs (vosops cpp) | yes | 80x tiled GEMM |" in text
    )
    # The faster result is a wrong one and does not count.
    assert "| `local_matching/480p/ieee/forward` | 110 µs | 200 µs (vosops cpp) | **no** |  |" in text
    assert "| `memory_read/1080p-5-frames/bf16/forward` | 1.2 ms | not measured |" in text


def test_goals_are_for_one_card(tmp_path):
    (tmp_path / "gpu_other.json").write_text(json.dumps(run(name="NVIDIA L4")))
    text = gpu_report.page(gpu_report.newest(tmp_path))
    assert "The goals are for an H100; this card has none." in text


def test_tables_hold_every_contender_and_why_others_are_missing(results):
    text = gpu_report.page(gpu_report.newest(results))
    assert "|  | ieee | bf16 | peak MB |" in text
    assert "| **vosops cpp** | 200 µs | 25 µs (50%) | 2.5 |" in text  # not that of the compiled cell
    assert "| running minimum | 3 ms (50%) † | - | 2.5 |" in text
    assert "| torch.compile | 1 ms (50%) | - | 2.5 |" in text
    assert "vosops triton left out: RuntimeError: no" in text


def test_the_newest_run_of_each_card_is_shown(results):
    (results / "gpu_h100_bbbb.json").write_text(json.dumps(run("2026-04-01T00:00:00+00:00", commit="b" * 40)))
    (results / "gpu_l4.json").write_text(json.dumps(run("2026-01-01T00:00:00+00:00", name="NVIDIA L4")))
    reports = gpu_report.newest(results)
    assert [(r["device"]["name"], r["commit"][0]) for r in reports] == [(CARD, "b"), ("NVIDIA L4", "a")]


def test_a_run_that_cannot_be_read_is_named(results):
    (results / "gpu_bad.json").write_text(json.dumps(run() | {"commit": None}))
    with pytest.raises(SystemExit, match=r"gpu_bad.json cannot be read: commit must be str"):
        gpu_report.newest(results)


def test_plots_are_drawn_of_what_was_measured(results, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.md"
    gpu_report.main(["--results", str(results), "--page", str(page)])
    (drawn,) = (tmp_path / "images").iterdir()
    assert drawn.name == "gpu_h100_aaaa_local_matching.svg" and drawn.stat().st_size > 5000
    assert f"images/{drawn.name}" in page.read_text()


def test_check_fails_on_a_page_that_is_not_up_to_date(results, tmp_path):
    page = tmp_path / "page.md"
    arguments = ["--results", str(results), "--page", str(page)]
    with pytest.raises(SystemExit, match="not up to date"):
        gpu_report.main([*arguments, "--check"])
    page.write_text(gpu_report.page(gpu_report.newest(results)))
    with pytest.raises(SystemExit) as exit_:
        gpu_report.main([*arguments, "--check"])
    assert exit_.value.code == 0


def test_goals_are_of_cases_that_are_measured():
    assert set(gpu_report.GOALS) <= {c.key for c in CELLS}
