"""Contenders and cases of local_matching.

The formulations are reimplementations of code in use: a loop over the window's offsets
and an unfold as in CFBI, a running minimum, and a product of tiles with their surroundings. They take one
frame (N = 1).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import vosops
from vosops.benchmarking.cases import Benchmark, Case, Inputs, Variant, matching_work

FAR = 5e4
"""The distance of what is not there, as CFBI pads with."""

TILE = 16
MB = 1e6


def fused(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Return the op of this package."""
    result = vosops.local_matching(query, key, mask, radius=radius)
    assert isinstance(result, Tensor)
    return result


def fused_by_one_thread(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Return the op of this package on one thread, whatever the setting."""
    with one_thread():
        return fused(query, key, mask, radius)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for PyTorch's operators within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def normalise(distance: Tensor) -> Tensor:
    """FEELVOS' normalisation, with its exponent kept from overflowing; exactly 1 where nothing was found."""
    return torch.where(distance > FAR / 2, 1.0, 1 - 2 / (1 + torch.exp(distance.clamp(max=80))))


def loop(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """CFBI's memory-saving loop: every offset's distances, stacked, then one masked minimum per object."""
    _, _, height, width = query.shape
    objects, window = mask.shape[1], 2 * radius + 1
    q = query[0].permute(1, 2, 0).contiguous()
    k = F.pad(key[0].permute(1, 2, 0), (0, 0, *(radius,) * 4))
    distances = [
        (q - k[dy : dy + height, dx : dx + width]).pow(2).sum(2)
        for dy in range(window)
        for dx in range(window)
    ]
    return _masked_minimum(torch.stack(distances, 2), mask, radius, objects)


def unfold(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """CFBI's parallel path: the whole window of every pixel unfolded, then a batched product."""
    _, channels, height, width = query.shape
    objects = mask.shape[1]
    query_norm = query.pow(2).sum(1).view(height, width, 1)
    key_norm = key.pow(2).sum(1, keepdim=True)
    windows = F.unfold(F.pad(key, (radius,) * 4), (height, width)).view(channels, height * width, -1)
    norms = F.unfold(F.pad(key_norm, (radius,) * 4, value=FAR), (height, width)).view(height, width, -1)
    products = query.view(channels, height * width, 1).permute(1, 2, 0) @ windows.permute(1, 0, 2)
    distance = query_norm + norms - 2 * products.view(height, width, -1)
    return _masked_minimum(distance, mask, radius, objects)


def _masked_minimum(distance: Tensor, mask: Tensor, radius: int, objects: int) -> Tensor:
    """Return the least distance (H,W,offsets) of each object's offsets -> normalised (1,O,H,W)."""
    height, width, _ = distance.shape
    padded = F.pad(mask.to(distance.dtype).permute(1, 0, 2, 3), (radius,) * 4)
    allowed = F.unfold(padded, (height, width)).view(objects, height, width, -1).permute(1, 2, 3, 0) > 0.9
    every = distance.unsqueeze(-1).expand(-1, -1, -1, objects)
    nearest = (
        torch.where(allowed, every, torch.tensor(FAR, dtype=every.dtype, device=every.device)).min(2).values
    )
    return normalise(nearest.permute(2, 0, 1)[None].float())


def running_minimum(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Well-written PyTorch: one shifted product after the other, and a running minimum."""
    _, _, height, width = query.shape
    k = F.pad(key, (radius,) * 4)
    key_norm = F.pad(key.pow(2).sum(1, keepdim=True), (radius,) * 4, value=FAR)
    penalty = F.pad((~mask).to(key.dtype) * FAR, (radius,) * 4, value=FAR)
    nearest = torch.full((1, 1, 1, 1), FAR, dtype=key.dtype, device=key.device).expand_as(mask)
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            there = (..., slice(dy, dy + height), slice(dx, dx + width))
            distance = key_norm[there] - 2 * (query * k[there]).sum(1, keepdim=True)
            nearest = torch.minimum(nearest, distance + penalty[there])
    return normalise((nearest + query.pow(2).sum(1, keepdim=True)).float())


def windowed(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Return the running minimum as one expression over a strided view of the windows, for torch.compile to fuse."""
    _, channels, height, width = query.shape
    objects, window = mask.shape[1], 2 * radius + 1
    k = F.pad(key[0], (radius,) * 4)
    key_norm = F.pad(key[0].pow(2).sum(0), (radius,) * 4)
    allowed = F.pad(mask[0], (radius,) * 4)
    rows, columns = height + 2 * radius, width + 2 * radius
    offsets = (window, window, height, width)
    strides = (columns, 1, columns, 1)
    keys = k.as_strided((channels, *offsets), (rows * columns, *strides))
    inside = allowed.as_strided((objects, *offsets), (rows * columns, *strides))
    distance = key_norm.as_strided(offsets, strides) - 2 * (query[0][:, None, None] * keys).sum(0)
    nearest = torch.where(inside, distance[None], FAR).amin((1, 2))
    return normalise((nearest + query[0].pow(2).sum(0))[None].float())


@functools.cache
def _compiled_windowed() -> Any:
    return torch.compile(windowed, dynamic=False)


def compiled(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """`windowed`, compiled."""
    result: Tensor = _compiled_windowed()(query, key, mask, radius)
    return result


def tiled(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Return the best PyTorch that we know: for each tile of pixels one matrix product with all that surrounds it."""
    _, channels, height, width = query.shape
    objects = mask.shape[1]
    down, right = -height % TILE, -width % TILE
    rows, columns, side = (height + down) // TILE, (width + right) // TILE, TILE + 2 * radius
    q = F.pad(query, (0, right, 0, down))[0].view(channels, rows, TILE, columns, TILE)
    q = q.permute(1, 3, 2, 4, 0).reshape(rows * columns, TILE * TILE, channels)
    around = (radius, radius + right, radius, radius + down)
    k = F.pad(key, around)[0]
    key_norm = F.pad(key.pow(2).sum(1), around)[0]
    penalty = F.pad((~mask[0]).to(key.dtype) * FAR, around, value=FAR)
    within = torch.arange(side, device=key.device) - torch.arange(TILE, device=key.device)[:, None]
    within = (within >= 0) & (within <= 2 * radius)
    window = torch.where(within[:, None, :, None] & within[None, :, None, :], 0.0, FAR).to(key.dtype)
    window = window.reshape(TILE * TILE, side * side)
    tiles = query.new_empty(rows * columns, objects, TILE * TILE)
    for tile in range(rows * columns):
        y, x = tile // columns * TILE, tile % columns * TILE
        there = (..., slice(y, y + side), slice(x, x + side))
        keys = k[there].reshape(channels, side * side)
        distance = torch.addmm(window + key_norm[there].reshape(1, -1), q[tile], keys, alpha=-2)
        for o in range(objects):
            tiles[tile, o] = (distance + penalty[o][there].reshape(1, -1)).amin(1)
    nearest = tiles.view(rows, columns, objects, TILE, TILE).permute(2, 0, 3, 1, 4)
    nearest = nearest.reshape(1, objects, height + down, width + right)[..., :height, :width]
    return normalise((nearest + query.pow(2).sum(1, keepdim=True)).float())


def flops(inputs: Inputs) -> float:
    """Operations that matter: two per channel for each pixel of an object and each query that sees it."""
    radius = inputs.radius
    _, channels, height, width = inputs.query.shape
    seen_rows, seen_columns = (
        torch.minimum(at + radius, torch.tensor(size - 1)) - (at - radius).clamp(min=0) + 1
        for size in (height, width)
        for at in [torch.arange(size)]
    )
    pairs = (seen_rows[:, None] * seen_columns)[inputs.mask[0].any(0).cpu()].sum()
    return 2.0 * channels * float(pairs)


_UNFOLD_480P = "needs 9.9 GB for the unfolded windows alone"
_SLOW = "takes a minute a call"

BENCHMARK = Benchmark(
    op="local_matching",
    variants=(
        Variant("vosops", fused),
        Variant("CFBI loop", loop),
        Variant("unfold", unfold),
        Variant("running minimum", running_minimum),
        Variant("torch.compile", compiled, compiles=True),
        Variant("tiled GEMM", tiled),
        Variant("vosops float32", fused, prepare=Inputs.in_float32, special=True),
        Variant("vosops, one thread", fused_by_one_thread, special=True),
    ),
    cases=(
        Case(
            "480p",
            120,
            214,
            objects=1,
            radius=15,
            goals={"tiled GEMM": 4, "torch.compile": 10},
            goal_share=0.8,
            goal_memory=30 * MB,
            left_out={"unfold": _UNFOLD_480P},
        ),
        Case(
            "480p-small-mask",
            120,
            214,
            objects=1,
            radius=15,
            coverage=0.05,
            goals={"tiled GEMM": 12},
            only=("tiled GEMM",),
        ),
        Case(
            "training",
            60,
            107,
            objects=3,
            radius=12,
            backward=True,
            goals={"tiled GEMM": 10, "torch.compile": 140},
            goal_memory=30 * MB,
        ),
        Case("480p-half", 60, 107, objects=3, radius=12, quick=True),
        Case(
            "1080p",
            270,
            480,
            objects=3,
            radius=15,
            goals={"tiled GEMM": 4},
            goal_memory=120 * MB,
            left_out={"CFBI loop": _SLOW, "unfold": "needs 50 GB for the unfolded windows alone"},
            only=("tiled GEMM", "torch.compile"),
        ),
        Case(
            "480p-bfloat16",
            120,
            214,
            objects=1,
            radius=15,
            dtype=torch.bfloat16,
            goals={"vosops float32": 1.7},
            only=("vosops float32", "tiled GEMM"),
        ),
        Case(
            "480p-two-threads",
            120,
            214,
            objects=1,
            radius=15,
            threads=2,
            goals={"vosops, one thread": 1.9},
            only=("vosops, one thread",),
        ),
    ),
    work=matching_work(flops),
)
