"""Times the implementations that were right, on typical sizes, and orders them: `vosops check --tune`."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vosops import _verdicts
from vosops.benchmarking import gpu_cases
from vosops.benchmarking.cases import Case
from vosops.benchmarking.gpu_convolutions import GlobalConvSize, LstmSize
from vosops.benchmarking.gpu_steps import LEAST_ROUNDS, first_line
from vosops.benchmarking.local_attention import AttentionSize
from vosops.benchmarking.local_correlation import CorrelationSize
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
    *(Problem("local_correlation", CorrelationSize(f"{h}x{w}", h, w, c, p), "ieee")
      for h, w, c, p in ((30, 54, 256, 15), (60, 107, 128, 21), (120, 214, 64, 31))),
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
    *(Problem("local_correlation", CorrelationSize(f"{h}x{w}", h, w, 64, p), "ieee")
      for h, w, p in ((15, 27, 9), (30, 54, 9), (30, 54, 15))),
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
    seconds: float = 300.0,
    progress: Callable[[str, dict[str, dict[str, Any]]], None] = lambda op, entries: None,
) -> Orders:
    """Time what `check_device` found right, each op in a separate process, and return the orders.

    Args:
        device: "cpu" or a CUDA device.
        cells: of `check_device`: an implementation with any other verdict than "right" is not timed.
        ops: some ops; all by default.
        sizes: of the problems; `sizes_for` by default.
        imports: modules that each process imports first.
        seconds: for one op; what is not finished then has no order.
        progress: receives an op and its orders as soon as they are known, to be stored for instance.

    Returns:
        op -> entry -> {"order": names, best first, "seconds": {size: {name: median}}}.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning launches its own kernels: it cannot be part of a CUDA graph")
    orders: Orders = {}
    verdicts: dict[tuple[str, str, str, bool], set[str]] = {}
    for cell in cells:
        if cell.candidate.stored:
            problem = cell.problem
            key = (problem.op, cell.candidate.implementation, problem.mode, problem.backward)
            verdicts.setdefault(key, set()).add(cell.verdict)
    described = [cell.verdict == "right" for cell in cells if cell.candidate.variant]
    environment = {_verdicts.DESCRIPTORS: "1"} if described and all(described) else {}
    of_sizes = sizes or sizes_for(device)
    for op in dict.fromkeys(size.op for size in of_sizes):
        if ops and op not in ops:
            continue
        groups = []
        for mode, backward in itertools.product(gpu_cases.MODES, (False, True)):
            able = [b for b in BACKENDS[:2] if verdicts.get((op, b, mode, backward)) == {"right"}]
            if able:
                groups.append({"mode": mode, "backward": backward, "backends": [*able, "reference"]})
        names = [size.size.name for size in of_sizes if size.op == op]
        found = _tune(device, op, names, groups, imports, seconds, environment) if groups else {}
        if found:
            orders[op] = found
            progress(op, found)
    return orders


def _tune(
    device: torch.device,
    op: str,
    sizes: list[str],
    groups: list[dict[str, Any]],
    imports: Sequence[str],
    seconds: float,
    environment: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """Return the orders of one op by the entries that its calls look up: of all groups that it came to."""
    task = {
        "device": str(device),
        "imports": list(imports),
        "op": op,
        "sizes": sizes,
        "groups": groups,
    }
    try:
        lines = subprocess.run(
            [sys.executable, "-m", "vosops.checking.tuning"],
            env={**base_environment(), **environment},
            input=json.dumps(task).encode(),
            capture_output=True,
            timeout=seconds,
        ).stdout
    except subprocess.TimeoutExpired as error:
        lines = error.stdout or b""
    orders: dict[str, dict[str, Any]] = {}
    for line in lines.split(b"\n")[:-1]:  # what follows the last end of a line is no whole line
        found: dict[str, Any] = json.loads(line)
        for entry in found["entries"]:
            orders.setdefault(entry, _order(found["seconds"]))
    return orders


def _order(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the names by the geometric mean of their times relative to each size's fastest; what ran everywhere."""
    everywhere = set.intersection(*(set(times) for times in seconds.values()))
    scores = {
        name: sum(math.log(times[name] / min(times.values())) for times in seconds.values())
        for name in everywhere
    }
    return {"order": sorted(scores, key=lambda name: scores[name]), "seconds": seconds}


def main() -> None:
    """Time the problems of the task on standard input; each group of them is a line of the output."""
    from importlib import import_module

    task: dict[str, Any] = json.load(sys.stdin)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in task["imports"]:
        import_module(name)
    clock = Clock(task["device"])
    torch.set_num_threads(1)
    known = {p.size.name: p for p in sizes_for(clock.device) if p.op == task["op"]}
    for group in task["groups"]:
        mode, backward = group["mode"], group["backward"]
        problems = [replace(known[size], mode=mode, backward=backward) for size in task["sizes"]]
        entries: set[tuple[str, str]] = set()
        seconds = {p.size.name: _times(p, clock, group["backends"], entries) for p in problems}
        lines.write(
            json.dumps({"seconds": seconds, "entries": sorted({entry for _, entry in entries})}) + "\n"
        )
        lines.flush()


def _times(
    problem: Problem, clock: Clock, backends: Sequence[str], entries: set[tuple[str, str]]
) -> dict[str, float]:
    """Return the median of each implementation, and note the entries that its call looks up."""
    from vosops.checking.child import noting

    calls = {name: gpu_cases.our_call(problem, clock.device, name) for name in backends}
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
    return {name: times.get(name, first[name]) for name in first}


__all__ = ["CPU_SIZES", "GPU_SIZES", "Orders", "sizes_for", "tune_device"]

if __name__ == "__main__":
    main()
