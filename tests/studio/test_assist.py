"""What a box or a click selects."""

import numpy as np
import pytest

from tests import clips
from vosops.io.errors import InputError
from vosops.studio.assist import ClassClicks, ClickSettings, grab_cut


@pytest.fixture
def scene():
    """A noisy picture with one coloured disc, and where the disc is."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:80, :120]
    disc = (y - 40) ** 2 + (x - 60) ** 2 < 22**2
    image = np.where(disc[..., None], (200, 60, 40), (60, 90, 70)) + random.integers(-20, 20, (80, 120, 3))
    return image.clip(0, 255).astype(np.uint8), disc


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_a_box_finds_the_object_inside(scene):
    pytest.importorskip("cv2", reason="vosops[studio] is not installed")
    image, disc = scene
    assert overlap(grab_cut(image, (32, 12, 88, 68)), disc) > 0.95


def test_a_box_may_be_drawn_from_any_corner_and_past_the_border(scene):
    pytest.importorskip("cv2", reason="vosops[studio] is not installed")
    image, disc = scene
    assert overlap(grab_cut(image, (88, 68, 32, 12)), disc) > 0.95
    assert overlap(grab_cut(image[:, 60:], (-10, 12, 28, 68)), disc[:, 60:]) > 0.95


def test_nothing_outside_the_box_is_selected(scene):
    pytest.importorskip("cv2", reason="vosops[studio] is not installed")
    image, _ = scene
    mask = grab_cut(image, (50, 30, 70, 50))
    mask[30:50, 50:70] = False
    assert not mask.any()


def test_a_box_without_area_is_refused(scene):
    pytest.importorskip("cv2", reason="vosops[studio] is not installed")
    with pytest.raises(InputError, match="box must have sides of 4 pixels"):
        grab_cut(scene[0], (10, 10, 12, 40))


def test_a_large_picture_is_cut_at_its_own_size(scene):
    pytest.importorskip("cv2", reason="vosops[studio] is not installed")
    image, disc = (np.repeat(np.repeat(part, 8, 0), 8, 1) for part in scene)
    assert overlap(grab_cut(image, (256, 96, 704, 544)), disc) > 0.93


class ByColour:
    """Knows two classes: red, and all else."""

    def __init__(self):
        self.steps = 0

    def reset(self):
        pass

    def step(self, frame, output):
        self.steps += 1
        return (frame[0] > 150).long()


@pytest.fixture
def clicks(monkeypatch):
    tracker = ByColour()
    monkeypatch.setattr("vosops.studio.assist.make_semantic_tracker", lambda settings: tracker)
    tool = ClassClicks(ClickSettings("hrnet_w48"))
    tool.made = tracker
    return tool


def test_a_click_selects_the_connected_part_of_a_class(clicks):
    image = clips.picture({1: (4, 4, 10, 12)})
    image[30:40, 40:50] = clips.COLOURS[1]
    mask = clicks.select("frame", image, [(6, 6, True)])
    assert (mask == (clips.truth({1: (4, 4, 10, 12)}) == 1)).all()


def test_more_clicks_add_and_remove(clicks):
    image = clips.picture({1: (4, 4, 10, 12)})
    image[30:40, 40:50] = clips.COLOURS[1]
    both = clicks.select("frame", image, [(6, 6, True), (45, 35, True)])
    assert both.sum() == 10 * 12 + 10 * 10
    assert clicks.select("frame", image, [(6, 6, True), (45, 35, True), (6, 6, False)]).sum() == 100


def test_the_network_runs_once_a_frame(clicks):
    image = clips.picture({1: (4, 4, 10, 12)})
    for key in ("a", "a", "b"):
        clicks.select(key, image, [(6, 6, True)])
    assert clicks.made.steps == 2
