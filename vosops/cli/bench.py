"""`vosops bench`: compare an op with naive PyTorch and the best other packages, in time and memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vosops.cli.output import BAD_INPUT, check_file, one_line, refuse, write_json
from vosops.io.outputs import is_json_with

if TYPE_CHECKING:
    from rich.table import Table

    from vosops.benchmarking.runner import Result
    from vosops.benchmarking.systems import Measurement

DTYPES = ("float32", "bfloat16", "float16")
ALL = "all"
SYSTEMS = "systems"
GIGABYTE = 1e9

RESULT_KEYS = {"machine", "results"}
"""By which the file of --json is known."""

RESULT_IDENTITY = ("case", "title", "threads")
"""What tells its results apart."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="bench")(bench)


def bench(
    op: Annotated[
        str,
        typer.Argument(
            help="local_matching, global_matching, memory_read, local_attention, local_correlation, global_conv, "
            "conv_lstm, or all; systems: whole networks."
        ),
    ],
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Run only this case; repeatable. Default: all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run one small case, in seconds.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every run to this file.", dir_okay=False)
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Write a bar chart (.png, .svg, .pdf).", dir_okay=False)
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Number of CPU threads; a single thread is timed in CPU time.")
    ] = 1,
    dtype: Annotated[
        str | None, typer.Option(help=f"Override the dtype of each case: {', '.join(DTYPES)}.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    assert_fastest: Annotated[
        bool,
        typer.Option(
            "--assert-fastest",
            help="Exit with code 1 if vosops is slower than a peer: if, over 9 rounds, the 95 % interval of the ratio "
            "of times is below 0.97.",
        ),
    ] = False,
    network: Annotated[
        list[str] | None,
        typer.Option(help="Systems: only the cases of this network; repeatable. Default: all."),
    ] = None,
    way: Annotated[
        list[str] | None, typer.Option(help="Systems: frugal or naive; repeatable. Default: both.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0.1, help="Systems: memory limit of a measurement in GB; default: 16.")
    ] = None,
) -> None:
    """Compare an op with the usual PyTorch code and the best other packages.

    All contenders run interleaved in one process on the same inputs, after their results have been compared.

    systems measures whole networks, each mode in its own process: time and peak memory of a frame, frugal and naive,
    and the largest frame that fits in 4 GB. Existing results in the --json file are kept or replaced by case.
    """
    check_file("bench", "--json", json_file)
    check_file("bench", "--plot", plot_file)
    for_ops = {"--quick": quick, "--plot": plot_file, "--dtype": dtype, "--device": device != "cpu"}
    for_ops["--assert-fastest"] = assert_fastest
    for_systems = {"--network": network, "--way": way, "--limit": limit}
    for option, value in (for_ops if op == SYSTEMS else for_systems).items():
        if value:
            _refuse(f"{option} cannot be combined with {op}")
    if op == SYSTEMS:
        measure_systems(case, network, way, threads, limit, json_file)
    else:
        measure_ops(op, case, quick, json_file, plot_file, threads, dtype, device, assert_fastest)


def measure_ops(
    op: str,
    case: list[str] | None,
    quick: bool,
    json_file: Path | None,
    plot_file: Path | None,
    threads: int,
    dtype: str | None,
    device: str,
    assert_fastest: bool = False,
) -> None:
    """Measure the cases of one op, or of all."""
    import torch

    from vosops import benchmarking
    from vosops.benchmarking.runner import FULL, JUDGED, QUICK

    benchmarks = benchmarking.BENCHMARKS
    if op != ALL and op not in benchmarks:
        _refuse(f"OP: expected one of {', '.join([*benchmarks, ALL, SYSTEMS])}; got {op!r}")
    if dtype is not None and dtype not in DTYPES:
        _refuse(f"--dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    if device not in ("cpu", "cuda"):
        _refuse(f"--device: expected cpu or cuda; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        _refuse("--device cuda: no GPU is available to PyTorch")
    if plot_file is not None:
        try:
            with one_line("bench"):
                benchmarking.check_plot(plot_file)
        except (ImportError, ValueError) as error:
            _refuse(f"--plot: {error}")
    check_file("bench", "--json", json_file, lambda content: is_json_with(content, RESULT_KEYS))
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
    here = benchmarking.machine(device)
    earlier = _measured_before(json_file, here) if case and json_file is not None else []
    for benchmark, c in work:
        with console.status(f"{benchmark.op} {c.name}: {c.title}"):
            try:
                result = benchmarking.run_case(
                    benchmark,
                    c,
                    device=device,
                    threads=threads,
                    dtype=getattr(torch, dtype) if dtype else None,
                    effort=JUDGED if assert_fastest else QUICK if quick else FULL,
                )
            except benchmarking.DisagreementError as error:
                _refuse(f"{benchmark.op} {c.name}: {error}", 1)
        results.append(result)
        console.print(*benchmarking.tables([result]))
        if json_file is not None:
            found = {_which(r): r for r in [*earlier, *(result.to_dict() for result in results)]}
            write_json("bench", json_file, {"machine": here, "results": list(found.values())}, RESULT_KEYS)
    if plot_file is not None:
        with one_line("bench"):
            benchmarking.plot(results, plot_file)
    if assert_fastest:
        lost = [line for result in results for line in _verdict(result)]
        for line in lost:
            typer.echo(f"vosops bench: {line}", err=True)
        if lost:
            raise typer.Exit(1)


def _which(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a result of a --json file from the others."""
    return tuple(result[key] for key in RESULT_IDENTITY)


def _measured_before(file: Path, here: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of a --json file that were measured on this machine, whatever the build."""
    if not file.exists():
        return []
    report = json.loads(file.read_text())
    same = {**report["machine"], "build": None} == {**here, "build": None}
    return [r for r in report["results"] if same and set(RESULT_IDENTITY) <= r.keys()]


def _verdict(result: Result) -> list[str]:
    """Return a line for each peer that a case loses to; wall time on a busy machine is no evidence."""
    case = f"{result.op} {result.case.name}"
    if not result.is_judged():
        typer.echo(f"{case}: not judged, the load average was {result.load:.1f}")
        return []
    return [
        f"{case}: {name} takes {ratio.median:.2f} times as long ({ratio.low:.2f} to {ratio.high:.2f})"
        for name, ratio in result.lost_to().items()
    ]


def measure_systems(
    cases: list[str] | None,
    networks: list[str] | None,
    ways: list[str] | None,
    threads: int,
    limit: float | None,
    json_file: Path | None,
) -> None:
    """Measure whole networks; each result is written to the file as soon as it is available."""
    from rich.console import Console

    from vosops.benchmarking import systems_suite
    from vosops.benchmarking.systems import LIMIT

    for name in ways or ():
        if name not in systems_suite.WAYS:
            _refuse(f"--way: expected one of {', '.join(systems_suite.WAYS)}; got {name!r}")
    console = Console(highlight=False)
    found: list[Measurement] = []
    try:
        chosen = systems_suite.choose(cases, networks)
    except ValueError as error:
        _refuse(f"--{error}")
    measured = systems_suite.run_cases(
        chosen,
        ways or list(systems_suite.WAYS),
        threads=threads,
        limit=LIMIT if limit is None else int(limit * GIGABYTE),
        file=json_file,
        note=lambda line: console.print(line, style="dim"),
    )
    try:
        with one_line("bench"):
            for measurement in measured:
                found.append(measurement)
    except ValueError as error:
        _refuse(str(error))
    finally:
        if found:
            console.print(systems_table(found))


def systems_table(measurements: Sequence[Measurement]) -> Table:
    """Return a row for each case, frugal beside naive."""
    from rich import box
    from rich.table import Table

    from vosops.benchmarking.systems import HEADINGS, rows

    table = Table(*HEADINGS, box=box.SIMPLE_HEAD, pad_edge=False)
    for cells in rows(measurements):
        table.add_row(*cells)
    return table


def _refuse(message: str, exit_code: int = BAD_INPUT) -> NoReturn:
    refuse("bench", message, exit_code)
