"""The problems of the static model of the CUDA kernels (`cuda_model`): 16 bits, what each kernel does in them, and why.

Each has a small form, which the emulator runs to count how often a warp comes where, and a large form, which a dry run
launches. Forward kernels and `memory_select` have limits; backward kernels are only reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TILE = "tile"
"""The block of source code that most kernels of the model enter once for each tile and warp."""


@dataclass(frozen=True)
class Card:
    """What a multiprocessor does in a cycle, and a card."""

    name: str
    multiprocessors: int
    clock: float
    cycles_of_product: float
    bytes_per_second: float
    flops: float
    cycles_of_fma: float = 1.0


CARDS = (
    Card("A100", 108, 1.41e9, 8.0, 1.56e12, 312e12, cycles_of_fma=2.0),
    Card("H100 PCIe", 114, 1.755e9, 6.5, 2.0e12, 756e12),
    Card("H100 SXM", 132, 1.755e9, 6.5, 3.35e12, 989e12),
)
"""mma.sync with 16 bits: 16 x 8 x 16 in 8 cycles of one of Ampere's four tensor cores, about 6.5 of Hopper's. FFMA: a
quarter of a multiprocessor has 16 lanes for it on an A100, 32 on an H100. The operations a second are the data sheets'
for dense 16-bit products, which only libraries reach that use Hopper's own instructions."""

SMALL_CARDS = (
    Card("A10", 72, 1.695e9, 16.0, 0.6e12, 125e12),
    Card("RTX 4090", 128, 2.52e9, 32.0, 1.008e12, 165e12),
)
"""Of compute capability 8.6 and 8.9, with 99 KB of shared memory for a block; 125 and 165 TFLOP/s, sums in float32."""


@dataclass(frozen=True)
class Library:
    """Kernels of PyTorch that a problem needs besides ours: their code is not counted, only their work is.

    Attributes:
        name: what they do.
        moved: bytes that they read and write.
        flops: of tensor cores.
        launches: how many they are.
    """

    name: str
    moved: float
    flops: float = 0
    launches: int = 1

    @property
    def floor(self) -> float:
        """Seconds on an H100, of products or memory, whichever takes longer."""
        return _floor(self.flops, self.moved)


@dataclass(frozen=True)
class Reference:
    """A kernel as it serves a problem.

    Attributes:
        kernel: its name in the tables of `cuda_report`.
        small: runs a problem of the same kind on the emulator; the argument chooses the worst order of the data.
        large: launches the problem itself, in a dry run of the emulator.
        tiles: how many tiles a warp of the busiest block walks in the large one, by a launch's blocks and its number.
        floor: seconds on an H100, of products or memory, whichever takes longer.
        streamed: bytes that the kernels around it read and write in the large one.
        moved: bytes that the kernel itself must read and write, where that may take longer than its tiles.
        multiprocessors: of the emulated device in the small problem, which decide into how many shares it is cut.
        orders: of the data in the small problem; the worst one counts.
        predicted_for: the order for which a time is predicted.
        unit: the block of source code that stands for a tile.
        architecture: of the emulated device.
        cards: for which times are predicted.
        mine: of the launches of this name in a call, by their number, those that the reference stands for.
        limited: whether the tables hold limits of its tiles.
        reason: why a goal is not met, if it is not.
        libraries: what PyTorch does in the problem; of several references of one problem, one has it.
        whole: the floor of the problem in one kernel, where it has several; else it is the sum of their floors.
    """

    op: str
    problem: str
    kernel: str
    small: Callable[[bool], None]
    large: Callable[[], None]
    tiles: Callable[[int, int], float]
    floor: float
    streamed: float = 0
    moved: float = 0
    multiprocessors: int = 1
    orders: tuple[str, ...] = ("random", "worst")
    predicted_for: str = "worst"
    unit: str = TILE
    architecture: str = "90"
    cards: tuple[Card, ...] = CARDS
    mine: Callable[[int], bool] = lambda number: True
    limited: bool = True
    reason: str = ""
    libraries: tuple[Library, ...] = ()
    whole: float = 0

    @property
    def short_kernel(self) -> str:
        """Its name without namespaces and template arguments."""
        return self.kernel.split(": ")[1].split("<")[0].split("::")[-1]


