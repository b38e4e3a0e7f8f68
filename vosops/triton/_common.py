"""What the matching kernels share: the dot product, selection of the nearest key, packing, launch shapes.

Selection works on scores, the squared distance in expanded form, in tiles of queries by keys. Every score that counts
is finite: excluded pairs get BIG added, so that no infinity or NaN enters an addition, a minimum or a bit trick.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether the kernels run in Triton's interpreter, whose dot product is wrong for bfloat16."""

BIG = tl.constexpr(1e37)
"""Added to the score of an excluded pair. Three of them still fit float32."""

NORM_LIMIT = tl.constexpr(1e36)
"""An embedding with this squared norm or more, or a NaN in it, cannot be matched."""

VALUE_LIMIT = tl.constexpr(1e18)
"""Channels this large or NaN are packed as zero, so that the dot product of such a row stays finite."""

ROW_SHIFT = tl.constexpr(1.0 + 2.0**-16)
"""Scales the query's norm in packed scores, to keep rounding from making the score of a perfect match negative."""

MIN_CHANNELS = 16
"""Channels are padded with zeros to a multiple of this, the depth of one half-precision tensor-core step."""

STAGED_BYTES = 96 * 1024
"""Shared memory that one program may use: two programs fit a multiprocessor of an A100, H100 or H200."""

