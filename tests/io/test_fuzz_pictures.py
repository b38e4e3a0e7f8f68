"""Whatever is in a picture file, reading it gives labels or a frame, or an InputError of one line."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.fuzz import damaged, examples
from tests.io.pngs import GREY, RGB_ALPHA, chunk, png
from vosops.io.errors import InputError
from vosops.io.labels import labels_of_array, read_labels
from vosops.io.pictures import read_frame

LABELS = np.zeros((24, 32), np.uint8)
LABELS[4:12, 5:20] = 1
LABELS[14:20, 8:30] = 2
FEW = 40


def encoded(kind, image, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _files():
    labels = Image.fromarray(LABELS)
    palette = labels.copy()
    palette.putpalette(bytes(range(9)))
    colours = Image.fromarray(np.dstack([LABELS * 100] * 3))
    wide = Image.fromarray(LABELS * np.uint16(300))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "palette.png": encoded("PNG", palette, transparency=b"\0", exif=exif),
        "wide.png": encoded("PNG", wide),
        "alpha.png": encoded("PNG", colours.convert("RGBA")),
        "grey.tif": encoded("TIFF", labels, compression="tiff_lzw"),
        "wide.tif": encoded("TIFF", wide),
        "float.tif": encoded("TIFF", Image.fromarray(LABELS.astype(np.float32))),
        "stack.tif": encoded("TIFF", labels, save_all=True, append_images=[palette.convert("L")]),
        "f.gif": encoded("GIF", palette, save_all=True, append_images=[labels]),
        "f.webp": encoded("WEBP", colours, lossless=True),
        "f.avif": encoded("AVIF", colours),
        "f.jp2": encoded("JPEG2000", colours),
        "f.jpg": encoded("JPEG", colours, exif=exif),
        "f.bmp": encoded("BMP", palette),
        "f.pgm": encoded("PPM", labels),
    }


FILES = _files()


def survives(path):
    """Reads a file both ways; returns how many succeeded."""
    done = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (read_labels, read_frame):
            try:
                read(path)
                done += 1
            except InputError as error:
                assert "\n" not in str(error) and path.name in str(error)
    return done


@pytest.mark.parametrize("name", FILES)
def test_whole_files(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert survives(tmp_path / name) >= (name not in ("float.tif", "stack.tif", "f.gif"))


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    for number in range(examples(FEW)):
        path.write_bytes(damaged(FILES[name], number))
        try:
            survives(path)
        except BaseException:
            print(f"damaged(FILES[{name!r}], {number})")
            raise


@pytest.mark.parametrize("length", [0, 1, 7, 100, 5000])
def test_random_bytes(tmp_path, length):
    for seed in range(examples(FEW) // 8 + 1):
        (tmp_path / "r.png").write_bytes(np.random.default_rng(seed).bytes(length))
        assert not survives(tmp_path / "r.png")


class TestLyingHeaders:
    @pytest.mark.parametrize(
        "size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (0, 5), (1, 2**30), (9000, 9000)]
    )
    @pytest.mark.parametrize("colour", [GREY, RGB_ALPHA])
    def test_png(self, tmp_path, size, colour):
        (tmp_path / "m.png").write_bytes(png(size, 8, colour, [b"\0" * 8]))
        assert not survives(tmp_path / "m.png")

    @pytest.mark.parametrize(("bits", "colour"), [(3, 0), (16, 3), (4, 2), (255, 255)])
    def test_png_of_no_kind(self, tmp_path, bits, colour):
        (tmp_path / "m.png").write_bytes(png((2, 2), bits, colour, [b"\0\0"] * 2))
        assert not survives(tmp_path / "m.png")

    def test_gif(self, tmp_path):
        content = bytearray(FILES["f.gif"])
        content[6:10] = struct.pack("<HH", 65535, 65535)
        (tmp_path / "m.gif").write_bytes(content)
        assert not survives(tmp_path / "m.gif")

    @pytest.mark.parametrize("tag", [256, 257, 258, 259, 262, 273, 277, 278, 279])
    @pytest.mark.parametrize("value", [0, 3, 65_000, 2**31, 2**32 - 1])
    def test_tiff(self, tmp_path, tag, value):
        content = bytearray(FILES["wide.tif"])
        offset = struct.unpack("<I", content[4:8])[0]
        for entry in range(struct.unpack("<H", content[offset : offset + 2])[0]):
            place = offset + 2 + 12 * entry
            if struct.unpack("<H", content[place : place + 2])[0] == tag:
                content[place + 2 : place + 12] = struct.pack("<HII", 4, 1, value)
        (tmp_path / "m.tif").write_bytes(content)
        survives(tmp_path / "m.tif")

    def test_a_bomb_within_chunks(self, tmp_path):
        text = chunk(b"zTXt", b"a\0\0" + __import__("zlib").compress(b"\0" * (80 << 20)))
        (tmp_path / "m.png").write_bytes(png((2, 2), 8, GREY, [b"\0\0"] * 2, text))
        survives(tmp_path / "m.png")


def test_arrays_of_any_dtype_and_shape():
    for dtype in "?bBhHiIlLqQefdFDSUOmM":
        for shape in ((), (0,), (3,), (2, 3), (0, 3), (2, 3, 1)):
            try:
                labels = labels_of_array(np.zeros(shape, dtype))
                assert labels.dtype == np.uint8 and labels.shape == shape
            except InputError as error:
                assert "\n" not in str(error)
