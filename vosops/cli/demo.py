"""`vosops demo`: render a clip with exact masks, segment it, score it, and compare fused and naive ops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vosops.cli.output import check_file, one_line, refuse, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from vosops.data import DemoClip
    from vosops.metrics import Report

MASKS, CLIP, REPORT = "masks", "clip", "demo.json"
REPORT_KEYS = {"frames", "size", "seconds", "scores", "objects"}
ASPECT = 854 / 480
COMPARED_FRAMES = 4
"""Frames that both kinds of ops segment to be compared: the first is given, the others are timed."""

BACKENDS = {"vosops": None, "naive": "reference"}
"""The two kinds of ops, and what `vosops.use_backend` calls them."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("vosops-demo"),
    frames: Annotated[int, typer.Option(min=3, help="Number of frames of the clip.")] = 60,
    size: Annotated[int, typer.Option(min=64, help="Height of the clip; the width follows.")] = 480,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the GPU, if available.")
    ] = None,
    naive: Annotated[
        bool, typer.Option("--naive/--no-naive", help="Also measure the same model with naive PyTorch ops.")
    ] = True,
) -> None:
    """Render a clip with three objects, segment it from its first mask, and report accuracy and speed.

    Writes the clip (in DAVIS' layout), the masks, an overlay video, a contact sheet and demo.json to --out.
    """
    from rich.console import Console

    from vosops.benchmarking.fresh import run_fresh
    from vosops.data import DemoClip, write_clip
    from vosops.inference.usage import keep_freed_memory
    from vosops.io.listing import CONTACT_SHEET, label_maps
    from vosops.io.outputs import is_json_with, nearest_folder
    from vosops.metrics import evaluate
    from vosops.runs.drawing_pass import OVERLAY, Outputs
    from vosops.runs.job import Job, Settings

    keep_freed_memory()
    console = Console()
    with console.status("rendering the clip"):
        try:
            clip = DemoClip(frames, (size, round(size * ASPECT)))
        except ImportError as error:
            refuse("demo", str(error))
        with one_line("demo"):
            nearest_folder(out)
        if out.is_dir():
            check_file("demo", "--out", out / REPORT, lambda content: is_json_with(content, REPORT_KEYS))
        with one_line("demo"):
            images, truth = write_clip(clip, out / CLIP)
    first = next(iter(label_maps(truth).values()))
    with console.status(f"segmenting {len(clip)} frames of {clip.size[1]}x{clip.size[0]}"):
        job = Job(
            out=out / MASKS,
            mode="overwrite",
            settings=Settings(device=device, size=short_side(clip)),
            outputs=Outputs(overlay=True),
        )
        summary = job.video(images, [str(first)])
    with console.status("scoring the masks"):
        scores = evaluate(out / MASKS, truth)
    console.print(score_table(scores))
    console.print(f"{summary.frames} frames in {summary.seconds:.1f} s")
    report: dict[str, Any] = {
        "frames": summary.frames,
        "size": clip.size,
        "seconds": summary.seconds,
        "scores": scores.summary(),
        "objects": scores.table(),
    }
    if naive:
        with console.status("comparing with naive PyTorch ops"):
            measured = [run_fresh(__name__, "measure", frames, clip.size, name, device) for name in BACKENDS]
        console.print(comparison_table(measured))
        report["comparison"] = [asdict(m) for m in measured]
    write_json("demo", out / REPORT, report, REPORT_KEYS)
    for name in (f"{MASKS}/{CONTACT_SHEET}", f"{MASKS}/{OVERLAY}", REPORT):
        console.print(f"wrote {out / name}")


def short_side(clip: DemoClip) -> int:
    """Return the size of the computation: the clip's own, up to that of `vosops segment`."""
    from vosops.inference.settings import DEFAULT_SIZE

    return min(clip.size[0], DEFAULT_SIZE)


def score_table(report: Report) -> Table:
    """J&F, J and F of each object, and their means."""
    from rich.table import Table

    from vosops.data.demo_clip import OBJECTS

    table = Table("object")
    for column in ("J&F", "J", "F"):
        table.add_column(column, justify="right")
    rows = [(OBJECTS[score.object_id], score.row(), "") for score in report.objects]
    for name, row, style in [*rows, ("mean", report.summary(), "bold")]:
        table.add_row(name, *(f"{row[f'{column}-Mean']:.3f}" for column in ("J&F", "J", "F")), style=style)
    return table


@dataclass(frozen=True)
class Measured:
    """One kind of ops: seconds for each frame after the first, peak bytes beyond those in use before."""

    ops: str
    seconds: list[float]
    peak: int | None

    @property
    def per_frame(self) -> float:
        """Mean seconds a frame."""
        return sum(self.seconds) / len(self.seconds)


def measure(frames: int, size: tuple[int, int], ops: str, device: str | None) -> Measured:
    """Segment the first frames of the clip on one kind of ops; called in a fresh process."""
    import vosops
    from vosops.benchmarking.measure import peak_bytes
    from vosops.data import DemoClip
    from vosops.inference.settings import find_device

    clip = DemoClip(frames, size)
    given = [clip[t] for t in range(min(COMPARED_FRAMES, len(clip)))]
    images, mask = [image for image, _ in given], given[0][1]
    times: list[float] = []

    def run() -> None:
        with vosops.use_backend(BACKENDS[ops]):
            times.extend(_seconds_of(vosops.segment(images, mask, device=device, size=short_side(clip))))

    peak = peak_bytes(run, find_device(device))
    return Measured(ops, times[1:], peak)


def _seconds_of(items: Iterator[Any]) -> Iterator[float]:
    """Return how long each item takes to come."""
    start = time.perf_counter()
    for _ in items:
        yield time.perf_counter() - start
        start = time.perf_counter()


def comparison_table(measured: list[Measured]) -> Table:
    """Time and memory of each kind of ops, and the ratios."""
    from rich.table import Table

    ours = measured[0]
    table = Table("the same model on")
    for column in ("ms a frame", "", "peak MB", ""):
        table.add_column(column, justify="right")
    for m in measured:
        slower = f"{m.per_frame / ours.per_frame:.1f}x" if m is not ours else ""
        larger = f"{m.peak / ours.peak:.1f}x" if m is not ours and m.peak and ours.peak else ""
        memory = "?" if m.peak is None else f"{m.peak / 1e6:.0f}"
        table.add_row(f"{m.ops} ops", f"{m.per_frame * 1e3:.0f}", slower, memory, larger)
    return table
