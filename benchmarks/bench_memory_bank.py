"""A long video through MemoryBank: time and memory per frame stay constant; what each storage dtype costs.

    python benchmarks/bench_memory_bank.py [--frames 1000] [--warm-up 2500] [--budget 1GB] [--policies ...] [--out FILE]

Frames are 480p at stride 16 (30x54 positions), keys of 64 and values of 512 channels from a stand-in encoder: a fixed
random projection of 16x16 patches of a picture that drifts and slowly changes. Each policy adds every fifth frame and
reads every `--read-every`-th (all of them unless told). --warm-up: so many frames come before those that are measured,
of which every 20th is read, so that a long-term memory has filled. Medians over tenths of the video, in CPU time with
one thread; resident memory from
/proc (Linux). The errors of the storage dtypes are those of a read against storage in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vosops.io.outputs import write_text
from vosops.memory import MemoryBank, parse_bytes

RESULTS = Path(__file__).parent / "results" / "memory_bank_cpu.json"
SIZE = (480, 864)
PATCH = 16
KEY_CHANNELS, VALUE_CHANNELS = 64, 512
TOP_K = 30
POLICIES = {
    "long_term": {"policy": "long_term"},
    "window": {"policy": "window"},
    "every": {"policy": "every"},
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
PARTS = 10  # of the video, for each of which medians are kept
WARM_READ_EVERY = 20


class Encoder:
    """Keys, shrinkage, selection and values of a frame, from nothing but its number."""

    def __init__(self, objects: int) -> None:
        random = torch.Generator().manual_seed(0)
        height, width = SIZE
        coarse = torch.rand(2, 3, height // 8, width // 4, generator=random)
        self._scenes = functional.interpolate(coarse, (height * 2, width * 2), mode="bilinear")
        self._objects = objects
        self._key, self._value = (
            torch.randn(3 * PATCH * PATCH, channels, generator=random) / 10
            for channels in (KEY_CHANNELS, objects * VALUE_CHANNELS)
        )

    def __call__(self, frame: int) -> dict[str, Tensor]:
        """Return the arguments of `add` and `read`."""
        height, width = SIZE
        mix = 0.5 - 0.5 * torch.cos(torch.tensor(frame / 200.0))
        x, y = frame * 2 % width, frame % height
        picture = torch.lerp(self._scenes[0], self._scenes[1], mix)[:, y : y + height, x : x + width]
        patches = functional.unfold(picture[None] - 0.5, PATCH, stride=PATCH)[0].T
        rows, columns = height // PATCH, width // PATCH
        key = (patches @ self._key).T.reshape(1, KEY_CHANNELS, rows, columns)
        value = (patches @ self._value).T.reshape(1, self._objects, VALUE_CHANNELS, rows, columns)
        return {
            "key": key,
            "value": value,
            "shrinkage": 1 + key[:, :1].square(),
            "selection": key.flip(1).sigmoid(),
        }


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def run(options: dict, frames: int, warm_up: int, budget: str, read_every: int, objects: int) -> dict:
    """One policy over the whole video, of which all but the first `warm_up` frames are measured."""
    bank = MemoryBank(top_k=TOP_K, budget=budget, **options)
    encoder, ids = Encoder(objects), list(range(1, objects + 1))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    parts: list[dict[str, list[float]]] = [{"add": [], "read": []} for _ in range(PARTS)]
    residents, reserved, positions = [], 0, []
    for frame in range(warm_up + frames):
        measured = frame - warm_up
        part = parts[measured * PARTS // frames] if measured >= 0 else {"add": [], "read": []}
        every = read_every if measured >= 0 else WARM_READ_EVERY
        reads, adds = bool(bank.objects) and frame % every == 0, bank.due(frame)
        data = encoder(frame) if reads or adds else {}
        if reads:
            start = clock()
            bank.read(data["key"], data["selection"])
            part["read"].append(clock() - start)
        if adds:
            start = clock()
            bank.add(
                frame,
                data["key"],
                data["value"],
                ids,
                shrinkage=data["shrinkage"],
                selection=data["selection"],
            )
            part["add"].append(clock() - start)
        reserved = max(reserved, bank.bytes_reserved)
        assert bank.bytes_used <= bank.bytes_reserved <= parse_bytes(budget), "the budget is never passed"
        if measured >= 0 and (measured + 1) * PARTS % frames < PARTS:
            residents.append(resident_bytes())
            positions.append(bank.num_positions)
    return {
        "frames": frames,
        "warm_up": warm_up,
        "objects": objects,
        "budget": parse_bytes(budget),
        "bytes_reserved_at_most": reserved,
        "bytes_used_at_the_end": bank.bytes_used,
        "read_milliseconds": [round(1000 * statistics.median(p["read"]), 2) for p in parts],
        "add_milliseconds": [round(1000 * statistics.median(p["add"]), 2) for p in parts],
        "longest_add_milliseconds": round(1000 * max(max(p["add"]) for p in parts), 1),
        "positions": positions,
        "resident_megabytes": [round(resident / 1e6) for resident in residents],
    }


def storage_errors() -> dict:
    """For each dtype the error of a read, relative to the root mean square of what it reads, and the bytes."""
    encoder = Encoder(1)
    banks = {str(dtype): MemoryBank(top_k=TOP_K, dtype=dtype) for dtype in DTYPES}
    banks["torch.int8, keys in float32"] = MemoryBank(top_k=TOP_K, dtype=torch.int8, key_dtype=torch.float32)
    banks["torch.bfloat16, keys in float32"] = MemoryBank(
        top_k=TOP_K, dtype=torch.bfloat16, key_dtype=torch.float32
    )
    for frame in range(0, 50, 5):
        data = encoder(frame)
        for bank in banks.values():
            bank.add(frame, data["key"], data["value"], [1], shrinkage=data["shrinkage"])
    query = encoder(52)
    reads = {name: bank.read(query["key"], query["selection"]) for name, bank in banks.items()}
    exact = reads["torch.float32"]
    scale = exact.square().mean().sqrt()
    return {
        name: {
            "root_mean_square": float(f"{((read - exact).square().mean().sqrt() / scale).item():.2g}"),
            "greatest": float(f"{((read - exact).abs().amax() / scale).item():.2g}"),
            "bytes_per_position": banks[name].bytes_used / banks[name].num_positions,
        }
        for name, read in reads.items()
    }


def main() -> None:
    """Run, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=0)
    parser.add_argument("--budget", default="1GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--objects", type=int, default=1)
    parser.add_argument("--read-every", type=int, default=1)
    parser.add_argument("--policies", nargs="*", default=["long_term", "window"], choices=list(POLICIES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    results["storage"] = storage_errors()
    for name in arguments.policies:
        after = f", after {arguments.warm_up} frames" if arguments.warm_up else ""
        results[f"{name}, {arguments.objects} objects{after}"] = {
            "threads": arguments.threads,
            "read_every": arguments.read_every,
            **run(
                POLICIES[name],
                arguments.frames,
                arguments.warm_up,
                arguments.budget,
                arguments.read_every,
                arguments.objects,
            ),
        }
        write_text(arguments.out, json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
