"""Times the implementations that were right, on typical sizes, and orders them: `vosops check --tune`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vosops.benchmarking import gpu_cases
from vosops.benchmarking.cases import Case
from vosops.benchmarking.gpu_convolutions import GlobalConvSize, LstmSize
from vosops.benchmarking.gpu_steps import LEAST_ROUNDS, first_line
from vosops.benchmarking.local_attention import AttentionSize
from vosops.benchmarking.measure import Clock, interleave
from vosops.benchmarking.memory_read import MemorySize
from vosops.checking.problems import Problem, base_environment
from vosops.checking.runner import Cell

BACKENDS = ("cpp", "triton", "reference")
ROUNDS, BUDGET = 7, 0.25
TOO_SLOW = 30.0
"""An implementation whose first run takes this many times the fastest one's is not run again."""

GPU_SIZES: tuple[Problem, ...] = (
    *(Problem("local_matching", Case(n, h, w, objects=1, radius=r), "ieee")
      for n, h, w, r in (("60x107", 60, 107, 12), ("120x214", 120, 214, 15), ("270x480", 270, 480, 15))),
    *(Problem("global_matching", Case(n, h, w, objects=3), "ieee")
      for n, h, w in (("30x54", 30, 54), ("60x107", 60, 107), ("120x214", 120, 214))),
    *(Problem("memory_read", MemorySize(f"T={t}", 1620, t), "ieee") for t in (2, 5, 20)),
    *(Problem("global_conv", GlobalConvSize(f"{c}x{h}x{w}", c, h, w), "ieee")
      for c, h, w in ((256, 60, 107), (2048, 30, 54), (4096, 15, 27))),
    *(Problem("conv_lstm", LstmSize(f"{c}x{h}x{w}", c, h, w), "ieee")
      for c, h, w in ((64, 60, 107), (128, 30, 54), (256, 30, 54))),
    *(Problem("local_attention", AttentionSize(f"{h}x{w}", h, w), "ieee")
      for h, w in ((30, 54), (60, 107), (68, 120))),
)  # fmt: skip
CPU_SIZES: tuple[Problem, ...] = (
    *(Problem("local_matching", Case(n, h, w, objects=1, radius=r), "ieee")
      for n, h, w, r in (("15x27", 15, 27, 7), ("30x54", 30, 54, 9), ("60x107", 60, 107, 12))),
    *(Problem("global_matching", Case(n, h, w, objects=2), "ieee")
      for n, h, w in (("15x27", 15, 27), ("30x54", 30, 54), ("45x80", 45, 80))),
    *(Problem("memory_read", MemorySize(f"{p}x{t}", p, t, 1, 64, 128), "ieee")
      for p, t in ((405, 1), (405, 5), (1620, 2))),
    *(Problem("global_conv", GlobalConvSize(f"{c}x{h}x{w}", c, h, w, False, 64, 64), "ieee")
      for c, h, w in ((64, 30, 54), (256, 30, 54), (1024, 15, 27))),
    *(Problem("conv_lstm", LstmSize(f"{c}x{h}x{w}", c, h, w), "ieee")
      for c, h, w in ((16, 30, 54), (64, 15, 27), (64, 30, 54))),
    *(Problem("local_attention", AttentionSize(f"{h}x{w}", h, w, 64, 4, r), "ieee")
      for h, w, r in ((15, 27, 4), (30, 54, 4), (30, 54, 7))),
)  # fmt: skip

Orders = dict[str, dict[str, dict[str, Any]]]


def sizes_for(device: torch.device) -> tuple[Problem, ...]:
    """Return three typical sizes of each op."""
    return CPU_SIZES if device.type == "cpu" else GPU_SIZES


