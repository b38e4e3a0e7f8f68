"""A work folder with a small video, and the server over it, followed by a tracker that is easy to predict."""

from __future__ import annotations

import time

import pytest

from tests import clips
from vosops.runs.job import Settings
from vosops.studio.follow import Engine

pytest.importorskip("starlette", reason="vosops[studio] is not installed")
pytest.importorskip(
    "starlette.testclient", reason="Starlette's client needs httpx2", exc_type=(ImportError, RuntimeError)
)

HOST = "127.0.0.1:8000"
TOKEN = "the-token"
COUNT = 8


@pytest.fixture
def folder(tmp_path):
    """A folder of frames on which two boxes move right."""
    frames = [clips.picture(boxes) for boxes in clips.moving(COUNT, ids=(1, 2))]
    return clips.write_folder(tmp_path / "clip", frames)


@pytest.fixture
def truth():
    return [clips.truth(boxes) for boxes in clips.moving(COUNT, ids=(1, 2))]


@pytest.fixture
def engine():
    return Engine(Settings(device="cpu", size=-1), create=lambda settings: clips.ColourTracker())


@pytest.fixture
def studio(tmp_path, engine):
    from vosops.studio.server import Studio

    made = Studio(tmp_path / "work", engine)
    yield made
    made.close()


@pytest.fixture
def client(studio):
    """A client that has the token."""
    from starlette.testclient import TestClient

    from vosops.studio.server import build_app

    app = build_app(studio, token=TOKEN, hosts=[HOST])
    with TestClient(app, base_url=f"http://{HOST}", headers={"x-vosops-token": TOKEN}) as client:
        yield client


@pytest.fixture
def project(studio, folder):
    return studio.open_path(folder)


def finished(studio, project, number, seconds=60.0):
    """The job of that number once it is at rest."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        job = next(job for job in studio.queue.jobs(project) if job["number"] == number)
        if job["state"] not in ("waiting", "running"):
            return job
        time.sleep(0.01)
    raise AssertionError(f"job {number} did not end: {job}")
