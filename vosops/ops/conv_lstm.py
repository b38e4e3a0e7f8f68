"""The convolutional LSTM: one convolution over [x; h], one fused kernel for gates and cell (Shi et al., 2015).

More than 800 lines: the steps of all variants, their cached weights and their gradients share the resolution of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.weak import WeakTensorKeyDictionary

from vosops import _checks, _library, backends
from vosops.ops._registration import (
    Piece,
    define,
    derivative_of,
    dispatched,
    has_kernel,
    looping_vmap,
    register_op,
    register_pieces,
    setup_saving_inputs,
    without_argument,
    without_autocast,
)
from vosops.reference.conv_lstm import conv_lstm_core

VARIANTS = ("convolution", "spatial", "depthwise", "separable")
GATES = 4  # input, forget, new input, output

WEIGHTS_OF = {"convolution": 1, "spatial": 2, "depthwise": 1, "separable": 2}
"""Variant -> how many weights it has."""

PRECISIONS = ("exact", "winograd")
WINOGRAD_KERNEL = 3
WINOGRAD_CHANNELS = 2048
"""Input and hidden channels up to which the relative error of Winograd's algorithm was measured below 1e-5; it grows
with their square root."""
SAMPLED_WEIGHTS = 1024
"""How many weights tell at most whether those whose transform is kept are still the same."""


def conv_lstm(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    variant: str = "convolution",
    forget_bias: float = 1.0,
    batch_first: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run a convolutional LSTM over a sequence of feature maps: `output, (h, c)` as torch.nn.LSTM returns them.

    In each step, with * the gates' convolution (zero padding that keeps the size, stride 1),

        i, f, g, o = W * [x; h] + bias
        c = sigmoid(f + forget_bias) c + sigmoid(i) tanh(g)
        h = sigmoid(o) tanh(c)

    Args:
        x: (N,T,C,H,W), only N may be 0; float32, float16, bfloat16, on the CPU also float64.
        weights: packed in the gate order i, f, g, o, of x's dtype, every kernel size odd. By variant:

            - "convolution": (4*hidden, C+hidden, kh, kw);
            - "spatial": (4*hidden, C+hidden, k, 1) and then, separately for each gate and for x and h,
              (4*hidden, 2*hidden, 1, k);
            - "depthwise": (4, C+hidden, kh, kw), one filter per gate and channel, which needs C = hidden;
            - "separable": the same, for any C, and then (4*hidden, C+hidden, 1, 1).
        bias: (4*hidden,).
        state: (h, c), each (N,hidden,H,W) of x's dtype; zeros unless given.
        variant: "convolution", "spatial", "depthwise" or "separable".
        forget_bias: added to the forget gate before its sigmoid.
        batch_first: False for x and output (T,N,C,H,W).
        precision: "exact" convolves directly, "winograd" by Winograd's F(4x4,3x3), which has a quarter of the
            multiplications and a relative error of up to 2e-5. None takes Winograd where it applies (float32 on
            the CPU, 3x3 "convolution", C + hidden up to 2048) unless torch.use_deterministic_algorithms is on; and
            for bfloat16, and float16 without gradients, the library for AMX where that serves, whose sums are
            direct and whose gates are not rounded before they are activated.

    Returns:
        output (N,T,hidden,H,W), the hidden state of every step, and the last (h, c), each (N,hidden,H,W).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        NotImplementedError: under forward-mode differentiation.

    Differentiable to any order in x, weights, bias and state. Under autocast the op runs in autocast's dtype, like
    torch.nn.LSTM; the cell update is float32 internally. Without Winograd, x is convolved for all steps at once, and
    each step saves its activated gates and states for the backward pass. With Winograd the gates are never stored;
    the backward pass recomputes them from the states. Without gradients, the transformed or packed weights are cached
    for the lifetime of the weights, while they are unchanged. Changes that PyTorch does not count (through `.data`,
    by fused optimizers) are detected only if most of the weights change at once.

    Time O(N T H W hidden (C + hidden) kh kw) for "convolution".

    Source: Shi et al., Convolutional LSTM Network, NeurIPS 2015; variants and forget bias: Pfeuffer and Dietmayer,
    Separable Convolutional LSTMs for Faster Video Segmentation, ITSC 2019.

        >>> import torch, vosops
        >>> frames, weight = torch.randn(1, 4, 8, 15, 27), torch.randn(4 * 16, 8 + 16, 3, 3) / 10
        >>> output, (h, c) = vosops.conv_lstm(frames, weight)
        >>> output.shape, torch.equal(output[:, -1], h)
        (torch.Size([1, 4, 16, 15, 27]), True)
    """
    _checks.refuse_forward_mode("conv_lstm")
    arguments = _resolve(
        x,
        weights,
        bias,
        state,
        variant=variant,
        forget_bias=forget_bias,
        batch_first=batch_first,
        precision=precision,
    )
    implementation = backends.choose("conv_lstm", arguments.call)
    with without_autocast(x.device.type):
        output, cell = implementation.run("conv_lstm", *arguments.core)
    last = output[:, -1]
    return (output if batch_first else output.transpose(0, 1)), (last, cell)


