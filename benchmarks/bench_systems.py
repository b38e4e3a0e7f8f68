"""STM, RGMP, FEELVOS and LSTM-ICNet on frames of 480p, 1080p and 4K: time and peak memory, frugal against naive.

    python benchmarks/bench_systems.py [--network stm] [--case stm-1080p] [--ways frugal naive] [--threads 2]

is `vosops bench systems` with all threads and with its results in benchmarks/results/systems_cpu.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vosops.benchmarking import systems_suite
from vosops.benchmarking.systems import CASES, FITS, LIMIT, NETWORKS, Measurement, table

RESULTS = Path(__file__).parent / "results" / "systems_cpu.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=[*CASES, *FITS], metavar="CASE")
    parser.add_argument("--network", nargs="+", choices=NETWORKS)
    parser.add_argument(
        "--ways", nargs="+", choices=list(systems_suite.WAYS), default=list(systems_suite.WAYS)
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--limit", type=float, default=LIMIT / 1e9, help="GB beyond which a measurement fails"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    measurements = systems_suite.run_cases(
        systems_suite.choose(options.case, options.network),
        options.ways,
        threads=options.threads,
        limit=int(options.limit * 1e9),
        file=options.out,
        note=lambda line: print(line, flush=True),
    )
    for found in measurements:
        print(f"  {found.seconds} s, {found.peak} bytes {found.failure or ''}", flush=True)
    print(table([Measurement.from_dict(r) for r in systems_suite.read_results(options.out)]))


if __name__ == "__main__":
    main()
