"""A cache folder of each test's own."""

import pytest

from vosops import _verdicts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOSOPS_CACHE", str(tmp_path / "cache"))
    _verdicts.reload()
    monkeypatch.setattr(_verdicts, "_warned", set())
    yield tmp_path / "cache/devices"
    monkeypatch.undo()
    _verdicts.reload()
