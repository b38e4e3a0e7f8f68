"""Where frames come from: the interface of a source, folders of images, arrays, and reading ahead."""

from __future__ import annotations

import hashlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InputError, VosopsError
from .files import sample
from .listing import IMAGE_SUFFIXES, pictures, shown
from .notes import warn
from .order import doubt_about_order
from .pictures import frame_of_array, read_frame

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Image = npt.NDArray[np.uint8]

DEFAULT_FPS = Fraction(24)
ALL_FRAMES = range(sys.maxsize)
_LONGEST_NUMBER = 18  # digits
_BACKWARD_BYTES = 128 << 20  # decoded frames held at once while reading backward
_MIN_CHUNK = 8
_READ_AHEAD = 2
_QUEUE_POLL_SECONDS = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class RawFrame:
    """One frame of the input: its number in the input, its name, (H, W, 3) uint8 RGB, its time in seconds."""

    index: int
    name: str
    image: Image
    time: Fraction


class FrameSource(ABC):
    """Frames of one video, in input order, numbered from 0. Memory does not grow with the length.

    Attributes:
        title: What to call the input in messages.
        size: (H, W) of every frame, after rotation.
        count: Number of frames, an estimate if ``count_is_exact`` is false, None if unknown.
        average_rate: Frames a second.
        problem: Set when the input ended early; one line. The frames before it were delivered.
        keep_alive: What must live as long as the source, such as a temporary file.
    """

    title: str
    size: tuple[int, int]
    average_rate: Fraction
    count: int | None = None
    count_is_exact: bool = False
    problem: str | None = None
    keep_alive: object = None

    @abstractmethod
    def forward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ascending ``indices`` as far as the input goes."""

    @abstractmethod
    def backward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of descending ``indices``, all of which exist."""

    @abstractmethod
    def find(self, key: str) -> int | None:
        """Return the frame number of a frame's name; None if there is none of that name."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short string that changes when the input changes."""


def frame_number(key: str) -> int | None:
    """Return the frame number that a text is; None if it is none."""
    return int(key) if key.isascii() and key.isdecimal() and len(key) <= _LONGEST_NUMBER else None


class ImageFolder(FrameSource):
    """A folder of images in natural order; EXIF orientation is applied, hidden files are skipped.

    Args:
        folder: The folder.
        fps: Frames a second.
        wanted: Which frames may be asked for. The first of them decides the size; no other is looked at.
    """

    def __init__(self, folder: Path, fps: Fraction = DEFAULT_FPS, wanted: range = ALL_FRAMES) -> None:
        self.folder = folder
        self.title = str(folder)
        self.average_rate = fps
        found = pictures(folder)
        self.paths = list(found.values())
        if not self.paths:
            kinds = " ".join(sorted(s[1:] for s in IMAGE_SUFFIXES))
            raise InputError(f"{folder} holds no image ({kinds}): give a video file or a folder of frames")
        self._wanted = wanted
        self._numbers = {stem: index for index, stem in enumerate(found)}
        self._bytes = [_size_of(path, index in wanted) for index, path in enumerate(self.paths)]
        doubt = doubt_about_order(list(found))
        if doubt:
            warn(f"the order of the frames in {shown(folder)} is doubtful: {doubt}")
        self.count = len(self.paths)
        self.count_is_exact = True
        height, width, _ = self._read(min(wanted[0], self.count - 1)).shape
        self.size = (height, width)

    def forward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ``indices``; one that cannot be read ends them and sets ``problem``."""
        for index in indices:
            if index >= len(self.paths):
                return
            try:
                image = self._read(index)
            except InputError as error:
                self.problem = str(error)
                return
            if image.shape[:2] != self.size:
                sizes = f"{_shown(image.shape)}, but the first frame is {_shown(self.size)}"
                self.problem = f"{self.paths[index]} is {sizes}"
                return
            yield RawFrame(index, self.paths[index].stem, image, index / self.average_rate)

    def backward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ``indices``."""
        return self.forward(indices)

    def find(self, key: str) -> int | None:
        """Return the number of the frame file of that name, with or without suffix."""
        named = Path(key)
        stem = named.stem if named.suffix.lower() in IMAGE_SUFFIXES else key
        return self._numbers.get(key, self._numbers.get(stem))

    def fingerprint(self) -> str:
        """Return a hash of the names and sizes of all frame files, and one of parts of those that may be asked for.

        Older versions made the first one only (:func:`vosops.runs.checkpoint.differences` knows that).
        """
        listing, samples = hashlib.sha256(), hashlib.sha256()
        for index, (path, size) in enumerate(zip(self.paths, self._bytes, strict=True)):
            listing.update(os.fsencode(f"{path.name} {size}\n"))
            if index in self._wanted:
                samples.update(sample(path, size))
        return f"{listing.hexdigest()}+{samples.hexdigest()}"

    def _read(self, index: int) -> Image:
        return read_frame(self.paths[index])


