"""What nvcc makes of every CUDA kernel, without a GPU: registers, spills, occupancy, instructions.

    python benchmarks/cuda_report.py                          the table as Markdown
    python benchmarks/cuda_report.py --write                  and as benchmarks/results/cuda/VERSION.json
    python benchmarks/cuda_report.py --check                  fail where this nvcc's table says something else
    python benchmarks/cuda_report.py --targets sm_90a         fewer targets (sm_120 is never committed or checked)
    python benchmarks/cuda_report.py --targets sm_90a --built --check     what the library in vosops/ holds
    python benchmarks/cuda_report.py --write --raise-limits   and let limits of hot loops rise

Warnings are errors. What nvcc makes of a kernel is a fact about one version of nvcc, so each version has its own
committed table. An nvcc without a table is held to bounds that any useful code keeps, and the report says so.

Shared memory is chosen at the launch, which checks it against the device's limit, so that occupancy is given in two
numbers: `blocks`, the blocks that registers and threads let a multiprocessor hold, and `room`, the shared memory in
bytes that each of so many blocks may have at most. A kernel that asks for more holds fewer.

`--built` compiles nothing: it reads the cubins of vosops/libvosops_cuda.so, built from the same sources for these
targets (TORCH_CUDA_ARCH_LIST=9.0a) with source lines (VOSOPS_LINE_INFO=1).

Of the kernels in `cuda_model.REFERENCES` the table also has what a warp does for one tile, slow paths included (see
there), with the worst data and with usual data, and limits: the goals of `cuda_model.GOALS`, or what was reached where
a goal is not met, for the reason that the reference gives. A kernel that crosses its limit fails the check; backward
kernels have none.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_model, sass  # noqa: E402
from vosops._sources import digest  # noqa: E402

TABLES = ROOT / "benchmarks/results/cuda"
"""A table for each version of nvcc, named by it."""

LIBRARY = ROOT / "vosops/libvosops_cuda.so"

TARGETS = ("sm_80", "sm_90a", "sm_100")
REPORT_ONLY = ("sm_120",)


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds, and the shared memory that one block may have, in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_of_block: int
    registers: int = 65536


LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10, 163 << 10),
    "sm_90a": Limits(64, 32, 228 << 10, 227 << 10),
    "sm_100": Limits(64, 32, 228 << 10, 227 << 10),
    "sm_120": Limits(48, 24, 100 << 10, 99 << 10),
}
WARP, REGISTER_GRANULE, WARP_GRANULE, RESERVED_SHARED, SHARED_GRANULE = 32, 256, 4, 1 << 10, 128
"""Threads of a warp; registers and warps are given out in these pieces; shared memory that each block costs besides."""

MOST_SPILLED = 64
"""Bytes that one thread may keep in local memory, and instructions that may touch it, where no table says what is
usual."""

COMPILE_SECONDS, TOOL_SECONDS = 1200, 120
HOT_SOURCES = {reference.kernel.split(":")[0] for reference in cuda_model.REFERENCES}
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "LDGSTS": r"\bLDGSTS\b",
    "128-bit loads": r"LD[GS]\S*\.128",
}


FIGURES = [
    *("registers", "threads", "blocks", "occupancy", "room", "stack", "spills", "shared"),
    *INSTRUCTIONS,
]
"""What a row tells of a kernel, in the order of the tables."""

HOT, USUAL = "tile", "usual tile"
"""What it also tells of a reference kernel: a warp's work for one tile, see `cuda_model.Tile`, with data in the worst
order and in random order."""

HotLimits = dict[str, dict[str, float]]
"""Reference kernel -> figure of its tiles -> the most that it may be."""


def tool(name: str) -> str | Path:
    """One of the CUDA binary tools: from the PATH, or as it comes with Triton."""
    found = shutil.which(name)
    if found:
        return found
    try:
        import triton
    except ImportError:
        raise SystemExit(f"{name} is neither on the PATH nor is there a Triton that brings it") from None
    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def compile_source(source: Path, target: str, folder: Path) -> Path:
    """Return a cubin of one .cu file for one target; raises SystemExit with the compiler's words."""
    include = Path(torch.__file__).parent / "include"
    cubin = folder / f"{source.stem}.{target}.cubin"
    command = ["nvcc", "-cubin", f"-arch={target}", "-O3", "-std=c++20", "--Werror", "all-warnings"]
    command += ["-lineinfo"] if source.stem in HOT_SOURCES else []  # which changes no instruction
    command += ["--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY", f"-I{ROOT / 'csrc'}"]
    command += [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{include}",
        f"-I{include}/torch/csrc/api/include",
    ]
    command += [
        "-D__CUDA_NO_HALF_OPERATORS__",
        "-D__CUDA_NO_HALF_CONVERSIONS__",
        "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    ]
    result = subprocess.run(
        [*command, "-o", str(cubin), str(source)], capture_output=True, text=True, timeout=COMPILE_SECONDS
    )
    if result.returncode:
        raise SystemExit(f"{source.name} does not compile for {target}:\n{result.stderr}")
    return cubin


def compiled_cubins(targets: list[str], folder: Path) -> list[tuple[str, str, Path]]:
    """Return target, source and cubin of every .cu file, compiled two at a time."""
    jobs = [(target, source) for target in targets for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        cubins = pool.map(lambda job: compile_source(job[1], job[0], folder), jobs)
        return [(target, source.stem, cubin) for (target, source), cubin in zip(jobs, cubins, strict=True)]


def short_name(demangled: str) -> str:
    """Return the kernel and its template arguments, without return type, namespaces and parameters."""
    name = re.sub(r"\((anonymous namespace|unnamed namespace)\)::|<unnamed>::", "", demangled)
    name = re.sub(r"\b(vosops|cuda|c10|torch|headeronly)::", "", name)
    name = re.sub(r"\([\w: ]+\)(?=-?\d)", "", name)  # the types of template arguments, of enumerations too
    return re.sub(r"^void ", "", name).split("(")[0].strip()


def output_of(*command: str | Path, folder: Path | None = None) -> str:
    """Return what a tool prints, which runs in a folder."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=TOOL_SECONDS, cwd=folder
    )
    return done.stdout


def resident_blocks(registers: int, threads: int, limits: Limits) -> int:
    """Return how many blocks a multiprocessor holds as far as registers and threads go."""
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // REGISTER_GRANULE) * REGISTER_GRANULE
    warps_by_registers = limits.registers // per_warp // WARP_GRANULE * WARP_GRANULE
    return min(limits.blocks, limits.warps // warps, warps_by_registers // warps)


def resident_with(blocks: int, shared_bytes: int, limits: Limits) -> int:
    """Return how many blocks of so much shared memory a multiprocessor holds, of `blocks` that registers allow."""
    return max((n for n in range(1, blocks + 1) if shared_room(n, limits) >= shared_bytes), default=0)


def shared_room(blocks: int, limits: Limits) -> int:
    """Return the shared memory in bytes available to each of `blocks` blocks on a multiprocessor."""
    if blocks == 0:
        return 0
    each = limits.shared // blocks // SHARED_GRANULE * SHARED_GRANULE - RESERVED_SHARED
    return min(each, limits.shared_of_block)


def target_of(architecture: str) -> str:
    """Return the target that an entry of TORCH_CUDA_ARCH_LIST compiles for: sm_90a for 9.0a, sm_120 for 12.0+PTX."""
    return "sm_" + architecture.removesuffix("+PTX").replace(".", "")


def source_of(symbols: str) -> str | None:
    """Return the .cu file, without its suffix, whose unnamed namespace mangled names are in; None for none."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}_", symbols)
    return found[1] if found else None


def why_not_built(build: dict[str, str], sources: str, targets: list[str]) -> list[str]:
    """Return why a library of this build information cannot stand for these sources and targets."""
    held = [target_of(each) for each in re.split(r"[; ]+", build.get("cuda_architectures", "")) if each]
    reasons = [
        f"it holds {', '.join(held) or 'nothing'}, not {target}" for target in targets if target not in held
    ]
    if build.get("sources") != sources:
        reasons.append(f"it was built from other sources ({build.get('sources')}, here {sources})")
    return reasons


def built_cubins(targets: list[str], folder: Path) -> list[tuple[str, str, Path]]:
    """Return target, source and cubin of what the built library holds; raises SystemExit where it does not serve."""
    information = LIBRARY.parent / "build_info.json"
    reasons = ["there is none"] if not (LIBRARY.exists() and information.exists()) else []
    reasons = reasons or why_not_built(json.loads(information.read_text()), digest(ROOT), targets)
    if reasons:
        raise SystemExit(f"{LIBRARY.relative_to(ROOT)} cannot be examined: {'; '.join(reasons)}")
    output_of(tool("cuobjdump"), "-xelf", "all", LIBRARY, folder=folder)
    found = []
    for cubin in sorted(folder.glob("*.cubin")):
        target = cubin.name.split(".")[-2]
        source = source_of(output_of(tool("cuobjdump"), "--dump-resource-usage", cubin))
        if source and target in targets:
            found.append((target, source, cubin))
    return found


def examine(cubin: Path, source: str, target: str) -> dict[str, dict[str, Any]]:
    """Return kernel name -> resources, occupancy and instruction counts of a source's cubin."""
    usage = output_of(tool("cuobjdump"), "--dump-resource-usage", cubin)
    assembly = output_of(tool("nvdisasm"), "-c", *(["-gi"] if source in HOT_SOURCES else []), cubin)
    # A section for each kernel, with the block size that its launch bounds allow.
    sections = output_of(tool("cuobjdump"), "-elf", cubin)
    threads = {
        name: math.prod(int(size, 16) for size in sizes.split())
        for name, sizes in re.findall(
            r"^\.nv\.info\.(\S+)$(?:(?!^\.nv\.info\.).)*?EIATTR_MAX_THREADS\s+Format:\s*\S+\s+Value:\s*([^\n]+)",
            sections,
            re.MULTILINE | re.DOTALL,
        )
    }
    limits = LIMITS[target]
    bodies = sass.kernels(assembly)
    hot = cuda_model.known_paths()
    rows = {}
    for mangled, figures in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        if "REG:" not in figures:
            continue
        values = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", figures)}
        body = bodies.get(mangled, "")
        blocks = resident_blocks(values["REG"], threads[mangled], limits)
        name = short_name(output_of("c++filt", mangled))
        rows[name] = {
            "registers": values["REG"],
            "threads": threads[mangled],
            "blocks": blocks,
            "occupancy": round(blocks * threads[mangled] / WARP / limits.warps, 3),
            "room": shared_room(blocks, limits),
            "stack": values["STACK"],
            "spills": values.get("LOCAL", 0) + len(re.findall(r"\b(?:LDL|STL)\b", body)),
            "shared": values["SHARED"],
            **{label: len(re.findall(pattern, body)) for label, pattern in INSTRUCTIONS.items()},
        }
        if (kernel := f"{source}: {name}") in hot:
            if "//## File" not in body:
                raise SystemExit(f"{kernel} has no source lines: build with VOSOPS_LINE_INFO=1")
            unit = cuda_model.reference_of(kernel).unit
            rows[name][HOT] = vars(cuda_model.worst(body, hot[kernel], unit))
            rows[name][USUAL] = vars(cuda_model.usual(body, hot[kernel], unit))
    return rows


Table = dict[str, dict[str, dict[str, Any]]]
"""Target -> kernel -> figures."""


def report(targets: list[str], *, built: bool = False) -> Table:
    """Return target -> kernel -> figures, for every kernel of the library."""
    table: Table = {target: {} for target in targets}
    with tempfile.TemporaryDirectory() as folder:
        cubins = built_cubins(targets, Path(folder)) if built else compiled_cubins(targets, Path(folder))
        for target, source, cubin in cubins:
            rows = examine(cubin, source, target)
            table[target] |= {f"{source}: {name}": row for name, row in rows.items()}
    return table


def to_markdown(table: Table) -> str:
    """Return one row per target and kernel."""
    lines = ["| target | kernel | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 2) + "|"]
    for target, kernels in table.items():
        for name, row in sorted(kernels.items()):
            lines.append(f"| {target} | `{name}` | " + " | ".join(str(row[c]) for c in FIGURES) + " |")
    lines += ["", "| target | tiles of | " + " | ".join(cuda_model.HOT_FIGURES) + " |", "|---" * 5 + "|"]
    for target, kernels in table.items():
        for name, row in sorted(kernels.items()):
            if HOT in row:
                figures = cuda_model.Tile(**row[HOT]).figures()
                lines.append(f"| {target} | `{name}` | " + " | ".join(map(in_words, figures.values())) + " |")
    return "\n".join(lines)


def in_words(figure: float) -> str:
    """Return a figure of a tile, or a dash for what it has none of."""
    return "-" if math.isnan(figure) else str(figure)


def hot_limits(table: Table, before: HotLimits, *, may_rise: bool) -> HotLimits:
    """Return limits for the tiles of a table: goals where they are met, else the figures; never above those before."""
    found: HotLimits = {}
    for rows in table.values():
        for name, row in rows.items():
            if HOT not in row or name not in cuda_model.LIMITED:
                continue
            figures = cuda_model.Tile(**row[HOT]).figures()
            for figure, goal in cuda_model.GOALS.items():
                most = found.setdefault(name, {}).get(figure, goal)
                found[name][figure] = max(most, figures[figure])
    for name, limits in found.items():
        for figure, limit in limits.items():
            if not may_rise:
                limits[figure] = min(limit, before.get(name, {}).get(figure, limit))
    return found


def crossed(table: Table, limits: HotLimits) -> list[str]:
    """Return which kernels cross the limits of their tiles."""
    return [
        f"{target} {name}: {figure} {value} is over the limit of {limits[name][figure]}"
        for target, rows in table.items()
        if target not in REPORT_ONLY
        for name, row in rows.items()
        if HOT in row and name in limits
        for figure, value in cuda_model.Tile(**row[HOT]).figures().items()
        if value > limits[name].get(figure, math.inf)
    ]


def to_json(nvcc: str, table: Table, limits: HotLimits | None = None) -> str:
    """Return a table to be committed: a line for each kernel, with a list of figures for each target."""
    kept = {target: rows for target, rows in table.items() if target not in REPORT_ONLY}
    kernels = sorted({name for rows in kept.values() for name in rows})
    lines = [
        f"  {json.dumps(name)}: "
        + json.dumps({t: [rows[name][f] for f in FIGURES] for t, rows in kept.items() if name in rows})
        for name in kernels
    ]
    body = ",\n".join(lines)
    head = f'"nvcc": {json.dumps(nvcc)},\n "figures": {json.dumps(FIGURES)}'

    def tiles_of(kind: str) -> str:
        tiles = {
            name: {
                t: list(rows[name][kind].values()) for t, rows in kept.items() if kind in rows.get(name, {})
            }
            for name in kernels
            if any(kind in rows.get(name, {}) for rows in kept.values())
        }
        return ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in tiles.items())

    bounds = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(most)}" for name, most in sorted((limits or {}).items())
    )
    sections = {"kernels": body, "tiles": tiles_of(HOT), "usual tiles": tiles_of(USUAL), "limits": bounds}
    written = ",\n".join(f' "{name}": {{\n{lines}\n }}' for name, lines in sections.items())
    return f"{{\n {head},\n{written}\n}}\n"


