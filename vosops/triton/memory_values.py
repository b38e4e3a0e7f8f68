"""The values of a memory read, (O, VALUE_C, pixels), as one matrix: its columns are the channels of all objects.

Tiles of them and of results, and what every kernel that multiplies values knows at compile time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import product_precision
from vosops.triton.memory_scores import Scores, check_dtype

MERGE_BLOCK = 64
"""Queries and columns of a program that merges, or that sums grad_out * out."""


Launch = tuple[dict[str, Any], dict[str, int]]
"""Compile-time arguments of a kernel, and options for the compiler."""


@triton.jit
def load_columns(value, i, column, stride_i, value_o, value_c, end, columns, VALUE_C: tl.constexpr):
    """Tile (i, column) of values (O, VALUE_C, pixels), whose columns are the channels of all objects."""
    offset = (column // VALUE_C).to(tl.int64) * value_o + (column % VALUE_C).to(tl.int64) * value_c
    pointers = value + i.to(tl.int64)[:, None] * stride_i + offset[None, :]
    return tl.load(pointers, mask=(i < end)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def load_column_rows(value, column, j, stride_j, value_o, value_c, end, columns, VALUE_C: tl.constexpr):
    """Return the same tile transposed: (column, j)."""
    offset = (column // VALUE_C).to(tl.int64) * value_o + (column % VALUE_C).to(tl.int64) * value_c
    pointers = value + offset[:, None] + j.to(tl.int64)[None, :] * stride_j
    return tl.load(pointers, mask=(column < columns)[:, None] & (j < end)[None, :], other=0.0)


@triton.jit
def store_transposed(
    matrix, first_i, first_j, tile, end_i, end_j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Store a tile (BLOCK_I, BLOCK_J) at rows first_j and columns first_i of a matrix (end_j, end_i).

    Offsets within the tile are 32-bit, which saves registers; hence MAX_QUERIES and MAX_MEMORY.
    """
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    corner = matrix + first_j.to(tl.int64) * end_i + first_i
    inside = (first_i + i < end_i)[:, None] & (first_j + j < end_j)[None, :]
    tl.store(corner + (i[:, None] + j[None, :] * end_i), tile.to(matrix.dtype.element_ty), mask=inside)


def value_constants(value_channels: int, value_kind: str) -> dict[str, Any]:
    """Return what kernels that multiply values know about them."""
    return {
        "VALUE_C": max(1, value_channels),
        "VALUE_PRECISION": "ieee" if value_kind == "half" else value_kind,
    }


def kind_of_value(value: Tensor, precision: str, scores: Scores) -> str:
    """Return the kind of the products with values."""
    return product_precision(precision, scores.target) if value.dtype == torch.float32 else "half"


def check_value(value: Tensor, key: Tensor) -> None:
    """Raise for values that kernels cannot read or that do not belong to the keys."""
    check_dtype("value", value)
    if value.dim() != 4 or value.shape[0] != key.shape[0] or value.shape[3] != key.shape[2]:
        raise ValueError(
            f"value must have shape (N,O,Cv,M) for keys {tuple(key.shape)}, got {tuple(value.shape)}"
        )
