"""benchmarks/triton_model.py: which loop is counted, what it costs, and what is committed."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import triton_model
from benchmarks.triton_model import PLACES, REFERENCES, Loop

CODE = """
.L_x_0:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR6][R4.64] ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0050*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0060*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0070*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
"""
LOOP = Loop(8, 1, 600, 128 * 64 * (128 + 256), {"m64n64k16": 8}, 12, 3)


def test_the_loop_with_the_products_is_counted_not_the_longest():
    assert [i.name.split(".")[0] for i in triton_model.hot_loop(CODE)] == ["HGMMA", "LDGSTS", "BAR", "BRA"]


def test_a_step_issues_on_four_schedulers_and_multiplies_2048_pairs_a_cycle():
    assert LOOP.issue == 600 * 8 / 4
    assert LOOP.products == 128 * 64 * 384 / 2048
    assert LOOP.per_hmma == pytest.approx(600 / (128 * 64 * 384 / 8 / 2048))


def test_a_time_is_the_waves_times_the_steps_and_what_comes_around():
    reference = replace(REFERENCES[0], programs=133, steps=100, moved=3.35e6, launches=2)
    overlapped, in_turn = triton_model.seconds(reference, LOOP)
    assert overlapped == pytest.approx(2 * 100 * 1536 / 1.755e9 + 1e-6 + 4e-6)
    assert in_turn == pytest.approx(2 * 100 * (1536 + 1200) / 1.755e9 + 1e-6 + 4e-6)


def test_reads_are_cut_into_the_parts_that_the_op_makes():
    memory_scores = pytest.importorskip("vosops.triton.memory_scores")
    for reference, frames in zip(REFERENCES[:2], (20, 5), strict=True):
        steps = math.ceil(frames * PLACES / 64)
        parts = memory_scores.parts_for(26, steps, 132)
        assert (reference.programs, reference.steps) == (26 * parts, math.ceil(steps / parts))


def test_matching_and_convolutions_are_cut_as_the_ops_cut_them():
    common = pytest.importorskip("vosops.triton._common")
    matching, conv = (
        importlib.import_module(f"vosops.triton.{op}") for op in ("local_matching", "global_conv")
    )
    by_case, h100 = {reference.case: reference for reference in REFERENCES}, common.Target(9, 132)
    candidates = common.tilings(100, torch.bfloat16, "ieee", h100)
    window = matching.launch_plan(
        (1, 100, 120, 214), 1, (15,), 1, candidates, "ieee", exact=False, processors=132
    )
    assert by_case["local match bf16, C=100, radius 15"].programs == window.tiles * window.groups
    for stage, rows, channels in (("split", (256, 256), (4096, 4096)), ("merge", (256, 256), (256, 256))):
        merge, reference = stage == "merge", by_case[f"global conv {stage} bf16"]
        plan = conv.plan_of(rows, channels, (7, 7), 405, torch.bfloat16, "ieee", h100, merge=merge)
        steps = 7 * sum(channels) // 64 if merge else 7 * channels[0] // 64
        assert (reference.programs, reference.steps) == (
            plan.programs * plan.parts,
            math.ceil(steps / plan.parts),
        )


def test_what_is_committed_multiplies_by_wgmma_and_copies_asynchronously():
    version, loops = triton_model.committed()
    assert (triton_model.triton_report.TABLES / f"{version}.json").exists()
    assert set(loops) == {reference.case for reference in REFERENCES}
    for loop in loops.values():
        assert loop.wgmma and loop.copies and loop.barriers
        assert 1 < loop.per_hmma < 8
