"""Writes the measured numbers, and the table of models, into docs/ and README.md.

    make bench                              measures: benchmarks/results/<op>_cpu.json
    python benchmarks/make_tables.py        rewrites what lies between the marks
    python benchmarks/make_tables.py --check    exit code 1 if a file is not up to date

A region begins with `<!-- table: KIND NAME -->` and ends with `<!-- end of table -->`. KIND is goals or all (NAME: an
op), headline (NAME: an op, or "all"), segmentation (NAME: a model, whose page in docs/models has the table), systems
(NAME: a network, or "all", of benchmarks/bench_systems.py), networks (NAME: a page of docs/models, or "all", of
benchmarks/bench_networks.py) or models (NAME: objects or classes, that the models of the
registry find), makers (NAME: an op, or "all": AMD's and Intel's processors side by side, the latter from
results/<op>_intel.json) or errors (NAME: "all", of benchmarks/errors.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vosops.benchmarking import BENCHMARKS, systems
from vosops.benchmarking.cases import Plan
from vosops.models import ModelEntry, find_model, list_models

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "docs" / "performance.md",
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "models").glob("*.md")),
)
REGION = re.compile(r"(<!-- table: (\w+) (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
MISSING = "not measured"
ORIGINALS = {
    "local_matching": ("CFBI", ("CFBI loop",)),
    "global_matching": ("CFBI", ("CFBI chunks",)),
    "global_conv": ("RGMP", ("four convolutions",)),
    "memory_read": ("STM or STCN", ("bmm, softmax, bmm", "STCN top-k")),
    "conv_lstm": ("eager PyTorch", ("eager",)),
    "local_attention": ("AOT", ("dense map",)),
    "local_correlation": ("spatial-correlation-sampler", ("spatial-correlation-sampler",)),
}
"""Op -> whose code came first, and the contenders written in its manner."""
COMMON_OPTIONS = ("memory_budget",)
"""Options that the text beside the table of models tells of."""
IMAGES = {"512p": "1024 x 512", "1024p": "2048 x 1024", "4K": "3840 x 2160"}
"""Of benchmarks/bench_networks.py."""
BUSY_LOAD = 1.5
"""A load average above this is told: other programs were at work."""

Report = dict[str, Any]


def load(op: str, on: str = "cpu") -> Report:
    """Return the results file of an op; without results where there is none."""
    file = RESULTS / f"{op}_{on}.json"
    return json.loads(file.read_text()) if file.exists() else {"machine": None, "results": []}


def results_of(report: Report, case: Plan) -> Report | None:
    """Return the result of a case."""
    return next((r for r in report["results"] if r["case"] == case.name), None)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(peak: float | None) -> str:
    """Return bytes in MB."""
    return "?" if peak is None else number(peak / 1e6)


def machine_line(report: Report, op: str) -> str:
    """Return what it was measured on, and the command."""
    command = f"`vosops bench {op} --json benchmarks/results/{op}_cpu.json`"
    facts = report["machine"]
    if facts is None:
        return f"No results file yet. Command: {command}"
    loads = [r["load"] for r in report["results"] if r["load"] is not None]
    busy = (
        f" The load average was up to {max(loads):.1f} while measuring."
        if loads and max(loads) > BUSY_LOAD
        else ""
    )
    return f"{machine_facts(facts)}.{busy} Command: {command}"


def machine_facts(machine: Report) -> str:
    """Return what figures were measured on: a figure without its machine says nothing."""
    library, torch_version = machine["capability"], machine["torch"]
    return f"{machine['processor']}, CPU library {library}, torch {torch_version}, Python {machine['python']}"


def planned(case: Plan) -> dict[str, float]:
    """Return the goals of a case by the names that results give them."""
    goals = {f"x {name}": goal for name, goal in case.goals.items()}
    if case.goal_share is not None:
        goals["share of peak"] = case.goal_share
    if case.goal_memory is not None:
        goals["MB"] = case.goal_memory / 1e6
    return goals


def goal_text(name: str, goal: float) -> str:
    """Return a goal for people."""
    if name == "share of peak":
        return f"at least {goal:.0%} of the measured FMA peak"
    if name == "MB":
        return f"under {goal:g} MB above the inputs"
    return f"at least {goal:g}x {name.removeprefix('x ')}"


def reached_text(name: str, reached: float) -> str:
    """Return what was reached, in the unit of the goal."""
    if name == "share of peak":
        return f"{reached:.0%}"
    return f"{number(reached)} MB" if name == "MB" else f"{number(reached)}x"


def goals(op: str) -> str:
    """Every goal of every case, and what was reached."""
    report = load(op)
    rows = []
    for case in BENCHMARKS[op].cases:
        result = results_of(report, case)
        for name, goal in planned(case).items():
            found = result["goals"].get(name) if result else None
            reached = reached_text(name, found["reached"]) if found else MISSING
            verdict = "" if not found else "yes" if found["met"] else "**no**"
            rows.append([f"`{case.name}`: {case.title}", goal_text(name, goal), reached, verdict])
    return table(["case", "target", "measured", "met"], rows) + "\n\n" + machine_line(report, op)


def everything(op: str) -> str:
    """Return a table for each case that was measured, with all contenders."""
    report = load(op)
    parts = []
    for result in report["results"]:
        rows = []
        for i, v in enumerate(result["variants"]):
            ratio = f"{number(v['speedup'])}x" if i else ""
            times = [number(v["median"] * 1e3), number(v["best"] * 1e3)]
            rows.append([v["name"], *times, ratio, f"{v['share']:.0%}", megabytes(v["peak"])])
        ceilings = result["ceilings"]
        title = (
            f"**`{result['case']}`**: {result['title']}. {result['flops'] / 1e9:.2f} GFLOP, {result['clock']}, "
            f"{result['threads']} thread{'s' * (result['threads'] > 1)}; peak {ceilings['flops'] / 1e9:.0f} GFLOP/s."
        )
        left_out = "".join(f" {name} left out: {why}." for name, why in result["left_out"].items())
        header = ["", "median ms", "best ms", "vosops speed-up", "share of peak", "peak MB"]
        parts.append(f"{title}{left_out}\n\n{table(header, rows)}")
    return "\n\n".join([*parts, machine_line(report, op)])


def headline(ops: str) -> str:
    """Return one row for each op ("all", or one): its first case that was measured beside the code of the original."""
    names = list(BENCHMARKS) if ops == "all" else [ops]
    rows, machines = [], []
    for op in names:
        report = load(op)
        author, contenders = ORIGINALS[op]
        for result in report["results"]:
            ours, *others = result["variants"]
            original = next((v for v in others if v["name"] in contenders), None)
            if original is None:
                continue
            best = min(others, key=lambda v: v["median"])
            first = f"[`{op}`](docs/ops/{op}.md)"
            rows.append([first, result["title"], cost(ours), f"{author}: {cost(original)}", other(best)])
            machines.append(machine_facts(report["machine"]))
            break
    header = ["op", "case", "vosops", "original formulation", "fastest other"]
    return table(header, rows) + "\n\n" + "; ".join(dict.fromkeys(machines) or [MISSING]) + "."


def other(variant: Report) -> str:
    """Return a contender by name, and what it costs."""
    return f"{variant['name']}: {cost(variant)}"


def makers(ops: str) -> str:
    """Return every case ("all", or of one op) as measured on an AMD and on an Intel processor."""
    names = list(BENCHMARKS) if ops == "all" else [ops]
    rows, on = [], []
    for op in names:
        reports = load(op), load(op, "intel")
        on.append([machine_facts(r["machine"]) if r["machine"] else MISSING for r in reports])
        for case in BENCHMARKS[op].cases:
            sides = [side(results_of(report, case)) for report in reports]
            rows.append([f"`{op}`", f"`{case.name}`", *sides[0], *sides[1]])
    header = ["op", "case", "AMD, ms", "best other", "ratio", "Intel, ms", "best other", "ratio"]
    amd, intel = ("; ".join(dict.fromkeys(facts)) for facts in zip(*on, strict=True))
    command = "`vosops bench OP --assert-fastest --json benchmarks/results/OP_intel.json`"
    return f"{table(header, rows)}\n\nAMD: {amd}. Intel: {intel}. Command: {command}, on AMD `OP_cpu.json`"


def side(result: Report | None) -> list[str]:
    """Return vosops' time, the fastest contender of other origin (else its own on one thread), and the ratio."""
    if result is None:
        return [MISSING, "", ""]
    ours, *others = result["variants"]
    rivals = [v for v in others if not v["name"].startswith(ours["name"])] or others
    best = min(rivals, key=lambda v: v["median"])
    interval = result.get("ratios", {}).get(best["name"])
    ratio = f"{number(best['median'] / ours['median'])}x"
    if interval is not None:
        ratio += f" ({number(interval['low'])} to {number(interval['high'])})"
    return [number(ours["median"] * 1e3), f"{best['name']}: {number(best['median'] * 1e3)}", ratio]


