"""STM, RGMP and FEELVOS on frames of 480p, 1080p and 4K: time and peak memory, frugal against naive.

    python benchmarks/bench_systems.py [--case stm-1080p] [--ways frugal naive] [--threads 2] [--out FILE]

Cases are NETWORK-480p, -1080p, -4K and NETWORK-fits, which looks for the largest frame whose step stays under 4 GB.
Random weights; each measurement in a process of its own. vosops/benchmarking/systems.py says more.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from vosops.benchmarking.runner import machine
from vosops.benchmarking.systems import CASES, FITS, LIMIT, largest_that_fits, measure, table

RESULTS = Path(__file__).parent / "results" / "systems_cpu.json"
WAYS = {"frugal": False, "naive": True}


def main() -> None:
    defaults = [*(name for name, case in CASES.items() if case.default), *FITS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=[*CASES, *FITS], default=defaults, metavar="CASE")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--limit", type=float, default=LIMIT / 1e9, help="GB beyond which a measurement fails"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = []
    for name in options.case:
        for way in options.ways:
            print(f"{name}, {way} ...", flush=True)
            if name in FITS:
                result = largest_that_fits(FITS[name], naive=WAYS[way], threads=options.threads)
            else:
                result = measure(
                    CASES[name], naive=WAYS[way], threads=options.threads, limit=int(options.limit * 1e9)
                )
            found.append(result)
            print(f"  {result.seconds} s, {result.peak} bytes {result.failure or ''}", flush=True)
    report = {
        "machine": machine(),
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "results": [result.to_dict() for result in found],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
