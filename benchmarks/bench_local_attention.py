"""local_attention beside its contenders; see conftest.py."""

import pytest

from vosops.benchmarking import BENCHMARKS

OP = "local_attention"


@pytest.mark.parametrize("case", BENCHMARKS[OP].cases, ids=str)
def test_case(case, run_case):
    """The contenders agree (or the run stops), and all were timed."""
    result = run_case(OP, case)
    assert all(v.runs for v in result.variants)
