"""Following from the page: the product's loop, in every direction, paused and continued."""

import errno
from pathlib import Path

import numpy as np
import pytest

from tests import clips
from tests.studio.conftest import COUNT, finished
from vosops.io import masks, outputs
from vosops.io.errors import InputError, disk_errors
from vosops.runs.job import Job, Settings
from vosops.runs.report import RESUME
from vosops.studio.follow import Engine, FollowRequest, WithReferences


def follow(studio, project, **request):
    return finished(studio, project, studio.queue.submit(project, "follow", request).number)


def results(project):
    return {frame: project.labels(frame, "result") for frame in range(COUNT)}


def test_all_is_what_vosops_segment_does(studio, project, folder, truth, tmp_path, monkeypatch):
    for frame in (2, 5):
        project.write_mark(frame, truth[frame])
    assert follow(studio, project, direction="all")["state"] == "done"
    monkeypatch.setattr("vosops.runs.job.make_tracker", lambda settings: clips.ColourTracker())
    job = Job(out=tmp_path / "masks", settings=Settings(device="cpu", size=-1))
    job.video(folder, [str(project.mark_path(0).parent)])
    for frame in range(COUNT):
        ours = project.folder / "runs/0001" / f"{project.name(frame)}.png"
        assert ours.read_bytes() == (tmp_path / "masks" / ours.name).read_bytes()


def test_forward_and_backward_reach_their_frames_alone(studio, project, truth):
    project.write_mark(4, truth[4])
    follow(studio, project, direction="forward", frame=4, until=6)
    assert [frame for frame, labels in results(project).items() if labels is not None] == [4, 5, 6]
    follow(studio, project, direction="backward", frame=4)
    assert [frame for frame, labels in results(project).items() if labels is not None] == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    for frame in range(7):
        assert (project.labels(frame) == truth[frame]).mean() > 0.99


def test_backward_ends_after_the_mark_before(studio, project, truth):
    for frame in (1, 5):
        project.write_mark(frame, truth[frame])
    follow(studio, project, direction="backward", frame=5)
    assert [frame for frame, labels in results(project).items() if labels is not None] == [2, 3, 4, 5]


def test_other_marks_are_remembered(truth):
    tracker = clips.ColourTracker()
    shown = [(frame_of(0), torch_of(truth[0])), (frame_of(7), torch_of(truth[7]))]
    WithReferences(tracker, lambda: iter(shown)).initialize(frame_of(3), torch_of(truth[3]))
    assert tracker.calls == [("initialize", [0, 1, 2]), ("step", [0, 1, 2]), ("step", [0, 1, 2])]
    assert tracker.frames_kept == 2


def test_an_object_that_was_erased_on_the_frame_is_not_in_it_when_one_goes_on(studio, project, truth):
    project.write_mark(0, truth[0])
    without = np.where(truth[3] == 2, 0, truth[3]).astype(np.uint8)
    project.write_mark(3, without)
    follow(studio, project, direction="forward", frame=3)
    assert (project.labels(3, "result") == without).all()


def test_a_result_is_a_place_to_go_on_from(studio, project, truth):
    project.write_mark(0, truth[0])
    follow(studio, project, direction="forward", frame=0, until=3)
    assert follow(studio, project, direction="forward", frame=3)["state"] == "done"
    assert project.shown_frames() == list(range(COUNT))


def test_pausing_and_continuing_gives_the_same_masks_to_the_bit(studio, project, truth, tmp_path, folder):
    project.write_mark(0, truth[0])
    follow(studio, project, direction="all")
    whole = results(project)
    stop_at(studio, 3, "pause")
    paused = follow(studio, project, direction="all")
    assert (paused["state"], paused["done"]) == ("paused", 3)
    studio.queue.resume(project, paused["number"])
    done = finished(studio, project, paused["number"])
    assert (done["state"], done["done"]) == ("done", COUNT)
    assert len(list((project.folder / "runs/0002").glob("*.png"))) == COUNT
    for frame, labels in results(project).items():
        assert (labels == whole[frame]).all()


