"""A training step of STM, FEELVOS and LSTM-ICNet at their published shapes: time and memory, fused and naive.

    python benchmarks/bench_training.py [--cases stm feelvos] [--ways fused recomputed] [--limit 14]
    python benchmarks/bench_training.py --loading DAVIS      # what reading and augmenting a clip takes

fused: this package's ops, whose backward needs no affinity matrix. recomputed: also without the maps of encoders and
decoder, which are computed again (`recompute` of a configuration). naive: ops in plain PyTorch, which autograd keeps
all of. naive-recomputed: both, so that what is left of the maps does not hide what the ops keep. Each measurement is
one step (forward and backward, no optimizer) of one clip in a process of its own with one thread, in CPU time. Memory
is the greatest resident memory beyond what the process had before the step, weights included in that. Weights and
clips are random: neither time nor memory depends on them. A step that asks for more than --limit GB fails, and is
recorded as such.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from vosops import use_backend
from vosops.benchmarking.fresh import run_fresh
from vosops.benchmarking.measure import peak_bytes, resident_bytes
from vosops.benchmarking.runner import machine
from vosops.io.outputs import write_text
from vosops.training.clips_task import recompute

RESULTS = Path(__file__).parent / "results" / "training_cpu.json"
# model, options, frames, (height, width), objects or classes, patterns of modules to recompute
CASES: dict[str, tuple[str, dict[str, Any], int, tuple[int, int], int, tuple[str, ...]]] = {
    "stm": ("stm", {}, 3, (384, 384), 1, ("Encoder_?", "Decoder.*")),
    "stm-20": ("stm", {}, 20, (480, 864), 1, ("Encoder_?", "Decoder.*")),
    "feelvos": ("feelvos", {"output_stride": 16}, 3, (465, 465), 1, ("deeplab.encoder*", "head.layers.*")),
    "lstm_icnet": ("lstm_icnet", {}, 4, (512, 1024), 18, ()),
    "lstm_icnet-20": ("lstm_icnet", {}, 20, (480, 864), 18, ()),
}
LOADED = 12  # clips that are read
WAYS = ("fused", "recomputed", "naive", "naive-recomputed")


def step_of(case: str, size: tuple[int, int], way: str, frames: int) -> Any:
    """Return a function that makes a step."""
    from vosops.models import create_model
    from vosops.models.network import Network
    from vosops.training.clips_task import is_batch_norm
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


def main() -> None:
    """Measure, one process after the other, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--limit", type=float, default=14.0, help="GB of address space that a step may take")
    parser.add_argument(
        "--loading", type=Path, help="measure the loader on a data set in DAVIS' layout instead"
    )
    arguments = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": {}}
    content["machine"] = machine()
    if arguments.loading is not None:
        content["loading"] = run_fresh("bench_training", "measure_loading", str(arguments.loading))
        print(content["loading"])
        write_text(RESULTS, json.dumps(content, indent=1) + "\n")
        return
    for case in arguments.cases:
        for way in arguments.ways:
            if way.endswith("recomputed") and not CASES[case][-1]:
                continue
            try:
                found = run_fresh("bench_training", "limited", case, way, arguments.limit)
            except RuntimeError as error:
                found = {"failed": str(error)}
            content["results"].setdefault(case, {})[way] = found
            print(case, way, found, flush=True)
            write_text(RESULTS, json.dumps(content, indent=1) + "\n")


def measure_loading(davis: str) -> dict[str, Any]:
    """CPU seconds of a clip of the shapes of STM's and FEELVOS' training, read for the first time and again."""
    from vosops.training.config import load_config
    from vosops.training.samples import ClipSamples

    torch.set_num_threads(1)
    found = {}
    for name in ("stm", "feelvos"):
        config = load_config(name, [f"data.train=[{{kind: videos, root: {davis}, binary: true}}]"])
        samples = ClipSamples(config.data, config.data.clips.size, seed=0, per_step=1, objects=True)
        samples[LOADED]  # loads libraries
        times = []
        for _ in range(2):
            start = time.process_time()
            for number in range(LOADED):
                samples[number]
            times.append((time.process_time() - start) / LOADED)
        found[name] = {"first": round(times[0], 3), "again": round(times[1], 3)}
    return found


def limited(case: str, way: str, limit: float) -> dict[str, Any]:
    """Measure with at most so many GB of data, so that a step that needs more fails by itself."""
    import resource

    most = int(limit * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return measure(case, way)


if __name__ == "__main__":
    main()
