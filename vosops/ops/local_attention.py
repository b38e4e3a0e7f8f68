"""Attention in a window around each pixel: AOT's short-term attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from vosops import _checks, _library, backends
from vosops.ops._bilinear import bilinear_piece
from vosops.ops._registration import (
    SUFFIXES,
    Piece,
    define,
    derivative_of,
    differentiate,
    dispatched,
    has_kernel,
    looping_vmap,
    register_op,
    register_pieces,
    setup_saving_inputs,
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
    """Attend from each pixel of `query` to the pixels of `key` and `value` in a window around the same position.

    For query pixel p and offset d in the window, with scale s and separately for each head, the score is s query[p] .
    key[p + d] + query[p] . relative_key[d] + bias[d]; the result is the sum over d of softmax(score)[d] (value[p + d]
    + relative_value[d]). Positions outside the image do not exist.

    Args:
        query: (N,C,H,W); float32, float16, bfloat16 or float64. Head m has channels m C/heads and on.
        key: (N,C,H,W), for example of the previous frame.
        value: (N,Cv,H,W). All three have the same dtype.
        radius: of the window in pixels, in x and y; AOT's `max_dis` 7. 0: only the same pixel.
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
    deterministic. Time O(N H W K (C + Cv)); memory beyond inputs and result: the scores, O(N heads H W K), instead of
    windows of key and value, C + Cv times as much per head, or a dense map over all pixels (AOT); on processors with
    AMX none of these, except for the few calls that its kernels do not support (docs/ops/local_attention.md). If
    neither the compiled kernels nor Triton can run, PyTorch's own ops are used, one shift of the window at a time.

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
    tensors = (query, key, value, bias, relative_key, relative_value)
    kernels = backends.choose("local_attention", call)
    with without_autocast(query.device.type):
        fits = kernels.name == "cpp" and not return_weights and _fits_engine(call, *tensors[3:])
        if fits and _worthwhile(query, value, heads, window, call.backward):
            learned = (None if t is None else t.to(torch.float32) for t in tensors[3:])
            out: Tensor = kernels.run("local_attention_whole", *tensors[:3], *learned, heads, *window, scale)[
                0
            ]
            return out
        as_it_is = relative_value is None and _reads_half(kernels.name, call.device)
        steps = _by_pieces(kernels.run, *tensors, heads, *window, scale, as_it_is)
    return (steps.out, steps.weights) if return_weights else steps.out


class _Steps(NamedTuple):
    """What the pieces compute one after the other: (N,heads,K,H,W), and (N,Cv,H,W) in the dtype of value."""

    scores: Tensor
    weights: Tensor
    out: Tensor


def _by_pieces(
    run: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    relative_key: Tensor | None,
    relative_value: Tensor | None,
    heads: int,
    reach: int,
    dilation: int,
    scale: float,
    as_it_is: bool = False,
) -> _Steps:
    """Attend by the three pieces, which `run(name, ...)` calls, and PyTorch's softmax between them.

    as_it_is: the value is not converted to float32.
    """
    window, dtype = (reach, dilation), torch.promote_types(query.dtype, torch.float32)
    q, k = (_by_head(x.to(dtype), heads) for x in (query, key))
    v = _by_head(value if as_it_is else value.to(dtype), heads)
    scores = run("local_attention_dot", q * scale, k, *window)
    scores = scores.unflatten(0, (query.shape[0], heads))
    if relative_key is not None:
        by_head = q.unflatten(0, (query.shape[0], heads))
        scores = scores + torch.einsum("nmchw,mck->nmkhw", by_head, relative_key.to(dtype))
    if bias is not None:
        scores = scores + (bias[:, :, None, None] if bias.dim() == 2 else bias).to(dtype)
    scores = scores.masked_fill(_outside(*window, query), -torch.inf)
    weights = scores.softmax(2)
    out = run("local_attention_weigh", weights.flatten(0, 1), v, *window)
    out = out.unflatten(0, (query.shape[0], heads))
    if relative_value is not None:
        out = out + torch.einsum("nmkhw,mck->nmchw", weights, relative_value.to(dtype))
    return _Steps(scores, weights, out.flatten(1, 2).to(value.dtype))


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


