"""What the compiler makes of every Triton kernel, without a GPU: registers, spills, shared memory, instructions.

    python benchmarks/triton_report.py                              the table as Markdown
    python benchmarks/triton_report.py --write                      and as benchmarks/results/triton/VERSION.json
    python benchmarks/triton_report.py --check                      fail where this Triton's table says something else
    python benchmarks/triton_report.py --sample                     each kernel once instead of every configuration
    python benchmarks/triton_report.py --targets sm_90 gfx942       other targets (gfx942: only that it compiles, not
                                                                    compared)
    make triton-tables                                              --write with every Triton that has a table

The kernels are compiled ahead of time with the launch shapes that the ops would choose on the target. How many
registers the code takes and whether some are spilled is a fact about one version of Triton, so each version has its
own committed table. A Triton without a table is held to bounds that any useful code keeps, and the report says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks/results/triton"
"""A table for each version of Triton, named by it."""

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Shared memory that one program may have, in bytes."""

TENSOR_CORE_PTX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
MOST_SPILLED = 64
"""Bytes of registers that one thread may spill where no table says what is usual: a spill in an outer loop, not a
kernel that lives in local memory."""

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
    multiples_of_16: tuple[str, ...] = ()
    """Sizes and strides that are, as in the layouts that the kernels read in wide pieces."""

    copy_bytes: int = 16
    """What an asynchronous copy of keys and values moves."""


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
    compiles: bool = True


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
    yield from memory_cases(chip)
    yield from convolution_cases(chip, precisions)
    yield from attention_cases()
    yield from correlation_cases()


