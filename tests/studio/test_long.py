"""A ten-minute 4K video: opened without decoding it, read from the key frame before, in memory that stays flat."""

import random
from fractions import Fraction

import av
import numpy as np
import pytest

from tests import clips
from tests.clips import resident
from vosops.io.seeking import SeekableVideo
from vosops.studio.previews import Previews

RATE, SECONDS, TIMES, GOP = 2, 10, 60, 10
COUNT = RATE * SECONDS * TIMES
SIZE = (2160, 3840)
MIB = 1 << 20


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Ten seconds that are encoded once, and copied sixty times behind each other."""
    folder = tmp_path_factory.mktemp("long")
    frames = [np.full((*SIZE, 3), 40 + 8 * i, np.uint8) for i in range(RATE * SECONDS)]
    short = clips.write_video(folder / "short.mp4", frames, rate=RATE, keyframe_every=GOP, lossless=False)
    with av.open(str(short)) as given, av.open(str(folder / "long.mp4"), "w") as made:
        old = given.streams.video[0]
        new = made.add_stream_from_template(old)
        packets = [packet for packet in given.demux(old) if packet.size]
        length = round(Fraction(SECONDS) / old.time_base)
        content = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe) for p in packets]
        for turn in range(TIMES):
            for data, pts, dts, duration, key in content:
                packet = av.Packet(data)
                packet.stream, packet.time_base = new, old.time_base
                packet.pts, packet.dts, packet.duration = pts + turn * length, dts + turn * length, duration
                packet.is_keyframe = key
                made.mux(packet)
    return folder / "long.mp4"


@pytest.fixture
def decoded(monkeypatch):
    """The frames that were decoded so far."""
    found = []
    decode = SeekableVideo._decode

    def counted(self, container, stream):
        for frame in decode(self, container, stream):
            found.append(frame.pts)
            yield frame

    monkeypatch.setattr(SeekableVideo, "_decode", counted)
    return found


def test_opening_decodes_one_frame(video, decoded):
    source = SeekableVideo(video)
    assert source.read_times()
    assert (source.count, source.size) == (COUNT, SIZE)
    assert len(decoded) <= 1
    assert len(source.key_frames) == COUNT // GOP


def test_a_frame_in_the_middle_costs_what_its_key_frame_is_away(video, decoded, tmp_path):
    source = SeekableVideo(video)
    source.read_times()
    previews = Previews(source, tmp_path)
    for frame in (COUNT - 1, COUNT // 2 + 3, 7):
        decoded.clear()
        assert previews.preview(frame)
        assert len(decoded) <= GOP + 4
    for frame in (0, COUNT // 2, COUNT - 1):
        decoded.clear()
        assert previews.thumbnail(frame)
        assert len(decoded) <= 5


def test_memory_does_not_grow_with_what_was_looked_at(video, tmp_path):
    source = SeekableVideo(video)
    source.read_times()
    previews = Previews(source, tmp_path)
    places = random.Random(0).sample(range(COUNT), 16)
    for frame in places[:6]:
        previews.preview(frame)
    before = resident()
    for frame in places[6:]:
        previews.preview(frame)
    assert resident() - before < 100 * MIB  # four decoded frames
