"""The scores of a memory read in tiles, which the kernels of its reading, its gradients and its selection share.

``score[m, p] = shrinkage[m] * (scale * key[m] . query[p] + query_bias[p]) + key_bias[m]``. A program owns rows of one
side (queries or memory positions), whose channels stay in registers or shared memory, and streams columns of the other.
Key and query of one half-precision dtype are multiplied as they are: products of two of their numbers are exact in the
float32 sums. Where the query is wider than the key (a selection makes it so, which also needs the key's squares), both
are multiplied in float32, split in three TF32 products where the device has them: about 2**-21 relative to the greatest
term, so that scores in the thousands keep an error below 1e-2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vosops.triton._common import (
    PRECISIONS,
    SUPPORTED_DTYPES,
    Target,
    compile_options,
    dot,
    launch_on,
    power_of_two,
    product_precision,
    target_of,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

ALIGNMENT = 16
"""Elements: strides that are multiples of this are read in pieces of 16 bytes, by asynchronous copies."""

PIECE_BYTES = 4
"""The least that an asynchronous copy moves."""

MAX_QUERIES = 2**23
MAX_MEMORY = 2**24
"""Above these, 32-bit offsets within an output tile would overflow (`store_transposed`)."""

MIN_BLOCK = 16
"""The least side of a tile that tensor cores multiply."""

SCAN_BLOCK = tl.constexpr(2048)
"""Positions whose bias is looked at together for the last one that is read: one look where nothing is left out."""

SCAN_OPTIONS = compile_options(8)

CHANNEL_BLOCK = {"half": 128, "tf32": 64, "tf32x3": 32, "ieee": 16}
"""Channels of a step of the scores: float32 operands pass through registers, split in two for tf32x3."""


@triton.jit
def piece_of(matrix, offset, PIECE: tl.constexpr):
    """Return the pointer ``offset`` elements on, of which the compiler learns that pieces are aligned."""
    moved = matrix + offset
    if PIECE > 1:
        moved = tl.multiple_of(moved, PIECE * matrix.dtype.element_ty.primitive_bitwidth // 8)
    return moved


@triton.jit
def load_tile(matrix, i, j, stride_i, stride_j, end_i, end_j):
    """Elements (i, j) of a matrix; zeros from ``end_i`` and from ``end_j`` on."""
    pointers = matrix + i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    return tl.load(pointers, mask=(i < end_i)[:, None] & (j < end_j)[None, :], other=0.0)


@triton.jit
def load_row_tiles(
    rows,
    i,
    stride_c,
    stride_i,
    end_i,
    first,
    C: tl.constexpr,
    SQUARES: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Channels from ``first`` of rows (i, BLOCK_C), and with SQUARES what meets the other side's second half."""
    c = first + tl.arange(0, BLOCK_C)
    tile = load_tile(rows, i, c, stride_i, stride_c, end_i, C)
    if WIDE:
        tile = tile.to(tl.float32)
    squares = tile
    if SQUARES:
        if QUERY_ROWS:
            squares = load_tile(rows, i, tl.where(c < C, C + c, 2 * C), stride_i, stride_c, end_i, 2 * C)
            squares = squares.to(tl.float32)
        else:
            squares = tile * tile
    return tile, squares


