"""`vosops bench`: an op beside naive PyTorch and the best other packages, in time and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

DTYPES = ("float32", "bfloat16", "float16")
ALL = "all"


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command(name="bench")(bench)


def bench(
    op: Annotated[
        str, typer.Argument(help="local_matching, global_matching, memory_read, conv_lstm, or all.")
    ],
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Only this case; repeatable. Default all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small case, in seconds.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every run here.", dir_okay=False)
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw bars here (.png, .svg, .pdf).", dir_okay=False)
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; one is timed in CPU time.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help=f"Instead of each case's own: {', '.join(DTYPES)}.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure an op beside the PyTorch code that people write for it and the best other packages.

    All run interleaved in one process on the same inputs, after their results were compared.
    """
    import torch

    from vosops import benchmarking
    from vosops.benchmarking.runner import FULL, QUICK

    benchmarks = benchmarking.BENCHMARKS
    if op != ALL and op not in benchmarks:
        _refuse(f"OP: expected one of {', '.join([*benchmarks, ALL])}; got {op!r}")
    if dtype is not None and dtype not in DTYPES:
        _refuse(f"--dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    if device not in ("cpu", "cuda"):
        _refuse(f"--device: expected cpu or cuda; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        _refuse("--device cuda: PyTorch finds no GPU")
    chosen = [benchmarks[op]] if op != ALL else list(benchmarks.values())
    try:
        work = [
            (benchmark, c)
            for benchmark in chosen
            for c in (
                [benchmark.case(name) for name in case]
                if case
                else [c for c in benchmark.cases if c.quick or not quick]
            )
        ]
    except ValueError as error:
        _refuse(f"--{error}")
    from rich.console import Console

    console = Console()
    results = []
    for benchmark, c in work:
        with console.status(f"{benchmark.op} {c.name}: {c.title}"):
            try:
                result = benchmarking.run_case(
                    benchmark,
                    c,
                    device=device,
                    threads=threads,
                    dtype=getattr(torch, dtype) if dtype else None,
                    effort=QUICK if quick else FULL,
                )
            except benchmarking.DisagreementError as error:
                _refuse(f"{benchmark.op} {c.name}: {error}")
        results.append(result)
        console.print(*benchmarking.tables([result]))
    try:
        if json_file is not None:
            report = {"machine": benchmarking.machine(device), "results": [r.to_dict() for r in results]}
            json_file.write_text(json.dumps(report, indent=1) + "\n")
        if plot_file is not None:
            benchmarking.plot(results, plot_file)
    except (OSError, ImportError, ValueError) as error:
        _refuse(str(error))


def _refuse(message: str) -> None:
    typer.echo(f"vosops bench: {message}", err=True)
    raise typer.Exit(1)
