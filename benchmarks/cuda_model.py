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

A kernel without HMMA multiplies by FFMA, which are its products. Loops that the compiler unrolls as it likes begin
with VISIT_LOADS(...), and their copies are counted by the loads. Of a division of 64-bit numbers counts what it does
where 32 bits hold them, of a warp-wide operation what it does where all lanes are there.

The time of a launch is at least

    blocks of a multiprocessor * warps * tiles of a warp * max(issue, products, shared memory) / clock
    issue           instructions of a warp's tile / 4            (four schedulers issue one instruction a cycle each)
    products        products of a warp's tile * cycles of one / 4    (a tensor core for each scheduler)
    shared memory   bytes of a warp's tile / 128, with those that go through the first-level cache

where `tiles of a warp` are those of the block that has most, and `blocks` those of the multiprocessor that has most; or
the bytes that the kernel must move over the card's bandwidth, if that takes longer. Latencies come on top; so do the
copies around the kernel, which are counted as bytes over the bandwidth, and START seconds for each launch. PyTorch's
kernels count as their operations at the data sheet's rate or their bytes, whichever takes longer, and launches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cuda_problems import (  # noqa: E402
    CARDS,
    H100_BYTES,
    H100_FLOPS,
    PIXELS,
    PLACES,
    REFERENCES,
    TILE,
    Card,
    Library,
    Reference,
)
from benchmarks.sass import Block, Region, blocks, loops, regions  # noqa: E402

__all__ = ["CARDS", "H100_BYTES", "H100_FLOPS", "PIXELS", "PLACES", "REFERENCES", "TILE"]
__all__ += ["Card", "Library", "Reference"]

RESULTS = ROOT / "benchmarks/results/cuda_model"
PATHS, LAUNCHES = RESULTS / "paths.json", RESULTS / "launches.json"
HOT_FIGURES = ("instructions per product", "instructions per copy", "bytes per FLOP")
GOALS = {"instructions per product": 5.0, "instructions per copy": 12.0}
LIMITED = {reference.kernel for reference in REFERENCES if reference.limited}
"""Kernels whose tiles have limits."""

FLOPS = {"HMMA.16816": 4096, "HMMA.1688": 2048, "FFMA2": 128, "FFMA": 64}
WARP = 32


@dataclass(frozen=True)
class Tile:
    """What a warp does for one tile; copies are those of 16 bytes, copy instructions those that make them.

    Cached bytes go through the first-level cache, where a warp's instruction takes those of 128 at least.
    """

    instructions: float
    products: float
    copies: float
    copy_instructions: float
    shared_bytes: float
    flops: float
    cached_bytes: float = 0

    def figures(self) -> dict[str, float]:
        """Return the ratios that are kept in tables; those of nothing are not a number."""
        return {
            "instructions per product": _ratio(self.instructions, self.products, 2),
            "instructions per copy": _ratio(self.copy_instructions, self.copies, 1),
            "bytes per FLOP": _ratio(self.shared_bytes, self.flops, 4),
        }

    @property
    def by_fma(self) -> bool:
        """Whether its products are FFMA."""
        return self.flops <= FLOPS["FFMA"] * self.products


def _ratio(much: float, of: float, digits: int) -> float:
    return round(much / of, digits) if of else math.nan


# ---- Counting ----

Visits = Mapping[str, tuple[int, int]]
"""Name of a block of source code -> how often warps came there, and how many copies unrolled loops make of it."""


def source_regions() -> list[Region]:
    """Return the counted blocks of all kernels' sources."""
    files = sorted((ROOT / "csrc/cuda").glob("*.cu*"))
    return [region for file in files for region in regions(file.name, file.read_text())]


def count(body: str, known: list[Region], visits: Visits, warps: int, unit: str = TILE) -> Tile:
    """Return a warp's work for one tile of a kernel that `warps` warps ran with these visits, and no others.

    A tile is a visit of the block of source code that `unit` names.
    """
    by_line: dict[tuple[str, int], Region] = {}
    for region in sorted(known, key=lambda r: r.first - r.last):  # the inner ones last
        by_line |= {(region.file, line): region for line in range(region.first, region.last + 1)}
    tiles = visits[unit][0]
    once = warps / tiles
    graph = blocks(body)
    all_loops = loops(graph)
    looped = set().union(*all_loops)
    names = [
        [_region_of(instruction.lines, by_line) for instruction in block.instructions] for block in graph
    ]
    owners = [Counter(of_block).most_common(1)[0][0] for of_block in names]
    tile_loop = _tile_loop(graph, all_loops, owners, unit)
    inside = set().union(*(names[number] for number in tile_loop))
    run = _usually_reached(graph)
    loads: Counter[str | None] = Counter()
    for number in run:
        loads[owners[number]] += _global_loads(graph[number])
    total: Counter[str] = Counter()
    for number, (block, owner) in enumerate(zip(graph, owners, strict=True)):
        visits_, copies = visits.get(owner, (0, 1)) if owner else (warps, 1)
        if copies < 0:  # loads of a copy
            weight = visits_ / max(loads[owner] / -copies, 1) / tiles
        else:
            weight = visits_ / copies / tiles
        if number not in run:
            weight = 0
        elif number not in looped and copies > 0:
            weight = min(weight, once)
        elif number not in tile_loop and owner in inside and copies > 0:
            weight *= once  # the same code before the first tile, or behind the last
        for what, much in _work(block, names[number]).items():
            total[what] += weight * much
    kind = "HMMA" if total["HMMA"] else "FFMA"
    return Tile(
        total["instructions"],
        total[kind],
        total["copies"],
        total["copy instructions"],
        total["bytes"],
        total[f"{kind} flops"],
        total["cached bytes"],
    )


