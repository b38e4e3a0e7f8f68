"""A video as a phone makes it: seen upright, followed, and taken away with its own times."""

import av
import numpy as np
import pytest

from tests import clips
from tests.studio.conftest import finished
from tests.studio.phone import CODECS, HLG, TICKS, frame_times, skip_without, write_phone_video

COUNT, RATE, TIMES = 6, 24, 3
SIZE = (96, 64)  # of a phone that is held upright
BOXES = [{1: (20 + 4 * t, 10, 24, 30)} for t in range(COUNT)]


@pytest.fixture(params=CODECS)
def project(request, studio, tmp_path):
    skip_without(request.param)
    frames = [clips.picture(boxes, SIZE) for boxes in BOXES]
    path = tmp_path / "phone.mp4"
    assert write_phone_video(path, frames, codec=request.param, keyframe_every=3, times=TIMES) == 18
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == 1
        assert (container.streams.video[0].height, container.streams.video[0].width) == SIZE[::-1]
    project = studio.open_path(path)
    studio.wait_for_times()
    return project


def test_it_is_upright_and_every_frame_has_its_number(studio, project):
    assert project.source.size == SIZE
    assert (project.count, project.source.count_is_exact) == (COUNT * TIMES, True)
    for frame in (13, 2, 17, 0):
        image = studio.previews(project.id).image(frame).astype(int)
        assert np.abs(image - clips.picture(BOXES[frame % COUNT], SIZE)).mean() < 12


def test_it_is_followed_from_a_mark_on_it_and_the_overlay_keeps_its_times(studio, project):
    project.write_mark(7, clips.truth(BOXES[1], SIZE))
    job = studio.queue.submit(project, "follow", {"direction": "all"})
    assert finished(studio, project, job.number)["state"] == "done"
    for frame in range(COUNT * TIMES):
        truth = clips.truth(BOXES[frame % COUNT], SIZE)
        assert (project.labels(frame) == truth).mean() > 0.97
    job = finished(studio, project, studio.queue.submit(project, "export", {"kind": "overlay"}).number)
    film = clips.read_video(project.folder / "exports" / job["memory"]["file"])
    assert film[0][1].shape[:2] == SIZE
    first = frame_times(COUNT, RATE)
    wanted = [(t + turn * COUNT / (RATE * TICKS)) * TICKS for turn in range(TIMES) for t in first]
    assert [float(time) for time, _ in film] == pytest.approx([float(time) for time in wanted], abs=1e-3)


def colours(image, places):
    """The mean colour of squares of ten pixels at (top, left)."""
    return [image[top : top + 10, left : left + 10].mean((0, 1)) for top, left in places]


@pytest.mark.parametrize(
    ("height", "width", "count"), [(96, 64, 3), pytest.param(3840, 2160, 12, marks=pytest.mark.exhaustive)]
)
def test_ten_bits_in_hdr_keep_their_colours(studio, tmp_path, height, width, count):
    """As an SDR screen shows HLG: the values as they are, by the matrix of BT.2020, up to the overlay."""
    skip_without(HLG)
    box = (height // 4, width // 4, height // 2, width // 2)
    inside, outside = (height // 2, width // 2), (height // 16, width // 16)
    path = tmp_path / "hdr.mp4"
    write_phone_video(path, (clips.picture({1: box}, (height, width)) for _ in range(count)), codec=HLG)
    with av.open(str(path)) as container:
        video = next(container.decode(video=0))
        assert (video.format.name, video.colorspace) == ("yuv420p10le", 9)  # BT.2020
    project = studio.open_path(path)
    project.write_settings({"size": min(width, 480)})
    studio.wait_for_times()
    assert (project.source.size, project.count) == ((height, width), count)
    real = (clips.COLOURS[1], clips.SKY)
    found = colours(studio.previews(project.id).image(count - 1), (inside, outside))
    assert np.abs(np.subtract(found, real)).max() < 5

    project.write_mark(0, clips.truth({1: box}, (height, width)))
    job = finished(studio, project, studio.queue.submit(project, "follow", {"direction": "all"}).number, 600)
    assert (job["state"], job["done"]) == ("done", count)
    for frame in range(count):
        assert (project.labels(frame) == clips.truth({1: box}, (height, width))).mean() > 0.97
    export = studio.queue.submit(project, "export", {"kind": "overlay"})
    file = finished(studio, project, export.number, 600)["memory"]["file"]
    film = clips.read_video(project.folder / "exports" / file)
    tinted = np.add(clips.COLOURS[1], (255, 0, 0)) / 2  # half the object's own red
    drawn = colours(film[-1][1], (inside, outside))
    assert np.abs(np.subtract(drawn, (tinted, clips.SKY))).max() < 5


def test_a_video_that_was_cut_off_is_followed_as_far_as_it_goes(studio, tmp_path):
    count = 40
    boxes = [{1: (4, 4 + t // 2, 20, 12)} for t in range(count)]
    frames = [clips.picture(box) for box in boxes]
    path = clips.write_video(tmp_path / "v.mp4", frames, movflags="faststart", keyframe_every=5)
    clips.cut(path, 0.75)
    project = studio.open_path(path)
    studio.wait_for_times()
    assert 10 < project.count < count
    project.write_mark(0, clips.truth(boxes[0]))
    job = finished(studio, project, studio.queue.submit(project, "follow", {"direction": "all"}).number)
    assert job["state"] == "done"
    assert "truncated" in job["message"]
    shown = project.shown_frames()
    assert shown == list(range(len(shown)))
    assert project.count - len(shown) <= 2
    assert studio.previews(project.id).preview(shown[-1])
