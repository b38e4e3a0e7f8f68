"""Ctrl-C: the server leaves within seconds, and what was in progress goes on in the next one."""

import gc
import http.client
import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from tests import clips
from tests.studio.conftest import COUNT, finished
from vosops.runs.job import Settings
from vosops.studio import follow, launch, runs_of_labels, server
from vosops.studio.follow import Engine

pytest.importorskip("uvicorn", reason="vosops[studio] is not installed")
pytest.importorskip("websockets", reason="vosops[studio] is not installed")
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a server of these tests is a forked process"),
]

SECONDS = 15  # in which a server must have left, on a machine that does other things as well
STUCK_AT = 3  # the frame that a tracker never finishes, counted from 0


class SlowTracker(clips.ColourTracker):
    """Takes a moment for each frame; ``stuck_at``: the one that takes for ever."""

    def __init__(self, stuck_at):
        super().__init__()
        self.stuck_at, self.steps = stuck_at, 0

    def step(self, *arguments, **options):
        self.steps += 1
        time.sleep(600 if self.steps == self.stuck_at else 0.2)
        return super().step(*arguments, **options)


class Server:
    """``vosops studio`` in a forked process, which follows what is marked on the first frame."""

    def __init__(self, folder, work, stuck_at=None):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(reader)
            serve_and_exit(folder, work, stuck_at, writer)
        os.close(writer)
        self.out = os.fdopen(reader)
        address = re.search(r"127\.0\.0\.1:(\d+)/\?token=(\S+)#(\S+)", self.out.readline())
        self.port, self.token, self.project = int(address[1]), address[2], address[3]

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        headers = {"x-vosops-token": self.token}
        connection.request(method, f"/api/projects/{self.project}{path}", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return json.loads(content), connection

    def follow(self, mark, frames):
        """Returns when so many frames were followed from the mark."""
        self.call("PUT", "/frames/0/mark", bytes(runs_of_labels.encode(mark)))
        self.call("POST", "/jobs", json.dumps({"kind": "follow", "request": {"direction": "all"}}))
        while self.call("GET", "")[0]["jobs"][0]["done"] < frames:
            time.sleep(0.02)

    def listen(self):
        """A page that hears events and answers nothing, not even that the server leaves."""
        page = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        lines = [
            f"GET /api/events?token={self.token} HTTP/1.1",
            f"Host: 127.0.0.1:{self.port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        ]
        page.sendall("\r\n".join([*lines, "", ""]).encode())
        assert b" 101 " in page.recv(4096)
        return page

    def interrupt(self):
        os.kill(self.pid, signal.SIGINT)

    def code(self, seconds):
        """Its exit code, if it leaves in so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None


def serve_and_exit(folder, work, stuck_at, out):
    """In the child: the command as a user gives it, with a tracker of the tests. Code 1: it came back."""
    gc.freeze()  # garbage of this process may wait for its threads, which the child has not, when it is freed
    try:
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = os.fdopen(out, "w", buffering=1)
        said = os.open(f"{work}.log", os.O_CREAT | os.O_WRONLY)
        sys.stderr = os.fdopen(said, "w", buffering=1)
        sys.argv = ["vosops", "studio", str(folder), "--no-browser", "--work", str(work)]
        sys.argv += ["--model", "propagate", "--device", "cpu", "--size", "-1"]
        follow.Engine = partial(Engine, create=lambda settings: SlowTracker(stuck_at))
        from vosops.cli import main

        main()
    finally:
        os._exit(1)


@contextmanager
def serving(*arguments, **options):
    one = Server(*arguments, **options)
    try:
        yield one
    finally:
        one.out.close()
        if one.pid:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)


def go_on(work, name):
    """The job as the next server finds it, and as it is when that server has continued it."""
    later = server.Studio(
        work, Engine(Settings(device="cpu", size=-1), create=lambda _: clips.ColourTracker())
    )
    try:
        project = later.project(name)
        [job] = later.queue.jobs(project)
        begun = len(project.shown_frames())
        later.queue.resume(project, job["number"])
        done = finished(later, project, job["number"])
        assert (done["state"], done["done"]) == ("done", COUNT)
        assert project.shown_frames() == list(range(COUNT))
        return job, begun
    finally:
        later.close()


def test_it_pauses_what_is_in_progress_and_leaves(folder, truth, tmp_path):
    """Whatever pages do: one is silent, another keeps its connection."""
    with serving(folder, tmp_path / "work") as one:
        page = one.listen()
        _, kept = one.call("GET", "")
        one.follow(truth[0], 2)
        one.interrupt()
        assert one.code(SECONDS) == launch.INTERRUPTED
        page.close()
        kept.close()
    said = (tmp_path / "work.log").read_text()
    assert said == "pausing after the frame in progress; Ctrl-C again ends at once\nvosops: stopped\n"
    job, begun = go_on(tmp_path / "work", one.project)
    assert (job["state"], job["message"]) == ("paused", "")
    assert begun == job["done"] >= 2  # no frame that was found is lost


def test_a_second_one_ends_it_at_once(folder, truth, tmp_path):
    with serving(folder, tmp_path / "work", STUCK_AT) as one:
        one.follow(truth[0], STUCK_AT)
        one.interrupt()
        assert one.code(1) is None
        one.interrupt()
        assert one.code(5) == launch.INTERRUPTED
    job, _ = go_on(tmp_path / "work", one.project)
    assert (job["state"], job["message"]) == ("paused", "the server ended")


def test_a_frame_that_takes_too_long_is_not_waited_for(folder, truth, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_SECONDS_TO_REST", 0.2)
    with serving(folder, tmp_path / "work", STUCK_AT) as one:
        one.follow(truth[0], STUCK_AT)
        one.interrupt()
        assert one.code(SECONDS) == launch.INTERRUPTED
    job, _ = go_on(tmp_path / "work", one.project)
    assert job["message"] == "the server ended"
