"""What the memory read's CUDA kernels leave out: positions before the first and behind the last that a bias allows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cuda_model import TILE, trace
from tests.emulator.build import load_emulated_ops
from vosops.reference.memory_read import memory_read_core

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux and g++")

MEMORY, SCALE = 200, 0.3
PARTS = (slice(0, MEMORY), slice(0, 45), slice(96, 130), slice(0, 0))
"""Of the memory of each batch element: what a bias of minus infinity does not leave out."""


@pytest.fixture(autouse=True)
def emulated() -> None:
    load_emulated_ops()
    torch.manual_seed(0)


def problem(dtype: torch.dtype, filling: float = torch.nan) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and a bias; what it leaves out of key and value is filled."""
    n = len(PARTS)
    query, key = torch.randn(n, 16, 18).to(dtype), torch.randn(n, 16, MEMORY).to(dtype)
    value, bias = torch.randn(n, 1, 24, MEMORY).to(dtype), torch.full((n, MEMORY), -torch.inf)
    for i, part in enumerate(PARTS):
        bias[i, part] = torch.randn(MEMORY)[part]
        for tensor in (key, value):
            tensor[i, ..., : part.start] = tensor[i, ..., part.stop :] = filling
    return [query, key, value], bias


def tiles_of(call: Callable[[], Any]) -> int:
    """Tiles of the memory that warps visit in a call."""
    return sum(launch["visits"].get(TILE, (0, 1))[0] for launch in trace(call, 4, dry=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_out_does_not_reach_a_read_or_its_usage(dtype: torch.dtype) -> None:
    ops, (inputs, bias) = torch.ops.vosops_emulated, problem(dtype)
    clean = [tensor.double().nan_to_num() for tensor in inputs]
    want, want_lse = memory_read_core(*clean, None, None, bias.double(), SCALE)
    vectors = (None, None, bias, SCALE, "ieee")
    out, lse = ops.memory_read(*inputs, *vectors)
    error = 1e-5 if dtype == torch.float32 else 1.5e-2
    torch.testing.assert_close(out.double(), want, rtol=0, atol=error)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)
    usage = ops.memory_usage(*inputs[:2], *vectors, lse)
    _, index = ops.memory_select(*inputs[:2], *vectors, 40)
    for i, part in enumerate(PARTS):
        count = part.stop - part.start
        assert usage[i].sum().item() == pytest.approx(18 if count else 0, rel=1e-5)
        assert usage[i, : part.start].eq(0).all() and usage[i, part.stop :].eq(0).all()
        chosen = index[i, : min(count, 40)]
        assert ((chosen >= part.start) & (chosen < part.stop)).all() and index[i, count:].eq(-1).all()


def test_what_is_left_out_does_not_reach_the_gradients() -> None:
    inputs, bias = problem(torch.float32)
    shrinkage = 1 + torch.rand(len(PARTS), MEMORY)
    clean = [tensor.nan_to_num() for tensor in inputs]
    wide = [t.double().requires_grad_() for t in (*clean, shrinkage, bias)]
    results = memory_read_core(*wide[:4], None, wide[4], SCALE)
    outputs = [t.detach().float() for t in results]
    grads = [torch.randn_like(t) for t in outputs]
    grads[1][-1] = 0  # of a log-sum-exp of nothing
    wanted = torch.autograd.grad(results, wide, [t.double() for t in grads])
    arguments = (*inputs, shrinkage, None, bias, SCALE, "ieee", *outputs)
    got = torch.ops.vosops_emulated.memory_read_backward(*grads, *arguments)
    for have, want in zip((*got[:4], got[5]), wanted, strict=True):
        want = want.nan_to_num()  # of an element that reads nothing
        torch.testing.assert_close(have.double(), want, rtol=0, atol=2e-5 * max(1, want.abs().max().item()))


@pytest.mark.parametrize("op", ["memory_read", "memory_select"])
def test_tiles_that_are_left_out_are_not_visited(op: str) -> None:
    """A batch visits as many as its elements do by themselves, cut to what they read."""
    (query, key, value), bias = problem(torch.bfloat16)

    def call(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None) -> Callable[[], Any]:
        if op == "memory_read":
            return lambda: torch.ops.vosops_emulated.memory_read(q, k, v, None, None, b, SCALE, "ieee")
        return lambda: torch.ops.vosops_emulated.memory_select(q, k, None, None, b, SCALE, "ieee", 5)

    alone = 0
    for i, part in enumerate(PARTS):
        if part.stop > part.start:
            cut = [tensor[i : i + 1, ..., part].contiguous() for tensor in (key, value)]
            alone += tiles_of(call(query[i : i + 1], *cut, None))
    extra = 8 if op == "memory_select" else 0  # its tile of 128 positions: 96 to 130 are in two
    assert tiles_of(call(query, key, value, bias)) == alone + extra
    assert tiles_of(call(query, key, value, None)) > 1.5 * alone


@pytest.mark.parametrize("top_k", [30, 40])
@pytest.mark.parametrize("score", [0.0, torch.inf, -3.0])
def test_of_equal_scores_the_first_positions_are_chosen(top_k: int, score: float) -> None:
    """More of them in a tile than a query's buffer holds, beside greater ones in the last tile."""
    query, key, bias = torch.zeros(1, 16, 70), torch.zeros(1, 16, 300), torch.full((1, 300), score)
    greater = [] if score == torch.inf else [299, 290]
    bias[0, greater] = score + 1
    found, index = torch.ops.vosops_emulated.memory_select(query, key, None, None, bias, 1.0, "ieee", top_k)
    want = [*sorted(greater), *range(top_k - len(greater))]
    assert index[0].T.tolist() == [want] * 70
    assert torch.equal(found, bias[0, want][None, :, None].expand(1, top_k, 70))
