"""benchmarks/cuda_report.py: occupancy, comparison, and what the committed tables must show of every kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
VERSIONS = sorted(path.stem for path in (ROOT / "benchmarks/results/cuda").glob("*.json"))


@pytest.fixture(scope="module")
def cuda_report():
    return load_script(ROOT / "benchmarks/cuda_report.py")


@pytest.fixture(scope="module", params=VERSIONS)
def targets(cuda_report, request) -> dict[str, dict[str, dict]]:
    """The committed table of one version of nvcc."""
    nvcc, table = cuda_report.from_json((cuda_report.TABLES / f"{request.param}.json").read_text())
    assert nvcc == request.param
    return table


@pytest.fixture(scope="module")
def rows(targets) -> dict[str, dict]:
    """Every kernel of a committed table on every target."""
    return {f"{target} {name}": row for target, kernels in targets.items() for name, row in kernels.items()}


@pytest.mark.parametrize(
    ("registers", "threads", "blocks"),
    [
        (32, 256, 8),  # 64 warps hold 8 blocks, their registers are just there
        (33, 256, 6),  # 40 registers a thread are given out: 51 warps, 48 in fours
        (255, 256, 1),
        (168, 384, 1),
        (16, 32, 32),  # no more than 32 blocks
        (255, 1024, 0),  # does not fit at all
    ],
)
def test_blocks_that_registers_and_threads_allow(cuda_report, registers, threads, blocks):
    assert cuda_report.resident_blocks(registers, threads, cuda_report.LIMITS["sm_90a"]) == blocks


def test_smaller_chips_hold_fewer_warps(cuda_report):
    assert cuda_report.resident_blocks(32, 256, cuda_report.LIMITS["sm_120"]) == 6


def test_shared_memory_left_for_each_block(cuda_report):
    limits = cuda_report.LIMITS["sm_90a"]
    assert cuda_report.shared_room(1, limits) == 227 << 10
    assert cuda_report.shared_room(2, limits) == 113 << 10
    assert cuda_report.shared_room(0, limits) == 0


def test_names_keep_every_template_argument(cuda_report):
    kernel = "vosops::cuda::(anonymous namespace)::tensor::kernel"
    name = f"void {kernel}<c10::BFloat16, (int)2, (vosops::cuda::Arithmetic)1>(int)"
    assert cuda_report.short_name(name) == "tensor::kernel<BFloat16, 2, 1>"


@pytest.mark.parametrize(
    ("architecture", "target"), [("9.0a", "sm_90a"), ("8.0", "sm_80"), ("12.0+PTX", "sm_120")]
)
def test_target_of_an_architecture(cuda_report, architecture, target):
    assert cuda_report.target_of(architecture) == target


def test_a_cubin_is_known_by_the_unnamed_namespace_of_its_source(cuda_report):
    function = " Function _ZN6vosops4cuda{}_GLOBAL__N__7787d90a_{}_{}_cu_2d7eb201_102646kernelEv:\n  REG:40"
    for source in ("memory_read", "memory_read_backward"):
        mangled = function.format(len(source) + 39, len(source) + 3, source)
        assert cuda_report.source_of(mangled) == source
    assert cuda_report.source_of(" Function _ZN6vosops4cuda11pack_kernelEv:\n") is None


def test_every_generation_has_code_of_its_own_and_those_to_come_have_ptx():
    """The code of sm_90a, and its PTX, would run on compute capability 9.0 alone."""
    setup = (ROOT / "setup.py").read_text()
    (listed,) = re.findall(r'^DEFAULT_CUDA_ARCHITECTURES = "(.*)"$', setup, re.MULTILINE)
    entries = listed.split(";")
    assert {entry.split(".")[0] for entry in entries} == {"8", "9", "10", "12"}
    assert entries[-1].endswith("+PTX")
    assert not [entry for entry in entries if entry.removesuffix("+PTX").endswith(("a", "f"))]
    assert f'"{listed}"' in (ROOT / "Makefile").read_text()


def test_a_library_of_other_architectures_or_sources_cannot_stand_for_them(cuda_report):
    build = {"cuda_architectures": "9.0a;12.0+PTX", "sources": "abc"}
    assert cuda_report.why_not_built(build, "abc", ["sm_90a"]) == []
    assert cuda_report.why_not_built(build, "abc", ["sm_90a", "sm_80"]) == [
        "it holds sm_90a, sm_120, not sm_80"
    ]
    assert cuda_report.why_not_built({"sources": "abc"}, "abd", ["sm_80"]) == [
        "it holds nothing, not sm_80",
        "it was built from other sources (abc, here abd)",
    ]


def test_without_a_library_there_is_nothing_to_examine(cuda_report, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_report, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_report, "LIBRARY", tmp_path / "libvosops_cuda.so")
    with pytest.raises(SystemExit, match=r"libvosops_cuda.so cannot be examined: there is none"):
        cuda_report.built_cubins(["sm_90a"], tmp_path)


def test_differences_are_named_and_other_targets_left_alone(cuda_report):
    row, changed = {"registers": 32}, {"registers": 40}
    committed = {"sm_80": {"a": row, "gone": row}, "sm_90a": {"a": row}}
    table = {"sm_80": {"a": changed, "new": row}, "sm_120": {"a": row}}
    assert cuda_report.differences(table, committed) == [
        "sm_80 a: {'registers': 32} -> {'registers': 40}",
        "sm_80 gone: {'registers': 32} -> None",
        "sm_80 new: None -> {'registers': 32}",
    ]
    assert cuda_report.differences({"sm_90a": {"a": row}}, committed) == []


def test_an_nvcc_without_a_table_is_held_to_bounds_and_says_so(cuda_report, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_report, "TABLES", tmp_path)
    row = dict.fromkeys(cuda_report.FIGURES, 1)
    table = {"sm_90a": {"a": row | {"spills": 64}}, "sm_120": {"a": row | {"spills": 65}}}
    assert "99.1 has no table (there are no version)" in cuda_report.held_against("99.1")
    assert cuda_report.problems("99.1", table) == []
    assert cuda_report.problems("99.1", {"sm_80": {"a": row | {"spills": 65}}}) == [
        "sm_80 a: spills 65, stack 1"
    ]
    assert len(cuda_report.problems("99.1", {"sm_80": {"a": row | {"blocks": 0}}})) == 1
    (tmp_path / "99.1.json").write_text(cuda_report.to_json("99.1", table))
    assert cuda_report.problems("99.1", table) == []
    assert len(cuda_report.problems("99.1", {"sm_90a": {"a": row}})) == 1


def test_a_table_is_read_as_it_was_written(cuda_report):
    row = dict.fromkeys(cuda_report.FIGURES, 3)
    table = {"sm_80": {"a": row, "b": row | {"spills": 8}}, "sm_90a": {"a": row}}
    text = cuda_report.to_json("99.1", table | {"sm_120": {"a": row}})
    assert cuda_report.from_json(text) == ("99.1", table)
    assert len([line for line in text.splitlines() if "sm_80" in line]) == 2


def test_a_committed_table_has_every_target_and_the_same_kernels_on_each(cuda_report, targets):
    assert set(targets) == set(cuda_report.TARGETS)
    assert len({frozenset(kernels) for kernels in targets.values()}) == 1
    sources = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} - {"version"}
    assert {name.split(":")[0] for name in targets["sm_90a"]} == sources


def test_no_kernel_spills(rows):
    assert [name for name, row in rows.items() if row["spills"] or row["stack"]] == []


def test_every_kernel_fits_on_a_multiprocessor(rows):
    assert [name for name, row in rows.items() if row["blocks"] < 1] == []


def test_products_use_tensor_cores_and_arrive_by_asynchronous_copies_of_16_bytes(rows):
    products = {name: row for name, row in rows.items() if "tensor::kernel" in name}
    assert products
    assert [n for n, row in products.items() if not (row["HMMA"] or row["HGMMA"])] == []
    assert [n for n, row in products.items() if not row["LDGSTS"]] == []
