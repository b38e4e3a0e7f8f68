"""A pytest plugin: one line of JSON for each test as it ends, so that a run which is cut short leaves its results.

VOSOPS_TEST_LINES=FILE python -m pytest -p benchmarks.pytest_lines ...
"""

import json
import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Write the outcome of a test: its call, or the phase that kept it from being called."""
    if report.when != "call" and report.outcome == "passed":
        return
    if report.when == "teardown" and report.outcome != "failed":
        return
    why = ""
    if report.outcome == "skipped":
        why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        why = (getattr(crash, "message", "") or str(report.longrepr)).splitlines()[0][:300]
    with open(os.environ["VOSOPS_TEST_LINES"], "a") as file:
        file.write(json.dumps({"name": report.nodeid, "outcome": report.outcome, "why": why}) + "\n")
