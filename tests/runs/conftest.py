"""Fixtures of the tests of runs."""

import pytest

from tests.clips import ColourTracker, picture, write_folder


@pytest.fixture(autouse=True, scope="module")
def serial(one_thread):
    """Every test here runs in one thread."""


@pytest.fixture(autouse=True)
def colour_tracker(request, monkeypatch):
    """Runs track by colour, and save a checkpoint every 2 frames or as the file's CHECKPOINT_EVERY says."""
    monkeypatch.setattr("vosops.runs.job.make_tracker", lambda *args, **options: ColourTracker())
    monkeypatch.setattr("vosops.runs.run.CHECKPOINT_EVERY", getattr(request.module, "CHECKPOINT_EVERY", 2))


@pytest.fixture
def clip(request, tmp_path):
    """A folder with the frames that the file's BOXES describe."""
    return write_folder(tmp_path / "frames", [picture(b) for b in request.module.BOXES])
