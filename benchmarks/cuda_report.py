"""What nvcc makes of every CUDA kernel, without a GPU: registers, stack, spills, shared memory, instructions.

    python benchmarks/cuda_report.py                          the table as Markdown
    python benchmarks/cuda_report.py --write table.json       and as JSON, to be committed
    python benchmarks/cuda_report.py --check table.json       fail where the committed table says something else
    python benchmarks/cuda_report.py --targets sm_120         other targets

Warnings are errors, and a spilled register fails the report. Dynamic shared memory is chosen at the launch and
does not appear here; the launch checks it against the device's limit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TARGETS = ("sm_80", "sm_90a", "sm_100")
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
    result = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{source.name} does not compile for {target}:\n{result.stderr}")
    return cubin


def short_name(demangled: str) -> str:
    """The kernel and its template arguments, without return type, namespaces and parameters."""
    name = re.sub(r"\((anonymous namespace|unnamed namespace)\)::|<unnamed>::", "", demangled)
    name = re.sub(r"\b(vosops|cuda|c10|torch|headeronly)::", "", name)
    name = re.sub(r"\((int|bool|unsigned int|long)\)", "", name)
    return re.sub(r"^void ", "", name).split("(")[0].strip()


def examine(cubin: Path) -> dict[str, dict[str, Any]]:
    """Kernel name -> resources and instruction counts."""
    usage = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assembly = subprocess.run(
        [tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    bodies = dict(re.findall(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", assembly, re.S))
    rows = {}
    for mangled, figures in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        if "REG:" not in figures:
            continue
        values = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", figures)}
        body = bodies.get(mangled, "")
        name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
        rows[short_name(name)] = {
            "registers": values["REG"],
            "stack": values["STACK"],
            "spills": values.get("LOCAL", 0) + len(re.findall(r"\b(?:LDL|STL)\b", body)),
            "shared": values["SHARED"],
            **{label: len(re.findall(pattern, body)) for label, pattern in INSTRUCTIONS.items()},
        }
    return rows


def report(targets: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Target -> kernel -> figures, for every kernel of the library."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [(target, source) for target in targets for source in sources]
        cubins = list(pool.map(lambda job: compile_source(job[1], job[0], Path(folder)), jobs))
        table: dict[str, dict[str, dict[str, Any]]] = {target: {} for target in targets}
        for (target, source), cubin in zip(jobs, cubins, strict=True):
            table[target] |= {f"{source.stem}: {name}": row for name, row in examine(cubin).items()}
    return table


def to_markdown(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One row per target and kernel."""
    columns = ["registers", "stack", "spills", "shared", *INSTRUCTIONS]
    lines = ["| target | kernel | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for target, kernels in table.items():
        for name, row in sorted(kernels.items()):
            lines.append(f"| {target} | `{name}` | " + " | ".join(str(row[c]) for c in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compile, print, and write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    arguments = parser.parse_args()
    table = report(arguments.targets)
    print(to_markdown(table))
    spilled = [
        f"{target} {name}" for target, rows in table.items() for name, row in rows.items() if row["spills"]
    ]
    if spilled:
        sys.exit(f"registers are spilled by {', '.join(spilled)}")
    if arguments.write:
        arguments.write.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    if arguments.check:
        committed = json.loads(arguments.check.read_text())
        changed = [
            f"{target} {name}: {committed.get(target, {}).get(name)} -> {table[target].get(name)}"
            for target in table
            for name in sorted(committed.get(target, {}).keys() | table[target].keys())
            if committed.get(target, {}).get(name) != table[target].get(name)
        ]
        if changed:
            sys.exit(
                f"{arguments.check} says something else (--write it if that is meant):\n" + "\n".join(changed)
            )


if __name__ == "__main__":
    main()
