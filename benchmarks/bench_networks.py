"""The segmentation networks on an image of 1024x2048 and one of 4K: time and memory of `predict`, by rows and naively.

    python benchmarks/bench_networks.py [--networks unet danet] [--sizes 1024p 4K] [--ways frugal naive] [--limit 6.5]

Each measurement is one run in a process of its own with one thread, in CPU time of the process. Memory is the greatest
resident memory during `predict` beyond what the process had before it, the interpreter, libraries and weights, which is
given separately. A naive run whose tensors alone would exceed --limit (GB) is not made: their bytes are counted on
tensors without data. Weights are random: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from vosops import use_backend
from vosops.benchmarking.fresh import run_fresh
from vosops.benchmarking.live_bytes import LiveBytes
from vosops.benchmarking.measure import peak_bytes, resident_bytes
from vosops.benchmarking.runner import machine
from vosops.io.outputs import write_text
from vosops.models import create_model, find_model

RESULTS = Path(__file__).parent / "results" / "networks_cpu.json"
SIZES = {"512p": (512, 1024), "1024p": (1024, 2048), "4K": (2160, 3840)}
DEFAULT_SIZES = ("1024p", "4K")
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet", {}),
    "unetplusplus": ("unetplusplus", {}),
    "resunet": ("resunet", {}),
    "resunetplusplus": ("resunetplusplus", {}),
    "segnet": ("segnet", {}),
    "deconvnet": ("deconvnet", {}),
    "icnn": ("icnn", {}),
    "gridnet": ("gridnet", {}),
    "deeplabv3plus": ("deeplabv3plus", {}),
    "deeplabv3plus, stride 8": ("deeplabv3plus", {"output_stride": 8}),
    "deeplabv3plus, mobilenet_v2": ("deeplabv3plus", {"backbone": "mobilenet_v2"}),
    "deeplabv3plus, xception": ("deeplabv3plus", {"backbone": "xception"}),
    "hrnet_w48": ("hrnet_w48", {}),
    "hrnet_w48_ocr": ("hrnet_w48_ocr", {}),
    "danet": ("danet", {}),
    "pspnet": ("pspnet", {}),
    "icnet": ("icnet", {}),
}
WAYS = {"frugal": False, "naive": True}
WARM_SIDE = 64  # of the image that is predicted first, which loads libraries


def measure(name: str, size: tuple[int, int], naive: bool) -> dict[str, Any]:
    """Seconds of CPU time, bytes of memory and of the process before; called in a process of its own."""
    torch.set_num_threads(1)
    model, options = NETWORKS[name]
    network = create_model(model, **options)
    seconds = 0.0

    def predict() -> None:
        nonlocal seconds
        with use_backend("reference") if naive else nullcontext():
            start = time.process_time()
            network.predict(image)
            seconds = time.process_time() - start

    image = torch.rand(3, WARM_SIDE, WARM_SIDE)
    predict()
    image = torch.rand(3, *size)
    before = resident_bytes()
    peak = peak_bytes(predict, torch.device("cpu"))
    return {"seconds": round(seconds, 2), "memory": peak, "before": before}


def counted_bytes(name: str, size: tuple[int, int]) -> int:
    """Return the bytes of the tensors of a naive run that live at the same time."""
    model, options = NETWORKS[name]
    with torch.device("meta"):
        network = find_model(model).load()(**options).eval()
    sides = [network.sides.at_least(side) for side in size]
    images = torch.empty(1, 3, *sides, device="meta")
    with torch.no_grad(), use_backend("reference"), LiveBytes() as live:
        network(images)
    return live.peak


def run(name: str, label: str, naive: bool, limit: float) -> dict[str, Any]:
    """One measurement, or why there is none."""
    size = SIZES[label]
    found: dict[str, Any] = {
        "network": name,
        "size": label,
        "naive": naive,
        "load": round(os.getloadavg()[0], 1),
    }
    if naive:
        found["counted"] = counted_bytes(name, size)
        if found["counted"] > limit * 1e9:
            return {**found, "seconds": None, "memory": None, "before": None}
    return {**found, **run_fresh("bench_networks", "measure", name, size, naive)}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=DEFAULT_SIZES)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--limit", type=float, default=6.5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for label in options.sizes:
        for name in options.networks:
            for way in options.ways:
                found = run(name, label, WAYS[way], options.limit)
                print(found, flush=True)
                keep(options.out, found)


def keep(file: Path, found: dict[str, Any]) -> None:
    """Write a result into the file, in place of an earlier one of the same case and way."""
    results = json.loads(file.read_text())["results"] if file.exists() else []
    order = {
        (n, s, w): i
        for i, (n, s, w) in enumerate((n, s, w) for s in SIZES for n in NETWORKS for w in (False, True))
    }

    def key(result: dict[str, Any]) -> tuple[str, str, bool]:
        return result["network"], result["size"], result["naive"]

    results = [r for r in results if key(r) != key(found)] + [found]
    results.sort(key=lambda r: order.get(key(r), len(order)))
    write_text(file, json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