def tune_device(
    device: torch.device,
    cells: Sequence[Cell],
    *,
    ops: Sequence[str] = (),
    sizes: Sequence[Problem] | None = None,
    imports: Sequence[str] = (),
    seconds: float = 120.0,
    progress: Callable[[str, str, Mapping[str, Any]], None] = lambda op, entry, cell: None,
) -> Orders:
    """Time what `check_device` found right, op by op in processes of their own, and return the orders.

    Args:
        device: "cpu" or a CUDA device.
        cells: of `check_device`: an implementation with any other verdict than "right" is not timed.
        ops: some ops; all by default.
        sizes: of the problems; `sizes_for` by default.
        imports: modules that each process imports first.
        seconds: for one op in one arithmetic and direction; what is not finished then has no order.
        progress: receives op, entry and the order's cell as they come.

    Returns:
        op -> entry -> {"order": names, best first, "seconds": {size: {name: median}}}.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning runs kernels of its own: it cannot be part of a CUDA graph")
    orders: Orders = {}
    verdicts: dict[tuple[str, str, str, bool], set[str]] = {}
    for cell in cells:
        if cell.candidate.stored:
            problem = cell.problem
            key = (problem.op, cell.candidate.backend, problem.mode, problem.backward)
            verdicts.setdefault(key, set()).add(cell.verdict)
    for backward in (False, True):
        for mode in gpu_cases.MODES:
            for op in dict.fromkeys(size.op for size in sizes or sizes_for(device)):
                if ops and op not in ops:
                    continue
                able = [b for b in BACKENDS[:2] if verdicts.get((op, b, mode, backward)) == {"right"}]
                if not able:
                    continue
                chosen = [
                    replace(size, mode=mode, backward=backward)
                    for size in sizes or sizes_for(device)
                    if size.op == op
                ]
                for entry, cell_found in _tune(
                    device, chosen, [*able, "reference"], imports, seconds
                ).items():
                    orders.setdefault(op, {}).setdefault(entry, cell_found)
                    progress(op, entry, cell_found)
    return orders


def _tune(
    device: torch.device, problems: list[Problem], backends: list[str], imports: Sequence[str], seconds: float
) -> dict[str, dict[str, Any]]:
    """Return the order of one op, arithmetic and direction by the entry that its calls look up; empty if it failed."""
    task = {
        "device": str(device),
        "backends": backends,
        "imports": list(imports),
        "cpu": device.type == "cpu",
        "problems": [(p.op, p.size.name, p.mode, p.backward) for p in problems],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vosops.checking.tuning"],
            env=base_environment(),
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {}
    if done.returncode != 0:
        return {}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {entry: _order(found["seconds"]) for entry in found["entries"]}


def _order(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the names by the geometric mean of their times relative to each size's fastest; what ran everywhere."""
    everywhere = set.intersection(*(set(times) for times in seconds.values()))
    scores = {
        name: sum(math.log(times[name] / min(times.values())) for times in seconds.values())
        for name in everywhere
    }
    return {"order": sorted(scores, key=lambda name: scores[name]), "seconds": seconds}


def main() -> None:
    """Time the problems of the task on standard input."""
    from importlib import import_module

    from vosops.checking.child import noting

    task: dict[str, Any] = json.load(sys.stdin)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in task["imports"]:
        import_module(name)
    clock = Clock(task["device"])
    torch.set_num_threads(1)
    known = {(p.op, p.size.name): p for p in (CPU_SIZES if task["cpu"] else GPU_SIZES)}
    entries: set[tuple[str, str]] = set()
    seconds: dict[str, dict[str, float]] = {}
    for op, size, mode, backward in task["problems"]:
        problem = replace(known[op, size], mode=mode, backward=backward)
        calls = {name: gpu_cases.our_call(problem, clock.device, name) for name in task["backends"]}
        first: dict[str, float] = {}
        for name, call in calls.items():
            try:
                with noting(entries):
                    call()
                first[name] = clock.seconds(call)
            except Exception as error:  # of any kind: it has no place in the order
                print(f"{problem.key}: {name}: {first_line(error)}", file=sys.stderr)
        least = min(first.values())
        able = {name: calls[name] for name in first if first[name] < TOO_SLOW * least}
        timings = interleave(able, clock, rounds=ROUNDS, least=LEAST_ROUNDS, budget=BUDGET)
        times = {name: timing.median for name, timing in timings.items()}
        seconds[size] = {name: times.get(name, first[name]) for name in first}
    named = sorted({entry for op, entry in entries})
    lines.write(json.dumps({"seconds": seconds, "entries": named}) + "\n")
    lines.flush()


__all__ = ["CPU_SIZES", "GPU_SIZES", "Orders", "sizes_for", "tune_device"]

if __name__ == "__main__":
    main()
