"""`vosops eval`: J and F of predicted masks, as DAVIS 2017 defines them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from vosops.metrics import Report

HEADINGS = {
    "J&F-Mean": "J&F",
    "J-Mean": "J",
    "J-Recall": "recall",
    "J-Decay": "decay",
    "F-Mean": "F",
    "F-Recall": "recall",
    "F-Decay": "decay",
}
COLUMNS = tuple(HEADINGS)


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command(name="eval")(evaluate)


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder with a folder of PNG label maps per sequence.")],
    ground_truth: Annotated[
        Path, typer.Argument(help="The true masks: such a folder, the root of a dataset, or one sequence.")
    ],
    sequences: Annotated[
        list[str] | None,
        typer.Option(
            "--sequences",
            "--sequence",
            help="Score only these: names separated by commas, or a text file of names. Repeatable.",
        ),
    ] = None,
    merge_objects: Annotated[
        bool, typer.Option("--merge-objects", help="Score all objects as one, as DAVIS 2016 does.")
    ] = False,
    keep_ends: Annotated[
        bool, typer.Option("--keep-ends", help="Score the first and the last frame too.")
    ] = False,
    ignore_void: Annotated[
        bool, typer.Option("--ignore-void", help="Leave pixels labelled 255 in the ground truth out.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything here, frame by frame.", dir_okay=False)
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, one row per object.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; default one per core.")] = None,
) -> None:
    """Score masks against the truth: J, F and J&F, per object, per sequence and over all.

    The semi-supervised protocol of DAVIS 2017: label maps named like those of the truth, means over objects,
    the first and the last frame left out.
    """
    from vosops import metrics

    try:
        names = [name for part in sequences for name in sequence_names(part)] if sequences else None
        report = metrics.evaluate(
            predictions,
            ground_truth,
            sequences=names,
            merge_objects=merge_objects,
            keep_ends=keep_ends,
            ignore_void=ignore_void,
            jobs=jobs,
        )
        if json_file is not None:
            json_file.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    except (metrics.EvaluationError, OSError) as error:
        typer.echo(f"vosops eval: {error}", err=True)
        raise typer.Exit(1) from None
    if as_csv:
        print_csv(report)
        return
    from rich.console import Console

    Console().print(table(report))


def sequence_names(option: str) -> list[str]:
    """The names in one --sequences: the lines of a text file, or names separated by commas."""
    listed = Path(option).read_text().split() if option.endswith(".txt") else option.split(",")
    return [name.strip() for name in listed if name.strip()]


def print_csv(report: Report) -> None:
    """Writes one row per object, then the means over all objects, to the standard output."""
    writer = csv.DictWriter(sys.stdout, ["sequence", "object", *COLUMNS], lineterminator="\n")
    writer.writeheader()
    total: dict[str, str | int | float] = {"sequence": "all", "object": "", **report.summary()}
    for row in [*report.table(), total]:
        writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()})


def table(report: Report) -> Table:
    """One row per object; a row of means under each sequence of several objects, and one under all."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("sequence", overflow="fold")
    result.add_column("object", justify="right")
    for column in COLUMNS:
        result.add_column(HEADINGS[column], justify="right", no_wrap=True)

    def cells(row: dict[str, float]) -> list[str]:
        return [f"{row[column]:.3f}" for column in COLUMNS]

    for name in report.sequences:
        scores = report.objects_of(name)
        for score in scores:
            result.add_row(name, str(score.object_id), *cells(score.row()))
        if len(scores) > 1:
            result.add_row(name, "mean", *cells(report.summary(name)), style="bold")
    if len(report.objects) > 1:
        result.add_section()
        result.add_row("all", f"{len(report.objects)}", *cells(report.summary()), style="bold")
    return result
