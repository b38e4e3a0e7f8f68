"""The steps of the GPU check that run the ops: each in a separate process, which a faulty kernel may take down.

    python -m vosops.benchmarking.gpu_steps runtime FILE --seconds 30

reads what earlier steps left in the run's FILE and writes its own outcome into FILE.<step>.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vosops.benchmarking import gpu_cases
from vosops.benchmarking.gpu_cases import (
    CELLS,
    IMPLEMENTATIONS,
    MODES,
    PROFILED,
    SMALL,
    Cell,
    Problem,
    implementation,
)
from vosops.benchmarking.measure import Ceilings, Clock, bandwidth, interleave, peak_bytes

PASSED, FAILED, UNFINISHED, SKIPPED = "passed", "failed", "unfinished", "skipped"

ROUNDS, LEAST_ROUNDS, CONTENDER_SECONDS = 8, 3, 0.4
PRODUCT_SIZE = {"cpu": 512, "cuda": 8192}
"""Side of the matrices whose product tells the ceiling of arithmetic."""

PRODUCTS = {"ieee": 1, "tf32": 1, "tf32x3": 3, "bf16": 1, "f16": 1}
"""Tensor-core products per multiplication: the ceiling of tf32x3 is a third of that of tf32."""

TOLERANCE = {"ieee": 1e-4, "tf32x3": 1e-4, "tf32": 1e-2, "bf16": 2e-2, "f16": 5e-3}
"""|result - oracle| / |oracle| of an output that is right. The oracle reads the same, rounded inputs."""

GRADIENT_TOLERANCE = {"ieee": 5e-2, "tf32x3": 5e-2, "tf32": 0.3, "bf16": 0.3, "f16": 0.3}
"""The same of gradients: where two pixels are about equally near, either may get the gradient."""

BROKEN_DEVICE = ("CUDA error", "illegal memory access", "unspecified launch failure")
"""After an error that says so the process can do nothing more on the device."""

NO_TIME = "cannot: no time was left"
DELAY_CYCLES = 50_000_000
SAME = 1e-3


@dataclass
class Outcome:
    """How a step ended: one of the four words, why, and what it found."""

    status: str
    reasons: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"status": self.status, "reasons": self.reasons, "data": self.data}


def first_line(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"


def distance(results: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return |result - expected| / |expected| of each tensor; infinite if a result is not finite or misshapen."""
    found = []
    for result, wanted in zip(results, expected, strict=True):
        if result.shape != wanted.shape or not bool(result.isfinite().all()):
            found.append(math.inf)
            continue
        difference = result.detach().to("cpu", torch.float64) - wanted.detach().to("cpu", torch.float64)
        found.append(float(difference.norm() / wanted.double().norm().clamp(min=1e-30)))
    return found


def is_right(errors: Sequence[float], mode: str) -> bool:
    """Return whether an output, and the gradients that follow it, are as near to the oracle as they must be."""
    output, *gradients = errors
    return output <= TOLERANCE[mode] and all(e <= GRADIENT_TOLERANCE[mode] for e in gradients)


@contextmanager
def tf32_elsewhere(allowed: bool) -> Any:
    """Set what other packages may round float32 products to."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


# ---- Ceilings


def ceilings(clock: Clock, size: int | None = None) -> Outcome:
    """Return what the card can do: bytes a second of a copy, operations a second of a product of random matrices."""
    size = size or PRODUCT_SIZE[clock.device.type]
    flops: dict[str, float] = {}
    reasons = []
    for name, mode in MODES.items():
        a, b = (torch.randn(size, size, device=clock.device).to(mode.dtype) for _ in range(2))
        with tf32_elsewhere(mode.precision in ("tf32", "tf32x3")):
            try:
                _product(a, b)
                seconds = min(clock.seconds(functools.partial(_product, a, b)) for _ in range(5))
            except RuntimeError as error:
                reasons.append(f"{name}: {first_line(error)}")
                continue
        flops[name] = 2.0 * size**3 / seconds / PRODUCTS[name]
    data = {"bytes_per_second": bandwidth(clock), "flops_per_second": flops, "product_size": size}
    return Outcome(FAILED if reasons else PASSED, reasons, data)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


# ---- Times


class Oracles:
    """The oracle's results of the size that is being measured; modes of one dtype share them."""

    def __init__(self) -> None:
        self._size: tuple[Any, ...] = ()
        self._known: dict[torch.dtype, list[Tensor]] = {}

    def of(self, cell: Cell, problem: Problem) -> list[Tensor]:
        """Return the results for a cell, computed at most once for a size and dtype."""
        size = (cell.op, cell.size, cell.backward)
        if size != self._size:
            self._size, self._known = size, {}
        dtype = MODES[cell.mode].dtype
        if dtype not in self._known:
            self._known[dtype] = problem.oracle()
        return self._known[dtype]