@triton.jit
def add_products(
    acc,
    row_tile,
    row_squares,
    columns,
    j,
    stride_c,
    stride_j,
    end_j,
    first,
    C: tl.constexpr,
    SQUARES: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the products of one block of channels, from ``first`` on."""
    c = first + tl.arange(0, BLOCK_C)
    tile = load_tile(columns, c, j, stride_c, stride_j, C, end_j)
    if WIDE:
        tile = tile.to(tl.float32)
    acc = dot(row_tile, tile, acc, PRECISION)
    if SQUARES:
        if QUERY_ROWS:
            squares = tile * tile
        else:
            squares = load_tile(columns, tl.where(c < C, C + c, 2 * C), j, stride_c, stride_j, 2 * C, end_j)
            squares = squares.to(tl.float32)
        acc = dot(row_squares, squares, acc, PRECISION)
    return acc


@triton.jit
def products(
    row_tile,
    row_squares,
    rows,
    columns,
    i,
    j,
    row_c,
    row_i,
    column_c,
    column_j,
    end_i,
    end_j,
    C: tl.constexpr,
    SQUARES: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dot products (BLOCK_I, BLOCK_J) of rows i with columns j; row_tile is used where all channels fit one block."""
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    if BLOCK_C >= C:
        acc = add_products(
            acc, row_tile, row_squares, columns, j, column_c, column_j, end_j, 0,
            C, SQUARES, QUERY_ROWS, WIDE, BLOCK_C, PRECISION,
        )  # fmt: skip
    else:
        for first in range(0, C, BLOCK_C):
            tile, squares = load_row_tiles(
                rows, i, row_c, row_i, end_i, first, C, SQUARES, QUERY_ROWS, WIDE, BLOCK_C
            )
            acc = add_products(
                acc, tile, squares, columns, j, column_c, column_j, end_j, first,
                C, SQUARES, QUERY_ROWS, WIDE, BLOCK_C, PRECISION,
            )  # fmt: skip
    return acc


@triton.jit
def load_vector(vector, i, end, missing):
    """Elements i of a vector; ``missing`` from ``end`` on, and 0 before where there is no vector."""
    if vector is None:
        loaded = tl.where(i < end, 0.0, missing)
    else:
        # A zero without a sign: with it, equal scores are equal as integers too.
        loaded = tl.load(vector + i, mask=i < end, other=missing) + 0.0
    return loaded


@triton.jit
def of_batch(vector, n, stride_n):
    """Return the row of batch element n of an (N, ...) vector that may be None."""
    if vector is None:
        row = None
    else:
        row = vector + n * stride_n
    return row


@triton.jit
def read_end(ends, n, M):
    """Return where the memory of batch element n ends: M where there is no bias."""
    if ends is None:
        end = M
    else:
        end = tl.load(ends + n)
    return end


@triton.jit
def part_of(ends, n, M, part, parts, BLOCK_M: tl.constexpr):
    """Return where a part of the memory of batch element n begins and ends: whole tiles, up to `read_end`."""
    end = read_end(ends, n, M)
    steps = tl.cdiv(tl.cdiv(end, BLOCK_M), parts)
    begin = part * steps * BLOCK_M
    return begin, tl.minimum(begin + steps * BLOCK_M, end)


@triton.jit
def _last_read(key_bias, ends, M, key_bias_n, key_bias_m):
    """Grid (N): one past the last position whose bias is not -inf, 0 where there is none.

    The last positions are looked at first. A kernel of its own: a search before the loop of the read costs that loop a
    seventh more instructions, and it is the same for all its programs.
    """
    n = tl.program_id(0).to(tl.int64)
    end = tl.full((), 0, tl.int32)
    unseen = tl.full((), 0, tl.int32) + M
    while (end == 0) & (unseen > 0):
        m = unseen - SCAN_BLOCK + tl.arange(0, SCAN_BLOCK)
        pointers = key_bias + n * key_bias_n + m.to(tl.int64) * key_bias_m
        bias = tl.load(pointers, mask=m >= 0, other=float("-inf"))
        end = tl.max(tl.where(bias == float("-inf"), 0, m + 1), axis=0)
        unseen -= SCAN_BLOCK
    tl.store(ends + n, end)


@triton.jit
def finish_scores(
    product, scale, query_bias, shrinkage, key_bias, HAS_QUERY_BIAS: tl.constexpr, HAS_SHRINKAGE: tl.constexpr
):
    """Scores of dot products, each operation written out so that every kernel rounds alike.

    The vectors have the shape (rows, 1) or (1, columns).
    """
    if HAS_QUERY_BIAS:
        product = tl.fma(product, scale, query_bias)
        if HAS_SHRINKAGE:
            score = tl.fma(product, shrinkage, key_bias)
        else:
            score = product + key_bias
    elif HAS_SHRINKAGE:
        score = tl.fma(product * scale, shrinkage, key_bias)
    else:
        score = tl.fma(product, scale, key_bias)
    return score


@triton.jit
def scores_of_queries(
    query_tile,
    query_squares,
    row_bias,
    p,
    m,
    query,
    key,
    shrinkages,
    key_biases,
    query_c,
    query_p,
    key_c,
    key_m,
    scale,
    M,
    query_end,
    key_end,
    HAS_QUERY_BIAS: tl.constexpr,
    BASE_2: tl.constexpr,
    C: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores (p, m) of queries that a program owns, -inf from M on, and the shrinkage (1, m).

    BASE_2: of powers of two, as row_bias, the queries', then is already.
    """
    product = products(
        query_tile, query_squares, query, key, p, m, query_c, query_p, key_c, key_m, query_end, key_end,
        C, SQUARES, True, WIDE, BLOCK_P, BLOCK_M, BLOCK_C, PRECISION,
    )  # fmt: skip
    shrinkage = load_vector(shrinkages, m, M, 0.0)[None, :]
    key_bias = load_vector(key_biases, m, M, float("-inf"))
    if BASE_2:
        scale = scale * LOG2E
        key_bias = key_bias * LOG2E
    score = finish_scores(
        product,
        scale,
        row_bias[:, None],
        shrinkage,
        key_bias[None, :],
        HAS_QUERY_BIAS,
        shrinkages is not None,
    )
    return score, shrinkage


@triton.jit
def scores_of_memory(
    key_tile,
    key_squares,
    row_shrinkage,
    row_bias,
    m,
    p,
    key,
    query,
    query_biases,
    key_c,
    key_m,
    query_c,
    query_p,
    scale,
    P,
    key_end,
    query_end,
    HAS_SHRINKAGE: tl.constexpr,
    C: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores (m, p) of memory positions that a program owns, their products, and the queries' bias (1, p).

    Scores, row_bias (the positions') and the queries' bias are those of powers of two.
    """
    product = products(
        key_tile, key_squares, key, query, m, p, key_c, key_m, query_c, query_p, key_end, query_end,
        C, SQUARES, False, WIDE, BLOCK_M, BLOCK_P, BLOCK_C, PRECISION,
    )  # fmt: skip
    column_bias = (load_vector(query_biases, p, P, 0.0) * LOG2E)[None, :]
    score = finish_scores(
        product,
        scale * LOG2E,
        column_bias,
        row_shrinkage[:, None],
        row_bias[:, None],
        query_biases is not None,
        HAS_SHRINKAGE,
    )
    return score, product, column_bias


@dataclass(frozen=True)
class Scores:
    """The operands of the scores as the kernels take them."""

    arguments: tuple[Any, ...]
    """query, key, shrinkage, query_bias, key_bias; their strides; scale, P, M, ends of query and key."""

    constants: dict[str, Any]
    batch: int
    queries: int
    memory: int
    channels: int
    target: Target
    kind: str
    """What bounds the tiles of the scores: "half", "tf32", "tf32x3" or "ieee"."""


ARGUMENTS = (
    *("query", "key", "shrinkage", "query_bias", "key_bias", "shrinkage_n", "query_bias_n", "key_bias_n"),
    *("query_n", "query_c", "query_p", "key_n", "key_c", "key_m", "scale", "P", "M", "query_end", "key_end"),
)
"""The names of `Scores.arguments` in the kernels."""


def score_operands(
    query: Tensor,
    key: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    precision: str,
    *,
    stream_queries: bool = False,
    pieces: Callable[[Tensor], Pieces] | None = None,
) -> Scores:
    """Check the operands of the scores and lay out the side that is streamed for wide reads.

    Args:
        query: (N, C, P) or (N, 2C, P), any strides, float32, float16 or bfloat16.
        key: (N, C, M), likewise.
        shrinkage: (N, M) float32 or None.
        query_bias: (N, P) float32 or None.
        key_bias: (N, M) float32 or None.
        scale: Factor of the products.
        precision: "ieee", "tf32" or "tf32x3", for float32 keys.
        stream_queries: Whether the queries are streamed, not the memory.
        pieces: How the kernel takes keys if it takes them in pieces, with KEY_PIECE and KEY_LAST among its constants:
            `in_pieces` or `as_it_is`.
    """
    for name, tensor in (("query", query), ("key", key)):
        check_dtype(name, tensor)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    batch, channels, memory = key.shape
    queries = query.shape[2]
    if query.shape[0] != batch or query.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"query must have shape (N,C,P) or (N,2C,P) for keys {tuple(key.shape)}, got {tuple(query.shape)}"
        )
    if queries > MAX_QUERIES or memory > MAX_MEMORY:
        raise ValueError(
            f"query and key must have at most {MAX_QUERIES} pixels and {MAX_MEMORY} positions for the Triton "
            f"kernels, got {queries} and {memory}"
        )
    vectors = {
        "shrinkage": (shrinkage, memory),
        "query_bias": (query_bias, queries),
        "key_bias": (key_bias, memory),
    }
    for name, (vector, size) in vectors.items():
        if vector is not None and (tuple(vector.shape) != (batch, size) or vector.dtype != torch.float32):
            raise ValueError(
                f"{name} must be float32 ({batch}, {size}), got {vector.dtype} {tuple(vector.shape)}"
            )
    rows = [None if vector is None else unit_stride(vector) for vector, _ in vectors.values()]

    target = target_of(key)
    squares = query.shape[1] != channels
    wide = squares or query.dtype != key.dtype
    precision = product_precision("tf32x3" if wide and key.dtype != torch.float32 else precision, target)
    constants = {"C": channels, "SQUARES": squares, "WIDE": wide, "PRECISION": precision}
    if stream_queries:
        query = aligned(query)
    elif pieces is None:
        key = aligned(key)
    keys = as_it_is(key) if pieces is None else pieces(key)
    if pieces is not None:
        constants |= keys.constants("KEY")
    return Scores(
        (
            *(query, keys.tensor, *rows),
            *(0 if row is None else row.stride(0) for row in rows),
            *(*query.stride(), *keys.strides, scale, queries, memory, query.shape[2], keys.end),
        ),
        constants,
        batch,
        queries,
        memory,
        channels,
        target,
        "half" if not wide and key.dtype != torch.float32 else precision,
    )


def ends_of(key_bias: Tensor | None) -> Tensor | None:
    """Return for a bias (N, M) where each memory ends, int32 (N,); None where there is no bias."""
    if key_bias is None:
        return None
    ends = key_bias.new_empty(key_bias.shape[:1], dtype=torch.int32)
    if ends.numel():
        with launch_on(key_bias):
            _last_read[(ends.numel(),)](key_bias, ends, key_bias.shape[1], *key_bias.stride(), **SCAN_OPTIONS)
    return ends


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a dtype that the kernels cannot take."""
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"{name} must be float32, float16 or bfloat16 for the Triton kernels, got {tensor.dtype}"
        )


def unit_stride(vector: Tensor) -> Tensor:
    """Return the (N, size) vector with consecutive elements, copied if it must be."""
    return vector if vector.stride(-1) == 1 else vector.contiguous()


def is_aligned(tensor: Tensor) -> bool:
    """Whether 16 bytes of a tensor (N, ..., C, pixels) can be read at a time, and Triton sees it."""
    *batches, channel, pixel = tensor.stride()
    places = tensor.data_ptr() % ALIGNMENT == 0 and all(stride % ALIGNMENT == 0 for stride in batches)
    channel_last = channel == 1 and pixel % ALIGNMENT == 0
    channel_major = pixel == 1 and channel % ALIGNMENT == 0 and tensor.shape[-1] % ALIGNMENT == 0
    return places and (channel_last or channel_major)


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor (N, ..., C, pixels) as it is where 16 bytes can be read at a time, else a copy.

    The copy is channel-major; its rows are filled up with zeros to a multiple of ALIGNMENT, so that it may have more
    pixels.
    """
    if is_aligned(tensor):
        return tensor
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % ALIGNMENT)).contiguous()


