"""Picture files made by hand, of the kinds that Pillow does not write."""

from __future__ import annotations

import struct
import zlib

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, bits, colour, rows, *extra):
    """A PNG of (H, W) whose rows are packed already; extra: chunks before the pixels."""
    height, width = size
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def packed(row, bits):
    """Samples of fewer than 8 bits in bytes, the first in the highest bits."""
    per_byte = 8 // bits
    row = [*row, *[0] * (-len(row) % per_byte)]
    return bytes(
        sum(value << (8 - bits * (place + 1)) for place, value in enumerate(row[start : start + per_byte]))
        for start in range(0, len(row), per_byte)
    )
