"""Tensors whose elements lie more than 2^31 elements apart: no kernel may compute an address or an index in 32 bits.

The memory is promised, not taken: of gigabytes that are mapped, only the pages with data exist.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.effort import EXHAUSTIVE
from tests.ops import backends
from tests.ops.backends import EVERY_BACKEND

BEYOND = 2**31 + 2**16
"""More elements than a 32-bit integer counts."""

MAP_NORESERVE = 0x4000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is promised in Linux' way")


def promised(elements: int, dtype: torch.dtype, device: str, advice: int = mmap.MADV_NOHUGEPAGE) -> Tensor:
    """Zeros (on a GPU anything) of which only written pages take memory; huge pages where most is read, not written."""
    if device == "cuda":
        return torch.empty(elements, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        pages = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"the system does not promise so much memory: {error}")
    pages.madvise(advice)
    return torch.frombuffer(pages, dtype=dtype)


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """The same values, the last index of `dim` more than 2^31 elements behind the first."""
    apart = -(-BEYOND // (tensor.shape[dim] - 1))
    others = tensor.select(dim, 0).contiguous().stride()
    strides = [*others[:dim], apart, *others[dim:]]
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    view = promised(size, tensor.dtype, tensor.device.type).as_strided(tensor.shape, strides)
    return view.copy_(tensor)


def matching_problem(frames: Sequence[int]) -> dict[str, Tensor]:
    return {
        "query": torch.randn(2, 3, 4, 5),
        "key": torch.randn(2, 3, *frames, 4, 5),
        "mask": torch.rand(2, 2, *frames, 4, 5) < 0.6,
        "query_mask": torch.rand(2, 4, 5) < 0.8,
    }


def problem(op: str) -> tuple[dict[str, Tensor], tuple]:
    """The tensors of an op by name, and how its arguments end."""
    if op in ("local_matching", "global_matching"):
        tensors = matching_problem(() if op == "local_matching" else (2,))
        return tensors, ([1, 3], 1) if op == "local_matching" else (2,)
    if op == "matching_backward":
        grad, query, key = torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(2, 4, 7)
        return {"grad": grad, "query": query, "key": key, "index": torch.randint(-1, 7, (2, 3, 5))}, ()
    if op.startswith("local_attention"):
        maps = torch.randn(2, 3, 4, 5)
        if op == "local_attention_dot":
            return {"a": maps, "b": torch.randn_like(maps)}, (1, 1)
        return {"weights": torch.randn(2, 9, 4, 5), "maps": maps}, (1, 1)
    if op.startswith("local_correlation"):
        maps, options = torch.randn(2, 3, 4, 5), ([3, 3], [2, 1], [1, 0], [1, 2])
        if op == "local_correlation":
            return {"query": maps, "key": torch.randn_like(maps)}, options
        return {"grad": torch.randn(2, 3, 3, 3, 5), "maps": maps}, options
    query, key, value = torch.randn(2, 3, 5), torch.randn(2, 3, 7), torch.randn(2, 2, 4, 7)
    vectors = {
        "shrinkage": torch.rand(2, 7) + 0.5,
        "query_bias": torch.randn(2, 5),
        "key_bias": torch.randn(2, 7),
    }
    settings = (0.4, "ieee")
    if op == "memory_read":
        return {"query": query, "key": key, "value": value, **vectors}, settings
    if op in ("memory_usage", "memory_select"):
        tensors = {"query": query, "key": key, **vectors}
        return tensors, (*settings, torch.randn(2, 5)) if op == "memory_usage" else (*settings, 3)
    index = torch.randint(-1, 7, (2, 3, 5))
    gathered = {"weight": torch.rand(2, 3, 5), "index": index, "value": value}
    if op == "memory_gather":
        return gathered, ()
    if op == "memory_gather_backward":
        return {"grad": torch.randn(2, 2, 4, 5), **gathered}, ()
    assert op == "memory_read_backward"
    out, lse = torch.ops.vosops.memory_read(query, key, value, *vectors.values(), *settings)
    grads = {"grad_out": torch.randn_like(out), "grad_lse": torch.randn_like(lse)}
    return {**grads, "query": query, "key": key, "value": value, **vectors}, (*settings, out, lse)


OPS = ("local_matching", "global_matching", "matching_backward", "memory_read", "memory_read_backward")
OPS += ("memory_usage", "memory_select", "memory_gather", "memory_gather_backward")
OPS += ("local_attention_dot", "local_attention_weigh", "local_attention_spread")
OPS += ("local_correlation", "local_correlation_query", "local_correlation_key")
MATCHING = ("local_matching", "global_matching")


def call(backend: backends.Backend, op: str, tensors: dict[str, Tensor], rest: tuple) -> tuple[Tensor, ...]:
    """The op's results; skips the test where the backend has no kernel of it."""
    rest = tuple(r.to(backend.device) if isinstance(r, Tensor) else r for r in rest)
    arguments = list(tensors.values())
    if op in MATCHING:
        *arguments, query_mask = arguments
        rest = (*rest, query_mask, "ieee")
    try:
        results = backend.op(op)(*arguments, *rest)
    except (NotImplementedError, AttributeError) as error:
        pytest.skip(f"{backend} has no kernel of {op}: {str(error).splitlines()[0][:100]}")
    return (results,) if isinstance(results, Tensor) else tuple(results)


