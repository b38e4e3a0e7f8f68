"""A training step of STM, FEELVOS and LSTM-ICNet at their published shapes: time and memory, fused and naive.

    python benchmarks/bench_training.py [--cases stm feelvos] [--ways fused recomputed] [--limit 14]
    python benchmarks/bench_training.py --counted [--cases stm-20]      # bytes, on tensors without data
    python benchmarks/bench_training.py --loading DAVIS [--camvid CAMVID]   # whether reading keeps up with training

fused: this package's ops, whose backward needs no affinity matrix. recomputed: also without the maps of encoders and
decoder, which are computed again (`recompute` of a configuration). naive: ops in plain PyTorch, which autograd keeps
all of. naive-recomputed: both, so that what is left of the maps does not hide what the ops keep. Each measurement is
one step (forward and backward, no optimizer) of one clip in a process of its own with one thread, in CPU time. Memory
is the greatest resident memory beyond what the process had before the step, weights included in that. Weights and
clips are random: neither time nor memory depends on them. A step that asks for more than --limit GB fails, and is
recorded as such.

--counted runs the same step on tensors without data and counts the bytes of all tensors that are alive at the same
time, gradients included and weights not, for what no machine at hand has the memory for; workspaces within an operator
are not counted.

--loading: CPU seconds of a batch, read in the process itself, of files that are not in the cache and again of those
that are, and of the forward and backward pass of the network on it. One core that reads feeds another that trains,
`feeds` times over, where nothing is cached.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vosops import use_backend
from vosops.benchmarking.fresh import run_fresh
from vosops.benchmarking.measure import peak_bytes, resident_bytes
from vosops.benchmarking.runner import machine
from vosops.io.outputs import write_text
from vosops.training.clips_task import is_batch_norm, recompute

if TYPE_CHECKING:
    from vosops.training.config import TrainConfig
    from vosops.training.task import Task

RESULTS = Path(__file__).parent / "results" / "training_cpu.json"
# model, options, frames, (height, width), objects or classes, patterns of modules to recompute
CASES: dict[str, tuple[str, dict[str, Any], int, tuple[int, int], int, tuple[str, ...]]] = {
    "stm": ("stm", {}, 3, (384, 384), 1, ("Encoder_?", "Decoder.*")),
    "stm-20": ("stm", {}, 20, (480, 864), 1, ("Encoder_?", "Decoder.*")),
    "feelvos": ("feelvos", {"output_stride": 16}, 3, (465, 465), 1, ("deeplab.encoder*", "head.layers.*")),
    "lstm_icnet": ("lstm_icnet", {}, 4, (512, 1024), 18, ()),
    "lstm_icnet-20": ("lstm_icnet", {}, 20, (480, 864), 18, ()),
}
WARM = 1  # batches before those that count
READ = 12  # batches that are read
LOADED: dict[str, tuple[str, tuple[str, ...], int]] = {
    "clips": (
        "examples/train_clips.yaml",
        ("data.train.0.root=DAVIS", "data.held_out.sources=[]"),
        8,
    ),
    "unet": ("examples/train_camvid.yaml", (), 8),
    "deeplabv3plus": (
        "examples/train_camvid.yaml",
        ("model=deeplabv3plus", "options.backbone=mobilenet_v2"),
        8,
    ),
    "vosops_s": (
        "vosops_s",
        ("data.train=[{kind: videos, root: DAVIS}]", "options={pretrained: false}"),
        16,
    ),
    "stm": ("stm", ("data.train=[{kind: videos, root: DAVIS}]",), 2),
    "feelvos": ("feelvos", ("data.train=[{kind: videos, root: DAVIS}]", "batch=1"), 1),
}
"""Configuration, settings, batches that the network computes."""
WAYS = ("fused", "recomputed", "naive", "naive-recomputed")


def step_of(case: str, size: tuple[int, int], way: str, frames: int) -> Any:
    """Return a function that makes a step."""
    from vosops.models import create_model
    from vosops.models.network import Network
    from vosops.training.config import Loss
    from vosops.training.objectives import sample_loss

    name, options, _, _, objects, patterns = CASES[case]
    network = create_model(name, **options).train()
    for module in network.modules():
        if is_batch_norm(module):
            module.eval()  # all three are trained so
    if way.endswith("recomputed"):
        recompute(network, patterns, norms_are_fixed=True)
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(1, frames, 3, *size, generator=generator)
    labels = torch.randint(0, objects + 1, (1, frames, *size), generator=generator, dtype=torch.uint8)

    def step() -> None:
        if isinstance(network, Network):
            outputs = [(1.0, network.clip_logits(clip, labels, objects))]
        else:
            outputs = network.supervised(clip)
        losses = [
            weight * sample_loss(logits[0], labels[0, -logits.shape[1] :], Loss(), 0)
            for weight, logits in outputs
        ]
        torch.stack(losses).sum().backward()

    return step


def measure(case: str, way: str) -> dict[str, Any]:
    """Seconds of CPU time, bytes of memory and of the process before; called in a process of its own."""
    torch.set_num_threads(1)
    _, _, frames, size, _, _ = CASES[case]
    small = tuple(max(64, side // 8) for side in size) if not case.startswith("lstm_icnet") else (128, 128)
    step_of(case, (small[0] // 32 * 32, small[1] // 32 * 32), way, 3)()  # loads libraries
    step = step_of(case, size, way, frames)
    before = resident_bytes()
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = time.process_time()
        with use_backend("reference") if way.startswith("naive") else nullcontext():
            step()
        seconds = time.process_time() - start

    peak = peak_bytes(timed, torch.device("cpu"))
    return {"seconds": round(seconds, 1), "memory": peak, "before": before}


def counted(case: str, way: str) -> dict[str, Any]:
    """Count the bytes of the tensors of a step that are alive at the same time; called in a process of its own."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vosops.benchmarking.live_bytes import LiveBytes

    _, _, frames, size, _, _ = CASES[case]
    step = step_of(case, size, way, frames)
    ops = use_backend("reference") if way.startswith("naive") else nullcontext()
    with ops, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        step()
    return {"counted": live.peak}


