"""Continue where a run has passed a frame that was corrected since: from there again, and what was before stays."""

import numpy as np
import pytest

from tests.studio.conftest import COUNT, HOST, TOKEN, finished
from tests.studio.test_follow import follow, stop_at


def paused_at(studio, project, done, **request):
    stop_at(studio, done, "pause")
    job = follow(studio, project, **request)
    assert (job["state"], job["done"]) == ("paused", done)
    return job


def continued(studio, project, number):
    """The job that comes of it, at rest, and the frame that it follows again from."""
    job, frame = studio.resume(project, number)
    return finished(studio, project, job.number), frame


def parts_of(job):
    return [(part["direction"], part["frame"], part["until"]) for part in job["request"]["parts"]]


def corrected(labels):
    """Object 1 has grown, and object 2 was erased."""
    changed = np.where(labels == 2, 0, labels).astype(np.uint8)
    changed[:4] = 1
    return changed


def results(project, frames):
    return [project.labels(frame, "result") for frame in frames]


def assert_as_by_hand(studio, project, again, kept, **request):
    """What was followed again is what the page's other buttons do, and what was kept did not change."""
    frames, before = kept
    for mine, old in zip(results(project, frames), before):
        assert (mine == old).all()
    found = results(project, again)
    follow(studio, project, **request)
    for mine, theirs in zip(found, results(project, again)):
        assert (mine == theirs).all()


def test_it_follows_again_from_the_corrected_frame_and_keeps_what_is_before(studio, project, truth):
    project.write_mark(0, truth[0])
    paused = paused_at(studio, project, 6, direction="all")
    before = results(project, range(3))
    project.write_mark(3, corrected(truth[3]))
    job, frame = continued(studio, project, paused["number"])
    assert (job["state"], frame) == ("done", 3)
    assert parts_of(job) == [("forward", 3, None)]
    runs = [sorted(path.stem for path in (project.folder / f"runs/000{run}").glob("*.png")) for run in (1, 2)]
    assert runs == [[project.name(i) for i in range(6)], [project.name(i) for i in range(3, COUNT)]]
    [state] = [j["state"] for j in studio.queue.jobs(project) if j["number"] == paused["number"]]
    assert state == "stopped"
    assert (project.labels(3, "result") == corrected(truth[3])).all()
    assert_as_by_hand(studio, project, range(3, COUNT), (range(3), before), direction="forward", frame=3)


def test_the_earliest_of_several_corrections_counts_and_later_ones_are_met(studio, project, truth):
    project.write_mark(0, truth[0])
    paused = paused_at(studio, project, 6, direction="forward", frame=0, until=6)
    for frame in (4, 2):
        project.write_mark(frame, corrected(truth[frame]))
    job, frame = continued(studio, project, paused["number"])
    assert (frame, parts_of(job)) == (2, [("forward", 2, 6)])
    assert project.shown_frames() == list(range(7))
    assert (project.labels(2, "result") == corrected(truth[2])).all()
    assert (project.labels(4, "result")[:4] == 1).all()


def test_a_mark_that_was_taken_back_is_followed_again_from_the_frame_before_it(studio, project, truth):
    for frame in (0, 3):
        project.write_mark(frame, truth[frame])
    paused = paused_at(studio, project, 6, direction="all")
    project.remove_mark(3)
    job, frame = continued(studio, project, paused["number"])
    assert (job["state"], frame, parts_of(job)) == ("done", 3, [("forward", 2, None)])


def test_where_the_first_mark_was_changed_everything_is_followed_again(studio, project, truth):
    project.write_mark(0, truth[0])
    paused = paused_at(studio, project, 3, direction="all")
    project.write_mark(0, corrected(truth[0]))
    job, frame = continued(studio, project, paused["number"])
    assert (frame, parts_of(job)) == (0, [("all", 0, None)])
    assert job["done"] == COUNT
    assert not any(2 in project.labels(number) for number in range(COUNT))


@pytest.mark.parametrize(
    ("done", "frame", "parts"),
    [
        (3, 5, [("forward", 5, None), ("backward", 4, None)]),  # on its way forward, 4 to 6 are done
        (6, 6, [("forward", 6, None), ("backward", 2, None)]),  # on its way back, 4 to 7 and 3 and 2 are done
        (7, 2, [("backward", 2, None)]),
        (6, 0, [("backward", 2, None)]),  # a mark ahead: it ends behind it
        (3, 1, [("forward", 6, None), ("backward", 4, None), ("backward", 1, None)]),
    ],
)
def test_a_run_both_ways_does_again_what_is_affected_and_what_is_left(
    studio, project, truth, done, frame, parts
):
    project.write_mark(4, truth[4])
    paused = paused_at(studio, project, done, direction="all")
    project.write_mark(frame, truth[frame])
    job, _ = continued(studio, project, paused["number"])
    assert (job["state"], parts_of(job)) == ("done", parts)
    assert project.shown_frames() == list(range(COUNT))
    for number in range(COUNT):
        assert (project.labels(number) == truth[number]).mean() > 0.99


def test_a_run_backward_follows_again_backward(studio, project, truth):
    project.write_mark(7, truth[7])
    paused = paused_at(studio, project, 5, direction="backward", frame=7, until=1)
    before = results(project, (6, 7))
    project.write_mark(5, corrected(truth[5]))
    job, frame = continued(studio, project, paused["number"])
    assert (frame, parts_of(job)) == (5, [("backward", 5, 1)])
    assert project.shown_frames() == list(range(1, COUNT))
    again = dict(direction="backward", frame=5, until=1)
    assert_as_by_hand(studio, project, range(1, 6), ((6, 7), before), **again)


def test_a_part_that_is_paused_goes_on_and_then_the_next(studio, project, truth):
    project.write_mark(4, truth[4])
    paused = paused_at(studio, project, 4, direction="all")
    project.write_mark(5, truth[5])
    stop_at(studio, 2, "pause")
    job, _ = continued(studio, project, paused["number"])
    assert (job["state"], job["memory"]["part"]) == ("paused", 0)
    job, frame = continued(studio, project, job["number"])
    assert (job["state"], frame) == ("done", None)
    assert project.shown_frames() == list(range(COUNT))


def test_what_a_run_meets_on_its_way_is_no_reason_to_follow_again(studio, project, truth):
    """The frame on which it rests, and those to come."""
    project.write_mark(0, truth[0])
    paused = paused_at(studio, project, 3, direction="all")
    for frame in (2, 5):
        project.write_mark(frame, truth[frame])
    job, frame = continued(studio, project, paused["number"])
    assert (job["number"], job["state"], frame) == (paused["number"], "done", None)


def test_the_page_hears_from_which_frame(client, studio, project, truth):
    project.write_mark(0, truth[0])
    paused = paused_at(studio, project, 4, direction="all")
    project.write_mark(2, corrected(truth[2]))
    path = f"/api/projects/{project.id}/jobs/{paused['number']}/resume"
    answer = client.post(path, headers={"host": HOST, "x-vosops-token": TOKEN}).json()
    assert answer["again"] == 2