def ops() -> Any:
    """Return the kernels on the emulator."""
    import torch

    from tests.emulator.build import load_emulated_ops

    load_emulated_ops()
    return torch.ops.vosops_emulated


def _numbers(*shape: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).bfloat16()


def _nearer_and_nearer(query: Any, key: Any) -> Any:
    """Return keys (N,C,*M) whose products with all queries rise with their place: every tile has a new best."""
    import torch

    direction = query.float().flatten(2).mean(2)
    rise = torch.linspace(-4, 4, key[0, 0].numel()).view(key.shape[2:])
    shape = (*direction.shape, *[1] * rise.dim())
    norm = direction.norm(dim=1).clamp(min=1e-6).view(-1, *[1] * (len(shape) - 1))
    return (0.05 * key.float() + rise * direction.view(shape) / norm).bfloat16()


def _ordered(query: Any, key: Any, worst: bool) -> tuple[Any, Any]:
    if not worst:
        return query, key
    query = (query.float() + 2).bfloat16()
    return query, _nearer_and_nearer(query, key)


# ---- Forward ----


def _local(height: int, width: int, worst: bool = False) -> None:
    query, key = _ordered(_numbers(1, 100, height, width), _numbers(1, 100, height, width).flip(3), worst)
    mask = (key[:, :1] == key[:, :1]).contiguous()
    ops().local_matching(query, key, mask, [15], 1, None, "ieee")


def _global(queries: tuple[int, int], keys: tuple[int, int], objects: int = 1, worst: bool = False) -> None:
    query, key = _ordered(_numbers(1, 100, *queries), _numbers(1, 100, 1, *keys).flip(4), worst)
    mask = (key[:, :1] == key[:, :1]).expand(-1, objects, -1, -1, -1).contiguous()
    ops().global_matching(query, key, mask, 1, None, "ieee")


def _read(queries: int, memory: int, channel_last: bool, worst: bool = False) -> None:
    query, key = _ordered(_numbers(1, 128, queries), _numbers(1, 128, memory), worst)
    value = _numbers(1, 1, 512, memory)
    value = value.mT.contiguous().mT if channel_last else value
    ops().memory_read(query, key, value, None, None, None, 128**-0.5, "ieee")


def _select(queries: int, memory: int, worst: bool = False) -> tuple[Any, Any]:
    import torch

    query, key = _ordered(_numbers(1, 64, queries), _numbers(1, 64, memory), worst)
    found: tuple[Any, Any] = ops().memory_select(
        query, key, None, None, torch.zeros(1, memory), 0.125, "ieee", 30
    )
    return found


def _top_30() -> None:
    import torch

    score, index = _select(PLACES, 20 * PLACES)
    ops().memory_gather(score, index, torch.zeros(1, 1, 20 * PLACES, 512, dtype=torch.bfloat16).mT)


def _conv(channels: int, out: int) -> None:
    import torch

    last = torch.channels_last
    x = _numbers(1, channels, 15, 27).contiguous(memory_format=last)
    down = _numbers(out, channels, 7, 1).contiguous(memory_format=last)
    across = _numbers(out, channels, 1, 7).contiguous(memory_format=last)
    ops().global_conv_split(x, down, across, None, None, None, "ieee")


def _both_convs(channels: int, out: int) -> None:
    import torch

    last = torch.channels_last
    _conv(channels, out)
    middle = _numbers(1, 2 * out, 15, 27).contiguous(memory_format=last)
    across = _numbers(out, out, 1, 7).contiguous(memory_format=last)
    down = _numbers(out, out, 7, 1).contiguous(memory_format=last)
    ops().global_conv_merge(middle, across, down, None, "ieee")


def _usage(queries: int, memory: int) -> None:
    import torch

    query, key = _numbers(1, 128, queries), _numbers(1, 128, memory)
    lse = torch.full((1, queries), 8.0)
    ops().memory_usage(query, key, None, None, None, 128**-0.5, "ieee", lse)


