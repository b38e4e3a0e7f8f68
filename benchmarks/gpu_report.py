"""Writes docs/performance-gpu.md, with plots, from the newest run of benchmarks/gpu_check.sh on each card.

    make gpu-report                           rewrites the page from benchmarks/results/gpu_*.json
    python -m benchmarks.gpu_report --check   exit code 1 if the page is not up to date

Without a run the page says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cuda_model, cuda_problems, cuda_report, triton_model
from benchmarks.gpu_check import SHARES, problems
from vosops.benchmarking import BENCHMARKS
from vosops.benchmarking.gpu_cases import CELLS, MODES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance-gpu.md"
OPS = tuple(BENCHMARKS)
COMMAND = "benchmarks/gpu_check.sh"

GOALS = {
    "local_matching/480p/bf16/forward": 30e-6,
    "local_matching/480p/ieee/forward": 110e-6,
    "local_matching/480p/tf32x3/forward": 55e-6,
    "local_matching/1080p/bf16/forward": 150e-6,
    "global_matching/480p/bf16/forward": 0.40e-3,
    "memory_read/480p-20-frames/bf16/forward": 190e-6,
    "memory_read/1080p-5-frames/bf16/forward": 1.2e-3,
    "memory_read/480p-20-frames-top-30/bf16/forward": 90e-6,
    "global_conv/4096x15x27/bf16/forward": 40e-6,
}
"""Seconds that vosops sets out to stay below on an H100."""

GOALS_ARE_FOR = "H100"
COLOURS = {"ieee": "#7f7f7f", "tf32x3": "#1f77b4", "tf32": "#2ca02c", "bf16": "#d62728", "f16": "#ff7f0e"}

Report = dict[str, Any]


def newest(folder: Path) -> list[Report]:
    """Return the newest readable run of each card, newest first."""
    by_card: dict[str, Report] = {}
    for file in sorted(folder.glob("gpu_*.json")):
        report = json.loads(file.read_text())
        wrong = problems(report)
        if wrong:
            raise SystemExit(f"{file} cannot be read: {'; '.join(wrong)}")
        report["file"] = file.name
        card = report["device"]["name"]
        if card not in by_card or by_card[card]["date"] < report["date"]:
            by_card[card] = report
    return sorted(by_card.values(), key=lambda report: str(report["date"]), reverse=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def duration(seconds: float) -> str:
    """Return three digits in the unit that suits."""
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def rate(value: float, unit: str) -> str:
    """Of operations or bytes a second, in tera."""
    return f"{value / 1e12:.3g} T{unit}/s"


def cells_of(report: Report) -> dict[str, Report]:
    """Return the measured cells by name; one that failed is left to `failures`."""
    cells = report["steps"].get("times", {}).get("data", {}).get("cells", {})
    return {key: cell for key, cell in cells.items() if "failed" not in cell}


def groups(report: Report, op: str) -> dict[tuple[str, bool], list[Report]]:
    """Return an op's cells by (size, backward), in the order in which they are measured."""
    cells = cells_of(report)
    found: dict[tuple[str, bool], list[Report]] = {}
    for cell in CELLS:
        if cell.op == op and cell.key in cells:
            found.setdefault((cell.size.name, cell.backward), []).append(cells[cell.key])
    return found


def fastest(cell: Report, *, ours: bool) -> Report | None:
    """Return the fastest right result of vosops or of the others."""
    right = [v for v in cell["variants"] if v["right"] and v["name"].startswith("vosops") == ours]
    return min(right, key=lambda v: float(v["median"]), default=None)