@EVERY_BACKEND
@pytest.mark.parametrize("op", OPS)
def test_strides_beyond_2_to_the_31(backend, op):
    """Each dimension of each input in turn, so that every product of an index and a stride is tried.

    In the interpreter, where a call takes a second, the same dimension of all inputs at once: a wrong address of any
    is a wrong result.
    """
    tensors, rest = problem(op)
    tensors = {name: tensor.to(backend.device) for name, tensor in tensors.items()}
    expected = call(backend, op, tensors, rest)
    together = backend is backends.INTERPRETED and not EXHAUSTIVE
    for names in [list(tensors)] if together else [[name] for name in tensors]:
        for dim in range(max(tensors[name].dim() for name in names)):
            apart = {name: far_apart(tensors[name], dim) for name in names if dim < tensors[name].dim()}
            for each in apart.values():
                assert abs(each.storage_offset() + each.stride(dim) * (each.shape[dim] - 1)) > 2**31
            results = call(backend, op, {**tensors, **apart}, rest)
            for result, wanted in zip(results, expected, strict=True):
                torch.testing.assert_close(
                    result,
                    wanted,
                    rtol=1e-5,
                    atol=1e-6,
                    equal_nan=True,
                    msg=lambda m, n=names, d=dim: f"{', '.join(n)}, {d}: {m}",
                )


@EVERY_BACKEND
def test_gathered_positions_beyond_2_to_the_31(backend):
    """The last of more positions than a 32-bit integer counts are read, or refused: never others in their place."""
    value = promised(BEYOND, torch.bfloat16, backend.device).view(1, 1, 1, -1)
    last = torch.arange(1, 5, dtype=torch.bfloat16)
    value[..., -4:] = last.to(backend.device)
    index = torch.tensor([[[BEYOND - 1, BEYOND - 2], [BEYOND - 4, -1]]], device=backend.device)
    tensors = {"weight": torch.ones(1, 2, 2, device=backend.device), "index": index, "value": value}
    try:
        (out,) = call(backend, "memory_gather", tensors, ())
    except (RuntimeError, ValueError) as error:
        assert "2^31" in str(error), error
    else:
        assert out.flatten().tolist() == [4 + 1, 3]


@EVERY_BACKEND
def test_reference_pixels_beyond_2_to_the_31(backend):
    """Global matching finds the last pixel of so many, or refuses: it never answers with a wrong index."""
    if backend is backends.CPU and os.environ.get("VOSOPS_TEST_LARGE") != "1":
        pytest.skip("looks through 2 GB of masks, which takes a minute; VOSOPS_TEST_LARGE=1 runs it")
    height = -(-BEYOND // 2**16)
    mask = promised(height * 2**16, torch.bool, backend.device, mmap.MADV_HUGEPAGE).view(
        1, 1, 1, height, 2**16
    )
    if backend.device == "cuda":
        mask.zero_()
    mask[..., -1, -1] = True
    key = promised(height * 2**16, torch.bfloat16, backend.device, mmap.MADV_HUGEPAGE).view(
        1, 1, 1, height, 2**16
    )
    query = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, device=backend.device)
    try:
        distance, index = backend.op("global_matching")(query, key, mask, 1, None, "ieee")
    except (RuntimeError, ValueError) as error:
        assert "2^31" in str(error) or "pixels" in str(error), error
    else:
        assert index.item() == height * 2**16 - 1
        assert distance.item() == 1
