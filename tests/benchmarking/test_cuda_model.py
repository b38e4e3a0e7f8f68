"""benchmarks/sass.py and cuda_model.py: blocks, loops and regions of small programs, and the committed files."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vosops
from benchmarks import cuda_model, cuda_problems, cuda_report, sass

ROOT = Path(__file__).parents[2]

SOURCE = """
void kernel() {
  // VISIT(in_a_comment, 1) {
  for (int i = 0; i < n;
       ++i) {
    VISIT(tile, 1);
    work("}");
    if (rare) {
      VISIT(rare, 2);
      more();
    }
    copy();
  }
}
"""

BODY = """
	//## File "/somewhere/kernel.cu", line 2
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDSM.16.M88.4 R4, [R1] ;
.L_x_1:
	//## File "/somewhere/copy.cuh", line 9 inlined at "/somewhere/kernel.cu", line 7
	//## File "/somewhere/kernel.cu", line 7
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0030*/                   LDSM.16.M88.4 R4, [R1] ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
	//## File "/somewhere/kernel.cu", line 10
        /*0060*/                   IADD3 R1, R1, R2, RZ ;
        /*0070*/                   IADD3 R1, R1, R2, RZ ;
.L_x_2:
	//## File "/somewhere/kernel.cu", line 12
        /*0080*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0090*/               @P1 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP;
