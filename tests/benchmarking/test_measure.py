"""The measuring itself: turns, memory, ceilings."""

import math
import os
import sys
import time
from dataclasses import replace
from random import Random

import pytest
import torch

import vosops
import vosops.info
from vosops.benchmarking.arithmetic import Arithmetic, _loops, _tiles
from vosops.benchmarking.cases import CHANNELS, Case
from vosops.benchmarking.fresh import run_fresh
from vosops.benchmarking.measure import Ceilings, Clock, Timing, interleave, median_interval, peak_bytes
from vosops.benchmarking.runner import BENCHMARKS


def test_functions_take_turns():
    order = []
    functions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = interleave(functions, Clock(), rounds=3, least=1, budget=10)
    assert "".join(order) == "ababab"
    assert {name: len(t.runs) for name, t in timings.items()} == {"a": 3, "b": 3}


def test_a_slow_function_runs_less_often_but_at_least_as_often_as_asked():
    functions = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    timings = interleave(functions, Clock(threads=2), rounds=6, least=2, budget=0.01)
    assert len(timings["slow"].runs) == 2
    assert len(timings["fast"].runs) == 6
    assert timings["slow"].best >= 0.02


def test_one_thread_is_timed_in_cpu_time():
    assert Clock(threads=1).seconds(lambda: time.sleep(0.05)) < 0.02
    assert Clock(threads=2).seconds(lambda: time.sleep(0.05)) >= 0.05


def test_the_median_is_not_moved_by_an_outlier():
    timing = Timing((1.0, 2.0, 100.0))
    assert (timing.median, timing.best) == (2.0, 1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_counts_what_was_freed_again():
    def allocate():
        torch.ones(25_000_000)  # 100 MB, freed at once

    peak = peak_bytes(allocate, torch.device("cpu"))
    assert 95e6 < peak < 130e6
    assert peak_bytes(lambda: None, torch.device("cpu")) < 20e6


@pytest.mark.parametrize("threads", [1, 2])
def test_the_arithmetic_loop_does_the_work_it_claims(threads):
    """No such loop is slower than a gigaflop a second, and no core does a teraflop in float32."""
    clock = Clock(threads=threads)
    arithmetic = Arithmetic(clock, torch.float32)
    rate = arithmetic.flops / min(clock.seconds(arithmetic) for _ in range(3))
    assert 1e9 < rate < 1e12 * threads


@pytest.mark.skipif(
    vosops.info.collect()["cpu"]["amx"] != "used", reason="the processor has no AMX, or it may not be used"
)
def test_with_amx_its_tiles_are_the_ceiling():
    by = {dtype: Arithmetic(Clock(), dtype).by for dtype in (torch.bfloat16, torch.float16, torch.float64)}
    assert by == {
        torch.bfloat16: "a loop of AMX products of random bfloat16",
        torch.float16: "a loop of AMX products of random bfloat16, 3 for each of a wider number",
        torch.float64: "a matrix product",
    }
    (loop,) = _tiles(3).values()
    assert loop(10) == torch.ops.vosops.peak_amx_operations(10, 3) // 6 > 0
    assert set(_loops(torch.float32)) == {
        "a loop of multiply-adds",
        "a loop of AMX products of random bfloat16, 6 for each of a wider number",
    }


def test_the_interval_of_the_median_holds_it_as_often_as_said():
    """Of 9 values the second to the eighth, 1 - 2 (1 + 9) / 2^9 = 96.1 %; the third to the seventh hold it in 82 %."""
    interval = median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (interval.low, interval.median, interval.high) == (2, 5, 8)
    assert median_interval([1] * 5) is None
    random = Random(0)
    held = 0
    for _ in range(2000):
        interval = median_interval([random.expovariate(1) for _ in range(15)])
        held += interval.low <= math.log(2) <= interval.high
    assert 0.95 <= held / 2000 < 0.98


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    ceilings = Ceilings(flops=100.0, bytes=10.0, arithmetic_by="")
    assert ceilings.floor(1000, 10) == 10
    assert ceilings.floor(1000, 1000) == 100


def test_a_fresh_process_returns_the_result_and_its_errors():
    assert run_fresh("os", "getppid") == os.getpid()
    with pytest.raises(RuntimeError, match=r"math.sqrt failed in a separate process: ValueError"):
        run_fresh("math", "sqrt", -1.0)
    with pytest.raises(RuntimeError, match=r"signal.raise_signal failed in a separate process: SIGKILL"):
        run_fresh("signal", "raise_signal", 9)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_counts_buffers_that_an_op_keeps():
    """On a first call, so that the buffers are not there yet: unfolding 25 windows takes far more than the op."""
    case = Case("small", 60, 107, objects=1, radius=2)
    ours, unfold = (first_call_peak_of("local_matching", name, case) for name in ("vosops", "unfold"))
    assert unfold > 25 * 4 * CHANNELS * 60 * 107
    assert ours < unfold / 3


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_training_through_global_conv_needs_less_memory_than_pytorch():
    case = BENCHMARKS["global_conv"].case("4096x15x27-backward")
    case = replace(case, size=replace(case.size, channels=1024))
    ours, eager = (first_call_peak_of("global_conv", name, case) for name in ("vosops", "four convolutions"))
    gradients = 4 * sum(t.numel() for t in case.inputs(torch.device("cpu")).tensors)
    assert gradients < ours < 0.9 * eager


def first_call_peak_of(op, name, case):
    return run_fresh("vosops.benchmarking.runner", "first_call_peak", op, name, case, 1)
