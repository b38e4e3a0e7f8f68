"""The backward op that local and global matching share, itself differentiable to any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vosops.ops._registration import Piece, register_pieces

SCHEMA = "(Tensor grad, Tensor query, Tensor key, Tensor index) -> (Tensor grad_query, Tensor grad_key)"


def matching_backward(
    suffix: str, grad: Tensor, query: Tensor, key: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * distance) for query (N,C,*Q) and key (N,C,*M).

    grad and index have shape (N,...,*Q), index counts pixels of *M and is -1 where nothing was matched.
    `suffix` names the library that computes it.
    Each key pixel is summed in a fixed order, so the result is deterministic.
    """
    pixels = query.shape[2:].numel()
    slots = (grad.shape[0], -1, pixels) if grad.numel() else (grad.shape[0], 0, pixels)
    grad_query, grad_key = getattr(torch.ops.vosops, f"matching_backward{suffix}")(
        grad.reshape(slots), query.flatten(2), key.flatten(2), index.reshape(slots)
    )
    return grad_query.view(query.shape), grad_key.view(key.shape)


def _fake(grad: Tensor, query: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward_by(suffix: str) -> Callable[..., Any]:
    """Differentiate the op by itself: with cotangents a, b of its outputs the scalar is
    2 sum g (a_p - b_i).(q_p - k_i), so that (a, b) take the places of (q, k) for the gradients of q and k.
    """

    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        grad, query, key, index = ctx.saved_tensors
        grad_query, grad_key = getattr(torch.ops.vosops, f"matching_backward{suffix}")(
            grad, a.to(query.dtype).contiguous(), b.to(key.dtype).contiguous(), index
        )
        grad_grad = None
        if ctx.needs_input_grad[0]:
            flow = _difference(a, b, index, grad.dtype) * _difference(query, key, index, grad.dtype)
            grad_grad = torch.where(index >= 0, 2 * flow.sum(1), 0)
        return grad_grad, grad_query, grad_key, None

    return backward


def _difference(query: Tensor, key: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """query (N,C,P) minus the matched key pixels -> (N,C,S,P)."""
    slots = index.clamp(min=0).flatten(1).unsqueeze(1).expand(-1, key.shape[1], -1)
    matched: Tensor = key.to(dtype).gather(2, slots).unflatten(2, tuple(index.shape[1:]))
    return query.to(dtype).unsqueeze(2) - matched


register_pieces(
    {"matching_backward": Piece(_fake, _backward_by, _setup_context, schema=SCHEMA)}, "matching_backward"
)