def memory_cases(chip: Any) -> Iterator[Case]:
    """Yield the kernels of memory_read: 480p/16, T=20, 128 key channels (64 with a selection) and 512 value channels.

    Keys and values channel-last, as MemoryBank stores them.
    """
    from vosops.triton import (
        _common,
        memory_descriptors,
        memory_read,
        memory_read_backward,
        memory_scores,
        memory_select,
        memory_softmax,
        memory_usage,
        memory_values,
    )

    def scores(dtype: torch.dtype, precision: str, selection: bool) -> memory_scores.Scores:
        wide = selection and dtype != torch.float32
        precision = _common.product_precision("tf32x3" if wide else precision, chip)
        channels = 64 if selection else 128
        constants = {"C": channels, "SQUARES": selection, "WIDE": selection, "PRECISION": precision}
        kind = precision if selection or dtype == torch.float32 else "half"
        return memory_scores.Scores((), constants, 1, 1620, 32400, channels, chip, kind)

    def case(
        name: str,
        kernel: Any,
        launch: tuple[dict[str, Any], dict[str, int]],
        dtype: torch.dtype,
        *,
        selection: bool = False,
        tensor_cores: bool = False,
        piece: int = 1,
        **pointers: str,
    ) -> Case:
        """piece: channel-major keys and values, read so many elements at a time; 1: channel-last ones."""
        names, data = kernel.arg_names, POINTER[dtype]
        kinds = {"query": "*fp32" if selection else data, "key": data, "value": data, "grad": data}
        kinds |= {"shrinkage": "*fp32", "query_bias": "*fp32", "key_bias": "*fp32", "scale": "fp32"}
        kinds |= {
            "ends": "*i32",
            "out": data,
            "lse": "*fp32",
            "delta": "*fp32",
            "weight": "*fp32",
            "index": "*i64",
        }
        kinds |= {"usage": "*fp32", "part_out": "*fp32", "part_lse": "*fp32", "grad_rows": data}
        kinds |= {"grad_query": "*fp32", "grad_key": data, "grad_value": data, "grad_weight": "*fp32"}
        kinds |= {f"grad_{vector}": "*fp32" for vector in ("shrinkage", "query_bias", "key_bias", "lse")}
        kinds |= {
            "maxima": "*i32",
            "thresholds": "*i32",
            "counts": "*i32",
            "entries": "*i64",
            "score": "*fp32",
        }
        rows = launch[0].get("KEY_LAST", piece == 1)
        neighbours = ("key_c", "value_c") if rows else ("key_m", "value_m")
        constants = dict(launch[0]) | dict.fromkeys((*neighbours, "query_p", "grad_p"), 1)
        constants |= dict.fromkeys(("KEY_PIECE", "VALUE_PIECE"), piece)
        constants |= dict.fromkeys(("KEY_LAST", "VALUE_LAST"), rows)
        if not selection:
            constants |= {"shrinkage": None, "query_bias": None}
        constants = {key: value for key, value in constants.items() if key in names}
        kinds = {
            key: kind for key, kind in (kinds | pointers).items() if key in names and key not in constants
        }
        wide = (
            "query_n",
            "query_c",
            "query_end",
            "key_n",
            "key_m",
            "key_end",
            "value_n",
            "value_o",
            "value_m",
        )
        wide += ("value_end", "grad_n", "grad_o", "grad_c", "grad_end", "columns")
        in_pieces = ("key_", "value_") if piece > 1 else ()
        multiples = tuple(
            key for key in wide if key in names and key not in constants and not key.startswith(in_pieces)
        )
        width = 16 if piece == 1 else piece * dtype.itemsize
        return Case(f"memory {name}", kernel, kinds, constants, launch[1], tensor_cores, multiples, width)

    half = torch.bfloat16
    precisions = [
        (label, dtype, precision)
        for label, dtype, precision in PRECISIONS
        if label != "fp16" and _common.product_precision(precision, chip) == precision
    ]
    for label, dtype, precision in precisions:
        kind = precision if dtype == torch.float32 else "half"
        launch = memory_softmax.read_launch(scores(dtype, precision, False), 512, 512, kind)
        yield case(
            f"read {label}", memory_read._read, launch, dtype, tensor_cores=label != "ieee", out="*fp32"
        )
    launch = memory_softmax.read_launch(scores(half, "ieee", False), 512, 512, "half")
    yield case(
        "read bf16, 8100 positions",
        memory_read._read,
        launch,
        half,
        tensor_cores=True,
        piece=4,
        out="*fp32",
    )
    selected, plain = scores(half, "ieee", True), scores(half, "ieee", False)
    if chip.architecture.products in memory_descriptors.PRODUCTS:
        for layout, rows in (("", True), (", channel-major", False)):
            constants, options = memory_descriptors.tile_launch(plain, 512, 512)
            positions = constants["BLOCK_M"]
            tiles = [
                [*lead, *([positions, channels] if rows else [channels, positions])]
                for lead, channels in (((1,), constants["BLOCK_C"]), ((1, 1), constants["BLOCK_V"]))
            ]
            yield case(
                f"read bf16 by descriptors{layout}",
                memory_descriptors.read_tiles,
                (constants | {"TILED_C": 512, "KEY_LAST": rows, "VALUE_LAST": rows}, options),
                half,
                tensor_cores=True,
                out="*fp32",
                key_tiles=f"tensordesc<bf16{tiles[0]}>",
                value_tiles=f"tensordesc<bf16{tiles[1]}>",
            )
    launch = memory_softmax.read_launch(selected, 512, 512, "half")
    yield case(
        "read bf16 with selection",
        memory_read._read,
        launch,
        half,
        selection=True,
        tensor_cores=True,
        out="*fp32",
    )
    bias = {"key_bias_m": 1}, memory_scores.SCAN_OPTIONS
    yield case("last position read", memory_scores._last_read, bias, half)
    yield case("usage bf16", memory_usage._usage, memory_usage.usage_launch(plain), half, tensor_cores=True)
    single = scores(torch.float32, "tf32x3", True)
    gradients = (memory_read_backward._query_gradient, memory_read_backward._key_gradient)
    for name, kernel in zip(("query", "key"), gradients, strict=True):
        launch = memory_read_backward.gradient_launch(plain, 512, 512, "half")
        yield case(f"{name} gradient bf16", kernel, launch, half, tensor_cores=True)
        if chip.capability >= 8:
            launch = memory_read_backward.gradient_launch(single, 512, 512, "tf32x3")
            yield case(
                f"{name} gradient tf32x3 with selection", kernel, launch, torch.float32, selection=True
            )
    launch = memory_read_backward.value_gradient_launch(plain, 512, 512, "half")
    yield case("value gradient bf16", memory_read_backward._value_gradient, launch, half, tensor_cores=True)
    tile = {"BLOCK": memory_values.MERGE_BLOCK, "VALUE_C": 512}
    four_warps = memory_scores.options_of(4, 2)
    yield case("merge bf16", memory_read._merge, (tile, four_warps), half)
    yield case("mean gradient bf16", memory_read_backward._mean_gradient, (tile, four_warps), half)

    for name in ("MAXIMA", "COLLECT", "REPAIR"):
        launch = memory_select.scan_launch(plain, 30, getattr(memory_select, name))
        yield case(f"scan bf16, {name.lower()}", memory_select._scan, launch, half, tensor_cores=True)
    launch = memory_select.scan_launch(selected, 30, memory_select.REPAIR)
    yield case(
        "scan bf16 with selection, repair",
        memory_select._scan,
        launch,
        half,
        selection=True,
        tensor_cores=True,
    )
    lists = {"ROWS": memory_select.LIST_ROWS, "WIDTH": memory_select.MAX_LIST_WIDTH}
    lists |= {"CAPACITY": launch[0]["CAPACITY"]}
    yield case("threshold", memory_select._threshold, (lists, four_warps), half)
    yield case("finish", memory_select._finish, (lists, four_warps), half)
    tile = {**memory_select.GATHER_BLOCKS, "VALUE_C": 512}
    yield case("gather bf16", memory_select._gather, (tile, memory_scores.options_of(4, 3)), half)
    eight_warps = memory_scores.options_of(8, 2)
    yield case("weight gradient bf16", memory_select._weight_gradient, (tile, eight_warps), half)
    launch = (memory_select.SCATTER_BLOCKS, four_warps)
    kernel = memory_select._gathered_value_gradient
    yield case("gathered value gradient bf16", kernel, launch, half, order="*i64", bounds="*i64")


