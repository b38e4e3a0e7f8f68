"""Overlapping chunks: objects pass the seams, hidden ones too, and a run that is resumed has the same bits."""

from __future__ import annotations

import pytest
import torch

from tests.clips import SIZE, ColourTracker, moving, picture, truth
from vosops.inference.chunks import Chunks
from vosops.inference.loop import TrackingLoop
from vosops.io.errors import InputError
from vosops.io.frames import ArraySource
from vosops.io.masks import MaskSet, masks_from_python

BOXES = moving(24, ids=(1, 2))


class Counting(ColourTracker):
    """Counts its steps and starts."""

    def __init__(self):
        super().__init__()
        self.starts = []
        self.steps = 0

    def initialize(self, frame, labels):
        self.starts.append(sorted(set(labels.unique().tolist()) - {0}))
        super().initialize(frame, labels)

    def step(self, *args, **options):
        self.steps += 1
        return super().step(*args, **options)


def loop_of(boxes, chunks, first=0, tracker=None):
    source = ArraySource([picture(b) for b in boxes])
    masks = MaskSet(masks_from_python({first: truth(boxes[first])}, source, range(len(boxes))), source.size)
    return TrackingLoop(
        tracker or Counting(),
        source,
        masks,
        range(len(boxes)),
        short_side=-1,
        device=torch.device("cpu"),
        chunks=chunks,
    )


def labels_of(loop):
    return {frame.index: frame.labels for frame in loop}


def test_objects_pass_the_seams():
    loop = loop_of(BOXES, Chunks(8, 3))
    for index, labels in labels_of(loop).items():
        assert torch.equal(labels, torch.from_numpy(truth(BOXES[index])))
    assert loop.tracker.starts == [[1, 2]] * 3  # seams before frames 8 and 16
    assert loop.tracker.steps == 23 + 2 * 3  # the overlap is seen again, after the first frame


def test_an_object_that_is_hidden_at_the_seam_comes_back():
    boxes = [{1: b[1]} if 5 <= t < 12 else b for t, b in enumerate(BOXES)]
    labels = labels_of(loop_of(boxes, Chunks(8, 2)))
    assert 2 not in labels[9].unique()
    for index in (13, 20):
        assert torch.equal(labels[index], torch.from_numpy(truth(boxes[index])))


def test_backward_too():
    loop = loop_of(BOXES, Chunks(8, 3), first=20)
    for index, labels in labels_of(loop).items():
        assert torch.equal(labels, torch.from_numpy(truth(BOXES[index])))
    assert len(loop.tracker.starts) == 2 + 2


@pytest.mark.parametrize("stop", [6, 8, 10])
def test_it_continues_bit_identically(stop):
    whole = labels_of(loop_of(BOXES, Chunks(8, 3)))
    loop, done = loop_of(BOXES, Chunks(8, 3)), {}
    for frame in loop:
        done[frame.index] = frame.labels
        if len(done) == stop:
            break
    resumed = loop_of(BOXES, Chunks(8, 3))
    resumed.load_state_dict(loop.state_dict())
    done |= labels_of(resumed)
    assert done.keys() == whole.keys()
    assert all(torch.equal(done[index], whole[index]) for index in whole)


@pytest.mark.parametrize(("frames", "overlap"), [(8, 8), (0, 1), (5, 0)])
def test_what_cannot_be(frames, overlap):
    with pytest.raises(InputError, match="--chunk-frames must be above --chunk-overlap"):
        Chunks(frames, overlap)


def test_one_chunk_is_no_chunk():
    without, loop = labels_of(loop_of(BOXES, None)), loop_of(BOXES, Chunks(100))
    assert all(torch.equal(labels, without[index]) for index, labels in labels_of(loop).items())
    assert len(loop.tracker.starts) == 1 and loop.size == SIZE
