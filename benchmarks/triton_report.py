"""What the compiler makes of every Triton kernel, without a GPU: registers, spills, shared memory, instructions.

    python benchmarks/triton_report.py                              the table as Markdown
    python benchmarks/triton_report.py --write table.json           and as JSON, to be committed
    python benchmarks/triton_report.py --check table.json           fail where the committed table says something else
    python benchmarks/triton_report.py --targets sm_90 gfx942       other targets (gfx942: only that it compiles, not
                                                                    compared)

The kernels are compiled ahead of time with the launch shapes that the ops would choose on the target. A spilled
register fails the report. The committed table holds for one version of Triton; with another nothing is compared.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Shared memory that one program may have, in bytes."""

TENSOR_CORE_PTX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
REGISTERS = 65536
"""32-bit registers of a multiprocessor."""

MAX_WARPS = 64

POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
PRECISIONS = [
    ("bf16", torch.bfloat16, "ieee"),
    ("fp16", torch.float16, "ieee"),
    ("tf32", torch.float32, "tf32"),
    ("tf32x3", torch.float32, "tf32x3"),
    ("ieee", torch.float32, "ieee"),
]
FRAME = (1, 100, 120, 214)
"""480p at a quarter of its size with 100 channels, the benchmarks' usual case."""


@dataclass(frozen=True)
class Case:
    """One kernel with one set of compile-time arguments."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    tensor_cores: bool = False


@dataclass(frozen=True)
class Row:
    """What one compilation gave. Occupancy is in programs per multiprocessor; 0 registers: not an NVIDIA target."""

    case: str
    target: str
    warps: int
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    occupancy: int = 0
    tensor_cores: int = 0
    async_copies: int = 0
    wide_loads: int = 0
    instructions: int = 0


def cases(target: str) -> Iterator[Case]:
    """Every kernel in the configurations that people use."""
    from vosops.triton import _common, global_matching, local_matching, matching_backward

    chip = _common.Target(NVIDIA.get(target, 0) // 10, 132)
    precisions = [
        (label, dtype, precision)
        for label, dtype, precision in PRECISIONS
        if _common.product_precision(precision, chip) == precision
    ]

    def local(
        name: str, dtype: torch.dtype, precision: str, shape: tuple[int, ...], objects: int, radius: tuple
    ) -> Case:
        plan = local_matching.launch_plan(
            shape,
            objects,
            radius,
            1,
            _common.tilings(shape[1], dtype, precision, chip),
            precision,
            exact=_common.is_exact(dtype, precision),
            processors=chip.processors,
        )
        data = POINTER[dtype]
        pointers = {"query": data, "key": data, "query_norm": "*fp32", "bias": "*fp32", "needed": "*i32"}
        pointers |= {"distance": "*fp32", "index": "*i64"}
        tensor_cores = _common.uses_tensor_cores(dtype, precision)
        kernel = local_matching._match
        return Case(f"local match {name}", kernel, pointers, plan.constants, plan.options, tensor_cores)

    for label, dtype, precision in precisions:
        yield local(f"{label}, C=100, radius 15", dtype, precision, FRAME, 1, (15,))
    yield local("bf16, C=100, radius 15, 3 objects", torch.bfloat16, "ieee", FRAME, 3, (15,))
    for label, dtype, precision in precisions[::2]:
        yield local(f"{label}, C=100, 6 radii", dtype, precision, (1, 100, 60, 107), 3, (2, 4, 6, 8, 10, 12))
    yield local("bf16, C=256, radius 15", torch.bfloat16, "ieee", (1, 256, 120, 214), 1, (15,))
    yield local("bf16, C=512, radius 15", torch.bfloat16, "ieee", (1, 512, 120, 214), 1, (15,))

    def over_all(name: str, dtype: torch.dtype, precision: str, channels: int, neighbors: int) -> Case:
        tiling = _common.tilings(channels, dtype, precision, chip, many_queries=neighbors == 1)[0]
        exact = _common.is_exact(dtype, precision)
        constants = global_matching.match_constants(tiling, neighbors, 25680, precision, exact=exact)
        pointers = {
            "query": POINTER[dtype],
            "key": POINTER[dtype],
            "query_norm": "*fp32",
            "cumulative": "*i32",
        }
        pointers |= {"members": "*i32", "member_norm": "*fp32", "scores": "*fp32", "candidates": "*i32"}
        options = global_matching.match_options(tiling)
        tensor_cores = _common.uses_tensor_cores(dtype, precision)
        return Case(
            f"global match {name}", global_matching._match, pointers, constants, options, tensor_cores
        )

    for label, dtype, precision in precisions:
        yield over_all(f"{label}, C=100", dtype, precision, 100, 1)
    yield over_all("bf16, C=256", torch.bfloat16, "ieee", 256, 1)
    yield over_all("bf16, C=100, 4 neighbors", torch.bfloat16, "ieee", 100, 4)
    yield over_all("ieee, C=100, 4 neighbors", torch.float32, "ieee", 100, 4)

    four_warps = _common.compile_options(4)
    for dtype in (torch.bfloat16, torch.float32):
        data = POINTER[dtype]
        label = data[1:]
        maps = {"query": data, "key": data, "mask": "*u8", "query_mask": "*u8", "packed_query": data}
        maps |= {"packed_key": data, "query_norm": "*fp32"}
        packing = {"CHANNELS": 112, "BLOCK_C": local_matching.PACK_CHANNELS, "HAS_QUERY_MASK": False}
        packing |= {"query_w": 1, "key_w": 1, "mask_w": 1}
        yield Case(
            f"local pack {label}",
            local_matching._pack,
            maps | {"bias": "*fp32", "needed": "*i32"},
            packing | {"DILATION": 1, "STRIP": local_matching.STRIP},
            four_warps,
        )
        yield Case(
            f"global pack {label}",
            global_matching._pack,
            maps | {"key_norm": "*fp32", "counts": "*i32"},
            packing | {"ROWS": global_matching.PACK_ROWS, "FLAT_QUERY": True, "FLAT_KEY": True},
            four_warps,
        )
        outcome = {"scores": "*fp32", "candidates": "*i32", "distance": "*fp32", "index": "*i64"}
        shape = {
            "ROWS": global_matching.MERGE_ROWS,
            "CHANNELS": 112,
            "BLOCK_C": global_matching.MERGE_CHANNELS,
        }
        yield Case(
            f"global merge {label}",
            global_matching._merge,
            {"query": data, "key": data, "query_norm": "*fp32"} | outcome,
            {"NEIGHBORS": 1, "CHOICES": 8} | shape,
            four_warps,
        )
        pair = {"grad": "*fp32", "query": data, "key": data, "out": data}
        yield Case(
            f"query gradient {label}",
            matching_backward._query_gradient,
            pair | {"index": "*i64"},
            {"BLOCK_C": matching_backward.BLOCK_C, "BLOCK_P": matching_backward.BLOCK_P},
            four_warps,
        )
        yield Case(
            f"key gradient {label}",
            matching_backward._key_gradient,
            pair | {"order": "*i64", "bounds": "*i64"},
            {"BLOCK_C": matching_backward.BLOCK_KEY_C, "BLOCK_ENTRIES": matching_backward.BLOCK_ENTRIES},
            four_warps,
        )
    yield Case(
        "global lists",
        global_matching._list_members,
        {"mask": "*u8", "key_norm": "*fp32", "counts": "*i32", "cumulative": "*i32", "members": "*i32"}
        | {"member_norm": "*fp32"},
        {"ROWS": global_matching.PACK_ROWS},
        _common.compile_options(2),
    )


def compile_case(case: Case, target: str) -> tuple[Any, str]:
    """The compiled kernel and, on NVIDIA targets, its disassembly.

    Strides and sizes are 32-bit, buffers 16-byte aligned.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {
        name: case.pointers.get(name, "constexpr" if name in case.constants else "i32") for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.pointers}
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=aligned)
    if target not in NVIDIA:
        options = {name: value for name, value in case.options.items() if name != "maxnreg"}
        return triton.compile(source, target=GPUTarget("hip", target, 64), options=options), ""
    compiled = triton.compile(
        source, target=GPUTarget("cuda", NVIDIA[target], 32), options=dict(case.options)
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = [str(tool), "--dump-resource-usage", "--dump-sass", binary.name]
        return compiled, subprocess.run(dump, capture_output=True, text=True, check=True).stdout


def examine(case: Case, target: str) -> Row:
    """Compile and read the figures off."""
    compiled, dump = compile_case(case, target)
    warps, shared = case.options["num_warps"], int(compiled.metadata.shared)
    if not dump:
        return Row(case.name, target, warps, shared_bytes=shared)
    registers = int(re.search(r"\bREG:(\d+)", dump)[1])
    per_warp = -(-registers // 8) * 8 * 32
    occupancy = min(REGISTERS // (per_warp * warps), MAX_WARPS // warps)
    occupancy = min(occupancy, (SHARED_LIMIT[target] + 1024) // (shared + 1024))
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", dump, re.MULTILINE)
    return Row(
        case.name,
        target,
        warps,
        registers,
        spill_bytes=int(re.search(r"\bSTACK:(\d+)", dump)[1]) + int(re.search(r"\bLOCAL:(\d+)", dump)[1]),
        shared_bytes=shared,
        occupancy=occupancy,
        tensor_cores=compiled.asm["ptx"].count(TENSOR_CORE_PTX[target]),
        async_copies=sum(name.startswith("LDGSTS") and ".128" in name for name in code),
        wide_loads=sum(name.startswith("LDG.") and ".128" in name for name in code),
        instructions=len(code),
    )


def _examine_named(name: str, target: str) -> Row:
    return examine(next(case for case in cases(target) if case.name == name), target)


def report(targets: list[str], processes: int) -> list[Row]:
    """Examine every case on every target."""
    jobs = [(case.name, target) for target in targets for case in cases(target)]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_examine_named, *zip(*jobs, strict=True)))


def to_markdown(rows: list[Row]) -> str:
    """A table of the rows."""
    columns = list(inspect.signature(Row).parameters)
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    lines += ["| " + " | ".join(str(getattr(row, name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def differences(table: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Where two tables disagree on the NVIDIA targets of the first, in words; nothing for two versions of Triton."""
    if table["triton"] != committed["triton"]:
        return []
    before = {(row["case"], row["target"]): row for row in committed["rows"]}
    now = {(row["case"], row["target"]): row for row in table["rows"]}
    targets = {target for _, target in now} & NVIDIA.keys()
    found = []
    for key in sorted(key for key in before.keys() | now.keys() if key[1] in targets):
        old, new = before.get(key), now.get(key)
        if old is None or new is None:
            found.append(f"{key[0]} on {key[1]}: only in the {'new' if old is None else 'committed'} table")
            continue
        found += [
            f"{key[0]} on {key[1]}: {name} {old[name]} -> {new[name]}"
            for name in new
            if old[name] != new[name]
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--targets", nargs="+", default=list(NVIDIA), help="sm_80, sm_90, sm_100 or an AMD name"
    )
    parser.add_argument("--write", type=Path, metavar="JSON", help="also write the table here")
    parser.add_argument("--check", type=Path, metavar="JSON", help="the table to compare with")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("triton_report.py compiles, so TRITON_INTERPRET must not be set")
    import triton

    rows = report(arguments.targets, arguments.processes)
    print(to_markdown(rows))
    table = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
    if arguments.write:
        arguments.write.write_text(json.dumps(table, indent=1) + "\n")
    problems = [
        f"{row.case} on {row.target}: {row.spill_bytes} bytes spilled" for row in rows if row.spill_bytes
    ]
    if arguments.check:
        problems += differences(table, json.loads(arguments.check.read_text()))
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
