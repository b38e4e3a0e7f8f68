"""What is taken away is what others read."""

import io
import json
import shlex
import zipfile
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from tests import clips
from tests.cli.commands import run_command
from tests.studio.conftest import COUNT, finished
from vosops.io.datasets import find_sequences, masks_of_sequence, open_source
from vosops.studio.export import EXPORT_KINDS, _Task, command
from vosops.studio.project import StudioObject


@pytest.fixture
def followed(studio, project, truth):
    """The project with a mask on every frame."""
    project.write_objects([StudioObject(1, "red box"), StudioObject(2, "green box")])
    project.write_mark(0, truth[0])
    finished(studio, project, studio.queue.submit(project, "follow", {"direction": "all"}).number)
    return project


@pytest.fixture
def export(studio, followed):
    def run(kind):
        job = finished(studio, followed, studio.queue.submit(followed, "export", {"kind": kind}).number)
        assert job["state"] == "done", job["message"]
        return followed.folder / "exports" / job["memory"]["file"]

    return run


def unpack(path, folder):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        archive.extractall(folder)
        return archive.namelist()


def test_masks_are_those_of_the_run(export, followed, tmp_path):
    names = unpack(export("masks"), tmp_path / "out")
    assert names == [f"{frame:05d}.png" for frame in range(COUNT)]
    for frame in range(COUNT):
        picture = Image.open(tmp_path / "out" / f"{frame:05d}.png")
        assert picture.mode == "P"
        assert (np.array(picture) == followed.labels(frame)).all()


def test_a_correction_is_what_is_exported(export, followed, truth, tmp_path):
    followed.write_mark(4, np.where(truth[4] == 2, 0, truth[4]).astype(np.uint8))
    unpack(export("masks"), tmp_path / "out")
    assert set(np.unique(np.array(Image.open(tmp_path / "out/00004.png")))) == {0, 1}


@pytest.mark.parametrize("kind", ["davis", "youtube"])
def test_data_sets_are_read_as_such(export, followed, tmp_path, kind):
    unpack(export(kind), tmp_path / "out")
    [sequence] = find_sequences(tmp_path / "out")
    source = open_source(sequence.frames)
    assert (sequence.name, source.count, source.size) == ("clip", COUNT, clips.SIZE)
    assert masks_of_sequence(sequence, source, range(COUNT))[0].frame == 0
    last = Image.open(sequence.masks / f"{COUNT - 1:05d}.png")
    assert (np.array(last) == followed.labels(COUNT - 1)).all()


def test_youtube_vos_says_where_each_object_is(export, tmp_path):
    unpack(export("youtube"), tmp_path / "out")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    objects = meta["videos"]["clip"]["objects"]
    assert objects["1"]["category"] == "red box"
    assert objects["2"]["frames"] == [f"{frame:05d}" for frame in range(COUNT)]


def test_coco_has_a_mask_for_each_object_and_frame(export, followed):
    found = json.loads(export("coco").read_text())
    assert [category["name"] for category in found["categories"]] == ["red box", "green box"]
    assert len(found["annotations"]) == 2 * COUNT
    first = found["annotations"][0]
    assert first["area"] == int((followed.labels(0) == 1).sum())
    assert first["score"] == 1.0


def test_the_overlay_is_a_video_of_every_frame(export, followed, folder):
    followed.write_mark(4, np.full(clips.SIZE, 4, np.uint8))  # all of one frame is object 4, which is blue
    shown = clips.read_video(export("overlay"))
    assert [round(time * 24) for time, _ in shown] == list(range(COUNT))
    plain = [np.array(Image.open(folder / f"{frame:05d}.png")).astype(int) for frame in (4, 5)]
    tinted, untouched = (picture.astype(int) - given for (_, picture), given in zip(shown[4:6], plain))
    assert tinted[..., 2].mean() > 60
    assert abs(untouched[..., 2].mean()) < 10


def test_cut_outs_are_transparent_around_the_objects(export, followed):
    with zipfile.ZipFile(export("cutout")) as archive:
        picture = Image.open(io.BytesIO(archive.read("00003.png")))
    assert picture.mode == "RGBA"
    alpha, labels = np.array(picture)[..., 3], followed.labels(3)
    assert (alpha[labels > 0] > 100).all()
    assert (alpha == 0).sum() > alpha.size / 2


@pytest.mark.skipif("libvpx-vp9" not in av.codecs_available, reason="this build of PyAV has no libvpx-vp9")
def test_the_transparent_video_has_alpha(export):
    with av.open(str(export("webm"))) as container:
        stream = container.streams.video[0]
        assert stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1"
        assert sum(1 for _ in container.decode(stream)) == COUNT


def test_the_command_repeats_the_run(export, followed, tmp_path, monkeypatch, capsys):
    unpack(export("command"), tmp_path / "out")
    [line] = [line for line in (tmp_path / "out/command.sh").read_text().splitlines() if line[:6] == "vosops"]
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr("vosops.runs.job.make_tracker", lambda settings: clips.ColourTracker())
    code, printed = run_command(monkeypatch, capsys, *shlex.split(line)[1:])
    assert code == 0, printed
    for frame in range(COUNT):
        written = np.array(Image.open(tmp_path / "out/clip-masks" / f"{frame:05d}.png"))
        assert (written == followed.labels(frame, "result")).all()


def test_the_command_names_every_setting_that_is_not_usual(followed, engine):
    usual = replace(engine.settings, size=480, device=None)
    assert "--size" not in command(followed, usual)
    other = replace(
        usual, model="stm", size=240, dtype="bfloat16", memory_budget="2GB", options={"slots": 11}
    )
    words = command(followed, other)
    for part in ("--model stm", "--size 240", "--dtype bfloat16", "--memory-budget 2GB", "--option slots=11"):
        assert part in words


def test_nothing_to_export_is_said(studio, project):
    job = finished(studio, project, studio.queue.submit(project, "export", {"kind": "masks"}).number)
    assert job["state"] == "failed"
    assert "no mask yet" in job["message"]


def test_an_export_that_is_stopped_leaves_no_file(studio, followed):
    publish = studio.queue._publish

    def heard(event):
        publish(event)
        if event["job"]["done"] == 2 and event["job"]["state"] == "running":
            studio.queue._control.wish = "stop"

    studio.queue._publish = heard
    job = finished(studio, followed, studio.queue.submit(followed, "export", {"kind": "davis"}).number)
    assert job["state"] == "stopped"
    assert not [path for path in (followed.folder / "exports").iterdir() if path.is_file()]


def test_every_kind_has_a_writer():
    assert all(hasattr(_Task, f"write_{kind}") for kind in EXPORT_KINDS)
