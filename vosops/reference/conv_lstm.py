"""The convolutional LSTM in plain PyTorch: one step after the other, a convolution of input and state each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

VARIANTS = ("convolution", "spatial", "depthwise", "separable")
GATES = 4  # input, forget, new input, output


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
    """Return the op of the same name; `precision` changes nothing here."""
    matrices = [weights] if isinstance(weights, Tensor) else list(weights)
    frames = x if batch_first else x.transpose(0, 1)
    hidden, cell = state if state is not None else (None, None)
    output, cell = conv_lstm_core(frames, matrices, bias, hidden, cell, variant, forget_bias)
    last = output[:, -1]
    return (output if batch_first else output.transpose(0, 1)), (last, cell)


def conv_lstm_core(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    variant: str,
    forget_bias: float,
) -> tuple[Tensor, Tensor]:
    """x (N,T,C,H,W), states (N,hidden,H,W) or None for zeros -> every hidden state (N,T,hidden,H,W), the last cell."""
    hidden_size = weights[0].shape[1] // 2 if variant == "depthwise" else weights[-1].shape[0] // GATES
    zeros = x.new_zeros((x.shape[0], hidden_size, *x.shape[3:]))
    hidden = zeros if hidden is None else hidden
    cell = zeros if cell is None else cell
    steps = []
    for frame in x.unbind(1):
        gates = conv_lstm_gates(frame, hidden, weights, bias, variant)
        hidden, cell, _ = conv_lstm_pointwise_core(gates, None, cell, forget_bias)
        steps.append(hidden)
    return torch.stack(steps, 1), cell


def conv_lstm_gates(
    x: Tensor, hidden: Tensor, weights: Sequence[Tensor], bias: Tensor | None, variant: str
) -> Tensor:
    """Return the gates (N,4*hidden,H,W) before activation of x (N,C,H,W) and hidden (N,hidden,H,W), zero-padded."""
    both = torch.cat([x, hidden], 1)
    first, last = weights[0], weights[-1]
    padding = (first.shape[2] // 2, first.shape[3] // 2)
    if variant == "convolution":
        return conv2d(both, first, bias, padding=padding)
    gates = []
    for gate, share in enumerate([None] * GATES if bias is None else bias.chunk(GATES)):
        if variant == "spatial":
            of_gate = first.chunk(GATES)[gate]
            channels = x.shape[1]
            columns = [conv2d(x, of_gate[:, :channels], padding=padding)]
            columns.append(conv2d(hidden, of_gate[:, channels:], padding=padding))
            along = (0, last.shape[3] // 2)
            gates.append(conv2d(torch.cat(columns, 1), last.chunk(GATES)[gate], share, padding=along))
            continue
        filtered = conv2d(both, first[gate].unsqueeze(1), padding=padding, groups=both.shape[1])
        if variant == "separable":
            gates.append(conv2d(filtered, last.chunk(GATES)[gate], share))
        else:
            total = filtered[:, : x.shape[1]] + filtered[:, x.shape[1] :]
            gates.append(total if share is None else total + share[:, None, None])
    return torch.cat(gates, 1)


def conv_lstm_pointwise_core(
    gates: Tensor, more_gates: Tensor | None, cell: Tensor, forget_bias: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden state, new cell and activated gates i, f, g, o after the convolution, in float32 at least."""
    wide = torch.float64 if gates.dtype == torch.float64 else torch.float32
    total = gates.to(wide) if more_gates is None else gates.to(wide) + more_gates.to(wide)
    i, f, g, o = total.chunk(GATES, 1)
    i, f, g, o = i.sigmoid(), (f + forget_bias).sigmoid(), g.tanh(), o.sigmoid()
    new_cell = f * cell.to(wide) + i * g
    hidden = o * new_cell.tanh()
    return hidden.to(gates.dtype), new_cell.to(cell.dtype), torch.cat([i, f, g, o], 1).to(gates.dtype)


def conv_lstm_pointwise_backward_core(
    grad_hidden: Tensor, grad_cell: Tensor, saved: Tensor, cell: Tensor, new_cell: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of the gates before activation, gradient of the previous cell)."""
    wide = torch.float64 if saved.dtype == torch.float64 else torch.float32
    i, f, g, o = saved.to(wide).chunk(GATES, 1)
    squashed = new_cell.to(wide).tanh()
    grad = grad_hidden.to(wide)
    total = grad_cell.to(wide) + grad * o * (1 - squashed.square())
    grads = [
        total * g * i * (1 - i),
        total * cell.to(wide) * f * (1 - f),
        total * i * (1 - g.square()),
        grad * squashed * o * (1 - o),
    ]
    return torch.cat(grads, 1).to(saved.dtype), (total * f).to(cell.dtype)
