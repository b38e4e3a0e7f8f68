"""Writes the tables of docs/compatibility.md: how each op was proved, and where its tests passed.

    python benchmarks/compatibility.py            rewrites what lies between the marks
    python benchmarks/compatibility.py --check    exit code 1 if the page is not up to date

What is there is read off the sources and the registered ops, what ran on a GPU off benchmarks/results/gpu_*.json,
what ran on which version off benchmarks/results/matrix.json (`make matrix`), what ran on emulated Arm processors off
benchmarks/results/arm.json (`make test-arm`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vosops
from vosops.benchmarking.gpu_cases import MODES, implementation

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
RESULTS = ROOT / "benchmarks" / "results"
MATRIX = RESULTS / "matrix.json"
ARM = RESULTS / "arm.json"
REGIONS = {
    name: re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    for name in ("proofs", "versions", "arm")
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
ON_GPUS = ("f32", "f16", "bf16")
NOTHING = "-"
KERNELS = {
    "conv_lstm": "conv_lstm_pointwise",
    "global_conv": "global_conv_split",
    "local_attention": "local_attention_dot",
}
"""The kernel that stands for an op of another name."""


def has_cuda(op: str) -> bool:
    """Return whether a CUDA C++ kernel of the op is registered."""
    wanted = f'm.impl("{KERNELS.get(op, op)}"'
    return any(wanted in path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))


def has_triton(op: str) -> bool:
    """Return whether a Triton kernel of the op is registered."""
    return hasattr(torch.ops.vosops, f"{KERNELS.get(op, op)}_triton")


def gpu_proof(op: str, backend: str, dtype: str, reports: Sequence[dict[str, Any]]) -> str | None:
    """Return card and date of the newest run in which an implementation was right in a dtype; None if there is none."""
    modes = [name for name, mode in MODES.items() if mode.dtype == DTYPES[dtype]]
    for report in sorted(reports, key=lambda r: str(r["date"]), reverse=True):
        cells = report["steps"].get("times", {}).get("data", {}).get("cells", {}).values()
        for cell in cells:
            if cell.get("op") == op and cell.get("mode") in modes:
                ours = [v for v in cell["variants"] if v["name"] == implementation(backend)]
                if ours and all(v["right"] for v in ours):
                    return f"**{report['device']['name']}, {report['date'][:10]}**"
    return None


def rows(op: str, reports: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the implementations of an op: where it runs, then how each dtype was proved."""

    def on_gpu(backend: str, without: str) -> list[str]:
        proofs = [gpu_proof(op, backend, dtype, reports) for dtype in ON_GPUS]
        return [f"{proof}; {without}" if proof else without for proof in proofs] + [NOTHING]

    absent = [NOTHING] * len(DTYPES)
    cuda, triton = has_cuda(op), has_triton(op)
    return [
        [f"`{op}`", "reference, any device", *["oracle"] * len(DTYPES)],
        ["", "cpp, CPU", *["run"] * len(DTYPES)],
        ["", "cpp, NVIDIA sm_80 and newer", *(on_gpu("cpp", "emulator, compiled") if cuda else absent)],
        [
            "",
            "triton, NVIDIA sm_80 and newer",
            *(on_gpu("triton", "interpreter, compiled") if triton else absent),
        ],
        ["", "triton, AMD gfx942", *(["compiled"] * len(ON_GPUS) + [NOTHING] if triton else absent)],
    ]


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of all ops."""
    header = ["op", "implementation", *DTYPES]
    body = [row for op in vosops.list_ops() for row in rows(op, reports)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body])


def versions(cells: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of the versions that were run, and what came of it."""
    if not cells:
        return "None recorded yet: run `make matrix`."
    rows = [["torch", "Triton", "NumPy", "Python", "vosops from", "passed", "failed", "when and where"]]
    rows.append(["---"] * len(rows[0]))
    for cell in cells:
        triton = cell["triton"] or NOTHING
        rows.append(
            [
                cell["torch"],
                f"{triton}, interpreted" if cell["interpreted"] and cell["triton"] else triton,
                cell["numpy"] or NOTHING,
                cell["python"],
                cell["installed"],
                str(cell["passed"]),
                f"**{cell['failed']}**" if cell["failed"] else "0",
                f"{cell['date']}, {cell['processor']}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def arm(runs: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of the Arm processors that were emulated."""
    if not runs:
        return "None recorded yet: run `make test-arm`."
    header = ["processor of qemu", "tests", "passed", "failed", "skipped", "torch", "Python", "date"]
    rows = [header, ["---"] * len(header)]
    for run in runs:
        failed = f"**{run['failed']}**" if run["failed"] else "0"
        counts = [str(run["passed"]), failed, str(run["skipped"])]
        row = [
            f"`{run['processor']}`",
            f"`{run['tests']}`",
            *counts,
            run["torch"],
            run["python"],
            run["date"],
        ]
        rows.append(row)
    tools = sorted({f"{run['compiler']}; {run['emulator']}" for run in runs})
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + "\n".join(tools)


def rewritten(
    text: str,
    reports: Sequence[dict[str, Any]],
    cells: Sequence[dict[str, Any]] = (),
    arm_runs: Sequence[dict[str, Any]] = (),
) -> str:
    """Return the page with its tables made anew; ValueError if it has no place for one."""
    tables = {"proofs": table(reports), "versions": versions(cells), "arm": arm(arm_runs)}
    for name, region in REGIONS.items():
        if not region.search(text):
            raise ValueError(f"the page lacks <!-- {name} --> and <!-- end of {name} -->")
        text = region.sub(lambda m, name=name: f"{m[1]}\n{tables[name]}\n\n{m[2]}", text)
    return text


def recorded() -> list[dict[str, Any]]:
    """Return the cells of benchmarks/results/matrix.json."""
    cells: list[dict[str, Any]] = json.loads(MATRIX.read_text())["cells"] if MATRIX.exists() else []
    return cells


def recorded_arm() -> list[dict[str, Any]]:
    """Return the runs of benchmarks/results/arm.json."""
    runs: list[dict[str, Any]] = json.loads(ARM.read_text())["runs"] if ARM.exists() else []
    return runs


def main() -> None:
    """Rewrite or check the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, say whether it is up to date")
    check = parser.parse_args().check
    reports = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("gpu_*.json"))]
    text = PAGE.read_text()
    fresh = rewritten(text, reports, recorded(), recorded_arm())
    if check:
        sys.exit(f"{PAGE} is not up to date: python benchmarks/compatibility.py" if fresh != text else 0)
    PAGE.write_text(fresh)


if __name__ == "__main__":
    main()
