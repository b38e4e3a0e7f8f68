"""The read of SAM 2's memory attention alone, keys of 256 channels and values of 64, beside PyTorch's own attention.

    python benchmarks/bench_memory_attention.py [--sides 32 64] [--dtypes float32 bfloat16]

A memory of seven frames and sixteen pointers of four positions, a side of 32 for images of 512 x 512. Each way runs
three times in turn, in CPU time of one thread, and the least is printed. `projected` is what SAM 2 does: values of 256
channels, the projection not counted. `a quarter`: memory_lengths leaves three quarters of the memory out.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

import vosops

FRAMES, POINTERS = 7, 64
KEY_CHANNELS, VALUE_CHANNELS = 256, 64
ROUNDS = 3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def measure(side: int, dtype: torch.dtype) -> dict[str, float]:
    """Return the seconds of each way."""
    pixels = side * side
    memory = FRAMES * pixels + POINTERS
    query, key, value, projected = (
        torch.randn(1, length, channels, dtype=dtype)
        for length, channels in (
            (pixels, KEY_CHANNELS),
            (memory, KEY_CHANNELS),
            (memory, VALUE_CHANNELS),
            (memory, KEY_CHANNELS),
        )
    )

    def read(**options: list[int]) -> torch.Tensor:
        return vosops.memory_read(query.mT, key.mT, value.mT, **options).mT

    def attend(values: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query[:, None], key[:, None], values[:, None])[:, 0]

    ways = {
        "vosops": read,
        "a quarter": lambda: read(memory_lengths=[memory // 4]),
        "PyTorch": lambda: attend(value),
        "projected": lambda: attend(projected),
    }
    torch.testing.assert_close(read(), attend(value), rtol=0, atol=TOLERANCE[dtype])
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            way()
            least[name] = min(least[name], time.process_time() - started)
    return least


def main() -> None:
    """Print a row for each side and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| frame | vosops | a quarter | PyTorch | projected |\n|---|---|---|---|---|")
    for side in arguments.sides:
        for name in arguments.dtypes:
            seconds = measure(side, getattr(torch, name))
            cells = " | ".join(f"{each * 1e3:.0f} ms" for each in seconds.values())
            print(f"| {side} x {side}, {name} | {cells} |", flush=True)
    capability = torch.ops.vosops.cpu_capability()
    print(f"torch {torch.__version__}, CPU library {capability}, load {os.getloadavg()[0]:.0f}")


if __name__ == "__main__":
    main()
