"""benchmarks/triton_model.py: which loop is counted, what it costs, and what is committed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

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


def test_what_is_committed_multiplies_by_wgmma_and_copies_asynchronously():
    version, loops = triton_model.committed()
    assert (triton_model.triton_report.TABLES / f"{version}.json").exists()
    assert set(loops) == {reference.case for reference in REFERENCES}
    for loop in loops.values():
        assert loop.wgmma and loop.copies and loop.barriers
        assert 1 < loop.per_hmma < 8