def convolution_cases(chip: Any, precisions: list[tuple[str, torch.dtype, str]]) -> Iterator[Case]:
    """Yield the kernels of global_conv, RGMP's first and second stage at 15 x 27, and of conv_lstm."""
    from vosops.triton import _common, conv_lstm, global_conv

    pixels, middle = 15 * 27, 256
    strides = ("x_n", "x_y", "x_x", "first_m", "first_t", "second_m", "second_t", "first_channels")
    strides += ("second_channels",)

    def convolution(name: str, dtype: torch.dtype, precision: str, channels: int, *, merge: bool) -> Case:
        sides = (middle, middle), (channels, channels), (7, 7)
        plan = global_conv.plan_of(*sides, pixels, dtype, precision, chip, merge=merge)
        data = POINTER[dtype]
        pointers = dict.fromkeys(("x", "first", "second"), data) | {"out": "*fp32"}
        constants = plan.constants | {"MERGE": merge, "FIRST_VERTICAL": not merge, "SECOND_VERTICAL": merge}
        constants |= {"FINAL": False, "first_bias": None, "second_bias": None, "addend": None}
        kernel, tensor_cores = global_conv._convolve, _common.uses_tensor_cores(dtype, precision)
        return Case(f"global conv {name}", kernel, pointers, constants, plan.options, tensor_cores, strides)

    for label, dtype, precision in precisions:
        yield convolution(f"split {label}", dtype, precision, 4096, merge=False)
    yield convolution("merge bf16", torch.bfloat16, "ieee", middle, merge=True)
    yield convolution("merge tf32x3", torch.float32, "tf32x3", middle, merge=True)
    for label, dtype, precision in precisions:
        if label == "fp16":
            continue
        plan = global_conv.gradient_plan((middle, 4096, 7), pixels, dtype, precision, chip)
        yield Case(
            f"global conv weight gradient {label}",
            global_conv._weight_gradient,
            {"x": POINTER[dtype], "grad": POINTER[dtype], "out": POINTER[dtype]},
            plan.constants | {"VERTICAL": True},
            plan.options,
            _common.uses_tensor_cores(dtype, precision),
            ("x_n", "x_y", "x_x", "grad_n", "grad_y", "grad_x", "rows", "channels"),
        )
    for dtype in (torch.bfloat16, torch.float32):
        data = POINTER[dtype]
        vectors = dict.fromkeys(("first_bias", "second_bias", "addend", "out"), data)
        yield Case(
            f"global conv sum {data[1:]}",
            global_conv._sum,
            {"parts_of_out": "*fp32"} | vectors,
            {"BLOCK": global_conv.SUM_BLOCK, "out_p": 1, "addend_p": 1},
            _common.compile_options(4, num_stages=2),
        )
        for name, kernel in (("forward", conv_lstm._forward), ("backward", conv_lstm._backward)):
            numbers = ("forget_bias", "pieces", "outer", "inner", "BLOCK")
            maps = [n for n in kernel.arg_names if n not in numbers and not n.endswith("_n")]
            yield Case(
                f"conv lstm {name} {data[1:]}",
                kernel,
                dict.fromkeys(maps, data) | ({"forget_bias": "fp32"} if name == "forward" else {}),
                {"BLOCK": conv_lstm.BLOCK, "outer": 1},
                _common.compile_options(4),
                multiples_of_16=("inner", *(n for n in kernel.arg_names if n.endswith("_n"))),
            )


