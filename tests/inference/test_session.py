"""A session follows objects through frames that are pushed, whatever comes and goes, and can be saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.clips import ColourTracker, moving, picture, truth
from vosops import Session
from vosops.inference import segment
from vosops.io.errors import InputError, ResumeError
from vosops.models import create_model

BOXES = moving(8, ids=(1, 2))
FRAMES = [picture(boxes) for boxes in BOXES]


@pytest.fixture(autouse=True, scope="module")
def serial(one_thread):
    """Every test here runs in one thread."""


@pytest.fixture
def session():
    return Session(ColourTracker(), size=-1, device="cpu")


def test_it_gives_what_a_video_gives():
    session = Session(size=32, device="cpu")
    options = {"size": 32, "device": "cpu"}
    for frame, expected in zip(FRAMES, segment(FRAMES, truth(BOXES[0]), **options), strict=True):
        found = session.push(frame, truth(BOXES[0]) if expected.given else None)
        assert torch.equal(found.labels, expected.labels) and found.areas == expected.areas
        assert found.confidences == pytest.approx(expected.confidences)
        assert found.index == expected.index and found.given == expected.given


def test_before_an_object_there_is_background(session):
    found = session.push(FRAMES[0])
    assert found.object_ids == [] and not found.labels.any() and session.object_ids == []


def test_objects_come_are_corrected_and_go(session):
    session.push(FRAMES[0])
    only_first = np.where(truth(BOXES[0]) == 1, 1, 0)
    assert session.add_objects(only_first) == [1]
    session.push(FRAMES[1])
    assert session.add_objects(truth(BOXES[1]) == 2) == [2]  # bool: the next free id
    assert torch.equal(session.labels, torch.from_numpy(truth(BOXES[1])))
    assert torch.equal(session.push(FRAMES[2]).labels, torch.from_numpy(truth(BOXES[2])))
    session.remove_object(1)
    assert session.object_ids == [2]
    assert set(session.labels.unique().tolist()) == {0, 2}
    assert session.push(FRAMES[3]).areas.keys() == {2}
    session.remove_object(2)
    assert session.push(FRAMES[4]).object_ids == []
    session.add_objects(truth(BOXES[4]))
    assert torch.equal(session.push(FRAMES[5]).labels, torch.from_numpy(truth(BOXES[5])))


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (picture({}, (40, 64)), "frame must be 64x48 as the first one, got 64x40"),
        (np.full((48, 64, 3), np.nan, np.float32), "uint8 RGB"),
        (np.zeros((48, 64), np.uint8), "uint8 RGB"),
        ("frame.png", "uint8 RGB"),
    ],
)
def test_a_broken_frame_changes_nothing(session, frame, error):
    whole = Session(ColourTracker(), size=-1, device="cpu")
    for each in (session, whole):
        each.push(FRAMES[0], truth(BOXES[0]))
    with pytest.raises(InputError, match=error):
        session.push(frame)
    assert session.index == 0
    assert torch.equal(session.push(FRAMES[1]).labels, whole.push(FRAMES[1]).labels)


def test_broken_labels_do_not_count_their_frame(session):
    session.push(FRAMES[0], truth(BOXES[0]))
    with pytest.raises(InputError, match="labels must be 64x48 as the frame, got 8x8"):
        session.push(FRAMES[1], np.ones((8, 8), np.uint8))
    with pytest.raises(InputError, match="labels must show an object"):
        session.add_objects(np.zeros((48, 64), np.uint8))
    assert session.index == 0


def test_errors():
    with pytest.raises(InputError, match="a frame must be pushed before"):
        Session(ColourTracker(), device="cpu").add_objects(truth(BOXES[0]))
    session = Session(ColourTracker(), size=-1, device="cpu")
    session.push(FRAMES[0], truth(BOXES[0]))
    with pytest.raises(InputError, match=r"object_id must be one of \[1, 2\], got 9"):
        session.remove_object(9)


@pytest.mark.parametrize("model", ["name", "network"])
def test_it_continues_where_it_was_saved(tmp_path, model):
    network = create_model("stm").eval() if model == "network" else None
    made = {"model": network} if network else {"model": "propagate"}
    session = Session(**made, size=32, device="cpu", memory_budget="20MB")
    for frame in FRAMES[:4]:
        session.push(frame, truth(BOXES[0]) if session.index < 0 else None)
    session.save(tmp_path / "session.pt")
    moved = Session.load(tmp_path / "session.pt", device="cpu", model=network)
    assert moved.object_ids == session.object_ids and torch.equal(moved.labels, session.labels)
    for frame in FRAMES[4:]:
        ours, theirs = moved.push(frame), session.push(frame)
        assert torch.equal(ours.labels, theirs.labels) and ours.confidences == theirs.confidences


def test_what_is_no_session(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no session")
    with pytest.raises(ResumeError, match="is not a saved session"):
        Session.load(tmp_path / "a.pt")
    Session(ColourTracker(), device="cpu").save(tmp_path / "b.pt")
    with pytest.raises(ResumeError, match="a custom network or tracker"):
        Session.load(tmp_path / "b.pt")
    with pytest.raises(InputError, match="does not exist"):
        Session.load(tmp_path / "c.pt")


def test_a_session_of_another_size_or_with_other_objects_than_fit(session):
    session.push(FRAMES[0])
    other = Session(ColourTracker(), size=32, device="cpu")
    with pytest.raises(ResumeError, match="saved by another version of vosops or with another size"):
        other.load_state_dict(session.state_dict())
    every = np.arange(1, 255, dtype=np.uint8).repeat(2)
    labels = np.zeros((48, 64), np.uint8)
    labels.flat[: every.size] = every
    session.add_objects(labels)
    with pytest.raises(InputError, match="a session tracks at most 254 objects"):
        session.add_objects(labels == 1)


def test_sessions_share_a_network_and_nothing_else():
    network = create_model("stm").eval()
    sessions = [Session(network, size=32, device="cpu") for _ in range(2)]
    sessions[0].push(FRAMES[0], truth(BOXES[0]))
    alone = Session(network, size=32, device="cpu")
    alone.push(FRAMES[0], truth(BOXES[0]))
    sessions[1].push(FRAMES[3], truth(BOXES[3]) == 1)
    with pytest.raises(InputError):
        sessions[1].push(np.full((48, 64, 3), np.nan, np.float32))
    assert torch.equal(sessions[0].push(FRAMES[1]).labels, alone.push(FRAMES[1]).labels)
    assert sessions[0].tracker.network is sessions[1].tracker.network