def test_a_job_continues_in_another_process(studio, project, truth, engine, tmp_path):
    from vosops.studio.server import Studio

    project.write_mark(0, truth[0])
    stop_at(studio, 3, "pause")
    number = follow(studio, project, direction="all")["number"]
    studio.close()
    later = Studio(studio.work, Engine(engine.settings, create=engine.create))
    again = later.project(project.id)
    assert again.shown_frames() == [0, 1, 2]
    later.queue.resume(again, number)
    assert finished(later, again, number)["state"] == "done"
    assert again.shown_frames() == list(range(COUNT))
    later.close()


def test_what_was_running_when_the_server_died_is_paused(studio, project, truth, engine):
    import json

    from vosops.studio.server import Studio

    project.write_mark(0, truth[0])
    stop_at(studio, 3, "pause")
    number = follow(studio, project, direction="all")["number"]
    file = project.folder / "jobs/0001.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "state": "running"}))
    later = Studio(studio.work, engine)
    [job] = later.queue.jobs(later.project(project.id))
    assert (job["number"], job["state"]) == (number, "paused")
    later.close()


@pytest.mark.parametrize("change", ["begun with", "passed"])
def test_a_mark_that_changed_where_a_run_has_been_ends_it(studio, project, truth, change):
    project.write_mark(0, truth[0])
    stop_at(studio, 3, "pause")
    paused = follow(studio, project, direction="all")
    frame = 0 if change == "begun with" else 1
    project.write_mark(frame, truth[2])
    studio.queue.resume(project, paused["number"])
    failed = finished(studio, project, paused["number"])
    assert failed["state"] == "failed"
    assert f"it has passed frame {frame}, whose mark changed since" in failed["message"]


def test_marks_ahead_of_a_paused_run_are_met_as_vosops_segment_does(studio, project, truth):
    for frame in (0, 5):
        project.write_mark(frame, truth[frame])
    follow(studio, project, direction="all")
    whole = results(project)
    project.remove_mark(5)
    stop_at(studio, 3, "pause")
    paused = follow(studio, project, direction="all")
    project.write_mark(5, truth[5])
    studio.queue.resume(project, paused["number"])
    assert finished(studio, project, paused["number"])["state"] == "done"
    for frame, labels in results(project).items():
        assert (labels == whole[frame]).all()


def test_a_correction_of_the_frame_where_a_run_rests_is_what_it_goes_on_from(studio, project, truth, engine):
    """The tracker keeps what it remembers, and sees the whole label map: an object that was erased is not there."""
    project.write_mark(0, truth[0])
    stop_at(studio, 3, "pause")
    paused = follow(studio, project, direction="all")
    corrected = np.where(truth[2] == 2, 0, truth[2]).astype(np.uint8)
    corrected[:4] = 1
    project.write_mark(2, corrected)
    stop_at(studio, 5, "pause")  # to go on from a checkpoint that has the correction does not repeat it
    studio.queue.resume(project, paused["number"])
    finished(studio, project, paused["number"])
    studio.queue.resume(project, paused["number"])
    assert finished(studio, project, paused["number"])["state"] == "done"

    tracker = clips.ColourTracker()
    tracker.initialize(frame_of(0), torch_of(truth[0]))
    for frame in (1, 2):
        tracker.step(frame_of(frame))
    tracker.step(frame_of(2), labels=torch_of(corrected), permanent=True)
    for frame in range(3, COUNT):
        labels = tracker.step(frame_of(frame), output="labels")
        assert (project.labels(frame, "result") == labels.numpy()).all()
    assert (project.labels(2) == corrected).all()


def test_a_run_from_a_result_continues(studio, project, truth):
    project.write_mark(0, truth[0])
    follow(studio, project, direction="forward", frame=0, until=3)
    stop_at(studio, 2, "pause")
    paused = follow(studio, project, direction="forward", frame=3)
    assert (paused["state"], paused["done"]) == ("paused", 2)
    studio.queue.resume(project, paused["number"])
    done = finished(studio, project, paused["number"])
    assert (done["state"], done["done"]) == ("done", COUNT - 3)


def test_a_job_continues_where_the_work_folder_has_another_path(studio, project, truth, engine, monkeypatch):
    from vosops.studio.server import Studio

    project.write_mark(0, truth[0])
    stop_at(studio, 3, "pause")
    number = follow(studio, project, direction="all")["number"]
    studio.close()
    monkeypatch.chdir(studio.work.parent)
    later = Studio(Path(studio.work.name), engine)
    again = later.project(project.id)
    later.queue.resume(again, number)
    assert finished(later, again, number)["state"] == "done"
    assert len(list((again.folder / "runs").iterdir())) == 1
    later.close()


