"""Inputs that can be read once: pipes and URLs, which are copied to a temporary file first, and iterators of frames."""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import InputError, VosopsError, disk_errors
from .frames import DEFAULT_FPS, FrameSource, RawFrame, frame_number
from .listing import shown
from .pictures import frame_of_array, reason

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_STANDARD_INPUT = "-"
_TIMEOUT = 60  # seconds without an answer
_CHUNK = 1 << 20


class FrameStream(FrameSource):
    """Frames that come one by one from an iterator, as (H, W, 3) uint8 or uint16 arrays or tensors.

    Frames before the first one read forward are kept in memory, for backward reading: with a mask on the first frame
    that is one frame.

    Args:
        frames: The iterator, or anything that can be iterated over; read once.
        wanted: Which frames may be asked for.
        fps: Frames a second.
    """

    def __init__(self, frames: Iterable[Any], wanted: range, fps: Fraction = DEFAULT_FPS) -> None:
        self.title = "the frames"
        self.average_rate = fps
        self._wanted = wanted
        self._frames = iter(frames)
        self._first: Any = next(self._frames, None)
        if self._first is None:
            raise InputError("the iterator of frames is empty")
        self._first = frame_of_array(self._first, "frames")
        self.size = self._first.shape[:2]
        self._kept: dict[int, Any] = {}
        self._next = 0

    def forward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ``indices``, which lie behind those that were yielded before."""
        for target in indices:
            image = None
            while self._next <= target:
                image = self._pull()
                if image is None:
                    return
                if self._next - 1 <= indices[0] and self._next - 1 in self._wanted:
                    self._kept[self._next - 1] = image
            image = self._kept[target] if image is None else image
            yield self._raw(target, image.copy() if target in self._kept else image)

    def backward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ``indices``, and forget them."""
        for index in indices:
            yield self._raw(index, self._kept.pop(index))

    def find(self, key: str) -> int | None:
        """Return the number that ``key`` is."""
        return frame_number(key)

    def fingerprint(self) -> str:
        """Refuse: there is nothing on disk to compare with later."""
        raise VosopsError("frames in memory cannot be resumed")

    def _pull(self) -> Any:
        """Return the next frame; None at the end, or with ``problem`` set at one of another size."""
        value, self._first = self._first, None
        if value is None:
            value = next(self._frames, None)
            if value is None:
                return None
            value = frame_of_array(value, f"frame {self._next}")
        if value.shape[:2] != self.size:
            sizes = [f"{width}x{height}" for height, width in (value.shape[:2], self.size)]
            self.problem = f"frame {self._next} is {sizes[0]}, but the first is {sizes[1]}"
            return None
        self._next += 1
        return value

    def _raw(self, index: int, image: Any) -> RawFrame:
        return RawFrame(index, f"{index:07d}", image, index / self.average_rate)


class Spooled:
    """A temporary copy of what can be read once; the file lives as long as this object.

    Raises InputError if nothing comes, VosopsError if the disk is full.
    """

    def __init__(self, content: Any, title: str, suffix: str = "") -> None:
        with disk_errors(f"a copy of {shown(title)} in {tempfile.gettempdir()} (set TMPDIR)"):
            self._file = tempfile.NamedTemporaryFile(prefix="vosops-", suffix=suffix)  # noqa: SIM115
        self.path = Path(self._file.name)
        while True:
            try:
                chunk = content.read(_CHUNK)
            except Exception as error:  # whatever protocols raise
                raise InputError(f"{shown(title)} cannot be read to its end ({reason(error)})") from error
            if not chunk:
                break
            with disk_errors(f"a copy of {shown(title)} in {tempfile.gettempdir()} (set TMPDIR)"):
                self._file.write(chunk)
        with disk_errors(f"a copy of {shown(title)} in {tempfile.gettempdir()} (set TMPDIR)"):
            self._file.flush()
        if not self._file.tell():
            raise InputError(f"{shown(title)} is empty: no data was received")


def is_url(text: str) -> bool:
    """Say whether a text is a URL rather than the name of a file."""
    return _URL.match(text) is not None


def local_path(name: str | os.PathLike[str]) -> Path:
    """Return the path that a name stands for: that of a ``file:`` URL, else the name itself."""
    text = os.fspath(name)
    if not text.lower().startswith("file://"):
        return Path(text)
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    return Path(url2pathname(urlsplit(text).path))


def local_copy(name: str) -> Spooled | Path | None:
    """Return a copy of what a URL, a pipe or "-" (standard input) gives, or the path of a ``file:`` URL.

    None for any other name.

    Raises:
        InputError: The URL cannot be read.
    """
    if name == _STANDARD_INPUT:
        return Spooled(sys.stdin.buffer, "standard input")
    if not is_url(name):
        path = Path(name)
        try:
            pipe = stat.S_ISFIFO(path.stat().st_mode)
        except (OSError, ValueError):
            return None
        if not pipe:
            return None
        with path.open("rb") as file:
            return Spooled(file, name)
    from urllib.parse import unquote, urlsplit
    from urllib.request import urlopen

    scheme = name.partition(":")[0].lower()
    try:
        parts = urlsplit(name)
        if scheme == "file":
            return local_path(name)
        if scheme not in ("http", "https"):
            raise InputError(
                f"{shown(name)}: {scheme} cannot be read: give http, https or a file (ffmpeg -i URL -c copy clip.mkv)"
            )
        suffix = PurePosixPath(unquote(parts.path)).suffix
        with urlopen(name, timeout=_TIMEOUT) as answer:
            return Spooled(answer, name, suffix if re.fullmatch(r"\.\w{1,8}", suffix) else "")
    except VosopsError:
        raise
    except Exception as error:  # urllib raises nearly everything too
        raise InputError(f"{shown(name)} cannot be read ({reason(error)})") from error