def attention_cases() -> Iterator[Case]:
    """Yield the kernels of local_attention: 32 channels a head, contiguous maps."""
    from vosops.triton import _common, local_attention

    for dtype in (torch.bfloat16, torch.float32):
        data, options = POINTER[dtype], _common.compile_options(4)
        yield Case(
            f"local attention dot {data[1:]}",
            local_attention._dot,
            {"a": data, "b": data, "out": "*fp32"},
            {"BLOCK_P": local_attention.BLOCK_P, "BLOCK_J": local_attention.BLOCK_J}
            | {"a_x": 1, "b_x": 1, "dilation": 1},
            options,
        )
        yield Case(
            f"local attention weigh {data[1:]}",
            local_attention._weigh,
            {"weights": "*fp32", "maps": data, "out": data},
            {"BLOCK_P": local_attention.BLOCK_P, "BLOCK_C": local_attention.MOST_BLOCK_C}
            | {"weights_x": 1, "maps_x": 1, "dilation": 1},
            options,
        )


def correlation_cases() -> Iterator[Case]:
    """Yield the kernels of local_correlation: contiguous maps, neighbouring displacements."""
    from vosops.triton import _common, local_correlation

    for dtype in (torch.bfloat16, torch.float32):
        data, options = POINTER[dtype], _common.compile_options(4)
        plain = {"stride_y": 1, "stride_x": 1, "dilation_y": 1, "dilation_x": 1}
        yield Case(
            f"local correlation {data[1:]}",
            local_correlation._correlate,
            {"query": data, "key": data, "out": data},
            {"BLOCK_P": local_correlation.BLOCK_P, "BLOCK_J": local_correlation.BLOCK_J}
            | {"query_x": 1, "key_x": 1, **plain},
            options,
        )
        for of_query, name in ((True, "query"), (False, "key")):
            yield Case(
                f"local correlation gradient of {name} {data[1:]}",
                local_correlation._weigh,
                {"grad": data, "maps": data, "out": data},
                {"BLOCK_P": local_correlation.BLOCK_P, "BLOCK_C": local_correlation.MOST_BLOCK_C}
                | {"OF_QUERY": of_query, "grad_x": 1, "maps_x": 1, **plain},
                options,
            )


