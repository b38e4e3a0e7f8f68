"""Streams are segmented as they come: a local RTSP sender, late frames, a sender that dies."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from fractions import Fraction

import numpy as np
import pytest

from tests.cli.commands import error_line, run_command
from tests.clips import ColourTracker, moving, picture, read_png, truth, write_mask
from vosops.inference import Session
from vosops.io.errors import IncompleteInputError, InputError
from vosops.io.frames import RawFrame
from vosops.io.live import LiveFrame, LiveSource, is_live
from vosops.runs.live import LiveRun

av = pytest.importorskip("av")
BOXES = moving(12, ids=(1, 2))
LISTEN = {"rtsp_flags": "listen", "listen_timeout": "60", "rtsp_transport": "tcp"}


@pytest.fixture
def mask(tmp_path):
    return write_mask(tmp_path / "mask.png", truth(BOXES[0]))


@pytest.fixture
def url():
    """An address that nothing uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"rtsp://127.0.0.1:{found.getsockname()[1]}/live"


SENDER = """
import sys, time
from fractions import Fraction

import av
import numpy as np

images = np.load(sys.argv[2])
until = time.monotonic() + 60
while True:
    try:
        container = av.open(sys.argv[1], "w", format="rtsp", options={"rtsp_transport": "tcp"})
        stream = container.add_stream("mpeg4", rate=20)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        container.start_encoding()
        break
    except av.FFmpegError:  # nobody listens yet
        if time.monotonic() > until:
            raise
        time.sleep(0.1)
with container:
    for index, image in enumerate(images):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = index, Fraction(1, 20)
        container.mux(stream.encode(frame))
        time.sleep(0.05)
    container.mux(stream.encode())
"""


@pytest.fixture
def sender(url, tmp_path):
    """A process, for PyAV keeps the interpreter to itself while it opens a stream, that sends BOXES to who listens."""
    np.save(tmp_path / "images.npy", np.stack([picture(boxes) for boxes in BOXES]))
    process = subprocess.Popen([sys.executable, "-c", SENDER, url, str(tmp_path / "images.npy")])
    yield process
    process.kill()
    process.wait()


class Scripted:
    """Stands for a LiveSource: frames that come all at once, the way `drop` treats them."""

    def __new__(cls, frames, drop, problem=None):
        source = object.__new__(LiveSource)
        source.title, source.problem, source.received, source.dropped = "rtsp://x", None, 0, 0
        source._drop, source._stop, source._ended = drop, False, False
        source._waiting, source._changed = deque(), threading.Condition()

        def read():
            for i, image in enumerate(frames):
                source._put(LiveFrame(RawFrame(i, f"{i:07d}", image, Fraction(i, 10)), time.monotonic()))
            source.problem, source._ended = problem, True

        source._thread = threading.Thread(target=read, daemon=True)
        source._thread.start()
        return source


def run(out, source, mask, **options):
    session = Session(ColourTracker(), size=-1, device="cpu")
    return LiveRun(out, source, session, mask, **options).execute()


def test_names_of_streams():
    assert all(is_live(name) for name in ("rtsp://camera/1", "SRT://x:9", "/dev/video0"))
    assert not any(is_live(name) for name in ("clip.mp4", "file:///clip.mp4", "/dev/null"))