def main() -> None:
    """Measure, one process after the other, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--limit", type=float, default=14.0, help="GB of address space that a step may take")
    parser.add_argument("--counted", action="store_true", help="count bytes instead of measuring")
    parser.add_argument(
        "--loading", type=Path, help="measure the loader on a data set in DAVIS' layout instead"
    )
    parser.add_argument(
        "--camvid", type=Path, help="with --loading: a folder with train/images and train/masks"
    )
    arguments = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": {}}
    content["machine"] = machine()
    if arguments.loading is not None:
        for name in LOADED:
            if needs_camvid(name) and arguments.camvid is None:
                continue
            found = run_fresh("bench_training", "measure_loading", name, arguments.loading, arguments.camvid)
            content.setdefault("loading", {})[name] = found
            print(name, found, flush=True)
            write_text(RESULTS, json.dumps(content, indent=1) + "\n")
        return
    for case in arguments.cases:
        for way in arguments.ways:
            if way.endswith("recomputed") and not CASES[case][-1]:
                continue
            try:
                if arguments.counted:
                    found = run_fresh("bench_training", "counted", case, way)
                else:
                    found = run_fresh("bench_training", "limited", case, way, arguments.limit)
            except RuntimeError as error:
                found = {"failed": str(error)}
            results = content["results"].setdefault(case, {})
            results[way] = {**results.get(way, {}), **found} if arguments.counted else found
            print(case, way, found, flush=True)
            write_text(RESULTS, json.dumps(content, indent=1) + "\n")


def measure_loading(name: str, davis: Path, camvid: Path | None) -> dict[str, Any]:
    """CPU seconds of a batch, read and computed, in a training of LOADED; called in a process of its own."""
    from vosops.training.config import load_config
    from vosops.training.task import create_task

    torch.set_num_threads(1)
    source, settings, count = LOADED[name]
    changes = [one.replace("DAVIS", str(davis)) for one in settings]
    if needs_camvid(name):
        changes += [f"data.train.0.{kind}={camvid}/train/{kind}" for kind in ("images", "masks")]
        changes.append("data.held_out.sources=[]")
    changes += ["data.workers=0", "device=cpu"]
    uncached = load_config(source, [*changes, "data.cache=1"])
    task = create_task(uncached)
    model = step_seconds(task, uncached, count)
    if uncached.model == "vosops_s":  # which has a cache of its own, and goes on where it is
        read = again = reading_seconds(task.batches(WARM + count))
    else:
        read = reading_seconds(task.batches(0))
        task = create_task(load_config(source, [*changes, "data.cache=8GB"]))
        reading_seconds(task.batches(0))
        again = reading_seconds(task.batches(0))
    found = {"read": read, "read again": again, "model": model}
    return {**{k: round(v, 4) for k, v in found.items()}, "feeds": round(model / read, 1)}


def needs_camvid(name: str) -> bool:
    """Return whether a training of LOADED reads images with classes."""
    return LOADED[name][0].endswith("camvid.yaml")


def reading_seconds(batches: Iterator[Any]) -> float:
    """Return the CPU seconds in which a batch is read and augmented."""
    for _ in range(WARM):
        next(batches)
    start = time.process_time()
    for _ in range(READ):
        next(batches)
    return (time.process_time() - start) / READ


def step_seconds(task: Task, config: TrainConfig, count: int) -> float:
    """Return the CPU seconds of a batch's forward and backward pass, in the precision of the run."""
    from vosops.training.devices import create_fabric

    network = task.network.train()
    if config.freeze_batch_norm:
        for module in filter(is_batch_norm, network.modules()):
            module.eval()
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    fabric, batches, seconds = create_fabric(config), task.batches(0), 0.0
    for number in range(WARM + count):
        batch = next(batches)
        start = time.process_time()
        with fabric.autocast():
            loss, _ = task.loss(network, batch)
        loss.backward()
        network.zero_grad()
        seconds += (time.process_time() - start) * (number >= WARM)
    return seconds / count


def limited(case: str, way: str, limit: float) -> dict[str, Any]:
    """Measure with at most so many GB of data, so that a step that needs more fails by itself."""
    import resource

    most = int(limit * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return measure(case, way)


if __name__ == "__main__":
    main()