def group_table(cells: Sequence[Report]) -> str:
    """Return a row per contender, a column per arithmetic: median and share of the floor; then the peak memory."""
    modes = [mode for mode in MODES if any(cell["mode"] == mode for cell in cells)]
    names = list(dict.fromkeys(v["name"] for cell in cells for v in cell["variants"]))
    best = {(cell["mode"], cell["compiled"], v["name"]): v for cell in cells for v in cell["variants"]}
    rows, wrong = [], False
    for name in names:
        texts, peak = [], "?"
        for mode in modes:
            v = best.get((mode, False, name)) or best.get((mode, True, name))
            if v is None:
                texts.append("-")
                continue
            share = "" if v["share"] is None else f" ({v['share']:.0%})"
            mark = "" if v["right"] else " ‡" if "differs" in v else " †"
            wrong |= mark == " †"
            texts.append(f"{duration(v['median'])}{share}{mark}")
            peak = peak if v["peak"] is None or peak != "?" else f"{v['peak'] / 1e6:.3g}"
        bold = "**" if name.startswith("vosops") else ""
        rows.append([f"{bold}{name}{bold}", *texts, peak])
    lines = [table(["", *modes, "peak MB"], rows)]
    left_out = {name: why for cell in cells for name, why in cell["left_out"].items() if name not in names}
    if wrong:
        lines.append("† further from the float32 result than this arithmetic explains.")
    differs = {v["name"]: v["differs"] for cell in cells for v in cell["variants"] if "differs" in v}
    lines += [f"‡ {name} computes something near: {what}." for name, what in differs.items()]
    lines += [f"{name} left out: {why}" for name, why in left_out.items()]
    return "\n\n".join(lines)


def goals(report: Report) -> str:
    """Return what was aimed at on this card, and what was reached."""
    if GOALS_ARE_FOR not in report["device"]["name"]:
        return f"The goals are for an {GOALS_ARE_FOR}; this card has none."
    cells = cells_of(report)
    rows = []
    for key, goal in GOALS.items():
        ours = fastest(cells[key], ours=True) if key in cells else None
        if ours is None:
            rows.append([f"`{key}`", duration(goal), "not measured", ""])
            continue
        other = fastest(cells[key], ours=False)
        against = f"{other['median'] / ours['median']:.3g}x {other['name']}" if other else ""
        met = "yes" if ours["median"] <= goal else "**no**"
        rows.append(
            [f"`{key}`", duration(goal), f"{duration(ours['median'])} ({ours['name']})", met, against]
        )
    rows = [row + [""] * (5 - len(row)) for row in rows]
    return table(["case", "at most", "measured", "met", "fastest other"], rows)


def steps(report: Report) -> str:
    """Return how each step ended."""
    rows = []
    for name in SHARES:
        step = report["steps"].get(name, {"status": "not run", "reasons": [], "seconds": 0.0})
        reasons = "; ".join(step["reasons"][:3]) + (" ..." if len(step["reasons"]) > 3 else "")
        rows.append(
            [
                name,
                step["status"],
                f"{step['seconds']:.0f} s",
                reasons.replace("|", "\\|") or passed(name, step),
            ]
        )
    return table(["step", "outcome", "took", ""], rows)


def passed(name: str, step: Report) -> str:
    """Return what a step that passed can say."""
    data = step.get("data", {})
    if name == "libraries" and "loaded" in data:
        return f"loaded: {data['loaded']}"
    if name in ("smoke", "profile"):
        return f"{len(data.get('calls', {}))} calls"
    if name.startswith("tests") and "passed" in data:
        return f"{data['passed']} passed, {sum(data['skipped'].values())} skipped"
    if name == "runtime" and "checks" in data:
        outcomes = [check["outcome"].split(":")[0] for check in data["checks"]]
        return ", ".join(f"{outcomes.count(word)} {word}" for word in sorted(set(outcomes)))
    if name == "sanitizer":
        return ", ".join(f"{tool} {found['findings']} findings" for tool, found in data.items())
    return ""


def ceilings(report: Report) -> str:
    """Return what the card can do, in one line."""
    data = report["steps"].get("ceilings", {}).get("data", {})
    if not data:
        return "The card's ceilings were not measured: no shares are given."
    rates = ", ".join(f"{mode} {rate(flops, 'FLOP')}" for mode, flops in data["flops_per_second"].items())
    side = data["product_size"]
    return (
        f"Ceilings measured in the same run: a copy moves {rate(data['bytes_per_second'], 'B')} (read plus written); "
        f"products of random {side}x{side} matrices reach {rates} (tf32x3: a third of tf32)."
    )


