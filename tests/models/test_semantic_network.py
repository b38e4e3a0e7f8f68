"""What networks that segment each frame alone have in common: sides, padding, `predict`, one logit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vosops.inference import SemanticTracker
from vosops.models import FrameNetwork, create_model
from vosops.models.segmentation import segnet
from vosops.models.semantic_network import Sides, bands
from vosops.models.tiles import cut_into_tiles


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

    def test_other_numbers_of_channels_are_not_normalised(self):
        network = Picky(num_classes=5).eval()
        network.in_channels = 5
        network.mean, network.std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
        image = torch.rand(5, 9, 13)
        assert torch.equal(network.predict(image), image.argmax(0).to(torch.uint8))
        with pytest.raises(ValueError, match=r"frame must be \(5,H,W\), got \(3, 9, 13\)"):
            network.predict(image[:3])

    @pytest.mark.parametrize("model", ["unet", "deeplabv3plus", "icnn", "gridnet"])
    def test_two_channels(self, model):
        network = create_model(model, num_classes=3, in_channels=2)
        assert network.predict(torch.rand(2, 33, 40)).shape == (33, 40)

    def test_not_while_it_trains(self):
        with pytest.raises(ValueError, match=r"in eval mode to predict: call network\.eval\(\)"):
            Picky().predict(torch.rand(3, 9, 9))


class TestTiles:
    @pytest.mark.parametrize("size", [(50, 100), (64, 64), (65, 31), (1, 1), (200, 129)])
    @pytest.mark.parametrize(
        ("tile", "overlap", "stride"), [(64, 16, 1), (64, 17, 8), (40, 0, 1), (16, 8, 8)]
    )
    def test_every_pixel_counts_once_and_within_its_tile(self, size, tile, overlap, stride):
        count = torch.zeros(size, dtype=torch.int64)
        for part in cut_into_tiles(size, tile, overlap, stride):
            count[
                part.kept_rows.start : part.kept_rows.stop, part.kept_columns.start : part.kept_columns.stop
            ] += 1
            for read, kept, side in ((part.rows, part.kept_rows, 0), (part.columns, part.kept_columns, 1)):
                assert read.start % stride == 0 and len(read) <= tile
                assert kept.start - read.start >= overlap // 2 or kept.start == read.start == 0
                assert read.stop - kept.stop >= overlap // 2 or kept.stop == read.stop == size[side]
        assert (count == 1).all()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tile": 0}, "tile must be at least 1, got 0"),
            ({"tile": 64, "overlap": -1}, "overlap must be 0 or more, got -1"),
            ({"tile": 64, "overlap": 64}, "overlap must be at most 63 with tiles of 64, got 64"),
        ],
    )
    def test_wrong_tiles(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Picky().eval().predict(torch.rand(3, 9, 9), **arguments)
        with pytest.raises(ValueError, match=message):
            SemanticTracker(Picky(), **arguments)

    def test_a_tile_smaller_than_the_stride(self):
        with pytest.raises(ValueError, match="^tile must be at least 16, got 5$"):
            cut_into_tiles((50, 100), 5, 9, 16)
        assert len(cut_into_tiles((16, 48), 16, 0, 16)) == 3

    def test_the_default_overlap_is_what_it_takes(self):
        network = create_model("unet")
        assert network.tiles((2000, 600), 600)[1].columns == range(0, 600)
        first, second = network.tiles((900, 600), 600)
        assert (first.rows, second.rows) == (range(0, 600), range(368, 900))  # 2 x 108, rounded up
        assert network.tiles((400, 10), 200)[1].rows.start == 144  # too small for that: a quarter

    @pytest.mark.parametrize(
        ("model", "options", "size", "tile"),
        [
            ("gridnet", {"widths": (8, 8, 8)}, (150, 301), 280),
            ("resunet", {"filters": (8, 8, 8, 8)}, (200, 96), 184),
            ("icnn", {}, (16, 616), 600),
            ("unet", {}, (17, 464), 448),
            ("segnet", {}, (32, 928), 896),
        ],
    )
    def test_labels_are_those_of_the_whole_image(self, model, options, size, tile, monkeypatch):
        monkeypatch.setattr(segnet, "_STAGES", ((8, 8), (8, 8), (8, 8, 8), (8, 8, 8), (8, 8, 8)))
        network = create_model(model, num_classes=4, **options).double()
        image = torch.rand(3, *size, dtype=torch.float64)
        assert len(network.tiles(size, tile)) == 2
        with torch.no_grad():
            logits = torch.cat([band for _, _, band in network.pieces(network.prepare(image[None]))], 1)
            for overlap in (None, 0):
                found = torch.full_like(logits, torch.nan)
                for rows, columns, band in network.pieces(
                    network.prepare(image[None]), tile=tile, overlap=overlap
                ):
                    found[:, rows, columns] = band
                far = (found - logits).abs().max() / logits.std()
                assert far < 1e-5 if overlap is None else far > 1e-3

    def test_the_tracker_puts_them_together(self):
        network, frame = create_model("gridnet", num_classes=4, widths=(8, 8, 8)), torch.rand(3, 60, 90)
        tracker = SemanticTracker(network, tile=32, overlap=8)
        labels = network.predict(frame, tile=32, overlap=8)
        assert torch.equal(tracker.step(frame, output="labels"), labels)
        probabilities = tracker.step(frame)
        assert torch.equal(probabilities.argmax(0), labels.long())
        assert_close(probabilities.sum(0), torch.ones(60, 90))
        with pytest.raises(
            ValueError, match=r"size must be the frame's \(60, 90\) with tiles, got \(30, 45\)"
        ):
            tracker.step(frame, size=(30, 45))

    def test_not_for_a_recurrent_network(self):
        with pytest.raises(ValueError, match="tile must be None for LSTMICNet, which is recurrent, got 64"):
            SemanticTracker(create_model("lstm_icnet"), tile=64)
        with pytest.raises(ValueError, match="overlap must be None without tile, got 8"):
            SemanticTracker(Picky(), overlap=8)


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
