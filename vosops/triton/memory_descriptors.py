"""The full read of 16-bit keys and values by tensor descriptors: tiles that the hardware copies (TMA) from sm_90 on.

``read_tiles`` cuts the work as `memory_read` does: a program owns 128 queries and 256 value columns and walks over a
part of the memory in steps of 64 positions. What differs is how tiles arrive: a thread asks for the key tile and the
value tile of a step, and the copy engine fills shared memory, up to three steps ahead (48 KB each beside 32 KB of
queries). No thread computes an address or a bound of them: a warp issues 483 instructions in a step instead of 656
(Triton 3.8, sm_90). The loop covers whole tiles, so that no score needs a mask; what is left of the memory, of which
nothing behind its end is loaded, goes first, in narrow tiles by pointers. After the loop it would keep registers alive
through it, which then spill.

Descriptors are made by the host and travel with the launch; nothing is allocated for them. They need strides and an
address of whole 16 bytes, and a value tile in one object or across objects at equal distances (`reason_not`).
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vosops import _verdicts
from vosops.triton._common import KB, Architecture, Target, dot, target_of
from vosops.triton.memory_scores import (
    LOG2E,
    MIN_BLOCK,
    Scores,
    block_of,
    finish_scores,
    load_row_tiles,
    load_vector,
    of_batch,
    options_of,
    part_of,
)
from vosops.triton.memory_softmax import HALF_TILES, read_launch, step, store_read, weigh
from vosops.triton.memory_values import Launch

PRODUCTS = ("wgmma", "tcgen05")
"""Products of architectures whose copy engine fills the shared memory that they multiply from, with room for stages."""

TAIL = tl.constexpr(MIN_BLOCK)
"""Positions of a tile of what is left of a memory beside its whole tiles."""

DTYPES = (torch.float16, torch.bfloat16)
PIECE = 16
"""Bytes: of what a descriptor's address and strides are multiples."""

MOST_CHANNELS = 256
"""Of a key: the most that a side of a copied tile may have."""

MOST_STAGES = 3
STAGED_BESIDE = 16 * KB
"""Shared memory that stays for barriers, reductions and the scores on their way to the second product."""


