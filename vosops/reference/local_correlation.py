"""Local correlation in plain PyTorch: products of whole maps, a shift for each displacement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Pair = int | Sequence[int]


def _both(value: Pair) -> tuple[int, int]:
    y, x = (value, value) if isinstance(value, int) else value
    return y, x


def _outputs(size: int, first: int, step: int, shift: int, count: int) -> tuple[int, int]:
    """Return the outputs o, from and to, whose pixels first + o * step and first + o * step + shift both exist."""
    begin, end = max(0, -shift) - first, min(size, size - shift) - first
    start = min(count, max(0, -(-begin // step)))
    return start, max(start, min(count, -(-end // step)))


def _products(
    query: Tensor,
    key: Tensor,
    first: Sequence[int],
    step: Sequence[int],
    shift: Sequence[int],
    counts: Sequence[int],
) -> Tensor:
    """query[u] . key[u + shift] at the pixels u = first + o * step, 0 where either does not exist: (N,*counts)."""
    here, there, margins = [], [], []
    for axis in (0, 1):
        begin, end = _outputs(query.shape[2 + axis], first[axis], step[axis], shift[axis], counts[axis])
        at, stop = first[axis] + begin * step[axis], first[axis] + (end - 1) * step[axis] + 1
        empty = end == begin
        here.append(slice(0, 0) if empty else slice(at, stop, step[axis]))
        there.append(slice(0, 0) if empty else slice(at + shift[axis], stop + shift[axis], step[axis]))
        margins.append((begin, counts[axis] - end))
    products = (query[:, :, here[0], here[1]] * key[:, :, there[0], there[1]]).sum(1)
    return functional.pad(products, [*margins[1], *margins[0]])


def local_correlation_core(
    query: Tensor,
    key: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation_patch: Sequence[int],
) -> Tensor:
    """Return the correlation of a kernel of one pixel, (N,PH,PW,oH,oW) in the dtype of query (N,C,H,W)."""
    return local_correlation(
        query, key, patch_size=patch_size, stride=stride, padding=padding, dilation_patch=dilation_patch
    )


def local_correlation(
    query: Tensor,
    key: Tensor,
    *,
    kernel_size: Pair = 1,
    patch_size: Pair = 1,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    dilation_patch: Pair = 1,
) -> Tensor:
    """See :func:`vosops.local_correlation`; a product of maps for each displacement and pixel of the kernel."""
    kernel, patch, step, pad, spread, shift = map(
        _both, (kernel_size, patch_size, stride, padding, dilation, dilation_patch)
    )
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(wide), key.to(wide)
    counts = [(q.shape[2 + a] + 2 * pad[a] - (kernel[a] - 1) * spread[a] - 1) // step[a] + 1 for a in (0, 1)]
    planes = []
    for p in range(patch[0]):
        for r in range(patch[1]):
            offset = [(p - (patch[0] - 1) // 2) * shift[0], (r - (patch[1] - 1) // 2) * shift[1]]
            plane = q.new_zeros(q.shape[0], *counts)
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    first = [i * spread[0] - pad[0], j * spread[1] - pad[1]]
                    plane = plane + _products(q, k, first, step, offset, counts)
            planes.append(plane)
    out: Tensor = torch.stack(planes, 1).unflatten(1, patch).to(query.dtype)
    return out
