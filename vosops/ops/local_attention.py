"""Attention in a window around each pixel: AOT's short-term attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from vosops import _checks, backends
from vosops.ops._registration import (
    SUFFIXES,
    Piece,
    define,
    dispatched,
    has_kernel,
    register_op,
    register_pieces,
    without_autocast,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        """The options that do not change what is returned."""

        radius: int
        heads: int
        dilation: int
        scale: float | None
        relative_key: Tensor | None
        relative_value: Tensor | None
        bias: Tensor | None


@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_weights: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_weights: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_weights: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    radius: int = 7,
    heads: int = 1,
    dilation: int = 1,
    scale: float | None = None,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
    bias: Tensor | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each pixel of `query` to the pixels of `key` and `value` in a window around the same place.

    For query pixel p and offset d in the window, with s the scale and for each head by itself, the score is
    s query[p] . key[p + d] + query[p] . relative_key[d] + bias[d]; the result is the sum over d of
    softmax(score)[d] (value[p + d] + relative_value[d]). Positions outside the image do not exist.

    Args:
        query: (N,C,H,W); float32, float16, bfloat16 or float64. Head m has channels m C/heads and on.
        key: (N,C,H,W), of the previous frame, say.
        value: (N,Cv,H,W). All three have one dtype.
        radius: of the window in pixels, in x and y; AOT's `max_dis` 7. 0: the same pixel alone.
        heads: number of heads; divides C and Cv.
        dilation: offsets are the multiples of it up to the radius: K = (2 (radius // dilation) + 1)^2, row by row.
        scale: of the product of query and key; 1 / sqrt(C / heads) unless given. It does not scale relative_key.
        relative_key: (heads,C/heads,K), learned, multiplied with the query.
        relative_value: (heads,Cv/heads,K), learned, added to the value.
        bias: (heads,K), or for each pixel (N,heads,K,H,W); added to the score.
        return_weights: also return the softmax.

    Returns:
        (N,Cv,H,W) in the dtype of value; with return_weights a tuple with (N,heads,K,H,W) float32 (float64 for
        float64), 0 outside the image.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        NotImplementedError: under forward-mode differentiation.

    Scores, softmax and sums are float32, also under autocast. Differentiable to any order in all tensors,
    deterministic. Time O(N H W K (C + Cv)); memory beyond inputs and result: the scores, O(N heads H W K), in place of
    windows of key and value, C + Cv times as much per head, or of a dense map over all pixels (AOT). Where neither the
    compiled kernels nor Triton's run, PyTorch's own ops do, a shift of the window at a time.

    Source: Yang et al., AOT, NeurIPS 2021 (`MultiheadLocalAttentionV2`); Yang and Yang, DeAOT, NeurIPS 2022.

        >>> import torch, vosops
        >>> query, key, value = torch.randn(3, 1, 64, 15, 27)
        >>> vosops.local_attention(query, key, value, heads=8).shape
        torch.Size([1, 64, 15, 27])
    """
    _checks.refuse_forward_mode("local_attention")
    arguments = _resolve(
        query,
        key,
        value,
        radius=radius,
        heads=heads,
        dilation=dilation,
        scale=scale,
        relative_key=relative_key,
        relative_value=relative_value,
        bias=bias,
    )
    call, window, scale = arguments
    dtype = call.dtype
    kernels = backends.choose("local_attention", call)
    with without_autocast(query.device.type):
        q, k = (_by_head(x.to(dtype), heads) for x in (query, key))
        as_it_is = relative_value is None and _reads_half(kernels.name, call.device)
        v = _by_head(value if as_it_is else value.to(dtype), heads)
        scores = kernels.run("local_attention_dot", q * scale, k, *window)
        scores = scores.unflatten(0, (query.shape[0], heads))
        if relative_key is not None:
            by_head = q.unflatten(0, (query.shape[0], heads))
            scores = scores + torch.einsum("nmchw,mck->nmkhw", by_head, relative_key.to(dtype))
        if bias is not None:
            scores = scores + (bias[:, :, None, None] if bias.dim() == 2 else bias).to(dtype)
        outside = _outside(*window, query)
        weights = scores.masked_fill(outside, -torch.inf).softmax(2)
        out = kernels.run("local_attention_weigh", weights.flatten(0, 1), v, *window)
        out = out.unflatten(0, (query.shape[0], heads))
        if relative_value is not None:
            out = out + torch.einsum("nmkhw,mck->nmchw", weights, relative_value.to(dtype))
        out = out.flatten(1, 2).to(value.dtype)
    return (out, weights) if return_weights else out


