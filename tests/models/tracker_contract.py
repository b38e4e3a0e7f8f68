"""What every tracker must do beside tracking: predict without going on, say how sure it is, take corrections."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from vosops.models import VideoTracker

NEARLY = {
    "atol": 1e-5,
    "rtol": 0.0,
}  # a checkout may divide a given mask's probability by a sum that is nearly 1


def check_tracker(
    make: Callable[[], VideoTracker], frames: Sequence[Tensor], labels: Sequence[Tensor]
) -> None:
    """Hold a tracker to the protocol: four frames; the labels of the first, a correction, and one with a new object."""
    one, other = make(), make()
    with pytest.raises(RuntimeError, match="initialize"):
        one.predict(frames[0])
    with pytest.raises(RuntimeError, match="initialize"):
        one.confidence()
    for tracker in (one, other):
        tracker.initialize(frames[0], labels[0])
        torch.testing.assert_close(tracker.confidence(), torch.ones(frames[0].shape[1:]), **NEARLY)

    before = one.confidence().clone()
    predicted, predicted_labels = one.predict(frames[1]), one.predict(frames[1], output="labels")
    assert torch.equal(one.confidence(), before)
    for wrong, error in ((frames[1][:, 1:], "first frame's size"), (frames[1][0], "frame must be")):
        with pytest.raises(ValueError, match=error):
            one.predict(wrong)
    with pytest.raises(ValueError, match="output must be"):
        one.predict(frames[1], output="masks")

    found = one.step(frames[1])
    assert torch.equal(found, predicted) and torch.equal(found, other.step(frames[1]))
    torch.testing.assert_close(one.confidence(), found.amax(0))
    ids = torch.tensor([0, *one.object_ids], dtype=torch.uint8)
    assert torch.equal(predicted_labels, ids[found.argmax(0)])

    one.predict(frames[2])
    for tracker in (one, other):
        tracker.step(frames[2], labels[1], permanent=True)
    torch.testing.assert_close(one.confidence(), torch.ones(frames[2].shape[1:]), **NEARLY)
    assert torch.equal(one.step(frames[3], output="labels"), other.step(frames[3], output="labels"))
    assert torch.equal(one.confidence(), other.confidence())

    one.add_objects(frames[3], labels[2])
    [new] = set(labels[2].unique().tolist()) - {0}
    assert one.object_ids[-1] == new
    assert (one.confidence()[labels[2] == new] > 1 - NEARLY["atol"]).all()
    one.reset()
    with pytest.raises(RuntimeError, match="initialize"):
        one.confidence()
