"""The gradients of memory_read by the matrix engine, or its twin: errors, range, and what they may not depend on.

The problems are as large as the engine takes; test_memory_read.py holds smaller ones against the same formula.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.ops.backends import SANITIZED
from vosops.ops._memory_autograd import _read_gradients

ON_AMX = torch.ops.vosops.cpu_capability().startswith("amx") and not torch.ops.vosops.amx_refusal()
pytestmark = pytest.mark.skipif(not ON_AMX, reason="needs the library for AMX, or its twin")

SCALE = 0.2
NAMES = ("query", "key", "value", "shrinkage", "query_bias", "key_bias")
CASES = {
    # N, O, C, Cv, P, M and which of the scores' vectors there are; "squares": the query meets the key's squares too
    "plain": (1, 1, 64, 160, 340, 300, ""),
    "objects": (2, 3, 40, 50, 325, 290, "shrinkage key_bias"),
    "anisotropic": (1, 2, 36, 70, 330, 270, "squares shrinkage query_bias key_bias"),
    "wide values": (1, 1, 24, 540, 321, 257, "query_bias"),
}
LARGE_CASES = {
    "many queries": (1, 2, 16, 70, 2100, 256, "key_bias"),  # weights of some of them are kept at a time
    "many queries of wide values": (1, 1, 24, 580, 2070, 256, ""),  # which are too many to stay packed
}


class Problem:
    """A read's inputs with the gradients of its results, and its results, computed in float64."""

    def __init__(
        self, case: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: float
    ) -> None:
        n, o, c, v, p, m, parts = {**CASES, **LARGE_CASES}[case]
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        query, key, value = normal(n, c, p).to(dtype), normal(n, c, m).to(dtype), normal(n, o, v, m).to(dtype)
        if "squares" in parts:
            chosen = torch.rand((n, c, p), generator=generator)
            query = torch.cat([2 * chosen * query, -chosen], 1)
        vectors: dict[str, Tensor] = {
            "shrinkage": 1 + torch.rand((n, m), generator=generator),
            "query_bias": normal(n, p),
            "key_bias": normal(n, m),
        }
        self.excluded = torch.rand((n, m), generator=generator) < 0.2
        vectors["key_bias"][self.excluded] = -torch.inf
        self.inputs = [query, key, value, *(vectors[name] if name in parts else None for name in NAMES[3:])]
        self.grad_out, self.grad_lse = normal(n, o, v, p).to(dtype), normal(n, p)
        for name, number in changes.items():
            tensor = self.grad_out if name == "grad_out" else self.inputs[NAMES.index(name)]
            tensor[0, ..., 3, 5] = number

    def results(self) -> tuple[Tensor, Tensor]:
        """The read in float64, rounded to the dtypes of its results."""
        wide = [None if t is None else t.double() for t in self.inputs]
        out, lse = torch.ops.vosops.memory_read(*wide, SCALE, "highest")
        return out.to(self.inputs[2].dtype), lse.float()

    def gradients(self, precision: str = "highest") -> list[Tensor]:
        out, lse = self.results()
        gradients = torch.ops.vosops.memory_read_backward(
            self.grad_out, self.grad_lse, *self.inputs, SCALE, precision, out, lse
        )
        return [g for g, t in zip(gradients, self.inputs, strict=True) if t is not None]

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by plain PyTorch in a dtype."""
        tensors = [None if t is None else t.to(dtype) for t in (self.grad_out, self.grad_lse, *self.inputs)]
        return [g for g in _read_gradients(*tensors, SCALE) if g is not None]

    @property
    def names(self) -> list[str]:
        return [name for name, t in zip(NAMES, self.inputs, strict=True) if t is not None]


def counted(call):
    """Return a call's result, how many calls the engine served meanwhile and how many it left for their range."""

    def counts() -> list[int]:
        entries = dict(entry.split("=") for entry in torch.ops.vosops.amx_counts().split())
        return [int(entries[name]) for name in ("memory_read_backward", "memory_read_backward_outside")]

    before = counts()
    result = call()
    return result, *(b - a for a, b in zip(before, counts(), strict=True))


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square error, relative."""
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


@pytest.mark.parametrize(
    ("case", "factor"), [*itertools.product(CASES, [1, 12]), *((case, 1) for case in LARGE_CASES)]
)
def test_float32_is_about_as_exact_as_plain_pytorch(case, factor):
    """The weights are of a saved log-sum-exp, whose rounding the softmax of plain PyTorch does not know: that is most
    of the error, of large scores (up to 60 here) in the gradient of the values above all.
    """
    problem = Problem(case)
    problem.inputs[0] *= factor
    got, served, left = counted(problem.gradients)
    assert (served, left) == (1, 0)
    wanted, plain = problem.plain(torch.float64), problem.plain(torch.float32)
    for name, ours, theirs, exact in zip(problem.names, got, plain, wanted, strict=True):
        times = {"value": 1.5 if factor == 1 else 5, "query_bias": 4 if factor == 1 else 7}.get(name, 1.8)
        times *= 1.5 if SANITIZED else 1
        assert error(ours, exact) <= times * error(theirs, exact), name


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.float32, "high", 3e-5),
        (torch.float32, "medium", 3e-2),
        (torch.float16, "highest", 1e-3),
        (torch.bfloat16, "highest", 1e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_errors_of_fewer_pieces(case, dtype, precision, bound):
    problem = Problem(case, dtype)
    got, served, left = counted(lambda: problem.gradients(precision))
    assert (served, left) == (1, 0)
    for name, ours, exact in zip(problem.names, got, problem.plain(torch.float64), strict=True):
        assert error(ours, exact) <= bound, name
        assert bound > 2e-3 or error(ours, exact) > 2e-7, name  # else fewer pieces would be for nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_any_stride(dtype, layout):
    problem = Problem("objects", dtype)
    expected = problem.gradients()

    def laid_out(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or layout == "channels_last":
            return tensor if tensor is None or tensor.dim() == 2 else tensor.mT.contiguous().mT
        room = torch.full([2 * size + 1 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
        return room[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)

    problem.inputs = [laid_out(t) for t in problem.inputs]
    problem.grad_out, problem.grad_lse = laid_out(problem.grad_out), laid_out(problem.grad_lse)
    got, served, _ = counted(problem.gradients)
    assert served == 1
    for name, ours, same in zip(problem.names, got, expected, strict=True):
        assert torch.equal(ours, same), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["objects", "anisotropic"])
def test_excluded_positions_hold_anything_and_get_no_gradient(dtype, case):
    problem = Problem(case, dtype)
    expected = problem.gradients()
    outside = problem.excluded[:, None]
    _, key, value, shrinkage, *_ = problem.inputs
    key.masked_fill_(outside, torch.nan)
    value.masked_fill_(outside[:, None], torch.inf)
    if shrinkage is not None:
        shrinkage.masked_fill_(problem.excluded, torch.nan)
    got, served, left = counted(problem.gradients)
    assert (served, left) == (1, 0)
    for name, ours, same in zip(problem.names, got, expected, strict=True):
        assert torch.equal(ours, same), name
        if name in ("key", "value", "shrinkage", "key_bias"):
            mask = {"key": outside, "value": outside[:, None]}.get(name, problem.excluded)
            assert (ours[mask.expand_as(ours)] == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_that_read_nothing(dtype):
    problem = Problem("objects", dtype)
    problem.inputs[5][1] = -torch.inf
    got, served, _ = counted(problem.gradients)
    assert served == 1
    for name, ours, exact in zip(problem.names, got, problem.plain(torch.float64), strict=True):
        assert (ours[1] == 0).all(), name
        assert error(ours, exact) < 1e-2, name


@pytest.mark.parametrize("name", ["query", "key", "value", "grad_out"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e-36, 3.4e38, 1e-42])
def test_numbers_out_of_range_are_left_to_float32(name, number):
    problem = Problem("plain", **{name: number})
    got, served, left = counted(problem.gradients)
    assert (served, left) == (0, 1)
    small = abs(number) < 1
    for theirs, ours, exact in zip(problem.names, got, problem.plain(torch.float64), strict=True):
        if small:
            assert error(ours, exact) < 1e-5, theirs
        else:  # what is not finite there is not finite here
            assert (ours.isfinite() <= exact.isfinite()).all(), theirs


def test_slopes_out_of_range_are_left_to_float32():
    problem = Problem("plain")
    problem.grad_out *= 1e-28
    problem.grad_lse *= 0
    got, served, left = counted(problem.gradients)
    assert (served, left) == (0, 1)
    for name, ours, exact in zip(problem.names, got, problem.plain(torch.float64), strict=True):
        assert error(ours, exact) < 1e-5, name


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *itertools.product(CASES, [torch.float32, torch.bfloat16]),
        *((case, torch.float32) for case in LARGE_CASES),
    ],
    ids=str,
)
def test_threads_change_nothing(case, dtype):
    problem = Problem(case, dtype)
    expected = problem.gradients()
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        got = problem.gradients()
    finally:
        torch.set_num_threads(threads)
    for name, ours, same in zip(problem.names, got, expected, strict=True):
        assert torch.equal(ours, same), name


def test_small_problems_are_left_to_float32():
    problem = Problem("plain")
    query, key, value, *vectors = problem.inputs
    problem.inputs = [query[..., :20], key[..., :40], value[..., :40], *vectors]
    problem.grad_out, problem.grad_lse = problem.grad_out[..., :20], problem.grad_lse[..., :20]
    assert counted(problem.gradients)[1:] == (0, 0)
