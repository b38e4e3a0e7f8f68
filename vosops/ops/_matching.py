"""What local and global matching register alike: derivative, implementations, order of choice."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vosops import backends
from vosops.ops._registration import (
    HAS_CPP,
    cpp_reasons_not,
    define_triton_op,
    register_pieces,
    triton_reasons_not,
)
from vosops.ops.matching_backward import matching_backward


def empty_matches(query: Tensor, mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """A core's outputs without values: distance and int64 index (N,O,slots,H,W)."""
    shape = (query.shape[0], mask.shape[1], slots, query.shape[2], query.shape[3])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int64)


def register_matching(
    name: str,
    schema: str,
    *,
    prepare: Callable[..., tuple[Any, ...]],
    fake: Callable[..., tuple[Tensor, Tensor]],
    reference: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Register the op `name` (query, key, ..., precision) -> (distance, index) in all its implementations.

    `prepare` turns the public arguments into those of the core, `fake` gives the core's empty outputs, and
    `reference` is the core in plain PyTorch, without the precision.
    """

    def triton(*args: Any) -> tuple[Tensor, Tensor]:
        kernel = getattr(import_module(f"vosops.triton.{name}"), name)
        result: tuple[Tensor, Tensor] = kernel(*args)
        return result

    define_triton_op(name, schema, triton)
    for suffix, available in (("", HAS_CPP), ("_triton", True)):
        if available:
            register_pieces(
                name + suffix,
                fake=fake,
                backward=_backward_by(f"matching_backward{suffix}"),
                setup_context=_setup_context,
            )

    def dispatched(suffix: str) -> Callable[..., Any]:
        return lambda *args: getattr(torch.ops.vosops, name + suffix)(*args)

    backends.register_op(
        backends.Op(
            name=name,
            prepare=prepare,
            implementations=(
                backends.Implementation("cpp", dispatched(""), lambda q, *_: cpp_reasons_not(q)),
                backends.Implementation("triton", dispatched("_triton"), lambda q, *_: triton_reasons_not(q)),
                backends.Implementation("reference", lambda *args: reference(*args[:-1]), lambda *_: []),
            ),
            orders={
                "cpu": backends.Order(measured=f"benchmarks/results/{name}_cpu.json"),
                "cuda": backends.UNMEASURED,
            },
        )
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key = inputs[:2]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, output[1])
    ctx.others = len(inputs) - 2


def _backward_by(op: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, key, index = ctx.saved_tensors
        return *matching_backward(op, grad, query, key, index), *(None,) * ctx.others

    return backward
