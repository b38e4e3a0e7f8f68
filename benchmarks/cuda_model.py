"""A static model of the CUDA kernels: what a multiprocessor must issue, multiply and move for each tile, without a GPU.

    python benchmarks/cuda_model.py --paths      runs the kernels on the emulator, into results/cuda_model/paths.json
    python benchmarks/cuda_model.py --launches   what the hosts would launch, into results/cuda_model/launches.json

`cuda_report` counts the instructions. A kernel's code is cut into basic blocks, every one of which is counted, slow
paths and the code around the tile loop included, times how often a warp comes there for each tile. How often is known
of the blocks of source code that begin with VISIT(...): the emulator counted them (`paths.json`), on random data and on
data in the order that is worst for the kernel; the worse of the two is reported. A block of machine code belongs to the
block of source code that most of its instructions come from, and what is outside of all machine loops runs once for a
warp.

    instructions per product    all of them, by the number of HMMA
    instructions per copy       those of source blocks whose name ends in `copy`, by the number of 16-byte LDGSTS
    bytes per FLOP              what LDSM, LDS, STS and LDGSTS carry from and to shared memory, by two a multiply-add

The time of a launch is at least

    waves * resident blocks * warps * tiles of a warp * max(issue, products, shared memory) / clock
    issue           instructions of a warp's tile / 4            (four schedulers issue one instruction a cycle each)
    products        HMMA of a warp's tile * cycles of one / 4    (a tensor core for each scheduler)
    shared memory   bytes of a warp's tile / 128

where `tiles of a warp` are those of the block that has most. Latencies come on top; so do the copies around the kernel,
which are counted as bytes over the card's bandwidth and START seconds for each launch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sass import Block, Region, blocks, loops, regions  # noqa: E402

RESULTS = ROOT / "benchmarks/results/cuda_model"
PATHS, LAUNCHES = RESULTS / "paths.json", RESULTS / "launches.json"
TILE = "tile"
"""The block of source code that every kernel of the model enters once for each tile and warp."""

HOT_FIGURES = ("instructions per product", "instructions per copy", "bytes per FLOP")
GOALS = {"instructions per product": 5.0, "instructions per copy": 12.0}
FLOPS = {"HMMA.16816": 4096, "HMMA.1688": 2048}
WARP = 32


@dataclass(frozen=True)
class Tile:
    """What a warp does for one tile; copies are those of 16 bytes, copy instructions those that make them."""

    instructions: float
    products: float
    copies: float
    copy_instructions: float
    shared_bytes: float
    flops: float

    def figures(self) -> dict[str, float]:
        """Return the ratios that are kept in tables."""
        return {
            "instructions per product": round(self.instructions / self.products, 2),
            "instructions per copy": round(self.copy_instructions / self.copies, 1),
            "bytes per FLOP": round(self.shared_bytes / self.flops, 4),
        }


# ---- Counting ----

Visits = Mapping[str, tuple[int, int]]
"""Name of a block of source code -> how often warps came there, and how many copies unrolled loops make of it."""


def source_regions() -> list[Region]:
    """Return the counted blocks of all kernels' sources."""
    files = sorted((ROOT / "csrc/cuda").glob("*.cu*"))
    return [region for file in files for region in regions(file.name, file.read_text())]


def count(body: str, known: list[Region], visits: Visits, warps: int) -> Tile:
    """Return a warp's work for one tile of a kernel that `warps` warps ran with these visits, and no others."""
    by_line: dict[tuple[str, int], Region] = {}
    for region in sorted(known, key=lambda r: r.first - r.last):  # the inner ones last
        by_line |= {(region.file, line): region for line in range(region.first, region.last + 1)}
    tiles = visits[TILE][0]
    once = warps / tiles
    graph = blocks(body)
    all_loops = loops(graph)
    looped = set().union(*all_loops)
    names = [
        [_region_of(instruction.lines, by_line) for instruction in block.instructions] for block in graph
    ]
    owners = [Counter(of_block).most_common(1)[0][0] for of_block in names]
    tile_loop = _tile_loop(graph, all_loops, owners)
    inside = set().union(*(names[number] for number in tile_loop))
    total: Counter[str] = Counter()
    for number, (block, owner) in enumerate(zip(graph, owners, strict=True)):
        visits_, copies = visits.get(owner, (0, 1)) if owner else (warps, 1)
        weight = visits_ / copies / tiles
        if number not in looped:
            weight = min(weight, once)
        elif number not in tile_loop and owner in inside:
            weight *= once  # the same code before the first tile, or behind the last
        for what, much in _work(block, names[number]).items():
            total[what] += weight * much
    return Tile(
        total["instructions"],
        total["products"],
        total["copies"],
        total["copy instructions"],
        total["bytes"],
        total["flops"],
    )


