"""Names of files as other programs take them."""

from __future__ import annotations

import os


def file_url(path: str | os.PathLike[str]) -> str:
    """Return what FFmpeg takes for this file, whatever its name.

    In a bare name a colon ends a protocol, and "-" and "pipe" have meanings of their own.
    """
    return f"file:{os.path.abspath(path)}"
