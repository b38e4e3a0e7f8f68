"""Times functions interleaved in one process, their peak memory, and what the machine can do at most."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = 1 << 28
CONFIDENCE = 0.95
L2_FLUSH_BYTES = 1 << 28
HEAD_START_CYCLES = 20_000_000
"""A GPU waits this long before the clock starts (about ten milliseconds, as long as Python takes for a forward and
backward pass), so that launches do not keep it waiting."""


class Clock:
    """The clock that suits the device and the number of threads, and that many threads for torch.

    One CPU thread is timed in CPU time of the process, which other programs on the machine disturb least;
    more threads in wall time; a GPU by events, with its caches emptied before each run.
    """

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        self.device = torch.device(device)
        self.threads = threads
        self.kind = "GPU events" if self.on_gpu else "process CPU time" if threads == 1 else "wall time"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is timed."""
        return self.device.type == "cuda"

    def seconds(self, function: Callable[[], Any]) -> float:
        """Return how long one call takes; its result is dropped after the clock has stopped."""
        if self.on_gpu:
            return self._gpu_seconds(function)
        now = time.process_time if self.threads == 1 else time.perf_counter
        start = now()
        result = function()
        elapsed = now() - start
        del result
        return elapsed

    @staticmethod
    def _gpu_seconds(function: Callable[[], Any]) -> float:
        torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
        event: Any = torch.cuda.Event
        start, stop = event(enable_timing=True), event(enable_timing=True)
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


@dataclass(frozen=True)
class Timing:
    """The runs of one function, in seconds."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median run."""
        return statistics.median(self.runs)

    @property
    def best(self) -> float:
        """The fastest run."""
        return min(self.runs)


@dataclass(frozen=True)
class Interval:
    """The median of some numbers, and the interval that holds the median of their distribution in 95 % of cases."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval | None:
    """Return the interval between two of the values, as far in as holds the median in at least 95 % of cases.

    It assumes nothing of the distribution: the number of values below its median is binomial. Of 9 values it is the
    second to the eighth (96 %); fewer than 6 say too little, None.
    """
    ordered, count = sorted(values), len(values)
    outside, left_out = 2 / 2**count, 0
    if outside > 1 - CONFIDENCE:
        return None
    while outside + 2 * math.comb(count, left_out + 1) / 2**count <= 1 - CONFIDENCE:
        left_out += 1
        outside += 2 * math.comb(count, left_out) / 2**count
    return Interval(statistics.median(ordered), ordered[left_out], ordered[count - 1 - left_out])


def interleave(
    functions: Mapping[str, Callable[[], Any]], clock: Clock, *, rounds: int, least: int, budget: float
) -> dict[str, Timing]:
    """Run all functions in turn, `rounds` times; each was called before, so that it is warm.

    Args:
        functions: by name.
        clock: what to time with.
        rounds: runs of each function.
        least: runs of a function that takes longer.
        budget: seconds after which a function that ran `least` times is left out of the later rounds.
    """
    runs: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.freeze()  # what is alive now, imports above all, need not be looked through before each run
    for _ in range(rounds):
        for name, function in functions.items():
            if len(runs[name]) < least or sum(runs[name]) < budget:
                gc.collect()
                runs[name].append(clock.seconds(function))
    return {name: Timing(tuple(times)) for name, times in runs.items()}


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return the memory that a call uses at its peak beyond what was in use before it; None where that is unknown.

    On the CPU it is the resident memory of the process (Linux only), the pages that a call touches: freed
    ones are handed back to the system before. On a GPU it is what PyTorch allocates there.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM now (Linux only)."""
    return _resident("VmRSS")


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most, measured: operations a second, and bytes a second from main memory.

    `arithmetic_by` says how the first was measured: by a bare loop of multiply-adds, or, where there is no
    compiled library or on a GPU, by a large matrix product.
    """

    flops: float
    bytes: float
    arithmetic_by: str

    def floor(self, flops: float, moved: float) -> float:
        """Return the seconds below which no implementation of that many operations and bytes can come."""
        return max(flops / self.flops, moved / self.bytes)


def bandwidth(clock: Clock) -> float:
    """Return bytes a second, read plus written, of a large copy; the best of five."""
    source = torch.ones(COPY_BYTES // 4, device=clock.device)
    target = torch.zeros_like(source)
    seconds = min(clock.seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * COPY_BYTES / seconds