PRECISIONS = ("ieee", "tf32", "tf32x3")
SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``, accumulated in float32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_dot(
    query_rows,
    key_rows,
    q0,
    q1,
    q2,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dot products (BLOCK_Q, BLOCK_K) of packed rows; query_rows (BLOCK_Q, 1) and key_rows (BLOCK_K, 1) are pointers.

    BLOCK_C 0: the query rows are in q0, q1 and q2, split into that many channels. Else both sides are read in blocks.
    """
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    if BLOCK_C == 0:
        acc = dot(q0, tl.trans(tl.load(key_rows + tl.arange(0, PART_0)[None, :])), acc, PRECISION)
        if PART_1 > 0:
            k1 = tl.load(key_rows + (PART_0 + tl.arange(0, PART_1))[None, :])
            acc = dot(q1, tl.trans(k1), acc, PRECISION)
        if PART_2 > 0:
            k2 = tl.load(key_rows + (PART_0 + PART_1 + tl.arange(0, PART_2))[None, :])
            acc = dot(q2, tl.trans(k2), acc, PRECISION)
    else:
        for c in range(0, CHANNELS, BLOCK_C):
            columns = (c + tl.arange(0, BLOCK_C))[None, :]
            q = tl.load(query_rows + columns)
            k = tl.load(key_rows + columns)
            acc = dot(q, tl.trans(k), acc, PRECISION)
    return acc


@triton.jit
def load_query(query_rows, PART_0: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr):
    """The query rows as up to three blocks of channels, for tile_dot with BLOCK_C 0."""
    q0 = tl.load(query_rows + tl.arange(0, PART_0)[None, :])
    q1 = q0
    q2 = q0
    if PART_1 > 0:
        q1 = tl.load(query_rows + (PART_0 + tl.arange(0, PART_1))[None, :])
    if PART_2 > 0:
        q2 = tl.load(query_rows + (PART_0 + PART_1 + tl.arange(0, PART_2))[None, :])
    return q0, q1, q2


@triton.jit
def least(score, BLOCK_K: tl.constexpr, EXACT: tl.constexpr):
    """The least score of each row and its column, the lowest among equals.

    Unless EXACT, the column replaces the lowest bits of the score's mantissa: one bitwise operation and one minimum per pair instead of
    a comparison and three selections, for a relative error of BLOCK_K * 2**-23. The scores must not be negative.
    """
    if EXACT:
        value, column = tl.min(score, axis=1, return_indices=True)
    else:
        column_bits: tl.constexpr = BLOCK_K - 1
        bits = score.to(tl.int32, bitcast=True)
        packed = (bits & ~column_bits) | tl.arange(0, BLOCK_K)[None, :]
        best = tl.min(packed.to(tl.float32, bitcast=True), axis=1).to(tl.int32, bitcast=True)
        value = (best & ~column_bits).to(tl.float32, bitcast=True)
        column = best & column_bits
    return value, column


@triton.jit
def row_offset(query_norm, EXACT: tl.constexpr):
    """The query's term of the score. It orders nothing, but makes packed scores non-negative and relative to the distance."""
    if EXACT:
        offset = tl.zeros_like(query_norm)
    else:
        offset = tl.where(query_norm < NORM_LIMIT, query_norm * ROW_SHIFT, 0.0)
    return offset


@triton.jit
def pack_rows(
    source,
    offset,
    inside,
    stride_c,
    packed,
    C,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copy embeddings into rows of CHANNELS contiguous values and return their squared norms (float32).

    offset (rows,) int64: of each pixel in ``source``; packed (rows, 1): where each row goes. Rows that are not ``inside`` get zeros.
    """
    norm = tl.zeros_like(offset).to(tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        pointers = source + offset[:, None] + (channel.to(tl.int64) * stride_c)[None, :]
        value = tl.load(pointers, mask=inside[:, None] & (channel < C)[None, :], other=0.0)
        wide = value.to(tl.float32)
        norm += tl.sum(wide * wide, axis=1)
        clean = tl.where(tl.abs(wide) < VALUE_LIMIT, value, 0.0).to(value.dtype)
        tl.store(packed + channel[None, :], clean, mask=(channel < CHANNELS)[None, :])
    return norm


@triton.jit
def squared_distance(
    query_rows, key_rows, found, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sum of squared differences of packed rows in float32, +inf where not ``found``."""
    total = tl.zeros((ROWS,), tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        channel = (c + tl.arange(0, BLOCK_C))[None, :]
        mask = found[:, None] & (channel < CHANNELS)
        q = tl.load(query_rows + channel, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(key_rows + channel, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum((q - k) * (q - k), axis=1)
    return tl.where(found, total, float("inf"))


@dataclass(frozen=True)
class Channels:
    """How a kernel walks over the channels: ``padded`` in all, resident in ``parts`` (block 0) or in blocks."""

    padded: int
    parts: tuple[int, int, int]
    block: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels' compile-time arguments."""
        return {
            "CHANNELS": self.padded,
            "PART_0": self.parts[0],
            "PART_1": self.parts[1],
            "PART_2": self.parts[2],
            "BLOCK_C": self.block,
        }


def channel_plan(channels: int, rows: int, item_bytes: int, stages: int, *, tensor_cores: bool) -> Channels:
    """Keep the query's ``rows`` resident where they and ``stages`` key tiles of as many rows fit STAGED_BYTES.

    A block must be a power of two: 100 channels are padded to 112 = 64 + 32 + 16, not to 128.
    """
    padded = max(1, -(-channels // MIN_CHANNELS)) * MIN_CHANNELS
    while (padded // MIN_CHANNELS).bit_count() > 3:
        padded += MIN_CHANNELS
    if tensor_cores and (1 + stages) * rows * padded * item_bytes <= STAGED_BYTES:
        parts = [1 << bit for bit in reversed(range(padded.bit_length())) if padded >> bit & 1]
        parts += [0] * (3 - len(parts))
        return Channels(padded, (parts[0], parts[1], parts[2]), 0)
    block = 128 // item_bytes if tensor_cores else MIN_CHANNELS
    return Channels(-(-padded // block) * block, (MIN_CHANNELS, 0, 0), block)


def uses_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    """Whether products of this dtype and precision run on tensor cores: all but IEEE float32."""
    return dtype != torch.float32 or precision != "ieee"


def is_exact(dtype: torch.dtype, precision: str) -> bool:
    """Whether the nearest key is chosen by the full score, not by one that gave bits to the key's position."""
    return dtype == torch.float32 and precision != "tf32"


def check_embeddings(query: Tensor, key: Tensor, precision: str) -> None:
    """Raise TypeError or ValueError for what the kernels cannot take."""
    if query.dtype not in SUPPORTED_DTYPES or key.dtype != query.dtype:
        raise TypeError(
            "query and key must both be float32, float16 or bfloat16 for the Triton kernels, "
            f"got {query.dtype} and {key.dtype}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if key[0, 0].numel() >= 2**31 if key.shape[0] and key.shape[1] else False:
        raise ValueError(f"key must have fewer than 2**31 pixels, got shape {tuple(key.shape)}")


def launch_on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current, as Triton launches on the current one."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device (an H100's where it runs in the interpreter)."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 132


def power_of_two(number: int) -> int:
    """The least power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
