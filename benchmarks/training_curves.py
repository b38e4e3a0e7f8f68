"""Draws the curves of training runs: the loss and the score over the steps.

    python benchmarks/training_curves.py NAME=RUN [NAME=RUN ...] [--out docs/images/training.png]

RUN is the --out of `vosops train`. Its log.csv and scores.csv are copied to benchmarks/results/training/NAME_*.csv;
from these the picture is drawn again where RUN is left out: `python benchmarks/training_curves.py NAME NAME`.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "training"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "training.png"
TABLES = ("log", "scores")


def rows(name: str, table: str) -> list[dict[str, float]]:
    """Return the rows of a table of a run."""
    with (RESULTS / f"{name}_{table}.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def draw(names: list[str], out: Path) -> None:
    """Draw loss and score of some runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    highest = 0.0
    for name in names:
        log, scores = rows(name, "log"), rows(name, "scores")
        highest = max(highest, *(row["score"] for row in scores))
        left.plot([row["step"] for row in log], [row["loss"] for row in log], label=name)
        right.plot([row["step"] for row in scores], [row["score"] for row in scores], "o-", label=name)
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step", ylabel="score", ylim=(0, 1.1 * highest))
    right.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)
    plt.close(figure)


def main() -> None:
    """Copy the tables and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME[=RUN]")
    parser.add_argument("--out", type=Path, default=IMAGE)
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    names = []
    for run in arguments.runs:
        name, given, folder = run.partition("=")
        names.append(name)
        for table in TABLES if given else ():
            shutil.copyfile(Path(folder) / f"{table}.csv", RESULTS / f"{name}_{table}.csv")
    draw(names, arguments.out)


if __name__ == "__main__":
    main()