def _global_loads(block: Block) -> int:
    return sum(instruction.name.split(".")[0] in ("LDG", "LDGSTS") for instruction in block.instructions)


def _usually_reached(graph: list[Block]) -> set[int]:
    """Return the blocks that run where no 64-bit division calls its subroutine and warps do not come apart."""
    found: set[int] = set()
    waiting = [0]
    while waiting:
        number = waiting.pop()
        instructions = graph[number].instructions
        if number in found or any(_divides(instruction.text) for instruction in instructions):
            continue
        found.add(number)
        # Lanes that are apart would meet again where this goes.
        apart = bool(instructions) and instructions[-1].name.startswith("BRA.DIV")
        waiting += {number + 1} if apart else graph[number].following
    return found


def _divides(text: str) -> bool:
    return "CALL" in text and any(f"__cuda_sm20_{kind}" in text for kind in ("div", "rem"))


def known_paths() -> dict[str, Any]:
    """Return what `--paths` counted of each reference kernel."""
    found: dict[str, Any] = json.loads(PATHS.read_text()) if PATHS.exists() else {}
    return found


def worst(body: str, orders: Mapping[str, Any], unit: str = TILE) -> Tile:
    """Return a warp's tile with the order of the data for which it takes most instructions, rounded."""
    known = source_regions()
    tiles = [count(body, known, counted["visits"], counted["warps"], unit) for counted in orders.values()]
    return _rounded(max(tiles, key=lambda tile: tile.instructions))


def usual(body: str, orders: Mapping[str, Any], unit: str = TILE) -> Tile:
    """Return a warp's tile with data in random order, rounded."""
    counted = orders["random"]
    return _rounded(count(body, source_regions(), counted["visits"], counted["warps"], unit))


def _rounded(tile: Tile) -> Tile:
    return Tile(**{name: round(value, 2) for name, value in vars(tile).items()})


def reference_of(kernel: str) -> Reference:
    """Return the reference of a kernel by its name in the tables."""
    (found,) = [reference for reference in REFERENCES if reference.kernel == kernel]
    return found


def _tile_loop(
    graph: list[Block], all_loops: list[set[int]], owners: list[str | None], unit: str
) -> set[int]:
    """Return the smallest machine loop that has most of the tile's code that is in any, if that is a quarter of it.

    No loop has, where each warp has one tile.
    """
    sizes = {n: len(block.instructions) for n, block in enumerate(graph) if owners[n] == unit}
    looped = set().union(*all_loops)
    least = max(sum(size for n, size in sizes.items() if n in looped) / 2, sum(sizes.values()) / 4)
    for loop in sorted(all_loops, key=len):
        if sum(size for number, size in sizes.items() if number in loop) > least:
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
        if kind in ("HMMA", "FFMA", "FFMA2"):
            flops = next(flops for prefix, flops in FLOPS.items() if name.startswith(prefix))
            total[kind[:4]] += flops // FLOPS["FFMA"] if kind != "HMMA" else 1
            total[f"{kind[:4]} flops"] += flops
        total["copies"] += kind == "LDGSTS" and ".128" in name
        if kind in ("LDS", "STS", "LDGSTS", "LDSM") and not instruction.never_runs:
            total["bytes"] += _shared_bytes(kind, name)
        if kind in ("LDG", "STG"):
            total["cached bytes"] += _shared_bytes(kind, name)
    return total


