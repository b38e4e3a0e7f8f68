"""J and F of masks: hand-computed cases, and a brute-force version of DAVIS' definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.effort import examples
from vosops.metrics import (
    boundary_accuracy,
    compare_masks,
    evaluate_sequence,
    region_similarity,
    statistics,
)
from vosops.metrics.davis import boundary, boundary_radius, count_within


def brute_force_boundary(mask):
    """DAVIS' boundary map pixel by pixel, its rules for the last row and column written out."""
    height, width = mask.shape
    edge = np.zeros((height, width), dtype=bool)
    for y in range(height):
        for x in range(width):
            here = mask[y, x]
            right = x + 1 < width and mask[y, x + 1] != here
            below = y + 1 < height and mask[y + 1, x] != here
            diagonal = y + 1 < height and x + 1 < width and mask[y + 1, x + 1] != here
            edge[y, x] = right or below or diagonal
    return edge


def brute_force_dilation(mask, radius):
    """All pixels within `radius` of a pixel of the mask, from the distances of all pairs."""
    points = np.argwhere(mask)
    y, x = np.indices(mask.shape)
    squared = (y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2
    return (squared <= radius**2).any(axis=-1)


def brute_force_f(predicted, true, radius):
    p, t = brute_force_boundary(predicted), brute_force_boundary(true)
    if not p.any() and not t.any():
        return 1.0
    if not p.any() or not t.any():
        return 0.0
    precision = (p & brute_force_dilation(t, radius)).sum() / p.sum()
    recall = (t & brute_force_dilation(p, radius)).sum() / t.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@st.composite
def mask_pairs(draw):
    """Two masks of one size: blobs, noise, nothing, everything, at the borders and away from them."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def mask():
        kind = draw(st.sampled_from(["box", "noise", "empty", "full", "disk"]))
        if kind == "box":
            y, x = np.sort(rng.integers(0, height + 1, 2)), np.sort(rng.integers(0, width + 1, 2))
            result = np.zeros((height, width), dtype=bool)
            result[y[0] : y[1], x[0] : x[1]] = True
            return result
        if kind == "disk":
            y, x = np.indices((height, width))
            centre = rng.integers(0, height), rng.integers(0, width)
            return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= rng.integers(1, 200)
        return rng.random((height, width)) < {"noise": 0.1, "empty": 0.0, "full": 1.0}[kind]

    return mask(), mask()


@settings(max_examples=examples(300), deadline=None)
@given(mask_pairs(), st.integers(1, 9))
def test_f_equals_the_brute_force_definition(masks, radius):
    assert boundary_accuracy(*masks, tolerance=radius) == brute_force_f(*masks, radius)


@settings(max_examples=examples(100), deadline=None)
@given(mask_pairs(), st.integers(0, 12))
def test_count_within_equals_a_dilation_by_a_disk(masks, radius):
    points, targets = masks
    assert count_within(points, targets, radius) == (points & brute_force_dilation(targets, radius)).sum()


@settings(max_examples=examples(100), deadline=None)
@given(mask_pairs())
def test_cropping_to_the_masks_changes_nothing(masks):
    assert compare_masks(*masks) == (region_similarity(*masks), boundary_accuracy(*masks))


@settings(max_examples=examples(100), deadline=None)
@given(mask_pairs())
def test_boundary_equals_the_brute_force_definition(masks):
    np.testing.assert_array_equal(boundary(masks[0]), brute_force_boundary(masks[0]))


def box(top, left, height, width, shape=(60, 80)):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def test_j_of_two_overlapping_boxes_is_the_ratio_of_areas():
    # 10 x 10 and 10 x 10, shifted by 5: 50 pixels in both, 150 in either.
    assert region_similarity(box(10, 10, 10, 10), box(10, 15, 10, 10)) == pytest.approx(50 / 150)


def test_empty_masks_agree_and_an_invented_object_does_not():
    nothing, something = box(0, 0, 0, 0), box(10, 10, 5, 5)
    assert compare_masks(nothing, nothing) == (1.0, 1.0)
    assert compare_masks(something, nothing) == (0.0, 0.0)
    assert compare_masks(nothing, something) == (0.0, 0.0)


def test_void_pixels_are_left_out():
    true, predicted = box(10, 10, 10, 10), box(10, 10, 10, 20)
    void = box(0, 20, 60, 60)
    assert region_similarity(predicted, true) == pytest.approx(0.5)
    assert compare_masks(predicted, true, void) == (1.0, 1.0)


def test_f_forgives_a_shift_within_the_tolerance_only():
    true, shape = box(20, 20, 20, 20), (60, 80)
    radius = boundary_radius(shape)
    assert radius == 1  # ceil(0.008 * 100)
    assert boundary_accuracy(box(20, 21, 20, 20), true) == 1.0
    assert boundary_accuracy(box(20, 20 + 30, 20, 20), true) == 0.0


def test_f_of_a_shifted_line_is_computed_by_hand():
    # The boundary of a line one pixel high is the line and the row above it. Shifted down by 3, the lower row
    # of one is 2 rows from the upper row of the other, and the other rows 3 and 4 apart: none match at radius
    # 1, one row of each at 2, all within 3 of something at 3.
    true, predicted = box(30, 20, 1, 40), box(33, 20, 1, 40)
    found = [boundary_accuracy(predicted, true, tolerance=radius) for radius in (1, 2, 3)]
    assert found == [0.0, 0.5, 1.0]


def test_the_radius_is_eight_pixels_at_480p():
    assert boundary_radius((480, 854)) == 8
    assert boundary_radius((480, 854), 5) == 5
    assert boundary_radius((480, 854), 0.008) == math.ceil(0.008 * math.hypot(480, 854))


def test_statistics_of_a_short_series():
    # The quarters of 1..8 by DAVIS' rule are frames 1-3 and 6-8: rounding 1, 2.75, 4.5, 6.25, 8.
    found = statistics([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    assert found.mean == pytest.approx(0.55)
    assert found.recall == 4 / 8  # 0.5 itself is not above 0.5
    assert found.decay == pytest.approx(0.8 - 0.3)


def test_decay_of_more_than_256_frames_compares_the_true_quarters():
    values = np.linspace(1, 0, 1000)
    found = statistics(values)
    assert found.decay == pytest.approx(values[:251].mean() - values[749:].mean(), abs=1e-3)
    assert found.decay == pytest.approx(0.75, abs=2e-3)


def test_statistics_of_one_frame():
    found = statistics([0.75])
    assert (found.mean, found.recall, found.decay) == (0.75, 1.0, 0.0)


def test_no_value_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        statistics([])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"prediction: expected shape \(4, 5\).*got \(5, 4\)"):
        region_similarity(np.zeros((5, 4)), np.zeros((4, 5)))
    with pytest.raises(ValueError, match="void: expected shape"):
        boundary_accuracy(np.zeros((4, 5)), np.zeros((4, 5)), void=np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"expected a mask \(H, W\)"):
        compare_masks(np.zeros((1, 4, 5)), np.zeros((1, 4, 5)))


class TestSequence:
    """A sequence of five frames in memory, with objects 2 and 7."""

    true = np.stack([box(10, 10 + t, 10, 10) * 2 + box(40, 40, 10, 10) * 7 for t in range(5)])

    def test_the_first_and_the_last_frame_do_not_count(self):
        predicted = self.true.copy()
        predicted[[0, -1]] = 0
        assert [s.row()["J&F-Mean"] for s in evaluate_sequence(predicted, self.true)] == [1.0, 1.0]
        kept = evaluate_sequence(predicted, self.true, keep_ends=True)
        assert [s.j.mean for s in kept] == [3 / 5, 3 / 5]

    def test_objects_keep_their_ids_and_their_values_frame_by_frame(self):
        predicted = self.true.copy()
        predicted[2][predicted[2] == 7] = 0
        two, seven = evaluate_sequence(predicted, self.true, name="clip")
        assert (two.object_id, seven.object_id, seven.sequence) == (2, 7, "clip")
        assert seven.frames == ("00001", "00002", "00003")
        assert seven.j_values == (1.0, 0.0, 1.0)
        assert seven.j.recall == pytest.approx(2 / 3)

    def test_label_255_is_no_object(self):
        true = self.true.copy()
        true[:, :5] = 255
        assert [s.object_id for s in evaluate_sequence(self.true, true)] == [2, 7]

    def test_what_cannot_be_scored_is_an_error(self):
        with pytest.raises(ValueError, match="expected 5 frames"):
            evaluate_sequence(self.true[:4], self.true)
        with pytest.raises(ValueError, match="2 frames leave none to score"):
            evaluate_sequence(self.true[:2], self.true[:2])
        with pytest.raises(ValueError, match="at least one object"):
            evaluate_sequence(self.true, np.zeros_like(self.true))


def test_scoring_a_sequence_starts_with_its_first_object():
    empty, shown = np.zeros((9, 9), np.uint8), np.eye(9, dtype=np.uint8) * 3
    void = np.full((9, 9), 255, np.uint8)
    truth, predictions = [empty, void, shown, shown, shown], [shown, shown, empty, shown, empty]
    (score,) = evaluate_sequence(predictions, truth)
    assert (score.frames, score.j_values) == (("00003",), (1.0,))
    (score,) = evaluate_sequence(predictions, truth, keep_ends=True)
    assert (score.frames, score.j_values) == (("00002", "00003", "00004"), (0.0, 1.0, 0.0))
