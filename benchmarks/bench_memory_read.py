"""memory_read beside the formulations that people write, interleaved in one process; prints and keeps a table.

    python benchmarks/bench_memory_read.py [CASE ...] [--rounds 5] [--threads 1] [--out FILE]

Times are process CPU time with one thread, wall time with more; the median over the rounds. Every contender's output
is compared with the naive one first. Peaks need /proc (Linux): the high-water mark above the level at the call.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import vosops

RESULTS = Path(__file__).parent / "results" / "memory_read_cpu.json"
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One size: P query pixels, T frames of as many, O objects."""

    name: str
    pixels: int
    frames: int
    objects: int
    key_channels: int = 128
    value_channels: int = 512
    batch: int = 1
    top_k: int | None = None
    backward: bool = False
    channel_last: bool = False
    dtype: torch.dtype = torch.float32


CASES = (
    Case("480p T=5", 1620, 5, 1),
    Case("480p T=20", 1620, 20, 1),
    Case("480p T=100", 1620, 100, 1),
    Case("1080p T=5", 8160, 5, 1),
    Case("480p T=5 bfloat16", 1620, 5, 1, dtype=torch.bfloat16),
    Case("480p T=20 3 objects top 30", 1620, 20, 3, 64, top_k=30, channel_last=True),
    Case("480p T=20 3 objects top 30 channel-major", 1620, 20, 3, 64, top_k=30),
    Case("480p T=100 top 30", 1620, 100, 1, 64, top_k=30, channel_last=True),
    Case("480p T=5 backward", 1620, 5, 1, backward=True),
    Case("training 512", 576, 3, 3, 64, 512, batch=4, backward=True),
    Case("training 256", 576, 3, 3, 64, 256, batch=4, backward=True),
)


def naive(q: Tensor, k: Tensor, v: Tensor, top_k: int | None) -> Tensor:
    """STM's bmm, softmax, bmm; with top_k STCN's scatter into the dense affinity."""
    scores = k.transpose(1, 2) @ q / math.sqrt(k.shape[1])
    if top_k is None:
        affinity = scores.softmax(1)
    else:
        values, indices = scores.topk(top_k, 1)
        affinity = torch.zeros_like(scores).scatter_(1, indices, values.softmax(1))
    return (v.flatten(1, 2) @ affinity).unflatten(1, v.shape[1:3])


def attention(q: Tensor, k: Tensor, v: Tensor, top_k: int | None) -> Tensor:
    """scaled_dot_product_attention, the objects' channels side by side."""
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2)[:, None], k.transpose(1, 2)[:, None], v.flatten(1, 2).transpose(1, 2)[:, None]
    )
    return out[:, 0].transpose(1, 2).unflatten(1, v.shape[1:3])


def embedding_bag(q: Tensor, k: Tensor, v: Tensor, top_k: int | None) -> Tensor:
    """The best rewrite of top-k that we know in PyTorch: topk along the last dimension, embedding_bag."""
    scores = q[0].t() @ k[0] / math.sqrt(k.shape[1])
    values, indices = scores.topk(top_k, 1)
    weights = values.softmax(1)
    rows = [
        torch.nn.functional.embedding_bag(
            indices, each.t().contiguous(), per_sample_weights=weights, mode="sum"
        )
        for each in v[0]
    ]
    return torch.stack([row.t() for row in rows])[None]


def ours(q: Tensor, k: Tensor, v: Tensor, top_k: int | None) -> Tensor:
    return vosops.memory_read(q, k, v, top_k=top_k)


Contender = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


def contenders(case: Case) -> dict[str, Contender]:
    if case.top_k is not None:
        return {"vosops": ours, "STCN": naive, "embedding_bag": embedding_bag}
    return {"vosops": ours, "naive": naive, "SDPA": attention}


def inputs(case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    memory = case.frames * case.pixels
    query = torch.randn(case.batch, case.key_channels, case.pixels)
    key = torch.randn(case.batch, case.key_channels, memory)
    value = torch.randn(case.batch, case.objects, case.value_channels, memory)
    if case.channel_last:
        value = value.transpose(2, 3).contiguous().transpose(2, 3)
    return [t.to(case.dtype).requires_grad_(case.backward) for t in (query, key, value)]


def call(case: Case, contender: Contender, tensors: list[Tensor]) -> Tensor:
    out = contender(*tensors, case.top_k)
    if case.backward:
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    return out.detach()


def peak(function: Callable[[], object]) -> float | None:
    """Bytes above the level at the call; None where the system does not say."""
    status = Path("/proc/self/status")
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

        def read(field: str) -> int:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            return int(lines[field].split()[0]) * 1024

        before = read("VmRSS")
        function()
        return read("VmHWM") - before
    except (OSError, KeyError):
        return None


def measure(case: Case, rounds: int, threads: int) -> dict[str, object]:
    clock = time.process_time if threads == 1 else time.perf_counter
    tensors, chosen = inputs(case), contenders(case)
    wanted = call(case, naive, tensors).float()
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    peaks: dict[str, float | None] = {}
    for name, contender in chosen.items():
        error = (call(case, contender, tensors).float() - wanted).abs().max().item()
        assert error < AGREEMENT[case.dtype], f"{name} differs from the naive read by {error}"
        peaks[name] = peak(lambda contender=contender: call(case, contender, tensors))
    del wanted
    for _ in range(rounds):
        for name, contender in chosen.items():
            start = clock()
            call(case, contender, tensors)
            seconds[name].append(clock() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    products = 2 * case.batch * case.pixels**2 * case.frames
    operations = products * (case.key_channels + (0 if case.top_k else case.objects * case.value_channels))
    return {
        "case": {**asdict(case), "dtype": str(case.dtype)},
        "threads": threads,
        "milliseconds": {name: round(1e3 * median, 2) for name, median in medians.items()},
        "speedup": {name: round(median / medians["vosops"], 2) for name, median in medians.items()},
        "gigaflops_forward": None if case.backward else round(operations / medians["vosops"] / 1e9, 1),
        "peak_bytes": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="parts of names; all where none is given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for case in CASES:
        if options.cases and not any(part in case.name for part in options.cases):
            continue
        result = measure(case, options.rounds, options.threads)
        print(
            case.name,
            result["milliseconds"],
            result["speedup"],
            result["gigaflops_forward"],
            result["peak_bytes"],
        )
        earlier = json.loads(options.out.read_text()) if options.out.exists() else []
        kept = [r for r in earlier if (r["case"]["name"], r["threads"]) != (case.name, options.threads)]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([*kept, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
