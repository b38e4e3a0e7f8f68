"""The rate of multiply-adds that the machine can reach: the ceiling that contenders are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vosops import _library
from vosops._checks import float32_precision
from vosops.benchmarking.measure import Clock

SECONDS = 0.02
"""How long one run takes, about."""

TRIAL_SECONDS = 0.005
FLOAT32_PIECES = {"highest": 3, "high": 2, "medium": 1}
"""Pieces of bfloat16 that a float32 is multiplied as, at PyTorch's precision of float32 products."""

MM_SIZE = {"cpu": 1536, "cuda": 8192}

Loop = Callable[[int], int]
"""Runs that many rounds of multiply-adds in registers, in one thread; returns how many operations those were."""


class Arithmetic:
    """A run of nothing but arithmetic, to be timed among the contenders.

    Attributes:
        flops: operations of one run.
        by: what runs: a bare loop of the compiled library, the fastest that it has for the dtype; or, where there is
            none, a large matrix product.
    """

    def __init__(self, clock: Clock, dtype: torch.dtype) -> None:
        loops = {} if clock.on_gpu else _loops(dtype)
        self._call: Callable[[], Any]
        if not loops:
            n = MM_SIZE[clock.device.type]
            matrix = torch.ones(n, n, dtype=dtype, device=clock.device)
            self.by, self.flops = "a matrix product", 2.0 * n**3
            self._call = lambda: _product(matrix)
        else:
            tried = {by: _try(loop) for by, loop in loops.items()}
            self.by = max(tried, key=lambda by: tried[by].rate)
            loop, trial = loops[self.by], tried[self.by]
            rounds = max(1, int(trial.rate * SECONDS / trial.operations))
            self.flops = trial.operations * rounds * clock.threads
            self._call = lambda: _in_threads(loop, rounds, clock.threads)

    def __call__(self) -> None:
        """One run."""
        self._call()


class _Trial(NamedTuple):
    """What a short run of a loop says: operations a second, and those of a round."""

    rate: float
    operations: float


def _try(loop: Loop) -> _Trial:
    """Run a loop until the clock of this thread can tell how long it takes."""
    rounds = 1
    while True:
        start = time.thread_time()
        operations = loop(rounds)
        seconds = time.thread_time() - start
        if seconds >= TRIAL_SECONDS:
            return _Trial(operations / seconds, operations / rounds)
        rounds *= 4


def _loops(dtype: torch.dtype) -> dict[str, Loop]:
    """Return the loops of the compiled library that the processor runs for `dtype`, by what they do."""
    if _library.CPU_CAPABILITY is None:
        return {}
    names = {torch.float32: "peak_operations", torch.bfloat16: "peak_bf16_operations"}
    loops: dict[str, Loop] = {}
    if dtype in names:
        loop: Loop = getattr(torch.ops.vosops, names[dtype])
        loops |= {"a loop of multiply-adds": loop} if loop(1) else {}
    pieces = {torch.bfloat16: 1, torch.float16: 2, torch.float32: FLOAT32_PIECES[float32_precision()]}
    if _library.CPU_CAPABILITY == "amx" and dtype in pieces and not torch.ops.vosops.amx_refusal():
        loops |= _tiles(pieces[dtype])
    return loops


def _tiles(pieces: int) -> dict[str, Loop]:
    """Return the loop of AMX; several products of bfloat16 pieces make one of wider numbers."""
    products = pieces * (pieces + 1) // 2
    each = f", {products} for each of a wider number" if products > 1 else ""

    def loop(rounds: int) -> int:
        operations: int = torch.ops.vosops.peak_amx_operations(rounds, pieces)
        return operations // products

    return {f"a loop of AMX products of random bfloat16{each}": loop}


def _product(matrix: Tensor) -> Tensor:
    return matrix @ matrix


def _in_threads(loop: Loop, rounds: int, threads: int) -> None:
    if threads == 1:
        loop(rounds)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(loop, [rounds] * threads))
