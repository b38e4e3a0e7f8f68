"""``vosops segment``: propagate masks through videos from the command line."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vosops.io.listing import shown

if TYPE_CHECKING:
    from rich.progress import TaskID

    from vosops.runs.job import Settings
    from vosops.runs.run import Mode, Summary

_EVENTS_SHOWN = 8
_FPS_DENOMINATOR = 1001  # so that 23.976 is 24000/1001
_MIB = 1 << 20
OPTION_HELP = "Model-specific option, NAME=VALUE, such as slots=11. Repeatable."


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("segment")(segment)


def segment(
    input: Annotated[
        str,
        typer.Argument(
            help="Video file, pipe or URL, folder of frames, animated image or TIFF stack, or root of a DAVIS / "
            "YouTube-VOS data set."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder for the masks and all other files.")],
    mask: Annotated[
        list[str] | None,
        typer.Option(help="PNG (first frame), FRAME=PNG, or folder of PNGs named by frame. Repeatable."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="NAME:CLASS[,CLASS]: take the first mask from these classes of a network of vosops semantic, given by "
            "number or Cityscapes' names; each class is an object."
        ),
    ] = None,
    init_weights: Annotated[Path | None, typer.Option(help="Checkpoint of the network of --init.")] = None,
    init_option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the network of --init, NAME=VALUE, such as num_classes=21. Repeatable."),
    ] = None,
    instances: Annotated[
        bool,
        typer.Option("--instances", help="Make each connected part of a class of --init a separate object."),
    ] = False,
    points: Annotated[
        list[str] | None,
        typer.Option(
            help="ID:X,Y, a pixel of an object in the first frame; ID:X,Y,0: a pixel outside it. For sam2. Repeatable."
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            help="ID:LEFT,TOP,RIGHT,BOTTOM, a box around an object in the first frame. For sam2. Repeatable."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of the model; vosops info lists them. Default: vosops_s if its weights are installed, otherwise "
            "propagate."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint of the model.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Feature extractor, for models with a choice of one.")
    ] = None,
    checkout: Annotated[
        Path | None, typer.Option(help="Folder of a clone of the model's repository (xmem only).")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the GPU, if available.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    memory_budget: Annotated[
        str | None, typer.Option(help="Limit of the memory for stored frames, such as 2GB or 512MiB.")
    ] = None,
    scales: Annotated[
        str,
        typer.Option(
            help="Scales relative to --size whose results are averaged, such as 0.5,0.75,1; for networks."
        ),
    ] = "1",
    size: Annotated[
        int, typer.Option(help="Short side of the computation in pixels; -1: the input's size.")
    ] = 480,
    start: Annotated[int | None, typer.Option(help="First frame number to process.")] = None,
    end: Annotated[int | None, typer.Option(help="Frame number at which to stop (exclusive).")] = None,
    step: Annotated[int, typer.Option(help="Process every N-th frame.")] = 1,
    fps: Annotated[float, typer.Option(help="Frame rate of a folder of images, for the overlay.")] = 24.0,
    sequence: Annotated[
        list[str] | None,
        typer.Option(help="Process only this sequence of a data set, or those in a text file. Repeatable."),
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(help="Resolution of a DAVIS data set: 480p, Full-Resolution, ...")
    ] = None,
    naive: Annotated[
        bool,
        typer.Option(
            "--naive",
            help="Compute in the same way as the original code, with its memory use, for comparison.",
        ),
    ] = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write a video with coloured masks.")
    ] = False,
    cutout: Annotated[bool, typer.Option("--cutout", help="Also write cut-outs with alpha.")] = False,
    coco: Annotated[bool, typer.Option("--json", help="Also write the masks as COCO JSON.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Run as one of several workers on a data set, all with the same --out: i/n with i from 0, or auto "
            "(torchrun, Open MPI, Slurm)."
        ),
    ] = None,
    steal: Annotated[
        bool,
        typer.Option(
            "--steal", help="Also process sequences that other workers have not started, or died on."
        ),
    ] = False,
    chunk_frames: Annotated[
        int | None,
        typer.Option(help="Restart the tracker after this many frames, for very long videos."),
    ] = None,
    chunk_overlap: Annotated[
        int, typer.Option(help="Number of frames before a restart whose masks initialise the tracker.")
    ] = 8,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="INPUT is a stream (rtsp://, srt://, ...) or a camera (/dev/video0), read live.",
        ),
    ] = False,
    drop: Annotated[
        str,
        typer.Option(
            help="With --live: oldest drops all but the newest frame when late; none makes the sender wait."
        ),
    ] = "oldest",
    input_option: Annotated[
        list[str] | None,
        typer.Option(help="FFmpeg option for --live, NAME=VALUE, such as rtsp_transport=tcp. Repeatable."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Segment a data set on a Ray cluster: its address, auto, or local for a cluster on this machine."
        ),
    ] = None,
    ray_workers: Annotated[int, typer.Option(help="Number of workers for --ray.")] = 2,
    lease: Annotated[
        float, typer.Option(help="Seconds without progress after which other workers take over.")
    ] = 60.0,
) -> None:
    """Track the objects of a mask, or of the classes of a network, through a video.

    Writes one palette PNG per frame, contact_sheet.png and report.json to --out.
    """
    from vosops.inference.initial import InitialClasses
    from vosops.inference.prompts import InitialPrompts
    from vosops.inference.settings import default_model, model_options
    from vosops.inference.usage import keep_freed_memory
    from vosops.io.datasets import is_dataset
    from vosops.io.errors import InputError
    from vosops.runs.drawing_pass import Outputs
    from vosops.runs.fleet import Shard, device_of_worker
    from vosops.runs.job import Job, Settings

    mode, rate = run_mode(resume, overwrite), frame_rate(fps)
    options = model_options(option or [], backbone=backbone, checkout=checkout)
    part = Shard.parse(shard) if shard else None
    if shard == "auto" and device is None:
        device = device_of_worker()
    settings = Settings(
        model or default_model(options, weights),
        weights,
        options,
        device,
        dtype,
        memory_budget,
        naive,
        _numbers(scales),
        size,
        start,
        end,
        step,
        chunk_frames,
        chunk_overlap,
    )
    for flag, given in (
        ("--init-weights", init_weights),
        ("--init-option", init_option),
        ("--instances", instances),
    ):
        if given and not init:
            raise InputError(f"{flag} requires --init")
    keep_freed_memory()
    if live:
        unused = {
            "--init": init,
            "--points": points,
            "--box": box,
            "--start": start,
            "--step": step != 1,
            "--overlay": overlay,
            "--cutout": cutout,
            "--json": coco,
            "--chunk-frames": chunk_frames,
            "--shard": shard,
            "--steal": steal,
            "--ray": ray,
        }
        for flag in (flag for flag, given in unused.items() if given):
            raise InputError(f"{flag} cannot be combined with --live")
        if len(mask or []) != 1:
            raise InputError("--live requires one --mask, that of the first frame")
        _live(input, out, settings, str((mask or [])[0]), drop, input_option or [], mode, end)
        return
    with Console() as console, StopSignals(console.note) as signals:
        if settings.weights_notice:
            console.note(f"model {settings.model}, weights {settings.weights_notice}")
        job = Job(
            out=out,
            mode=mode,
            settings=settings,
            outputs=Outputs(overlay=overlay, cutout=cutout, coco=coco),
            fps=rate,
            progress=console,
            should_stop=lambda: signals.requested,
            shard=part,
            steal=steal,
            lease_seconds=lease,
            note=console.note,
        )
        if is_dataset(Path(input)):
            if mask or init or points or box:
                flag = "--mask" if mask else "--init" if init else "--points" if points else "--box"
                raise InputError(
                    f"{flag} cannot be combined with the root of a data set, which has its own masks"
                )
            if ray:
                from vosops.integrations.ray import segment_dataset

                names = segment_dataset(job, Path(input), sequence or [], resolution, ray, ray_workers)
                console.note(f"{out}: {len(names)} sequences")
                return
            job.dataset(Path(input), sequence or [], resolution, console.sequence)
        else:
            if sequence or resolution or shard or steal or ray:
                flags = "--sequence and --resolution"
                if shard or steal or ray:
                    flags = "--shard, --steal and --ray"
                raise InputError(f"{flags} require the root of a data set as INPUT")
            initial: InitialClasses | InitialPrompts | None = None
            if init and (points or box):
                raise InputError("--init cannot be combined with --points or --box")
            if points or box:
                initial = InitialPrompts.parse(points or [], box or [])
            if init:
                name, classes = InitialClasses.parse(init)
                chosen = model_options(init_option or [], flag=InitialClasses.flags.option)
                initial = InitialClasses(
                    name, init_weights, chosen, device, dtype, classes=classes, instances=instances
                )
            console.summary(job.video(input, mask or [], initial))


def _live(
    name: str,
    out: Path,
    settings: Settings,
    mask: str,
    drop: str,
    texts: list[str],
    mode: Mode,
    end: int | None,
) -> None:
    """Segment a stream."""
    from typing import cast

    from vosops.inference.session import Session
    from vosops.io.errors import InputError
    from vosops.io.live import Drop, LiveSource
    from vosops.runs.live import LiveRun

    for text in texts:
        if "=" not in text[1:]:
            raise InputError(f"--input-option must be NAME=VALUE, got {text}")
    options = dict(text.partition("=")[::2] for text in texts)
    session = Session(
        settings.model,
        settings.weights,
        device=settings.device,
        dtype=settings.dtype,
        size=settings.size,
        memory_budget=settings.memory_budget,
        naive=settings.naive,
        scales=settings.scales,
        **settings.options,
    )
    with (
        Console() as console,
        StopSignals(console.note) as signals,
        LiveSource(name, options, cast("Drop", drop)) as source,
    ):
        run = LiveRun(
            out,
            source,
            session,
            Path(mask),
            {"input": source.title, "drop": drop, **settings.arguments()},
            mode,
            end,
            console,
            lambda: signals.requested,
        )
        console.summary(run.execute())


def run_mode(resume: bool, overwrite: bool) -> Mode:
    """Return how to treat an existing run in the folder."""
    from vosops.io.errors import InputError

    if resume and overwrite:
        raise InputError("--resume and --overwrite are mutually exclusive")
    return "resume" if resume else "overwrite" if overwrite else "new"


def frame_rate(fps: float) -> Fraction:
    """Return --fps as the exact frame rate that cameras use."""
    from vosops.io.errors import InputError

    if not 0 < fps < math.inf:
        raise InputError(f"--fps must be above 0, got {fps}")
    return Fraction(fps).limit_denominator(_FPS_DENOMINATOR)


class StopSignals:
    """Handler that stops after the current frame on the first Ctrl-C or SIGTERM, and at once on the second.

    unit: what is finished before it stops.
    """

    def __init__(self, note: Callable[[str], None], unit: str = "frame") -> None:
        self.requested = False
        self._note = note
        self._unit = unit
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        from vosops.io.errors import InterruptedRunError

        if self.requested:
            raise InterruptedRunError("stopped at once; --resume continues from the last checkpoint")
        self.requested = True
        self._note(f"stopping after this {self._unit} (again: at once)")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _numbers(text: str) -> tuple[float, ...]:
    """Parse the numbers of a comma-separated option."""
    from vosops.io.errors import InputError

    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise InputError(f"--scales must be numbers separated by commas, got {text}") from error


class Console:
    """Shows a rich progress bar with frames a second, peak memory and time left, and the summary."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False, markup=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[memory]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._started = 0.0
        self._new = 0
        self._prefix = ""

    def __enter__(self) -> Console:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, what: str, total: int | None, done: int) -> None:
        """Start a stage's bar."""
        self._started = time.monotonic()
        self._new = 0
        self._task = self._bar.add_task(
            shown(self._prefix + what), total=total, completed=done, rate="", memory=""
        )

    def advance(self) -> None:
        """Count a frame."""
        import torch

        from vosops.inference.usage import peak_memory

        assert self._task is not None
        self._new += 1
        rate = self._new / max(time.monotonic() - self._started, 1e-9)
        peak = f"{peak_memory(cuda=False) / _MIB:.0f} MiB"
        if torch.cuda.is_available():
            peak += f" + GPU {peak_memory(cuda=True) / _MIB:.0f} MiB"
        self._bar.update(self._task, advance=1, rate=f"{rate:.1f} frames/s", memory=f"peak {peak}")

    def end(self) -> None:
        """Stop a stage's bar; an estimated total gives way to the true one."""
        if self._task is not None:
            self._bar.stop_task(self._task)
            self._task = None

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(shown(text))

    def sequence(self, name: str, summary: Summary | None) -> None:
        """Name the bars after a sequence, and show its summary when there is one."""
        self._prefix = f"{name}: "
        if summary is not None:
            self.summary(summary)

    def summary(self, summary: Summary) -> None:
        """Print the summary of a run."""
        if summary.already_complete:
            self.note(f"{summary.out}: {summary.frames} masks already exist")
        else:
            rate = summary.frames / max(summary.seconds, 1e-9)
            self.note(
                f"{summary.out}: {summary.frames} masks in {summary.seconds:.1f} s ({rate:.1f} frames/s)"
            )
        for event in summary.events[:_EVENTS_SHOWN]:
            self.note(f"  {event}")
        if len(summary.events) > _EVENTS_SHOWN:
            self.note(f"  and {len(summary.events) - _EVENTS_SHOWN} more, see report.json")
