"""Runs a case: the same inputs for all, their results compared, then timed in turn."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import vosops
from vosops._checks import float32_precision
from vosops.benchmarking import (
    conv_lstm,
    global_conv,
    global_matching,
    local_attention,
    local_correlation,
    local_matching,
    memory_read,
)
from vosops.benchmarking.arithmetic import Arithmetic
from vosops.benchmarking.cases import BEST, Benchmark, Plan, Variant
from vosops.benchmarking.fresh import run_fresh
from vosops.benchmarking.measure import (
    Ceilings,
    Clock,
    Interval,
    Timing,
    bandwidth,
    interleave,
    median_interval,
    peak_bytes,
)

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.op: module.BENCHMARK
    for module in (
        local_matching,
        global_matching,
        memory_read,
        local_attention,
        local_correlation,
        global_conv,
        conv_lstm,
    )
}

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9}
"""How far two formulations may be apart, in normalised distances and relative to the largest gradient."""

BACKWARD_TOLERANCE_FACTOR = 10
"""Gradients may be this much further apart: they are sums over pixels."""

MISMATCHED_SHARE = 1e-3
"""Share of gradient entries that may differ: where two pixels are equally near, either may be chosen."""

CEILING = "arithmetic"


class DisagreementError(RuntimeError):
    """A contender computes something else."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: `rounds` of all, `least` of those over `budget` seconds."""

    rounds: int = 9
    least: int = 3
    budget: float = 5.0


FULL, QUICK = Effort(), Effort(rounds=5, least=2, budget=1.0)
JUDGED = Effort(rounds=9, least=9)
"""For a verdict: nobody runs less often than the others."""

LOST = 0.97
"""vosops loses to a peer where the time of the peer over that of vosops is below this, by all of its interval."""

QUIET_LOAD = 0.5
"""Several threads are judged up to this load average only: other programs delay wall time."""


@dataclass(frozen=True)
class VariantResult:
    """One contender: its runs in seconds, peak bytes above the inputs, first (compiling) call, speed-up."""

    name: str
    median: float
    best: float
    runs: tuple[float, ...]
    first_call: float
    peak: int | None
    speedup: float
    """Of vosops over it: its median over that of vosops."""
    share: float
    """Its share of what the machine can do at most: the floor over its median."""


@dataclass(frozen=True)
class Result:
    """A case, measured."""

    op: str
    case: Plan
    variants: tuple[VariantResult, ...]
    left_out: dict[str, str]
    flops: float
    bytes: float
    ceilings: Ceilings
    clock: str
    threads: int
    load: float | None
    """The machine's load average when the case began: above the number of cores, others were at work too."""

    def rivals(self) -> list[VariantResult]:
        """Return the contenders of other origin: no variants of vosops."""
        ours, *others = self.variants
        return [v for v in others if not v.name.startswith(ours.name)]

    def ratios(self) -> dict[str, Interval]:
        """Return the time of each rival over that of vosops, round by round; of those who ran in enough rounds."""
        ours = self.variants[0]
        found = {
            v.name: median_interval([a / b for a, b in zip(v.runs, ours.runs, strict=False)])
            for v in self.rivals()
        }
        return {name: interval for name, interval in found.items() if interval is not None}

    def is_judged(self) -> bool:
        """Whether the times can be compared: process time, or a quiet machine."""
        return self.threads == 1 or self.load is None or self.load <= QUIET_LOAD

    def lost_to(self) -> dict[str, Interval]:
        """Return the rivals that are faster beyond doubt."""
        return {name: ratio for name, ratio in self.ratios().items() if ratio.high < LOST}

    def goals(self) -> dict[str, tuple[float, float, bool]]:
        """Return what was aimed at: name -> (goal, reached, whether that meets it)."""
        ours, *others = self.variants
        found = {
            f"x {v.name}": (self.case.goals[v.name], v.speedup) for v in others if v.name in self.case.goals
        }
        rivals = [v.speedup for v in self.rivals()]
        if BEST in self.case.goals and rivals:
            found[f"x {BEST}"] = (self.case.goals[BEST], min(rivals))
        if self.case.goal_share is not None:
            found["share of peak"] = (self.case.goal_share, ours.share)
        result = {name: (goal, reached, reached >= goal) for name, (goal, reached) in found.items()}
        if self.case.goal_memory is not None and ours.peak is not None:
            result["MB"] = (self.case.goal_memory / 1e6, ours.peak / 1e6, ours.peak <= self.case.goal_memory)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "case": self.case.name,
            "title": self.case.title,
            "clock": self.clock,
            "threads": self.threads,
            "load": self.load,
            "flops": self.flops,
            "bytes": self.bytes,
            "ceilings": asdict(self.ceilings),
            "variants": [asdict(v) for v in self.variants],
            "left_out": self.left_out,
            "ratios": {name: asdict(ratio) for name, ratio in self.ratios().items()},
            "goals": {k: {"goal": g, "reached": r, "met": m} for k, (g, r, m) in self.goals().items()},
        }


