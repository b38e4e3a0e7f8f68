"""Fixtures of the tests of runs."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def serial(one_thread):
    """Every test here runs in one thread."""
