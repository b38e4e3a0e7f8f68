"""Frames from pictures and arrays: one scale for each depth, upright, one error for what cannot be read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.io.pngs import GREY, packed, png
from vosops.io.errors import InputError
from vosops.io.notes import InputWarning
from vosops.io.pictures import frame_of_array, read_frame

SIZE = (6, 8)
BRIGHT = np.arange(48, dtype=np.uint8).reshape(SIZE) * 5
GREY_FRAME = np.repeat(BRIGHT[..., None], 3, axis=2)


def read(tmp_path, image, name="f.png", **options):
    image.save(tmp_path / name, **options)
    return read_frame(tmp_path / name)


@pytest.mark.parametrize("name", ["f.png", "f.tif"])
def test_16_bits_are_scaled_as_those_of_a_video(tmp_path, name):
    av = pytest.importorskip("av")
    wide = np.random.default_rng(0).integers(0, 65536, SIZE, dtype=np.uint16)
    got = read(tmp_path, Image.fromarray(wide), name)
    video = av.VideoFrame.from_ndarray(wide, format="gray16le").to_ndarray(format="rgb24")
    assert np.abs(got.astype(int) - video).max() <= 1, "which dithers"
    np.testing.assert_array_equal(read(tmp_path, Image.fromarray(BRIGHT * np.uint16(257)), name), GREY_FRAME)


def test_fewer_bits_in_16_are_warned_about(tmp_path):
    with pytest.warns(InputWarning, match="nearly black"):
        read(tmp_path, Image.fromarray(BRIGHT.astype(np.uint16)))
    with pytest.warns(InputWarning, match="nearly black"):
        frame_of_array(GREY_FRAME * np.uint16(16), "frame")


def test_16_bit_grey_maps(tmp_path):
    wide = (BRIGHT * np.uint16(257)).astype(">u2")
    (tmp_path / "f.pgm").write_bytes(b"P5 8 6 65535\n" + wide.tobytes())
    np.testing.assert_array_equal(read_frame(tmp_path / "f.pgm"), GREY_FRAME)


def test_few_bits_are_brightness(tmp_path):
    rows = [packed([0, 1, 2, 3], 2)]
    (tmp_path / "f.png").write_bytes(png((1, 4), 2, GREY, rows))
    assert read_frame(tmp_path / "f.png")[0, :, 0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_samples_without_one_meaning_are_refused(tmp_path, dtype):
    with pytest.raises(InputError, match=r"f.tif has .* samples, whose range is ambiguous"):
        read(tmp_path, Image.fromarray(BRIGHT.astype(dtype)), "f.tif")


@pytest.mark.parametrize("mode", ["LA", "RGBA", "CMYK", "YCbCr", "P"])
def test_colours_are_as_stored(tmp_path, mode, recwarn):
    colours = np.dstack([BRIGHT, BRIGHT[::-1], BRIGHT[:, ::-1]])
    plain = Image.fromarray(BRIGHT if mode in ("LA", "P") else colours)
    image = plain.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(BRIGHT))
    expected = np.array(plain.convert("RGB"))
    options = {"transparency": b"\0\x80"} if mode == "P" else {}
    got = read(tmp_path, image, "f.tif" if mode in ("CMYK", "YCbCr") else "f.png", **options)
    assert np.abs(got.astype(int) - expected).max() <= 3
    assert not recwarn.list


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    got = read(tmp_path, Image.fromarray(BRIGHT * np.uint16(257)), exif=exif)
    np.testing.assert_array_equal(got, np.rot90(GREY_FRAME, -1))


def test_truncated_and_empty_files(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50), dtype=np.uint8)).save(buffer, "PNG")
    for content in (b"", buffer.getvalue()[:60], buffer.getvalue()[:1000]):
        (tmp_path / "f.png").write_bytes(content)
        with pytest.raises(InputError, match="f.png cannot be read as an image"):
            read_frame(tmp_path / "f.png")


def test_beyond_pillows_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(InputError, match="exceeds limit"):
        read(tmp_path, Image.fromarray(BRIGHT))


class TestArrays:
    def test_a_frame_is_a_copy(self):
        given = GREY_FRAME.copy()
        given.setflags(write=False)
        frame_of_array(given, "frame")[:] = 0
        tensor = torch.from_numpy(GREY_FRAME.copy())
        frame_of_array(tensor, "frame")[:] = 0
        np.testing.assert_array_equal(given, GREY_FRAME)
        np.testing.assert_array_equal(tensor.numpy(), GREY_FRAME)

    def test_uint8_and_uint16(self):
        np.testing.assert_array_equal(frame_of_array(GREY_FRAME, "frame"), GREY_FRAME)
        np.testing.assert_array_equal(frame_of_array(GREY_FRAME * np.uint16(257), "frame"), GREY_FRAME)
        wide = torch.from_numpy(GREY_FRAME * np.uint16(257))
        np.testing.assert_array_equal(frame_of_array(wide, "frame"), GREY_FRAME)

    @pytest.mark.parametrize(
        ("value", "advice"),
        [
            (GREY_FRAME / 255, "by 255"),
            (torch.zeros(6, 8, 3), "by 255"),
            (GREY_FRAME.astype(int), "int64"),
            (GREY_FRAME > 3, "bool"),
            (BRIGHT, "repeat the grey"),
            (GREY_FRAME.transpose(2, 0, 1), "channels last"),
            (np.zeros((6, 8, 4), np.uint8), "alpha"),
            (np.zeros((0, 8, 3), np.uint8), "no pixel"),
            ("text", "uint8 RGB"),
        ],
    )
    def test_others_are_refused_with_what_to_do(self, value, advice):
        with pytest.raises(InputError, match=advice):
            frame_of_array(value, "frames")