def known_paths() -> dict[str, Any]:
    """Return what `--paths` counted of each reference kernel."""
    found: dict[str, Any] = json.loads(PATHS.read_text()) if PATHS.exists() else {}
    return found


def worst(body: str, orders: Mapping[str, Any]) -> Tile:
    """Return a warp's tile with the order of the data for which it takes most instructions, rounded."""
    known = source_regions()
    tiles = [count(body, known, counted["visits"], counted["warps"]) for counted in orders.values()]
    most = max(tiles, key=lambda tile: tile.instructions / tile.products)
    return Tile(**{name: round(value, 2) for name, value in vars(most).items()})


def _tile_loop(graph: list[Block], all_loops: list[set[int]], owners: list[str | None]) -> set[int]:
    """Return the smallest machine loop that has most of the tile's code; no loop has, where each warp has one tile."""
    sizes = {n: len(block.instructions) for n, block in enumerate(graph) if owners[n] == TILE}
    for loop in sorted(all_loops, key=len):
        if sum(size for number, size in sizes.items() if number in loop) > sum(sizes.values()) / 2:
            return loop
    return set()


def _region_of(lines: tuple[tuple[str, int], ...], by_line: Mapping[tuple[str, int], Region]) -> str | None:
    owner: Region | None = None
    for line in lines:
        region = by_line.get(line)
        # A function defined in a block belongs, where it is called from a block within that one, to the inner block.
        if region and (owner is None or (region.file == owner.file and _within(region, owner))):
            owner = region
    return owner.name if owner else None


def _within(inner: Region, outer: Region) -> bool:
    return outer.first <= inner.first and inner.last <= outer.last


def _work(block: Block, names: list[str | None]) -> Counter[str]:
    """Return what one run of a block costs."""
    total: Counter[str] = Counter()
    for instruction, region in zip(block.instructions, names, strict=True):
        name = instruction.name
        kind = name.split(".")[0]
        if kind == "NOP":
            continue
        total["instructions"] += 1
        total["copy instructions"] += bool(region and region.endswith("copy"))
        if kind == "HMMA":
            total["products"] += 1
            total["flops"] += next(flops for prefix, flops in FLOPS.items() if name.startswith(prefix))
        total["copies"] += kind == "LDGSTS" and ".128" in name
        if kind in ("LDS", "STS", "LDGSTS", "LDSM") and not instruction.never_runs:
            total["bytes"] += _shared_bytes(kind, name)
    return total


def _shared_bytes(kind: str, name: str) -> int:
    if kind == "LDSM":
        return 128 * int(name[-1] if name[-1] in "24" else 1)
    return WARP * (16 if ".128" in name else 8 if ".64" in name else 4)


# ---- Reference problems: 16 bits, forward, one object ----


@dataclass(frozen=True)
class Reference:
    """A kernel as it serves the problem that its goal is for.

    Attributes:
        kernel: its name in the tables of `cuda_report`.
        small: runs a problem of the same kind on the emulator; the argument chooses the worst order of the data.
        large: launches the problem itself, in a dry run of the emulator.
        multiprocessors: of the emulated device in the small problem, which decide into how many shares it is cut.
        tiles: how many tiles a warp of the busiest block walks in the large one, by the launch's blocks.
        streamed: bytes that the kernels around it read and write in the large one.
        floor: seconds on an H100, of products or memory, whichever takes longer.
        reason: why a goal is not met, if it is not.
    """

    op: str
    problem: str
    kernel: str
    small: Callable[[bool], None]
    large: Callable[[], None]
    tiles: Callable[[int], int]
    streamed: float
    floor: float
    multiprocessors: int = 1
    reason: str = ""


def _ops() -> Any:
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


def _local(height: int, width: int, worst: bool = False) -> None:
    query, key = _numbers(1, 100, height, width), _numbers(1, 100, height, width).flip(3)
    query = (query.float() + 2).bfloat16() if worst else query
    key = _nearer_and_nearer(query, key) if worst else key
    mask = (key[:, :1] == key[:, :1]).contiguous()
    _ops().local_matching(query, key, mask, [15], 1, None, "ieee")


def _global(queries: tuple[int, int], keys: tuple[int, int], objects: int = 1, worst: bool = False) -> None:
    query, key = _numbers(1, 100, *queries), _numbers(1, 100, 1, *keys).flip(4)
    query = (query.float() + 2).bfloat16() if worst else query
    key = _nearer_and_nearer(query, key) if worst else key
    mask = (key[:, :1] == key[:, :1]).expand(-1, objects, -1, -1, -1).contiguous()
    _ops().global_matching(query, key, mask, 1, None, "ieee")


