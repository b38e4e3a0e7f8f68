"""How far LSTM-ICNet with a carried state is from the original's window of four frames, on the frames of a folder.

    python benchmarks/streaming_difference.py FOLDER [--frames 14] [--version v5] [--weights FILE]

Without a file the weights are seeded, and batch norm gets the statistics of the clip's first four frames, so that
maps have the spread of a trained network's. Prints, for each frame: the share of probability that is elsewhere (total
variation, mean over the pixels), the share of pixels whose most probable class differs, and how far the window's own
result moved since the frame before; then the processor time of a frame, median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vosops.inference import SemanticTracker
from vosops.io.listing import pictures
from vosops.models import create_model
from vosops.models.lstm_icnet import LSTMICNet

NAIVE_FRAMES = 6  # that the naive way is timed on


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=14)
    parser.add_argument("--version", default="v5")
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    paths = list(pictures(arguments.folder).values())[: arguments.frames]
    frames = [torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1) for p in paths]
    model = create_model("lstm_icnet", arguments.weights, version=arguments.version)
    if arguments.weights is None:
        calibrate(model, torch.stack(frames[:4]))
    seconds: dict[str, list[float]] = {"window": [], "streaming": [], "naive": []}
    window, streaming = SemanticTracker(model), SemanticTracker(model, streaming=True)
    naive = SemanticTracker(model, naive=True)
    before = None
    print("frame  elsewhere  other class  moved since the frame before")
    for t, frame in enumerate(frames):
        expected = timed(window, frame, seconds["window"])
        found = timed(streaming, frame, seconds["streaming"])
        if t < NAIVE_FRAMES:
            assert torch.allclose(timed(naive, frame, seconds["naive"]), expected, atol=1e-3)
        other = (found.argmax(0) != expected.argmax(0)).float().mean()
        moved = "" if before is None else f"{variation(expected, before):.3f}"
        print(f"{t:5}  {variation(found, expected):9.3f}  {other:11.3f}  {moved}")
        before = expected
    for way, spent in seconds.items():
        print(f"{way}: {statistics.median(spent[4:]):.2f} s a frame, {torch.get_num_threads()} threads")


def calibrate(model: LSTMICNet, clip: torch.Tensor) -> None:
    """Give batch norms the statistics of a clip."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model.train()(clip[None])
    model.eval()


def timed(tracker: SemanticTracker, frame: torch.Tensor, seconds: list[float]) -> torch.Tensor:
    start = time.process_time()
    probabilities = tracker.step(frame)
    seconds.append(time.process_time() - start)
    return probabilities


def variation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs().sum(0).mean() / 2


if __name__ == "__main__":
    main()