def test_a_local_rtsp_stream(url, sender, mask, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vosops.inference.session.make_tracker", lambda settings: ColourTracker())
    options = [part for name, value in LISTEN.items() for part in ("--input-option", f"{name}={value}")]
    command = [
        "segment",
        url,
        "--live",
        "--mask",
        mask,
        "--out",
        tmp_path / "out",
        "--size",
        "-1",
        "--drop",
        "none",
    ]
    code, printed = run_command(monkeypatch, capsys, *command, *options)
    assert code == 0, printed
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["frames_dropped"] == 0 and report["frames_done"] == report["frames_received"] == len(BOXES)
    for row in report["frames"]:
        found = read_png(tmp_path / "out" / f"{row['name']}.png")
        assert np.mean(found == truth(BOXES[row["frame"]])) > 0.95


def test_late_frames_are_dropped_but_the_newest(mask, tmp_path):
    source = Scripted([picture(boxes) for boxes in BOXES], "oldest")
    source._thread.join()
    summary = run(tmp_path / "out", source, mask)
    assert summary.frames == 1 and (tmp_path / "out/0000011.png").exists()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["frames_received"] == 12 and report["frames_dropped"] == 11
    assert summary.events[0] == "11 frames dropped"


def test_nothing_is_dropped_where_the_sender_waits(mask, tmp_path):
    summary = run(tmp_path / "out", Scripted([picture(b) for b in BOXES], "none"), mask)
    assert summary.frames == 12
    assert len(list((tmp_path / "out").glob("0*.png"))) == 12
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["frames_dropped"] == 0 and report["latency_ms"]["p99"] >= report["latency_ms"]["p50"] > 0


def test_it_ends_where_it_is_to(mask, tmp_path):
    assert run(tmp_path / "a", Scripted([picture(b) for b in BOXES], "none"), mask, end=5).frames == 5
    source = Scripted([picture(b) for b in BOXES], "none")
    assert run(tmp_path / "b", source, mask, should_stop=lambda: True).frames == 1


def test_a_stream_that_breaks_keeps_what_came(mask, tmp_path):
    source = Scripted([picture(b) for b in BOXES[:3]], "none", "rtsp://x ended: timed out")
    with pytest.raises(IncompleteInputError, match=r"timed out\. The 3 masks until then are in"):
        run(tmp_path / "out", source, mask)
    assert not json.loads((tmp_path / "out/report.json").read_text())["complete"]


def test_a_stream_that_changes_its_size_keeps_what_came(mask, tmp_path):
    frames = [*(picture(b) for b in BOXES[:3]), np.zeros((10, 10, 3), np.uint8), picture(BOXES[4])]
    with pytest.raises(
        IncompleteInputError, match=r"x ended at frame 3: frame must be .* The 3 masks until then"
    ):
        run(tmp_path / "out", Scripted(frames, "none"), mask)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert not report["complete"] and report["frames_done"] == 3 and "got 10x10" in report["problem"]


class Paced:
    """A session in whose turns a script puts the next frames, as a camera does while a slow model computes."""

    def __init__(self, source, arrivals):
        self.session, self.source, self.arrivals = (
            Session(ColourTracker(), size=-1, device="cpu"),
            source,
            arrivals,
        )
        self.taken = []

    def push(self, image, labels, *, time):
        for number in self.arrivals.pop(0) if self.arrivals else ():
            self.source._put(frame_of(number))
        if not self.arrivals:
            self.source._ended = True
        self.taken.append(round(time * 10))
        return self.session.push(image, labels, time=time)


def frame_of(number):
    return LiveFrame(
        RawFrame(number, f"{number:07d}", picture(BOXES[number]), Fraction(number, 10)), time.monotonic()
    )


@pytest.mark.parametrize(
    ("drop", "taken"), [("oldest", [0, 1, 4, 5, 9]), ("none", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])]
)
def test_what_is_segmented_is_the_newest_frame_of_its_turn(drop, taken, mask, tmp_path):
    """While frame 0 is computed 1 comes, then 2 to 4, then 5, then 6 to 9."""
    source = Scripted([], drop)
    source._thread.join()
    source._ended = False
    source._put(frame_of(0))
    session = Paced(source, [[1], [2, 3, 4], [5], [6, 7, 8, 9], []])
    LiveRun(tmp_path / "out", source, session, mask).execute()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert session.taken == taken and [row["frame"] for row in report["frames"]] == taken
    assert report["frames_received"] == 10 and report["frames_dropped"] == 10 - len(taken) == source.dropped
    assert sorted(path.stem for path in (tmp_path / "out").glob("0*.png")) == [f"{i:07d}" for i in taken]


def test_a_password_is_in_no_message(tmp_path):
    with pytest.raises(InputError) as error:
        LiveSource("rtsp://me:secret@127.0.0.1:9/x")
    assert "rtsp://me:***@127.0.0.1:9/x cannot be opened" in str(error.value)


def test_what_cannot_be(mask, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="neither a stream"):
        LiveSource("clip.mp4")
    with pytest.raises(InputError, match="--drop must be one of oldest, none, got newest"):
        LiveSource("rtsp://x", drop="newest")
    with pytest.raises(InputError, match="--resume cannot be combined with --live"):
        run(tmp_path / "out", Scripted([], "none"), mask, mode="resume")
    command = ["segment", "rtsp://127.0.0.1:9/x", "--live", "--out", tmp_path / "out"]
    code, printed = run_command(monkeypatch, capsys, *command)
    assert code == 2 and "--live requires one --mask" in error_line(printed)
    code, printed = run_command(monkeypatch, capsys, *command, "--mask", mask, "--overlay")
    assert code == 2 and "--overlay cannot be combined with --live" in error_line(printed)
