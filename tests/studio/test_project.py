"""A project keeps everything on disk, and opening it again shows it."""

import numpy as np
import pytest

from tests import clips
from vosops.io.errors import InputError
from vosops.io.labels import read_labels
from vosops.runs.report import FrameRecord
from vosops.studio.project import Project, StudioObject


@pytest.fixture
def opened(tmp_path, folder):
    return Project.create(tmp_path / "projects", folder)


def record(index, area=10, confidence=0.9, number="1"):
    return FrameRecord(index, f"{index:05d}", index / 24, False, {number: area}, {number: confidence})


def test_the_same_video_is_the_same_project(tmp_path, folder, opened, truth):
    opened.write_mark(3, truth[3])
    opened.write_objects([StudioObject(1, "the red one"), StudioObject(2, "the green one")])
    again = Project.create(tmp_path / "projects", folder)
    assert again.id == opened.id
    assert again.marks == [3]
    assert again.objects[0].name == "the red one"
    assert (again.labels(3, "mark") == truth[3]).all()
    assert again.labels(2) is None


def test_a_mark_is_a_palette_png_that_vosops_segment_takes(opened, truth):
    opened.write_mark(3, truth[3])
    labels, palette = read_labels(opened.mark_path(3))
    assert opened.mark_path(3).name == "00003.png"
    assert (labels == truth[3]).all()
    assert palette is not None


def test_an_object_that_is_drawn_joins_the_list(opened, truth):
    assert [item.id for item in opened.objects] == [1]
    opened.write_mark(0, truth[0])
    assert [item.id for item in opened.objects] == [1, 2]


def test_a_mark_is_shown_before_the_result(opened, truth):
    path = opened.begin_run()
    add = opened.run_of(path)
    clips.write_mask(path / "00002.png", np.full(clips.SIZE, 2, np.uint8))
    add(record(2))
    assert (opened.labels(2) == 2).all()
    opened.write_mark(2, truth[2])
    assert (opened.labels(2) == truth[2]).all()
    assert (opened.labels(2, "result") == 2).all()
    opened.remove_mark(2)
    assert (opened.labels(2) == 2).all()


def test_the_latest_run_is_shown_and_the_one_before_is_kept(opened):
    for value in (1, 2):
        path = opened.begin_run()
        add = opened.run_of(path)
        clips.write_mask(path / "00001.png", np.full(clips.SIZE, value, np.uint8))
        add(record(1, confidence=value / 4))
    assert (opened.labels(1, "result") == 2).all()
    assert (opened.labels(1, "before") == 1).all()
    assert opened.state()["confidence"] == [0.5]
    opened.discard_last_run()
    assert (opened.labels(1, "result") == 1).all()
    assert opened.labels(1, "before") is None


def test_discarding_leaves_what_somebody_else_put_there(opened):
    path = opened.begin_run()
    (path / "notes.txt").write_text("mine")
    opened.discard_last_run()
    assert (path / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="no result to discard"):
        opened.discard_last_run()


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (np.zeros((4, 4), np.uint8), "labels must be"),
        (np.full(clips.SIZE, 255, np.uint8), "from 0 to 254"),
    ],
)
def test_what_is_no_mark_is_refused(opened, labels, what):
    with pytest.raises(InputError, match=what):
        opened.write_mark(0, labels)
    assert opened.marks == []


@pytest.mark.parametrize("frame", [-1, 8, 10**9])
def test_a_frame_that_is_none_is_refused(opened, truth, frame):
    with pytest.raises(InputError, match=f"from 0 to 7, got {frame}"):
        opened.write_mark(frame, truth[0])


@pytest.mark.parametrize(
    "objects",
    [[StudioObject(1, "a"), StudioObject(1, "b")], [StudioObject(0, "a")], [StudioObject(255, "a")]]
    + [[StudioObject(1, "")], [StudioObject(1, "x" * 81)]],
)
def test_objects_that_are_none_are_refused(opened, objects):
    with pytest.raises(InputError):
        opened.write_objects(objects)
    assert opened.objects == [StudioObject(1, "Object 1")]


def test_a_video_that_changed_is_not_the_projects(opened, folder):
    clips.write_folder(folder, [clips.picture({1: (0, 0, 9, 9)})], first=8)
    with pytest.raises(InputError, match="has changed"):
        Project(opened.folder)


def test_a_folder_without_a_project_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no project"):
        Project(tmp_path)
