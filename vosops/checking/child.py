"""The process in which one implementation runs: it may crash or hang, and says before each problem which it is.

    python -m vosops.checking.child < TASK

TASK is one JSON object: device, backend, problems (their keys), oracles (a file), imports (modules to import first).
Each problem is two lines on standard output: {"begin": key}, then {"key", "verdict", "errors", "reason", "entries"}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from vosops import _verdicts, backends
from vosops.benchmarking.gpu_cases import our_call
from vosops.benchmarking.gpu_steps import BROKEN_DEVICE, first_line
from vosops.checking.judge import judge
from vosops.checking.problems import PROBLEMS, Problem, entry_of


def main() -> None:
    """Run the problems of the task on standard input."""
    task: dict[str, Any] = json.load(sys.stdin)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like a line of ours

    def say(line: dict[str, Any]) -> None:
        lines.write(json.dumps(line) + "\n")
        lines.flush()

    torch.set_num_threads(1)
    for name in task["imports"]:
        import_module(name)
    by_key = {problem.key: problem for problem in PROBLEMS}
    oracles = torch.load(task["oracles"])
    device = torch.device(task["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    say({"ready": True})
    for key in task["problems"]:
        say({"begin": key})
        found = run(by_key[key], device, task["backend"], oracles[key])
        say({"key": key, **found})
        if any(words in found["reason"] for words in BROKEN_DEVICE):
            sys.exit(3)  # nothing more can run here: the next process goes on


def run(problem: Problem, device: torch.device, backend: str, expected: list[torch.Tensor]) -> dict[str, Any]:
    """Return verdict, errors, reason and the entries of the store that a problem speaks for."""
    entries: set[tuple[str, str]] = set()
    try:
        with noting(entries):
            results = our_call(problem, device, backend)()
        if device.type == "cuda":
            torch.cuda.synchronize()
    except backends.CannotRunError as error:
        reason = str(error).partition(f"{backend}: ")[2] or str(error)
        return {"verdict": "cannot", "errors": [], "reason": reason, "entries": []}
    except Exception as error:  # whatever an implementation raises is its verdict
        reason, verdict, errors = first_line(error), "failed", list[float]()
    else:
        verdict, reason, errors = judge(results, expected, problem)
    named = entries or {(problem.op, entry_of(problem))}
    return {"verdict": verdict, "errors": errors, "reason": reason, "entries": sorted(named)}


class noting:
    """Notes the op and arithmetic of every choice that is made meanwhile: what a later choice will look up."""

    def __init__(self, entries: set[tuple[str, str]]) -> None:
        self._entries = entries
        self._choose: Callable[[str, backends.Call], backends.Implementation] = backends.choose

    def __enter__(self) -> None:
        def choose(name: str, call: backends.Call) -> backends.Implementation:
            mode = _verdicts.mode_of(call.dtype, call.precision)
            if mode is not None and call.plain is None:
                self._entries.add((name, _verdicts.entry(mode, call.backward)))
            return self._choose(name, call)

        setattr(backends, "choose", choose)  # noqa: B010  # mypy refuses an assignment

    def __exit__(self, *_: object) -> None:
        setattr(backends, "choose", self._choose)  # noqa: B010


__all__ = ["main", "noting", "run"]

if __name__ == "__main__":
    main()
