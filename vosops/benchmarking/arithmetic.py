"""The rate of multiply-adds that the machine can reach: the ceiling that contenders are held against."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vosops.benchmarking.measure import Clock

FMA_SECONDS = 0.02
"""How long one run of the loop takes, about."""

MM_SIZE = {"cpu": 1536, "cuda": 8192}

SOURCE = r"""
// The rate of fused multiply-adds of one core, with nothing else in the way: independent chains, no memory.
// Each function returns a value that depends on all of its arithmetic, so that none of it can be left out.
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define CHAINS 12
typedef float vec __attribute__((vector_size(BYTES)));

long fma_flops_per_round(void) { return 2L * CHAINS * (BYTES / sizeof(float)); }

float fma_rounds(long rounds) {
  vec acc[CHAINS], a, b;
  for (int i = 0; i < BYTES / (int)sizeof(float); ++i) a[i] = 0.999f, b[i] = 0.001f;
  for (int c = 0; c < CHAINS; ++c) acc[c] = b * (float)c;
  for (long r = 0; r < rounds; ++r)
    for (int c = 0; c < CHAINS; ++c) acc[c] = acc[c] * a + b;
  float sum = 0;
  for (int c = 0; c < CHAINS; ++c) sum += acc[c][0];
  return sum;
}

#if defined(__AVX512BF16__)
#include <immintrin.h>
long bf16_flops_per_round(void) { return 2L * CHAINS * 32; }

float bf16_rounds(long rounds) {
  __m512 acc[CHAINS];
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = (__m512bh)_mm512_set1_epi16(0x3c01);
  for (int c = 0; c < CHAINS; ++c) acc[c] = _mm512_set1_ps((float)c);
  for (long r = 0; r < rounds; ++r)
    for (int c = 0; c < CHAINS; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], a, b);
  float sum = 0;
  for (int c = 0; c < CHAINS; ++c) sum += acc[c][0];
  return sum;
}
#else
long bf16_flops_per_round(void) { return 0; }
float bf16_rounds(long rounds) { return (float)rounds; }
#endif
"""


class Arithmetic:
    """A run of nothing but multiply-adds, to be timed among the contenders: `flops` operations a call."""

    def __init__(self, clock: Clock, dtype: torch.dtype) -> None:
        loop = None if clock.on_gpu else _compiled_loop(dtype)
        if loop is None:
            self.by = "a matrix product"
            n = MM_SIZE[clock.device.type]
            self._matrix = torch.ones(n, n, dtype=dtype, device=clock.device)
            self.flops = 2.0 * n**3
            self._call: Callable[[], Any] = self._product
        else:
            self.by = "a loop of multiply-adds"
            rounds_per_second = _rounds_per_second(loop)
            rounds = max(1, int(rounds_per_second * FMA_SECONDS))
            self.flops = float(loop[1]) * rounds * clock.threads
            self._call = functools.partial(_in_threads, loop[0], rounds, clock.threads)

    def __call__(self) -> Any:
        """One run."""
        return self._call()

    def _product(self) -> Tensor:
        return self._matrix @ self._matrix


Loop = tuple[Callable[[int], float], int]
"""A function that runs rounds of multiply-adds, and the operations in one round."""


def _rounds_per_second(loop: Loop) -> float:
    trial = 100_000
    loop[0](trial)
    start = time.perf_counter()
    loop[0](trial)
    return trial / (time.perf_counter() - start)


def _in_threads(run: Callable[[int], float], rounds: int, threads: int) -> None:
    if threads == 1:
        run(rounds)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, [rounds] * threads))


@functools.cache
def _compiled_loop(dtype: torch.dtype) -> Loop | None:
    """The loop of `fma.c` for this processor; None without a C compiler or without such instructions."""
    library = _compiled_library()
    if library is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    prefix = "fma" if dtype == torch.float32 else "bf16"
    run, per_round = getattr(library, f"{prefix}_rounds"), getattr(library, f"{prefix}_flops_per_round")
    run.argtypes, run.restype, per_round.restype = [ctypes.c_long], ctypes.c_float, ctypes.c_long
    flops = per_round()
    return (run, flops) if flops else None


@functools.cache
def _compiled_library() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library, source = Path(folder) / "fma.so", Path(folder) / "fma.c"
        source.write_text(SOURCE)
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library)]
        try:
            subprocess.run([*command, str(source)], check=True, capture_output=True)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError):
            return None