def plot(report: Report, op: str, folder: Path) -> Path | None:
    """Every contender's times, a panel per size and direction; None where nothing was measured."""
    from matplotlib.figure import Figure

    found = groups(report, op)
    if not found:
        return None
    names = [
        list(dict.fromkeys(v["name"] for cell in cells for v in cell["variants"]))[::-1]
        for cells in found.values()
    ]
    heights = [0.8 + 0.25 * len(each) for each in names]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, cells, order in zip(panels, found.values(), names, strict=True):
        for cell in cells:
            points = [(v["median"] * 1e3, order.index(v["name"])) for v in cell["variants"]]
            axis.scatter(*zip(*points, strict=True), s=30, color=COLOURS[cell["mode"]], label=cell["mode"])
        axis.set_yticks(range(len(order)), order, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlabel("ms", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(cells[0]["title"].rsplit(", ", 2)[0], fontsize=9, loc="left")
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axis.legend(unique.values(), unique.keys(), fontsize=7, loc="upper right", bbox_to_anchor=(1.12, 1))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{Path(report['file']).stem}_{op}.svg"
    figure.savefig(file, metadata={"Date": None})
    return file


def section(report: Report) -> str:
    """Return a card: facts, outcomes, ceilings, goals, tables."""
    device, versions = report["device"], report["versions"]
    lines = [
        f"## {device['name']}",
        f"{report['date'][:10]}, commit `{report['commit'][:12]}`, compute capability {device['capability']}, driver "
        f"{device['driver']}; torch {versions['torch']}, Triton {versions.get('triton', '?')}, nvcc "
        f"{versions.get('nvcc', '?')}, Python {versions['python']}. All figures: "
        f"`benchmarks/results/{report['file']}`, written by `{COMMAND}`.",
        steps(report),
        ceilings(report),
        f"### Goals on the {device['name']}",
        goals(report),
    ]
    for op in OPS:
        found = groups(report, op)
        lines.append(f"### {op} on the {device['name']}")
        if not found:
            lines.append("Not measured.")
            continue
        lines.append(f"![{op}](images/{Path(report['file']).stem}_{op}.svg)")
        for (name, backward), cells in found.items():
            direction = "forward + backward" if backward else "forward"
            lines.append(f"**`{name}`, {direction}**: {cells[0]['title']} and the other arithmetics")
            lines.append(group_table(cells))
    failed = report["steps"].get("times", {}).get("data", {}).get("cells", {})
    lines += [f"`{key}` failed: {cell['failed']}" for key, cell in failed.items() if "failed" in cell]
    return "\n\n".join(lines)


HEADER = f"""# Performance on GPUs

This page is written by `make gpu-report` from the newest run of `{COMMAND}` on each card; do not edit it.

- Medians of up to 20 runs by CUDA events, each with cold caches (a buffer larger than L2 is written before) and
  after a head start of the host, so that launches do not count.
- In brackets: the share of the floor, which is the operations over the measured rate of matrix products in the same
  arithmetic, or the bytes over the measured rate of a copy, whichever takes longer.
- Every result is compared with the same op in float32 on the CPU first. Peak memory is what PyTorch allocates
  beyond the inputs.
- `ieee`, `tf32x3` and `tf32` are float32 with that `precision`; other packages run with TF32 off, off and on."""

NOTHING = f"""**No GPU has been measured yet: there is no run in `benchmarks/results/`.** No figure for a GPU anywhere
in this documentation was measured on one. On a machine with an NVIDIA GPU, nvcc and PyTorch 2.10 or newer,

```bash
{COMMAND}
make gpu-report
```

tests, measures and fills this page within nine minutes, with libraries that were built before
(`benchmarks/gpu_pack.sh`) or there (`--build`)."""


MODEL = f"""## What the static model predicts

`benchmarks/cuda_model.py` and `benchmarks/cuda_report.py` count, without a GPU, what a warp of the CUDA C++ kernels
issues, multiplies and moves for each tile, and how many waves of blocks the hosts launch. For 16 bits, forward, one
object:

    time = blocks of a multiprocessor * warps * tiles of a warp * max(issue, products, shared memory) / clock
           + bytes of the copies around it / bandwidth + {cuda_model.START * 1e6:.0f} us * launches

    issue         instructions of a tile / {cuda_model.SCHEDULERS}
    products      HMMA (of a kernel without them FFMA) of a tile * cycles of one / {cuda_model.SCHEDULERS}
    shared memory bytes of a tile / {cuda_model.SHARED_BYTES_A_CYCLE}, those through the first-level cache included

or, where that takes longer, the bytes that a kernel must move over the bandwidth, in place of its tiles. What PyTorch
does around our kernels takes at least its bytes over the bandwidth, or its operations at the data sheet's rate, and
{cuda_model.START * 1e6:.0f} us a launch; bytes that stay in the second-level cache count as if they did not. The
scores of `local_attention` are float32 in any dtype.

{{cards}}. The floor is the useful operations at an H100's {cuda_model.H100_FLOPS / 1e12:.0f} TFLOP/s, or the bytes at
{cuda_model.H100_BYTES / 1e12:.2f} TB/s. A prediction is a lower bound: latencies that a kernel does not hide come on
top, and no figure here was measured on a GPU."""

REASONS = "Goals that are not met, and why:"

BACKWARD = """### Gradients

The same of the kernels of the backward ops, which are reported and have no limits. What `global_conv` does for the
gradient of its input is the kernel above. A kernel's launches are counted as its own, and what no row stands for in the
first of an op. Data are random. Where a warp has one tile, here as above, both sides of a branch count (of the cell
update of `conv_lstm` with a second summand and without one), so that such a time may also be above the least one."""

WITHOUT_TILES = """### What has no row of its own

These ops of the library are in the time of another one, or are served by its kernel for as many products:

{parts}

These kernels move bytes and multiply next to nothing: in the times above they are launches, and bytes over the
bandwidth where these do not stay in the second-level cache.

{bytes}

No problem above comes to these:

{others}

`soft_aggregate` and `conv3x3` have no kernel in CUDA C++: PyTorch serves them."""

BENCHMARKED = {"memory_select": "memory_read", "matching_backward": "local_matching"}
"""The op by which a kernel is timed, where the names do not say it."""
NOT_TIMED_ALONE = {"memory_usage"}


def measured(reports: Sequence[Report], reference: cuda_model.Reference, card: str) -> str:
    """Return the newest median of an op by its C++ kernels in bfloat16 on a card of that name, if there is one.

    Of a backward kernel it is that of the op and its gradients together.
    """
    if reference.op in NOT_TIMED_ALONE:
        return "not alone"
    backward = reference in cuda_problems.BACKWARD
    op = BENCHMARKED.get(reference.op) or max(
        (op for op in (*OPS, "memory_gather") if reference.op.startswith(op)), key=len
    )
    size = "480p-20-frames-top-30" if "top 30" in reference.problem else ""
    op = "memory_read" if op == "memory_gather" else op
    for report in reports:
        if card.split()[0] not in report["device"]["name"]:
            continue
        for cell in cells_of(report).values():
            if cell["op"] != op or cell["mode"] != "bf16" or cell["compiled"] or size not in cell["size"]:
                continue
            found = [v for v in cell["variants"] if v["name"] == "vosops cpp"]
            if found and cell["backward"] == backward:
                return f"{duration(found[0]['median'])} ({cell['size']})"
    return "nothing yet"


def newest_table() -> Path:
    """Return the committed table of the newest nvcc."""
    return max(cuda_report.TABLES.glob("*.json"), key=lambda path: [int(n) for n in path.stem.split(".")])


def predicted(
    rows: cuda_report.Table, reference: cuda_model.Reference, card: cuda_model.Card
) -> cuda_model.Prediction:
    """Return what the static model says of a problem on a card, from a table and the committed launches."""
    target = "sm_90a" if "H100" in card.name else "sm_80"
    row = rows[target][reference.kernel]
    launched = json.loads(cuda_model.LAUNCHES.read_text())
    launch = launched[reference.kernel][str(card.multiprocessors)]
    kind = cuda_report.USUAL if reference.predicted_for == "random" else cuda_report.HOT
    resident = cuda_report.resident_with(row["blocks"], launch["shared bytes"], cuda_report.LIMITS[target])
    return cuda_model.predict(reference, cuda_model.Tile(**row[kind]), launch, resident, card)


def named(reference: cuda_model.Reference) -> str:
    """Return a problem's name, with the kernel where there are several."""
    several = len(cuda_model.parts(reference)) > 1 or reference.libraries
    kernel = f": `{reference.kernel.split(': ')[1]}`" if several else ""
    return f"`{reference.op}`, {reference.problem}{kernel}"


def seconds_of(
    rows: cuda_report.Table, references: Sequence[cuda_model.Reference], card: cuda_model.Card
) -> float:
    """Return the predicted time of a problem, of all its kernels."""
    ours = sum(predicted(rows, reference, card).seconds for reference in references)
    return ours + libraries_seconds(references, card)


def libraries_seconds(references: Sequence[cuda_model.Reference], card: cuda_model.Card) -> float:
    """Return the least time of PyTorch's kernels in a problem."""
    libraries = [library for reference in references for library in reference.libraries]
    return sum(cuda_model.library_seconds(library, card) for library in libraries)


def libraries_in_words(libraries: Sequence[cuda_model.Library]) -> str:
    """Return what PyTorch does, and in how many launches."""
    *names, last = [library.name for library in libraries]
    listed = f"{', '.join(names)} and {last}" if names else last
    return f"PyTorch's {listed} ({sum(library.launches for library in libraries)} launches)"


def times_of(
    rows: cuda_report.Table, references: Sequence[cuda_model.Reference], reports: Sequence[Report]
) -> str:
    """Return the predicted times of problems on each card; with several kernels, also of all together."""
    found = []
    for reference in references:
        for card in reference.cards:
            time = predicted(rows, reference, card)
            found.append(
                [
                    named(reference),
                    f"{card.name} ({card.multiprocessors})",
                    duration(reference.floor) if "H100" in card.name and reference.floor else "",
                    duration(time.seconds),
                    time.bound,
                    f"{time.blocks}",
                    f"{time.waves}, {time.full:.0%} full",
                    measured(reports, reference, card.name),
                ]
            )
        if reference.libraries:
            floor = sum(library.floor for library in reference.libraries)
            found += [
                [
                    f"`{reference.op}`, {reference.problem}: {libraries_in_words(reference.libraries)}",
                    f"{card.name} ({card.multiprocessors})",
                    duration(floor) if "H100" in card.name else "",
                    duration(libraries_seconds([reference], card)),
                    *("", "", "", ""),
                ]
                for card in reference.cards
            ]
        together = cuda_model.parts(reference)
        if reference is not together[-1] or (len(together) == 1 and not reference.libraries):
            continue
        found += [
            [
                f"`{reference.op}`, {reference.problem}: together",
                f"{card.name} ({card.multiprocessors})",
                duration(cuda_model.floor_of(together)) if "H100" in card.name else "",
                duration(seconds_of(rows, together, card)),
                *("", "", ""),
                measured(reports, reference, card.name),
            ]
            for card in reference.cards
        ]
    names = ["card (multiprocessors)", "floor", "predicted", "bound by", "blocks", "waves", "measured"]
    return table(["problem", *names], found)


def tiles_of(rows: cuda_report.Table, references: Sequence[cuda_model.Reference]) -> str:
    """Return the work of a tile in each problem on each target."""
    found = []
    for reference in references:
        for target in cuda_report.TARGETS:
            figures = cuda_model.Tile(**rows[target][reference.kernel][cuda_report.HOT]).figures()
            found.append([named(reference), target, *map(cuda_report.in_words, figures.values())])
    return table(["problem", "target", *cuda_model.HOT_FIGURES], found)


def predictions(reports: Sequence[Report]) -> str:
    """Return what the static model says of each op, from the committed table of the newest nvcc."""
    newest = newest_table()
    text = newest.read_text()
    _, rows = cuda_report.from_json(text)
    cards = "; ".join(
        f"{card.name}: {card.multiprocessors} multiprocessors at {card.clock / 1e9:.3g} GHz, "
        f"{card.cycles_of_product:g} cycles for an HMMA, {card.bytes_per_second / 1e12:.2f} TB/s"
        for card in (*cuda_model.CARDS, *cuda_problems.SMALL_CARDS)
    )
    goals_ = ", ".join(f"{goal:g} {figure}" for figure, goal in cuda_model.GOALS.items())
    reasons = [f"- {named(r)}: {r.reason}" for r in cuda_model.REFERENCES if r.reason]
    return "\n\n".join(
        [
            MODEL.format(cards=cards),
            times_of(rows, cuda_problems.FORWARD, reports),
            f"The work of a tile as nvcc {newest.stem} compiles it, all code and the worse of random and worst "
            f"data counted; the goals are at most {goals_}:",
            tiles_of(rows, cuda_problems.FORWARD),
            *([REASONS + "\n\n" + "\n".join(reasons)] if reasons else []),
            BACKWARD,
            times_of(rows, cuda_problems.BACKWARD, reports),
            tiles_of(rows, cuda_problems.BACKWARD),
            without_tiles(),
        ]
    )


def without_tiles() -> str:
    """Return what the model counts as a part of something else, or not at all."""
    parts = [[f"`{op}`", f"`{of}`"] for op, of in sorted(cuda_problems.PARTS.items())]
    kernels = [[f"`{kernel}`", moved] for kernel, moved in sorted(cuda_problems.ONLY_BYTES.items())]
    others = "\n".join(f"- `{kernel}`: {why}" for kernel, why in cuda_problems.OTHER_PROBLEMS.items())
    return WITHOUT_TILES.format(
        parts=table(["op", "in"], parts), bytes=table(["kernel", "moves"], kernels), others=others
    )


READ, TOP_30 = "480p, 20 frames, values channel-last", "480p, 20 frames, top 30, values channel-last"
LOCAL, GLOBAL = "480p, radius 15, one object", "480p, one object on the whole frame"
TARGETS = (
    (
        "memory_read",
        READ,
        150e-6,
        "that two warp groups hide each other's softmax; Triton's own producer warps on sm_90 keep 504 bytes of "
        "registers in local memory, and were not tried on a card",
    ),
    (
        "global_matching",
        GLOBAL,
        300e-6,
        "three objects on parts of the frame cost the same products and more list ends; issue, not products, decides "
        "in Triton",
    ),
    ("local_matching", LOCAL, 30e-6, "105 blocks leave 27 of 132 multiprocessors without work"),
    ("memory_select", TOP_30, 60e-6, "how often a query's buffer is merged depends on the data, here random"),
    ("global_conv", cuda_problems.CONV, 40e-6, "that the copies of x and weights hide behind the products"),
    (
        "conv_lstm",
        cuda_problems.CELL,
        12e-6,
        "that cuDNN's tiles fill the card: 128 x 128 of the 1620 x 512 gates are 52; by graph replay, which leaves out "
        "the host",
    ),
)
"""Op, problem, seconds on an H100 in bfloat16, and what a prediction below them does not prove."""

MODELLED_BY_LOOP = """The CUDA C++ kernels multiply by `mma.sync`, which an H100 runs at about 5/8 of its rate;
Triton's by `wgmma`. Of these `benchmarks/triton_model.py` counts a round of the hot loop (Triton {version}, sm_90a).
By descriptors one thread asks the copy engine for whole tiles; such a read serves 16-bit memories whose rows are whole
pieces of 16 bytes, once `vosops check` has found it right on the card.
Triton's `memory_select` computes the scores twice and sorts lists of as many candidates as the data have: no model.
Two bounds of a time: with all that is no product hidden behind the products, and with nothing hidden:"""


def between(bounds: Sequence[tuple[float, float]]) -> str:
    """Return the sums of lower and of upper bounds of times."""
    return " to ".join(duration(sum(bound)) for bound in zip(*bounds, strict=True))


def targets() -> str:
    """Return what is aimed at on an H100 beside what the models predict of each implementation."""
    _, rows = cuda_report.from_json(newest_table().read_text())
    version, loops = triton_model.committed()
    h100 = cuda_model.CARDS[-1]

    def kernels_of(op: str, problem: str) -> list[cuda_model.Reference]:
        return [r for r in cuda_problems.FORWARD if (r.op, r.problem) == (op, problem)]

    def by_triton(op: str, problem: str) -> list[triton_model.Reference]:
        return [r for r in triton_model.REFERENCES if (r.op, r.problem) == (op, problem)]

    def by_cpp(op: str, problem: str) -> str:
        return duration(seconds_of(rows, kernels_of(op, problem), h100))

    def bounds(op: str, problem: str) -> str:
        if found := by_triton(op, problem):
            return between([triton_model.seconds(r, loops[r.case]) for r in found])
        kernels = kernels_of(op, problem)
        if any(kernel.limited for kernel in kernels):
            return "no model"
        # Kernels that move bytes: any implementation moves as many, with as many launches.
        moved = sum(kernel.moved / h100.bytes_per_second + cuda_model.START for kernel in kernels)
        return f"at least {duration(moved + libraries_seconds(kernels, h100))}"

    aims = [
        [f"`{op}`, {problem}", duration(target), by_cpp(op, problem), bounds(op, problem), unproved]
        for op, problem, target, unproved in TARGETS
    ]
    counted = []
    for reference in triton_model.REFERENCES:
        loop = loops[reference.case]
        shapes = ", ".join(f"{count} {shape.split('.')[0]}" for shape, count in loop.wgmma.items())
        figures = [
            f"{loop.instructions}",
            f"{loop.per_hmma:.2g}",
            f"{loop.issue:.0f}",
            f"{loop.products:.0f}",
        ]
        kernel = f": {reference.case}" if len(by_triton(reference.op, reference.problem)) > 1 else ""
        counted.append(
            [
                f"`{reference.op}`, {reference.problem}{kernel}",
                shapes,
                f"{loop.copies}",
                f"{loop.barriers}",
                *figures,
            ]
            + [between([triton_model.seconds(reference, loop)])]
        )
    loop_names = ["problem", "wgmma", "copies a thread", "barriers", "instructions a warp", "per HMMA's work"]
    loop_names += ["issue cycles", "product cycles", "predicted"]
    return "\n\n".join(
        [
            "## Targets on an H100\n\nBfloat16, forward. Nothing here was measured; a prediction is a lower bound.",
            table(["problem", "target", "CUDA C++ predicted", "Triton predicted", "not proved"], aims),
            MODELLED_BY_LOOP.format(version=version),
            table(loop_names, counted),
        ]
    )


def page(reports: Sequence[Report]) -> str:
    """Return the whole page."""
    parts = [section(report) for report in reports] if reports else [NOTHING]
    return "\n\n".join([HEADER, *parts, predictions(reports), targets()]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, say whether the page is up to date"
    )
    options = parser.parse_args(arguments)
    reports = newest(options.results)
    text = page(reports)
    if options.check:
        stale = not options.page.exists() or options.page.read_text() != text
        sys.exit(f"{options.page} is not up to date: make gpu-report" if stale else 0)
    options.page.write_text(text)
    for report in reports:
        for op in OPS:
            plot(report, op, options.page.parent / "images")
    print(f"{options.page}: {len(reports)} card{'s' * (len(reports) != 1)}")


if __name__ == "__main__":
    main()
