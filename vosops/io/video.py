"""Video files through PyAV: every decoded frame once, upright, with its own presentation time."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .containers import is_cut_off
from .errors import InputError, require
from .files import quick_hash
from .frames import DEFAULT_FPS, FrameSource, RawFrame, frame_number, in_chunks
from .names import file_url
from .pictures import reason

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from .frames import Image

_LOCAL_FILES = {"protocol_whitelist": "file"}  # a playlist must not make FFmpeg open other things


class VideoFile(FrameSource):
    """A video file. Forward reading decodes from the start, so it never depends on where seeking lands.

    Backward reading holds one chunk of at most 128 MiB of decoded frames: it seeks to the key frame
    before the chunk by the presentation times seen on the way forward, and decodes up to the chunk's
    end; a file that cannot be sought that way is decoded from its start for every chunk. Nothing is
    written to disk. A file that ends early (a decoding error, or a container cut off before its stated
    end) delivers what could be decoded and sets ``problem``.
    """

    def __init__(self, path: Path, title: str | None = None) -> None:
        require("av")
        self.path = path
        self.title = title or str(path)
        self._times = array("q")  # presentation times of the first frames, while they ascend
        self._times_ascend = True
        self._orientation = Orientation()
        with self._open() as container:
            stream = video_stream(container)
            self.average_rate = stream.average_rate or stream.guessed_rate or DEFAULT_FPS
            self.time_base = stream.time_base or 1 / self.average_rate
            self.sample_aspect_ratio = stream.sample_aspect_ratio
            if stream.frames:
                self.count = stream.frames
            elif container.duration:
                self.count = round(Fraction(container.duration, 1_000_000) * self.average_rate)
            first = next(self._decode(container, stream), None)
        if first is None:
            raise InputError(
                f"{self.title} has no frame that can be decoded: {self.problem or 'it is empty'}"
            )
        self._start_time = first.pts or 0
        try:
            self.size = self._orientation.upright(first).shape[:2]
        except Exception as error:
            raise InputError(
                f"{self.title} cannot be converted to RGB ({reason(error)}): convert it"
            ) from error

    def forward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ``indices``, decoding from the start of the file."""
        self.problem = None
        wanted = iter(indices)
        target = next(wanted, None)
        if target is None:
            return
        with self._open() as container:
            for index, frame in enumerate(self._decode(container, video_stream(container))):
                self._remember_time(index, frame.pts)
                if index == target:
                    raw = self._raw(index, frame)
                    if raw is None:
                        return
                    yield raw
                    target = next(wanted, None)
                    if target is None:
                        return
        self._note_cut_off()

    def backward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of descending ``indices``, a chunk at a time."""
        if not indices:
            return
        if len(self._times) <= indices[0]:
            for _ in self.forward([indices[0]]):
                pass
        yield from in_chunks(indices, self.size, self._read_chunk)

    def find(self, key: str) -> int | None:
        """Return the number that ``key`` is: a video's frames have no other names."""
        return frame_number(key)

    def fingerprint(self) -> str:
        """Return a hash of the file's size, first and last MiB."""
        return quick_hash(self.path)

    def _open(self) -> InputContainer:
        import av

        try:
            container = av.open(
                file_url(self.path), metadata_errors="replace", container_options=_LOCAL_FILES
            )
        except Exception as error:  # damaged files make PyAV raise more than its own errors
            raise InputError(f"{self.title} cannot be opened as a video: {reason(error)}") from error
        if not container.streams.video:
            container.close()
            raise InputError(f"{self.title} has no video stream")
        video_stream(container).thread_type = "AUTO"
        return container

    def _decode(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        """Yield decoded frames; a decoding error ends the stream and sets ``problem``."""
        decoded = 0
        try:
            for frame in container.decode(stream):
                yield frame
                decoded += 1
        except GeneratorExit:
            raise
        except Exception as error:
            self.problem = (
                f"{self.title} cannot be decoded after {decoded} frames ({reason(error)}): "
                "it is truncated or damaged"
            )

    def _note_cut_off(self) -> None:
        if self.problem is None and is_cut_off(self.path):
            self.problem = f"{self.title} is truncated: the file ends before its stated length"

    def _raw(self, index: int, frame: VideoFrame) -> RawFrame | None:
        """Return a decoded frame; None, with ``problem`` set, if it is of another size or cannot be converted."""
        try:
            image = self._orientation.upright(frame)
        except Exception as error:
            self.problem = f"{self.title}: frame {index} cannot be converted to RGB ({reason(error)})"
            return None
        if image.shape[:2] != self.size:
            sizes = [f"{width}x{height}" for height, width in (self.size, image.shape[:2])]
            self.problem = (
                f"{self.title} changes size at frame {index}, from {sizes[0]} to {sizes[1]}: "
                "cut it there, or convert it to one size"
            )
            return None
        if frame.pts is None:
            time = index / self.average_rate
        else:
            time = (frame.pts - self._start_time) * self.time_base
        return RawFrame(index, f"{index:07d}", image, time)

    def _remember_time(self, index: int, time: int | None) -> None:
        if index != len(self._times) or not self._times_ascend:
            return
        if time is None or (self._times and time <= self._times[-1]):
            self._times_ascend = False
        else:
            self._times.append(time)

    def _read_chunk(self, indices: list[int]) -> list[RawFrame]:
        """Return the frames of ascending ``indices``, by seeking where the times allow it."""
        if self._times_ascend and len(self._times) > indices[-1]:
            frames = self._read_by_seeking(indices)
            if len(frames) == len(indices):
                return frames
        return list(self.forward(indices))

    def _read_by_seeking(self, indices: list[int]) -> list[RawFrame]:
        import av

        wanted = set(indices)
        frames = []
        with self._open() as container:
            stream = video_stream(container)
            try:
                container.seek(self._times[indices[0]], stream=stream, backward=True, any_frame=False)
            except av.FFmpegError:  # this container cannot be sought
                return []
            for frame in self._decode(container, stream):
                if frame.pts is None:
                    return []
                index = bisect_left(self._times, frame.pts)
                if index in wanted and self._times[index] == frame.pts:
                    raw = self._raw(index, frame)
                    if raw is None:
                        return []
                    frames.append(raw)
                if index >= indices[-1]:
                    break
        return frames


def video_stream(container: InputContainer) -> VideoStream:
    """Return the main video stream, not a cover picture."""
    stream: VideoStream = container.streams.best("video")  # type: ignore[assignment]
    return stream


class Orientation:
    """How the frames of a video are turned and mirrored: by their display matrices, each looked up once.

    PyAV 18 never frees a frame whose ``side_data`` was looked at, so that is done once for each angle of
    ``frame.rotation``, not for each frame.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, ...] | None] = {}

    def upright(self, frame: VideoFrame, picture: Any = None) -> Image:
        """Return a frame as it is to be seen, (H, W, 3) uint8 RGB; or a picture of it in another size."""
        import numpy as np

        image = frame.to_ndarray(format="rgb24") if picture is None else picture
        matrix = self._matrix(frame)
        if matrix is None:
            return np.ascontiguousarray(image)
        a, b, _, c, d, *_ = matrix
        if abs(b) > abs(a):  # a quarter turn: columns become rows
            image = image.transpose(1, 0, 2)
            rows_reversed, columns_reversed = b < 0, c < 0
        else:
            rows_reversed, columns_reversed = d < 0, a < 0
        image = image[:: -1 if rows_reversed else 1, :: -1 if columns_reversed else 1]
        return np.ascontiguousarray(image)

    def _matrix(self, frame: VideoFrame) -> tuple[int, ...] | None:
        angle = getattr(frame, "rotation", None)  # not in old versions, which free their frames
        if angle is not None and angle in self._known:
            return self._known[angle]
        found: Any = frame.side_data.get("DISPLAYMATRIX")
        matrix = None if found is None else struct.unpack("=9i", bytes(found))
        if angle is not None:
            self._known[angle] = matrix
        return matrix
