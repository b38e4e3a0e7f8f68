"""What the seed, the data and the features of a training of vosops-s matter: the scores of several runs.

    vosops train vosops_s --out seed-1 --set seed=1 --set steps=500 --set ema=null ...
    vosops train vosops_s --out no-composites ... --set 'task={mix: {composites: 0}}'
    python benchmarks/ablate_training.py DAVIS seed-1=seed-1 no-composites=no-composites

docs/models/vosops_s.md has the whole commands. NAME=RUN: the --out of `vosops train vosops_s`; its weights at the end
are scored on the six held-out sequences, as binary masks at 480 rows, and its log is copied. Results are merged into
benchmarks/results/vosops_s_trainings.json, sequence by sequence; what is there is not computed again unless it is
another run. Without any NAME=RUN the table is printed again. Differences are to the first run of the file, with a
paired bootstrap interval over the sequences.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vosops.io.datasets import find_sequences
from vosops.io.outputs import sha256, write_text
from vosops.models import create_model

RESULTS = Path(__file__).parent / "results" / "vosops_s_trainings.json"
LOGS = Path(__file__).parent / "results" / "training"
DRAWS = 10_000


def described(run: Path) -> dict[str, Any]:
    """Return what a run was: its steps, seed, features, mix and sources, and its weights."""
    config = json.loads((run / "config.json").read_text())
    with (run / "log.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return {
        "steps": int(last["step"]),
        "seed": config["seed"],
        "backbone": config["options"].get("backbone", "efficientnet_lite2"),
        "task": config["task"],
        "sources": [_name(Path(x["root"] or x["images"])) for x in config["data"]["train"]],
        "weights": sha256(run / "weights.safetensors"),
    }


def merged(name: str, run: Path) -> dict[str, Any]:
    """Return the results with a run, without scores if it is not the one that is there."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = described(run)
    if results.get(name, {}).get("weights") != found["weights"]:
        results[name] = {**found, "scores": {}}
    return results


def _name(folder: Path) -> str:
    """Return what a source is called: its folder, or the one above a folder of images."""
    return folder.parent.name if folder.name == "images" else folder.name


def print_table(results: dict[str, Any]) -> None:
    """Print J, F and their mean for each run, and the difference to the first of the sequences that both have."""
    first = next(iter(results.values()))["scores"]
    for name, of_run in results.items():
        scores = of_run["scores"]
        if not scores:
            print(f"{name}: no scores")
            continue
        region, boundary = np.mean(list(scores.values()), axis=0)
        line = f"{name}: {len(scores)} sequences, J {region:.4f} F {boundary:.4f} J&F {(region + boundary) / 2:.4f}"
        both = [sequence for sequence in scores if sequence in first]
        if scores is not first and both:
            changes = np.array([np.mean(scores[one]) - np.mean(first[one]) for one in both])
            drawn = np.random.default_rng(0).choice(changes, (DRAWS, len(changes))).mean(1)
            low, high = np.quantile(drawn, (0.025, 0.975))
            line += f", {changes.mean():+.4f} ({low:+.4f} to {high:+.4f})"
        print(line)


def main() -> None:
    """Score, run by run, and print the table."""
    from ablate_vosops_s import HELD_BACK, score

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN")
    parser.add_argument("--resolution", default="240p")
    parser.add_argument("--sequences", nargs="+", default=HELD_BACK)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for item in given.runs:
        name, _, folder = item.partition("=")
        run = Path(folder)
        LOGS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / "log.csv", LOGS / f"vosops_s_{name}_log.csv")
        for sequence in find_sequences(given.root, given.sequences, given.resolution):
            if sequence.name in merged(name, run)[name]["scores"]:
                continue
            tracker = create_model("vosops_s", run / "weights.safetensors")
            found = [round(x, 4) for x in score(sequence, tracker)]
            print(name, sequence.name, *found, flush=True)
            results = merged(name, run)  # again, as other processes may have scored other sequences
            results[name]["scores"][sequence.name] = found
            write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    print_table(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