def _shared_bytes(kind: str, name: str) -> int:
    if kind == "LDSM":
        return 128 * int(name[-1] if name[-1] in "24" else 1)
    return WARP * (16 if ".128" in name else 8 if ".64" in name else 4)


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
    """Return the visits of some launches of one kernel, and their warps."""
    visits: dict[str, tuple[int, int]] = {}
    for launch in launches:
        for name, (much, copies) in launch["visits"].items():
            visits[name] = (visits.get(name, (0, copies))[0] + much, copies)
    return visits, sum(launch["blocks"] * launch["threads"] // WARP for launch in launches)


def paths() -> dict[str, Any]:
    """Return kernel -> order of the data -> its warps and how often they came where."""
    found: dict[str, Any] = {}
    for reference in REFERENCES:
        for order in reference.orders:
            launches = trace(
                lambda r=reference, o=order: r.small(o == "worst"),  # type: ignore[misc]
                reference.multiprocessors,
                dry=False,
                architecture=reference.architecture,
            )
            visits, warps = visited(launches_for(reference, launches))
            found.setdefault(reference.kernel, {})[order] = {"warps": warps, "visits": visits}
            print(reference.kernel, order, warps, visits, file=sys.stderr)
    return found


def launches(multiprocessors: Container[int] = range(1024)) -> dict[str, Any]:
    """Return kernel -> multiprocessors of each of its cards -> its launches' blocks, what one has, and how many count.

    A launch of the call that no reference stands for counts for the first reference of the problem.
    """
    found: dict[str, Any] = {}
    calls: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for reference in REFERENCES:
        for count_ in [c.multiprocessors for c in reference.cards if c.multiprocessors in multiprocessors]:
            call = (reference.op, reference.problem, count_)
            first = call not in calls
            if first:
                calls[call] = trace(reference.large, count_, dry=True, architecture=reference.architecture)
            mine = launches_for(reference, calls[call])
            others = [r for r in parts(reference) if r is not reference]
            theirs = sum(len(launches_for(other, calls[call])) for other in others)
            found.setdefault(reference.kernel, {})[str(count_)] = {
                "blocks": [launch["blocks"] for launch in mine],
                "threads": mine[0]["threads"],
                "shared bytes": mine[0]["shared_bytes"],
                "launches": len(calls[call]) - theirs if first else len(mine),
            }
    return found


def parts(reference: Reference) -> list[Reference]:
    """Return the kernels of a reference's problem, of which it is one."""
    return [r for r in REFERENCES if (r.op, r.problem) == (reference.op, reference.problem)]


def launches_for(reference: Reference, launched: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the launches of a call that a reference stands for."""
    named = [launch for launch in launched if _short(launch["kernel"]) == reference.short_kernel]
    return [launch for number, launch in enumerate(named) if reference.mine(number)]


def _short(launched: str) -> str:
    return launched.strip("()").split("<")[0].split("::")[-1]


# ---- Times ----


SCHEDULERS, SHARED_BYTES_A_CYCLE, START = 4, 128, 2e-6


def cycles(tile: Tile, card: Card) -> dict[str, float]:
    """Return how long each part of a multiprocessor needs for a warp's tile."""
    each = card.cycles_of_fma if tile.by_fma else card.cycles_of_product
    return {
        "issue": tile.instructions / SCHEDULERS,
        "products": tile.products * each / SCHEDULERS,
        "shared memory": (tile.shared_bytes + tile.cached_bytes) / SHARED_BYTES_A_CYCLE,
    }


def quantisation(blocks_: int, multiprocessors: int, resident: int) -> tuple[int, float]:
    """Return the waves that a grid needs, and how full they are."""
    slots = multiprocessors * resident
    waves = -(-blocks_ // slots)
    return waves, blocks_ / (waves * slots)


@dataclass(frozen=True)
class Prediction:
    """What the model says of a problem on a card: its waves, how full they are, seconds, and what takes them.

    `blocks`, `waves` and `full` are of the first launch.
    """

    blocks: int
    waves: int
    full: float
    seconds: float
    bound: str


def predict(
    reference: Reference, tile: Tile, launch: Mapping[str, Any], resident: int, card: Card
) -> Prediction:
    """Return the least time of a reference problem on a card."""
    first = launch["blocks"][0]
    waves, full = quantisation(first, card.multiprocessors, resident)
    each = cycles(tile, card)
    bound = max(each, key=lambda part: each[part])
    tiles = sum(
        -(-blocks_ // card.multiprocessors) * reference.tiles(blocks_, number)
        for number, blocks_ in zip(
            _numbers_of(reference, len(launch["blocks"])), launch["blocks"], strict=True
        )
    )
    busy = tiles * launch["threads"] / WARP * each[bound] / card.clock
    moving = reference.moved / card.bytes_per_second
    around = reference.streamed / card.bytes_per_second + START * launch["launches"]
    if moving > busy:
        return Prediction(first, waves, full, moving + around, "memory")
    return Prediction(first, waves, full, busy + around, bound)


def library_seconds(library: Library, card: Card) -> float:
    """Return the least time of PyTorch's kernels on a card."""
    work = max(library.flops / card.flops, library.moved / card.bytes_per_second)
    return work + START * library.launches


def floor_of(references: Sequence[Reference]) -> float:
    """Return the floor of a problem, of all its kernels."""
    libraries = sum(library.floor for reference in references for library in reference.libraries)
    return references[0].whole or libraries + sum(reference.floor for reference in references)


def _numbers_of(reference: Reference, count_: int) -> list[int]:
    """Return the numbers, among all launches of this name, of those that the reference stands for."""
    mine = (number for number in itertools.count() if reference.mine(number))
    return list(itertools.islice(mine, count_))


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