def compile_case(case: Case, target: str) -> tuple[Any, str]:
    """Return the compiled kernel and, on NVIDIA targets, its disassembly.

    Strides and sizes are 32-bit, buffers 16-byte aligned.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {
        name: case.pointers.get(name, "constexpr" if name in case.constants else "i32") for name in names
    }
    pointers = [name for name, kind in case.pointers.items() if kind.startswith("*")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *case.multiples_of_16)}
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
    try:
        compiled, dump = compile_case(case, target)
    except Exception as error:  # the compiler's own errors have no common type
        print(f"{case.name} on {target} does not compile: {error}", file=sys.stderr)
        return Row(case.name, target, 0, compiles=False)
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
        async_copies=sum(name.startswith("LDGSTS") and f".{8 * case.copy_bytes}" in name for name in code)
        + sum(name.startswith("UTMALDG") for name in code),
        wide_loads=sum(name.startswith("LDG.") and ".128" in name for name in code),
        instructions=len(code),
    )


def _examine_named(name: str, target: str) -> Row:
    return examine(next(case for case in cases(target) if case.name == name), target)


def jobs(targets: list[str], *, sampled: bool = False) -> list[tuple[str, str]]:
    """Return what there is to compile: (case, target).

    A sample is one configuration of each kernel, on one target after the other.
    """
    if not sampled:
        return [(case.name, target) for target in targets for case in cases(target)]
    kernels: dict[Any, tuple[Case, list[str]]] = {}
    for target in targets:
        for case in cases(target):
            first, able = kernels.setdefault(case.kernel, (case, []))
            if first.name == case.name:
                able.append(target)
    return [(case.name, able[i % len(able)]) for i, (case, able) in enumerate(kernels.values())]


def report(targets: list[str], processes: int, *, sampled: bool = False) -> list[Row]:
    """Examine every case on every target, or a sample of them."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_examine_named, *zip(*jobs(targets, sampled=sampled), strict=True)))


COLUMNS = [field.name for field in fields(Row)]
FIGURES = COLUMNS[2:-1]
"""What a table has of a case on a target; null where it does not compile."""


