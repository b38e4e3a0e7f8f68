"""Fingerprints of input files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError
from .outputs import sha256

__all__ = ["quick_hash", "sample", "sha256"]

_HASH_CHUNK = 1 << 20
_SAMPLE = 4096


def quick_hash(path: Path) -> str:
    """Return a fingerprint of a possibly huge file: its size, its first and its last MiB."""
    size = path.stat().st_size
    return hashlib.sha256(str(size).encode() + _parts(path, (0, size - _HASH_CHUNK), _HASH_CHUNK)).hexdigest()


def sample(path: Path, size: int) -> bytes:
    """Return 4 KiB from the start, the middle and the end of a file of ``size`` bytes.

    A compressed picture that changed differs in most of its bytes behind the change, so that its end tells.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        return _parts(path, (0, (size - _SAMPLE) // 2, size - _SAMPLE), _SAMPLE)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): replace or remove it") from error


def _parts(path: Path, starts: Iterable[int], length: int) -> bytes:
    """Return some parts of a file after each other; a start before the file is its beginning."""
    parts = []
    with path.open("rb") as file:
        for start in starts:
            file.seek(max(0, start))
            parts.append(file.read(length))
    return b"".join(parts)
