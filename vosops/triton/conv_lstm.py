"""The convolutional LSTM's cell update, forward and backward, each in one kernel.

A dense map is, for each outer index, blocks of ``inner`` adjacent entries, four of the gates and one of the cell: in
contiguous memory the outer index is n and a block C*H*W long, in channels_last it is a pixel and a block C long. A
program owns a piece of the cell's entries and reads and writes each tensor once; the memory's rate bounds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import SUPPORTED_DTYPES, compile_options, launch_on

GATES = 4
BLOCK = 1024
"""Entries of the cell that a program owns."""

SMALL = tl.constexpr(0.2)
"""Below it the hyperbolic tangent is a polynomial, whose relative error is then below 1e-8."""


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent in float32."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    s = x * x
    small = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < SMALL, small, tl.where(x < 0.0, -large, large))


@triton.jit
def places(pieces, outer, inner, BLOCK: tl.constexpr):
    """n, the places of a program's entries in a cell and in gates of batch element n, and which entries exist."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    at = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return n, at, at // inner * (4 * inner) + at % inner, at < outer * inner


@triton.jit
def _forward(
    gates,
    more_gates,
    cell,
    hidden,
    new_cell,
    saved,
    gates_n,
    more_gates_n,
    cell_n,
    forget_bias,
    pieces,
    outer,
    inner,
    BLOCK: tl.constexpr,
):
    """Grid (pieces * N); the outputs' batch elements follow each other."""
    n, at, first, inside = places(pieces, outer, inner, BLOCK)
    i = tl.load(gates + n * gates_n + first, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(gates + n * gates_n + first + inner, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gates + n * gates_n + first + 2 * inner, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(gates + n * gates_n + first + 3 * inner, mask=inside, other=0.0).to(tl.float32)
    if more_gates is not None:
        more = more_gates + n * more_gates_n + first
        i += tl.load(more, mask=inside, other=0.0).to(tl.float32)
        f += tl.load(more + inner, mask=inside, other=0.0).to(tl.float32)
        g += tl.load(more + 2 * inner, mask=inside, other=0.0).to(tl.float32)
        o += tl.load(more + 3 * inner, mask=inside, other=0.0).to(tl.float32)
    i = tl.sigmoid(i)
    f = tl.sigmoid(f + forget_bias)
    g = tanh(g)
    o = tl.sigmoid(o)
    c = f * tl.load(cell + n * cell_n + at, mask=inside, other=0.0).to(tl.float32) + i * g
    own = n * (outer * inner)
    tl.store(new_cell + own + at, c.to(new_cell.dtype.element_ty), mask=inside)
    tl.store(hidden + own + at, (o * tanh(c)).to(hidden.dtype.element_ty), mask=inside)
    to = saved + 4 * own + first
    tl.store(to, i.to(saved.dtype.element_ty), mask=inside)
    tl.store(to + inner, f.to(saved.dtype.element_ty), mask=inside)
    tl.store(to + 2 * inner, g.to(saved.dtype.element_ty), mask=inside)
    tl.store(to + 3 * inner, o.to(saved.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_hidden,
    grad_cell,
    saved,
    cell,
    new_cell,
    grad_gates,
    grad_previous,
    grad_hidden_n,
    grad_cell_n,
    saved_n,
    cell_n,
    new_cell_n,
    pieces,
    outer,
    inner,
    BLOCK: tl.constexpr,
):
    """Grid (pieces * N); the outputs' batch elements follow each other."""
    n, at, first, inside = places(pieces, outer, inner, BLOCK)
    i = tl.load(saved + n * saved_n + first, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(saved + n * saved_n + first + inner, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(saved + n * saved_n + first + 2 * inner, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(saved + n * saved_n + first + 3 * inner, mask=inside, other=0.0).to(tl.float32)
    squashed = tanh(tl.load(new_cell + n * new_cell_n + at, mask=inside, other=0.0).to(tl.float32))
    of_hidden = tl.load(grad_hidden + n * grad_hidden_n + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(grad_cell + n * grad_cell_n + at, mask=inside, other=0.0).to(tl.float32)
    total += of_hidden * o * (1.0 - squashed * squashed)
    before = tl.load(cell + n * cell_n + at, mask=inside, other=0.0).to(tl.float32)
    own = n * (outer * inner)
    tl.store(grad_previous + own + at, (total * f).to(grad_previous.dtype.element_ty), mask=inside)
    to = grad_gates + 4 * own + first
    tl.store(to, (total * g * i * (1.0 - i)).to(grad_gates.dtype.element_ty), mask=inside)
    tl.store(to + inner, (total * before * f * (1.0 - f)).to(grad_gates.dtype.element_ty), mask=inside)
    tl.store(to + 2 * inner, (total * i * (1.0 - g * g)).to(grad_gates.dtype.element_ty), mask=inside)
    tl.store(
        to + 3 * inner, (of_hidden * squashed * o * (1.0 - o)).to(grad_gates.dtype.element_ty), mask=inside
    )


def conv_lstm_pointwise(
    gates: Tensor, more_gates: Tensor | None, cell: Tensor, forget_bias: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, new cell, activated gates) of gates (N,4C,H,W) before activation and a cell (N,C,H,W)."""
    _check(gates, cell)
    layout, sizes = _sizes(gates, cell)
    hidden, new_cell = (_empty(cell, t.dtype, layout) for t in (gates, cell))
    saved = _empty(gates, gates.dtype, layout)
    if cell.numel() == 0:
        return hidden, new_cell, saved
    gates, cell = _dense(gates, layout), _dense(cell, layout)
    more = None if more_gates is None else _dense(more_gates, layout)
    strides = gates.stride(0), 0 if more is None else more.stride(0), cell.stride(0)
    with launch_on(gates):
        _forward[(sizes[0] * cell.shape[0],)](
            *(gates, more, cell, hidden, new_cell, saved, *strides, forget_bias, *sizes),
            BLOCK=BLOCK,
            **compile_options(4),
        )
    return hidden, new_cell, saved


def conv_lstm_pointwise_backward(
    grad_hidden: Tensor, grad_cell: Tensor, saved: Tensor, cell: Tensor, new_cell: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the gates before activation and of the previous cell."""
    _check(saved, cell)
    layout, sizes = _sizes(saved, cell)
    grad_gates, grad_previous = (_empty(t, t.dtype, layout) for t in (saved, cell))
    if cell.numel() == 0:
        return grad_gates, grad_previous
    given = [_dense(t, layout) for t in (grad_hidden, grad_cell, saved, cell, new_cell)]
    with launch_on(saved):
        _backward[(sizes[0] * cell.shape[0],)](
            *(*given, grad_gates, grad_previous, *(t.stride(0) for t in given), *sizes),
            BLOCK=BLOCK,
            **compile_options(4),
        )
    return grad_gates, grad_previous


def _check(gates: Tensor, cell: Tensor) -> None:
    if gates.dtype not in SUPPORTED_DTYPES or cell.dtype not in (gates.dtype, torch.float32):
        raise TypeError(
            "gates must be float32, float16 or bfloat16 for the Triton kernels, and cell of that dtype or float32, "
            f"got {gates.dtype} and {cell.dtype}"
        )


def _sizes(gates: Tensor, cell: Tensor) -> tuple[torch.memory_format, tuple[int, int, int]]:
    """Return the memory format of all results, and a batch element's pieces, outer indices and adjacent entries."""
    channels, pixels = cell.shape[1], cell.shape[2] * cell.shape[3]
    last = not gates.is_contiguous() and gates.is_contiguous(memory_format=torch.channels_last)
    outer, inner = (pixels, channels) if last else (1, channels * pixels)
    layout = torch.channels_last if last else torch.contiguous_format
    return layout, (triton.cdiv(outer * inner, BLOCK), outer, inner)


def _empty(like: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device, memory_format=layout)


def _dense(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Return the map itself where each batch element is dense in the layout, otherwise a copy."""
    if tensor[:1].is_contiguous(memory_format=layout):
        return tensor
    return tensor.contiguous(memory_format=layout)