class _Attention(NamedTuple):
    """The checked arguments of a call: what decides who serves it, reach and dilation, and the scale."""

    call: backends.Call
    window: tuple[int, int]
    scale: float


def _resolve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    radius: int = 7,
    heads: int = 1,
    dilation: int = 1,
    scale: float | None = None,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
    bias: Tensor | None = None,
    return_weights: bool = False,
) -> _Attention:
    """Check the public arguments."""
    _check(query, key, value, radius, heads, dilation)
    reach = radius // dilation
    _check_learned(query, value, relative_key, relative_value, bias, heads, (2 * reach + 1) ** 2)
    channels = query.shape[1] // heads
    scale = channels**-0.5 if scale is None else _checks.check_number("scale", scale)
    backward = _checks.wants_gradients(query, key, value, relative_key, relative_value, bias)
    dtype = torch.promote_types(query.dtype, torch.float32)
    call = backends.Call(query.device, dtype, backward=backward)
    return _Attention(call, (reach, dilation), scale)


def _by_head(maps: Tensor, heads: int) -> Tensor:
    """(N*heads,C/heads,H,W) of (N,C,H,W)."""
    folded: Tensor = maps.unflatten(1, (heads, -1)).flatten(0, 1)
    return folded


def _check(query: Tensor, key: Tensor, value: Tensor, radius: int, heads: int, dilation: int) -> None:
    """Check the maps and the window."""
    _checks.check_tensor("query", query, ("N", "C", "H", "W"))
    batch, channels, height, width = query.shape
    _checks.check_tensor("key", key, (batch, channels, height, width))
    _checks.check_tensor("value", value, (batch, "Cv", height, width))
    _checks.check_floating("query", query)
    for name, x in (("key", key), ("value", value)):
        _checks.check_same_device(name, x, "query", query)
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query ({query.dtype}), got {x.dtype}")
    _checks.check_positive_int("radius", radius, 0)
    _checks.check_positive_int("dilation", dilation)
    _checks.check_positive_int("heads", heads)
    for name, x in (("query", query), ("value", value)):
        if x.shape[1] == 0 or x.shape[1] % heads:
            raise ValueError(f"{name} must have a multiple of heads = {heads} channels, got {x.shape[1]}")


