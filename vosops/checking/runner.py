"""Runs every implementation in processes of its own and stores what came out.

A process that crashes or does not answer ends with a verdict on the problem that it had begun; the next process goes on
with the problems after it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vosops import _verdicts
from vosops.benchmarking.gpu_cases import our_call
from vosops.checking.problems import PROBLEMS, Candidate, Problem, base_environment, candidates, entry_of

PROBLEM_SECONDS = 30.0
"""A problem that takes longer hangs; Triton compiles several kernels for one."""

START_SECONDS = 120.0
"""Until a process has imported torch and the libraries, on a busy machine."""

MAX_PROCESSES = 40
"""Of one candidate: one that brings down its process at every problem is not tried for ever."""

ORDER = ("hung", "crashed", "wrong", "failed", "cannot", "right")
"""Of several verdicts on one thing the first of these counts."""


@dataclass(frozen=True)
class Cell:
    """What became of one problem under one candidate."""

    candidate: Candidate
    problem: Problem
    verdict: str
    """"right", "wrong", "failed" (an error), "crashed", "hung" or "cannot"."""
    reason: str = ""
    errors: tuple[float, ...] = ()
    entries: tuple[tuple[str, str], ...] = ()


def check_device(
    device: torch.device,
    problems: Sequence[Problem] = PROBLEMS,
    *,
    who: Sequence[Candidate] | None = None,
    seconds: float = PROBLEM_SECONDS,
    imports: Sequence[str] = (),
    progress: Callable[[Cell], None] = lambda _: None,
) -> list[Cell]:
    """Run every implementation that can serve a device on small problems.

    Args:
        device: "cpu" or a CUDA device.
        problems: what to run.
        who: the candidates; all by default.
        seconds: after which a problem counts as hung.
        imports: modules that each process imports first: they may register further implementations.
        progress: receives each result as it comes, from any thread.

    Returns:
        One cell per candidate and problem that is its to solve; a candidate that cannot run here has cells that say so.
    """
    with tempfile.TemporaryDirectory() as folder:
        oracles = Path(folder) / "oracles.pt"
        cpu = torch.device("cpu")
        torch.save(
            {p.key: [t.cpu() for t in our_call(p, cpu, "reference", wide=True)()] for p in problems}, oracles
        )

        def run(candidate: Candidate) -> list[Cell]:
            cells = []
            for cell in _run_candidate(candidate, problems, oracles, seconds, imports):
                progress(cell)
                cells.append(cell)
            return cells

        found = candidates(device) if who is None else list(who)
        workers = min(len(found), os.cpu_count() or 1) if device.type == "cpu" else 1
        with ThreadPoolExecutor(max(1, workers)) as pool:
            return [cell for cells in pool.map(run, found) for cell in cells]


def _run_candidate(
    candidate: Candidate, problems: Sequence[Problem], oracles: Path, seconds: float, imports: Sequence[str]
) -> list[Cell]:
    problems = candidate.solves(problems)
    if candidate.reason_not:
        return [Cell(candidate, problem, "cannot", candidate.reason_not) for problem in problems]
    left = {problem.key: problem for problem in problems}
    cells: list[Cell] = []
    for _ in range(MAX_PROCESSES):
        if not left:
            return cells
        process = _Process(candidate, list(left), oracles, imports)
        begun: str | None = None
        while True:
            line = process.line(START_SECONDS if begun is None else seconds)
            if line is None:
                break
            begun = line.get("begin", begun)
            if "key" in line:
                problem, entries = left.pop(line["key"]), tuple(tuple(entry) for entry in line["entries"])
                cells.append(
                    Cell(candidate, problem, line["verdict"], line["reason"], tuple(line["errors"]), entries)
                )
        verdict, reason = process.end()
        if not left:
            return cells
        if begun is None:  # it did not get as far as the first problem
            return cells + [Cell(candidate, problem, "cannot", reason) for problem in left.values()]
        if begun in left:
            cells.append(Cell(candidate, left.pop(begun), verdict, reason))
    return cells + [
        Cell(candidate, problem, "crashed", f"not tried after {MAX_PROCESSES} processes ended")
        for problem in left.values()
    ]


class _Process:
    """A child and the lines that it writes."""

    def __init__(self, candidate: Candidate, keys: list[str], oracles: Path, imports: Sequence[str]) -> None:
        self._hung: float | None = None
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vosops.checking.child"],
            env={**base_environment(), **candidate.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        task = {"device": candidate.device, "backend": candidate.backend, "problems": keys}
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stream:
                json.dump({**task, "oracles": str(oracles), "imports": list(imports)}, stream)
        except BrokenPipeError:
            pass  # it ended at once: `end` says why
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def line(self, seconds: float) -> dict[str, Any] | None:
        """Return its next line; None when it has ended, or was ended because none came in time."""
        try:
            text = self._lines.get(timeout=seconds)
        except queue.Empty:
            self._hung = seconds
            return None
        try:
            found: dict[str, Any] | None = None if text is None else json.loads(text)
        except ValueError:  # cut by a crash
            found = None
        return found

    def end(self) -> tuple[str, str]:
        """Return how it ended: "hung" or "crashed", and why."""
        if self._hung is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._log.seek(0)
        written = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        self._log.close()
        if self._hung is not None:
            return "hung", f"no result after {self._hung:g} s"
        if code < 0:
            return "crashed", f"the process was ended by {signal.Signals(-code).name}"
        return "crashed", f"the process ended with {code}: {written[-1][:200] if written else 'no message'}"


def worst(cells: Sequence[Cell]) -> Cell | None:
    """Return the cell that decides over several: the gravest verdict, of equal ones the greatest error."""
    return min(
        cells, key=lambda cell: (ORDER.index(cell.verdict), -max(cell.errors, default=0.0)), default=None
    )


def store(device: torch.device, cells: Sequence[Cell], orders: Mapping[str, Any] | None = None) -> Path:
    """Write what was found on a device to its file, beside what earlier checks of other ops found there.

    Args:
        device: where the cells were computed.
        cells: of `check_device`.
        orders: of `tune_device`; those that the file has of other ops and entries are kept.

    Returns:
        The file.
    """
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        if not cell.candidate.stored or cell.verdict == "cannot":
            continue
        for op, entry in cell.entries or [(cell.problem.op, entry_of(cell.problem))]:
            groups.setdefault((op, cell.candidate.implementation, entry), []).append(cell)
    before = _verdicts.read(device)
    found: dict[str, Any] = json.loads(json.dumps(before.found)) if before else {}
    for (op, backend, entry), group in groups.items():
        decisive = worst(group)
        assert decisive is not None
        error = max((e for cell in group for e in cell.errors), default=None)
        reason = (
            decisive.reason if decisive.verdict == "right" else f"{decisive.problem.key}: {decisive.reason}"
        )
        value = {"verdict": decisive.verdict, "reason": reason, "error": error}
        found.setdefault(op, {}).setdefault(backend, {})[entry] = value
    kept: dict[str, Any] = json.loads(json.dumps(before.orders)) if before else {}
    for op, entries in (orders or {}).items():
        kept.setdefault(op, {}).update(entries)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    verdicts = _verdicts.Verdicts(_verdicts.identity(device), date, found, kept)
    path = _verdicts.path_of(verdicts.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(verdicts.to_json())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _verdicts.reload()
    return path


def reset(device: torch.device) -> Path | None:
    """Remove the file of a device; None if there was none."""
    path = _verdicts.path_of(_verdicts.identity(device))
    try:
        path.unlink()
    except FileNotFoundError:
        return None
    finally:
        _verdicts.reload()
    return path
