"""Overlay videos: times, sizes and codecs."""

from fractions import Fraction

import av
import numpy as np
import pytest

from tests.clips import read_video
from vosops.io.video_writer import VideoWriter

GREY = np.full((48, 64, 3), 100, np.uint8)


def write(path, times, size=(48, 64), base=Fraction(1, 1000)):
    with VideoWriter(path, size, Fraction(10), base) as writer:
        for t in times:
            writer.write(np.full((*size, 3), 50, np.uint8), t)


def test_times_are_kept(tmp_path):
    times = [Fraction(t, 1000) for t in (0, 33, 67, 500, 900)]
    write(tmp_path / "o.mp4", times)
    assert [t for t, _ in read_video(tmp_path / "o.mp4")] == times
    assert [p.name for p in tmp_path.iterdir()] == ["o.mp4"]


def test_odd_sizes_are_padded(tmp_path):
    write(tmp_path / "o.mp4", [Fraction(0)], size=(47, 63))
    assert read_video(tmp_path / "o.mp4")[0][1].shape == (48, 64, 3)


def test_colours_are_those_that_the_file_states(tmp_path):
    """A reader who knows nothing of FFmpeg: by the formula of BT.709, which the file names."""
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (235, 180, 20)]
    image = np.repeat(np.array(colours, np.uint8), 16, 0)[None].repeat(48, 0)
    with VideoWriter(tmp_path / "o.mp4", (48, 64), Fraction(10), Fraction(1, 1000)) as writer:
        writer.write(image, Fraction(0))
    with av.open(str(tmp_path / "o.mp4")) as container:
        [frame] = container.decode(video=0)
        assert (frame.colorspace, frame.color_range) == (1, 1)
        planes = np.split(frame.to_ndarray(), [48, 60])  # Y, then U and V, two rows to a line
    for place, (red, green, blue) in enumerate(colours):
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        wanted = (
            16 + luma * 219 / 255,
            128 + (blue - luma) * 224 / 255 / 1.8556,
            128 + (red - luma) * 224 / 255 / 1.5748,
        )
        columns = 8 * place + 3  # of the halved chroma, away from the next colour
        got = (
            planes[0][20, 2 * columns],
            planes[1].reshape(24, 32)[10, columns],
            planes[2].reshape(24, 32)[10, columns],
        )
        assert got == pytest.approx(wanted, abs=3)


def test_mpeg4_where_there_is_no_h264(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    times = [Fraction(i, 24) for i in range(5)]
    write(tmp_path / "o.mp4", times, base=Fraction(1, 90_000))
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    got = [t for t, _ in read_video(tmp_path / "o.mp4")]
    assert all(abs(a - b) < Fraction(1, 1000) for a, b in zip(got, times))


def test_nothing_is_left_when_it_fails(tmp_path):
    def fail():
        with VideoWriter(tmp_path / "o.mp4", (48, 64), Fraction(10), Fraction(1, 1000)) as writer:
            writer.write(GREY, Fraction(0))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []
