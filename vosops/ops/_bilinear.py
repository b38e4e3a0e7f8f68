"""Registers ops that are linear in both of their tensors, whose derivatives are ops of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vosops.ops._registration import Piece, dispatched


def bilinear_piece(schema: str, fake: Callable[..., Tensor], adjoints: Callable[..., Any]) -> Piece:
    """Return the registration of an op of two tensors and a few numbers, linear in each of the tensors.

    `adjoints(first, second, grad)`: for each of the tensors, the name and the tensors of the op of the same library,
    with the same numbers, that gives its gradient.
    """

    def of_library(suffix: str) -> Callable[..., Any]:
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            calls = zip(adjoints(*ctx.saved_tensors, grad), ctx.needs_input_grad, strict=False)
            grads = (
                dispatched(name, suffix)(*inputs, *ctx.numbers) if need else None
                for (name, *inputs), need in calls
            )
            return *grads, *(None for _ in ctx.numbers)

        return backward

    return Piece(fake, of_library, _setup_context, schema=schema)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *ctx.numbers = inputs
    ctx.save_for_backward(first, second)