@dataclass(frozen=True)
class Pieces:
    """A tensor (N, ..., C, pixels) that a kernel reads several neighbouring elements at a time.

    Triton knows of a number that it is a multiple of 16, or nothing. Where strides and size are multiples of less, the
    kernel receives them divided by ``piece`` and multiplies: then the compiler sees that pieces are aligned.
    """

    tensor: Tensor
    piece: int
    """Elements of a piece; 1: what Triton knows is enough."""

    channel_last: bool

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in pieces; that of neighbours stays 1."""
        neighbours = self.tensor.dim() - (2 if self.channel_last else 1)
        return tuple(
            stride if dim == neighbours else stride // self.piece
            for dim, stride in enumerate(self.tensor.stride())
        )

    def constants(self, side: str) -> dict[str, Any]:
        """Return what the kernel must know at compile time of a side, "KEY" or "VALUE"."""
        return {f"{side}_PIECE": self.piece, f"{side}_LAST": self.channel_last}

    @property
    def end(self) -> int:
        """Return the pixels of a row: in pieces where they are neighbours."""
        return self.tensor.shape[-1] // (1 if self.channel_last else self.piece)


def in_place(tensor: Tensor) -> Pieces | None:
    """Return a tensor (N, ..., C, pixels) as asynchronous copies can read it where it is, or None.

    They can with neighbouring channels or pixels, and strides, pixels and address that allow pieces of 4, 8 or 16
    bytes.
    """
    if is_aligned(tensor):
        return as_it_is(tensor)
    *_, channel, pixel = tensor.stride()
    if 1 not in (channel, pixel) or max(tensor.stride()) >= 2**31:
        return None
    channel_last = pixel != 1
    outer = [*tensor.stride()[:-2], *((pixel,) if channel_last else (channel, tensor.shape[-1]))]
    place = tensor.data_ptr() // tensor.element_size()
    piece = math.gcd(ALIGNMENT, place, *outer)
    return Pieces(tensor, piece, channel_last) if piece * tensor.element_size() >= PIECE_BYTES else None


def in_pieces(tensor: Tensor) -> Pieces:
    """Return a tensor (N, ..., C, pixels) `in_place`, else its `aligned` copy."""
    return in_place(tensor) or as_it_is(aligned(tensor))


def as_it_is(tensor: Tensor) -> Pieces:
    """Return a tensor (N, ..., C, pixels) in pieces of one element: strides and pixels as they are."""
    return Pieces(tensor, 1, tensor.stride(-1) != 1)


def block_of(size: int, most: int) -> int:
    """Return the side of a tile that covers ``size`` in steps of at most ``most``."""
    return min(most, max(MIN_BLOCK, power_of_two(size)))


def channel_block(scores: Scores) -> int:
    """Return the channels of a step of the scores."""
    return block_of(scores.channels, CHANNEL_BLOCK[scores.kind])


def options_of(warps: int, stages: int) -> dict[str, int]:
    """Options for Triton's compiler."""
    return compile_options(warps, num_stages=stages)


