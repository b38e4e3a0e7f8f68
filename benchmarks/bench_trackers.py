"""CPU time of a frame by several trackers in turn, in one process with one thread.

    python benchmarks/bench_trackers.py DAVIS [--resolution 480p] [--sequences camel dog] [--models propagate vosops_s]

Each frame is segmented by every tracker, in an order that changes, so that what else the machine does meets all of
them. The first frame after the mask is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from vosops.inference.usage import keep_freed_memory
from vosops.io.datasets import VideoSequence, find_sequences
from vosops.io.labels import read_labels
from vosops.io.listing import label_maps, pictures
from vosops.io.pictures import read_frame
from vosops.models import create_model

ROWS = 480


def seconds_of_frames(sequence: VideoSequence, models: list[str], most: int) -> list[list[float]]:
    """Return the CPU seconds of each counted frame, a list for each model."""
    paths = list(pictures(sequence.frames).values())[: most + 2]
    mask = next(iter(label_maps(sequence.masks).values()))
    frames = [torch.from_numpy(read_frame(path)).permute(2, 0, 1).contiguous() for path in paths]
    labels = torch.from_numpy((read_labels(mask)[0] > 0).astype("uint8"))
    trackers = [create_model(model, size=ROWS) for model in models]
    for tracker in trackers:
        tracker.initialize(frames[0], labels)
    seconds: list[list[float]] = [[] for _ in models]
    for i, frame in enumerate(frames[1:]):
        for which in range(len(models)):
            which = (which + i) % len(models)
            start = time.process_time()
            trackers[which].step(frame, output="labels")
            seconds[which].append(time.process_time() - start)
    return [of_model[1:] for of_model in seconds]


def main() -> None:
    """Print a line for each sequence: medians in milliseconds, and their ratios to the first model's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--resolution", default="480p")
    parser.add_argument("--sequences", nargs="+", default=["blackswan", "camel", "car-shadow", "dog"])
    parser.add_argument("--models", nargs="+", default=["propagate", "vosops_s"])
    parser.add_argument("--frames", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for sequence in find_sequences(given.root, given.sequences, given.resolution):
        found = seconds_of_frames(sequence, given.models, given.frames)
        medians = [statistics.median(seconds) for seconds in found]
        parts = [
            f"{model} {median * 1e3:.0f} ms ({median / medians[0]:.2f})"
            for model, median in zip(given.models, medians, strict=True)
        ]
        print(sequence.name, *parts, flush=True)


if __name__ == "__main__":
    main()
