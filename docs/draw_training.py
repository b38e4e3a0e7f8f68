"""Draws curves of training runs of vosops-s: IoU in their streams, of the network's results and of propagate's.

    python docs/draw_training.py [NAME=]RUN/log.csv [NAME=RUN/log.csv ...] docs/images/vosops_s_training.png

The two of a run are of the same frames: propagate's is of its own logit with what the network's results have left
behind. Each seed draws other scenes, so that curves of different runs are not of the same frames.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTHED = 200  # steps


def curve(rows: list[dict[str, str]], column: str) -> list[float]:
    """Return a column of a log, each value the mean of the last rows of that many steps."""
    values = [float(row[column]) for row in rows]
    count = max(1, SMOOTHED // int(rows[0]["step"]))
    recent = [values[max(0, i - count + 1) : i + 1] for i in range(len(values))]
    return [sum(own) / len(own) for own in recent]


def main(logs: list[str], out: Path) -> None:
    """Read the columns step, iou and propagate of logs, and write a PNG."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for number, item in enumerate(logs):
        name, given, path = item.rpartition("=")
        with Path(path).open(newline="") as file:
            rows = list(csv.DictReader(file))
        ending = f", {name}" if given else ""
        for column, label, style in (("iou", "vosops-s", "-"), ("propagate", "propagate's own logit", ":")):
            steps = [int(row["step"]) for row in rows]
            axes.plot(steps, curve(rows, column), style, color=f"C{number}", label=label + ending)
    axes.set(xlabel="step of four frames", ylabel="mean IoU in the training streams")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(logs), fontsize="small")
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:-1], Path(sys.argv[-1]))
