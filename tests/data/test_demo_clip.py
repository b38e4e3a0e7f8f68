"""The demonstration clip: deterministic, with exact masks, and with something to track in it."""

import numpy as np
import pytest

from vosops.data.demo_clip import OBJECTS, DemoClip, write_clip

pytest.importorskip("skimage", reason="the clip is rendered from scikit-image's photographs")

SMALL = (120, 214)


@pytest.fixture(scope="module")
def clip():
    """All frames and labels of a small clip."""
    frames, labels = zip(*DemoClip(24, SMALL), strict=True)
    return np.stack(frames), np.stack(labels)


def test_frames_and_labels_have_the_size_that_was_asked_for(clip):
    frames, labels = clip
    assert frames.shape == (24, *SMALL, 3) and frames.dtype == np.uint8
    assert labels.shape == (24, *SMALL) and labels.dtype == np.uint8


def test_rendering_is_deterministic_and_random_access(clip):
    frame, labels = DemoClip(24, SMALL)[-7]
    np.testing.assert_array_equal(frame, clip[0][17])
    np.testing.assert_array_equal(labels, clip[1][17])


def test_every_object_is_in_every_frame(clip):
    for labels in clip[1]:
        assert set(np.unique(labels)) == {0, *OBJECTS}


@pytest.mark.parametrize("object_id", OBJECTS)
def test_every_object_moves_and_changes_size(clip, object_id):
    masks = clip[1] == object_id
    centres = np.array([np.argwhere(mask).mean(0) for mask in masks])
    areas = masks.sum((1, 2))
    assert np.ptp(centres, axis=0).max() > 0.05 * SMALL[1]
    assert areas.max() > 1.1 * areas.min()


def test_objects_pass_in_front_of_one_another(clip):
    labels = clip[1]
    shuttle = (labels == 2).sum((1, 2))
    assert shuttle[8:16].min() < 0.6 * shuttle[0], "the astronaut hides a part of the shuttle"
    touching = [(frame[:, :-1] == 3) & (frame[:, 1:] == 1) for frame in labels]
    assert touching[12].any() and not touching[0].any(), "the cup passes in front of the astronaut"


def test_the_background_moves(clip):
    frames, labels = clip
    background = (labels[0] == 0) & (labels[4] == 0)
    change = np.abs(frames[0].astype(int) - frames[4])[background]
    assert change.mean() > 3


def test_masks_are_exact():
    """A pixel has the label of nearly all of its sixteen sub-pixels, seen at four times the size."""
    _, coarse = DemoClip(3, SMALL)[1]
    _, fine = DemoClip(3, (4 * SMALL[0], 4 * SMALL[1]))[1]
    blocks = fine.reshape(SMALL[0], 4, SMALL[1], 4)
    for object_id in OBJECTS:
        share = (blocks == object_id).mean((1, 3))
        assert ((coarse == object_id) == (share > 0.5))[np.abs(share - 0.5) > 0.4].all()


def test_labels_follow_the_picture():
    """The edges of the picture are strong where the labels change."""
    frame, labels = DemoClip(2, (240, 428))[0]
    steps = np.abs(np.diff(frame.astype(int), axis=1)).sum(-1)
    changes = labels[:, 1:] != labels[:, :-1]
    assert steps[changes].mean() > 8 * steps[labels[:, 1:] == 0].mean()


def test_more_frames_show_the_same_motion_more_slowly():
    few, many = DemoClip(3, SMALL), DemoClip(5, SMALL)
    np.testing.assert_array_equal(few[1][0], many[2][0])


def test_a_clip_of_one_frame_is_the_first():
    np.testing.assert_array_equal(DemoClip(1, SMALL)[0][0], DemoClip(9, SMALL)[0][0])


def test_the_written_clip_is_a_dataset(tmp_path):
    from PIL import Image

    clip = DemoClip(3, SMALL)
    frames, masks = write_clip(clip, tmp_path)
    assert frames == tmp_path / "JPEGImages/480p/demo" and masks == tmp_path / "Annotations/480p/demo"
    assert [p.name for p in sorted(frames.iterdir())] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    np.testing.assert_array_equal(np.array(Image.open(masks / "00001.png")), clip[1][1])


@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "frames: expected"), ((5, (20, 300)), "size: expected")]
)
def test_impossible_clips_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DemoClip(*arguments)
    with pytest.raises(IndexError, match="index: expected less than 2"):
        DemoClip(2, SMALL)[2]
