"""`vosops eval`: J and F of predicted masks, as DAVIS 2017 defines them; mean IoU of classes, as Cityscapes does."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vosops.cli.output import BAD_INPUT, check_file, refuse, write_json
from vosops.io.listing import shown
from vosops.io.outputs import is_json_with

if TYPE_CHECKING:
    from rich.table import Table

    from vosops.metrics import Problem, Report, SemanticReport

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
REPORT_KEYS = {"protocol", "global", "sequences"}
"""By which the file of --json is known."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="eval")(evaluate)


def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="Folder with one folder of PNG label maps per sequence.")
    ],
    ground_truth: Annotated[
        Path,
        typer.Argument(help="Ground-truth masks: such a folder, the root of a data set, or one sequence."),
    ],
    task: Annotated[
        str,
        typer.Option(help="objects: J and F per object; semantic: IoU per class, for vosops semantic."),
    ] = "objects",
    sequences: Annotated[
        list[str] | None,
        typer.Option(
            "--sequences",
            "--sequence",
            help="Score only these sequences: comma-separated names, or a text file of names. Repeatable.",
        ),
    ] = None,
    merge_objects: Annotated[
        bool, typer.Option("--merge-objects", help="Score all objects as one, as DAVIS 2016 does.")
    ] = False,
    keep_ends: Annotated[
        bool, typer.Option("--keep-ends", help="Also score the first and the last frame.")
    ] = False,
    ignore_void: Annotated[
        bool, typer.Option("--ignore-void", help="Ignore pixels labelled 255 in the ground truth.")
    ] = False,
    classes: Annotated[
        int | None, typer.Option(help="Semantic: number of classes; default: 19, as in Cityscapes.")
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(
            help="Semantic: ids of the ground truth, train (0 to 18) or label (Cityscapes' 0 to 33); default: "
            "by file name, *_labelIds.png or *_labelTrainIds.png, else train."
        ),
    ] = None,
    consistency: Annotated[
        int | None,
        typer.Option(
            metavar="FRAMES",
            help="Semantic: also compute VSPW's consistency over this many frames, such as 8.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all scores to this file.", dir_okay=False)
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, one row per object or class.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")] = None,
) -> None:
    """Score masks against the ground truth: J, F and J&F, per object, per sequence and overall.

    Follows the semi-supervised protocol of DAVIS 2017: label maps are named like the ground truth, and means are over
    objects, without the first and the last frame.

    --task semantic scores label maps of classes like Cityscapes: IoU per class, mIoU and pixel accuracy over all
    frames with ground truth.

    Sequences that cannot be scored are listed with the reason and excluded from the means; the exit code is then 1.
    The exit code is 2 if nothing can be scored.
    """
    from vosops import metrics
    from vosops.io.errors import VosopsError

    options: dict[str, dict[str, Any]] = {
        "objects": {"merge_objects": merge_objects, "keep_ends": keep_ends, "ignore_void": ignore_void},
        "semantic": {"num_classes": classes, "ids": ids, "consistency": consistency},
    }
    if task not in options:
        refuse("eval", f"--task: expected one of {', '.join(options)}; got {task!r}", BAD_INPUT)
    for other, values in options.items():
        given = [name for name, value in values.items() if value not in (None, False)]
        if other != task and given:
            name = given[0].removeprefix("num_").replace("_", "-")
            refuse("eval", f"--{name} requires --task {other}", BAD_INPUT)
    check_file("eval", "--json", json_file, lambda content: is_json_with(content, REPORT_KEYS))
    chosen = {name: value for name, value in options[task].items() if value is not None}
    tools: dict[str, tuple[Callable[..., Any], Callable[[Any], Table], Callable[[Any], None]]] = {
        "objects": (metrics.evaluate, table, print_csv),
        "semantic": (metrics.evaluate_semantic, class_table, print_class_csv),
    }
    score, show, show_csv = tools[task]
    try:
        report = score(predictions, ground_truth, sequences=sequences or None, jobs=jobs, **chosen)
    except VosopsError as error:
        refuse("eval", shown(str(error)), error.exit_code)
    except (ValueError, OSError) as error:
        refuse("eval", shown(str(error)), BAD_INPUT)
    if as_csv:
        show_csv(report)
    else:
        from rich.console import Console

        console = Console()
        console.print(show(report))
        if report.problems:
            console.print(problem_table(report.problems))
    if json_file is not None:
        write_json("eval", json_file, report.to_dict(), REPORT_KEYS)
    if report.problems:
        failed, scored = len(report.problems), len(report.sequences)
        refuse(
            "eval",
            f"{failed} of {failed + scored} sequences cannot be scored; the means are over "
            f"{'the other one' if scored == 1 else f'the other {scored}'}",
        )


def print_csv(report: Report) -> None:
    """Write one row per object or sequence that cannot be scored, then the means over all objects scored."""
    total: dict[str, str | int | float] = {"sequence": "all", "object": "", **report.summary()}
    rows = [{**row, "sequence": shown(str(row["sequence"]))} for row in report.table()]
    broken = [{"sequence": shown(p.sequence), "problem": shown(p.reason)} for p in report.problems]
    write_rows(["sequence", "object", *COLUMNS, "problem"], [*rows, *broken, total])


def print_class_csv(report: SemanticReport) -> None:
    """Write one row per class, one per sequence that cannot be scored, then mIoU and the others over the rest."""
    totals: list[dict[str, str | int | float]] = [
        {"class": "all", "name": name, "IoU": value} for name, value in report.summary().items()
    ]
    broken = [{"name": shown(p.sequence), "problem": shown(p.reason)} for p in report.problems]
    write_rows(["class", "name", "IoU", "pixels", "problem"], [*report.table(), *broken, *totals])


def write_rows(columns: list[str], rows: Sequence[Mapping[str, str | int | float]]) -> None:
    """Write rows as CSV to the standard output."""
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()})


def table(report: Report) -> Table:
    """Return one row per object; a row of means under each sequence of several objects, and one under all."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

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
            result.add_row(Text(shown(name)), str(score.object_id), *cells(score.row()))
        if len(scores) > 1:
            result.add_row(Text(shown(name)), "mean", *cells(report.summary(name)), style="bold")
    if len(report.objects) > 1:
        result.add_section()
        result.add_row("all", f"{len(report.objects)}", *cells(report.summary()), style="bold")
    return result


def problem_table(problems: Sequence[Problem]) -> Table:
    """Return one row per sequence that cannot be scored, with the reason."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("not scored", overflow="fold")
    result.add_column("why", overflow="fold")
    for problem in problems:
        result.add_row(Text(shown(problem.sequence)), Text(shown(problem.reason)))
    return result


def class_table(report: SemanticReport) -> Table:
    """Return one row per class that occurs, the means over all, and those of each sequence where there are several."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("class", overflow="fold")
    for heading in ("IoU", "true pixels"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in report.table():
        result.add_row(str(row["name"]), f"{row['IoU']:.3f}", str(row["pixels"]))
    summaries = {"": report.summary()}
    if len(report.sequences) > 1:
        summaries |= {f"{shown(counts.name)}: ": report.summary(counts.name) for counts in report.sequences}
    for title, summary in summaries.items():
        result.add_section()
        for name, value in summary.items():
            result.add_row(Text(title + name), f"{value:.3f}", style="" if title else "bold")
    return result