def errors(_: str) -> str:
    """Return the errors of the ops at each precision."""
    file = RESULTS / "errors_cpu.json"
    if not file.exists():
        return f"{MISSING.capitalize()} yet. Command: `python benchmarks/errors.py`"
    report = json.loads(file.read_text())
    columns = report["columns"]
    rows = [
        [row["case"], row["error"], *(shown(row["errors"].get(name)) for name in columns)]
        for row in report["rows"]
    ]
    facts = machine_facts(report["machine"])
    return f"{table(['case', 'error', *columns], rows)}\n\n{facts}. Command: `python benchmarks/errors.py`"


def shown(error: float | None) -> str:
    """Return an error in two digits."""
    return "" if error is None else "0" if error == 0 else f"{error:.1e}"


def cost(variant: Report | None) -> str:
    """Time and memory."""
    if variant is None:
        return "-"
    return f"{number(variant['median'] * 1e3)} ms, {megabytes(variant['peak'])} MB"


def segmentation(model: str) -> str:
    """Return the first table below "## Measured" of a model's page: its means (bold), or all of it if it has none."""
    page = ROOT / "docs" / "models" / f"{model}.md"
    _, _, measured = page.read_text().partition("## Measured") if page.exists() else ("", "", "")
    found = re.search(r"(?:^\|.*\n)+", measured, re.MULTILINE)
    rows = found[0].splitlines() if found else [f"{MISSING.capitalize()} yet."]
    means = [row for row in rows[2:] if row.startswith("| **")]
    copied = "\n".join([*rows[:2], *means] if means else rows)
    link = f"[docs/models/{model}.md](docs/models/{model}.md#measured)"
    return f"{copied}\n\nFrom {link}, which has the command and more."


