"""Shows results: tables for a terminal, and a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vosops.io.outputs import check_result, replace_result

if TYPE_CHECKING:
    from rich.table import Table

    from vosops.benchmarking.runner import Result

PLOT_MARK = "vosops bench"
"""In the metadata of every plot."""

OURS, THEIRS = "#d62728", "#7f7f7f"


def tables(results: Sequence[Result]) -> list[Table]:
    """Return a table per case: time, speed-up of vosops, share of the machine's peak, memory."""
    from rich.table import Table

    shown = []
    for result in results:
        table = Table(
            title=f"{result.op} {result.case.name}: {result.case.title}",
            title_justify="left",
            caption=_caption(result),
            caption_justify="left",
        )
        table.add_column("")
        for column in ("median ms", "best ms", "vosops speed-up", "share of peak", "peak MB"):
            table.add_column(column, justify="right")
        for v in result.variants:
            table.add_row(
                v.name,
                f"{v.median * 1e3:.1f}",
                f"{v.best * 1e3:.1f}",
                f"{v.speedup:.2f}x" if v is not result.variants[0] else "",
                f"{v.share:.0%}",
                "?" if v.peak is None else f"{v.peak / 1e6:.1f}",
                style="bold" if v is result.variants[0] else "",
            )
        shown.append(table)
    return shown


def _caption(result: Result) -> str:
    ceilings = result.ceilings
    lines = [
        f"{result.flops / 1e9:.2f} GFLOP, {result.clock}, {result.threads} thread{'s' * (result.threads > 1)}; peak "
        f"{ceilings.flops / 1e9:.0f} GFLOP/s by {ceilings.arithmetic_by}, {ceilings.bytes / 1e9:.0f} GB/s"
    ]
    lines += [f"{name} left out: {reason}" for name, reason in result.left_out.items()]
    goals = [
        f"{name} {reached:.2f} of {goal:g} {'met' if met else 'MISSED'}"
        for name, (goal, reached, met) in result.goals().items()
    ]
    lines += [f"goals: {'; '.join(goals)}"] if goals else []
    return "\n".join(lines)


def check_plot(file: Path) -> None:
    """Raise what `plot` would raise, before there is anything to show.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'vosops[bench]'`).
        ValueError: it does not know the format of the file's name.
        InputError: there is a file of that name that is no such plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install 'vosops[bench]'") from None
    known = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        raise ValueError(f"{file}: expected a name that ends with .{', .'.join(known)}")
    check_result(file, _is_plot)


def plot(results: Sequence[Result], file: Path) -> None:
    """Bars of time and memory for each case, on logarithmic scales; the format is that of the file's name.

    A file that is there is replaced only where it is such a plot, which its metadata say (.png, .svg, .pdf, .ps and
    .eps have some). Raises what `check_plot` does.
    """
    check_plot(file)
    from matplotlib.figure import Figure

    heights = [0.9 + 0.28 * len(result.variants) for result in results]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    rows = figure.subplots(len(results), 2, squeeze=False, height_ratios=heights)
    for axes, result in zip(rows, results, strict=True):
        names = [v.name for v in result.variants][::-1]
        colours = [THEIRS] * (len(names) - 1) + [OURS]
        milliseconds = [v.median * 1e3 for v in result.variants][::-1]
        megabytes = [(v.peak or 0) / 1e6 for v in result.variants][::-1]
        panels = ((axes[0], milliseconds, "ms"), (axes[1], megabytes, "MB above the inputs"))
        for axis, values, unit in panels:
            bars = axis.barh(names, values, color=colours, height=0.7)
            axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
            axis.set_xscale("log")
            axis.margins(x=0.15)
            axis.tick_params(labelsize=8)
            axis.set_xlabel(unit, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        axes[1].set_yticklabels([])
        axes[0].set_title(f"{result.op}: {result.case.title}", fontsize=9, loc="left")
    kind = file.suffix[1:].lower()
    key = {"png": "Software", "svg": "Creator", "pdf": "Creator", "ps": "Creator", "eps": "Creator"}.get(kind)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=150, metadata={key: PLOT_MARK} if key else None)
    replace_result(file, picture.getvalue(), _is_plot)


def _is_plot(content: bytes) -> bool:
    return PLOT_MARK.encode() in content