def _attend(heads: int) -> None:
    """Call both pieces as `local_attention` does in 16 bits, of which it makes float32 scores."""
    import torch

    maps = torch.ones(heads, 32, 31, 54)
    ops().local_attention_dot(maps, maps, 7, 1)
    ops().local_attention_weigh(torch.ones(heads, 225, 31, 54), maps.bfloat16(), 7, 1)


def _correlate(height: int, width: int, patch: int) -> None:
    maps = _numbers(1, 64, height, width)
    ops().local_correlation(maps, maps, [patch] * 2, [1, 1], [0, 0], [1, 1])


def _cell_update(channels: int, height: int, width: int) -> None:
    cell = _numbers(1, channels, height, width)
    ops().conv_lstm_pointwise(_numbers(1, 4 * channels, height, width), None, cell, 1.0)


H100_FLOPS, H100_BYTES = 989e12, 3.35e12
PIXELS, PLACES = 120 * 214, 1620
CHOSEN = 30 * PLACES
"""Entries that the 480p read of the 30 best of 20 frames chooses."""
CHOSEN_ROWS = 20 * PLACES * (1 - math.exp(-CHOSEN / (20 * PLACES)))
"""Positions among them, each counted once, of random data."""


_WINDOW, _HEADS, _MAP = 15 * 15, 8, 31 * 54
_SCORES, _ENTRIES_OF_MAPS = _HEADS * _MAP * _WINDOW, _HEADS * _MAP * 32
"""Of local attention at 480p/16: those of all heads; entries of a map of all channels."""
_CELLS = 128 * 30 * 54
_GATES_WEIGHT = 4 * 128 * 2 * 128 * 9


def _floor(flops: float, moved: float = 0) -> float:
    return max(flops / H100_FLOPS, moved / H100_BYTES)


TOP_30 = "480p, 20 frames, top 30, values channel-last"
CONV = "4096 channels of 15 x 27, 2 x 256 between, 256 outputs, k = 7, channels_last"
CELL = "a step of 128 channels, 30 x 54"
_SELECT_SHAPE = 2 * PLACES * 20 * PLACES * 64

