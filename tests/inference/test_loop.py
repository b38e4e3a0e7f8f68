"""The loop over a video: order, corrections, new objects, resuming in memory, resizing."""

import sys

import numpy as np
import pytest
import torch

from tests.clips import ColourTracker, cut, moving, picture, truth, write_video
from vosops.inference import segment
from vosops.inference.loop import TrackingLoop, frame_range
from vosops.io.errors import IncompleteInputError, InputError
from vosops.io.frames import ArraySource
from vosops.io.masks import MaskSet, masks_from_python
from vosops.io.resize import computation_size, resize_frame, resize_labels, to_labels

ONE = moving(12)
TWO = moving(12, ids=(1, 2))
CPU = torch.device("cpu")


def run(boxes, mask, tracker=None, **options):
    frames = [picture(b) for b in boxes]
    options = {"size": -1, "device": "cpu", **options}
    return list(segment(frames, mask, model=tracker or ColourTracker(), **options))


def order(frames):
    return [f.index for f in frames]


class TestOrder:
    def test_a_mask_on_the_first_frame_runs_forward(self):
        frames = run(ONE, truth(ONE[0]))
        assert order(frames) == list(range(12))
        for frame in frames:
            np.testing.assert_array_equal(frame.labels, truth(ONE[frame.index]))

    def test_frames_before_the_first_mask_are_filled_backward(self):
        frames = run(ONE, {7: truth(ONE[7])})
        assert order(frames) == [7, 8, 9, 10, 11, 6, 5, 4, 3, 2, 1, 0]
        for frame in frames:
            np.testing.assert_array_equal(frame.labels, truth(ONE[frame.index]))

    def test_backward_starts_afresh_on_the_earliest_mask(self):
        tracker = ColourTracker()
        run(TWO, {5: truth({1: TWO[5][1]}), 8: truth(TWO[8])}, tracker)
        assert tracker.calls == [("initialize", [0, 1]), ("step", [0, 1, 2]), ("initialize", [0, 1])]

    def test_start_end_and_step(self):
        frames = run(ONE, {5: truth(ONE[5])}, start=1, end=10, step=2)
        assert order(frames) == [5, 7, 9, 3, 1]

    def test_the_last_frame_is_announced(self):
        ends = []

        class Watching(ColourTracker):
            def step(self, frame, labels=None, *, end=False, **options):
                ends.append(end)
                return super().step(frame, labels, **options)

        run(ONE[:4], {1: truth(ONE[1])}, Watching())
        assert ends == [False, True, True]


class TestMasks:
    def test_the_output_on_a_mask_frame_is_the_mask(self):
        wrong = truth({1: (0, 0, 5, 5)})
        wrong[40:, :] = 255
        frames = run(ONE, {0: truth(ONE[0]), 6: wrong})
        np.testing.assert_array_equal(frames[6].labels, wrong)
        assert [f.given for f in frames] == [i in (0, 6) for i in range(12)]

    def test_a_correction_is_kept_for_good(self):
        tracker = ColourTracker()
        run(ONE, {0: truth(ONE[0]), 6: truth(ONE[6])}, tracker)
        assert tracker.frames_kept == 1

    def test_an_object_that_appears_later(self):
        frames = run(TWO, {0: truth({1: TWO[0][1]}), 6: truth(TWO[6])})
        assert frames[5].object_ids == [1]
        assert frames[6].object_ids == [1, 2]
        np.testing.assert_array_equal(frames[11].labels, truth(TWO[11]))

    def test_a_mask_that_shows_only_some_objects_leaves_the_others_where_they_are_seen(self):
        tracker = ColourTracker()
        frames = run(TWO, {0: truth({1: TWO[0][1]}), 6: truth({2: TWO[6][2]})}, tracker)
        np.testing.assert_array_equal(frames[6].labels, truth(TWO[6]))
        np.testing.assert_array_equal(frames[11].labels, truth(TWO[11]))
        assert tracker.calls == [("initialize", [0, 1]), ("step", [0, 1, 2])]

    def test_looking_at_a_mask_frame_first_does_not_change_the_tracker(self):
        """With and without drift in the extra look the rest must be the same: the state is put back."""
        masks = {0: truth({1: TWO[0][1]}), 6: truth({2: TWO[6][2]})}
        partial = run(TWO, masks, probabilities=True)
        complete = run(TWO, {**masks, 6: truth(TWO[6])}, probabilities=True)
        assert torch.equal(partial[11].probabilities, complete[11].probabilities)

    def test_ids_are_those_of_the_mask(self):
        frames = run(ONE, truth(ONE[0]) * 255)
        assert frames[5].object_ids == [255]
        assert set(frames[5].labels.unique().tolist()) == {0, 255}
        frames = run(ONE, truth(ONE[0]) * 77)
        assert frames[5].object_ids == [77]
        assert list(frames[5].areas) == [77]

    def test_a_mask_after_the_last_frame(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", [picture(b) for b in ONE])
        masks = {0: truth(ONE[0]), 50: truth(ONE[0])}
        with pytest.raises(IncompleteInputError, match="frame 50, after the last frame"):
            list(segment(path, masks, model=ColourTracker(), device="cpu", size=-1))
        with pytest.raises(InputError, match="frame 50 .* cannot be read"):
            list(segment(path, {50: truth(ONE[0])}, model=ColourTracker(), device="cpu", size=-1))


class TestFrames:
    def test_areas_and_confidences(self):
        frame = run(ONE, truth(ONE[0]), probabilities=True)[3]
        inside = frame.labels == 1
        assert frame.areas == {1: int(inside.sum())}
        assert frame.confidences[1] == pytest.approx(float(frame.probabilities[1][inside].mean()))

    def test_an_absent_object_has_no_area_and_no_confidence(self):
        frames = run([*ONE[:3], {}], truth(ONE[0]))
        assert frames[3].areas == {1: 0}
        assert frames[3].confidences == {1: 0.0}

    def test_probabilities_are_at_the_input_size(self):
        frames = run(ONE, truth(ONE[0]), size=32, probabilities=True)
        assert all(f.probabilities.shape == (2, 48, 64) for f in frames)
        assert run(ONE, truth(ONE[0]))[1].probabilities is None

    def test_the_image_is_the_input(self):
        frames = run(ONE, truth(ONE[0]), size=32)
        np.testing.assert_array_equal(frames[2].image, picture(ONE[2]))

    def test_output_has_the_input_size_whatever_the_computation(self):
        for size in (16, 32, 96):
            frames = run(ONE, truth(ONE[0]), size=size)
            expected = truth(ONE[11])
            assert frames[11].labels.shape == expected.shape
            union = ((frames[11].labels.numpy() > 0) | (expected > 0)).sum()
            assert (frames[11].labels.numpy() * expected).sum() / union > 0.6


@pytest.mark.parametrize("stop_after", range(1, 12))
def test_going_on_from_a_state_is_bit_identical(stop_after):
    masks = {4: truth({1: TWO[4][1]}), 7: truth({2: TWO[7][2]})}

    def loop():
        source = ArraySource([picture(b) for b in TWO])
        given = MaskSet(masks_from_python(masks, source, range(12)), source.size)
        options = {"short_side": 32, "device": CPU, "keep_probabilities": True}
        return TrackingLoop(ColourTracker(), source, given, range(12), **options)

    whole = list(loop())
    first = loop()
    begun = []
    for frame in first:
        begun.append(frame)
        if len(begun) == stop_after:
            state = first.state_dict()
            break
    second = loop()
    second.load_state_dict(state)
    joined = begun + list(second)
    assert order(joined) == order(whole)
    for a, b in zip(joined, whole):
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.probabilities, b.probabilities)
        assert a.confidences == b.confidences


