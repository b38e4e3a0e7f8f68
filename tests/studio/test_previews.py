"""Small pictures: the right frame, whatever was asked for before, and files that need not be there."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests import clips
from vosops.io.errors import InputError
from vosops.io.seeking import SeekableVideo
from vosops.studio import previews as module
from vosops.studio.previews import Previews, small

COUNT = 45
SIZE = (32, 48)


def shade(index):
    """A frame whose grey says its number."""
    return np.full((*SIZE, 3), 30 + 4 * index, np.uint8)


def number_of(jpeg):
    return round((np.array(Image.open(io.BytesIO(jpeg))).mean() - 30) / 4)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    return clips.write_video(path, [shade(i) for i in range(COUNT)], keyframe_every=15)


@pytest.fixture
def previews(video, tmp_path):
    source = SeekableVideo(video)
    assert source.read_times()
    return Previews(source, tmp_path / "cache")


def test_any_order_gives_the_frame_that_was_asked_for(previews):
    for frame in (35, 3, 4, 5, 44, 0, 16, 14, 15, 35):
        assert number_of(previews.preview(frame)) == frame


def test_before_the_times_are_known_too(video, tmp_path):
    previews = Previews(SeekableVideo(video), tmp_path)
    assert [number_of(previews.preview(frame)) for frame in (5, 20, 2)] == [5, 20, 2]


def test_thumbnails_are_the_key_frame_before(previews):
    keys = previews.source.key_frames
    assert keys[0] == 0
    assert len(keys) >= 3
    assert number_of(previews.thumbnail(keys[1] + 5)) == keys[1]


def test_frames_in_a_row_are_decoded_once(previews, monkeypatch):
    opened = []
    decoded = SeekableVideo.decoded
    monkeypatch.setattr(
        SeekableVideo, "decoded", lambda self, first: opened.append(first) or decoded(self, first)
    )
    for frame in range(17, 30):
        previews.preview(frame)
    assert opened == [17]


def test_a_picture_that_is_kept_is_not_decoded_again(previews, monkeypatch):
    first = previews.preview(40)
    monkeypatch.setattr(SeekableVideo, "decoded", None)
    assert previews.preview(40) == first
    assert number_of(previews.preview(35)) == 35  # on the way to 40


def test_a_frame_past_the_end_is_an_error(previews):
    for ask in (previews.preview, previews.thumbnail, previews.whole):
        if ask == previews.thumbnail:  # of the last key frame
            assert number_of(ask(COUNT + 5)) in previews.source.key_frames
        else:
            with pytest.raises(InputError, match="cannot be read"):
                ask(COUNT + 5)


def test_the_cache_is_bounded(previews, monkeypatch):
    monkeypatch.setattr(module, "_CHECK_EVERY", 8)
    previews.limit = 8_000
    for frame in range(COUNT):
        previews.preview(frame)
    kept = sum(path.stat().st_size for path in previews.folder.glob("*/*.jpg"))
    assert kept < 2 * previews.limit
    assert number_of(previews.preview(0)) == 0


def test_what_the_engine_decodes_is_kept(previews):
    previews.offer(12, shade(33))
    assert number_of(previews.preview(12)) == 33


def test_small_keeps_the_shape():
    assert small(np.zeros((100, 400, 3), np.uint8), 100).shape == (25, 100, 3)
    assert small(np.zeros((10, 40, 3), np.uint8), 100).shape == (10, 40, 3)


def test_what_is_far_from_the_start_waits_until_it_is_known_where(tmp_path, monkeypatch):
    path = clips.write_video(tmp_path / "v.mp4", [shade(i % 40) for i in range(60)], keyframe_every=15)
    source, settled = SeekableVideo(path), threading.Event()
    previews = Previews(source, tmp_path / "cache", settled=settled)
    assert number_of(previews.preview(3)) == 3  # the first frames do not wait
    firsts = []
    decoded = SeekableVideo.decoded
    monkeypatch.setattr(
        SeekableVideo, "decoded", lambda self, first: firsts.append(self.has_times) or decoded(self, first)
    )
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(ask, 55) for ask in (previews.preview, previews.thumbnail, previews.whole)]
        assert not any(future.done() for future in asked)
        later = source.twin()
        assert later.read_times()
        previews.replace_source(later)
        settled.set()
        assert [number_of(future.result(60)) for future in asked] == [15, 5, 15]
    assert firsts
    assert all(firsts)


def test_pictures_are_shown_where_nothing_can_be_kept(video, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    previews = Previews(SeekableVideo(video), tmp_path / "cache")
    assert number_of(previews.preview(5)) == 5
    assert number_of(previews.thumbnail(2)) == 2
    previews.offer(7, shade(7))
