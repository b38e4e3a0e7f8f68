"""One file of many pictures as a video: TIFF stacks, and animated GIF, WebP, AVIF and PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .files import quick_hash
from .frames import DEFAULT_FPS, FrameSource, RawFrame, frame_number, in_chunks
from .pictures import frame_of_picture, opened, page_numbers

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from PIL.Image import Image as Picture

_MILLISECONDS = 1000


class PictureStack(FrameSource):
    """The pictures of one file, in its order, at an animation's own times or, of a stack, at a rate.

    A picture that cannot be read or is of another size ends the input and sets ``problem``. Each frame is decoded
    from those before it, as the formats need it; backward reading holds one chunk of frames.

    Raises InputError if the first picture cannot be read.
    """

    def __init__(self, path: Path, fps: Fraction = DEFAULT_FPS, title: str | None = None) -> None:
        self.path = path
        self.title = title or str(path)
        self.average_rate = fps
        with self._opened() as picture:
            self._pages = page_numbers(picture)
            height, width, _ = frame_of_picture(picture, self.title).shape
            duration = picture.info.get("duration")
            self._animated = bool(duration)
            if duration:
                self.average_rate = _MILLISECONDS / Fraction(duration)
        self.size = (height, width)
        self.count = len(self._pages)
        self.count_is_exact = True

    def forward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ``indices``."""
        self.problem = None
        if not indices or indices[0] >= len(self._pages):
            return
        try:
            yield from self._read(indices)
        except InputError as error:
            self.problem = str(error)

    def backward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of descending ``indices``, a chunk at a time."""
        yield from in_chunks(indices, self.size, lambda chunk: list(self.forward(chunk)))

    def find(self, key: str) -> int | None:
        """Return the number that ``key`` is."""
        return frame_number(key)

    def fingerprint(self) -> str:
        """Return a hash of the file's size, first and last MiB."""
        return quick_hash(self.path)

    def _read(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        time = Fraction(0)
        wanted = iter(indices)
        target = next(wanted)
        with self._opened() as picture:
            for index, page in enumerate(self._pages):
                if index < target and not self._animated:
                    continue
                picture.seek(page)
                picture.load()  # tells the duration
                if index == target:
                    image = frame_of_picture(picture, f"frame {index} of {self.title}")
                    if image.shape[:2] != self.size:
                        sizes = [f"{width}x{height}" for height, width in (self.size, image.shape[:2])]
                        raise InputError(
                            f"{self.title} changes size at frame {index}, from {sizes[0]} to {sizes[1]}"
                        )
                    yield RawFrame(
                        index, f"{index:07d}", image, time if self._animated else index / self.average_rate
                    )
                    following = next(wanted, None)
                    if following is None or following >= len(self._pages):
                        return
                    target = following
                duration = picture.info.get("duration")
                time += Fraction(duration) / _MILLISECONDS if duration else 1 / self.average_rate

    def _opened(self) -> AbstractContextManager[Picture]:
        return opened(self.path, self.title, "replace it, or give the frames before as files of their own")