"""


def test_blocks_end_at_jumps_and_labels():
    graph = sass.blocks(BODY)
    assert [[i.name.split(".")[0] for i in block.instructions] for block in graph] == [
        ["MOV", "LDSM"],
        ["HMMA", "LDSM", "LDS", "BRA"],
        ["IADD3", "IADD3"],
        ["LDGSTS", "BRA"],
        ["EXIT"],
        ["BRA"],
        ["NOP"],
    ]
    assert [block.following for block in graph] == [{1}, {2, 3}, {3}, {1, 4}, set(), {5}, set()]
    assert graph[1].instructions[0].lines == (("copy.cuh", 9), ("kernel.cu", 7))
    assert graph[2].instructions[0].lines == (("kernel.cu", 10),)
    assert graph[1].instructions[2].never_runs and not graph[1].instructions[3].never_runs


@pytest.mark.parametrize(
    "jump", ["BRA.U UP0, `(.L_x_3)", "BRA.DIV UR4, `(.L_x_3)", "@P0 BRA `(.L_x_3)", "BRA `(.L_x_3)"]
)
def test_a_jump_with_a_condition_falls_through(jump):
    graph = sass.blocks(BODY.replace("@P1 BRA `(.L_x_1)", jump))
    assert graph[3].following == ({5} if jump.startswith("BRA `") else {4, 5})


def test_a_jump_to_an_unknown_label_is_an_error():
    with pytest.raises(ValueError, match=r"a jump to \.L_x_9"):
        sass.blocks(BODY.replace("`(.L_x_1)", "`(.L_x_9)"))


def test_loops_are_natural_and_only_those_that_can_be_reached():
    assert sass.loops(sass.blocks(BODY)) == [{1, 2, 3}]


def test_loops_within_loops():
    graph = [sass.Block(following=following) for following in ({1}, {2}, {1, 3}, {0, 4}, set())]
    assert sass.loops(graph) == [{1, 2}, {0, 1, 2, 3}]


def test_regions_are_blocks_with_their_statements():
    found = sass.regions("kernel.cu", SOURCE)
    assert [(r.name, r.first, r.last) for r in found] == [("tile", 4, 13), ("rare", 8, 11)]
    with pytest.raises(ValueError, match=r"VISIT\(alone, \.\.\.\) is in no block"):
        sass.regions("kernel.cu", "VISIT(alone, 1);")


def test_every_block_is_weighed_by_its_visits():
    visits = {"tile": (100, 1), "rare": (60, 2)}
    known = [*sass.regions("kernel.cu", SOURCE), sass.Region("kernel.cu", "some_copy", 12, 12)]
    tile = cuda_model.count(BODY, known, {**visits, "some_copy": (100, 1)}, warps=10)
    # The loop's 4 + 2 instructions, 0.3 times the rare 2, and a tenth of what is outside: MOV, LDSM and EXIT. Nothing
    # leads to the BRA behind them.
    assert tile.instructions == pytest.approx(4 + 2 + 0.3 * 2 + 0.1 * 3)
    assert (tile.products, tile.copies, tile.flops) == (1, 1, 4096)
    assert tile.copy_instructions == pytest.approx(2 + 0.1)
    assert tile.shared_bytes == pytest.approx(512 + 512 + 0.1 * 512)


def test_copies_before_the_first_tile_run_once_for_a_warp():
    copy = "        /*0080*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;\n"
    line = '\t//## File "/somewhere/kernel.cu", line {}\n'
    before = f".L_x_0:\n{line.format(12)}{copy}               @P2 BRA `(.L_x_0) ;\n"
    moves = "        /*0081*/                   MOV R1, R1 ;\n" * 2
    # The compiler puts the loop's copy into a block of which most is the tile's own.
    body = before.replace("     @P2", "/*0000*/     @P2") + BODY.replace(copy, copy + line.format(7) + moves)
    known = [*sass.regions("kernel.cu", SOURCE), sass.Region("kernel.cu", "some_copy", 12, 12)]
    tile = cuda_model.count(body, known, {"tile": (100, 1), "some_copy": (100, 1)}, warps=10)
    assert tile.copies == pytest.approx(1 + 0.1)


def test_code_of_a_function_belongs_to_its_own_block_or_to_one_within_that_it_is_called_from():
    outer, call = sass.Region("a.cu", "tile", 1, 100), sass.Region("a.cu", "rare", 90, 92)
    by_line = {("a.cu", line): outer for line in range(1, 101)} | {
        ("a.cu", line): call for line in (90, 91, 92)
    }
    by_line[("a.cu", 200)] = sass.Region("a.cu", "elsewhere", 150, 400)
    assert cuda_model._region_of((("a.cu", 5), ("a.cu", 91)), by_line) == "rare"
    assert cuda_model._region_of((("a.cu", 91), ("a.cu", 5)), by_line) == "rare"
    assert cuda_model._region_of((("a.cu", 200), ("a.cu", 91)), by_line) == "elsewhere"
    assert cuda_model._region_of((("a.cu", 5), ("b.cu", 91)), by_line) == "tile"
    assert cuda_model._region_of((("b.cu", 91),), by_line) is None


def test_copies_of_a_loop_that_the_compiler_unrolls_are_counted_by_their_loads():
    """Here twice, and once for what is left over: 0.6 visits a tile are a fifth of these 3 copies."""
    load = "        /*0060*/                   LDG.E R1, [R2.64] ;\n"
    line = '\t//## File "/somewhere/kernel.cu", line 10\n'
    body = BODY.replace(f"{line}        /*0060*/", f"{line}{load * 2}        /*0060*/")
    body = body.replace(
        ".L_x_2:", f"               @P3 BRA `(.L_x_1) ;\n{load}.L_x_2:".replace("     @P3", "/*0075*/ @P3")
    )
    known = sass.regions("kernel.cu", SOURCE)
    visits = {"tile": (100, 1), "rare": (60, -1)}
    never = cuda_model.count(body, known, {"tile": (100, 1)}, warps=10)
    tile = cuda_model.count(body, known, visits, warps=10)
    assert tile.instructions - never.instructions == pytest.approx(0.2 * 6)
    assert tile.cached_bytes == pytest.approx(0.2 * 3 * 128)


def test_long_divisions_of_short_numbers_do_not_run():
    call = "        /*0055*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;\n"
    routine = "$__internal_0_$__cuda_sm20_div_s64:\n        /*00d0*/                   MOV R1, R1 ;\n"
    known, visits = sass.regions("kernel.cu", SOURCE), {"tile": (100, 1), "rare": (100, 1)}
    without = cuda_model.count(BODY, known, visits, warps=1)
    at_the_rare_place = BODY.replace("        /*0060*/", f"{call}        /*0060*/")
    divided = cuda_model.count(at_the_rare_place + routine, known, visits, warps=1)
    assert without.instructions - divided.instructions == pytest.approx(2)


def test_products_of_a_kernel_without_tensor_cores_are_those_of_fma():
    body = BODY.replace("HMMA.16816.F32.BF16", "FFMA").replace("LDSM.16.M88.4", "FFMA2")
    tile = cuda_model.count(body, sass.regions("kernel.cu", SOURCE), {"tile": (100, 1)}, warps=10)
    assert tile.products == pytest.approx(1 + 2 + 0.1 * 2) and tile.by_fma
    a100, h100 = cuda_model.CARDS[0], cuda_model.CARDS[-1]
    assert cuda_model.cycles(tile, a100)["products"] == 2 * cuda_model.cycles(tile, h100)["products"]


def test_a_kernel_without_products_or_copies_has_no_such_figures():
    figures = cuda_model.Tile(100, 0, 0, 0, 10, 0).figures()
    assert [cuda_report.in_words(figure) for figure in figures.values()] == ["-"] * 3


def test_code_without_visits_never_runs():
    known = sass.regions("kernel.cu", SOURCE)
    often = cuda_model.count(BODY, known, {"tile": (100, 1), "rare": (100, 1)}, warps=1)
    never = cuda_model.count(BODY, known, {"tile": (100, 1)}, warps=1)
    assert often.instructions - never.instructions == pytest.approx(2)


@pytest.mark.parametrize(
    ("blocks", "multiprocessors", "resident", "waves", "full"),
    [
        (132, 132, 1, 1, 1.0),
        (133, 132, 1, 2, 133 / 264),
        (286, 132, 2, 2, 286 / 528),
        (5, 108, 1, 1, 5 / 108),
    ],
)
def test_quantisation(blocks, multiprocessors, resident, waves, full):
    assert cuda_model.quantisation(blocks, multiprocessors, resident) == (waves, pytest.approx(full))


def test_the_slowest_part_of_a_multiprocessor_takes_the_time():
    card = cuda_model.CARDS[-1]
    launch = {"blocks": [132], "threads": 256, "launches": 0}
    reference = cuda_model.REFERENCES[0]
    tiles = reference.tiles(132, 0)
    for part, tile in (
        ("issue", cuda_model.Tile(4000, 10, 1, 1, 10, 10 * 4096)),
        ("products", cuda_model.Tile(100, 1000, 1, 1, 10, 1000 * 4096)),
        ("shared memory", cuda_model.Tile(100, 10, 1, 1, 5e5, 10 * 4096, 5e5)),
    ):
        found = cuda_model.predict(reference, tile, launch, 1, card)
        assert found.bound == part
        busy = 8 * tiles * cuda_model.cycles(tile, card)[part] / card.clock
        assert found.seconds == pytest.approx(busy + reference.streamed / card.bytes_per_second)


def test_a_kernel_takes_at_least_the_time_of_its_bytes_and_each_launch_has_its_blocks():
    card, tile = cuda_model.CARDS[-1], cuda_model.Tile(4000, 10, 1, 1, 10, 10 * 4096)
    reference = replace(
        cuda_model.REFERENCES[0], streamed=0, tiles=lambda blocks, number: number, mine=lambda n: n > 0
    )
    launch = {"blocks": [132, 133], "threads": 128, "launches": 2}
    found = cuda_model.predict(reference, tile, launch, 1, card)
    busy = (1 * 1 + 2 * 2) * 4 * 1000 / card.clock  # launches 1 and 2, the second with one block too many
    assert found.seconds == pytest.approx(busy + 2 * cuda_model.START) and found.bound == "issue"
    moved = replace(reference, moved=1e9)
    found = cuda_model.predict(moved, tile, launch, 1, card)
    assert found.seconds == pytest.approx(1e9 / card.bytes_per_second + 2 * cuda_model.START)
    assert found.bound == "memory"


def test_every_visit_of_the_sources_is_in_a_block_and_every_reference_has_paths():
    names = {region.name for region in cuda_model.source_regions()}
    counted = cuda_model.known_paths()
    assert set(counted) == {reference.kernel for reference in cuda_model.REFERENCES}
    for reference in cuda_model.REFERENCES:
        orders = counted[reference.kernel]
        assert set(orders) == set(reference.orders)
        for order in orders.values():
            assert reference.unit in order["visits"] and set(order["visits"]) <= names


def test_every_reference_is_launched_on_every_size_of_card():
    launched = json.loads(cuda_model.LAUNCHES.read_text())
    assert set(launched) == {reference.kernel for reference in cuda_model.REFERENCES}
    for reference in cuda_model.REFERENCES:
        assert set(launched[reference.kernel]) == {str(card.multiprocessors) for card in reference.cards}


def test_every_kernel_of_a_backward_op_that_walks_tiles_is_a_reference():
    """What is left out is counted as bytes: copies, sums and sorting around them."""
    modelled = {reference.kernel.split("<")[0] for reference in cuda_problems.BACKWARD}
    assert modelled >= {
        *(f"memory_read_backward: {name}_kernel" for name in ("weights", "ds", "product")),
        *(f"matching_backward: {name}_kernel" for name in ("query", "chunk")),
        *(f"memory_select: {name}_kernel" for name in ("weight", "value")),
        *(f"local_attention: {name}_kernel" for name in ("dot", "weigh")),
        "global_conv_weight: kernel",
        "local_correlation: weigh_kernel",
        "conv_lstm: backward_kernel",
    }


def test_every_op_of_the_library_has_a_predicted_time_or_is_a_part_of_one_that_has():
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    implemented = set(re.findall(r'\bm\.impl\("(\w+)"', sources)) - {"cuda_version"}
    forward, predicted = (
        {reference.op for reference in references}
        for references in (cuda_problems.FORWARD, cuda_model.REFERENCES)
    )
    assert implemented - predicted == set(cuda_problems.PARTS)
    assert set(cuda_problems.PARTS.values()) <= predicted
    assert set(vosops.list_ops()) <= forward


@pytest.mark.parametrize("version", sorted(path.stem for path in cuda_report.TABLES.glob("*.json")))
def test_every_kernel_is_modelled_or_counted_as_bytes_or_for_other_problems(version):
    _, rows = cuda_report.from_json((cuda_report.TABLES / f"{version}.json").read_text())
    modelled = {reference.kernel.split("<")[0] for reference in cuda_model.REFERENCES}
    others = [modelled, set(cuda_problems.ONLY_BYTES), set(cuda_problems.OTHER_PROBLEMS)]
    assert {name.split("<")[0] for name in rows["sm_90a"]} == set().union(*others)
    assert sum(map(len, others)) == len(set().union(*others))


def test_the_kernels_of_pytorch_take_their_products_or_their_bytes_and_their_launches():
    card = cuda_model.CARDS[0]
    by_bytes = cuda_model.Library("copy", card.bytes_per_second, card.flops / 2, launches=3)
    assert cuda_model.library_seconds(by_bytes, card) == pytest.approx(1 + 3 * cuda_model.START)
    by_products = cuda_model.Library("product", card.bytes_per_second, card.flops * 2)
    assert cuda_model.library_seconds(by_products, card) == pytest.approx(2 + cuda_model.START)


def test_the_floor_of_a_problem_is_that_of_all_its_kernels_or_of_one_that_does_it_whole():
    library = cuda_model.Library("copy", 2 * cuda_model.H100_BYTES)
    apart = [replace(cuda_model.REFERENCES[0], floor=1, libraries=each) for each in ((), (library,))]
    assert cuda_model.floor_of(apart) == pytest.approx(1 + 1 + 2)
    assert cuda_model.floor_of([replace(reference, whole=0.5) for reference in apart]) == 0.5


class Launches(TorchDispatchMode):
    """Names the operators of PyTorch that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.promote_types.default:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def launches_of_pytorch(op: str) -> int:
    found = [library for r in cuda_problems.FORWARD if r.op == op for library in r.libraries]
    return sum(library.launches for library in found)


def test_a_step_of_conv_lstm_launches_what_the_model_says(monkeypatch):
    module = importlib.import_module("vosops.ops.conv_lstm")
    x, state, weight = torch.ones(1, 1, 4, 5, 6), torch.ones(1, 4, 5, 6), torch.ones(16, 8, 3, 3)
    updated = (state, state, state.repeat(1, 4, 1, 1))
    monkeypatch.setattr(module, "dispatched", lambda name, suffix: lambda *arguments: updated)
    bias = torch.ones(16)
    with Launches() as launched:
        module._steps("", x, [weight], bias, state, state, "convolution", 1.0)
    assert launched.names == ["cat", "convolution"]
    of_bias = 1  # cuDNN's convolutions have none: PyTorch adds it
    assert launches_of_pytorch("conv_lstm") == len(launched.names) + of_bias


def test_local_attention_launches_what_the_model_says():
    module = importlib.import_module("vosops.ops.local_attention")
    maps = [torch.ones(1, 4, 6, 7, dtype=torch.bfloat16) for _ in range(3)]
    bias = torch.zeros(2, 9, dtype=torch.bfloat16)
    results = {module.DOT: torch.zeros(2, 9, 6, 7), module.WEIGH: torch.zeros(2, 2, 6, 7).bfloat16()}
    with Launches() as launched:
        module._by_pieces(lambda name, *_: results[name], *maps, bias, None, None, 2, 1, 1, 0.1, True)
    of_masked_fill = launched.names.count("masked_fill")  # a copy, and what fills it
    assert launches_of_pytorch("local_attention") == len(launched.names) + of_masked_fill