class _Sequence(NamedTuple):
    """The checked arguments of a call: what decides who serves it, and those of the core."""

    call: backends.Call
    core: tuple[Any, ...]


def _resolve(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    variant: str = "convolution",
    forget_bias: float = 1.0,
    batch_first: bool = True,
    precision: str | None = None,
) -> _Sequence:
    """Check the public arguments and turn them into those of the core."""
    axes = ("N", "T", "C", "H", "W") if batch_first else ("T", "N", "C", "H", "W")
    _checks.check_tensor("x", x, axes)
    _checks.check_floating("x", x)
    frames = x if batch_first else x.transpose(0, 1)
    batch, steps, channels, height, width = frames.shape
    if steps == 0:
        raise ValueError("x must have at least one step, got T = 0")
    if 0 in (channels, height, width):
        raise ValueError(f"x must have at least one channel and one pixel, got {tuple(x.shape)}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if not isinstance(weights, (Tensor, Sequence)):
        raise TypeError(f"weights must be a tensor or a sequence of tensors, got {type(weights).__name__}")
    given: list[Tensor] = [weights] if isinstance(weights, Tensor) else list(weights)
    hidden_size = _check_weights(given, channels, variant)
    if bias is not None:
        _checks.check_tensor("bias", bias, (GATES * hidden_size,))
    if state is not None:
        if not isinstance(state, Sequence) or len(state) != 2:
            raise TypeError(f"state must be a pair (h, c) of tensors or None, got {_described(state)}")
        for name, value in zip(("state[0]", "state[1]"), state, strict=True):
            _checks.check_tensor(name, value, (batch, hidden_size, height, width))
    hidden: Tensor | None
    cell: Tensor | None
    hidden, cell = state if state is not None else (None, None)
    if _checks.under_autocast(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        frames, *given = (_lowered(t, low) for t in (frames, *given))
        bias, hidden, cell = (None if t is None else _lowered(t, low) for t in (bias, hidden, cell))
    names = ["bias", "state[0]", "state[1]", *(f"weights[{i}]" for i in range(len(given)))]
    for name, each in zip(names, (bias, hidden, cell, *given), strict=True):
        if each is None:
            continue
        if each.dtype != frames.dtype:
            raise TypeError(f"{name} must have the dtype of x ({frames.dtype}), got {each.dtype}")
        _checks.check_same_device(name, each, "x", x)
    winograd = _takes_winograd(precision, frames, given, variant)
    forget_bias = _checks.check_number("forget_bias", forget_bias)
    core = (frames, given, bias, hidden, cell, variant, forget_bias, winograd)
    backward = _checks.wants_gradients(frames, *given, bias, hidden, cell)
    return _Sequence(backends.Call(frames.device, frames.dtype, backward=backward), core)


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In autocast's dtype; it leaves float64 alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _check_weights(weights: list[Tensor], channels: int, variant: str) -> int:
    """Check the packed weights of a variant; the number of hidden channels."""
    if len(weights) != WEIGHTS_OF[variant]:
        raise ValueError(
            f"weights of variant {variant!r} must be {WEIGHTS_OF[variant]} tensor(s), got {len(weights)}"
        )
    axes: list[tuple[str | int, ...]] = [("4*hidden", "C+hidden", "kh", "kw")]
    if variant in ("depthwise", "separable"):
        axes = [(GATES, "C+hidden", "kh", "kw")]
    _checks.check_tensor("weights[0]", weights[0], axes[0])
    if variant == "depthwise":
        hidden_size = channels
    else:
        last = weights[-1]
        if not isinstance(last, Tensor) or last.dim() != 4 or last.shape[0] % GATES or not last.shape[0]:
            raise ValueError(f"weights[{len(weights) - 1}] must have 4*hidden rows, got {_shape(last)}")
        hidden_size = last.shape[0] // GATES
    rows, columns = GATES * hidden_size, channels + hidden_size
    expected: dict[str, list[tuple[str | int, ...]]] = {
        "convolution": [(rows, columns, "kh", "kw")],
        "spatial": [(rows, columns, "k", 1), (rows, 2 * hidden_size, 1, "k")],
        "depthwise": [(GATES, columns, "kh", "kw")],
        "separable": [(GATES, columns, "kh", "kw"), (rows, columns, 1, 1)],
    }
    for i, (weight, shape) in enumerate(zip(weights, expected[variant], strict=True)):
        _checks.check_tensor(f"weights[{i}]", weight, shape)
        if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
            raise ValueError(f"weights[{i}] must have odd kernel sizes, got {tuple(weight.shape[2:])}")
    return hidden_size


def _described(state: object) -> str:
    """Return what came in place of a pair."""
    name = type(state).__name__
    return f"{name} of length {len(state)}" if isinstance(state, Sequence) else name


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _takes_winograd(precision: str | None, x: Tensor, weights: list[Tensor], variant: str) -> bool:
    """Whether Winograd's algorithm is wanted and there is one; ValueError if it is asked for in vain."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be None, 'exact' or 'winograd', got {precision!r}")
    square = tuple(weights[0].shape[2:]) == (WINOGRAD_KERNEL, WINOGRAD_KERNEL)
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and variant == "convolution" and square
    if precision == "winograd":
        if not fits:
            raise ValueError(
                "precision='winograd' must come with float32 tensors on the CPU and a 3x3 'convolution', got "
                f"{x.dtype} on {x.device.type} and {variant!r} of {tuple(weights[0].shape[2:])}"
            )
        return True
    few = weights[0].shape[1] <= WINOGRAD_CHANNELS
    wanted = fits and few if x.dtype == torch.float32 else _fits_engine(x, weights[0], variant)
    return precision is None and wanted and not torch.are_deterministic_algorithms_enabled()


def _fits_engine(x: Tensor, weight: Tensor, variant: str) -> bool:
    """Whether the library for AMX has a kernel for the dtype and the gates."""
    square = tuple(weight.shape[2:]) == (WINOGRAD_KERNEL, WINOGRAD_KERNEL)
    half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return half and square and variant == "convolution" and _library.CPU_CAPABILITY == "amx"


# ---- The implementations: (x, weights, bias, hidden, cell, variant, forget_bias, winograd) -> (output, last cell).


def _kernels(suffix: str) -> Mapping[str, Callable[..., Any]]:
    """Return the kernel of a library: its steps, or of the compiled one Winograd's algorithm where that is wanted."""

    def conv_lstm(
        x: Tensor,
        weights: list[Tensor],
        bias: Tensor | None,
        hidden: Tensor | None,
        cell: Tensor | None,
        variant: str,
        forget_bias: float,
        winograd: bool,
    ) -> tuple[Tensor, Tensor]:
        if winograd and HAS_WINOGRAD and suffix == "":
            arguments = (x, weights[0], bias, hidden, cell, forget_bias)
            return (_winograd if x.dtype == torch.float32 else _direct)(*arguments)
        return _steps(suffix, x, weights, bias, hidden, cell, variant, forget_bias)

    return {"conv_lstm": conv_lstm}


def _wants_gradient(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def _direct(*args: Any) -> tuple[Tensor, Tensor]:
    """Call the op that saves what a derivative needs or, without gradients, the one that keeps packed weights."""
    if _wants_gradient(args):
        return _differentiable_direct(*args)
    result: tuple[Tensor, Tensor] = torch.ops.vosops.conv_lstm_direct_cached(*args)
    return result


def _differentiable_direct(*args: Any) -> tuple[Tensor, Tensor]:
    """Call the matrix engine's op in bfloat16; of float16, whose products take two pieces each, the steps."""
    if args[0].dtype != torch.bfloat16:
        return _direct_steps(*args)
    output, new_cell, _ = torch.ops.vosops.conv_lstm_direct(*args)
    return output, new_cell


def _direct_steps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    forget_bias: float,
) -> tuple[Tensor, Tensor]:
    return _steps("", x, [weight], bias, hidden, cell, "convolution", forget_bias)


def _winograd(*args: Any) -> tuple[Tensor, Tensor]:
    """Call the op that saves what a derivative needs or, without gradients, the one that keeps transformed weights."""
    if _wants_gradient(args):
        return _differentiable_winograd(*args)
    result: tuple[Tensor, Tensor] = torch.ops.vosops.conv_lstm_winograd_cached(*args)
    return result


def _differentiable_winograd(*args: Any) -> tuple[Tensor, Tensor]:
    output, cells = torch.ops.vosops.conv_lstm_winograd(*args)
    return output, cells[:, -1]


def _steps(
    suffix: str,
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    variant: str,
    forget_bias: float,
) -> tuple[Tensor, Tensor]:
    """PyTorch's convolutions and the fused kernel of the cell update.

    One step convolves [x; h] at once; of several, x is convolved for all of them in advance.
    """
    pointwise = dispatched("conv_lstm_pointwise", suffix)
    if cell is None:
        cell = x.new_zeros((x.shape[0], _hidden_channels(weights, variant), *x.shape[3:]))
    if x.shape[1] == 1 and hidden is not None and variant == "convolution":
        gates = _convolve(torch.cat([x[:, 0], hidden], 1), weights, bias, variant)
        hidden, cell, _ = pointwise(gates, None, cell, forget_bias)
        return hidden.unsqueeze(1), cell
    of_x, of_hidden = _split_weights(weights, x.shape[2], variant)
    if x.shape[1] > 1:  # cuDNN copies a slice of a weight in every step
        of_hidden = [weight.clone(memory_format=torch.preserve_format) for weight in of_hidden]
    all_gates = _convolve(x.flatten(0, 1), of_x, bias, variant).unflatten(0, tuple(x.shape[:2]))
    steps = []
    for gates in all_gates.unbind(1):
        more_gates = None if hidden is None else _convolve(hidden, of_hidden, None, variant)
        hidden, cell, _ = pointwise(gates, more_gates, cell, forget_bias)
        steps.append(hidden)
    return torch.stack(steps, 1), cell


def _hidden_channels(weights: Sequence[Tensor], variant: str) -> int:
    """Return the channels of the state."""
    return weights[0].shape[1] // 2 if variant == "depthwise" else weights[-1].shape[0] // GATES


def _split_weights(
    weights: Sequence[Tensor], input_channels: int, variant: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parts of packed weights that meet the input and the hidden state.

    The columns of a weight are [input; hidden]; those of the second one of "spatial" are [hidden; hidden].
    """
    columns = [input_channels] * len(weights)
    if variant == "spatial":
        columns[1] = weights[1].shape[1] // 2
    of_x = [weight[:, :count] for weight, count in zip(weights, columns, strict=True)]
    of_hidden = [weight[:, count:] for weight, count in zip(weights, columns, strict=True)]
    return of_x, of_hidden


def _convolve(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, variant: str) -> Tensor:
    """Return the share of x (N,C,H,W) in the gates (N,4*hidden,H,W) before activation; zero "same" padding."""
    first = weights[0]
    padding = (first.shape[2] // 2, first.shape[3] // 2)
    if variant == "convolution":
        return conv2d(x, first, bias, padding=padding)
    if variant == "spatial":
        columns = conv2d(x, first, padding=padding)
        second = weights[1]
        return conv2d(columns, second, bias, padding=(0, second.shape[3] // 2), groups=GATES)
    copies = x.unsqueeze(1).expand(-1, GATES, -1, -1, -1).flatten(1, 2)
    filters = first.reshape(-1, 1, *first.shape[2:])
    if variant == "depthwise":
        return conv2d(copies, filters, bias, padding=padding, groups=copies.shape[1])
    filtered = conv2d(copies, filters, padding=padding, groups=copies.shape[1])
    return conv2d(filtered, weights[1], bias, groups=GATES)


# ---- The registered pieces of the cell update.

POINTWISE = (
    "(Tensor gates, Tensor? more_gates, Tensor cell, float forget_bias)"
    " -> (Tensor hidden, Tensor new_cell, Tensor saved)"
)
POINTWISE_BACKWARD = (
    "(Tensor grad_hidden, Tensor grad_cell, Tensor saved, Tensor cell, Tensor new_cell)"
    " -> (Tensor grad_gates, Tensor grad_previous_cell)"
)


def _like(gates: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Empty (N,channels,H,W): channels_last where the gates are, contiguous otherwise."""
    shape = (gates.shape[0], channels, *gates.shape[2:])
    last = not gates.is_contiguous() and gates.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=gates.device, memory_format=layout)


def _fake_pointwise(
    gates: Tensor, more_gates: Tensor | None, cell: Tensor, forget_bias: float
) -> tuple[Tensor, Tensor, Tensor]:
    channels = cell.shape[1]
    hidden, new_cell = (_like(gates, channels, t.dtype) for t in (gates, cell))
    return hidden, new_cell, _like(gates, GATES * channels, gates.dtype)


def _fake_pointwise_backward(
    grad_hidden: Tensor, grad_cell: Tensor, saved: Tensor, cell: Tensor, new_cell: Tensor
) -> tuple[Tensor, Tensor]:
    return _like(saved, saved.shape[1], saved.dtype), _like(saved, cell.shape[1], cell.dtype)


def _setup_pointwise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, more_gates, cell, _ = inputs
    _, new_cell, saved = output
    ctx.has_more_gates = more_gates is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(saved, cell, new_cell)


def _backward_pointwise_by(suffix: str) -> Callable[..., Any]:
    def backward(
        ctx: Any, grad_hidden: Tensor | None, grad_cell: Tensor | None, grad_saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved, cell, new_cell = ctx.saved_tensors
        grad_hidden = torch.zeros_like(cell, dtype=saved.dtype) if grad_hidden is None else grad_hidden
        grad_cell = torch.zeros_like(cell) if grad_cell is None else grad_cell
        grad_gates, grad_previous = dispatched("conv_lstm_pointwise_backward", suffix)(
            grad_hidden, grad_cell, saved, cell, new_cell
        )
        if grad_saved is not None:  # only a second derivative asks for it
            i, f, g, o = saved.chunk(GATES, 1)
            slopes = torch.cat([i * (1 - i), f * (1 - f), 1 - g.square(), o * (1 - o)], 1)
            grad_gates = grad_gates + grad_saved * slopes
        return grad_gates, grad_gates if ctx.has_more_gates else None, grad_previous, None

    return backward


def _pointwise_gradients(
    grad_hidden: Tensor, grad_cell: Tensor, saved: Tensor, cell: Tensor, new_cell: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what conv_lstm_pointwise_backward computes, in differentiable PyTorch."""
    wide = torch.promote_types(saved.dtype, torch.float32)
    i, f, g, o = saved.to(wide).chunk(GATES, 1)
    grad, squashed = grad_hidden.to(wide), new_cell.to(wide).tanh()
    flow = grad_cell.to(wide) + grad * o * (1 - squashed.square())
    slopes = torch.cat([i * (1 - i), f * (1 - f), 1 - g.square(), o * (1 - o)], 1)
    before = torch.cat([flow * g, flow * cell.to(wide), flow * i, grad * squashed], 1)
    return (before * slopes).to(saved.dtype), (flow * f).to(cell.dtype)


register_pieces(
    {
        "conv_lstm_pointwise": Piece(
            _fake_pointwise, _backward_pointwise_by, _setup_pointwise, schema=POINTWISE
        ),
        "conv_lstm_pointwise_backward": Piece(
            _fake_pointwise_backward,
            lambda _: derivative_of(_pointwise_gradients, 5),
            setup_saving_inputs,
            schema=POINTWISE_BACKWARD,
        ),
    },
    "conv_lstm",
)
HAS_POINTWISE = has_kernel("conv_lstm_pointwise", "CPU")


# ---- The registered pieces of Winograd's algorithm and of the matrix engine, which the CPU library has.


def _fake_winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    forget_bias: float,
) -> tuple[Tensor, Tensor]:
    n, t, _, h, w = x.shape
    shape = (n, t, weight.shape[0] // GATES, h, w)
    return x.new_empty(shape), x.new_empty(shape)


def _fake_winograd_backward(
    grad_output: Tensor,
    grad_cells: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    forget_bias: float,
    output: Tensor,
    cells: Tensor,
) -> tuple[Tensor, ...]:
    n, _, c, h, w = output.shape
    states = (x.new_empty((n, c, h, w)) for _ in range(2))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(weight.shape[0]), *states


def _setup_winograd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.forget_bias = inputs[-1]
    ctx.save_for_backward(*inputs[:-1], *output)


def _backward_winograd(ctx: Any, grad_output: Tensor, grad_cells: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, hidden, cell, output, cells = ctx.saved_tensors
    grads = torch.ops.vosops.conv_lstm_winograd_backward(
        grad_output, grad_cells, x, weight, bias, hidden, cell, ctx.forget_bias, output, cells
    )
    return _of_given((x, weight, bias, hidden, cell), grads)


def _of_given(given: Sequence[Tensor | None], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensors that were given, and None for the others and the forget bias."""
    return *(None if t is None else grad for t, grad in zip(given, grads, strict=True)), None


def _fake_direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    forget_bias: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n, t, _, h, w = x.shape
    channels = weight.shape[0] // GATES
    saved = x.new_empty((n, t, _saved_size(channels, h, w)))
    return x.new_empty((n, t, channels, h, w)), x.new_empty((n, channels, h, w)), saved


def _backward_direct(
    ctx: Any, grad_output: Tensor, grad_cell: Tensor, _grad_saved: Tensor
) -> tuple[Tensor | None, ...]:
    """Nothing but this formula reads what was saved: its gradient is zero."""
    *given, output, _, saved = ctx.saved_tensors
    grads = torch.ops.vosops.conv_lstm_direct_backward(
        grad_output, grad_cell, *given, ctx.forget_bias, output, saved
    )
    return _of_given(given, grads)


def _direct_gradients(grad_output: Tensor, grad_cell: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """Return what conv_lstm_direct_backward computes, in differentiable PyTorch."""
    output = rest[-2]
    earlier = torch.zeros_like(output[:, 1:])
    return _winograd_gradients(grad_output, torch.cat([earlier, grad_cell.unsqueeze(1)], 1), *rest)


def _winograd_gradients(
    grad_output: Tensor,
    grad_cells: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    forget_bias: float,
    output: Tensor,
    cells: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return what conv_lstm_winograd_backward computes, in differentiable PyTorch."""
    given = (x, weight, bias, hidden, cell)
    leaves = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in given]
    x, weight, bias, hidden, cell = leaves  # type: ignore[assignment]
    of_x, of_hidden = _split_weights([weight], x.shape[2], "convolution")
    zeros = torch.zeros_like(output[:, 0])
    hidden, cell = (zeros if state is None else state for state in (hidden, cell))
    loss = zeros.sum()
    for t, frame in enumerate(x.unbind(1)):
        gates = _convolve(frame, of_x, bias, "convolution") + _convolve(
            hidden, of_hidden, None, "convolution"
        )
        i, f, g, o = gates.chunk(GATES, 1)
        cell = (f + forget_bias).sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        loss = loss + (hidden * grad_output[:, t]).sum() + (cell * grad_cells[:, t]).sum()
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(loss, wanted, create_graph=True))
    return tuple(None if leaf is None else next(found) for leaf in leaves)


# Weight -> (its address, its version), a sample of it, its transform.
_packed: Any = WeakTensorKeyDictionary()


def _sample(weight: Tensor) -> Tensor:
    """Return some entries of every part: fused optimizers and `.data` change weights without a new version."""
    last = weight.is_contiguous(memory_format=torch.channels_last)
    rows = weight.detach().permute(0, 2, 3, 1) if last else weight.detach()  # a view where flattened
    return rows.flatten()[:: weight.numel() // SAMPLED_WEIGHTS + 1].clone()


def _winograd_cached(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    forget_bias: float,
) -> tuple[Tensor, Tensor]:
    """Without derivative: the transformed weights are kept."""
    packed = _kept(weight, torch.ops.vosops.conv_lstm_winograd_pack)
    result: tuple[Tensor, Tensor] = torch.ops.vosops.conv_lstm_winograd_packed(
        x, packed, bias, hidden, cell, forget_bias, weight.shape[0] // GATES
    )
    return result


def _direct_cached(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    forget_bias: float,
) -> tuple[Tensor, Tensor]:
    """Without derivative: the weights are kept in tiles. What the matrix engine cannot do is left to the steps."""
    packed = _kept(weight, torch.ops.vosops.conv_lstm_direct_pack)
    output, new_cell = torch.ops.vosops.conv_lstm_direct_packed(
        x, weight, packed, bias, hidden, cell, forget_bias
    )
    if output.shape[0] == x.shape[0]:
        return output, new_cell
    output, new_cell = _direct_steps(x, weight, bias, hidden, cell, forget_bias)
    return output.contiguous(), new_cell.contiguous()


def _direct_saving(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    forget_bias: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all hidden states, the last cell, and what `_direct_backward` needs of every step.

    What the matrix engine cannot do is left to PyTorch's convolutions, which save plain gates and cells.
    """
    states: tuple[Tensor, Tensor, Tensor] = torch.ops.vosops.conv_lstm_direct_states(
        x, weight, bias, hidden, cell, forget_bias
    )
    if states[1].numel() > 0:
        return states
    channels = weight.shape[0] // GATES
    of_x, of_hidden = _split_weights([weight], x.shape[2], "convolution")
    cell = x.new_zeros((x.shape[0], channels, *x.shape[3:])) if cell is None else cell
    output, saved = [], []
    for frame in x.unbind(1):
        gates = _convolve(frame, of_x, bias, "convolution")
        more_gates = None if hidden is None else _convolve(hidden, of_hidden, None, "convolution")
        hidden, cell, active = torch.ops.vosops.conv_lstm_pointwise(gates, more_gates, cell, forget_bias)
        output.append(hidden)
        saved.append(torch.cat([active.flatten(1), cell.flatten(1)], 1))
    plain = torch.stack(saved, 1)
    room = _saved_size(channels, x.shape[3], x.shape[4]) - plain.shape[2]
    return torch.stack(output, 1), cell.contiguous(), torch.nn.functional.pad(plain, (0, room))


def _saved_size(hidden: int, height: int, width: int) -> int:
    """Return how many numbers of a step are saved: csrc/cpu/conv_lstm_amx.h has their places."""
    panels, groups = (hidden + 15) // 16, (height * (width + 1) - 1 + 31) // 32
    return panels * groups * 2 * (GATES + 1) * 16 * 16


def _direct_backward(
    grad_output: Tensor,
    grad_cell: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    forget_bias: float,
    output: Tensor,
    saved: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients from what `_direct_saving` saved."""
    grads: tuple[Tensor, ...] = torch.ops.vosops.conv_lstm_direct_gradients(
        grad_output, grad_cell, x, weight, hidden, cell, output, saved
    )
    if grads[1].shape == weight.shape:
        return grads
    n, steps, channels, h, w = output.shape
    plain = saved[:, :, : (GATES + 1) * channels * h * w].unflatten(2, (-1, h, w))
    gates, cells = plain[:, :, : GATES * channels], plain[:, :, GATES * channels :]
    zeros = output.new_zeros((n, channels, h, w))
    of_hidden, of_cell = zeros, grad_cell
    of_weight, of_bias = torch.zeros_like(weight), weight.new_zeros(len(weight))
    of_x = []
    for t in reversed(range(steps)):
        before = cells[:, t - 1] if t else zeros if cell is None else cell
        state = output[:, t - 1] if t else zeros if hidden is None else hidden
        of_gates, of_cell = torch.ops.vosops.conv_lstm_pointwise_backward(
            grad_output[:, t] + of_hidden, of_cell, gates[:, t], before, cells[:, t]
        )
        of_input, of_filter, of_constant = torch.ops.aten.convolution_backward(
            of_gates,
            torch.cat([x[:, t], state], 1),
            weight,
            [len(weight)],
            (1, 1),
            (1, 1),
            (1, 1),
            False,
            (0, 0),
            1,
            (True, True, True),
        )
        of_x.append(of_input[:, : x.shape[2]])
        of_hidden = of_input[:, x.shape[2] :]
        of_weight, of_bias = of_weight + of_filter, of_bias + of_constant
    return torch.stack(of_x[::-1], 1), of_weight, of_bias, of_hidden.contiguous(), of_cell


def _kept(weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what `pack` makes of a weight, which is kept until the weight changes or dies."""
    packed: Tensor | None = None
    tracked = not weight.is_inference()  # a tensor of inference mode has no version
    if tracked:
        state = (weight.data_ptr(), weight._version, weight.shape, weight.stride())
        sample = _sample(weight)
        kept, kept_sample, packed = _packed.get(weight, (None, None, None))
        if kept != state or not torch.equal(kept_sample, sample):
            packed = None
    if packed is None:
        packed = pack(weight)
        if tracked:
            _packed[weight] = (state, sample, packed)
    return packed


def _fake_winograd_cached(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, t, _, h, w = x.shape
    channels = weight.shape[0] // GATES
    return x.new_empty((n, t, channels, h, w)), x.new_empty((n, channels, h, w))


def _looping(name: str) -> Callable[[str], Callable[..., Any]]:
    return lambda suffix: looping_vmap(dispatched(name, suffix))


HAS_WINOGRAD = has_kernel("conv_lstm_winograd", "CPU")
if HAS_WINOGRAD:
    for _name, _kernel in (("winograd", _winograd_cached), ("direct", _direct_cached)):
        define(
            f"conv_lstm_{_name}_cached",
            "(Tensor x, Tensor weight, Tensor? bias, Tensor? hidden, Tensor? cell, float forget_bias)"
            " -> (Tensor output, Tensor new_cell)",
            _kernel,
            "CPU",
        )
    define(
        "conv_lstm_direct",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? hidden, Tensor? cell, float forget_bias)"
        " -> (Tensor output, Tensor new_cell, Tensor saved)",
        _direct_saving,
        "CPU",
    )
    define(
        "conv_lstm_direct_backward",
        "(Tensor grad_output, Tensor grad_cell, Tensor x, Tensor weight, Tensor? bias, Tensor? hidden, Tensor? cell,"
        " float forget_bias, Tensor output, Tensor saved)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_hidden, Tensor grad_previous_cell)",
        _direct_backward,
        "CPU",
    )
register_pieces(
    {
        "conv_lstm_direct": Piece(
            _fake_direct, lambda _: _backward_direct, _setup_winograd, _looping("conv_lstm_direct")
        ),
        "conv_lstm_direct_backward": Piece(
            _fake_winograd_backward,
            lambda _: derivative_of(_direct_gradients, 7),
            setup_saving_inputs,
            _looping("conv_lstm_direct_backward"),
        ),
        "conv_lstm_winograd": Piece(
            _fake_winograd, lambda _: _backward_winograd, _setup_winograd, _looping("conv_lstm_winograd")
        ),
        "conv_lstm_winograd_backward": Piece(
            _fake_winograd_backward,
            lambda _: derivative_of(_winograd_gradients, 7),
            setup_saving_inputs,
            _looping("conv_lstm_winograd_backward"),
        ),
        "conv_lstm_winograd_cached": Piece(
            _fake_winograd_cached,
            # For a program that was exported without gradients and is differentiated after all.
            lambda _: derivative_of(_differentiable_winograd, 5),
            setup_saving_inputs,
            # Only under vmap's wrappers it is seen whether a derivative is wanted.
            lambda _: looping_vmap(_winograd),
        ),
        "conv_lstm_direct_cached": Piece(
            _fake_winograd_cached,
            lambda _: derivative_of(_differentiable_direct, 5),
            setup_saving_inputs,
            lambda _: looping_vmap(_direct),
        ),
    }
)

register_op(
    "conv_lstm",
    resolve={"conv_lstm": _resolve},
    reference={"conv_lstm": without_argument(-1, conv_lstm_core)},
    kernels=_kernels,
    needs=["conv_lstm_pointwise"],
)