def _check_learned(
    query: Tensor,
    value: Tensor,
    relative_key: Tensor | None,
    relative_value: Tensor | None,
    bias: Tensor | None,
    heads: int,
    offsets: int,
) -> None:
    """Check what depends on the offset."""
    batch, channels, height, width = query.shape
    for_pixels = isinstance(bias, Tensor) and bias.dim() == 5
    shapes = {
        "relative_key": (relative_key, (heads, channels // heads, offsets)),
        "relative_value": (relative_value, (heads, value.shape[1] // heads, offsets)),
        "bias": (bias, (batch, heads, offsets, height, width) if for_pixels else (heads, offsets)),
    }
    for name, (x, shape) in shapes.items():
        if x is not None:
            _checks.check_tensor(name, x, shape)
            _checks.check_floating(name, x)
            _checks.check_same_device(name, x, "query", query)


def _outside(reach: int, dilation: int, like: Tensor) -> Tensor:
    """Bool (K,H,W): whether p + d lies outside the image."""
    steps = torch.arange(-reach, reach + 1, device=like.device) * dilation
    y, x = (torch.arange(size, device=like.device) + steps[:, None] for size in like.shape[2:])
    rows, columns = (y < 0) | (y >= like.shape[2]), (x < 0) | (x >= like.shape[3])
    return (rows[:, None, :, None] | columns[None, :, None, :]).flatten(0, 1)


# ---- The registered pieces. With d the offset: dot[d,p] = a[p] . b[p+d], weigh[p] = sum of w[d,p] b[p+d], and
# spread[p] = sum of w[d,p-d] a[p-d]. Each one's derivatives are the two others, so that all orders exist. Maps are
# float32 or float64, on GPUs also float16 and bfloat16, weights float32 or float64.


def _shifts(
    like: Tensor, reach: int, dilation: int
) -> Iterator[tuple[int, tuple[Any, ...], tuple[Any, ...]]]:
    """For each offset whose window touches the image: its number, and the places p and p + d that lie inside."""
    height, width = like.shape[2:]
    steps = range(-reach * dilation, reach * dilation + 1, dilation)
    for i, dy in enumerate(steps):
        for j, dx in enumerate(steps):
            top, left = max(0, -dy), max(0, -dx)
            rows, columns = height - abs(dy), width - abs(dx)
            if rows > 0 and columns > 0:
                here = (..., slice(top, top + rows), slice(left, left + columns))
                there = (..., slice(top + dy, top + dy + rows), slice(left + dx, left + dx + columns))
                yield i * len(steps) + j, here, there


def _dot(a: Tensor, b: Tensor, reach: int, dilation: int) -> Tensor:
    out = torch.zeros_like(_fake_dot(a, b, reach, dilation))
    for k, here, there in _shifts(a, reach, dilation):
        out[:, k][here] = (a[here] * b[there]).sum(1)
    return out


def _weigh(weights: Tensor, b: Tensor, reach: int, dilation: int) -> Tensor:
    out = torch.zeros_like(b, memory_format=torch.contiguous_format)
    for k, here, there in _shifts(b, reach, dilation):
        out[here].addcmul_(weights[:, k : k + 1][here], b[there])
    return out


def _spread(weights: Tensor, a: Tensor, reach: int, dilation: int) -> Tensor:
    out = torch.zeros_like(a, memory_format=torch.contiguous_format)
    for k, here, there in _shifts(a, reach, dilation):
        out[there].addcmul_(weights[:, k : k + 1][here], a[here])
    return out


def _fake_dot(a: Tensor, b: Tensor, reach: int, dilation: int) -> Tensor:
    sizes = (a.shape[0], (2 * reach + 1) ** 2, *a.shape[2:])
    return a.new_empty(sizes, dtype=torch.promote_types(a.dtype, torch.float32))


def _fake_map(weights: Tensor, x: Tensor, reach: int, dilation: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *ctx.window = inputs
    ctx.save_for_backward(first, second)


def _backward_by(adjoints: Callable[..., Any]) -> Callable[[str], Callable[..., Any]]:
    """Return the derivative of a piece by the other two.

    `adjoints(first, second, grad)`: for each input, the name and the inputs of the piece that gives its gradient.
    """

    def of_library(suffix: str) -> Callable[..., Any]:
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            calls = zip(adjoints(*ctx.saved_tensors, grad), ctx.needs_input_grad, strict=False)
            grads = (
                dispatched(f"local_attention_{name}", suffix)(*inputs, *ctx.window) if need else None
                for (name, *inputs), need in calls
            )
            return *grads, None, None

        return backward

    return of_library


def _piece(first: str, second: str, fake: Callable[..., Tensor], adjoints: Callable[..., Any]) -> Piece:
    schema = f"(Tensor {first}, Tensor {second}, int reach, int dilation) -> Tensor"
    return Piece(fake, _backward_by(adjoints), _setup_context, schema=schema)


PIECES = {
    "local_attention_dot": _piece(
        "a", "b", _fake_dot, lambda a, b, grad: (("weigh", grad, b), ("spread", grad, a))
    ),
    "local_attention_weigh": _piece(
        "weights", "b", _fake_map, lambda w, b, grad: (("dot", grad, b), ("spread", w, grad))
    ),
    "local_attention_spread": _piece(
        "weights", "a", _fake_map, lambda w, a, grad: (("dot", a, grad), ("weigh", w, grad))
    ),
}
SHIFTS = "_shifts"
"""The suffix of the pieces by PyTorch's own ops."""

for (_name, _each), _by_shifts in zip(PIECES.items(), (_dot, _weigh, _spread), strict=True):
    assert _each.schema is not None
    define(_name + SHIFTS, _each.schema, _by_shifts, "CompositeExplicitAutograd")
register_pieces(PIECES, "local_attention", (*SUFFIXES, SHIFTS))
HAS_COMPILED = has_kernel("local_attention_dot", "CPU")


def _reads_half(backend: str, device: torch.device) -> bool:
    """Whether the maps of an implementation may be float16 and bfloat16."""
    return backend == "triton" or (backend == "cpp" and device.type == "cuda")


register_op(
    "local_attention",
    resolve={"local_attention": _resolve},
    reference={name: dispatched(name, SHIFTS) for name in ("local_attention_dot", "local_attention_weigh")},
)