def of_systems(network: str) -> str:
    """Return what whole networks cost: all cases of one, or of all."""
    report = load("systems")
    own = [r for r in report["results"] if network in ("all", r["case"]["network"])]
    command = "`python benchmarks/bench_systems.py" + f" --network {network}`" * (network != "all")
    command = command if command.endswith("`") else command + "`"
    if not own:
        return f"{MISSING.capitalize()} yet. Command: {command}"
    facts, loads = report["machine"], [r["load"] for r in own]
    busy = f" The load average was up to {max(loads):.1f}." if max(loads) > BUSY_LOAD else ""
    threads = sorted({r["threads"] for r in own})
    return (
        systems.table([systems.Measurement.from_dict(r) for r in own])
        + f"\n\n{facts['processor']}, threads: {' or '.join(map(str, threads))}, torch {facts['torch']}.{busy} "
        f"Command: {command}"
    )


def of_networks(page: str) -> str:
    """Return what segmentation networks cost at high resolution: those of a page of docs/models, or all."""
    report = load("networks")
    rows = []
    own: dict[tuple[str, str], dict[bool, Report]] = {}
    for result in report["results"]:
        model, _, _ = result["network"].partition(",")
        if page in ("all", find_model(model).page.partition(".")[0]):
            own.setdefault((result["network"], result["size"]), {})[result["naive"]] = result
    command = "`python benchmarks/bench_networks.py`"
    if not own:
        return f"{MISSING.capitalize()} yet. Command: {command}"
    for (network, size), ways in own.items():
        model, _, option = network.partition(",")
        frugal, naive = (ways.get(way) for way in (False, True))
        cells = [f"`{model}`{',' * bool(option)}{option}", IMAGES[size]]
        for value in (in_seconds, in_gigabytes):
            cells += ["" if way is None else value(way) for way in (frugal, naive)]
        rows.append([*cells, f"{frugal['before'] / 1e9:.2f} GB" if frugal else ""])
    header = ["network", "image", "time", "naive", "memory", "naive", "process before"]
    facts, loads = report["machine"], [way["load"] for ways in own.values() for way in ways.values()]
    busy = f" The load average was up to {max(loads):.1f}." if max(loads) > BUSY_LOAD else ""
    return f"{table(header, rows)}\n\n{machine_facts(facts)}, one thread, float32.{busy} Command: {command}"


