"""What networks and the tracker agree on: sizes, ranges of rows, masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vosops.models.network import Memory, Network, TensorMasks, resize_rows, source_rows


class Sized(Network):
    stride = 16

    def new_memory(self, *, budget: int | None = None, naive: bool = False) -> Memory:
        raise NotImplementedError

    def evidence(self, scores: Tensor, size: tuple[int, int], rows: range) -> Tensor:
        return resize_rows(scores, size, rows)

    def aggregate(self, evidence: Tensor) -> Tensor:
        return evidence.softmax(0)


class TestResizeRows:
    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("size", [(36, 44), (31, 50), (5, 7), (9, 22), (13, 11), (1, 1)])
    @pytest.mark.parametrize("part", [(0, 0.4), (0.3, 0.7), (0.8, 1)])
    def test_gives_the_rows_of_the_whole(self, size, align_corners, part):
        x = torch.randn(3, 9, 11)
        whole = functional.interpolate(x[None], size, mode="bilinear", align_corners=align_corners)[0]
        start = int(part[0] * size[0])
        rows = range(start, max(start + 1, int(part[1] * size[0])))
        found = resize_rows(x, size, rows, align_corners=align_corners)
        torch.testing.assert_close(found, whole[:, rows.start : rows.stop], atol=2e-6, rtol=0)

    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("target", [40, 10, 6])
    def test_needs_no_more_than_the_source_rows(self, target, align_corners):
        x, rows = torch.randn(2, 10, 3), range(target // 2, target // 2 + 2)
        source = source_rows(10, target, rows, align_corners=align_corners)
        assert len(source) <= 2 + 10 / target * len(rows) + 1
        part = resize_rows(
            x[:, source.start : source.stop],
            (target, 5),
            rows,
            align_corners=align_corners,
            first=source.start,
            height=10,
        )
        torch.testing.assert_close(part, resize_rows(x, (target, 5), rows, align_corners=align_corners))

    def test_is_float32(self):
        assert resize_rows(torch.ones(1, 2, 2).bfloat16(), (4, 4), range(4)).dtype == torch.float32


class TestNetwork:
    def test_pads_to_the_stride_with_the_odd_pixel_after(self):
        assert Sized().padding((480, 854)) == (5, 5, 0, 0)
        assert Sized().padding((33, 47)) == (0, 1, 7, 8)
        assert Sized().padding((32, 48)) == (0, 0, 0, 0)

    def test_scales_up_to_the_stride(self):
        assert Sized().scaled_size((480, 864), 0.5) == (240, 432)
        assert Sized().scaled_size((48, 64), 0.4) == (32, 32)

    def test_probabilities_of_rows_are_those_of_the_whole(self):
        network, scores = Sized(), torch.randn(3, 4, 6)
        whole = network.probabilities(scores, (16, 24))
        assert whole.shape == (3, 16, 24)
        torch.testing.assert_close(network.probabilities(scores, (16, 24), range(5, 9)), whole[:, 5:9])


class TestTensorMasks:
    def test_gives_classes_and_labels(self):
        probabilities = torch.rand(3, 4, 5)
        masks = TensorMasks(probabilities, [7, 9])
        assert masks.object_ids == [7, 9] and masks.size == (4, 5)
        assert torch.equal(masks.of(2), probabilities[2])
        assert torch.equal(masks.labels(), probabilities.argmax(0))

    def test_refuses_another_number_of_classes(self):
        with pytest.raises(ValueError, match=r"probabilities must be of 2 classes, got \(3, 4, 5\)"):
            TensorMasks(torch.rand(3, 4, 5), [1])
