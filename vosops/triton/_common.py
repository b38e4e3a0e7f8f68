"""What the matching kernels share: the dot product, selection of the nearest key, packing, launch shapes.

Selection works on scores, the squared distance in expanded form, in tiles of queries by keys. Every score that counts
is finite: excluded pairs get BIG added, so that no infinity or NaN enters an addition, a minimum or a bit trick.
"""

from __future__ import annotations

import contextlib
import math
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

MAX_GRID = 65535
"""Programs that CUDA launches along the second and third axis."""

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
def load_rows(rows, first, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """BLOCK_C channels from ``first`` of packed rows, given as pointers (rows, 1); zeros beyond CHANNELS."""
    channel = (first + tl.arange(0, BLOCK_C))[None, :]
    if CHANNELS % BLOCK_C == 0:
        block = tl.load(rows + channel)
    else:
        block = tl.load(rows + channel, mask=channel < CHANNELS, other=0.0)
    return block


@triton.jit
def tile_dot(
    query_tile,
    query_rows,
    key_rows,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dot products (BLOCK_Q, BLOCK_K) of packed rows, given as pointers.

    If all channels fit one block, the query's is ``query_tile``, already loaded.
    """
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    if BLOCK_C >= CHANNELS:
        acc = dot(query_tile, tl.trans(load_rows(key_rows, 0, CHANNELS, BLOCK_C)), acc, PRECISION)
    else:
        for first in range(0, CHANNELS, BLOCK_C):
            q = load_rows(query_rows, first, CHANNELS, BLOCK_C)
            acc = dot(q, tl.trans(load_rows(key_rows, first, CHANNELS, BLOCK_C)), acc, PRECISION)
    return acc


@triton.jit
def least(score, BLOCK_K: tl.constexpr, EXACT: tl.constexpr):
    """Return the least score of each row and its column, the lowest among equals.

    Unless EXACT, the column replaces the lowest bits of the score's mantissa: one bitwise operation and one minimum per
    pair instead of a comparison and three selections, for a relative error of BLOCK_K * 2**-23. The scores must then
    not be negative.
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
    """Return the query's term of the score.

    It orders nothing, but makes packed scores non-negative, and their error relative to the distance.
    """
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
    stored,
    C,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copy embeddings into rows of CHANNELS contiguous values and return their squared norms (float32).

    offset (rows,) int64: of each pixel in ``source``; rows that are not ``inside`` are zero. packed (rows, 1): where
    each row goes, if ``stored``.
    """
    norm = tl.zeros_like(offset).to(tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        pointers = source + offset[:, None] + (channel.to(tl.int64) * stride_c)[None, :]
        value = tl.load(pointers, mask=inside[:, None] & (channel < C)[None, :], other=0.0)
        wide = value.to(tl.float32)
        norm += tl.sum(wide * wide, axis=1)
        clean = tl.where(tl.abs(wide) < VALUE_LIMIT, value, 0.0).to(value.dtype)
        tl.store(packed + channel[None, :], clean, mask=stored[:, None] & (channel < CHANNELS)[None, :])
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
class Architecture:
    """A kind of GPU, as far as launch shapes depend on it.

    Attributes:
        name: the first of its kind.
        products: how Triton multiplies 16-bit tiles there: "mma.sync" (a warp owns 16 rows, sums are registers),
            "wgmma" (four warps own 64 rows, operands come from shared memory), "tcgen05" (sums are in tensor memory) or
            "mfma".
        shared_bytes: shared memory that one program may have.
        staged_bytes: of it, what tiles of queries and the stages of key tiles may take.
    """

    name: str
    products: str
    shared_bytes: int
    staged_bytes: int


KB = 1024
AMD = Architecture("gfx942", "mfma", 64 * KB, 64 * KB)
ARCHITECTURES = {
    # 163 KB a program; 96 KB leaves room for the lists and reductions of one program, 64 KB tiles run two.
    (8, 0): Architecture("sm_80", "mma.sync", 163 * KB, 96 * KB),
    # 99 KB a program, and so a multiprocessor: the shapes of sm_80 fit, one program at a time.
    (8, 6): Architecture("sm_86", "mma.sync", 99 * KB, 96 * KB),
    (8, 7): Architecture("sm_87", "mma.sync", 163 * KB, 96 * KB),
    (8, 9): Architecture("sm_89", "mma.sync", 99 * KB, 96 * KB),
    # 227 KB: half of it, so that the products of one program hide the selection of another.
    (9, 0): Architecture("sm_90", "wgmma", 227 * KB, 112 * KB),
    # 227 KB; two programs share 512 columns of tensor memory, which bounds them before shared memory does.
    (10, 0): Architecture("sm_100", "tcgen05", 227 * KB, 96 * KB),
    # No tensor memory and no wgmma: as sm_86.
    (12, 0): Architecture("sm_120", "mma.sync", 99 * KB, 96 * KB),
}
"""By compute capability, each entry for itself and what follows it up to the next. What comes before 8.0 has no tensor
cores for bfloat16; Triton does not multiply in TF32 there."""


def architecture_of(capability: tuple[int, int]) -> Architecture:
    """Return the architecture of a compute capability; (0, 0): of AMD."""
    if capability[0] == 0:
        return AMD
    before = [first for first in ARCHITECTURES if first <= capability]
    return ARCHITECTURES[max(before, default=(8, 6))]


@dataclass(frozen=True)
class Target:
    """What launch shapes depend on: the compute capability, major (0: not CUDA) and minor, and the multiprocessors."""

    capability: int
    processors: int
    minor: int = 0

    @property
    def architecture(self) -> Architecture:
        """Its entry in the table."""
        return architecture_of((self.capability, self.minor))


INTERPRETED = Target(9, 132)
"""Tensors on the CPU are processed as if on an H100."""


def target_of(tensor: Tensor) -> Target:
    """Return the target of the tensor's device."""
    if not tensor.is_cuda:
        return INTERPRETED
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip is not None:
        return Target(0, properties.multi_processor_count)
    return Target(properties.major, properties.multi_processor_count, properties.minor)


def compile_options(warps: int, **more: int) -> dict[str, int]:
    """Options for Triton's compiler. Fused multiply-adds are asked for, since the default depends on its version."""
    return {"num_warps": warps, "enable_fp_fusion": True, **more}


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work: queries and keys of a tile, channels stored and of a block, compiler options."""

    queries: int
    keys: int
    channels: int
    block_c: int
    options: dict[str, int]


def tilings(
    channels: int,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    *,
    many_queries: bool = False,
) -> list[Tiling]:
    """Return the tilings to choose from, largest first.

    The queries of a tile stay in shared memory with all their channels where they and the stages' key tiles fit. Large
    tiles read each key less often and spread a step's fixed instructions over more pairs; their limit is the registers.
    The last tiling is for kernels that keep many results per query.
    """
    stored = max(1, -(-channels // MIN_CHANNELS)) * MIN_CHANNELS
    block = power_of_two(stored)
    architecture = target.architecture
    shapes: list[tuple[int, int, dict[str, int]]] = [
        (128, 64, compile_options(8 if architecture.products == "tcgen05" else 4, num_stages=3)),
        (64, 64, compile_options(4, num_stages=3)),
        (64, 64, compile_options(4, num_stages=2)),
        (64, 32, compile_options(4, num_stages=2)),
    ]
    if many_queries and architecture.products == "wgmma":
        shapes.insert(0, (256, 64, compile_options(8, num_stages=3, maxnreg=128)))
    fitting = [
        Tiling(queries, keys, stored, block, options)
        for queries, keys, options in shapes
        if (queries + options["num_stages"] * keys) * block * dtype.itemsize <= architecture.staged_bytes
    ]
    if not uses_tensor_cores(dtype, precision):
        block, stages = MIN_CHANNELS, 2
    elif not fitting or (precision == "tf32x3" and dtype == torch.float32):
        block, stages = 128 // dtype.itemsize, 3
    else:
        return fitting
    return [Tiling(64, keys, stored, block, compile_options(4, num_stages=stages)) for keys in (64, 32)]


def uses_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    """Whether products of this dtype and precision run on tensor cores: all but IEEE float32."""
    return dtype != torch.float32 or precision != "ieee"


def product_precision(precision: str, target: Target) -> str:
    """Return the precision of the products where ``precision`` is allowed: IEEE where Triton offers no TF32."""
    return precision if target.capability >= 8 else "ieee"


def is_exact(dtype: torch.dtype, precision: str) -> bool:
    """Whether the nearest key is chosen by the full score, not by one that gave bits to the key's position."""
    return dtype == torch.float32 and precision != "tf32"


def check_inputs(query: Tensor, key: Tensor, mask: Tensor, precision: str) -> None:
    """Raise TypeError or ValueError for what the kernels cannot take."""
    if query.dtype not in SUPPORTED_DTYPES or key.dtype != query.dtype:
        raise TypeError(
            "query and key must both be float32, float16 or bfloat16 for the Triton kernels, "
            f"got {query.dtype} and {key.dtype}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    for name, tensor in (("query", query), ("key", key)):
        if math.prod(tensor.shape[2:]) >= 2**30:
            raise ValueError(f"{name} must have fewer than 2**30 pixels, got shape {tuple(tensor.shape)}")
    if mask.shape[0] * mask.shape[1] > MAX_GRID:
        raise ValueError(f"mask must have at most {MAX_GRID} N * O maps, got shape {tuple(mask.shape)}")


def launch_on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current, as Triton launches on the current one."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def power_of_two(number: int) -> int:
    """Return the least power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