def in_seconds(result: Report) -> str:
    """Return the time of a run, if there was one."""
    return "-" if result["seconds"] is None else f"{result['seconds']:.1f} s"


def in_gigabytes(result: Report) -> str:
    """Return the memory of a run, or what its tensors would take at least."""
    if result["memory"] is None:
        return f"more than {result['counted'] / 1e9:.1f} GB"
    return f"{result['memory'] / 1e9:.2f} GB"


def of_models(found: str) -> str:
    """Return the registered models that track objects, or that segment into classes; networks without memory."""
    entries = [find_model(name) for name in list_models()]
    rows = []
    for entry in sorted(entries, key=lambda entry: entry.kind != "tracker"):
        if entry.tracks_objects != (found == "objects"):
            continue
        names = ", ".join(f"`{name}`" for name in (entry.name, *entry.aliases))
        what = entry.summary + (f" ({entry.paper})" if entry.paper else "")
        weights = entry.checkpoint or {"none": "none", "optional": "optional"}.get(
            entry.weights, "your own checkpoint"
        )
        rows.append(
            [
                f"[{names}]({entry.page})" if entry.page else names,
                what,
                parameters(entry),
                weights,
                ", ".join(f"`{option}`" for option in entry.options if option not in COMMON_OPTIONS),
            ]
        )
    return table(["name", "what it does", "parameters", "weights", "options"], rows)


def parameters(entry: ModelEntry) -> str:
    """Return how many a network has by default."""
    if entry.kind == "tracker":
        return "-"
    with torch.device("meta"):
        count = sum(x.numel() for x in entry.load()().parameters())
    return f"{count / 1e6:.1f} million" if count >= 1e5 else f"{count:,}"


KINDS = {
    "models": of_models,
    "goals": goals,
    "all": everything,
    "headline": headline,
    "segmentation": segmentation,
    "systems": of_systems,
    "networks": of_networks,
    "makers": makers,
    "errors": errors,
}


def rewritten(text: str) -> str:
    """Return the page with its regions made anew."""
    return REGION.sub(lambda m: f"{m[1]}\n{KINDS[m[2]](m[3])}\n\n{m[4]}", text)


def main() -> None:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, say what is not up to date")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text()
        fresh = rewritten(text)
        if fresh != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(fresh)
    print("not up to date:" if check else "rewrote:", ", ".join(stale) or "nothing")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