def slowest(kinds: Sequence[str]) -> str:
    """Return the kind of product among those of a kernel that bounds its tiles."""
    return max(kinds, key=("half", "tf32", "tf32x3", "ieee").index)


def splits_for(programs: int, steps: int, target: Target, resident: int = 1) -> int:
    """In how many parts to cut the streamed side, so that every multiprocessor has work."""
    return max(1, min(steps, target.processors * resident // max(1, programs)))


PART_STEPS = 8
"""What a part of the memory costs besides its steps: queries are loaded, sums stored in float32 and merged."""

MOST_WAVES = 4
"""Parts are not made so small that programs come in more waves than this."""


@functools.lru_cache(maxsize=1024)
def parts_for(programs: int, steps: int, processors: int) -> int:
    """Return in how many parts to cut a memory of these steps, one program on a multiprocessor at a time.

    The fewest steps that the last multiprocessor to end walks: 78 programs leave 54 of 132 without work, while five
    parts each come in three full waves.
    """
    most = max(1, min(steps, MOST_WAVES * processors // max(1, programs)))

    def longest(parts: int) -> int:
        waves = -(-programs * parts // processors)
        return waves * (-(-steps // parts) + PART_STEPS)

    return min(range(1, most + 1), key=longest)


@triton.jit
def load_lse(lse, p, P):
    """Return the log-sum-exp of queries in base 2; +inf where it is -inf and from P on, so that their weights are 0."""
    loaded = tl.load(lse + p, mask=p < P, other=float("inf"))
    return tl.where(loaded == float("-inf"), float("inf"), loaded * LOG2E)


def square_blocks(scores: Scores) -> dict[str, int]:
    """Tiles of kernels that own as many positions as they stream at a time."""
    side = 64 if scores.kind == "half" else 32
    return {
        "BLOCK_P": block_of(scores.queries, side),
        "BLOCK_M": block_of(scores.memory, side),
        "BLOCK_C": channel_block(scores),
    }