def to_markdown(rows: list[Row]) -> str:
    """Return a table of the rows."""
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(str(getattr(row, name)) for name in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def to_json(version: str, rows: list[Row]) -> str:
    """Return the rows on NVIDIA targets as a table to commit: one line per case, with one list per target."""
    lines: dict[str, dict[str, list[int] | None]] = {}
    for row in rows:
        if row.target in NVIDIA:
            figures = [getattr(row, name) for name in FIGURES] if row.compiles else None
            lines.setdefault(row.case, {})[row.target] = figures
    body = ",\n".join(f"  {json.dumps(case)}: {json.dumps(figures)}" for case, figures in lines.items())
    head = f'"triton": {json.dumps(version)},\n "figures": {json.dumps(FIGURES)}'
    return f'{{\n {head},\n "rows": {{\n{body}\n }}\n}}\n'


def from_json(text: str) -> tuple[str, list[Row]]:
    """Return the version and the rows of a table."""
    table = json.loads(text)
    rows = [
        Row(case, target, **dict(zip(table["figures"], figures, strict=True)))
        if figures
        else Row(case, target, 0, compiles=False)
        for case, of_targets in table["rows"].items()
        for target, figures in of_targets.items()
    ]
    return table["triton"], rows


def release(version: str) -> str:
    """Return the version without what a build adds to it, such as +git1234."""
    return version.partition("+")[0]


def table_of(version: str) -> Path | None:
    """Return the committed table of a version of Triton, if it has one."""
    path = TABLES / f"{release(version)}.json"
    return path if path.exists() else None


def label(row: Row) -> str:
    """Return the row's kernel and target, in words."""
    return f"{row.case} on {row.target}"


def out_of_bounds(rows: list[Row]) -> list[str]:
    """Return what no Triton should do: fail, spill much, want more shared memory than there is, miss tensor cores."""
    products = {(c.name, target) for target in NVIDIA for c in cases(target) if c.tensor_cores}
    found = []
    for row in rows:
        if not row.compiles:
            found.append(f"{label(row)}: does not compile")
        if row.target not in NVIDIA or not row.compiles:
            continue
        if row.spill_bytes > MOST_SPILLED:
            found.append(f"{label(row)}: {row.spill_bytes} bytes spilled, more than {MOST_SPILLED}")
        if row.shared_bytes > SHARED_LIMIT[row.target]:
            limit = SHARED_LIMIT[row.target]
            found.append(f"{label(row)}: {row.shared_bytes} bytes of shared memory, more than {limit}")
        if (row.case, row.target) in products and not row.tensor_cores:
            found.append(f"{label(row)}: no {TENSOR_CORE_PTX[row.target]}")
    return found


def differences(rows: list[Row], committed: list[Row], *, sampled: bool = False) -> list[str]:
    """Return where rows and a committed table disagree on the NVIDIA targets of the rows, in words.

    A sample may lack what the table has.
    """
    before = {(row.case, row.target): row for row in committed}
    now = {(row.case, row.target): row for row in rows if row.target in NVIDIA}
    targets = {target for _, target in now}
    expected = now.keys() if sampled else now.keys() | {key for key in before if key[1] in targets}
    found = []
    for key in sorted(expected):
        old, new = before.get(key), now.get(key)
        if old is None or new is None:
            found.append(f"{key[0]} on {key[1]}: only in the {'new' if old is None else 'committed'} table")
            continue
        found += [
            f"{label(new)}: {name} {getattr(old, name)} -> {getattr(new, name)}"
            for name in COLUMNS[2:]
            if getattr(old, name) != getattr(new, name)
        ]
    return found


def held_against(version: str) -> str:
    """Return what the rows of a version of Triton are compared with, in words."""
    table = table_of(version)
    if table:
        return f"compared with {table.relative_to(ROOT)}"
    known = ", ".join(path.stem for path in sorted(TABLES.glob("*.json"))) or "no version"
    return (
        f"Triton {version} has no table (there are {known}), so its kernels were held to bounds only: at most "
        f"{MOST_SPILLED} bytes spilled, shared memory within the limit, products on tensor cores. "
        "`python benchmarks/triton_report.py --write` makes one"
    )


def problems(version: str, rows: list[Row], *, sampled: bool = False) -> list[str]:
    """Return what is wrong with the rows: differences from the table if there is one, else violated bounds."""
    table = table_of(version)
    if table is None:
        return out_of_bounds(rows)
    return differences(rows, from_json(table.read_text())[1], sampled=sampled)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--targets", nargs="+", default=list(NVIDIA), help="sm_80, sm_90, sm_100 or an AMD name"
    )
    parser.add_argument("--write", action="store_true", help="write the table of this version of Triton")
    parser.add_argument(
        "--check", action="store_true", help="compare with the table of this version of Triton"
    )
    parser.add_argument(
        "--sample", action="store_true", help="each kernel once instead of every configuration"
    )
    parser.add_argument("--json", type=Path, help="also write the rows here, in the form of a table")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("triton_report.py compiles, so TRITON_INTERPRET must not be set")
    if arguments.write and (arguments.sample or set(arguments.targets) < NVIDIA.keys()):
        sys.exit(
            "a table holds every case on every NVIDIA target: --write goes without --sample and --targets"
        )
    import triton

    version = triton.__version__
    rows = report(arguments.targets, arguments.processes, sampled=arguments.sample)
    print(to_markdown(rows))
    if arguments.json:
        arguments.json.write_text(to_json(version, rows))
    if arguments.write:
        TABLES.mkdir(exist_ok=True)
        (TABLES / f"{release(version)}.json").write_text(to_json(version, rows))
    found = out_of_bounds(rows)
    if arguments.check:
        found = problems(version, rows, sampled=arguments.sample)
        print(held_against(version), file=sys.stderr)
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