def _read(queries: int, memory: int, channel_last: bool, worst: bool = False) -> None:
    query, key, value = _numbers(1, 128, queries), _numbers(1, 128, memory), _numbers(1, 1, 512, memory)
    query = (query.float() + 2).bfloat16() if worst else query
    key = _nearer_and_nearer(query, key) if worst else key
    value = value.mT.contiguous().mT if channel_last else value
    _ops().memory_read(query, key, value, None, None, None, 128**-0.5, "ieee")


def _conv(channels: int, out: int) -> None:
    import torch

    last = torch.channels_last
    x = _numbers(1, channels, 15, 27).contiguous(memory_format=last)
    down = _numbers(out, channels, 7, 1).contiguous(memory_format=last)
    across = _numbers(out, channels, 1, 7).contiguous(memory_format=last)
    _ops().global_conv_split(x, down, across, None, None, None, "ieee")


H100_FLOPS, H100_BYTES = 989e12, 3.35e12
PIXELS, PLACES = 120 * 214, 1620

REFERENCES = (
    Reference(
        "local_matching",
        "480p, radius 15, one object",
        "local_matching: one::kernel<BFloat16, 7, 5>",
        lambda worst: _local(64, 64, worst),
        lambda: _local(120, 214),
        lambda blocks: math.ceil(34 / (blocks // (15 * 7))),
        streamed=PIXELS * (2 * 2 * (100 + 112) + 2 * 224 + 8 + 20),
        floor=2 * PIXELS * 31 * 31 * 100 / H100_FLOPS,
        reason="each of a thread's 40 scores takes a comparison and two selections, 1.8 instructions a product "
        "where rows of 100 channels give only 70 products a tile to share them",
    ),
    Reference(
        "global_matching",
        "480p, one object on the whole frame",
        "global_matching: tensor::kernel<BFloat16, 7, true, 0>",
        lambda worst: _global((16, 64), (66, 64), worst=worst),
        lambda: _global((120, 214), (120, 214)),
        lambda blocks: math.ceil(math.ceil(PIXELS / 128) / (blocks // math.ceil(PIXELS / 256))),
        streamed=PIXELS * (2 * 2 * (100 + 112) + 2 * 224 + 8 + 20),
        floor=2 * PIXELS * PIXELS * 100 / H100_FLOPS,
        reason="keys in the worst order give all queries a new best in every tile: each time 16 values a thread are "
        "searched for the best one's key, on which four lanes then agree",
    ),
    *(
        Reference(
            "memory_read",
            f"480p, 20 frames, values {layout}",
            f"memory_read: tensor::kernel<BFloat16, 0, BFloat16, 0, 1, {str(last).lower()}>",
            lambda worst, last=last: _read(64, 6400, last, worst),  # type: ignore[misc]
            lambda last=last: _read(PLACES, 20 * PLACES, last),  # type: ignore[misc]
            lambda blocks: math.ceil(20 * PLACES / 32 / (blocks // math.ceil(PLACES / 64))),
            streamed=21 * PLACES * 128 * 2 * 2,
            floor=2 * PLACES * 20 * PLACES * (128 + 512) / H100_FLOPS,
            reason="keys in the worst order raise the maximum so often that 24 % of the tiles rescale a thread's 128 "
            "sums, 0.4 instructions a product; the softmax of 32 positions takes the rest beside 80 products, and 0.03 "
            "are where the memory that is left out begins and ends",
        )
        for layout, last in (("channel-major", False), ("channel-last", True))
    ),
    Reference(
        "global_conv",
        "4096 channels of 15 x 27, 2 x 256 outputs, channels_last",
        "global_conv: kernel<ByTensorCores<BFloat16, 0, 2> >",
        lambda worst: _conv(512, 64),
        lambda: _conv(4096, 256),
        lambda blocks: math.ceil(128 / (blocks // 8)) * 7,
        streamed=0,
        multiprocessors=4,
        reason="seven tiles share a chunk of x, which leaves a thread three vectors a tile: each row of x is looked up "
        "for its place and whether it is in the map, and the weights' addresses are computed anew for each chunk",
        floor=max(2 * 405 * 4096 * 7 * 512 / H100_FLOPS, (2 * 256 * 4096 * 7 + 405 * 4096) * 2 / H100_BYTES),
    ),
)


# ---- The emulator's traces ----


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def trace(
    run: Callable[[], Any], multiprocessors: int, *, dry: bool, architecture: str = "90"
) -> list[dict[str, Any]]:
    """Return what a call launches on an emulated device; dry: launched only, not run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace"
        more = {"VOSOPS_EMULATOR_DRY": "1"} if dry else {}
        with _environment(
            VOSOPS_EMULATOR_TRACE=str(file),
            VOSOPS_EMULATOR_MULTIPROCESSORS=str(multiprocessors),
            VOSOPS_EMULATOR_ARCH=architecture,
            **more,
        ):
            run()
        return [json.loads(line) for line in file.read_text().splitlines()]


def visited(launches: list[dict[str, Any]]) -> tuple[Visits, int]:
    """Return the visits of the one launch that walks tiles, and its warps."""
    (launch,) = [each for each in launches if TILE in each["visits"]]
    visits = {name: (count, copies) for name, (count, copies) in launch["visits"].items()}
    return visits, launch["blocks"] * launch["threads"] // WARP


def paths() -> dict[str, Any]:
    """Return kernel -> order of the data -> its warps and how often they came where."""
    found: dict[str, Any] = {}
    for reference in REFERENCES:
        for order in ("random", "worst"):
            launches = trace(
                lambda r=reference, o=order: r.small(o == "worst"),  # type: ignore[misc]
                reference.multiprocessors,
                dry=False,
            )
            visits, warps = visited(launches)
            found.setdefault(reference.kernel, {})[order] = {"warps": warps, "visits": visits}
            print(reference.kernel, order, warps, visits, file=sys.stderr)
    return found


MULTIPROCESSORS = (108, 114, 132)


def launches() -> dict[str, Any]:
    """Return kernel -> multiprocessors -> blocks and shared bytes of the launch, and the launches around it."""
    found: dict[str, Any] = {}
    for reference in REFERENCES:
        for count_ in MULTIPROCESSORS:
            all_launched = trace(reference.large, count_, dry=True)
            (main,) = [each for each in all_launched if _is_launch_of(each["kernel"], reference.kernel)]
            found.setdefault(reference.kernel, {})[str(count_)] = {
                "blocks": main["blocks"],
                "shared bytes": main["shared_bytes"],
                "launches": len(all_launched),
            }
    return found


def _is_launch_of(launched: str, kernel: str) -> bool:
    name = kernel.split(": ")[1].split("<")[0].split("::")[-1]
    return launched.strip("()").split("<")[0].split("::")[-1] == name


# ---- Times ----


@dataclass(frozen=True)
class Card:
    """What a multiprocessor does in a cycle, and a card."""

    name: str
    multiprocessors: int
    clock: float
    cycles_of_product: float
    bytes_per_second: float


CARDS = (
    Card("A100", 108, 1.41e9, 8.0, 1.56e12),
    Card("H100 PCIe", 114, 1.755e9, 6.5, 2.0e12),
    Card("H100 SXM", 132, 1.755e9, 6.5, 3.35e12),
)
"""mma.sync with 16 bits: 16 x 8 x 16 in 8 cycles of one of Ampere's four tensor cores, about 6.5 of Hopper's."""

SCHEDULERS, SHARED_BYTES_A_CYCLE, START = 4, 128, 2e-6


def cycles(tile: Tile, card: Card) -> dict[str, float]:
    """Return how long each part of a multiprocessor needs for a warp's tile."""
    return {
        "issue": tile.instructions / SCHEDULERS,
        "products": tile.products * card.cycles_of_product / SCHEDULERS,
        "shared memory": tile.shared_bytes / SHARED_BYTES_A_CYCLE,
    }


def quantisation(blocks_: int, multiprocessors: int, resident: int) -> tuple[int, float]:
    """Return the waves that a grid needs, and how full they are."""
    slots = multiprocessors * resident
    waves = -(-blocks_ // slots)
    return waves, blocks_ / (waves * slots)


@dataclass(frozen=True)
class Prediction:
    """What the model says of a launch on a card: its waves, how full they are, seconds, and what takes them."""

    blocks: int
    waves: int
    full: float
    seconds: float
    bound: str


def predict(
    reference: Reference, tile: Tile, launch: Mapping[str, int], resident: int, card: Card
) -> Prediction:
    """Return the least time of a reference problem on a card."""
    waves, full = quantisation(launch["blocks"], card.multiprocessors, resident)
    each = cycles(tile, card)
    bound = max(each, key=lambda part: each[part])
    busy = waves * resident * WARPS_OF_BLOCK * reference.tiles(launch["blocks"]) * each[bound] / card.clock
    around = reference.streamed / card.bytes_per_second + START * launch["launches"]
    return Prediction(launch["blocks"], waves, full, busy + around, bound)


WARPS_OF_BLOCK = 8
"""Of every kernel of the model."""


def main() -> None:
    """Run the emulator, and write what it counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--paths", action="store_true", help="count how often warps come where")
    parser.add_argument(
        "--launches", action="store_true", help="record what is launched on each size of card"
    )
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for wanted, file, found in ((arguments.paths, PATHS, paths), (arguments.launches, LAUNCHES, launches)):
        if wanted:
            file.write_text(json.dumps(found(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
