"""What nvcc makes of every CUDA kernel, without a GPU: registers, spills, occupancy, instructions.

    python benchmarks/cuda_report.py                          the table as Markdown
    python benchmarks/cuda_report.py --write table.json       and as JSON, to be committed
    python benchmarks/cuda_report.py --check table.json       fail where the committed table says something else
    python benchmarks/cuda_report.py --targets sm_90a         fewer targets (sm_120 is never committed or checked)

Warnings are errors, and a spilled register fails the report. The committed table holds for one version of nvcc;
with another nothing is compared.

Shared memory is chosen at the launch, which checks it against the device's limit, so that occupancy is given in two
numbers: `blocks`, the blocks that registers and threads let a multiprocessor hold, and `room`, the shared memory in
bytes that each of so many blocks may have at most. A kernel that asks for more holds fewer.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
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

COMPILE_SECONDS, TOOL_SECONDS = 1200, 120
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "LDGSTS": r"\bLDGSTS\b",
    "128-bit loads": r"LD[GS]\S*\.128",
}


def tool(name: str) -> Path:
    """One of the CUDA binary tools that come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def compile_source(source: Path, target: str, folder: Path) -> Path:
    """A cubin of one .cu file for one target; raises SystemExit with the compiler's words."""
    include = Path(torch.__file__).parent / "include"
    cubin = folder / f"{source.stem}.{target}.cubin"
    command = ["nvcc", "-cubin", f"-arch={target}", "-O3", "-std=c++20", "--Werror", "all-warnings"]
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


def short_name(demangled: str) -> str:
    """The kernel and its template arguments, without return type, namespaces and parameters."""
    name = re.sub(r"\((anonymous namespace|unnamed namespace)\)::|<unnamed>::", "", demangled)
    name = re.sub(r"\b(vosops|cuda|c10|torch|headeronly)::", "", name)
    name = re.sub(r"\([\w: ]+\)(?=-?\d)", "", name)  # the types of template arguments, of enumerations too
    return re.sub(r"^void ", "", name).split("(")[0].strip()


def output_of(*command: str | Path) -> str:
    """What a tool prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TOOL_SECONDS).stdout


def resident_blocks(registers: int, threads: int, limits: Limits) -> int:
    """How many blocks a multiprocessor holds as far as registers and threads go."""
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // REGISTER_GRANULE) * REGISTER_GRANULE
    warps_by_registers = limits.registers // per_warp // WARP_GRANULE * WARP_GRANULE
    return min(limits.blocks, limits.warps // warps, warps_by_registers // warps)


def shared_room(blocks: int, limits: Limits) -> int:
    """The most shared memory that each of so many blocks on a multiprocessor may have, in bytes."""
    if blocks == 0:
        return 0
    each = limits.shared // blocks // SHARED_GRANULE * SHARED_GRANULE - RESERVED_SHARED
    return min(each, limits.shared_of_block)


def examine(cubin: Path, target: str) -> dict[str, dict[str, Any]]:
    """Kernel name -> resources, occupancy and instruction counts."""
    usage = output_of(tool("cuobjdump"), "--dump-resource-usage", cubin)
    assembly = output_of(tool("nvdisasm"), "-c", cubin)
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
    bodies = dict(re.findall(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", assembly, re.S))
    rows = {}
    for mangled, figures in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        if "REG:" not in figures:
            continue
        values = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", figures)}
        body = bodies.get(mangled, "")
        blocks = resident_blocks(values["REG"], threads[mangled], limits)
        rows[short_name(output_of("c++filt", mangled))] = {
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
    return rows


Table = dict[str, dict[str, dict[str, Any]]]
"""Target -> kernel -> figures."""


def report(targets: list[str]) -> Table:
    """Target -> kernel -> figures, for every kernel of the library."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [(target, source) for target in targets for source in sources]
        cubins = list(pool.map(lambda job: compile_source(job[1], job[0], Path(folder)), jobs))
        table: Table = {target: {} for target in targets}
        for (target, source), cubin in zip(jobs, cubins, strict=True):
            table[target] |= {f"{source.stem}: {name}": row for name, row in examine(cubin, target).items()}
    return table


def to_markdown(table: Table) -> str:
    """One row per target and kernel."""
    columns = [
        "registers",
        "threads",
        "blocks",
        "occupancy",
        "room",
        "stack",
        "spills",
        "shared",
        *INSTRUCTIONS,
    ]
    lines = ["| target | kernel | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for target, kernels in table.items():
        for name, row in sorted(kernels.items()):
            lines.append(f"| {target} | `{name}` | " + " | ".join(str(row[c]) for c in columns) + " |")
    return "\n".join(lines)


def nvcc_version() -> str:
    """Release of the compiler on the PATH."""
    found = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
    return found[1] if found else "unknown"


def differences(table: Table, committed: Table) -> list[str]:
    """Where a table and the committed one disagree, in words, on the targets that both are to have."""
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
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    arguments = parser.parse_args()
    table, nvcc = report(arguments.targets), nvcc_version()
    print(to_markdown(table))
    spilled = [
        f"{target} {name}" for target, rows in table.items() for name, row in rows.items() if row["spills"]
    ]
    if any(name.split()[0] not in REPORT_ONLY for name in spilled):
        sys.exit(f"registers are spilled by {', '.join(spilled)}")
    if arguments.write:
        kept = {target: rows for target, rows in table.items() if target not in REPORT_ONLY}
        arguments.write.write_text(
            json.dumps({"nvcc": nvcc, "targets": kept}, indent=1, sort_keys=True) + "\n"
        )
    if arguments.check:
        committed = json.loads(arguments.check.read_text())
        if committed["nvcc"] != nvcc:
            print(f"not compared: {arguments.check} was made by nvcc {committed['nvcc']}, this is {nvcc}")
            return
        changed = differences(table, committed["targets"])
        if changed:
            sys.exit(
                f"{arguments.check} says something else (--write it if that is meant):\n" + "\n".join(changed)
            )


if __name__ == "__main__":
    main()
