"""`vosops check`: prove every implementation of every op on this machine, and time those that are right."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vosops.cli.output import BAD_INPUT, check_file, refuse, write_json

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from vosops.checking import Cell

RESULT_KEYS = {"devices", "right"}
"""By which the file of --json is known."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="check")(check)


def check(
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Only this op; repeatable. Default: all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or all available devices.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Run only the smallest problem of each op.")] = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Time the correct implementations, and prefer the fastest from now on."),
    ] = False,
    reset: Annotated[
        bool,
        typer.Option("--reset", help="Delete the stored results of earlier checks of the device, and exit."),
    ] = False,
    dry: Annotated[bool, typer.Option("--no-store", help="Show the results without storing them.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every result to this file.", dir_okay=False)
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Seconds after which a problem without a result counts as hung.")
    ] = 30.0,
) -> None:
    """Test every implementation of every op on this machine, forward and backward.

    Compares the results of small problems in each arithmetic with the reference in float64, each implementation in a
    separate process. Implementations that are wrong, crash or hang are not chosen again on this device. Takes about a
    minute.

    The exit code is 0 if everything that can run is right, 1 if something is not.
    """
    from vosops.checking import PROBLEMS, check_device, store, tune_device
    from vosops.checking.problems import of_ops, quick_problems
    from vosops.checking.runner import reset as forget

    check_file("check", "--json", json_file)
    devices = _devices(device)
    if reset:
        for each in devices:
            path = forget(each)
            typer.echo(f"{each}: {f'removed {path}' if path else 'nothing was stored'}")
        return
    try:
        problems = of_ops(quick_problems() if quick else PROBLEMS, op or [])
    except ValueError as error:
        refuse("check", str(error), BAD_INPUT)
    results: dict[str, Any] = {}
    right = True
    for each in devices:
        with _progress(each, len(problems)) as advance:
            cells = check_device(each, problems, seconds=seconds, progress=advance)
        orders = None
        if tune:
            typer.echo(f"{each}: timing the correct implementations, op by op")

            def keep(
                op: str, found: Mapping[str, Any], each: torch.device = each, cells: Any = cells
            ) -> None:
                typer.echo(f"{each}: {op}: {len(found)} orders")
                if not dry:  # at once: what was timed is not lost with what comes after it
                    store(each, cells, {op: found})

            orders = tune_device(each, cells, ops=op or [], progress=keep)
        _print(_table(each, cells))
        for line in _problems(cells):
            typer.echo(line)
        if orders is not None:
            _print(_orders_table(orders))
        if not dry:
            path = store(each, cells, orders)
            typer.echo(f"{each}: stored in {path} (delete it: vosops check --reset)")
        right = right and all(cell.verdict in ("right", "cannot") for cell in cells)
        results[str(each)] = {"cells": [_plain(cell) for cell in cells], "orders": orders}
    if json_file is not None:
        write_json("check", json_file, {"devices": results, "right": right}, RESULT_KEYS)
    if not right:
        raise typer.Exit(1)


def _devices(asked: str) -> list[torch.device]:
    import torch

    from vosops.checking.problems import devices

    here = devices()
    if asked == "all":
        return here
    try:
        wanted = torch.device(asked)
    except RuntimeError:
        refuse("check", f"--device must be cpu, cuda, cuda:N or all, got {asked!r}", BAD_INPUT)
    if wanted.type == "cuda" and wanted.index is None:
        found = [each for each in here if each.type == "cuda"]
    else:
        found = [each for each in here if each == wanted]
    if not found:
        names = ", ".join(map(str, here))
        refuse("check", f"--device {asked}: there is no such device here ({names})", BAD_INPUT)
    return found


class _progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, device: torch.device, problems: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._lock = threading.Lock()
        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(f"{device}", total=None)
        self._problems = problems
        self._known: set[str] = set()

    def __enter__(self) -> Any:
        self._bar.start()
        return self._advance

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _advance(self, cell: Cell) -> None:
        with self._lock:
            self._known.add(cell.candidate.name)
            self._bar.update(self._task, total=self._problems * len(self._known))
            self._bar.advance(self._task)


def _table(device: torch.device, cells: Sequence[Cell]) -> Table:
    """Return one row per op and arithmetic, one column per implementation: its gravest verdict there."""
    from rich.table import Table

    from vosops.checking.runner import worst

    names = list(dict.fromkeys(cell.candidate.name for cell in cells))
    table = Table(
        title=f"{device}: greatest relative error against the reference in float64", title_justify="left"
    )
    table.add_column("op")
    table.add_column("arithmetic")
    for name in names:
        table.add_column(name)
    for op in dict.fromkeys(cell.problem.op for cell in cells):
        for mode in dict.fromkeys(cell.problem.mode for cell in cells if cell.problem.op == op):
            row = []
            for name in names:
                group = [
                    cell
                    for cell in cells
                    if (cell.problem.op, cell.problem.mode, cell.candidate.name) == (op, mode, name)
                ]
                decisive = worst(group)
                if decisive is None:
                    row.append("")
                elif decisive.verdict == "right":
                    row.append(f"right {max((e for cell in group for e in cell.errors), default=0.0):.0e}")
                else:
                    count = sum(cell.verdict == decisive.verdict for cell in group)
                    row.append(f"{decisive.verdict.upper()} in {count} of {len(group)}")
            table.add_row(op, mode, *row)
    return table


def _problems(cells: Sequence[Cell]) -> list[str]:
    """Return why something is not right: one line per implementation and reason."""
    lines: dict[tuple[str, str], str] = {}
    for cell in cells:
        if cell.verdict == "cannot":
            lines.setdefault(
                (cell.candidate.name, cell.reason), f"{cell.candidate.name} cannot run: {cell.reason}"
            )
        elif cell.verdict != "right":
            text = f"{cell.candidate.name}: {cell.problem.key} {cell.verdict}: {cell.reason}"
            lines[cell.candidate.name, cell.problem.key] = text
    return list(lines.values())


def _orders_table(orders: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    from rich.table import Table

    table = Table(title="order, and the median of each size relative to the first", title_justify="left")
    for column in ("op", "arithmetic", "order"):
        table.add_column(column)
    for op, entries in orders.items():
        for entry, cell in entries.items():
            first = cell["order"][0]
            parts = []
            for name in cell["order"]:
                ratios = [times[name] / times[first] for times in cell["seconds"].values()]
                parts.append(f"{name} {' '.join(f'{ratio:.2g}' for ratio in ratios)}")
            table.add_row(op, entry, ", ".join(parts))
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console(soft_wrap=False).print(table)


def _plain(cell: Cell) -> dict[str, Any]:
    return {
        "implementation": cell.candidate.name,
        "problem": cell.problem.key,
        "verdict": cell.verdict,
        "reason": cell.reason,
        "errors": list(cell.errors),
    }
