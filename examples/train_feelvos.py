r"""Trains FEELVOS on DAVIS-2016's training clips, on a CPU, over EfficientNet-Lite0's frozen ImageNet features.

    python examples/train_feelvos.py DAVIS --out feelvos.pth
    vosops segment VIDEO --mask first.png --out masks \
        --model feelvos --backbone efficientnet_lite0 --weights feelvos.pth

DAVIS: a folder in DAVIS' layout. A few hundred steps on small crops, ten minutes of one core: it shows that the network
learns, and what its training takes, and is no replacement for 200,000 steps of the original on crops of 465 pixels.
Clips of five frames feed predictions back while training; the original's three do not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from vosops.io.labels import read_labels
from vosops.io.listing import pictures, subfolders
from vosops.io.outputs import complete_or_absent
from vosops.metrics import region_similarity
from vosops.models import create_model, create_tracker
from vosops.training import ClipSampler, annealed_share, bootstrapped_cross_entropy

MAX_DISTANCE = 15  # from the first frame of a clip to the others
WEIGHT_DECAY = 4e-5  # the original's
CLIP_NORM = 5.0  # of the gradients


def main() -> None:
    """Train, and score the held-out sequences before, in between and at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("davis", type=Path)
    parser.add_argument("--resolution", default="480p")
    parser.add_argument("--out", type=Path, default=Path("feelvos.pth"))
    parser.add_argument("--matching", default="feelvos", choices=["feelvos", "cfbi"])
    parser.add_argument("--held-out", nargs="*", default=["camel", "dog", "blackswan", "car-shadow"])
    parser.add_argument("--held-out-resolution", default="480p")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--frames", type=int, default=5, help="of a clip; all but the first two are predicted"
    )
    parser.add_argument("--crop", type=int, default=160)
    parser.add_argument(
        "--scales", type=float, nargs=2, default=(0.5, 0.65), help="of the frames, before the crop"
    )
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--score-every", type=int, default=50)
    parser.add_argument("--score-frames", type=int, default=5, help="of each held-out sequence, in between")
    parser.add_argument("--score-size", type=int, default=240, help="short side at which they are segmented")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} is there already: give another name, or remove it")

    torch.manual_seed(0)
    images, annotations = (arguments.davis / part for part in ("JPEGImages", "Annotations"))
    names = [folder.name for folder in subfolders(images / arguments.resolution)]
    sample = ClipSampler(
        images / arguments.resolution,
        annotations / arguments.resolution,
        [name for name in names if name not in arguments.held_out],
        frames=arguments.frames,
        max_distance=MAX_DISTANCE,
        crop=arguments.crop,
        scales=tuple(arguments.scales),
        binary=True,
    )
    held_out = [(images / arguments.held_out_resolution / name, name) for name in arguments.held_out]
    network = create_model("feelvos", backbone="efficientnet_lite0", matching=arguments.matching)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, arguments.rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, arguments.steps, power=0.9)

    def score(frames: int) -> str:
        network.eval()
        values = [
            sequence_score(
                network, folder, annotations / arguments.held_out_resolution / name, arguments, frames
            )
            for folder, name in held_out
        ]
        each = " ".join(f"{name} {value:.3f}" for value, (_, name) in zip(values, held_out, strict=True))
        return f"J {statistics.mean(values):.3f} ({each})"

    print(f"step 0: {score(arguments.score_frames)}", flush=True)
    begun, losses = time.perf_counter(), []
    for step in range(arguments.steps):
        network.train()
        network.deeplab.eval()  # batch norm stays as it is, as the original's does
        clips = [sample() for _ in range(arguments.batch)]
        frames, labels = (torch.stack([clip[i] for clip in clips]) for i in (0, 1))
        answers = network(frames, labels[:, :2], [objects for *_, objects in clips])
        share = annealed_share(step, arguments.steps)
        loss = sum(
            bootstrapped_cross_entropy(
                functional.interpolate(logits, labels.shape[2:], mode="bilinear", align_corners=True),
                truth[2:],
                share=share,
            )
            for logits, truth in zip(answers, labels, strict=True)
        ) / len(clips)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % arguments.score_every == 0:
            seconds = (time.perf_counter() - begun) / (step + 1)
            mean = statistics.mean(losses[-arguments.score_every :])
            print(
                f"step {step + 1}: loss {mean:.3f}, {seconds:.2f} s a step, {score(arguments.score_frames)}",
                flush=True,
            )
            with complete_or_absent(arguments.out) as file:
                torch.save(network.state_dict(), file)
    print(f"all frames: {score(-1)}", flush=True)


def sequence_score(
    network: nn.Module, images: Path, annotations: Path, arguments: argparse.Namespace, count: int
) -> float:
    """Mean J of the first `count` frames after the first one, all if -1, at the size of the annotations."""
    import numpy as np
    from PIL import Image

    files = list(pictures(images).values())
    files = files if count == -1 else files[: count + 1]
    tracker, values = create_tracker(network), []
    for index, file in enumerate(files):
        truth = read_labels(annotations / f"{file.stem}.png")[0] > 0
        with Image.open(file) as opened:
            scale = arguments.score_size / min(opened.size)
            size = [round(side * scale) for side in opened.size]
            frame = torch.from_numpy(np.array(opened.convert("RGB").resize(size))).permute(2, 0, 1)
        if index == 0:
            labels = torch.from_numpy(np.array(Image.fromarray(truth).resize(size, Image.NEAREST))).long()
            tracker.initialize(frame, labels)
            continue
        probabilities = tracker.step(frame)
        full = functional.interpolate(probabilities[None], truth.shape, mode="bilinear", align_corners=False)
        values.append(region_similarity(full[0].argmax(0).numpy(), truth))
    return statistics.mean(values)


if __name__ == "__main__":
    main()
