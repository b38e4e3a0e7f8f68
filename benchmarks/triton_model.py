"""What Triton's kernels cost on an H100, from their machine code: wgmma, copies and instructions of the hot loop.

    python benchmarks/triton_model.py            counts with the installed Triton and prints
    python benchmarks/triton_model.py --write    also writes benchmarks/results/triton_loops.json

Each kernel is compiled ahead of time for sm_90a (`triton_report`), and the loop that walks over keys is found in what
nvdisasm prints. A step is one round of it, of one program:

    products   multiply-adds of a step / 2048           (16 bits: what a multiprocessor does in a cycle)
    issue      instructions of a warp * warps / 4       (four schedulers issue one instruction a cycle each)

Two bounds of the time: everything that is not a product hides behind the products or they behind it (`overlapped`), or
nothing does (`in turn`). Triton 3.8 waits for the products of a step within the step, so that only other warps can hide
them. Latencies come on top, and what packs and merges is counted as bytes and launches.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import sass, triton_report  # noqa: E402
from benchmarks.cuda_model import CARDS, H100_BYTES, PIXELS, PLACES, SCHEDULERS, START  # noqa: E402
from benchmarks.cuda_problems import CONV  # noqa: E402

LOOPS = ROOT / "benchmarks/results/triton_loops.json"
TARGET = "sm_90"
MULTIPLY_ADDS = 2048
"""Of 16-bit numbers that a multiprocessor of an H100 adds in a cycle."""

PER_HMMA = 2048
"""Multiply-adds of mma.sync.m16n8k16: per this, instructions compare with those of the CUDA C++ kernels."""


@dataclass(frozen=True)
class Loop:
    """A round of a kernel's hot loop.

    Attributes:
        warps: of a program.
        resident: programs on a multiprocessor.
        instructions: of one warp.
        multiply_adds: of a program.
        wgmma: shapes and how often each is there.
        copies: asynchronous ones of one thread, or of the one that asks for whole tiles.
        barriers: at which all warps meet.
    """

    warps: int
    resident: int
    instructions: int
    multiply_adds: int
    wgmma: Mapping[str, int]
    copies: int
    barriers: int

    @property
    def per_hmma(self) -> float:
        """Instructions a warp issues for what one mma.sync multiplies."""
        return self.instructions * self.warps * PER_HMMA / self.multiply_adds

    @property
    def products(self) -> float:
        """Cycles of the tensor cores."""
        return self.multiply_adds / MULTIPLY_ADDS

    @property
    def issue(self) -> float:
        """Cycles in which the schedulers issue."""
        return self.instructions * self.warps / SCHEDULERS


@dataclass(frozen=True)
class Reference:
    """A problem that a kernel's target is for, or a part of it.

    Attributes:
        case: the kernel's name in `triton_report`.
        programs: of the launch on 132 multiprocessors.
        steps: rounds of the loop in the busiest program.
        moved: bytes that the kernels around it read and write.
        launches: of all kernels.
    """

    op: str
    problem: str
    case: str
    programs: int
    steps: int
    moved: float
    launches: int


def _read(frames: int, problem: str, case: str) -> Reference:
    tiles, steps = math.ceil(PLACES / 128) * 2, math.ceil(frames * PLACES / 64)
    parts = 132 // tiles
    walked = math.ceil(steps / parts)
    moved = (2 * parts * 4 + 2) * PLACES * 512
    return Reference("memory_read", problem, case, tiles * parts, walked, moved, 2)


def _line(stage: str, rows: int, channels: int) -> Reference:
    """Return a stage of the global convolution: so many steps of 64 channels of a tap in a tile of 128 x 128."""
    tiles, steps = rows // 128 * math.ceil(405 / 128), 7 * channels // 64
    parts = 132 // tiles
    moved = (2 * parts * 4 + 2) * 405 * rows
    return Reference(
        "global_conv", CONV, f"global conv {stage} bf16", tiles * parts, math.ceil(steps / parts), moved, 2
    )


REFERENCES = (
    _read(20, "480p, 20 frames, values channel-last", "memory read bf16"),
    _read(5, "480p, 5 frames (8100 positions), values channel-major", "memory read bf16, 8100 positions"),
    _read(20, "480p, 20 frames, values channel-last, by descriptors", "memory read bf16 by descriptors"),
    _read(
        20,
        "480p, 20 frames, values channel-major, by descriptors",
        "memory read bf16 by descriptors, channel-major",
    ),
    Reference(
        "global_matching",
        "480p, one object on the whole frame",
        "global match bf16, C=100",
        math.ceil(PIXELS / 256) * 7,
        math.ceil(PIXELS / (7 * 64)),
        PIXELS * (2 * 2 * (100 + 112) + 7 * 8 * 2 + 8 + 20),
        5,
    ),
    Reference(
        "local_matching",
        "480p, radius 15, one object",
        "local match bf16, C=100, radius 15",
        math.ceil(214 / 8) * math.ceil(120 / 16),
        math.ceil((16 + 30) / 8) * 5,
        PIXELS * (2 * 2 * (100 + 112) + 2 * 224 + 8 + 20),
        2,
    ),
    _line("split", 2 * 256, 4096),
    _line("merge", 256, 2 * 256),
)


def seconds(reference: Reference, loop: Loop) -> tuple[float, float]:
    """Return the two bounds of a problem's time on an H100 SXM: overlapped, and in turn."""
    card = CARDS[-1]
    waves = math.ceil(reference.programs / (card.multiprocessors * loop.resident))
    rounds = waves * loop.resident * reference.steps / card.clock
    around = reference.moved / H100_BYTES + reference.launches * START
    bounds = max(loop.products, loop.issue), loop.products + loop.issue
    return bounds[0] * rounds + around, bounds[1] * rounds + around