def _piece(first: str, second: str, fake: Callable[..., Tensor], adjoints: Callable[..., Any]) -> Piece:
    schema = f"(Tensor {first}, Tensor {second}, int reach, int dilation) -> Tensor"
    return bilinear_piece(schema, fake, adjoints)


DOT, WEIGH, SPREAD = "local_attention_dot", "local_attention_weigh", "local_attention_spread"
PIECES = {
    DOT: _piece("a", "b", _fake_dot, lambda a, b, grad: ((WEIGH, grad, b), (SPREAD, grad, a))),
    WEIGH: _piece("weights", "b", _fake_map, lambda w, b, grad: ((DOT, grad, b), (SPREAD, w, grad))),
    SPREAD: _piece("weights", "a", _fake_map, lambda w, a, grad: ((DOT, a, grad), (WEIGH, w, grad))),
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


# ---- The whole by one kernel, which the library for AMX has.


TILE = 16
"""Pixels of a row that tiles take at a time."""
FEW_PIXELS = 128
"""Of an image; up to here the number of calls determines the time."""


def _fits_engine(
    call: backends.Call, bias: Tensor | None, relative_key: Tensor | None, relative_value: Tensor | None
) -> bool:
    """Whether the library for AMX has a kernel for these arguments."""
    on_engine = HAS_FUSED and call.device.type == "cpu" and _library.CPU_CAPABILITY == "amx"
    for_offsets = bias is None or bias.dim() == 2
    differentiable = not call.backward or (relative_key is None and relative_value is None)
    return on_engine and call.dtype == torch.float32 and for_offsets and differentiable


def _worthwhile(query: Tensor, value: Tensor, heads: int, window: tuple[int, int], backward: bool) -> bool:
    """Whether one pass on tiles is faster than the pieces.

    Measured on an Intel Xeon (family 6, model 207), one thread: with three pieces for a number tiles are slower up to
    49 offsets and beyond 256 channels, and with any where their 16 pixels of a row, a dilation apart, are few.
    """
    reach, dilation = window
    height, width = query.shape[2:]
    if height * width <= FEW_PIXELS:
        return True
    offsets = (2 * reach + 1) ** 2
    channels = (query.shape[1] + value.shape[1]) // heads
    neighbours = -(-width // dilation)
    filled = neighbours / (-(-neighbours // TILE) * TILE)
    if query.dtype == torch.bfloat16:
        return filled >= (0.6 if backward else 0.3) and (not backward or offsets >= 100 or channels >= TILE)
    return filled >= 0.5 and offsets >= 100 and channels <= 256


def _compiled(name: str, *inputs: Any) -> Tensor:
    result: Tensor = dispatched(name, "")(*inputs)
    return result


def _whole(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Attend by the matrix engine; what it cannot do is left to the pieces."""
    out, lse = torch.ops.vosops.local_attention_fused(query, *rest)
    if out.shape[0] == query.shape[0]:
        return out, lse
    return _whole_by_pieces(query, *rest)


def _whole_by_pieces(*args: Any) -> tuple[Tensor, Tensor]:
    """Return what the fused kernel computes, by the pieces: attended values and the log-sum-exp of the scores."""
    steps = _by_pieces(_compiled, *args)
    return steps.out, steps.scores.logsumexp(2)


def _whole_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return the gradients by the matrix engine; what it cannot do is left to the pieces."""
    grads: tuple[Tensor, ...] = torch.ops.vosops.local_attention_fused_backward(grad, *rest)
    return grads if grads[0].shape[0] == grad.shape[0] else _gradients_by_pieces(grad, *rest)


def _gradients_by_pieces(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    heads: int,
    reach: int,
    dilation: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return what the fused kernel of the backward computes, in differentiable PyTorch."""
    window, batch = (reach, dilation), query.shape[0]
    weights = _by_pieces(_compiled, query, key, value, bias, None, None, heads, *window, scale).weights
    w = weights.flatten(0, 1)
    q, k, v, g = (_by_head(x.to(w.dtype), heads) for x in (query, key, value, grad))
    of_weights = _compiled("local_attention_dot", g, v, *window)
    share = (w * of_weights).sum(1, keepdim=True) - grad_lse.flatten(0, 1).unsqueeze(1)
    of_scores = w * (of_weights - share)
    by_head = (
        scale * _compiled("local_attention_weigh", of_scores, k, *window),
        scale * _compiled("local_attention_spread", of_scores, q, *window),
        _compiled("local_attention_spread", w, g, *window),
    )
    grads = (x.unflatten(0, (batch, heads)).flatten(1, 2).to(query.dtype) for x in by_head)
    of_bias = of_scores.unflatten(0, (batch, heads)).sum((0, 3, 4))
    return *grads, of_bias if bias is not None else of_bias.new_empty(0, 0)


def _fake_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    relative_key: Tensor | None,
    relative_value: Tensor | None,
    heads: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], heads, *query.shape[2:])
    return value.new_empty(value.shape), query.new_empty(shape, dtype=torch.float32)


def _fake_whole_backward(
    grad: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    grads = (x.new_empty(x.shape) for x in (query, key, value))
    return *grads, query.new_empty((0, 0) if bias is None else bias.shape, dtype=torch.float32)


def _setup_whole(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[6:]
    ctx.save_for_backward(*inputs[:6], output[1])


def _backward_of_whole(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors
    query, key, value, bias, *relative = tensors
    grads: Sequence[Tensor | None]
    if relative == [None, None]:
        *maps, of_bias = torch.ops.vosops.local_attention_whole_backward(
            *cotangents, query, key, value, bias, lse, *ctx.options
        )
        grads = (*maps, None if bias is None else of_bias, None, None)
    else:
        grads = differentiate(
            lambda *saved: _whole_by_pieces(*saved, *ctx.options),
            tensors,
            ctx.needs_input_grad[:6],
            cotangents,
        )
    return *grads, *(None for _ in ctx.options)


HAS_FUSED = has_kernel("local_attention_fused", "CPU")
if HAS_FUSED:
    _options = "int heads, int reach, int dilation, float scale"
    for _name, _schema, _kernel in (
        (
            "local_attention_whole",
            "(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? relative_key, Tensor? relative_value, "
            f"{_options}) -> (Tensor out, Tensor lse)",
            _whole,
        ),
        (
            "local_attention_whole_backward",
            "(Tensor grad, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor lse, "
            f"{_options}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
            _whole_backward,
        ),
    ):
        define(_name, _schema, _kernel, "CPU")
    register_pieces(
        {
            "local_attention_whole": Piece(
                _fake_whole,
                lambda _: _backward_of_whole,
                _setup_whole,
                lambda _: looping_vmap(dispatched("local_attention_whole", "")),
            ),
            "local_attention_whole_backward": Piece(
                _fake_whole_backward,
                lambda _: derivative_of(_gradients_by_pieces, 7),
                setup_saving_inputs,
                lambda _: looping_vmap(dispatched("local_attention_whole_backward", "")),
            ),
        },
        suffixes=("",),
    )


def _kernels(suffix: str) -> Mapping[str, Callable[..., Any]]:
    """Return the pieces of a library, and the whole: by one kernel where there is one, by the pieces elsewhere."""
    pieces = {name: dispatched(name, suffix) for name in ("local_attention_dot", "local_attention_weigh")}

    def whole(*args: Any) -> tuple[Tensor, Tensor]:
        steps = _by_pieces(lambda name, *inputs: pieces[name](*inputs), *args)
        return steps.out, steps.scores.logsumexp(2)

    fused = suffix == "" and HAS_FUSED
    return {**pieces, "local_attention_whole": dispatched("local_attention_whole", "") if fused else whole}


register_op(
    "local_attention",
    resolve={"local_attention": _resolve},
    reference=_kernels(SHIFTS),
    kernels=_kernels,
    needs=("local_attention_dot", "local_attention_weigh"),
)
