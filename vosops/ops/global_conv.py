"""The global convolution: a large kernel as two pairs of line convolutions (Large Kernel Matters, RGMP)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vosops import _checks, _library, backends
from vosops.ops._registration import (
    Piece,
    dispatched,
    looping_vmap,
    register_op,
    register_pieces,
    without_argument,
)
from vosops.reference.global_conv import global_conv_merge_core, global_conv_split_core

HAS_AMX = torch.cpu._is_amx_tile_supported()
"""Whether the processor multiplies matrices of bfloat16. By PyTorch's convolution it then beats Winograd's in float32,
and is itself beaten by the library for AMX (one thread, 4096x15x27: 23 ms against 40, 256x60x107: 26 against 31)."""

CPU_PRECISIONS = ("exact", "winograd")
CUDA_PRECISIONS = ("exact", *_checks.GPU_PRECISIONS)
PRECISIONS = (*CPU_PRECISIONS, *_checks.GPU_PRECISIONS)
LONGEST_ON_CUDA = 17
"""Taps of a line whose halo fits into the shared memory of every GPU from sm_80 on."""


def global_conv(
    x: Tensor,
    l1_weight: Tensor,
    l2_weight: Tensor,
    r1_weight: Tensor,
    r2_weight: Tensor,
    *,
    l1_bias: Tensor | None = None,
    l2_bias: Tensor | None = None,
    r1_bias: Tensor | None = None,
    r2_bias: Tensor | None = None,
    prepared: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Compute a (kh,kw) convolution of low rank: (kh,1) then (1,kw), plus (1,kw) then (kh,1), over all channels.

    The result is `conv(conv(x, l1), l2) + conv(conv(x, r1), r2)` with zeros around every map, stride 1, and no
    non-linearity inside. Both first convolutions read x in one pass; both second ones write one sum.

    Args:
        x: (N,C,H,W); float32, float16, bfloat16, on the CPU also float64. Any strides.
        l1_weight: (Ml,C,kh,1). All weights and biases have the dtype of x.
        l2_weight: (M,Ml,1,kw).
        r1_weight: (Mr,C,1,kw).
        r2_weight: (M,Mr,kh,1). kh and kw are odd.
        l1_bias: (Ml,).
        l2_bias: (M,).
        r1_bias: (Mr,).
        r2_bias: (M,).
        prepared: (N or 1,Ml+Mr,H,W) from `global_conv_prepare`: the contribution of the channels beyond those of x to
            the first stage, including its biases, which must then not be given here. x then has the first channels of
            l1_weight and r1_weight.
        precision: on the CPU "exact" (PyTorch's own convolution) or "winograd" (in float32, not for float64; 2.8
            times fewer multiplications, error below 2e-5 of the result's root mean square; where it does not help,
            below 16 channels or for kernels other than 3 to 9, it is "exact"; the AMX library sums float16 and
            bfloat16 directly, for any kernel); on a GPU "ieee", "tf32x3" or "tf32". "exact" and "ieee" are
            equivalent. None selects, on the CPU, "exact" for float64, for half precision if the processor has AMX but
            another library is loaded, and if torch.use_deterministic_algorithms is on, otherwise "winograd"; on a GPU
            "ieee" unless torch.backends.cuda.matmul.allow_tf32 is on.

    Returns:
        (N,M,H,W) in the dtype of x; channels_last if x is channels_last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        NotImplementedError: under forward-mode differentiation.

    Under autocast the arguments are cast to its dtype, as those of PyTorch's convolutions. Differentiable to any
    order in x, weights, biases and prepared. Time O(N H W (Ml + Mr) (C max(kh,kw) + M max(kh,kw))); memory beyond
    the result: the first stage's (N,Ml+Mr,H,W).

    Source: Peng et al., Large Kernel Matters, CVPR 2017; Oh et al., RGMP, CVPR 2018.

        >>> import torch, vosops
        >>> l1, r1 = torch.randn(8, 16, 7, 1), torch.randn(8, 16, 1, 7)
        >>> l2, r2 = torch.randn(4, 8, 1, 7), torch.randn(4, 8, 7, 1)
        >>> vosops.global_conv(torch.randn(1, 16, 15, 27), l1, l2, r1, r2).shape
        torch.Size([1, 4, 15, 27])
    """
    _checks.refuse_forward_mode("global_conv")
    arguments = _resolve(
        x,
        l1_weight,
        l2_weight,
        r1_weight,
        r2_weight,
        l1_bias=l1_bias,
        l2_bias=l2_bias,
        r1_bias=r1_bias,
        r2_bias=r2_bias,
        prepared=prepared,
        precision=precision,
    )
    implementation = backends.choose("global_conv", arguments.call)
    middle = implementation.run("global_conv_split", *arguments.split)
    result: Tensor = implementation.run("global_conv_merge", middle, *arguments.merge)
    return result


