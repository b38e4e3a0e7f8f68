"""Each op beside the PyTorch code that people write for it and the best other packages, on this machine.

`vosops bench` and the suites in `benchmarks/` run the same cases. All contenders of a case run interleaved in
one process, on the same inputs, after their results were compared with one another.
"""

from vosops.benchmarking.cases import Case, Inputs, Variant
from vosops.benchmarking.measure import Ceilings, Clock, Timing
from vosops.benchmarking.report import check_plot, plot, tables
from vosops.benchmarking.runner import BENCHMARKS, DisagreementError, Result, VariantResult, machine, run_case

__all__ = [
    "BENCHMARKS",
    "Case",
    "Ceilings",
    "Clock",
    "DisagreementError",
    "Inputs",
    "Result",
    "Timing",
    "Variant",
    "VariantResult",
    "check_plot",
    "machine",
    "plot",
    "run_case",
    "tables",
]
