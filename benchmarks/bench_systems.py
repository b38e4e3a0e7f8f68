"""STM, RGMP, FEELVOS and LSTM-ICNet on frames of 480p, 1080p and 4K: time and peak memory, frugal against naive.

    python benchmarks/bench_systems.py [--network stm] [--case stm-1080p] [--ways frugal naive] [--threads 2]

Cases are NETWORK-480p, -1080p, -4K and NETWORK-fits, which looks for the largest frame whose step stays under 4 GB.
Results are put into the file case by case, so that cases can be measured again, or later.
Random weights; each measurement in a process of its own. vosops/benchmarking/systems.py says more.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from vosops.benchmarking.runner import machine
from vosops.benchmarking.systems import (
    CASES,
    FITS,
    LIMIT,
    NETWORKS,
    Measurement,
    largest_that_fits,
    measure,
    table,
)

RESULTS = Path(__file__).parent / "results" / "systems_cpu.json"
WAYS = {"frugal": False, "naive": True}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=[*CASES, *FITS], metavar="CASE")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--limit", type=float, default=LIMIT / 1e9, help="GB beyond which a measurement fails"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = options.case or [
        name for name in (*CASES, *FITS) if name.split("-")[0] in options.network and is_default(name)
    ]
    for name in chosen:
        for way in options.ways:
            print(f"{name}, {way} ...", flush=True)
            load = os.getloadavg()[0]
            if name in FITS:
                found = largest_that_fits(FITS[name], naive=WAYS[way], threads=options.threads)
            else:
                limit = int(options.limit * 1e9)
                found = measure(CASES[name], naive=WAYS[way], threads=options.threads, limit=limit)
            print(f"  {found.seconds} s, {found.peak} bytes {found.failure or ''}", flush=True)
            keep(options.out, {**found.to_dict(), "threads": options.threads, "load": load})
    print(table([Measurement.from_dict(r) for r in json.loads(options.out.read_text())["results"]]))


def is_default(name: str) -> bool:
    """Whether a case is measured without being asked for by name."""
    return name in FITS or CASES[name].default


def keep(file: Path, result: dict) -> None:
    """Write a result into the file, in place of an earlier one of the same case and way."""
    before = json.loads(file.read_text())["results"] if file.exists() else []
    others = [r for r in before if (r["name"], r["naive"]) != (result["name"], result["naive"])]
    order = {name: i for i, name in enumerate((*CASES, *FITS))}
    results = sorted([*others, result], key=lambda r: (order[r["name"]], r["naive"]))
    file.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
