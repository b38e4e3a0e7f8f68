"""Names of files as other programs take them."""

from __future__ import annotations

import os


def file_url(path: str | os.PathLike[str]) -> str:
    """Return what FFmpeg takes for this file, whatever its name.

    In a bare name a colon ends a protocol, and "-" and "pipe" have meanings of their own.
    """
    return f"file:{os.path.abspath(path)}"


def absence(path: str | os.PathLike[str]) -> str | None:
    """Return why there is nothing at a path that could be opened ("does not exist"); None if there is."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name with a zero byte
        return "does not exist"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    return None
