"""The dispatcher ops of the memory read: fake kernels, derivatives of every order, vmap, in C++ and in Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vosops.ops._memory_scores import softmax_over_memory, without_excluded
from vosops.ops._registration import Piece, differentiate, dispatched, folding_vmap, register_pieces


def _wide(key: Tensor) -> torch.dtype:
    return torch.float64 if key.dtype == torch.float64 else torch.float32


def _fake_read(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries = query.shape[0], query.shape[2]
    return value.new_empty(*value.shape[:3], queries), query.new_empty((batch, queries), dtype=_wide(key))


def _fake_read_list(query: Tensor, key: Tensor, values: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    out, lse = _fake_read(query, key, values[0])
    objects = sum(value.shape[1] for value in values)
    return out.new_empty(out.shape[0], objects, *out.shape[2:]), lse


def _read_list(query: Tensor, key: Tensor, values: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    """memory_read_list under vmap, below whose wrappers it is seen whether a derivative is wanted: it has none."""
    tensors = [t for t in (query, key, *values, *rest) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out, lse = torch.ops.vosops.memory_read(query, key, torch.cat(values, 1), *rest)
    else:
        out, lse = torch.ops.vosops.memory_read_list(query, key, values, *rest)
    return out, lse


def _setup_read(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.precision = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward_read_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        grads = dispatched("memory_read_backward", suffix)(
            grad_out, grad_lse, *tensors, ctx.scale, ctx.precision, out, lse
        )
        return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None, None

    return backward


def _fake_read_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    def vector(given: Tensor | None) -> Tensor:
        size = (query.shape[0], 0) if given is None else tuple(given.shape)
        return query.new_empty(size, dtype=_wide(key))

    matrices = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return *matrices, *(vector(given) for given in (shrinkage, query_bias, key_bias))


def _setup_read_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.scale = inputs[8]
    ctx.save_for_backward(*inputs[:8])


def _backward_read_backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """Second derivatives through the plain formula of the first; its out and lse are functions of the others."""
    grads = differentiate(
        lambda *saved: _read_gradients(*[*saved, ctx.scale]),
        ctx.saved_tensors,
        ctx.needs_input_grad[: len(ctx.saved_tensors)],
        cotangents,
    )
    return *grads, None, None, None, None


def _read_gradients(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Return what memory_read_backward computes, in differentiable PyTorch."""
    wide = _wide(key)
    squares = query.shape[1] != key.shape[1]
    key, value, shrinkage = without_excluded(key, value, shrinkage, key_bias)
    wide_key = key.to(wide)
    keys = torch.cat([wide_key, wide_key.square()], 1) if squares else wide_key
    raw = scale * keys.transpose(1, 2) @ query.to(wide)
    raw = raw if query_bias is None else raw + query_bias[:, None]
    scores = raw if shrinkage is None else raw * shrinkage[:, :, None]
    scores = scores if key_bias is None else scores + key_bias[:, :, None]
    weights, _ = softmax_over_memory(scores)
    grad = grad_out.to(wide)
    grad_weights = (value.to(wide).transpose(2, 3) @ grad).sum(1)
    base = (weights * grad_weights).sum(1, keepdim=True) - grad_lse[:, None]
    slopes = weights * (grad_weights - base)
    grad_raw = slopes if shrinkage is None else slopes * shrinkage[:, :, None]
    grad_keys = scale * query.to(wide) @ grad_raw.transpose(1, 2)
    channels = key.shape[1]
    if squares:
        grad_keys = grad_keys[:, :channels] + 2 * wide_key * grad_keys[:, channels:]
    return (
        (scale * keys @ grad_raw).to(query.dtype),
        grad_keys.to(key.dtype),
        (grad @ weights.transpose(1, 2)[:, None]).to(value.dtype),
        None if shrinkage is None else (slopes * raw).sum(2),
        None if query_bias is None else grad_raw.sum(1),
        None if key_bias is None else slopes.sum(2),
    )


def _fake_usage(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=_wide(key))


def _fake_select(
    query: Tensor, key: Tensor, s: Any, qb: Any, kb: Any, scale: float, precision: str, top_k: int
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], top_k, query.shape[2])
    return query.new_empty(shape, dtype=_wide(key)), query.new_empty(shape, dtype=torch.int64)


def _setup_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.scale = inputs[5]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], output[1])


