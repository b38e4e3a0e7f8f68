"""What the trained network of vosops-s relies on: its scores where parts of what it sees are set to zero.

    python benchmarks/ablate_vosops_s.py DAVIS [--resolution 240p] [--sequences bmx-bumps ...] [--parts memory ...]

Nothing is trained again: a part without which the score does not fall may still be one that the network could have
learned to use. Binary masks, as in DAVIS-2016; the frames are processed at 480 rows. Results are merged into
benchmarks/results/vosops_s_ablation.json, sequence by sequence.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vosops.inference import segment
from vosops.io.datasets import VideoSequence, find_sequences
from vosops.io.labels import read_labels
from vosops.io.listing import label_maps
from vosops.io.outputs import write_text
from vosops.metrics import evaluate_sequence
from vosops.models import VideoTracker, create_model
from vosops.models.vosops_s import RefinerInput, VosopsS

RESULTS = Path(__file__).parent / "results" / "vosops_s_ablation.json"
ROWS = 480
HELD_BACK = ("bmx-bumps", "dance-jump", "horsejump-low", "motorbike", "rollerblade", "scooter-gray")
EVIDENCE = {
    "labelled frames": range(0, 3),
    "latest frame": range(3, 6),
    "frame three back": range(6, 9),
    "distance of the best match": range(9, 10),
    "classifier": range(10, 11),
    "fused logit": range(11, 12),
    "probabilities before": range(12, 14),
    "memory": range(14, 15),
    "motion and carried mask": range(15, 18),
}
"""Channels of RefinerInput.evidence; the last of the 19 is constant."""
MASKS = {"masks at stride 2": None}
MAPS = {"maps of strides 2 and 4": (0, 1), "maps of strides 8 and 16": (2, 3)}
PARTS = ("everything", *EVIDENCE, *MASKS, *MAPS)


def without(inputs: RefinerInput, part: str) -> RefinerInput:
    """Return what the network sees with a part of it set to zero."""
    if part in EVIDENCE:
        evidence = inputs.evidence.clone()
        evidence[:, EVIDENCE[part].start : EVIDENCE[part].stop] = 0
        return replace(inputs, evidence=evidence)
    if part in MASKS:
        return replace(inputs, masks=torch.zeros_like(inputs.masks))
    if part in MAPS:
        maps = tuple(torch.zeros_like(x) if i in MAPS[part] else x for i, x in enumerate(inputs.maps))
        return replace(inputs, maps=maps)
    return inputs


class Ablated(VosopsS):
    """The tracker, whose network does not see a part."""

    part = "everything"

    def _judged(self, inputs: RefinerInput) -> torch.Tensor:
        return super()._judged(without(inputs, self.part))


def tracker_without(part: str) -> VideoTracker:
    """Return the tracker whose network does not see a part; "propagate": without the network."""
    if part == "propagate":
        tracker: VideoTracker = create_model("propagate")
        return tracker
    ablated = Ablated()
    ablated.part = part
    return ablated


def score(sequence: VideoSequence, tracker: VideoTracker) -> tuple[float, float]:
    """Return the mean J and F of a sequence as `vosops segment` and `vosops eval` have them."""
    truths = [(read_labels(path)[0] > 0).astype(np.uint8) for path in label_maps(sequence.masks).values()]
    found = segment(sequence.frames, truths[0], model=tracker, size=ROWS, device="cpu")
    (result,) = evaluate_sequence([frame.labels.numpy() for frame in found], truths)
    return result.j.mean, result.f.mean


def main() -> None:
    """Score, sequence by sequence, and print the mean difference of each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--resolution", default="240p")
    parser.add_argument("--sequences", nargs="+", default=HELD_BACK)
    parser.add_argument("--parts", nargs="+", default=("propagate", *PARTS))
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for sequence in find_sequences(given.root, given.sequences, given.resolution):
        for part in given.parts:
            region, boundary = score(sequence, tracker_without(part))
            results.setdefault(part, {})[sequence.name] = [round(region, 4), round(boundary, 4)]
            print(sequence.name, part, *results[part][sequence.name], flush=True)
            write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    whole = results.get("everything", {})
    for part, scores in results.items():
        both = [name for name in scores if name in whole]
        change = statistics.mean(statistics.mean(scores[n]) - statistics.mean(whole[n]) for n in both)
        print(f"{part}: {change:+.4f} over {len(both)} sequences")


if __name__ == "__main__":
    main()
