"""The implementations that the op tests drive, and why one cannot run here."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

import vosops  # noqa: F401  (registers the ops)
from tests.effort import interpreter_reason_not
from vosops import _library
from vosops.ops._registration import HAS_TRITON, TRITON_INTERPRETED

SANITIZED = "ASAN_OPTIONS" in os.environ
"""Sanitized libraries fuse a product and a sum in some places only: two ways to the same sum may be rounded apart."""


def assert_same_bits(got, expected, rtol: float, atol: float) -> None:
    """Values and indices are the same, to the bit; in a sanitized library the values are, within rtol and atol."""
    values, indices = zip(got, expected, strict=True)
    if SANITIZED:
        torch.testing.assert_close(*values, rtol=rtol, atol=atol, equal_nan=True)
    else:
        torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(*indices)


@dataclass(frozen=True)
class Backend:
    """Dispatcher ops `torch.ops.<namespace>.<op><suffix>` on tensors of `device`."""

    name: str
    namespace: str
    suffix: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    def op(self, name: str):
        return getattr(getattr(torch.ops, self.namespace), name + self.suffix)

    def __str__(self) -> str:
        return self.name


LOW = (torch.float32, torch.float16, torch.bfloat16)
CPU = Backend("cpp-cpu", "vosops", "", "cpu", (*LOW, torch.float64))
EMULATED = Backend("cuda-emulated", "vosops_emulated", "", "cpu", LOW)
INTERPRETED = Backend("triton-interpreted", "vosops", "_triton", "cpu", LOW)
CUDA = Backend("cpp-cuda", "vosops", "", "cuda", LOW)
TRITON = Backend("triton-cuda", "vosops", "_triton", "cuda", LOW)


def reason_not(backend: Backend) -> str | None:
    """Why the tests cannot drive a backend here, or None."""
    if backend is CPU:
        return None if _library.CPU_CAPABILITY else "the CPU library is not built"
    if backend is EMULATED:
        if os.environ.get("VOSOPS_TEST_EMULATED") != "1":
            return "the emulated CUDA kernels are tested with VOSOPS_TEST_EMULATED=1 (make test sets it)"
        return None
    if backend is INTERPRETED:
        if not (HAS_TRITON and TRITON_INTERPRETED):
            return "needs triton and TRITON_INTERPRET=1"
        return interpreter_reason_not()
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if backend is TRITON:
        return "TRITON_INTERPRET=1 is set" if TRITON_INTERPRETED else None
    return "; ".join(_library.CUDA_REASONS) or None


def load(backend: Backend) -> Backend:
    """The backend, ready to be called; skips the test where it cannot run."""
    reason = reason_not(backend)
    if reason:
        pytest.skip(reason)
    if backend is EMULATED:
        from tests.emulator.build import load_emulated_ops

        load_emulated_ops()
    return backend


ALL = (CPU, EMULATED, INTERPRETED, CUDA, TRITON)
EVERY_BACKEND = pytest.mark.parametrize("backend", ALL, ids=str, indirect=True)
EVERY_BACKEND_AND_DTYPE = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in ALL for dtype in backend.dtypes],
    ids=lambda value: str(value).removeprefix("torch."),
    indirect=["backend"],
)