def measure(
    cell: Cell,
    clock: Clock,
    limits: Mapping[str, Any] | None,
    rounds: int = ROUNDS,
    oracles: Oracles | None = None,
) -> dict[str, Any]:
    """Return a cell's contenders: who can run, how far each is from the oracle, peak memory, then times in turn.

    Args:
        cell: what to measure.
        clock: the device and how to time on it.
        limits: what `ceilings` found, for the share of the floor.
        rounds: runs of each contender.
        oracles: remembers the oracle's results from cell to cell.

    Raises:
        RuntimeError: the device is broken; nothing more can run in this process.
    """
    problem = gpu_cases.problem(cell, clock.device)
    left_out = dict(problem.left_out)
    errors: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    with tf32_elsewhere(MODES[cell.mode].tf32):
        expected = (oracles or Oracles()).of(cell, problem)
        for name, call in problem.contenders.items():
            try:
                results = call()
                errors[name] = [] if name in problem.differs else distance(results, expected)
                peaks[name] = peak_bytes(call, clock.device)
            except Exception as error:  # of any package: the others go on
                if any(words in str(error) for words in BROKEN_DEVICE):
                    raise
                left_out[name] = first_line(error)
        able = {name: call for name, call in problem.contenders.items() if name in peaks}
        timings = interleave(able, clock, rounds=rounds, least=LEAST_ROUNDS, budget=CONTENDER_SECONDS)
    floor = _floor(problem, cell.mode, limits)
    variants = [
        {
            "name": name,
            "median": timing.median,
            "best": timing.best,
            "runs": list(timing.runs),
            "peak": peaks[name],
            "errors": errors[name],
            "right": name not in problem.differs and is_right(errors[name], cell.mode),
            **({"differs": problem.differs[name]} if name in problem.differs else {}),
            "share": None if floor is None else floor / timing.median,
        }
        for name, timing in timings.items()
    ]
    return {
        "op": cell.op,
        "size": cell.size.name,
        "title": cell.title,
        "mode": cell.mode,
        "backward": cell.backward,
        "compiled": cell.compiled,
        "clock": clock.kind,
        "flops": problem.flops,
        "bytes": problem.moved,
        "floor": floor,
        "variants": variants,
        "left_out": left_out,
    }


def _floor(problem: Problem, mode: str, limits: Mapping[str, Any] | None) -> float | None:
    """Return the seconds below which no implementation can come; None where the ceilings are not known."""
    if not limits or mode not in limits["flops_per_second"]:
        return None
    rates = Ceilings(limits["flops_per_second"][mode], limits["bytes_per_second"], "a matrix product")
    return rates.floor(problem.flops, problem.moved)


def times(
    clock: Clock,
    run: Mapping[str, Any],
    seconds: float,
    save: Callable[[Outcome], None],
    cells: Sequence[Cell] = CELLS,
    rounds: int = ROUNDS,
) -> Outcome:
    """Measure the cells that the run does not have yet, until the time is over.

    A cell is noted as begun before it runs, so that one which takes the process down is not tried again.
    """
    end = time.monotonic() + seconds
    steps = run.get("steps", {})
    limits = steps.get("ceilings", {}).get("data") or None
    found: dict[str, Any] = dict(steps.get("times", {}).get("data", {}).get("cells", {}))
    oracles = Oracles()
    gc.freeze()  # what the imports made need not be looked through before each run
    for cell in cells:
        if cell.key in found:
            continue
        if time.monotonic() >= end:
            break
        save(_times_outcome({**found, cell.key: {"failed": "the process ended while this ran"}}, cells))
        try:
            found[cell.key] = measure(cell, clock, limits, rounds, oracles)
        except Exception as error:
            found[cell.key] = {"failed": first_line(error)}
            if any(words in str(error) for words in BROKEN_DEVICE):
                save(_times_outcome(found, cells))
                raise
        if clock.on_gpu:
            torch.cuda.empty_cache()
    outcome = _times_outcome(found, cells)
    save(outcome)
    return outcome


