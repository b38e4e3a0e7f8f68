"""``vosops semantic``: predict the class of every pixel of a video from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vosops.cli.segment import OPTION_HELP


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("semantic")(semantic)


def semantic(
    input: Annotated[
        str, typer.Argument(help="Video file, pipe or URL, folder of frames, or animated image.")
    ],
    out: Annotated[Path, typer.Option(help="Output folder for the label maps and all other files.")],
    model: Annotated[str, typer.Option(help="Name of the model; vosops info lists them.")] = "lstm_icnet",
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the model, such as an .npz of LSTM-ICNet's variables."),
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="lstm_icnet: position of the ConvLSTMs, icnet, v1 ... v6; default: v5.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="convolution (the default), spatial, depthwise or separable; lstm_icnet: fast, faster."
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(help="Number of classes; default: Cityscapes' 19, or that of the model."),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    as_masks: Annotated[
        str | None,
        typer.Option(
            help="CLASS[,CLASS], by number or Cityscapes' names: write masks in the format of vosops segment; the "
            "first class is object 1, and classes that are not listed are background."
        ),
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Carry the state instead of running four frames per frame.")
    ] = False,
    reset: Annotated[
        list[int] | None,
        typer.Option(help="Reset the state before this frame number, where a new scene begins. Repeatable."),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Segment each frame in tiles of this many rows and columns, one after the other, to save memory."
        ),
    ] = None,
    tile_overlap: Annotated[
        int | None,
        typer.Option(
            help="Pixels that neighbouring tiles share; default: enough to give the result of the whole frame, if "
            "the receptive field of the model allows it with this tile size, otherwise a quarter of a tile."
        ),
    ] = None,
    naive: Annotated[
        bool,
        typer.Option(
            "--naive", help="Compute in the same way as the original code, a whole clip for each frame."
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the GPU, if available.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    size: Annotated[
        int, typer.Option(help="Short side of the computation in pixels; -1: the input's size.")
    ] = -1,
    start: Annotated[int | None, typer.Option(help="First frame number to process.")] = None,
    end: Annotated[int | None, typer.Option(help="Frame number at which to stop (exclusive).")] = None,
    step: Annotated[int, typer.Option(help="Process every N-th frame.")] = 1,
    fps: Annotated[float, typer.Option(help="Frame rate of a folder of images, for the overlay.")] = 24.0,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write a video with coloured classes.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Predict the class of every pixel of a video; no mask is needed.

    Writes one palette PNG of class numbers per frame, contact_sheet.png and report.json to --out.
    """
    from vosops import _verdicts
    from vosops.cli.segment import Console, StopSignals, frame_rate, run_mode
    from vosops.inference.classes import find_classes
    from vosops.inference.loop import frame_range
    from vosops.inference.semantic_loop import ClassLabels, SemanticLoop, class_palette
    from vosops.inference.settings import ModelSettings, make_semantic_tracker, model_options
    from vosops.inference.usage import keep_freed_memory
    from vosops.io.datasets import open_source
    from vosops.io.labels import davis_palette
    from vosops.io.streams import local_path
    from vosops.runs.drawing_pass import Outputs
    from vosops.runs.run import VideoRun

    mode, rate = run_mode(resume, overwrite), frame_rate(fps)
    keep_freed_memory()
    settings = ModelSettings(
        model,
        weights,
        model_options(option or [], version=version, variant=variant, num_classes=classes),
        device,
        dtype,
        naive=naive,
    )
    source = open_source(input, rate, frame_range(start, end, step, None))
    indices = frame_range(start, end, step, source.count if source.count_is_exact else None)
    tracker = make_semantic_tracker(settings, streaming=streaming, tile=tile, overlap=tile_overlap)
    objects = None if as_masks is None else find_classes(as_masks, tracker.num_classes)
    maps = ClassLabels(class_palette(tracker.num_classes))
    if objects is not None:
        maps = ClassLabels(davis_palette(), classes=False)
    with Console() as console, StopSignals(console.note) as signals:
        summary = VideoRun(
            out=out,
            source=source,
            masks=maps,
            loop=SemanticLoop(tracker, source, indices, short_side=size, objects=objects, resets=reset or ()),
            arguments={
                "input": source.title,
                "input content": source.fingerprint(),
                **settings.semantic_arguments(),
                **_verdicts.arguments(settings.place),
                "streaming": streaming,
                **({"reset": sorted(reset)} if reset else {}),
                **({} if objects is None else {"as-masks": objects}),
                **({} if tile is None else {"tile": tile, "tile-overlap": tile_overlap}),
                "size": size,
                "start": start,
                "end": end,
                "step": step,
            },
            inputs=[local_path(input), *settings.files],
            outputs=Outputs(overlay=overlay),
            progress=console,
            should_stop=lambda: signals.requested,
        ).execute(mode)
        console.summary(summary)
