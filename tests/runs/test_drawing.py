"""Overlays, cut-outs and the contact sheet."""

import numpy as np
import pytest
from PIL import Image

from tests.clips import picture, read_png, truth
from vosops.runs.drawing import (
    ContactSheet,
    class_overlay,
    colour_table,
    contours,
    overlay,
    write_cutout,
)

LABELS = truth({1: (4, 4, 20, 20), 2: (26, 30, 10, 30)})
GREY = np.full((48, 64, 3), 100, np.uint8)


class TestOverlay:
    def test_colours_come_from_the_palette(self):
        palette = bytes([0, 0, 0, 0, 0, 200, 200, 200, 0]).ljust(768, b"\0")
        table = colour_table(palette, binary=False)
        assert table[1].tolist() == [0, 0, 255]
        assert table[2].tolist() == [255, 255, 0]

    def test_colours_that_cannot_be_seen_are_replaced(self):
        greys = bytes(v for i in range(256) for v in (i, i, i))
        assert colour_table(greys, binary=False)[3].tolist() == [255, 255, 0]

    def test_objects_are_tinted_and_outlined_and_the_rest_is_left_alone(self):
        table = colour_table(None, binary=False)
        drawn = overlay(GREY, LABELS, table, binary=False)
        np.testing.assert_array_equal(drawn[LABELS == 0], GREY[LABELS == 0])
        assert drawn[4, 4].tolist() == table[1].tolist()
        assert drawn[14, 14].tolist() == [(100 + int(c)) // 2 for c in table[1]]

    def test_ignored_pixels_are_left_alone(self):
        ignored = np.where(LABELS == 2, 255, LABELS).astype(np.uint8)
        drawn = overlay(GREY, ignored, colour_table(None, False), binary=False)
        np.testing.assert_array_equal(drawn[LABELS == 2], GREY[LABELS == 2])
        binary = overlay(GREY, ignored, colour_table(None, True), binary=True)
        assert (binary[LABELS == 2] != GREY[LABELS == 2]).any()

    def test_classes_tint_every_pixel_in_the_palettes_own_colour(self):
        palette = bytes([10, 20, 30, 200, 0, 0, 0, 0, 250]).ljust(768, b"\0")
        drawn = class_overlay(GREY, LABELS, palette)
        assert drawn[0, 0].tolist() == [55, 60, 65]
        assert drawn[14, 14].tolist() == [150, 50, 50]
        assert drawn[30, 40].tolist() == [50, 50, 175]

    def test_contours_lie_inside_the_objects(self):
        edge = contours(LABELS, 1)
        assert edge[4, 4] and edge[23, 23] and edge[10, 4]
        assert not edge[5, 5] and not edge[3, 4]
        assert contours(LABELS, 2)[5, 5]


def test_cutout(tmp_path):
    image = picture({1: (4, 4, 20, 20)})
    write_cutout(tmp_path / "c" / "0.png", image, LABELS, binary=False)
    rgba = read_png(tmp_path / "c" / "0.png")
    assert rgba.shape == (48, 64, 4)
    assert rgba[14, 14].tolist() == [*image[14, 14], 255]
    assert rgba[0, 0].tolist() == [0, 0, 0, 0]
    assert 0 < rgba[4, 10, 3] < 255


class TestContactSheet:
    @pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 1000])
    def test_frames_are_spread_over_the_video(self, count):
        chosen = ContactSheet.choose(count)
        assert len(chosen) == min(12, count)
        assert chosen[0] == 0 and chosen[-1] == count - 1

    def test_it_shows_every_picture(self, tmp_path):
        sheet = ContactSheet(tmp_path / "s.png")
        for i in range(5):
            sheet.add(picture({1: (4, 4 + i, 20, 20)}), str(i))
        sheet.save()
        image = Image.open(tmp_path / "s.png")
        assert image.width > 4 * 320
        reds = (np.array(image) == (220, 40, 40)).all(-1)
        assert reds[: image.height // 2].any() and reds[image.height // 2 :].any()