def test_a_full_disk_pauses_a_run_and_the_queue_lives(studio, project, truth, monkeypatch):
    """Nothing can be written from the third frame on, the job's own file included, until there is room again."""
    project.write_mark(0, truth[0])
    full = []

    def write_labels(path, labels, palette):
        full.extend([1] * path.name.startswith("00002"))
        fail_where(full)
        masks.write_labels(path, labels, palette)

    def write_text(path, text):
        fail_where(full)
        outputs.write_text(path, text)

    monkeypatch.setattr("vosops.studio.follow.write_labels", write_labels)
    monkeypatch.setattr("vosops.studio.jobs.write_text", write_text)
    paused = follow(studio, project, direction="all")
    assert paused["state"] == "paused"
    assert paused["message"].endswith("the disk is full; free some space and continue")
    monkeypatch.undo()
    studio.queue.resume(project, paused["number"])
    assert finished(studio, project, paused["number"])["state"] == "done"
    assert project.shown_frames() == list(range(COUNT))


def fail_where(full):
    if full:
        with disk_errors("it", RESUME):
            raise OSError(errno.ENOSPC, "no space")


def test_stopping_keeps_what_was_found(studio, project, truth):
    project.write_mark(0, truth[0])
    stop_at(studio, 2, "stop")
    assert follow(studio, project, direction="all")["state"] == "stopped"
    assert project.shown_frames() == [0, 1]


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        ({"direction": "sideways"}, "direction must be one of all, forward, backward"),
        ({"direction": "forward", "frame": COUNT}, "frame must be from 0 to 7"),
        ({"direction": "forward", "frame": "2"}, "frame must be a frame's number"),
        ({"direction": "forward", "frame": 3, "until": 2}, "until must be in direction forward"),
        ({"direction": "backward", "frame": 3, "until": 4}, "until must be in direction backward"),
    ],
)
def test_what_cannot_be_followed_is_refused(project, request_, what):
    with pytest.raises(InputError, match=what):
        FollowRequest.parse(request_, project)


def test_without_a_mark_the_job_says_what_to_do(studio, project, truth):
    assert "mark an object on a frame first" in follow(studio, project, direction="all")["message"]
    assert "frame 2 shows no object" in follow(studio, project, direction="forward", frame=2)["message"]
    project.write_mark(2, np.zeros_like(truth[2]))
    assert "frame 2 shows no object" in follow(studio, project, direction="forward", frame=2)["message"]


def test_a_job_that_fails_leaves_the_queue_working(studio, project, truth, monkeypatch):
    project.write_mark(0, truth[0])
    step = clips.ColourTracker.step

    def broken(*arguments, **options):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(clips.ColourTracker, "step", broken)
    assert "broken on purpose" in follow(studio, project, direction="all")["message"]
    monkeypatch.setattr(clips.ColourTracker, "step", step)
    assert follow(studio, project, direction="all")["state"] == "done"


def test_the_model_is_made_once(studio, project, truth):
    made = []
    create = studio.engine.create
    studio.engine.create = lambda settings: made.append(settings) or create(settings)
    project.write_mark(0, truth[0])
    follow(studio, project, direction="all")
    follow(studio, project, direction="forward", frame=0)
    project.write_settings({"size": 24})
    follow(studio, project, direction="forward", frame=0)
    assert len(made) == 1


def stop_at(studio, frames, wish):
    """Lets the next job wish to pause or stop after so many frames."""
    publish = studio.queue._publish

    def heard(event):
        publish(event)
        if event["type"] == "job" and event["job"]["done"] == frames and "frame" in event:
            studio.queue._publish = publish
            studio.queue._control.wish = wish

    studio.queue._publish = heard


def frame_of(index):
    import torch

    return torch.from_numpy(clips.picture(clips.moving(COUNT, ids=(1, 2))[index])).permute(2, 0, 1)


def torch_of(labels):
    import torch

    return torch.from_numpy(labels)
