"""Label maps: the ids as stored, and what has no one meaning refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.io.pngs import GREY, PALETTE, chunk, packed, png
from vosops.io.errors import InputError
from vosops.io.labels import davis_palette, labels_of_array, read_labels

SIZE = (6, 8)
INSIDE = np.zeros(SIZE, bool)
INSIDE[2:5, 1:4] = True
IDS = np.zeros(SIZE, np.uint8)
IDS[1, 1:4] = 1
IDS[2:4, 2:6] = 2
IDS[5] = 3
WHITE = INSIDE * np.uint8(255)


def read(tmp_path, content, name="m.png"):
    path = tmp_path / name
    if isinstance(content, Image.Image):
        content.save(path)
    else:
        path.write_bytes(content)
    return read_labels(path)[0]


def refused(tmp_path, content, match, name="m.png"):
    with pytest.raises(InputError, match=match) as caught:
        read(tmp_path, content, name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def with_alpha(colour, alpha):
    """LA or RGBA of an image and an (H, W) alpha."""
    return Image.fromarray(np.dstack([colour, alpha]).astype(np.uint8))


def coloured(labels):
    return np.frombuffer(davis_palette(), np.uint8).reshape(256, 3)[labels]


class TestSamplesAsStored:
    @pytest.mark.parametrize("colour", [GREY, PALETTE])
    @pytest.mark.parametrize("bits", [2, 4])
    def test_png_of_few_bits(self, tmp_path, colour, bits):
        palette = [chunk(b"PLTE", bytes(range(3 << bits)))] if colour == PALETTE else []
        rows = [packed(row, bits) for row in IDS.tolist()]
        np.testing.assert_array_equal(read(tmp_path, png(SIZE, bits, colour, rows, *palette)), IDS)

    def test_one_bit_is_one_object(self, tmp_path):
        np.testing.assert_array_equal(read(tmp_path, Image.fromarray(INSIDE)), WHITE)

    @pytest.mark.parametrize(
        ("dtype", "name"), [(np.uint16, "m.png"), (np.uint16, "m.tif"), (np.int32, "m.tif")]
    )
    def test_wide_integers(self, tmp_path, dtype, name):
        np.testing.assert_array_equal(read(tmp_path, Image.fromarray(IDS.astype(dtype)), name), IDS)
        refused(tmp_path, Image.fromarray(IDS.astype(dtype) * 100), "ids above 255", name)

    def test_white_of_16_bits_is_one_object(self, tmp_path):
        np.testing.assert_array_equal(read(tmp_path, Image.fromarray(INSIDE * np.uint16(65535))), WHITE)

    @pytest.mark.parametrize("magic", ["P5", "P2"])
    @pytest.mark.parametrize("greatest", [3, 15, 200, 1000, 65535])
    def test_grey_maps_of_any_greatest_value(self, tmp_path, magic, greatest):
        wide = IDS.astype(">u2" if greatest > 255 else np.uint8)
        pixels = wide.tobytes() if magic == "P5" else " ".join(map(str, IDS.ravel().tolist())).encode()
        content = f"{magic} {SIZE[1]} {SIZE[0]} {greatest}\n".encode() + pixels
        np.testing.assert_array_equal(read(tmp_path, content, "m.pgm"), IDS)

    def test_exif_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # turn 90 degrees clockwise to view
        image = Image.fromarray(IDS)
        image.putpalette(davis_palette())
        image.save(tmp_path / "m.png", exif=exif)
        labels, palette = read_labels(tmp_path / "m.png")
        np.testing.assert_array_equal(labels, np.rot90(IDS, -1))
        assert palette == davis_palette()

    def test_negative_and_floating_samples_are_refused(self, tmp_path):
        refused(tmp_path, Image.fromarray(IDS.astype(np.int32) - 1), "below 0", "m.tif")
        refused(tmp_path, Image.fromarray(IDS.astype(np.float32)), "floating-point", "m.tif")

    def test_colours_of_more_than_8_bits_are_refused(self, tmp_path):
        rows = [np.repeat(row.astype(">u2"), 3).tobytes() for row in IDS]
        refused(tmp_path, png(SIZE, 16, 2, rows), "8 bits")

    def test_white_stored_as_0_is_refused(self, tmp_path):
        Image.fromarray(IDS).save(tmp_path / "m.tif", tiffinfo={262: 0})
        with pytest.raises(InputError, match="white as 0"):
            read_labels(tmp_path / "m.tif")


class TestTransparency:
    def test_the_alpha_of_a_plain_image_is_the_mask(self, tmp_path):
        for value in (0, 255):
            plain = np.full(SIZE, value, np.uint8)
            np.testing.assert_array_equal(read(tmp_path, with_alpha(plain, WHITE)), WHITE)
            np.testing.assert_array_equal(read(tmp_path, with_alpha(np.dstack([plain] * 3), WHITE)), WHITE)

    def test_one_colour_on_nothing_is_one_object(self, tmp_path):
        red = np.zeros((*SIZE, 3), np.uint8)
        red[INSIDE] = (255, 0, 0)
        np.testing.assert_array_equal(read(tmp_path, with_alpha(red, WHITE)), WHITE)
        red[~INSIDE] = 255
        np.testing.assert_array_equal(read(tmp_path, with_alpha(red, WHITE)), WHITE)

    def test_ids_that_agree_with_alpha(self, tmp_path):
        alpha = (IDS > 0) * np.uint8(255)
        np.testing.assert_array_equal(read(tmp_path, with_alpha(IDS, alpha)), IDS)
        np.testing.assert_array_equal(read(tmp_path, with_alpha(coloured(IDS), alpha)), IDS)
        np.testing.assert_array_equal(read(tmp_path, with_alpha(IDS, np.full(SIZE, 255))), IDS)
        np.testing.assert_array_equal(read(tmp_path, with_alpha(IDS, np.full(SIZE, 90))), IDS)

    def test_ids_that_disagree_with_alpha_are_refused(self, tmp_path):
        refused(tmp_path, with_alpha(IDS, WHITE), "disagree")
        refused(tmp_path, with_alpha(coloured(IDS), WHITE), "disagree")
        refused(tmp_path, with_alpha(np.where(INSIDE, 0, 255), WHITE), "disagree")

    def test_soft_and_empty_alpha_are_refused(self, tmp_path):
        soft = WHITE.copy()
        soft[2, 1] = 128
        refused(tmp_path, with_alpha(np.full(SIZE, 255), soft), "threshold")
        refused(tmp_path, with_alpha(IDS, np.zeros(SIZE)), "fully transparent")

    def palette_png(self, transparency):
        rows = [bytes(row) for row in IDS.tolist()]
        return png(SIZE, 8, PALETTE, rows, chunk(b"PLTE", davis_palette()), chunk(b"tRNS", transparency))

    def test_a_palette_whose_background_is_transparent(self, tmp_path):
        np.testing.assert_array_equal(read(tmp_path, self.palette_png(b"\0")), IDS)
        np.testing.assert_array_equal(read(tmp_path, self.palette_png(b"\xff" * 4)), IDS)
        np.testing.assert_array_equal(read(tmp_path, self.palette_png(b"\xff" * 9 + b"\0")), IDS)

    def test_a_palette_with_a_transparent_object_is_refused(self, tmp_path):
        refused(tmp_path, self.palette_png(b"\xff\0"), "disagree")
        refused(tmp_path, self.palette_png(b"\xff\x80\xff"), "threshold")

    def test_a_transparent_grey_value(self, tmp_path):
        rows = [bytes(row) for row in IDS.tolist()]
        refused(tmp_path, png(SIZE, 8, GREY, rows, chunk(b"tRNS", b"\0\2")), "disagree")
        got = read(tmp_path, png(SIZE, 8, GREY, rows, chunk(b"tRNS", b"\0\0")))
        np.testing.assert_array_equal(got, IDS)


class TestFormats:
    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
    def test_formats_that_blur_ids_are_refused(self, tmp_path, kind):
        buffer = io.BytesIO()
        Image.fromarray(WHITE).convert("RGB").save(buffer, kind)
        refused(tmp_path, buffer.getvalue(), "compression blurs", "m.png")

    def test_gif_is_refused(self, tmp_path):
        content = io.BytesIO()
        Image.fromarray(IDS * 5).save(content, "GIF")  # which stores the ids 5, 10, 15 as 1, 2, 3
        refused(tmp_path, content.getvalue(), "is a GIF, whose writers renumber the ids")

    def test_lossless_webp(self, tmp_path):
        Image.fromarray(WHITE).convert("RGB").save(tmp_path / "m.webp", lossless=True)
        np.testing.assert_array_equal(read_labels(tmp_path / "m.webp")[0], WHITE)

    def test_several_pictures_in_a_file_are_refused(self, tmp_path):
        images = [Image.fromarray(IDS), Image.fromarray(WHITE)]
        images[0].save(tmp_path / "m.tif", save_all=True, append_images=images[1:])
        with pytest.raises(InputError, match="holds 2 pictures"):
            read_labels(tmp_path / "m.tif")

    def test_a_damaged_or_absent_file(self, tmp_path):
        refused(tmp_path, b"", "cannot be read")
        with pytest.raises(InputError, match="No such file"):
            read_labels(tmp_path / "absent.png")

    def test_beyond_pillows_limit(self, tmp_path, monkeypatch, recwarn):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
        np.testing.assert_array_equal(read(tmp_path, Image.fromarray(IDS)), IDS)
        assert not recwarn.list, "up to twice the limit is no reason to warn"
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        refused(tmp_path, Image.fromarray(IDS), "exceeds limit")


class TestArrays:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.int64, np.uint64, ">u2"])
    def test_integers(self, dtype):
        np.testing.assert_array_equal(labels_of_array(IDS.astype(dtype)), IDS)

    def test_bool(self):
        np.testing.assert_array_equal(labels_of_array(INSIDE), INSIDE)
        np.testing.assert_array_equal(labels_of_array(torch.from_numpy(INSIDE)), INSIDE)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int64])
    def test_tensors(self, dtype):
        np.testing.assert_array_equal(labels_of_array(torch.from_numpy(IDS).to(dtype)), IDS)

    @pytest.mark.parametrize(
        "value", [IDS.astype(float), torch.zeros(SIZE), torch.zeros(SIZE, dtype=torch.bfloat16)]
    )
    def test_floating_values_are_refused(self, value):
        with pytest.raises(InputError, match="array|integer ids"):
            labels_of_array(value)

    def test_ids_out_of_range_are_refused(self):
        with pytest.raises(InputError, match="values from 0 to 300"):
            labels_of_array(IDS.astype(int) * 100)
        with pytest.raises(InputError, match="values from -1 to 2"):
            labels_of_array(IDS.astype(np.int16) - 1)

    def test_masked_arrays_are_refused(self):
        with pytest.raises(InputError, match="masked"):
            labels_of_array(np.ma.masked_equal(IDS, 2))
