"""``vosops studio``: mark, follow, correct and export in the browser."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from vosops.cli.segment import OPTION_HELP


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("studio")(studio)


def studio(
    path: Annotated[
        Path | None, typer.Argument(help="Video file or folder of frames; without it the page asks for one.")
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Folder for projects, uploads and exports; nothing is written elsewhere.")
    ] = Path("vosops-studio"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free port.")] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of the model; vosops info lists them. Default: vosops_s if its weights are installed, otherwise "
            "propagate."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint of the model.")] = None,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the GPU, if available.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    memory_budget: Annotated[
        str | None, typer.Option(help="Limit of the memory for stored frames, such as 2GB or 512MiB.")
    ] = None,
    size: Annotated[
        int, typer.Option(help="Short side of the computation in pixels; -1: the input's size.")
    ] = 480,
    click: Annotated[
        str | None, typer.Option(help="Network of vosops semantic whose classes a click selects.")
    ] = None,
    click_weights: Annotated[Path | None, typer.Option(help="Checkpoint of the network of --click.")] = None,
    click_option: Annotated[
        list[str] | None, typer.Option(help="Option of the network of --click, NAME=VALUE. Repeatable.")
    ] = None,
    sam2: Annotated[
        Path | None,
        typer.Option(help="Folder of a SAM 2 model in the format of transformers, for clicks."),
    ] = None,
) -> None:
    """Mark objects in the browser, track them through a video, correct the masks, and export them.

    Prints the address of the page, which can only be opened on this machine. Ctrl-C stops it; the work is kept in
    --work.
    """
    import webbrowser

    from vosops.inference.settings import DEFAULT_SIZE, check_tracker, default_model, model_options
    from vosops.inference.usage import keep_freed_memory
    from vosops.io.errors import InputError
    from vosops.io.resize import wanted_size
    from vosops.runs.job import Settings
    from vosops.studio.assist import ClassClicks, ClickSettings, ClickTool, Sam2Clicks
    from vosops.studio.follow import Engine
    from vosops.studio.launch import INTERRUPTED, leave, serve

    if click and sam2:
        raise InputError("--click and --sam2 are mutually exclusive")
    for flag, given in (("--click-weights", click_weights), ("--click-option", click_option)):
        if given and not click:
            raise InputError(f"{flag} requires --click")
    tool: ClickTool | None = None
    if click:
        chosen = model_options(click_option or [], flag=ClickSettings.flags.option)
        tool = ClassClicks(ClickSettings(click, click_weights, chosen, device, dtype))
    elif sam2:
        tool = Sam2Clicks(sam2, device or "cpu")
    options = model_options(option or [])
    chosen_model = model or default_model(options, weights)
    settings = Settings(chosen_model, weights, options, device, dtype, memory_budget, size=size)
    check_tracker(settings)
    wanted_size((DEFAULT_SIZE, DEFAULT_SIZE), size)

    def announce(address: str) -> None:
        typer.echo(f"vosops studio: {address}")
        if browser:
            webbrowser.open(address)

    keep_freed_memory()
    with suppress(KeyboardInterrupt):  # a shell's background job does not get it
        serve(work, Engine(settings), video=path, port=port, click=tool, announce=announce)
    typer.echo("vosops: stopped", err=True)
    leave(INTERRUPTED)
