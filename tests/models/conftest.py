"""Fixtures of the models' tests."""

import pytest

from vosops.models import registry


@pytest.fixture(autouse=True, scope="module")
def serial(one_thread):
    """Every test here runs in one thread."""


@pytest.fixture
def own_registry(monkeypatch):
    """A registry whose changes end with the test."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(registry, "_NAMES", dict(registry._NAMES))
