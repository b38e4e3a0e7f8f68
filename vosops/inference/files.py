"""Files that are complete or absent: written under a temporary name, then moved into place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vosops.io.errors import disk_errors

PART_SUFFIX = ".part"
_HASH_CHUNK = 1 << 20


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it to ``path`` on success, delete it on any error.

    The temporary file is ``.<name>.part`` in the same folder, so that the move is atomic and a run that
    was killed leaves nothing that the next one does not overwrite. A full disk becomes a ``VosopsError``.
    """
    part = path.with_name(f".{path.name}{PART_SUFFIX}")
    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with complete_or_absent(path) as part:
        part.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def quick_hash(path: Path) -> str:
    """Return a fingerprint of a possibly huge file: its size, its first and its last MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_HASH_CHUNK))
        file.seek(max(0, size - _HASH_CHUNK))
        digest.update(file.read(_HASH_CHUNK))
    return digest.hexdigest()