def limits_of(text: str) -> HotLimits:
    """Return the limits of the tiles of a table."""
    limits: HotLimits = json.loads(text).get("limits", {})
    return limits


def from_json(text: str) -> tuple[str, Table]:
    """Return the version and the rows of a table."""
    written = json.loads(text)
    table: Table = {}
    for name, of_targets in written["kernels"].items():
        for target, figures in of_targets.items():
            table.setdefault(target, {})[name] = dict(zip(written["figures"], figures, strict=True))
    for section, kind in (("tiles", HOT), ("usual tiles", USUAL)):
        for name, of_targets in written.get(section, {}).items():
            for target, figures in of_targets.items():
                table[target][name][kind] = vars(cuda_model.Tile(*figures))
    return written["nvcc"], table


def table_of(nvcc: str) -> Path | None:
    """Return the committed table of a version of nvcc, if it has one."""
    path = TABLES / f"{nvcc}.json"
    return path if path.exists() else None


def out_of_bounds(table: Table) -> list[str]:
    """Return what no version of nvcc may do: spill much, or make a kernel that fits on no multiprocessor."""
    found = []
    for target in table.keys() - set(REPORT_ONLY):
        for name, row in table[target].items():
            if max(row["spills"], row["stack"]) > MOST_SPILLED:
                found.append(f"{target} {name}: spills {row['spills']}, stack {row['stack']}")
            if row["blocks"] < 1:
                found.append(f"{target} {name}: {row['registers']} registers let no block run")
    return found