def run_case(
    benchmark: Benchmark,
    case: Plan,
    *,
    device: str = "cpu",
    threads: int = 1,
    dtype: torch.dtype | None = None,
    effort: Effort = FULL,
) -> Result:
    """Compare the contenders' results, measures their memory, then times them in turn.

    Args:
        benchmark: the op.
        case: the size.
        device: "cpu" or "cuda".
        threads: of the CPU, where the case does not say.
        dtype: instead of the case's own.
        effort: how long to measure.

    Raises:
        DisagreementError: a contender's result differs from that of vosops.
    """
    case = case if dtype is None else replace(case, dtype=dtype)
    clock = Clock(device, case.threads or threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with _threads(clock.threads):
        inputs = case.inputs(clock.device)
        variants, left_out = _contenders(benchmark, case, clock)
        calls = {v.name: v.call(inputs, case.backward) for v in variants}
        first_calls = {}
        expected: list[Tensor] | None = None
        for name, call in calls.items():
            start = time.perf_counter()
            outputs = call()
            first_calls[name] = time.perf_counter() - start
            if expected is None:
                expected = outputs
            _compare(
                benchmark.variants[0].name,
                expected,
                name,
                outputs,
                case.dtype,
                benchmark.result,
                case.mismatched_share,
            )
            del outputs
        peaks = {name: _peak(benchmark, case, name, clock) for name in calls}
        arithmetic = Arithmetic(clock, case.dtype)
        arithmetic()
        timed: dict[str, Callable[[], Any]] = {CEILING: arithmetic, **calls}
        timings = interleave(timed, clock, rounds=effort.rounds, least=effort.least, budget=effort.budget)
        ceilings = Ceilings(arithmetic.flops / timings.pop(CEILING).best, bandwidth(clock), arithmetic.by)
        flops, moved = benchmark.work(case, inputs)
    ours = timings[benchmark.variants[0].name].median
    floor = ceilings.floor(flops, moved)
    results = [
        _result(name, timing, first_calls[name], peaks[name], ours, floor) for name, timing in timings.items()
    ]
    return Result(
        benchmark.op, case, tuple(results), left_out, flops, moved, ceilings, clock.kind, clock.threads, load
    )


def _result(
    name: str, timing: Timing, first_call: float, peak: int | None, ours: float, floor: float
) -> VariantResult:
    return VariantResult(
        name,
        timing.median,
        timing.best,
        timing.runs,
        first_call,
        peak,
        speedup=timing.median / ours,
        share=floor / timing.median,
    )


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what was measured on: processor, device, versions."""
    from vosops import info

    facts = info.collect()
    return {
        "processor": facts["cpu"]["processor"],
        "flags": facts["cpu"]["flags"],
        "amx": facts["cpu"]["amx"],
        "float32_precision": float32_precision(),
        "capability": facts["cpu"]["library"],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "vosops": vosops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": facts["build"],
    }


def _contenders(benchmark: Benchmark, case: Plan, clock: Clock) -> tuple[list[Variant], dict[str, str]]:
    """Who can run, and why the others cannot."""
    left_out = dict(case.left_out)
    variants = []
    for variant in benchmark.contenders(case):
        if case.backward and not variant.differentiable:
            left_out[variant.name] = "has no gradients"
        elif clock.on_gpu and not variant.gpu:
            left_out[variant.name] = "runs on the CPU only"
        elif variant.package is not None and importlib.util.find_spec(variant.package) is None:
            left_out[variant.name] = f"{variant.package} is not installed"
        else:
            variants.append(variant)
    return variants, left_out


def _peak(benchmark: Benchmark, case: Plan, variant: str, clock: Clock) -> int | None:
    """Return the peak memory of a contender; of the CPU in a separate process."""
    if clock.on_gpu:
        call = next(v for v in benchmark.variants if v.name == variant).call(
            case.inputs(clock.device), case.backward
        )
        call()
        return peak_bytes(call, clock.device)
    arguments = (benchmark.op, variant, case, clock.threads)
    peak: int | None = run_fresh(__name__, "first_call_peak", *arguments)
    return peak


def first_call_peak(op: str, name: str, case: Plan, threads: int) -> int | None:
    """Return the peak memory of a contender's first call of a case, after a small call that loads code.

    What the call keeps for later calls counts too. Compiled code is called once before: compiling does not
    count.
    """
    torch.set_num_threads(threads)
    variant = next(v for v in BENCHMARKS[op].variants if v.name == name)
    cpu = torch.device("cpu")
    call = variant.call(case.inputs(cpu), case.backward)
    if variant.compiles:
        call()
    else:
        variant.call(case.small().inputs(cpu), case.backward)()
    return peak_bytes(call, cpu)


def _compare(
    first: str,
    expected: list[Tensor],
    name: str,
    outputs: list[Tensor],
    dtype: torch.dtype,
    result: str = "distances",
    mismatched_share: float = 0.0,
) -> None:
    """DisagreementError unless both computed the same."""
    for i, (a, b) in enumerate(zip(expected, outputs, strict=True)):
        tolerance = TOLERANCE[dtype] * (BACKWARD_TOLERANCE_FACTOR * float(a.abs().max()) if i else 1)
        different = ((a.float() - b.float()).abs() > tolerance) | b.isnan()
        allowed = (MISMATCHED_SHARE if i else mismatched_share) * different.numel()
        if int(different.sum()) > allowed:
            what = result if i == 0 else "gradients"
            worst = float((a.float() - b.float()).abs().max())
            raise DisagreementError(
                f"{name} and {first} disagree in {int(different.sum())} of {different.numel()} {what}, by up to "
                f"{worst:.2g} where {tolerance:.2g} is allowed"
            )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