@triton.jit
def read_tiles(
    query,
    key,
    shrinkage,
    query_bias,
    key_bias,
    shrinkage_n,
    query_bias_n,
    key_bias_n,
    query_n,
    query_c,
    query_p,
    key_n,
    key_c,
    key_m,
    scale,
    P,
    M,
    query_end,
    key_end,
    ends,
    value,
    out,
    lse,
    value_n,
    value_o,
    value_c,
    value_m,
    value_end,
    batch,
    columns,
    tiles,
    column_blocks,
    parts,
    key_tiles,
    key_tiles_n,
    value_tiles,
    value_tiles_n,
    C: tl.constexpr,
    VALUE_C: tl.constexpr,
    TILED_C: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUE_PRECISION: tl.constexpr,
    KEY_LAST: tl.constexpr,
    VALUE_LAST: tl.constexpr,
):
    """Grid (query tiles * column blocks * N * parts); out (parts, N, columns, P) and lse (parts, N, P) contiguous.

    key_tiles (N, M, C), or (N, C, M) unless KEY_LAST, and value_tiles (N, O, M, TILED_C), or (N, O, TILED_C, M) unless
    VALUE_LAST: descriptors. key_tiles_n, value_tiles_n: 1, or 0 where all batch elements share the first.
    """
    tile = tl.program_id(0) % tiles
    column_block = tl.program_id(0) // tiles % column_blocks
    row = (tl.program_id(0) // tiles // column_blocks).to(tl.int64)
    n = row % batch
    part = (row // batch).to(tl.int32)
    key_n_tile = n.to(tl.int32) * key_tiles_n
    value_n_tile = n.to(tl.int32) * value_tiles_n
    object_tile = column_block * BLOCK_V // TILED_C
    channel_tile = column_block * BLOCK_V % TILED_C
    query += n * query_n
    key += n * key_n
    value += n * value_n
    shrinkages = of_batch(shrinkage, n, shrinkage_n)
    key_biases = of_batch(key_bias, n, key_bias_n)

    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    column = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    query_tile, query_squares = load_row_tiles(
        query, p, query_c, query_p, query_end, 0, C, SQUARES, True, WIDE, BLOCK_C
    )
    row_bias = load_vector(of_batch(query_bias, n, query_bias_n), p, P, 0.0) * LOG2E

    maximum = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    acc = tl.zeros((BLOCK_P, BLOCK_V), tl.float32)
    begin, end = part_of(ends, n, M, part, parts, BLOCK_M)
    whole = begin + tl.maximum(end - begin, 0) // BLOCK_M * BLOCK_M
    for first in tl.range(whole, end, TAIL, num_stages=1):
        maximum, total, acc = step(
            maximum, total, acc, query_tile, query_squares, row_bias, p, first + tl.arange(0, TAIL), column,
            query, key, shrinkages, key_biases, query_c, query_p, key_c, key_m, scale, end, query_end, end,
            value, value_m, value_o, value_c, end, columns, query_bias is not None,
            C, SQUARES, WIDE, BLOCK_P, TAIL, BLOCK_C, PRECISION, VALUE_C, VALUE_PRECISION,
        )  # fmt: skip
    for first in range(begin, whole, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        if KEY_LAST:
            key_tile = tl.trans(key_tiles.load([key_n_tile, first, 0]).reshape(BLOCK_M, BLOCK_C))
        else:
            key_tile = key_tiles.load([key_n_tile, 0, first]).reshape(BLOCK_C, BLOCK_M)
        product = dot(query_tile, key_tile, tl.zeros((BLOCK_P, BLOCK_M), tl.float32), PRECISION)
        column_shrinkage = tl.zeros((1, BLOCK_M), tl.float32)
        if shrinkage is not None:
            column_shrinkage = tl.load(shrinkages + m)[None, :]
        column_bias = tl.zeros((1, BLOCK_M), tl.float32)
        if key_bias is not None:
            column_bias = tl.load(key_biases + m)[None, :] * LOG2E
        score = finish_scores(
            product,
            scale * LOG2E,
            row_bias[:, None],
            column_shrinkage,
            column_bias,
            query_bias is not None,
            shrinkage is not None,
        )
        weight, rescale, maximum, total = weigh(score, maximum, total)
        if VALUE_LAST:
            value_tile = value_tiles.load([value_n_tile, object_tile, first, channel_tile])
            value_tile = value_tile.reshape(BLOCK_M, BLOCK_V)
        else:
            value_tile = value_tiles.load([value_n_tile, object_tile, channel_tile, first])
            value_tile = tl.trans(value_tile.reshape(BLOCK_V, BLOCK_M))
        acc = dot(weight.to(value.dtype.element_ty), value_tile, acc * rescale[:, None], VALUE_PRECISION)
    store_read(out, lse, row, tile, column_block, p, maximum, total, acc, P, columns, BLOCK_P, BLOCK_V)


class Tiled(NamedTuple):
    """A tensor (N, ..., C, pixels) as descriptors see it: what the hardware copies must be laid out like this."""

    tensor: Tensor
    """(N, ..., C, pixels), N 1 where all batch elements are the same; by `channel_last` the last two are exchanged."""

    channel_last: bool

    @property
    def batch_step(self) -> int:
        """By how much the batch element goes on: 0 where there is one for all."""
        return 0 if self.tensor.shape[0] == 1 else 1

    @property
    def channels(self) -> int:
        """Channels of an object."""
        return self.tensor.shape[-1 if self.channel_last else -2]

    def descriptor(self, channels: int, pixels: int) -> TensorDescriptor:
        """Return the descriptor of tiles."""
        block = [1] * (self.tensor.dim() - 2)
        block += [pixels, channels] if self.channel_last else [channels, pixels]
        shape = list(self.tensor.shape)
        strides = list(self.tensor.stride())
        for dim in reversed(range(len(shape) - 1)):
            if shape[dim] == 1:  # any stride will do, but it must be whole pieces
                strides[dim] = triton.cdiv(shape[dim + 1] * strides[dim + 1], PIECE) * PIECE
        return TensorDescriptor(self.tensor, shape, strides, block)


def tiled(tensor: Tensor) -> Tiled | None:
    """Return a tensor (N, ..., C, pixels) for descriptors, None where its layout allows none."""
    channel_last = tensor.stride(-1) != 1
    if channel_last:
        tensor = tensor.transpose(-1, -2)
    if tensor.stride(0) == 0:
        tensor = tensor[:1]
    outer = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    places = [tensor.data_ptr(), *(stride * tensor.element_size() for stride in outer)]
    if tensor.stride(-1) != 1 or any(place % PIECE or not place for place in places):
        return None
    return Tiled(tensor, channel_last)


def joined(value: Tensor, block: int) -> Tensor | None:
    """Return values (N, O, Cv, M) as (N, O', Cv', M) of which a tile of ``block`` columns has one object, or None."""
    _, objects, channels, _ = value.shape
    if objects == 1 or value.stride(1) == channels * value.stride(2):
        return value.flatten(1, 2).unsqueeze(1)
    return value if channels % block == 0 else None


def reason_not(query: Tensor, key: Tensor, value: Tensor, target: Target) -> str:
    """Return why a read cannot go by descriptors, "" if it can."""
    products = target.architecture.products
    if products not in PRODUCTS:
        return f"it multiplies by {products}: descriptors are for {' and '.join(PRODUCTS)}"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype not in DTYPES:
        return f"query, key and value must have 16 bits, got {query.dtype}, {key.dtype} and {value.dtype}"
    if query.shape[1] != key.shape[1] or not 0 < key.shape[1] <= MOST_CHANNELS:
        return f"keys must have 1 to {MOST_CHANNELS} channels and no selection, got {key.shape[1]}"
    block_m, block_v = blocks(key, value, target.architecture)
    if key.shape[2] < block_m or value.shape[1] * value.shape[2] == 0:
        return f"a memory must have at least {block_m} positions and one column, got {tuple(value.shape)}"
    if tiled(key) is None:
        return f"a key's rows must be whole pieces of {PIECE} bytes, got strides {key.stride()}"
    columns = joined(value, block_v)
    if columns is None:
        return f"tiles of {block_v} columns must be of one object, got {tuple(value.shape)}, strides {value.stride()}"
    if tiled(columns) is None:
        return f"a value's rows must be whole pieces of {PIECE} bytes, got strides {value.stride()}"
    return ""


def blocks(key: Tensor, value: Tensor, architecture: Architecture) -> tuple[int, int]:
    """Return the positions and value columns of a tile."""
    _, block_m, block_v = HALF_TILES[architecture.products]
    return block_m, block_of(value.shape[1] * value.shape[2], block_v)


def tile_launch(scores: Scores, columns: int, value_channels: int) -> Launch:
    """Tiles of ``read_tiles``: those of the read by pointers, in as many stages as shared memory has room for."""
    constants, _ = read_launch(scores, columns, value_channels, "half")
    constants = {name: constant for name, constant in constants.items() if not name.startswith("KEY_")}
    constants["BLOCK_C"] = block_of(scores.channels, MOST_CHANNELS)
    queries = 2 * constants["BLOCK_P"] * constants["BLOCK_C"]
    stage = 2 * constants["BLOCK_M"] * (constants["BLOCK_C"] + constants["BLOCK_V"])
    room = scores.target.architecture.shared_bytes - STAGED_BESIDE - queries
    return constants, options_of(8, max(1, min(MOST_STAGES, room // stage)))


def arguments(key: Tensor, value: Tensor, constants: dict[str, Any]) -> dict[str, Any]:
    """Return what ``read_tiles`` takes beside what a read by pointers does, of tensors without a `reason_not`."""
    columns = joined(value, constants["BLOCK_V"])
    keys, values = tiled(key), None if columns is None else tiled(columns)
    assert keys is not None and values is not None
    return {
        "key_tiles": keys.descriptor(constants["BLOCK_C"], constants["BLOCK_M"]),
        "key_tiles_n": keys.batch_step,
        "value_tiles": values.descriptor(constants["BLOCK_V"], constants["BLOCK_M"]),
        "value_tiles_n": values.batch_step,
        "TILED_C": values.channels,
        "KEY_LAST": keys.channel_last,
        "VALUE_LAST": values.channel_last,
    }


def is_chosen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a read goes by descriptors: it can, and the environment or `vosops check` says that it may."""
    setting = os.environ.get(_verdicts.DESCRIPTORS)
    if setting == "0" or query.dtype not in DTYPES:
        return False
    if setting != "1" and not _verdicts.proved(key.device, "memory_read", _verdicts.VARIANTS[0], query.dtype):
        return False
    return not reason_not(query, key, value, target_of(key))
