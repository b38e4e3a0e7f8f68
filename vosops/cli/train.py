"""``vosops train``: train a network by a configuration, or by the recipe of a model."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vosops.io.listing import shown

if TYPE_CHECKING:
    from rich.progress import TaskID

    from vosops.training.loop import Result

_MIB = 1 << 20
_PROBLEMS_SHOWN = 3


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("train")(train)


def train(
    config: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or the name of a network, to use its recipe; vosops info lists them."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output folder for checkpoints, weights, logs and pictures; must be empty or not exist."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key, such as optimizer.rate=1e-4 or data.train.0.root=DAVIS. Repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its latest checkpoint.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the whole configuration as YAML without training.")
    ] = False,
) -> None:
    """Train a network on still images with masks, videos in the layout of DAVIS or YouTube-VOS, or label maps.

    Writes weights.safetensors (for --weights of vosops segment and vosops semantic), best.safetensors (with the best
    score), checkpoints, log.csv, scores.csv, TensorBoard logs and pictures of predictions to --out. Ctrl-C and
    SIGTERM save a checkpoint before the run stops.

    On several GPUs: torchrun --nproc-per-node 4 -m vosops.cli train CONFIG --out DIR
    """
    from vosops.cli.segment import StopSignals
    from vosops.inference.usage import keep_freed_memory
    from vosops.io.errors import InputError
    from vosops.training.config import load_config

    chosen = load_config(config, settings or [])
    if show:
        import yaml

        print(yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False), end="")
        return
    if out is None:
        raise InputError("--out must be given: a folder for all that is written")
    from vosops.training.loop import train as run

    keep_freed_memory()
    first = os.environ.get("RANK", "0") == "0"
    with TrainingConsole(first=first) as console, StopSignals(console.note, "step") as signals:
        result = run(chosen, out, resume=resume, progress=console, should_stop=lambda: signals.requested)
        console.summary(result)


class TrainingConsole:
    """Shows a rich progress bar with loss, seconds a step, peak memory and time left, and the summary.

    first: whether this is the first of the processes of torchrun; the others show nothing.
    """

    def __init__(self, *, first: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False, markup=False, quiet=not first),
        )
        self._task: TaskID | None = None
        self._began = 0.0
        self._first = 0

    def __enter__(self) -> TrainingConsole:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, steps: int, done: int) -> None:
        """See :class:`vosops.training.progress.Progress`."""
        self._began, self._first = time.monotonic(), done
        self._task = self._bar.add_task("training", total=steps, completed=done, figures="")

    def advance(self, step: int, figures: dict[str, float]) -> None:
        """See :class:`vosops.training.progress.Progress`."""
        import torch

        from vosops.inference.usage import peak_memory

        assert self._task is not None
        seconds = (time.monotonic() - self._began) / max(1, step - self._first)
        peak = peak_memory(cuda=torch.cuda.is_available()) / _MIB
        text = f"loss {figures['loss']:.4f}, {seconds:.2f} s a step, peak {peak:.0f} MiB"
        self._bar.update(self._task, completed=step, figures=text)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(shown(text))

    def summary(self, result: Result) -> None:
        """Print what a run came to."""
        score = "" if result.score is None else f", score {result.score:.4f}, best {result.best:.4f}"
        self.note(f"{result.weights}: {result.steps} steps in {result.seconds:.0f} s{score}")
        if result.problems:
            self.note(f"{len(result.problems)} files were skipped:")
            for problem in result.problems[:_PROBLEMS_SHOWN]:
                self.note(f"  {problem}")