def global_conv_prepare(
    reference: Tensor,
    l1_weight: Tensor,
    r1_weight: Tensor,
    *,
    l1_bias: Tensor | None = None,
    r1_bias: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Return the contribution of the last input channels of `global_conv` to its first stage, including biases.

    RGMP concatenates the features of every frame with those of the first frame, so the half of the first stage that
    reads the first frame is constant over a video.

    Args:
        reference: (N,C',H,W), the last C' of the C channels that l1_weight and r1_weight read.
        l1_weight: (Ml,C,kh,1).
        r1_weight: (Mr,C,1,kw).
        l1_bias: (Ml,).
        r1_bias: (Mr,).
        precision: as in `global_conv`.

    Returns:
        (N,Ml+Mr,H,W), the `prepared` of `global_conv`. Differentiable to any order.

    Raises:
        TypeError, ValueError, NotImplementedError: as `global_conv`.

    Examples:
        >>> import torch, vosops
        >>> target, reference = torch.randn(2, 1, 16, 15, 27)
        >>> l1, r1 = torch.randn(8, 32, 7, 1), torch.randn(8, 32, 1, 7)
        >>> l2, r2 = torch.randn(4, 8, 1, 7), torch.randn(4, 8, 7, 1)
        >>> prepared = vosops.global_conv_prepare(reference, l1, r1)
        >>> both = vosops.global_conv(torch.cat([target, reference], 1), l1, l2, r1, r2)
        >>> torch.allclose(vosops.global_conv(target, l1, l2, r1, r2, prepared=prepared), both, atol=2e-2)
        True
    """
    _checks.refuse_forward_mode("global_conv_prepare")
    arguments = _resolve_prepare(
        reference, l1_weight, r1_weight, l1_bias=l1_bias, r1_bias=r1_bias, precision=precision
    )
    implementation = backends.choose("global_conv", arguments.call)
    result: Tensor = implementation.run("global_conv_split", *arguments.split)
    return result


class _Lines(NamedTuple):
    """The checked arguments of a call: what decides who serves it, all of the split's, and the merge's but its map."""

    call: backends.Call
    split: tuple[Any, ...]
    merge: tuple[Any, ...] = ()


def _resolve(
    x: Tensor,
    l1_weight: Tensor,
    l2_weight: Tensor,
    r1_weight: Tensor,
    r2_weight: Tensor,
    *,
    l1_bias: Tensor | None = None,
    l2_bias: Tensor | None = None,
    r1_bias: Tensor | None = None,
    r2_bias: Tensor | None = None,
    prepared: Tensor | None = None,
    precision: str | None = None,
) -> _Lines:
    """Check the arguments of `global_conv` and turn them into those of the core."""
    names = ("l1_weight", "l2_weight", "r1_weight", "r2_weight", "l1_bias", "l2_bias", "r1_bias", "r2_bias")
    given = (l1_weight, l2_weight, r1_weight, r2_weight, l1_bias, l2_bias, r1_bias, r2_bias)
    x, *cast = _under_autocast(x, *given, prepared)
    l1_weight, l2_weight, r1_weight, r2_weight, l1_bias, l2_bias, r1_bias, r2_bias, prepared = cast
    _check_map("x", x)
    for name, value in zip(names, cast, strict=False):
        _check_parameter(name, value, x)
    _check_lines("l1_weight", l1_weight, "r1_weight", r1_weight)
    _check_lines("r2_weight", r2_weight, "l2_weight", l2_weight)
    channels = x.shape[1]
    if prepared is None:
        _check_first_stage("x", x, l1_weight, r1_weight)
    else:
        if l1_bias is not None or r1_bias is not None:
            given_too = "l1_bias" if l1_bias is not None else "r1_bias"
            raise ValueError(
                f"l1_bias and r1_bias must be None with prepared, which holds them already, got {given_too}"
            )
        if channels > l1_weight.shape[1]:
            raise ValueError(
                f"x must have at most the {l1_weight.shape[1]} channels of l1_weight, got {channels}"
            )
        _check_parameter("prepared", prepared, x)
        batch = 1 if isinstance(prepared, Tensor) and prepared.shape[:1] == (1,) else x.shape[0]
        middle = l1_weight.shape[0] + r1_weight.shape[0]
        _checks.check_tensor("prepared", prepared, (batch, middle, x.shape[2], x.shape[3]))
        if channels < l1_weight.shape[1]:
            l1_weight, r1_weight = l1_weight[:, :channels], r1_weight[:, :channels]
    for name, weight, first in (("l2_weight", l2_weight, l1_weight), ("r2_weight", r2_weight, r1_weight)):
        height, width = weight.shape[2:]
        _checks.check_tensor(name, weight, (r2_weight.shape[0], first.shape[0], height, width))
    for name, bias, weight in zip(names[4:], cast[4:8], cast[:4], strict=True):
        if bias is not None:
            _checks.check_tensor(name, bias, (weight.shape[0],))
    precision = _resolve_precision(precision, x)
    bias = r2_bias if l2_bias is None else l2_bias if r2_bias is None else l2_bias + r2_bias
    return _Lines(
        _call(x, l1_weight, r1_weight, precision),
        (x, l1_weight, r1_weight, l1_bias, r1_bias, prepared, precision),
        (l2_weight, r2_weight, bias, precision),
    )


def _resolve_prepare(
    reference: Tensor,
    l1_weight: Tensor,
    r1_weight: Tensor,
    *,
    l1_bias: Tensor | None = None,
    r1_bias: Tensor | None = None,
    precision: str | None = None,
) -> _Lines:
    """Check the arguments of `global_conv_prepare` and turn them into those of the core."""
    reference, l1_weight, r1_weight, l1_bias, r1_bias = _under_autocast(
        reference, l1_weight, r1_weight, l1_bias, r1_bias
    )
    _check_map("reference", reference)
    for name, value in (("l1_weight", l1_weight), ("r1_weight", r1_weight)):
        _check_parameter(name, value, reference, "reference")
    for name, bias, weight in (("l1_bias", l1_bias, l1_weight), ("r1_bias", r1_bias, r1_weight)):
        if bias is not None:
            _check_parameter(name, bias, reference, "reference")
            _checks.check_tensor(name, bias, (weight.shape[0],))
    _check_lines("l1_weight", l1_weight, "r1_weight", r1_weight)
    first = l1_weight.shape[1] - reference.shape[1]
    if first < 0 or r1_weight.shape[1] != l1_weight.shape[1]:
        raise ValueError(
            f"l1_weight and r1_weight must have the same channels, at least the {reference.shape[1]} of reference, "
            f"got {l1_weight.shape[1]} and {r1_weight.shape[1]}"
        )
    if first > 0:
        l1_weight, r1_weight = l1_weight[:, first:], r1_weight[:, first:]
    precision = _resolve_precision(precision, reference)
    split = (reference, l1_weight, r1_weight, l1_bias, r1_bias, None, precision)
    return _Lines(_call(reference, l1_weight, r1_weight, precision), split)


def _call(x: Tensor, l1_weight: Tensor, r1_weight: Tensor, precision: str) -> backends.Call:
    """Return what decides who serves a call: the CUDA kernels take no longer lines."""
    longest = max(l1_weight.shape[2], r1_weight.shape[3])
    refusals: tuple[tuple[str, str], ...] = ()
    if x.device.type == "cuda" and longest > LONGEST_ON_CUDA:
        refusals = (("cpp", f"the CUDA kernels take lines of at most {LONGEST_ON_CUDA} taps, not {longest}"),)
    backward = _checks.wants_gradients(x, l1_weight, r1_weight)
    return backends.Call(x.device, x.dtype, refusals, None, precision, backward)


def _under_autocast(x: Any, *others: Any) -> list[Any]:
    """Return the arguments in autocast's dtype where it is on, as PyTorch's convolutions take them."""
    given = [x, *others]
    if not isinstance(x, Tensor) or not _checks.under_autocast(x.device.type):
        return given
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if wide else value

    return [cast(value) for value in given]


def _check_map(name: str, x: Tensor) -> None:
    _checks.check_tensor(name, x, ("N", "C", "H", "W"))
    _checks.check_floating(name, x)
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one channel, got C = 0")


def _check_parameter(name: str, value: Tensor | None, x: Tensor, x_name: str = "x") -> None:
    """Check that a weight or an optional bias is a tensor of the dtype and on the device of x."""
    if value is None and name.endswith("bias"):
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {x_name} ({x.dtype}), got {value.dtype}")
    _checks.check_same_device(name, value, x_name, x)


def _check_lines(vertical_name: str, vertical: Tensor, horizontal_name: str, horizontal: Tensor) -> None:
    _checks.check_tensor(vertical_name, vertical, ("M", "C", "kh", 1))
    _checks.check_tensor(horizontal_name, horizontal, ("M", "C", 1, "kw"))
    for name, size in ((vertical_name, vertical.shape[2]), (horizontal_name, horizontal.shape[3])):
        if size % 2 != 1:
            raise ValueError(f"{name} must have an odd kernel size, got {size}")


def _check_first_stage(name: str, x: Tensor, l1_weight: Tensor, r1_weight: Tensor) -> None:
    for weight_name, weight in (("l1_weight", l1_weight), ("r1_weight", r1_weight)):
        if weight.shape[1] != x.shape[1]:
            raise ValueError(
                f"{weight_name} must read the {x.shape[1]} channels of {name}, got {tuple(weight.shape)}"
            )


def _resolve_precision(precision: str | None, x: Tensor) -> str:
    """Return the core's precision: "exact" or "winograd" on the CPU, elsewhere one of tensor-core products."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be None or one of {', '.join(PRECISIONS)}, got {precision!r}")
    if x.device.type != "cpu":
        if precision == "winograd":
            raise ValueError(
                f"precision must be one of {', '.join(CUDA_PRECISIONS)} on {x.device.type}, got {precision!r}"
            )
        return _checks.resolve_precision("ieee" if precision == "exact" else precision, x)
    if precision == "winograd" and x.dtype == torch.float64:
        raise ValueError(f"precision must be None or 'exact' with float64, got {precision!r}")
    if precision is None and x.dtype != torch.float64 and not torch.are_deterministic_algorithms_enabled():
        has_better = x.dtype != torch.float32 and HAS_AMX and _library.CPU_CAPABILITY != "amx"
        return "exact" if has_better else "winograd"
    return "winograd" if precision == "winograd" else "exact"


# ---- The registered pieces. split and merge are each other's gradients of the input: with flipped weights, input
# and output channels exchanged. On the CPU split_input and merge_input read the weights so, and nothing is copied.


def flipped(weight: Tensor) -> Tensor:
    """Return the weight (C,M,kh,kw) of the gradient of a line convolution with weight (M,C,kh,kw)."""
    return weight.flip(2, 3).transpose(0, 1)


def _empty_map(x: Tensor, channels: int) -> Tensor:
    """Return an empty (N,channels,H,W) in the memory format of x."""
    last = x.stride(1) == 1 and not x.is_contiguous()
    return torch.empty(
        (x.shape[0], channels, *x.shape[2:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _fake_split(x: Tensor, first: Tensor, second: Tensor, *_: Any) -> Tensor:
    return _empty_map(x, first.shape[0] + second.shape[0])


def _fake_merge(x: Tensor, first: Tensor, *_: Any) -> Tensor:
    return _empty_map(x, first.shape[0])


def _fake_weight(x: Tensor, grad: Tensor, kernel_h: int, kernel_w: int, _: str) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1], kernel_h, kernel_w))


def _fake_split_input(grad: Tensor, first: Tensor, *_: Any) -> Tensor:
    return _empty_map(grad, first.shape[1])


def _fake_merge_input(grad: Tensor, first: Tensor, second: Tensor, _: str) -> Tensor:
    return _empty_map(grad, first.shape[1] + second.shape[1])


def _sum_of_bias(ctx: Any, position: int, grad: Tensor) -> Tensor | None:
    return grad.sum((0, 2, 3)) if ctx.needs_input_grad[position] else None


def _halves(x: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    return x[:, :middle], x[:, middle:]


def _setup_split(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, first, second, *_, addend, ctx.precision = inputs
    ctx.repeated = addend is not None and addend.shape[0] != x.shape[0]
    ctx.save_for_backward(x, first, second)


def _setup_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, first, second, _, ctx.precision = inputs
    ctx.save_for_backward(x, first, second)


def _setup_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, first, second, ctx.precision = inputs
    ctx.save_for_backward(grad, first, second)


def _setup_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, _, _, ctx.precision = inputs
    ctx.save_for_backward(x, grad)


def _line_conv(suffix: str, x: Tensor, weight: Tensor, precision: str) -> Tensor:
    """One line convolution: a split without a second half."""
    result: Tensor = dispatched("global_conv_split", suffix)(
        x, weight, weight[:0], None, None, None, precision
    )
    return result


def _has_input_ops(suffix: str, grad: Tensor) -> bool:
    return suffix == "" and grad.device.type == "cpu"


def _split_input(suffix: str, grad: Tensor, first: Tensor, second: Tensor, precision: str) -> Tensor:
    """Return the gradient of split's x."""
    if _has_input_ops(suffix, grad):
        result: Tensor = torch.ops.vosops.global_conv_split_input(grad, first, second, precision)
        return result
    merge = dispatched("global_conv_merge", suffix)
    result = merge(grad, flipped(first), flipped(second), None, precision)
    return result


def _merge_input(suffix: str, grad: Tensor, first: Tensor, second: Tensor, precision: str) -> Tensor:
    """Return the gradient of merge's x."""
    if _has_input_ops(suffix, grad):
        result: Tensor = torch.ops.vosops.global_conv_merge_input(grad, first, second, precision)
        return result
    split = dispatched("global_conv_split", suffix)
    result = split(grad, flipped(first), flipped(second), None, None, None, precision)
    return result


def _line_input(suffix: str, grad: Tensor, weight: Tensor, precision: str) -> Tensor:
    """Return the gradient of _line_conv's x."""
    if _has_input_ops(suffix, grad):
        return _split_input(suffix, grad, weight, weight[:0], precision)
    return _line_conv(suffix, grad, flipped(weight), precision)


def _weight_gradients(
    suffix: str, ctx: Any, maps: Sequence[tuple[Tensor, Tensor]], weights: tuple[Tensor, Tensor]
) -> Iterator[Tensor | None]:
    """Those of both weights that need one, each for an input and the gradient of its convolution."""
    op = dispatched("global_conv_weight", suffix)
    for need, (x, grad), weight in zip(ctx.needs_input_grad[1:3], maps, weights, strict=True):
        yield op(x, grad, weight.shape[2], weight.shape[3], ctx.precision) if need else None


def _backward_split_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        needs = ctx.needs_input_grad
        halves = _halves(grad, first.shape[0])
        grad_x = _split_input(suffix, grad, first, second, ctx.precision) if needs[0] else None
        weights = _weight_gradients(suffix, ctx, [(x, half) for half in halves], (first, second))
        grad_addend = (grad.sum(0, keepdim=True) if ctx.repeated else grad) if needs[5] else None
        biases = (_sum_of_bias(ctx, 3 + i, half) for i, half in enumerate(halves))
        return grad_x, *weights, *biases, grad_addend, None

    return backward


def _backward_merge_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        grad_x = _merge_input(suffix, grad, first, second, ctx.precision) if needed else None
        maps = [(half, grad) for half in _halves(x, first.shape[1])]
        weights = _weight_gradients(suffix, ctx, maps, (first, second))
        return grad_x, *weights, _sum_of_bias(ctx, 3, grad), None

    return backward


def _backward_split_input_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the adjoint: a split of the cotangent, which also stands for x beside the weights."""
        grad, first, second = ctx.saved_tensors
        grad_grad = None
        if ctx.needs_input_grad[0]:
            split = dispatched("global_conv_split", suffix)
            grad_grad = split(cotangent, first, second, None, None, None, ctx.precision)
        maps = [(cotangent, half) for half in _halves(grad, first.shape[0])]
        return grad_grad, *_weight_gradients(suffix, ctx, maps, (first, second)), None

    return backward


def _backward_merge_input_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, first, second = ctx.saved_tensors
        grad_grad = None
        if ctx.needs_input_grad[0]:
            merge = dispatched("global_conv_merge", suffix)
            grad_grad = merge(cotangent, first, second, None, ctx.precision)
        maps = [(half, grad) for half in _halves(cotangent, first.shape[1])]
        return grad_grad, *_weight_gradients(suffix, ctx, maps, (first, second)), None

    return backward


def _backward_weight_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the bilinear op: the cotangent is a weight that convolves x, and its adjoint the gradient."""
        x, grad = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = _line_input(suffix, grad, cotangent, ctx.precision) if needs[0] else None
        grad_grad = _line_conv(suffix, x, cotangent, ctx.precision) if needs[1] else None
        return grad_x, grad_grad, None, None, None

    return backward


def _vmap_maps_by(name: str, *maps: int) -> Callable[[str], Callable[..., Any]]:
    """Return the vmap rule of an op whose arguments `maps` fold into N; batched weights are taken one by one."""

    def of_library(suffix: str) -> Callable[..., Any]:
        op = dispatched(name, suffix)

        def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
            size = info.batch_size
            if any(dim is not None and i not in maps for i, dim in enumerate(in_dims)):
                return looping_vmap(op)(info, in_dims, *args)
            folded = list(args)
            for i in maps:
                if args[i] is None or (in_dims[i] is None and i != 0 and args[i].shape[0] == 1):
                    continue
                one = args[i].unsqueeze(0) if in_dims[i] is None else args[i].movedim(in_dims[i], 0)
                n = args[0].shape[0] if in_dims[0] is None else args[0].movedim(in_dims[0], 0).shape[1]
                folded[i] = one.expand(size, n, *one.shape[2:]).flatten(0, 1)
            return op(*folded).unflatten(0, (size, -1)), 0

        return vmap

    return of_library


def _vmap_weight_by(suffix: str) -> Callable[..., Any]:
    """Return the vmap rule of the weight gradient: the side that is batched is folded into its channels."""
    op = dispatched("global_conv_weight", suffix)

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        x_dim, grad_dim = in_dims[:2]
        if x_dim is not None and grad_dim is not None:
            return looping_vmap(op)(info, in_dims, *args)
        x, grad, *others = args
        if x_dim is not None:
            x = x.movedim(x_dim, 1).flatten(1, 2)
            return op(x, grad, *others).unflatten(1, (size, -1)), 1
        grad = grad.movedim(grad_dim, 1).flatten(1, 2)
        return op(x, grad, *others).unflatten(0, (size, -1)), 0

    return vmap


register_pieces(
    {
        "global_conv_split": Piece(
            _fake_split,
            _backward_split_by,
            _setup_split,
            _vmap_maps_by("global_conv_split", 0, 5),
            "(Tensor x, Tensor first, Tensor second, Tensor? first_bias, Tensor? second_bias, Tensor? addend, "
            "str precision) -> Tensor",
        ),
        "global_conv_merge": Piece(
            _fake_merge,
            _backward_merge_by,
            _setup_merge,
            _vmap_maps_by("global_conv_merge", 0),
            "(Tensor x, Tensor first, Tensor second, Tensor? bias, str precision) -> Tensor",
        ),
        "global_conv_weight": Piece(
            _fake_weight,
            _backward_weight_by,
            _setup_weight,
            _vmap_weight_by,
            "(Tensor x, Tensor grad, int kernel_h, int kernel_w, str precision) -> Tensor",
        ),
        "global_conv_split_input": Piece(
            _fake_split_input,
            _backward_split_input_by,
            _setup_input,
            _vmap_maps_by("global_conv_split_input", 0),
        ),
        "global_conv_merge_input": Piece(
            _fake_merge_input,
            _backward_merge_input_by,
            _setup_input,
            _vmap_maps_by("global_conv_merge_input", 0),
        ),
    },
    "global_conv",
)
register_op(
    "global_conv",
    resolve={"global_conv": _resolve, "global_conv_prepare": _resolve_prepare},
    reference={
        "global_conv_split": without_argument(-1, global_conv_split_core),
        "global_conv_merge": without_argument(-1, global_conv_merge_core),
    },
)
