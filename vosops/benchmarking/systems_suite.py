"""The cases of whole networks in turn; each result is saved to a file as soon as it is available."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vosops.benchmarking.runner import machine
from vosops.benchmarking.systems import (
    CASES,
    FITS,
    LIMIT,
    NETWORKS,
    Measurement,
    largest_that_fits,
    measure,
)
from vosops.io.outputs import write_text

WAYS = {"frugal": False, "naive": True}

Result = dict[str, Any]
"""A measurement as plain data, with the threads and the load average when it began."""


def choose(cases: Sequence[str] | None, networks: Sequence[str] | None) -> list[str]:
    """Return the names of the cases to measure: those given, or those of the networks (None: all) that are default.

    Raises:
        ValueError: a name is unknown; the message begins with "case" or "network".
    """
    for what, given, known in (("case", cases, (*CASES, *FITS)), ("network", networks, NETWORKS)):
        for name in given or ():
            if name not in known:
                raise ValueError(f"{what}: expected one of {', '.join(known)}; got {name!r}")
    if cases:
        return list(cases)
    chosen = [name for name, case in CASES.items() if case.default] + list(FITS)
    return [name for name in chosen if name.split("-")[0] in (networks or NETWORKS)]


def run_cases(
    names: Sequence[str],
    ways: Sequence[str],
    *,
    threads: int,
    limit: int = LIMIT,
    file: Path | None = None,
    note: Callable[[str], None] = print,
) -> Iterator[Measurement]:
    """Measure every way of every case, in turn.

    Args:
        names: of `CASES` and `FITS`.
        ways: of `WAYS`.
        threads: of the CPU.
        limit: bytes beyond which a measurement fails; a search in `FITS` has its own.
        file: where each result goes at once, in place of an earlier one of the same case and way.
        note: hears what is going on.

    Raises:
        ValueError: `file` holds something else.
    """
    if file is not None:
        read_results(file)
    for name in names:
        for way in ways:
            note(f"{name}, {way} ...")
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            naive = WAYS[way]
            if name in FITS:
                found = largest_that_fits(FITS[name], naive=naive, threads=threads, note=note)
            else:
                found = measure(CASES[name], naive=naive, threads=threads, limit=limit)
            if file is not None:
                _keep(file, {**found.to_dict(), "threads": threads, "load": load})
            yield found


def read_results(file: Path) -> list[Result]:
    """Return the results in a file, none where there is no such file; ValueError where it holds something else."""
    if not file.exists():
        return []
    try:
        results: list[Result] = json.loads(file.read_text())["results"]
        for result in results:
            Measurement.from_dict(result)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: is not a results file of bench systems") from None
    return results


def _keep(file: Path, result: Result) -> None:
    """Write a result into the file, in place of an earlier one of the same case and way."""
    key = (result["name"], result["naive"])
    others = [r for r in read_results(file) if (r["name"], r["naive"]) != key]
    order = {name: i for i, name in enumerate((*CASES, *FITS))}
    results = sorted([*others, result], key=lambda r: (order.get(r["name"], len(order)), r["naive"]))
    text = json.dumps({"machine": machine(), "results": results}, indent=1) + "\n"
    write_text(Path(os.path.realpath(file)), text)
