"""What Winograd arithmetic gives the networks' 3x3 convolutions on a CPU, beside PyTorch's: time and error.

    python benchmarks/convolutions.py [--threads 1] [--networks]

For each size: least process time of both, interleaved, and the root mean square of their errors against float64,
relative to that of the result. --networks: also a step of RGMP and STM at 480p (those of bench_systems.py), and how far
RGMP's logits of two objects at 256 x 448 are from float64. Random inputs and weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vosops.benchmarking import systems
from vosops.models import create_model
from vosops.ops import conv3x3
from vosops.ops.conv3x3 import conv2d

SIZES = (  # channels in and out, height, width: of RGMP's decoder and encoder at 480p
    (256, 256, 128, 216),
    (512, 256, 64, 108),
    (256, 256, 32, 54),
    (128, 128, 64, 108),
    (64, 64, 128, 216),
)
ROUNDS = 5
LABELS = {False: "PyTorch", True: "Winograd"}


def seconds(call: Callable[[], object]) -> float:
    """Return the CPU time of the process."""
    before = time.process_time()
    call()
    return time.process_time() - before


def both(call: Callable[[], object], rounds: int) -> dict[bool, float]:
    """Return the least times without and with Winograd arithmetic, interleaved."""
    least = dict.fromkeys(LABELS, float("inf"))
    for _ in range(rounds):
        for winograd in LABELS:
            conv3x3.HAS_WINOGRAD = winograd
            least[winograd] = min(least[winograd], seconds(call))
    return least


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square, relative to that of the exact result."""
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def convolutions() -> None:
    """Print a line for each size."""
    for inputs, outputs, height, width in SIZES:
        x, layer = torch.randn(1, inputs, height, width), nn.Conv2d(inputs, outputs, 3, padding=1)
        weight, bias = layer.weight, layer.bias
        least = both(lambda: conv2d(x, weight, bias, padding=1), ROUNDS)  # noqa: B023
        exact = torch.conv2d(x.double(), weight.double(), layer.bias.double(), padding=1)
        errors = {}
        for winograd in LABELS:
            conv3x3.HAS_WINOGRAD = winograd
            errors[winograd] = error(conv2d(x, weight, bias, padding=1), exact)
        print(
            f"{inputs} to {outputs}, {height}x{width}: {1e3 * least[False]:.1f} and {1e3 * least[True]:.1f} ms, "
            f"{least[False] / least[True]:.2f}x; errors {errors[False]:.1e} and {errors[True]:.1e}"
        )


def networks() -> None:
    """Print a line for each network's step, and RGMP's logits against float64."""
    for name in ("rgmp-480p", "stm-480p"):
        case = systems.CASES[name]
        tracker = systems._started(case, naive=False)
        tracker.step(systems._frame(case, 1))
        least = both(lambda: tracker.step(systems._frame(case, 2)), 2)  # noqa: B023
        print(f"{name}: {least[False]:.1f} and {least[True]:.1f} s, {least[False] / least[True]:.2f}x")
    network = create_model("rgmp")
    frame, masks = torch.rand(1, 3, 256, 448), torch.rand(2, 256, 448).round()

    def logits(dtype: torch.dtype) -> Tensor:
        model, image, objects = network.to(dtype), frame.to(dtype), masks.to(dtype)
        found: Tensor = model(image.flip(3), objects, model.reference(image, objects)).logits
        return found.double()

    exact = logits(torch.double)
    for winograd, label in LABELS.items():
        conv3x3.HAS_WINOGRAD = winograd
        difference = (logits(torch.float32) - exact).abs().max()
        print(f"rgmp's logits (up to {exact.abs().max():.0f}) by {label}: greatest error {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        convolutions()
        if options.networks:
            networks()


if __name__ == "__main__":
    main()
