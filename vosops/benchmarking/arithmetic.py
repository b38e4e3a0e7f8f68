"""The rate of multiply-adds that the machine can reach: the ceiling that contenders are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from vosops import _library
from vosops.benchmarking.measure import Clock

SECONDS = 0.02
"""How long one run takes, about."""

TRIAL_ROUNDS = 100_000
MM_SIZE = {"cpu": 1536, "cuda": 8192}

Loop = Callable[[int], int]
"""Runs that many rounds of multiply-adds in registers, in one thread; returns how many operations those were."""


class Arithmetic:
    """A run of nothing but arithmetic, to be timed among the contenders.

    Attributes:
        flops: operations of one run.
        by: what runs: a bare loop of the compiled library, or, where there is none, a large matrix product.
    """

    def __init__(self, clock: Clock, dtype: torch.dtype) -> None:
        loop = None if clock.on_gpu else _loop(dtype)
        self._call: Callable[[], Any]
        if loop is None:
            n = MM_SIZE[clock.device.type]
            matrix = torch.ones(n, n, dtype=dtype, device=clock.device)
            self.by, self.flops = "a matrix product", 2.0 * n**3
            self._call = lambda: _product(matrix)
        else:
            loop(TRIAL_ROUNDS)
            start = time.perf_counter()
            operations = loop(TRIAL_ROUNDS)
            rounds = max(1, int(TRIAL_ROUNDS * SECONDS / (time.perf_counter() - start)))
            self.by = "a loop of multiply-adds"
            self.flops = operations / TRIAL_ROUNDS * rounds * clock.threads
            self._call = lambda: _in_threads(loop, rounds, clock.threads)

    def __call__(self) -> None:
        """One run."""
        self._call()


def _loop(dtype: torch.dtype) -> Loop | None:
    """Return the loop of the compiled library; None without it, or where the processor has none for `dtype`."""
    names = {torch.float32: "peak_operations", torch.bfloat16: "peak_bf16_operations"}
    if _library.CPU_CAPABILITY is None or dtype not in names:
        return None
    loop: Loop = getattr(torch.ops.vosops, names[dtype])
    return loop if loop(1) else None


def _product(matrix: Tensor) -> Tensor:
    return matrix @ matrix


def _in_threads(loop: Loop, rounds: int, threads: int) -> None:
    if threads == 1:
        loop(rounds)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(loop, [rounds] * threads))
