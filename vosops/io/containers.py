"""What the headers of video containers say about the length of the file."""

from __future__ import annotations

import math
import struct
from itertools import chain
from pathlib import Path
from typing import Any

_RIFF_HEADER = 8
_EBML_MAGIC = b"\x1a\x45\xdf\xa3"
_EBML_SEGMENT = b"\x18\x53\x80\x67"
_ISO_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"pnot"})
_FLV_MAGIC = b"FLV"
_FLV_SIZE = b"\x00\x08filesize\x00"  # a key of the metadata, followed by a big-endian double
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the properties of the file
_METADATA_BYTES = 1 << 16  # FLV and ASF state the length within their first bytes


def is_cut_off(path: Path) -> bool:
    """Say whether a container (MP4/MOV, Matroska/WebM, AVI, FLV, ASF/WMV) states more bytes than the file has.

    MPEG program and transport streams state no length: one that is cut between two packets looks complete.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            return int.from_bytes(head[4:8], "little") + _RIFF_HEADER > size
        file.seek(0)
        if head[:4] == _EBML_MAGIC:
            return _ebml_cut_off(file, size)
        if head[4:8] in _ISO_BOXES:
            return _iso_cut_off(file, size)
        if head[:3] == _FLV_MAGIC:
            return _flv_bytes(file) > size
        if head == _ASF_HEADER[: len(head)]:
            return _asf_bytes(file) > size
    return False


def _iso_cut_off(file: Any, size: int) -> bool:
    position = 0
    while position < size:
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return True
        length = int.from_bytes(header[:4], "big")
        if length == 0:  # the last box, up to the end of the file
            return False
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:
            return False  # not a box: padding after the last one
        position += length
    return position > size


def _ebml_cut_off(file: Any, size: int) -> bool:
    header = _ebml_element(file)
    if header is None or header[1] is None:
        return False
    file.seek(header[1], 1)
    segment = _ebml_element(file)
    if segment is None or segment[0] != _EBML_SEGMENT or segment[1] is None:
        return False
    return bool(file.tell() + segment[1] > size)


def _ebml_element(file: Any) -> tuple[bytes, int | None] | None:
    """Return (id, length or None when unknown) of the element at the file's position, and step past both."""
    identifier = _ebml_number(file)
    length = _ebml_number(file)
    if identifier is None or length is None:
        return None
    bits = 7 * len(length)
    value = int.from_bytes(length, "big") & ((1 << bits) - 1)
    return identifier, None if value == (1 << bits) - 1 else value


def _ebml_number(file: Any) -> bytes | None:
    first = file.read(1)
    if not first or not first[0]:
        return None
    rest = file.read(8 - first[0].bit_length())
    return bytes(chain(first, rest))


def _flv_bytes(file: Any) -> float:
    """Return the file's length by the metadata of an FLV; 0 if it is not stated."""
    metadata = file.read(_METADATA_BYTES)
    found = metadata.find(_FLV_SIZE)
    value = metadata[found + len(_FLV_SIZE) :][:8]
    if found < 0 or len(value) < 8:
        return 0
    length: float = struct.unpack(">d", value)[0]
    return length if math.isfinite(length) else 0


def _asf_bytes(file: Any) -> int:
    """Return the file's length by the header of an ASF; 0 if it is not stated (a broadcast)."""
    header = file.read(_METADATA_BYTES)
    found = header.find(_ASF_FILE)
    if found < 0:
        return 0
    properties = header[found:][16 + 8 + 16 :]  # its own identifier and length, then the file's identifier
    return int.from_bytes(properties[:8], "little")