class ArraySource(FrameSource):
    """Frames that are in memory already: a (T, H, W, 3) uint8 array or tensor, or a sequence of (H, W, 3).

    The first one ``wanted`` decides the size.
    """

    def __init__(
        self, frames: Sequence[Any], fps: Fraction = DEFAULT_FPS, wanted: range = ALL_FRAMES
    ) -> None:
        try:
            count = len(frames)
        except TypeError as error:  # an array or tensor of no dimension
            raise InputError(
                f"frames must be a sequence of (H, W, 3), got {type(frames).__name__}"
            ) from error
        if not count:
            raise InputError("the list of frames is empty")
        self.title = "the frames"
        self.average_rate = fps
        self.count = count
        self.count_is_exact = True
        self._frames = frames
        height, width, _ = frame_of_array(frames[min(wanted[0], count - 1)], "frames").shape
        self.size = (height, width)

    def forward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ``indices``."""
        for index in indices:
            if index >= len(self._frames):
                return
            image = frame_of_array(self._frames[index], f"frame {index}")
            if image.shape != (*self.size, 3):
                self.problem = f"frame {index} is {_shown(image.shape)}, but the first is {_shown(self.size)}"
                return
            yield RawFrame(index, f"{index:07d}", image, index / self.average_rate)

    def backward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ``indices``."""
        return self.forward(indices)

    def find(self, key: str) -> int | None:
        """Return the number that ``key`` is."""
        return frame_number(key)

    def fingerprint(self) -> str:
        """Refuse: there is nothing on disk to compare with later."""
        raise VosopsError("frames in memory cannot be resumed")


def _size_of(path: Path, wanted: bool) -> int:
    """Return the bytes of a frame's file, which must have some if it is wanted."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): replace or remove it") from error
    if wanted and not size:
        raise InputError(f"{path} is an empty file: replace or remove it")
    return size


def in_chunks(
    indices: Sequence[int], size: tuple[int, int], read: Callable[[list[int]], list[RawFrame]]
) -> Iterator[RawFrame]:
    """Yield the frames of descending ``indices``, of which at most 128 MiB (eight frames at least) are held at once.

    ``read`` returns the frames of ascending ones.
    """
    length = max(_MIN_CHUNK, _BACKWARD_BYTES // (size[0] * size[1] * 3))
    for start in range(0, len(indices), length):
        frames = read(sorted(indices[start : start + length]))
        while frames:
            yield frames.pop()


def _shown(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


@contextmanager
def read_ahead(items: Iterable[T], depth: int = _READ_AHEAD) -> Generator[Iterator[T], None, None]:
    """Run ``items`` in a thread that stays at most ``depth`` items ahead of the consumer.

    An exception in ``items`` is raised in the consumer; leaving the context stops and joins the thread.
    """
    queue: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
    stopped = Event()

    def put(entry: tuple[T | None, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                queue.put(entry, timeout=_QUEUE_POLL_SECONDS)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as error:
            put((None, error))
        else:
            put((None, StopIteration()))

    def consume() -> Iterator[T]:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    thread = Thread(target=work, name="vosops-read-ahead", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stopped.set()
        _drain(queue)
        thread.join()


def _drain(queue: Queue[Any]) -> None:
    try:
        while True:
            queue.get_nowait()
    except Empty:
        pass


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield (item, is it the last one); looks one item ahead."""
    iterator = iter(items)
    try:
        held = next(iterator)
    except StopIteration:
        return
    for item in iterator:
        yield held, False
        held = item
    yield held, True