def hot_loop(body: str) -> list[sass.Instruction]:
    """Return the instructions of the loop with most products: of several with as many, the smallest."""
    graph = sass.blocks(body)
    found = [[i for number in loop for i in graph[number].instructions] for loop in sass.loops(graph)]
    return min(found, key=lambda code: (-_count(code, "HGMMA"), len(code)))


def _count(code: list[sass.Instruction], name: str) -> int:
    return sum(i.name.split(".")[0] == name for i in code)


def examine(case: triton_report.Case, resident: int) -> Loop:
    """Compile a kernel and count."""
    import triton

    compiled, _ = triton_report.compile_case(case, TARGET)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        text = subprocess.run(
            [str(tool), "-c", binary.name], capture_output=True, text=True, check=True
        ).stdout
    (body,) = sass.kernels(text).values()
    code = [i for i in hot_loop(body) if i.name.split(".")[0] != "NOP"]
    sides = [re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", i.name) for i in code]
    shapes = ["m{}n{}k{}".format(*found.groups()) for found in sides if found]
    return Loop(
        case.options["num_warps"],
        resident,
        len(code),
        multiply_adds(case.constants),
        {shape: shapes.count(shape) for shape in sorted(set(shapes))},
        _count(code, "LDGSTS") + _count(code, "UTMALDG"),
        _count(code, "BAR"),
    )


def multiply_adds(constants: Mapping[str, Any]) -> int:
    """Return those of a step: queries by keys by channels, and by value columns in a read."""
    if "BLOCK_V" in constants:
        pairs = int(constants["BLOCK_P"] * constants["BLOCK_M"])
        return pairs * int(constants["BLOCK_C"] + constants["BLOCK_V"])
    sides = ("BLOCK_M", "BLOCK_P") if "MERGE" in constants else ("BLOCK_Q", "BLOCK_K")
    return int(math.prod(constants[side] for side in (*sides, "BLOCK_C")))


def committed() -> tuple[str, dict[str, Loop]]:
    """Return the version of Triton and the loops that were counted with it."""
    found = json.loads(LOOPS.read_text())
    return found["triton"], {case: Loop(**loop) for case, loop in found["loops"].items()}


def main() -> None:
    """Count and print, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {LOOPS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    import triton

    version = triton_report.release(triton.__version__)
    rows = triton_report.from_json((triton_report.TABLES / f"{version}.json").read_text())[1]
    resident = {row.case: row.occupancy for row in rows if row.target == TARGET}
    cases = {case.name: case for case in triton_report.cases(TARGET)}
    loops = {r.case: examine(cases[r.case], resident[r.case]) for r in REFERENCES}
    text = json.dumps(
        {"triton": version, "loops": {case: asdict(loop) for case, loop in loops.items()}}, indent=1
    )
    print(text)
    if arguments.write:
        LOOPS.write_text(text + "\n")


if __name__ == "__main__":
    main()