def _times_outcome(found: dict[str, Any], cells: Sequence[Cell]) -> Outcome:
    missing = [cell.key for cell in cells if cell.key not in found]
    reasons = [f"{key}: {cell['failed']}" for key, cell in found.items() if "failed" in cell]
    for key, cell in found.items():
        for v in cell.get("variants", ()):
            if v["name"].startswith("vosops") and not v["right"]:
                reasons.append(f"{key}: {v['name']} is wrong, relative errors {v['errors']}")
    status = FAILED if reasons else PASSED
    if missing:
        status = FAILED if reasons else UNFINISHED
        reasons.append(f"{len(missing)} of {len(cells)} not measured yet")
    return Outcome(status, reasons, {"cells": found})


# ---- Small runs: for compute-sanitizer, and for what only the CUDA runtime can show


def small_cells() -> list[Cell]:
    """Each small problem in each arithmetic, forward and backward."""
    return [replace(cell, mode=mode, backward=True) for cell in SMALL for mode in MODES]


def small(
    device: torch.device,
    cells: Sequence[Cell] | None = None,
    names: Sequence[str] = IMPLEMENTATIONS,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run vosops' implementations once on small problems and compare them with the oracle; say a line about each."""
    ran, reasons, left_out = [], [], {}
    for name in names:
        for cell in small_cells() if cells is None else cells:
            problem = gpu_cases.problem(cell, device)
            label = f"{cell.key}/{name}"
            try:
                errors = distance(problem.contenders[implementation(name)](), problem.oracle())
            except RuntimeError as error:
                if any(words in str(error) for words in BROKEN_DEVICE):
                    raise
                left_out[label] = first_line(error)
                continue
            ran.append(label)
            say(f"ran {label}")
            if not is_right(errors, cell.mode):
                reasons.append(f"{label}: relative errors {errors}")
    data = {"ran": ran, "left_out": left_out}
    if not ran:
        reasons.append("no implementation of vosops runs here")
    return Outcome(FAILED if reasons else PASSED, reasons, data)


def _found_before(run: Mapping[str, Any], step: str) -> dict[str, Any]:
    """Return the calls that an earlier process of a step noted: they are not tried again."""
    return dict(run.get("steps", {}).get(step, {}).get("data", {}).get("calls", {}))


def smoke(device: torch.device, run: Mapping[str, Any], save: Callable[[Outcome], None]) -> Outcome:
    """Run one tiny call of each op in bfloat16 and float32 by each implementation, C++ first; keep each as it comes."""
    found = _found_before(run, "smoke")
    cells = [replace(cell, mode=mode) for mode in ("bf16", "ieee") for cell in SMALL]
    for name in IMPLEMENTATIONS:
        for cell in cells:
            label = f"{cell.key}/{name}"
            if label in found:
                continue
            save(_calls_outcome({**found, label: {"failed": "the process ended while this ran"}}))
            try:
                problem = gpu_cases.problem(cell, device)
                errors = distance(problem.contenders[implementation(name)](), problem.oracle())
                found[label] = {"errors": errors, "right": is_right(errors, cell.mode)}
            except RuntimeError as error:
                found[label] = {"failed": first_line(error)}
                if any(words in str(error) for words in BROKEN_DEVICE):
                    save(_calls_outcome(found))
                    raise
    outcome = _calls_outcome(found)
    save(outcome)
    return outcome


def _calls_outcome(found: Mapping[str, Any], left: int = 0) -> Outcome:
    """Return how calls ended, `left` of which had no time."""
    reasons = [f"{label}: {cell['failed']}" for label, cell in found.items() if "failed" in cell]
    reasons += [
        f"{label}: wrong, {cell['errors']}" for label, cell in found.items() if cell.get("right") is False
    ]
    if left:
        reasons.append(f"no time was left for {left} calls")
    status = UNFINISHED if left else FAILED if reasons else PASSED
    return Outcome(status, reasons, {"calls": dict(found)})


def profile(
    device: torch.device,
    run: Mapping[str, Any],
    seconds: float,
    save: Callable[[Outcome], None],
    cells: Sequence[Cell] = PROFILED,
) -> Outcome:
    """List the kernels of one call of each op by each implementation: name, microseconds, grid, registers, memory."""
    end = time.monotonic() + seconds
    found = _found_before(run, "profile")
    left = 0
    for name in IMPLEMENTATIONS:
        for cell in cells:
            label = f"{cell.key}/{name}"
            if label in found:
                continue
            if time.monotonic() >= end:
                left += 1
                continue
            save(_calls_outcome({**found, label: {"failed": "the process ended while this ran"}}, left))
            try:
                found[label] = {"kernels": kernels_of(gpu_cases.our_call(cell, device, name), device)}
            except RuntimeError as error:
                found[label] = {"failed": first_line(error)}
                save(_calls_outcome(found, left))
                if any(words in str(error) for words in BROKEN_DEVICE):
                    raise
            save(_calls_outcome(found, left))
    outcome = _calls_outcome(found, left)
    save(outcome)
    return outcome


def kernels_of(call: Callable[[], list[Tensor]], device: torch.device) -> list[dict[str, Any]]:
    """Return the kernels that one warm call launches, in their order; on a CPU the operators that it runs."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    call()
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with torch_profile(activities=[kind]) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if device.type == "cuda" else ("cpu_op",)
    found = sorted((e for e in events if e.get("cat") in wanted), key=lambda event: float(event["ts"]))
    named = {"grid": "grid", "block": "block", "registers per thread": "registers", "shared memory": "shared"}
    return [
        {
            "name": event["name"][:160],
            "us": event["dur"],
            **{
                ours: event["args"][theirs]
                for theirs, ours in named.items()
                if theirs in event.get("args", {})
            },
        }
        for event in found
    ]


class CannotError(Exception):
    """A check does not apply to this machine."""


def graph_check(problem: Problem, call: Callable[[], list[Tensor]]) -> None:
    """Capture the call in a CUDA graph and replays it on other inputs; AssertionError if the results differ."""
    if problem.tensors[0].device.type != "cuda":
        raise CannotError("CUDA graphs need a CUDA device")
    side: Any = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    side.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for tensor in problem.tensors:
            tensor.copy_(tensor.flip(-1))
    graph.replay()
    torch.cuda.synchronize()
    assert_same([t.clone() for t in captured], call())


def stream_check(problem: Problem, call: Callable[[], list[Tensor]]) -> None:
    """On another stream the inputs arrive late: a kernel on the default stream would read zeros."""
    if problem.tensors[0].device.type != "cuda":
        raise CannotError("streams need a CUDA device")
    expected = call()
    arriving = [tensor.clone() for tensor in problem.tensors]
    for tensor in problem.tensors:
        tensor.zero_()
    torch.cuda.synchronize()
    stream: Any = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY_CYCLES)
        for tensor, source in zip(problem.tensors, arriving, strict=True):
            tensor.copy_(source)
        results = call()
    stream.synchronize()
    assert_same(results, expected)


def device_check(cell: Cell, name: str) -> None:
    """Tensors of the second device while the first is current."""
    if torch.cuda.device_count() < 2:
        raise CannotError(f"needs two CUDA devices, there are {torch.cuda.device_count()}")
    problem = gpu_cases.problem(cell, torch.device("cuda", 1))
    with torch.cuda.device(0):
        results = problem.contenders[implementation(name)]()
        torch.cuda.synchronize(1)
    assert all(result.device.index == 1 for result in results), "the results are on another device"
    assert_same(results, problem.oracle(), GRADIENT_TOLERANCE[cell.mode])


def assert_same(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = SAME) -> None:
    """AssertionError where two runs of a call differ."""
    errors = distance(results, [t.cpu() for t in expected])
    assert max(errors) <= tolerance, f"the results differ: {errors}"


def runtime(device: torch.device, seconds: float, cells: Sequence[Cell] = SMALL) -> Outcome:
    """CUDA graphs, another stream, another device: for every op and implementation, forward and backward."""
    end = time.monotonic() + seconds
    checks: list[dict[str, str]] = []
    tried = itertools.product(IMPLEMENTATIONS, cells, (False, True), ("graph", "stream", "device"))
    for name, small_cell, backward, check in tried:
        cell = replace(small_cell, backward=backward)
        in_time = time.monotonic() < end
        outcome = _check(check, cell, name, device) if in_time else NO_TIME
        checks.append({"cell": cell.key, "implementation": name, "check": check, "outcome": outcome})
    failures = [c for c in checks if c["outcome"].startswith(FAILED)]
    reasons = [f"{c['cell']}/{c['implementation']} {c['check']}: {c['outcome']}" for c in failures]
    left = sum(c["outcome"] == NO_TIME for c in checks)
    if left:
        reasons.append(f"no time was left for {left} of {len(checks)} checks")
    elif not any(c["outcome"] == PASSED for c in checks):
        reasons.append("no check could run here")
    status = FAILED if failures or (reasons and not left) else UNFINISHED if left else PASSED
    return Outcome(status, reasons, {"checks": checks})


def _check(check: str, cell: Cell, name: str, device: torch.device) -> str:
    """Return how a check went: "passed", "failed: ..." or "cannot: ..."."""
    problem = gpu_cases.problem(cell, device)
    call = problem.contenders[implementation(name)]
    try:
        call()
    except RuntimeError as error:
        if any(words in str(error) for words in BROKEN_DEVICE):
            raise
        return f"cannot: {first_line(error)}"
    try:
        if check == "device":
            device_check(cell, name)
        else:
            (graph_check if check == "graph" else stream_check)(problem, call)
    except CannotError as reason:
        return f"cannot: {reason}"
    except (AssertionError, RuntimeError) as error:
        if any(words in str(error) for words in BROKEN_DEVICE):
            raise
        return f"{FAILED}: {first_line(error)}"
    return PASSED


# ---- The process of a step


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one step; `small` prints instead of writing, for compute-sanitizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    steps = ("smoke", "profile", "runtime", "ceilings", "times", "small", "one")
    parser.add_argument("step", choices=steps)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", choices=IMPLEMENTATIONS, help="of small (default: all) and one")
    parser.add_argument("--cell", help="of one: its key")
    options = parser.parse_args(arguments)
    clock = Clock(options.device)
    if options.step == "one":
        cell = next(cell for cell in CELLS if cell.key == options.cell)
        call = gpu_cases.our_call(cell, clock.device, options.backend or "cpp")
        call(), call()
        return
    if options.step == "small":
        names = [options.backend] if options.backend else IMPLEMENTATIONS
        outcome = small(clock.device, names=names, say=functools.partial(print, flush=True))
        print(json.dumps(outcome.to_dict()))
        raise SystemExit(0 if outcome.status == PASSED else 1)
    if options.file is None:
        parser.error(f"{options.step} needs the file of the run")
    target = options.file.with_name(f"{options.file.name}.{options.step}")
    run = json.loads(options.file.read_text()) if options.file.exists() else {}

    def save(outcome: Outcome) -> None:
        partial = target.with_name(target.name + ".part")
        partial.write_text(json.dumps(outcome.to_dict()))
        partial.replace(target)

    if options.step == "times":
        times(clock, run, options.seconds, save)
    elif options.step == "smoke":
        smoke(clock.device, run, save)
    elif options.step == "profile":
        profile(clock.device, run, options.seconds, save)
    else:
        save(ceilings(clock) if options.step == "ceilings" else runtime(clock.device, options.seconds))


if __name__ == "__main__":
    main()
