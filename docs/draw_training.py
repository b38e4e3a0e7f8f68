"""Draws the curve of a training run of vosops-s: IoU in its streams, of the network's results and of propagate's.

    python docs/draw_training.py RUN/log.csv docs/images/vosops_s_training.png

The two are of the same frames: propagate's is of its own logit with what the network's results have left behind.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTHED = 4  # rows of the log


def main(log: Path, out: Path) -> None:
    """Read the columns step, iou and propagate of a log, and write a PNG."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for name, label in (("iou", "vosops-s"), ("propagate", "propagate's own logit")):
        values = [float(row[name]) for row in rows]
        means = [
            sum(values[max(0, i - SMOOTHED + 1) : i + 1]) / len(values[max(0, i - SMOOTHED + 1) : i + 1])
            for i in range(len(values))
        ]
        axes.plot([int(row["step"]) for row in rows], means, label=label)
    axes.set(xlabel="step of four frames", ylabel="mean IoU in the training streams")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
