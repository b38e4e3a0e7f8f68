"""Fixtures shared by the tests of the command line."""

import pytest


@pytest.fixture
def out(tmp_path):
    """Where a run goes."""
    return tmp_path / "out"
