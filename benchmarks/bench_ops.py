"""Every case of every op beside its contenders; see conftest.py."""

import pytest

from vosops.benchmarking import BENCHMARKS

CASES = [(op, case) for op, suite in BENCHMARKS.items() for case in suite.cases]


@pytest.mark.parametrize("op, case", CASES, ids=[f"{op}-{case}" for op, case in CASES])
def test_case(op, case, run_case):
    """The contenders agree (or the run stops), and all were timed."""
    result = run_case(op, case)
    assert all(v.runs for v in result.variants)