def problems(nvcc: str, table: Table) -> list[str]:
    """Return what is wrong with the rows: bounds that do not hold and, where there is a table, what differs from it."""
    committed = table_of(nvcc)
    if not committed:
        return out_of_bounds(table)
    text = committed.read_text()
    return out_of_bounds(table) + crossed(table, limits_of(text)) + differences(table, from_json(text)[1])


def held_against(nvcc: str) -> str:
    """Return what the rows of a version of nvcc are compared with, in words."""
    table = table_of(nvcc)
    if table:
        return f"compared with {table.relative_to(ROOT)}"
    known = ", ".join(path.stem for path in sorted(TABLES.glob("*.json"))) or "no version"
    return (
        f"nvcc {nvcc} has no table (there are {known}), so its kernels were held to bounds only: at most "
        f"{MOST_SPILLED} bytes spilled, and a block fits. `python benchmarks/cuda_report.py --write` makes one"
    )


def nvcc_version() -> str:
    """Return the release of the compiler on the PATH."""
    found = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
    return found[1] if found else "unknown"


def differences(table: Table, committed: Table) -> list[str]:
    """Return where a table and the committed one disagree, in words, on the targets that both are to have."""
    found = []
    for target in table:
        if target in REPORT_ONLY:
            continue
        before, now = committed.get(target, {}), table[target]
        found += [
            f"{target} {name}: {before.get(name)} -> {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
    return found


def main() -> None:
    """Compile, print, and write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=LIMITS, default=list(TARGETS))
    parser.add_argument("--write", action="store_true", help="write the table of this version of nvcc")
    parser.add_argument(
        "--raise-limits", action="store_true", help="with --write: let limits of hot loops rise"
    )
    parser.add_argument("--check", action="store_true", help="compare with the table of this version of nvcc")
    parser.add_argument(
        "--built", action="store_true", help="compile nothing: examine vosops/libvosops_cuda.so"
    )
    arguments = parser.parse_args()
    if arguments.write and not set(TARGETS) <= set(arguments.targets):
        parser.error(f"a table holds {', '.join(TARGETS)}: --write goes without --targets")
    table, nvcc = report(arguments.targets, built=arguments.built), nvcc_version()
    print(to_markdown(table))
    if arguments.write:
        TABLES.mkdir(exist_ok=True)
        before = table_of(nvcc)
        known = limits_of(before.read_text()) if before else {}
        limits = hot_limits(table, known, may_rise=arguments.raise_limits)
        (TABLES / f"{nvcc}.json").write_text(to_json(nvcc, table, limits))
    found = out_of_bounds(table)
    if arguments.check:
        found = problems(nvcc, table)
        print(held_against(nvcc), file=sys.stderr)
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