FORWARD = (
    Reference(
        "local_matching",
        "480p, radius 15, one object",
        "local_matching: one::kernel<BFloat16, 7, 5>",
        lambda worst: _local(64, 64, worst),
        lambda: _local(120, 214),
        lambda blocks, _: math.ceil(34 / (blocks // (15 * 7))),
        floor=_floor(2 * PIXELS * 31 * 31 * 100),
        streamed=PIXELS * (2 * 2 * (100 + 112) + 2 * 224 + 8 + 20),
        reason="each of a thread's 40 scores takes a comparison and two selections, 1.8 instructions a product "
        "where rows of 100 channels give only 70 products a tile to share them",
    ),
    Reference(
        "global_matching",
        "480p, one object on the whole frame",
        "global_matching: tensor::kernel<BFloat16, 7, true, 0>",
        lambda worst: _global((16, 64), (66, 64), worst=worst),
        lambda: _global((120, 214), (120, 214)),
        lambda blocks, _: math.ceil(math.ceil(PIXELS / 128) / (blocks // math.ceil(PIXELS / 256))),
        floor=_floor(2 * PIXELS * PIXELS * 100),
        streamed=PIXELS * (2 * 2 * (100 + 112) + 2 * 224 + 8 + 20),
        reason="keys in the worst order give all queries a new best in every tile: each time 16 values a thread are "
        "searched for the best one's key, on which four lanes then agree",
    ),
    *(
        Reference(
            "memory_read",
            f"480p, 20 frames, values {layout}",
            f"memory_read: tensor::kernel<BFloat16, 0, BFloat16, 0, 1, 8, {str(last).lower()}>",
            lambda worst, last=last: _read(64, 6400, last, worst),  # type: ignore[misc]
            lambda last=last: _read(PLACES, 20 * PLACES, last),  # type: ignore[misc]
            lambda blocks, _: math.ceil(20 * PLACES / 32 / (blocks // math.ceil(PLACES / 64))),
            floor=_floor(2 * PLACES * 20 * PLACES * (128 + 512)),
            streamed=21 * PLACES * 128 * 2 * 2,
            reason="keys in the worst order raise the maximum so often that 24 % of the tiles rescale a thread's 128 "
            "sums, 0.4 instructions a product; the softmax of 32 positions takes the rest beside 80 products, and 0.03 "
            "are where the memory that is left out begins and ends",
        )
        for layout, last in (("channel-major", False), ("channel-last", True))
    ),
    Reference(
        "memory_read",
        "480p, 20 frames, values channel-last, in 99 KB",
        "memory_read: tensor::kernel<BFloat16, 0, BFloat16, 0, 1, 4, true>",
        lambda worst: _read(64, 6400, True, worst),
        lambda: _read(PLACES, 20 * PLACES, True),
        lambda blocks, _: math.ceil(20 * PLACES / 32 / (blocks // (2 * math.ceil(PLACES / 64)))),
        floor=0,
        streamed=21 * PLACES * 128 * 2 * 2,
        architecture="86",
        cards=SMALL_CARDS,
        reason="half of the columns leave 48 products a tile beside the softmax of 32 positions",
    ),
    Reference(
        "memory_select",
        TOP_30,
        "memory_select: select_kernel<TensorTile<BFloat16, 0>, true>",
        lambda worst: _select(64, 6400, worst) and None,
        _top_30,
        lambda blocks, _: math.ceil(20 * PLACES / 128 / (blocks // math.ceil(PLACES / 64))),
        floor=_floor(_SELECT_SHAPE, 21 * PLACES * 64 * 2 + (CHOSEN_ROWS + PLACES) * 512 * 2),
        streamed=21 * PLACES * 64 * 2 * 2 + (CHOSEN_ROWS + PLACES) * 512 * 2,
        predicted_for="random",
        reason="64 channels give a score one product, and it takes 4 instructions to see that it is below the bar; "
        "of random data, scores of 22 of a thread's 32 places in a tile go to their queries' buffers, 11 instructions "
        "a product, and 2.6 times a warp sorts 32 of them and merges them into a list, 16; in the worst order all go, "
        "and it merges 28 times",
    ),
    Reference(
        "memory_select",
        TOP_30,
        "memory_select: join_kernel",
        lambda worst: _select(64, 6400, worst) and None,
        _top_30,
        lambda blocks, _: 10,
        floor=0,
        predicted_for="random",
        unit="short_join",
        limited=False,
    ),
    Reference(
        "global_conv",
        CONV,
        "global_conv: kernel<ByTensorCores<BFloat16, 0, 2> >",
        lambda worst: _conv(512, 64),
        lambda: _both_convs(4096, 256),
        # Of both lines of the first stage at once, 128 chunks of channels; of the second, 2 x 8.
        lambda blocks, number: math.ceil((16, 128)[number == 0] / (blocks // (4, 8)[number == 0])) * 7,
        floor=_floor(2 * 405 * (4096 + 256) * 7 * 512, (512 * (4096 + 256) * 7 + 405 * (4096 + 256)) * 2),
        multiprocessors=4,
        reason="seven tiles share a chunk of x, which leaves a thread three vectors a tile: each row of x is looked up "
        "for its place and whether it is in the map, and the weights' addresses are computed anew for each chunk",
    ),
    Reference(
        "memory_usage",
        "480p, 20 frames, 128 channels",
        "memory_usage: usage_kernel<TensorTile<BFloat16, 0> >",
        lambda worst: _usage(PLACES, 256),
        lambda: _usage(PLACES, 20 * PLACES),
        lambda blocks, _: math.ceil(math.ceil(PLACES / 64) / (blocks // math.ceil(20 * PLACES / 128))),
        floor=_floor(2 * PLACES * 20 * PLACES * 128, 21 * PLACES * (128 * 2 + 4)),
        streamed=21 * PLACES * (128 * 2 * 2 + 4),
        orders=("random",),
        predicted_for="random",
        reason="each of a thread's 32 scores takes 13 instructions (two FMAs, exp2 and its scaling, a branch for "
        "queries that read nothing), 6.5 a product where 128 channels give 64; the places of its four queries' biases "
        "are computed anew in each tile, 2 more",
    ),
    *(
        Reference(
            "local_attention",
            "31 x 54, 256 channels, 8 heads, radius 7, with a bias",
            f"local_attention: {kernel}",
            lambda worst: _attend(1),
            lambda: _attend(_HEADS),
            lambda blocks, _, tiles=tiles: tiles,  # type: ignore[misc]
            floor=_floor(0, 4 * _SCORES + 2 * size * _ENTRIES_OF_MAPS),
            moved=4 * _SCORES + 2 * size * _ENTRIES_OF_MAPS,
            orders=("random",),
            predicted_for="random",
            libraries=libraries,
            reason=reason,
            whole=_floor(4 * _SCORES * 32, 2 * 4 * _ENTRIES_OF_MAPS),
        )
        for kernel, size, tiles, libraries, reason in (
            ("dot_kernel<float>", 4, 1, (), ""),
            (
                "weigh_kernel<BFloat16>",
                2,
                18,
                (
                    Library("conversion to float32 and scale", _ENTRIES_OF_MAPS * (2 * 6 + 8), launches=3),
                    Library("addition of the bias", _SCORES * 8, launches=2),
                    Library("test of which offsets leave the map", _MAP * _WINDOW, launches=13),
                    Library("masked_fill", _SCORES * 16, launches=2),
                    Library("softmax", _SCORES * 8),
                ),
                "numbers of 16 bits are loaded, converted and stored where float32 is copied asynchronously, 1.6 "
                "instructions more for each of a step's 102 products on sm_90",
            ),
        )
    ),
    Reference(
        "local_correlation",
        "480p, 64 channels, 31 x 31 displacements",
        "local_correlation: correlate_kernel<BFloat16>",
        # Of 16 x 16 displacements as many leave a map of 62 rows as of 31 x 31 one of 120.
        lambda worst: _correlate(62, 64, 16),
        lambda: _correlate(120, 214, 31),
        lambda blocks, _: 31 / 32,  # warps, of which each has a row of the displacements
        floor=_floor(2 * PIXELS * 31 * 31 * 64, PIXELS * (31 * 31 * 2 + 2 * 64 * 2)),
        moved=PIXELS * (31 * 31 * 2 + 2 * 64 * 2),
        orders=("random",),
        predicted_for="random",
        reason="of 202 instructions that 16 displacements take for a channel on sm_90, 50 load, convert and multiply; "
        "the rest makes each one's 64-bit address, and tests whether it is in the map, anew for every channel",
    ),
    Reference(
        "conv_lstm",
        CELL,
        "conv_lstm: forward_kernel<4, BFloat16, BFloat16>",
        lambda worst: _cell_update(32, 8, 16),
        lambda: _cell_update(128, 30, 54),
        lambda blocks, _: 1,
        floor=_floor(0, 2 * 11 * _CELLS),
        moved=2 * 11 * _CELLS,
        orders=("random",),
        predicted_for="random",
        limited=False,
        libraries=(
            Library("concatenation of x and h", 2 * 2 * 2 * _CELLS),
            Library("convolution", 2 * ((2 + 4) * _CELLS + _GATES_WEIGHT), 2 * 30 * 54 * _GATES_WEIGHT),
            Library("addition of the bias", 2 * 2 * 4 * _CELLS),
        ),
        whole=_floor(2 * 30 * 54 * _GATES_WEIGHT, 2 * (5 * _CELLS + _GATES_WEIGHT)),
    ),
)

# ---- Backward ----


def _read_backward(batch: int, queries: int, memory: int, objects: int) -> None:
    import torch

    query, key = _numbers(batch, 64, queries), _numbers(batch, 64, memory)
    value = torch.zeros(batch, objects, 512, memory, dtype=torch.bfloat16)
    out = torch.zeros(batch, objects, 512, queries, dtype=torch.bfloat16)
    lse = torch.full((batch, queries), 8.0)
    ops().memory_read_backward(out, lse, query, key, value, None, None, None, 0.125, "ieee", out, lse)


def _matching_backward(pixels: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    index = torch.randint(pixels, (1, 3, pixels), generator=generator)
    query = _numbers(1, 100, pixels)
    ops().matching_backward(torch.ones(1, 3, pixels), query, query.flip(2), index)


def _conv_weight(channels: int, out: int) -> None:
    import torch

    last = torch.channels_last
    x = torch.ones(1, channels, 15, 27, dtype=torch.bfloat16).contiguous(memory_format=last)
    grad = torch.ones(1, out, 15, 27, dtype=torch.bfloat16).contiguous(memory_format=last)
    ops().global_conv_weight(x, grad, 7, 1, "ieee")


def _attention(heads: int, dtype: str) -> None:
    """Take the gradient of the weights, in the value's dtype, or of the query or key, in float32."""
    import torch

    maps = torch.ones(heads, 32, 31, 54, dtype=getattr(torch, dtype))
    if dtype == "float32":
        ops().local_attention_weigh(torch.ones(heads, 225, 31, 54), maps, 7, 1)
    else:
        ops().local_attention_dot(maps, maps, 7, 1)


def _correlation(height: int, width: int, patch: int, of_query: bool) -> None:
    import torch

    maps = torch.ones(1, 64, height, width, dtype=torch.bfloat16)
    grad = torch.ones(1, patch, patch, height, width, dtype=torch.bfloat16)
    op = ops().local_correlation_query if of_query else ops().local_correlation_key
    op(grad, maps, [patch] * 2, [1, 1], [0, 0], [1, 1])


def _lstm(channels: int, height: int, width: int) -> None:
    import torch

    cell = torch.ones(1, channels, height, width, dtype=torch.bfloat16)
    ops().conv_lstm_pointwise_backward(cell, cell, cell.repeat(1, 4, 1, 1), cell, cell)


def _gather_backward(queries: int, memory: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    index = torch.randint(memory, (1, 30, queries), generator=generator)
    grad = torch.ones(1, 1, 512, queries, dtype=torch.bfloat16)
    value = torch.ones(1, 1, memory, 512, dtype=torch.bfloat16).mT
    ops().memory_gather_backward(grad, torch.ones(1, 30, queries), index, value)


_BATCH, _PLACES, _MEMORY, _VALUES = 4, 576, 3 * 576, 3 * 512
_WEIGHTS = _BATCH * _PLACES * _MEMORY
"""Of XMem's training read: crops of 384 x 384, three frames, three objects."""
_ENTRIES = 3 * 60 * 107
"""Of matching in training: three objects on 60 x 107 pixels, a nearest pixel each."""


def _backward(*arguments: Any, **more: Any) -> Reference:
    return Reference(*arguments, orders=("random",), predicted_for="random", limited=False, **more)


def _read_part(
    kernel: str, tiles: Callable[[int, int], float], depth: int, moved: float, **more: Any
) -> Reference:
    return _backward(
        "memory_read_backward",
        "training, 576 places, 3 frames, 3 objects, batch 4",
        f"memory_read_backward: {kernel}",
        lambda worst: _read_backward(1, 576, 256, 3),
        lambda: _read_backward(_BATCH, _PLACES, _MEMORY, 3),
        tiles,
        floor=_floor(2 * _WEIGHTS * depth, moved),
        moved=moved,
        **more,
    )


def _matching_part(kernel: str, moved: float) -> Reference:
    return _backward(
        "matching_backward",
        "training, 60 x 107, 3 objects",
        f"matching_backward: {kernel}",
        lambda worst: _matching_backward(640),
        lambda: _matching_backward(60 * 107),
        lambda blocks, _: 1,
        floor=_floor(2 * _ENTRIES * 100, moved),
        moved=moved,
    )


def _gather_part(kernel: str, moved: float) -> Reference:
    return _backward(
        "memory_gather_backward",
        TOP_30,
        f"memory_select: {kernel}",
        lambda worst: _gather_backward(48, 960),
        lambda: _gather_backward(PLACES, 20 * PLACES),
        lambda blocks, _: 1,
        floor=_floor(2 * CHOSEN * 512, moved),
        moved=moved,
    )


BACKWARD = (
    _read_part(
        "weights_kernel<TensorTile<BFloat16, 0>, BFloat16>",
        lambda blocks, _: 1,
        64,
        2 * _WEIGHTS + 2 * 64 * _BATCH * (_PLACES + _MEMORY),
        streamed=_BATCH
        * (_PLACES * (2 * _VALUES * 2 * 3 + 64 * 2 * 8) + _MEMORY * (64 * 2 * 8 + _VALUES * 2 * 2)),
    ),
    _read_part(
        "ds_kernel<TensorTile<BFloat16, 0> >",
        lambda blocks, _: 1,
        _VALUES,
        3 * 2 * _WEIGHTS + 2 * _VALUES * _BATCH * (_PLACES + _MEMORY),
    ),
    _read_part(
        "product_kernel<TensorTile<BFloat16, 0>, BFloat16>",
        lambda blocks, _: _PLACES / 64,
        _VALUES,
        2 * _WEIGHTS + 2 * _VALUES * _BATCH * (_PLACES + _MEMORY),
        unit="chunk",
        mine=lambda number: number % 3 == 0,
    ),
    _read_part(
        "product_kernel<TensorTile<BFloat16, 0>, float>",
        lambda blocks, number: (_PLACES if number % 3 == 1 else _MEMORY) / 64,
        2 * 64,
        2 * 2 * _WEIGHTS + (2 + 4) * 64 * _BATCH * (_PLACES + _MEMORY),
        unit="chunk",
        mine=lambda number: number % 3 != 0,
    ),
    _matching_part("query_kernel<BFloat16>", _ENTRIES * (224 + 12) + 60 * 107 * (224 + 400)),
    _matching_part("chunk_kernel<BFloat16>", _ENTRIES * (2 * 224 + 20) + 60 * 107 * 400),
    _backward(
        "global_conv_weight",
        "4096 channels of 15 x 27, 256 outputs, 7 x 1",
        "global_conv_weight: kernel<ByTensorCores<BFloat16, 0> >",
        lambda worst: _conv_weight(64, 64),
        lambda: _conv_weight(4096, 256),
        lambda blocks, _: math.ceil(8 / (blocks // 512)),
        floor=_floor(2 * 405 * 4096 * 256 * 7, 2 * (4096 * 256 * 7 + 405 * (4096 + 256))),
        moved=2 * (4096 * 256 * 7 + 405 * (4096 + 256)),
    ),
    *(
        _backward(
            f"local_attention_{name}",
            "31 x 54, 256 channels, 8 heads, radius 7",
            f"local_attention: {kernel}",
            lambda worst, dtype=dtype: _attention(1, dtype),  # type: ignore[misc]
            lambda dtype=dtype: _attention(_HEADS, dtype),  # type: ignore[misc]
            lambda blocks, _, tiles=tiles: tiles,  # type: ignore[misc]
            floor=_floor(2 * _SCORES * 32, 4 * _SCORES + 2 * size * _ENTRIES_OF_MAPS),
            moved=4 * _SCORES + 2 * size * _ENTRIES_OF_MAPS,
        )
        for name, kernel, dtype, size, tiles in (
            ("dot", "dot_kernel<BFloat16>", "bfloat16", 2, 1),
            ("weigh", "weigh_kernel<float>", "float32", 4, 18),
        )
    ),
    *(
        _backward(
            f"local_correlation_{name}",
            "480p, 64 channels, 31 x 31 displacements",
            f"local_correlation: weigh_kernel<BFloat16, {str(of_query).lower()}>",
            lambda worst, of_query=of_query: _correlation(20, 64, 9, of_query),  # type: ignore[misc]
            lambda of_query=of_query: _correlation(120, 214, 31, of_query),  # type: ignore[misc]
            # The small problem has 9 x 9 displacements; half of the warps have no channels.
            lambda blocks, _: 0.5 * 31 * 31 / (9 * 9),
            floor=_floor(2 * PIXELS * 31 * 31 * 64, PIXELS * (31 * 31 * 2 + 2 * 64 * 2)),
            moved=PIXELS * (31 * 31 * 2 + 2 * 64 * 2),
        )
        for name, of_query in (("query", True), ("key", False))
    ),
    _backward(
        "conv_lstm_pointwise_backward",
        CELL,
        "conv_lstm: backward_kernel<4, BFloat16, BFloat16>",
        lambda worst: _lstm(32, 8, 16),
        lambda: _lstm(128, 30, 54),
        lambda blocks, _: 1,
        floor=_floor(0, _CELLS * 2 * 13),
        moved=_CELLS * 2 * 13,
    ),
    _gather_part("weight_kernel<BFloat16>", (CHOSEN_ROWS + PLACES) * 512 * 2 + CHOSEN * 12),
    _gather_part("value_kernel<BFloat16>", (20 * PLACES + PLACES) * 512 * 2 + CHOSEN * 20),
)

REFERENCES = (*FORWARD, *BACKWARD)

# ---- What has no row of its own ----

PARTS: Mapping[str, str] = {
    "global_conv_split": "global_conv",
    "global_conv_merge": "global_conv",
    "conv_lstm_pointwise": "conv_lstm",
    "memory_gather": "memory_select",
    "local_attention_spread": "local_attention_weigh",
}
"""Op of the library -> the reference whose time has it, or whose kernel serves it for as many products."""

_ROWS = "queries and keys as rows of channels, read and written"
_PACKED = "maps as rows of channels, with their squares, read and written"
_SHARES = "the results of shares, which stay in the second-level cache: its launch alone"
_ENDS = "the biases at both ends of the memory: its launch alone"

ONLY_BYTES: Mapping[str, str] = {
    **{f"memory_{op}: rows_kernel": _ROWS for op in ("read", "read_backward", "select", "usage")},
    **{f"memory_{op}: span_kernel": _ENDS for op in ("read", "read_backward", "select", "usage")},
    **{
        f"{op}: rows_kernel": "maps that are not channels_last"
        for op in ("global_conv", "global_conv_weight")
    },
    "global_conv: weight_kernel": "weights that are not channels_last",
    "global_conv: sum_kernel": _SHARES,
    "global_conv_weight: sum_kernel": _SHARES,
    "memory_read: merge_kernel": _SHARES,
    "memory_usage: sum_kernel": _SHARES,
    "global_matching: merge_kernel": _SHARES,
    "global_matching: count_kernel": "the masks: its launch alone",
    "global_matching: place_kernel": "the masks, and the places of their pixels",
    **{f"{op}: pack_kernel": _PACKED for op in ("global_matching", "local_matching", "matching_backward")},
    **{f"{op}_matching: finish_kernel": "the rows of the chosen keys, read" for op in ("global", "local")},
    "matching_backward: join_kernel": "the sums of keys that several chunks share",
    "matching_backward: unpack_kernel": "gradients as maps, read and written",
    "memory_select: gather_kernel": "the chosen rows of the values, read; the results, written",
    "memory_read_backward: delta_kernel": "results and their gradients, read",
    "memory_read_backward: query_rows_kernel": "columns of queries, of a bias",
    "memory_read_backward: key_rows_kernel": "columns of keys, of a bias and of a shrinkage",
    "memory_read_backward: finish_kernel": "gradients of keys, of a bias and of a shrinkage, read and written",
}
"""Kernel -> what it moves, as which it is counted in the time of its op: it multiplies next to nothing."""

OTHER_PROBLEMS: Mapping[str, str] = {
    **{f"{op}: fma::kernel": "float32" for op in ("global_matching", "local_matching", "memory_read")},
    "local_matching: tensor::kernel": "several objects, or several radii",
}
"""Kernel that no problem here comes to -> what it is for."""
