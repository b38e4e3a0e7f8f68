"""Ten thousand frames through `vosops segment`, with Cutie or XMem and seeded weights: memory stays where it is.

    python benchmarks/bench_long_runs.py cutie|xmem [--frames 10000] [--budget 10MB] [--checkout DIR] [--out FILE]

Frames are 64 x 48 with two objects, of a picture that drifts. XMem runs from --checkout, by default the small one with
XMem's interface of tests/integrations. The resident memory of the command's process is looked up in /proc
(Linux) when the masks of every twentieth of the frames are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from vosops.integrations.checkouts import without_pretraining
from vosops.io.listing import label_maps
from vosops.io.outputs import write_text

HEIGHT, WIDTH = 48, 64
PARTS = 20
LOOK_EVERY = 1.0  # seconds
ROOT = Path(__file__).parents[1]
CHECKOUT = ROOT / "tests" / "integrations" / "checkout"
SMALL = 256  # channels of the features of Cutie's small model


def write_inputs(folder: Path, frames: int) -> list[Path]:
    """Frames and the mask of the first one; returns their paths."""
    random = torch.Generator().manual_seed(0)
    picture = torch.rand(2 * HEIGHT, 2 * WIDTH, 3, generator=random).mul(255).to(torch.uint8).numpy()
    source = folder / "frames"
    source.mkdir()
    for t in range(frames):
        y, x = t % HEIGHT, 2 * t % WIDTH
        Image.fromarray(picture[y : y + HEIGHT, x : x + WIDTH]).save(
            source / f"{t:05d}.png", compress_level=1
        )
    labels = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    labels[4:20, 4:30], labels[24:44, 10:50] = 1, 2
    Image.fromarray(labels.numpy()).save(folder / "mask.png")
    return [source, folder / "mask.png"]


def write_weights(name: str, path: Path, checkout: Path) -> None:
    """Seeded weights of Cutie's small model, or of the checkout's XMem."""
    torch.manual_seed(0)
    if name == "cutie":
        from cutie.model.cutie import CUTIE
        from cutie.model.utils import resnet

        from vosops.integrations.cutie import _configuration

        with without_pretraining(resnet):
            network = CUTIE(_configuration({"pix_feat_proj.weight": torch.empty(SMALL, SMALL, 1, 1)}, None))
    else:
        sys.path.insert(0, str(checkout))
        from model import resnet
        from model.network import XMem

        with without_pretraining(resnet):
            network = XMem({})
    torch.save(network.state_dict(), path)


def resident_megabytes(process: int) -> float:
    """Return the memory of the process that is in RAM now."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 1e6


def run(model: str, frames: int, budget: str, checkout: Path) -> dict:
    """Return the command over all frames."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, masks = Path(temporary), Path(temporary) / "masks"
        weights = folder / "weights.pth"
        write_weights(model, weights, checkout)
        source, mask = write_inputs(folder, frames)
        command = [sys.executable, "-m", "vosops.cli", "segment", source, "--mask", mask, "--out", masks]
        command += ["--model", model, "--weights", weights, "--memory-budget", budget, "--size", "-1"]
        command += ["--checkout", checkout] if model == "xmem" else []
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        started = time.monotonic()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        looks: list[tuple[int, float]] = []
        marks = [max(1, frames * part // PARTS - 1) for part in range(PARTS + 1)]
        while process.poll() is None:
            time.sleep(LOOK_EVERY)
            while len(looks) < len(marks) and (masks / f"{marks[len(looks)]:05d}.png").exists():
                resident = resident_megabytes(process.pid)
                if resident == 0:  # it has ended
                    break
                looks.append((marks[len(looks)] + 1, round(resident, 1)))
                print(*looks[-1], "MB", flush=True)
        done = len(label_maps(masks)) if masks.is_dir() else 0
        if process.returncode != 0 or done != frames:
            raise RuntimeError(f"{done} of {frames} frames, exit code {process.returncode}")
        return {
            "frames": frames,
            "budget": budget,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "resident_megabytes": looks,
        }


def main() -> None:
    """Run it, print and keep the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("cutie", "xmem"))
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--budget", default="1MB")
    parser.add_argument("--checkout", type=Path, default=CHECKOUT)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "long_runs_cpu.json")
    arguments = parser.parse_args()
    result = run(arguments.model, arguments.frames, arguments.budget, arguments.checkout)
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    write_text(arguments.out, json.dumps({**known, arguments.model: result}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