def _backward_select_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        """Through the selected scores only, by the gather ops, which sum in a fixed order: with the score's gradient
        as weights, the query's gradient is a gather of keys, and the keys' is that of values under the query.
        """
        query, key, shrinkage, query_bias, key_bias, index = ctx.saved_tensors
        if key.shape[2] == 0:
            return *(None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors[:5]), *(None,) * 3
        wide, scale, channels = _wide(key), ctx.scale, key.shape[1]
        forward, backward = _gather_ops(suffix)
        grad = torch.where(index >= 0, grad, 0)
        grad_raw = grad
        if shrinkage is not None:
            at = index.clamp(min=0).flatten(1)
            chosen = torch.unflatten(shrinkage.gather(1, at), 1, index.shape[1:])
            grad_raw = grad * torch.where(index >= 0, chosen, 0)
        keys, queries = key.to(wide), query.to(wide)[:, None]
        keys = torch.cat([keys, keys.square()], 1) if query.shape[1] != channels else keys
        raw, grad_keys = backward(queries, grad_raw, index, keys[:, None])
        raw, grad_keys = scale * raw, scale * grad_keys.squeeze(1)
        if query_bias is not None:
            raw = raw + query_bias[:, None]
        if query.shape[1] != channels:
            defined = torch.where(
                keys[:, :channels].isfinite(), keys[:, :channels], 0
            )  # others are not chosen
            grad_keys = grad_keys[:, :channels] + 2 * defined * grad_keys[:, channels:]
        one, empty = torch.ones_like(queries[:, :, :1]), torch.zeros_like(keys[:, None, :1])

        def sum_at_positions(vector: Tensor | None, rows: Tensor) -> Tensor | None:
            return None if vector is None else backward(one, rows, index, empty)[1].flatten(1)

        return (
            (scale * forward(grad_raw, index, keys[:, None]).squeeze(1)).to(query.dtype),
            grad_keys.to(key.dtype),
            sum_at_positions(shrinkage, grad * raw),
            None if query_bias is None else grad_raw.sum(1),
            sum_at_positions(key_bias, grad),
            *(None,) * 3,
        )

    return backward


def _fake_gather(weight: Tensor, index: Tensor, value: Tensor) -> Tensor:
    return value.new_empty(*value.shape[:3], weight.shape[2])


def _setup_gather(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gather_ops(suffix: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return dispatched("memory_gather", suffix), dispatched("memory_gather_backward", suffix)


def _backward_gather_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, index, value = ctx.saved_tensors
        grad_weight, grad_value = dispatched("memory_gather_backward", suffix)(grad, weight, index, value)
        return grad_weight, None, grad_value

    return backward


def _fake_gather_backward(
    grad: Tensor, weight: Tensor, index: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), value.new_empty(value.shape)


def _setup_gather_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward_gather_backward_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the op, bilinear in grad and (weight, value): cotangents a, b swap places with them."""
        grad, weight, index, value = ctx.saved_tensors
        forward, backward = _gather_ops(suffix)
        grad_grad = forward(a, index, value) + forward(weight, index, b)
        grad_weight, _ = backward(grad, weight, index, b)
        _, grad_value = backward(grad, a, index, value)
        return grad_grad, grad_weight, None, grad_value

    return backward


_SCORES = "Tensor query, Tensor key, Tensor? shrinkage, Tensor? query_bias, Tensor? key_bias"
_READ = _SCORES.replace("Tensor key", "Tensor key, Tensor value")
register_pieces(
    {
        "memory_read": Piece(
            _fake_read,
            _backward_read_by,
            _setup_read,
            schema=f"({_READ}, float scale, str precision) -> (Tensor out, Tensor lse)",
        ),
        "memory_read_list": Piece(_fake_read_list, vmap=lambda _: folding_vmap(_read_list)),
    },
    "memory_read",
)
register_pieces(
    {
        "memory_read_backward": Piece(
            _fake_read_backward,
            lambda _: _backward_read_backward,
            _setup_read_backward,
            schema=f"(Tensor grad_out, Tensor grad_lse, {_READ}, float scale, str precision, Tensor out, Tensor lse)"
            " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_shrinkage, "
            "Tensor grad_query_bias, Tensor grad_key_bias)",
        ),
    },
    "memory_read_backward",
)
register_pieces(
    {
        "memory_usage": Piece(
            _fake_usage, schema=f"({_SCORES}, float scale, str precision, Tensor lse) -> Tensor"
        ),
    },
    "memory_usage",
)
register_pieces(
    {
        "memory_select": Piece(
            _fake_select,
            _backward_select_by,
            _setup_select,
            schema=f"({_SCORES}, float scale, str precision, int top_k) -> (Tensor score, Tensor index)",
        ),
        "memory_gather": Piece(
            _fake_gather,
            _backward_gather_by,
            _setup_gather,
            schema="(Tensor weight, Tensor index, Tensor value) -> Tensor",
        ),
        "memory_gather_backward": Piece(
            _fake_gather_backward,
            _backward_gather_backward_by,
            _setup_gather_backward,
            schema="(Tensor grad, Tensor weight, Tensor index, Tensor value)"
            " -> (Tensor grad_weight, Tensor grad_value)",
        ),
    },
    "memory_select",
)