def test_visits_are_nothing_outside_of_the_emulator():
    with_nvcc, emulated = (
        (ROOT / "csrc/cuda/launch.cuh").read_text().split("#ifdef __CUDACC__")[-1].split("#else")
    )
    names = re.findall(r"#define (VISIT\w*)", emulated)
    assert set(names) == {"VISIT", "VISIT_AT", "VISIT_LOADS"}
    assert sorted(names) == sorted(re.findall(r"^#define (VISIT\w*)\([\w, ]+\)$", with_nvcc, re.MULTILINE))


def test_limits_rise_only_when_they_may():
    kernel = cuda_model.REFERENCES[0].kernel
    table = {"sm_90a": {kernel: {cuda_report.HOT: vars(cuda_model.Tile(60, 10, 1, 3, 1, 1))}}}
    assert cuda_report.hot_limits(table, {}, may_rise=False) == {
        kernel: {"instructions per product": 6.0, "instructions per copy": 12.0}
    }
    before = {kernel: {"instructions per product": 5.5, "instructions per copy": 12.0}}
    assert cuda_report.hot_limits(table, before, may_rise=False) == before
    assert cuda_report.crossed(table, before) == [
        f"sm_90a {kernel}: instructions per product 6.0 is over the limit of 5.5"
    ]
    assert cuda_report.crossed(table, cuda_report.hot_limits(table, before, may_rise=True)) == []


@pytest.mark.parametrize("version", sorted(path.stem for path in cuda_report.TABLES.glob("*.json")))
def test_committed_tiles_keep_their_limits_and_limits_beyond_a_goal_have_a_reason(version):
    text = (cuda_report.TABLES / f"{version}.json").read_text()
    _, table = cuda_report.from_json(text)
    limits = cuda_report.limits_of(text)
    assert cuda_report.crossed(table, limits) == []
    assert set(limits) == cuda_model.LIMITED
    for reference in cuda_model.REFERENCES:
        for target in cuda_report.TARGETS:
            assert {cuda_report.HOT, cuda_report.USUAL} <= table[target][reference.kernel].keys()
        of_kernel = limits.get(reference.kernel, {})
        over = [figure for figure, goal in cuda_model.GOALS.items() if of_kernel.get(figure, 0) > goal]
        assert bool(over) == bool(reference.reason), (reference.kernel, over)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the emulator needs Linux and g++")
def test_the_hosts_still_launch_what_the_committed_file_says():
    committed = json.loads(cuda_model.LAUNCHES.read_text())
    of_h100 = {kernel: {"132": cards["132"]} for kernel, cards in committed.items() if "132" in cards}
    assert cuda_model.launches([132]) == of_h100