def test_a_truncated_video_yields_its_frames_and_then_fails(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 96, 128, 3), dtype=np.uint8)
    path = cut(write_video(tmp_path / "v.mp4", list(noise), movflags="faststart", lossless=False), 0.6)
    mask = np.zeros((96, 128), np.uint8)
    mask[:10] = 1
    frames = []
    with pytest.raises(IncompleteInputError, match="truncated"):
        frames += list(segment(path, {3: mask}, model=ColourTracker(), device="cpu"))
    with pytest.raises(IncompleteInputError):
        for frame in segment(path, {3: mask}, model=ColourTracker(), device="cpu"):
            frames.append(frame.index)
    assert len(frames) > 5
    assert frames[-1] == 0, "the backward pass still runs"


def test_frame_range():
    assert frame_range(None, None, 1, 10) == range(10)
    assert frame_range(2, 8, 3, None) == range(2, 8, 3)
    assert frame_range(2, 80, 3, 10) == range(2, 10, 3)
    assert frame_range(0, None, 1, None) == range(sys.maxsize)
    for wrong in ((5, 5, 1), (-1, None, 1), (None, None, 0), (20, None, 1)):
        with pytest.raises(InputError):
            frame_range(*wrong, 10)


class TestResize:
    @pytest.mark.parametrize(
        ("size", "short_side", "expected"),
        [
            ((480, 854), 480, (480, 854)),
            ((1080, 1920), 480, (480, 864)),
            ((1920, 1080), 480, (864, 480)),
            ((481, 333), -1, (481, 333)),
        ],
    )
    def test_computation_size(self, size, short_side, expected):
        assert computation_size(size, short_side) == expected

    def test_sizes_that_make_no_sense(self):
        with pytest.raises(InputError, match="--size"):
            computation_size((480, 854), 0)

    def test_small_objects_survive(self):
        labels = torch.zeros(100, 100, dtype=torch.uint8)
        labels[51, 51], labels[70:, 70:] = 9, 4
        small = resize_labels(labels, (10, 10), [4, 9])
        assert set(small.unique().tolist()) == {0, 4, 9}
        assert small[5, 5] == 9

    def test_frames_stay_uint8(self):
        frame = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
        assert resize_frame(frame, (20, 30)).dtype == torch.uint8
        assert resize_frame(frame, (40, 60)) is frame

    def test_labels_are_the_most_probable(self):
        probabilities = torch.rand(4, 12, 16).softmax(0)
        labels, best = to_labels(probabilities, [3, 7, 200], (48, 64))
        full = torch.nn.functional.interpolate(probabilities[None], (48, 64), mode="bilinear")[0]
        expected = torch.tensor([0, 3, 7, 200], dtype=torch.uint8)[full.argmax(0)]
        assert torch.equal(labels, expected)
        torch.testing.assert_close(best, full.amax(0))

    def test_ties_go_to_the_background(self):
        labels, _ = to_labels(torch.full((3, 4, 4), 1 / 3), [1, 2], (4, 4))
        assert not labels.any()


def test_a_nan_is_no_label_s_probability():
    """Nor does it hide the objects after it: one by one, background, NaN, the later object, nothing."""
    nan = torch.nan
    probabilities = torch.tensor([[0.6, nan, 0.1, nan], [nan, 0.2, nan, nan], [0.3, 0.1, 0.7, nan]]).view(
        3, 1, 4
    )
    labels, best = to_labels(probabilities, [5, 9], (1, 4))
    assert labels.tolist() == [[0, 5, 9, 0]]
    torch.testing.assert_close(best, torch.tensor([[0.6, 0.2, 0.7, nan]]), equal_nan=True)
