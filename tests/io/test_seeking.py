"""Reading a video from any frame: the frames that reading from the start gives."""

import numpy as np
import pytest

from tests import clips
from vosops.io.seeking import SeekableVideo
from vosops.io.video import VideoFile

COUNT = 40
SIZE = (32, 48)


def shade(index):
    return np.full((*SIZE, 3), 20 + 5 * index, np.uint8)


def numbers(frames):
    return [round((frame.image.mean() - 20) / 5) for frame in frames]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Frames out of order in the file, and a key frame every 12."""
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    return clips.write_video(path, [shade(i) for i in range(COUNT)], keyframe_every=12)


@pytest.fixture
def source(video):
    source = SeekableVideo(video)
    assert source.read_times()
    return source


def test_the_number_of_frames_is_exact(source):
    assert (source.count, source.count_is_exact, source.has_times) == (COUNT, True, True)
    assert source.key_frames[0] == 0
    assert all(b - a <= 12 for a, b in zip(source.key_frames, source.key_frames[1:]))


@pytest.mark.parametrize("first", [0, 1, 11, 12, 13, 25, COUNT - 1])
def test_any_frame_is_that_of_reading_from_the_start(source, video, first):
    found = list(source.forward(range(first, COUNT)))
    expected = list(VideoFile(video).forward(range(first, COUNT)))
    assert [frame.index for frame in found] == list(range(first, COUNT))
    for ours, other in zip(found, expected, strict=True):
        assert (ours.name, ours.time) == (other.name, other.time)
        assert (ours.image == other.image).all()


def test_frames_may_be_left_out(source):
    assert numbers(source.forward([5, 20, 21, 39])) == [5, 20, 21, 39]


def test_reading_backward_needs_no_reading_forward(source, monkeypatch):
    monkeypatch.setattr(SeekableVideo, "forward", None)
    assert numbers(source.backward(range(30, 20, -1))) == list(range(30, 20, -1))


def test_it_ends_at_the_end(source):
    assert numbers(source.forward(range(38, 10**9))) == [38, 39]
    assert list(source.forward(range(COUNT, COUNT + 3))) == []
    assert source.problem is None


def test_reading_from_the_middle_decodes_no_more_than_from_its_key_frame(source, monkeypatch):
    decoded = []
    decode = SeekableVideo._decode

    def counted(self, container, stream):
        for frame in decode(self, container, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(SeekableVideo, "_decode", counted)
    next(source.forward([30]))
    assert len(decoded) <= 30 - max(key for key in source.key_frames if key <= 30) + 1 + 4


def test_a_container_that_lands_late_is_read_from_an_earlier_key_frame(source, monkeypatch):
    decode = SeekableVideo._decode
    calls = []

    def late(self, container, stream):
        calls.append(1)
        frames = decode(self, container, stream)
        return (f for f in frames if len(calls) > 1 or f.pts > self._known[27])

    monkeypatch.setattr(SeekableVideo, "_decode", late)
    assert numbers(source.forward([27])) == [27]
    assert len(calls) == 2


def test_a_container_that_cannot_be_sought_is_read_from_the_start(tmp_path):
    path = clips.write_video(tmp_path / "v.h264", [shade(i) for i in range(8)])
    source = SeekableVideo(path)
    source.read_times()
    assert numbers(source.forward([5, 6])) == [5, 6]


def test_variable_times_are_kept(tmp_path):
    from fractions import Fraction

    pts = [0, 3, 4, 9, 20, 21]
    path = clips.write_video(
        tmp_path / "v.mp4",
        [shade(i) for i in range(6)],
        pts=pts,
        time_base=Fraction(1, 100),
        keyframe_every=2,
    )
    source = SeekableVideo(path)
    assert source.read_times()
    assert [frame.time for frame in source.forward([3, 5])] == [Fraction(9, 100), Fraction(21, 100)]


def test_stopping_leaves_it_as_it_was(video):
    source = SeekableVideo(video)
    assert not source.read_times(lambda: True)
    assert not source.has_times
    assert source.key_frames == []
    assert numbers(source.forward([7])) == [7]


def test_a_twin_reads_on_its_own(source):
    one, other = source.forward(range(10, 20)), source.twin().forward(range(30, 40))
    assert [numbers([next(one), next(other)]) for _ in range(3)] == [[10, 30], [11, 31], [12, 32]]


def test_a_video_that_is_cut_off_gives_what_there_is(video, tmp_path):
    path = tmp_path / "cut.mkv"
    clips.write_video(path, [shade(i) for i in range(COUNT)], keyframe_every=12)
    clips.cut(path, 0.6)
    source = SeekableVideo(path)
    source.read_times()
    found = numbers(source.forward(range(1, COUNT)))
    assert found == list(range(1, len(found) + 1))
    assert len(found) < COUNT - 1
    assert source.problem is not None


def test_previews_are_small_and_upright(tmp_path):
    path = clips.write_video(tmp_path / "v.mp4", [shade(i) for i in range(6)])
    clips.rotate_file(path, 90)
    source = SeekableVideo(path)
    source.read_times()
    [(number, image)] = [next(iter(source.previews(4, 24)))]
    assert (number, image.shape) == (4, (24, 16, 3))
