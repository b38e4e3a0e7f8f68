"""benchmarks/make_tables.py: what it writes between the marks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts import load_script
from vosops.benchmarking import systems

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_tables(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    module = load_script(ROOT / "benchmarks/make_tables.py")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def variant(name: str, median: float, speedup: float, peak: int | None) -> dict:
    return {"name": name, "median": median, "best": median, "speedup": speedup, "share": 0.5, "peak": peak}


@pytest.fixture
def measured(make_tables, tmp_path):
    """One case of local matching with a goal that is met and one that is missed."""
    result = {
        "case": "480p",
        "title": "120x214",
        "clock": "process CPU time",
        "threads": 1,
        "load": 0.5,
        "flops": 4.45e9,
        "ceilings": {"flops": 117e9},
        "variants": [
            variant("vosops", 0.05, 1, 20_000_000),
            variant("CFBI loop", 1.5, 30, 1_400_000_000),
            variant("tiled GEMM", 0.2, 4, None),
        ],
        "left_out": {"unfold": "too large"},
        "goals": {
            "x tiled GEMM": {"goal": 4, "reached": 4.0, "met": True},
            "share of peak": {"goal": 0.8, "reached": 0.61, "met": False},
        },
    }
    machine = {"processor": "a CPU", "capability": "avx512", "torch": "2", "python": "3"}
    report = {"machine": machine, "results": [result]}
    (tmp_path / "local_matching_cpu.json").write_text(json.dumps(report))
    return make_tables


def test_goals_say_what_was_reached_and_what_was_not(measured):
    table = measured.goals("local_matching")
    assert "| at least 4x tiled GEMM | 4x | yes |" in table
    assert "| at least 80% of the measured FMA peak | 61% | **no** |" in table
    assert "| at least 140x torch.compile | not measured |  |" in table
    assert "a CPU, CPU library avx512, torch 2" in table


def test_the_headline_compares_with_the_original_and_the_fastest_other(measured):
    table = measured.headline("local_matching")
    costs = "50 ms, 20 MB | CFBI: 1500 ms, 1400 MB | tiled GEMM: 200 ms, ? MB |"
    assert f"| [`local_matching`](docs/ops/local_matching.md) | 120x214 | {costs}" in table
    assert table.endswith("a CPU, CPU library avx512, torch 2, Python 3.")


def test_all_lists_every_contender(measured):
    table = measured.everything("local_matching")
    assert "| CFBI loop | 1500 | 1500 | 30x | 50% | 1400 |" in table
    assert "unfold left out: too large." in table


def test_makers_stand_side_by_side_with_the_interval_of_the_ratio(measured, tmp_path):
    row = "| `local_matching` | `480p` | 50 | tiled GEMM: 200 | 4x |"
    assert f"{row} not measured |  |  |" in measured.makers("local_matching")
    report = json.loads((tmp_path / "local_matching_cpu.json").read_text())
    report["machine"] |= {"processor": "another CPU", "capability": "amx"}
    report["results"][0]["ratios"] = {"tiled GEMM": {"median": 4.1, "low": 3.9, "high": 4.25}}
    (tmp_path / "local_matching_intel.json").write_text(json.dumps(report))
    table = measured.makers("local_matching")
    assert f"{row} 50 | tiled GEMM: 200 | 4x (3.9 to 4.25) |" in table
    assert "Intel: another CPU, CPU library amx, torch 2" in table


def test_errors_have_a_column_for_each_precision(measured, tmp_path):
    assert measured.errors("all").startswith("Not measured yet. Command: `python benchmarks/errors.py`")
    row = {"case": "a read", "error": "output", "errors": {"highest": 1.24e-6, "medium": 0}}
    machine = {"processor": "a CPU", "capability": "amx", "torch": "2", "python": "3"}
    report = {"machine": machine, "columns": ["highest", "high", "medium"], "rows": [row]}
    (tmp_path / "errors_cpu.json").write_text(json.dumps(report))
    table = measured.errors("all")
    assert "| a read | output | 1.2e-06 |  | 0 |" in table
    assert table.endswith("a CPU, CPU library amx, torch 2, Python 3. Command: `python benchmarks/errors.py`")


def test_a_busy_machine_is_told(measured, tmp_path):
    file = tmp_path / "local_matching_cpu.json"
    report = json.loads(file.read_text())
    report["results"][0]["load"] = 7.0
    file.write_text(json.dumps(report))
    assert "load average was up to 7.0" in measured.goals("local_matching")


def test_regions_are_replaced_and_the_rest_is_kept(measured):
    page = "before\n<!-- table: goals local_matching -->\nold\n<!-- end of table -->\nafter\n"
    once = measured.rewritten(page)
    assert once.startswith("before\n") and once.endswith("after\n") and "old" not in once
    assert measured.rewritten(once) == once


def test_every_region_of_the_pages_is_known(make_tables):
    regions = [match for page in make_tables.PAGES for match in make_tables.REGION.finditer(page.read_text())]
    assert len(regions) >= 12
    for match in regions:
        kind, name = match[2], match[3]
        assert kind in make_tables.KINDS
        known = {
            "segmentation": ["propagate"],
            "systems": ["all", *systems.NETWORKS],
            "headline": ["all", *make_tables.BENCHMARKS],
            "models": ["objects", "classes"],
            "makers": ["all", *make_tables.BENCHMARKS],
            "errors": ["all"],
            "networks": ["all", *(page.stem for page in (ROOT / "docs" / "models").glob("*.md"))],
        }
        assert name in known.get(kind, make_tables.BENCHMARKS)


def test_segmentation_is_copied_from_the_page_of_the_model(make_tables, tmp_path, monkeypatch):
    (tmp_path / "docs/models").mkdir(parents=True)
    page = tmp_path / "docs/models/some.md"
    page.write_text("| no |\n## Measured\ntext\n\n| clip | J |\n|---|---|\n| dog | 0.9 |\n\n| other |\n")
    monkeypatch.setattr(make_tables, "ROOT", tmp_path)
    table = make_tables.segmentation("some")
    assert table.startswith("| clip | J |\n|---|---|\n| dog | 0.9 |\n\nFrom")
    page.write_text("## Measured\n| clip | J |\n|---|---|\n| dog | 0.9 |\n| **mean** | **0.9** |\n")
    assert make_tables.segmentation("some").startswith(
        "| clip | J |\n|---|---|\n| **mean** | **0.9** |\n\nFrom"
    )
    assert make_tables.segmentation("none").startswith("Not measured yet.")


def test_systems_stand_frugal_beside_naive(make_tables, tmp_path):
    assert make_tables.of_systems("stm").startswith("Not measured yet.")
    case = systems.CASES["stm-1080p"]
    found = [
        systems.Measurement(case, False, seconds=12.0, peak=3_200_000_000, memory=1),
        systems.Measurement(case, True, failure="more than 16 GB"),
    ]
    results = [{**m.to_dict(), "threads": 2, "load": 0.5} for m in found]
    report = {"machine": {"processor": "a CPU", "torch": "2"}, "results": results}
    (tmp_path / "systems_cpu.json").write_text(json.dumps(report))
    table = make_tables.of_systems("stm")
    assert "| stm-1080p | 1920 x 1080 | 3 | 20 | 12.0 s | - | 3.20 GB | more than 16 GB |" in table
    assert make_tables.of_systems("rgmp").startswith("Not measured yet.")
    assert make_tables.of_systems("all").startswith(table.splitlines()[0])


@pytest.fixture
def networks(make_tables, tmp_path):
    """U-Net both ways, and DANet's naive run that was not made."""

    def result(network: str, naive: bool, memory: int | None, **more: object) -> dict:
        seconds = None if memory is None else 2.26
        known = {"network": network, "size": "1024p", "naive": naive, "load": 3.2, "before": 700_000_000}
        return {**known, "seconds": seconds, "memory": memory, **more}

    report = {
        "machine": {"processor": "a CPU", "capability": "avx512", "torch": "2", "python": "3"},
        "results": [
            result("unet", False, 1_360_000_000),
            result("unet", True, 4_070_000_000, counted=3_490_000_000),
            result("danet", True, None, counted=13_300_000_000),
        ],
    }
    (tmp_path / "networks_cpu.json").write_text(json.dumps(report))
    return make_tables


def test_networks_at_high_resolution(networks):
    page = networks.of_networks("unet")
    assert "| `unet` | 2048 x 1024 | 2.3 s | 2.3 s | 1.36 GB | 4.07 GB | 0.70 GB |" in page
    assert "danet" not in page
    assert (
        "a CPU, CPU library avx512, torch 2, Python 3, one thread, float32. The load average was up to 3.2."
        in page
    )
    everything = networks.of_networks("all")
    assert "`unet`" in everything
    assert "| `danet` | 2048 x 1024 |  | - |  | more than 13.3 GB |  |" in everything
    assert (
        networks.of_networks("pspnet") == "Not measured yet. Command: `python benchmarks/bench_networks.py`"
    )
