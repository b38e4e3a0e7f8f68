"""What networks that segment each frame alone have in common: sides, padding, `predict`, one logit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vosops.inference import SemanticTracker
from vosops.models import FrameNetwork
from vosops.models.semantic_network import Sides, bands


class Picky(FrameNetwork):
    """Takes sides of one more than a multiple of 4, from 9 on; its logits are the image, at a stride."""

    sides = Sides(4, 1, least=9)

    def __init__(self, num_classes: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.num_classes, self.stride = num_classes, stride
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images):
        self.sides.check(images)
        self.seen.append(tuple(images.shape))
        return self.scale * images[:, : self.num_classes, :: self.stride, :: self.stride]


class TestSides:
    @pytest.mark.parametrize(
        ("sides", "side", "nearest", "at_least"),
        [
            (Sides(), 1, [1], 1),
            (Sides(least=16), 15, [16], 16),
            (Sides(32, least=224), 2160, [2144, 2176], 2176),
            (Sides(32, least=224), 230, [224, 256], 256),
            (Sides(8, 1, least=9), 713, [713], 713),
            (Sides(8, 1, least=9), 720, [713, 721], 721),
            (Sides(8, 1, least=9), 3, [9], 9),
            (Sides(2, least=33), 1, [34], 34),
        ],
    )
    def test_nearest_and_next(self, sides, side, nearest, at_least):
        assert sides.nearest(side) == nearest and sides.at_least(side) == at_least

    def test_both_sides_are_told(self):
        with pytest.raises(
            ValueError,
            match="images must have sides of 9 pixels or more that are 1 more than a multiple of 8, got "
            "height 2160: the nearest are 2153 and 2161; width 4: the nearest is 9$",
        ):
            Sides(8, 1, least=9).check(torch.empty(1, 3, 2160, 4))
        with pytest.raises(ValueError, match=r"images must be \(N,C,H,W\), got \(3, 8, 8\)"):
            Sides().check(torch.empty(3, 8, 8))


class TestPredict:
    @pytest.mark.parametrize("size", [(9, 13), (10, 13), (3, 30)])
    def test_any_size_is_padded_on_the_right_and_below(self, size):
        network = Picky().eval()
        image = torch.rand(3, *size)
        assert torch.equal(network.predict(image), image.argmax(0).to(torch.uint8))
        assert network.seen == [(1, 3, *(network.sides.at_least(side) for side in size))]

    def test_the_border_is_repeated(self):
        network = Picky().eval()
        image = torch.rand(1, 3, 10, 9)
        seen = {}
        network.forward = lambda images: seen.setdefault("images", images)
        assert torch.equal(network.features(image)[0], image)
        assert torch.equal(seen["images"][:, :, 10:], image[:, :, 9:].expand(-1, -1, 3, -1))

    def test_smaller_logits_are_enlarged_before_what_was_padded_is_cut_off(self):
        network = Picky(stride=4).eval()
        network.align_corners = True
        ramp = torch.arange(12.0).div(12)[None, :, None].expand(3, -1, 9)
        (logits,) = network.features(ramp[None])
        assert logits.shape == (1, 3, 12, 9)
        assert_close(logits[0, :, :9], ramp[:, :9])

    def test_labels_are_those_of_the_tracker(self):
        network, frame = Picky(stride=2).eval(), torch.randint(0, 256, (3, 33, 21), dtype=torch.uint8)
        assert torch.equal(network.predict(frame), SemanticTracker(network).step(frame, output="labels"))

    @pytest.mark.parametrize(
        "image", [torch.rand(2, 9, 9), torch.rand(1, 3, 9, 9), torch.rand(3, 9, 9) * 255]
    )
    def test_what_is_no_image(self, image):
        with pytest.raises(ValueError, match="frame must be"):
            Picky().eval().predict(image)

    def test_not_while_it_trains(self):
        with pytest.raises(ValueError, match=r"in eval mode to predict: call network\.eval\(\)"):
            Picky().predict(torch.rand(3, 9, 9))


class TestOneLogit:
    """Background has the logit 0."""

    @pytest.fixture
    def network(self):
        network = Picky(num_classes=1).eval()
        network.mean = (0.5,)
        return network

    def test_labels_and_probabilities(self, network):
        frame = torch.rand(3, 13, 17)
        foreground = frame[0] > 0.5
        tracker = SemanticTracker(network)
        assert tracker.num_classes == 2
        assert torch.equal(network.predict(frame), foreground.to(torch.uint8))
        labels, best = tracker.labels(frame)
        assert torch.equal(labels, foreground.to(torch.uint8))
        assert_close(best, torch.sigmoid((frame[0] - 0.5).abs()))
        share = torch.sigmoid(frame[0] - 0.5)
        assert_close(tracker.step(frame), torch.stack([1 - share, share]))


def test_bands_are_the_whole():
    logits = torch.rand(40, 30, 30)
    size = (700, 900)
    ((_, whole),) = bands(logits, size, whole=True)
    parts = list(bands(logits, size))
    assert len(parts) > 1
    assert [rows.start for rows, _ in parts[1:]] == [rows.stop for rows, _ in parts[:-1]]
    assert_close(torch.cat([band for _, band in parts], 1), whole)
    assert whole.shape == (40, *size)
