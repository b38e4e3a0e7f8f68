"""Video files that are read from any frame: every frame's time is known from the packets, without decoding."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from .frames import RawFrame
from .video import VideoFile, video_stream

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

    from .frames import Image

_KEY_FRAMES_TRIED = 3  # containers whose index is of decoding times may land a key frame late


class SeekableVideo(VideoFile):
    """A video file that is read from any frame on, once :meth:`read_times` knows when each frame is shown.

    Frames have the numbers that :class:`VideoFile` gives them: those of the decoded frames, in order. Until the
    times are known, and in a file whose packets do not tell them, it reads as :class:`VideoFile` does, from the
    start. Memory grows by 8 bytes a frame. One reading at a time: see :meth:`twin`.
    """

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._known: array[int] | None = None
        self._key_times: array[int] = array("q")
        self._idle: InputContainer | None = None
        self._scaler: VideoReformatter | None = None

    @property
    def has_times(self) -> bool:
        """Whether it can be read from any frame on, and the number of frames is exact."""
        return self._known is not None

    @property
    def key_frames(self) -> list[int]:
        """The numbers of the key frames, which decode alone; empty before :meth:`read_times`."""
        known = self._known
        return [] if known is None else [bisect_left(known, time) for time in self._key_times]

    def read_times(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Read the file's packets through, without decoding them; return whether they tell every frame's time.

        Args:
            should_stop: Asked between packets; true leaves everything as it was.
        """
        times, keys = array("q"), array("q")
        with self._open() as container:
            stream = video_stream(container)
            try:
                for packet in container.demux(stream):
                    if should_stop():
                        return False
                    if not packet.size or packet.is_discard:
                        continue
                    if packet.pts is None:
                        return False
                    if packet.pts >= self._start_time:
                        times.append(packet.pts)
                        if packet.is_keyframe:
                            keys.append(packet.pts)
            except Exception:  # cut off or damaged: what was seen until then can be read
                pass
        known = array("q", sorted(times))
        if not known or not keys or any(a == b for a, b in pairwise(known)):
            return False
        self._adopt(known, array("q", sorted(keys)))
        return True

    def twin(self) -> SeekableVideo:
        """Return the same video for another thread; what is known of its frames is shared."""
        other = SeekableVideo(self.path, self.title)
        if self._known is not None:
            other._adopt(self._known, self._key_times)
        return other

    def forward(self, indices: Sequence[int]) -> Iterator[RawFrame]:
        """Yield the frames of ascending ``indices``, decoding from the key frame before the first of them."""
        if self._known is None or not indices or indices[0] == 0:
            yield from super().forward(indices)
            return
        self.problem = None
        wanted = iter(indices)
        target = next(wanted)
        for number, frame in self.decoded(target):
            if number < target:
                continue
            if number > target:
                self.problem = f"{self.title}: frame {target} cannot be decoded: the file is damaged there"
                return
            raw = self._raw(number, frame)
            if raw is None:
                return
            yield raw
            following = next(wanted, None)
            if following is None:
                return
            target = following
        self._note_cut_off()

    def decoded(self, first: int) -> Iterator[tuple[int, VideoFrame]]:
        """Yield (number, decoded frame) from a key frame at or before ``first`` on, to the end.

        Before the times are known: from the start of the file.
        """
        known = self._known
        if known is None:
            with self._open() as container:
                yield from enumerate(self._decode(container, video_stream(container)))
            return
        if first >= len(known):
            return
        place = bisect_right(self._key_times, known[first])
        starts = [self._key_times[i] for i in range(place - 1, max(-1, place - 1 - _KEY_FRAMES_TRIED), -1)]
        for start in [*starts, None]:
            with self._open() if start is None else self._borrowed() as container:
                stream = video_stream(container)
                if start is not None:
                    try:
                        container.seek(start, stream=stream, backward=True, any_frame=False)
                    except OSError:  # FFmpeg's errors are among them
                        continue
                begun = False
                for frame in self._decode(container, stream):
                    number = self._number(frame.pts)
                    if number is None:
                        continue
                    if not begun and start is not None and number > first:
                        break  # the container landed late: from an earlier key frame
                    begun = True
                    yield number, frame
            if begun:
                return

    def close(self) -> None:
        """Close the file, which is kept open between two readings; it is opened again when it is read again."""
        idle, self._idle = self._idle, None
        if idle is not None:
            idle.close()

    @contextmanager
    def _borrowed(self) -> Generator[InputContainer, None, None]:
        """Yield an open container, the one that an earlier reading left if there is one.

        FFmpeg's decoder holds a dozen frames, and PyAV frees it when Python's garbage collector comes by: opening the
        file for each look at a 4K video would take gigabytes.
        """
        container, self._idle = self._idle, None
        if container is None:
            container = self._open()
        try:
            yield container
        finally:
            if self._idle is None and self.problem is None:
                self._idle = container
            else:
                container.close()

    def previews(self, first: int, longest: int, kept: int | None = None) -> Iterator[tuple[int, Image]]:
        """Yield (number, small RGB picture) of the frames from ``first`` on.

        Args:
            first: The first frame; what it is decoded from is read on the way.
            longest: Most pixels of a side.
            kept: Yield frames on the way too, from this number on; None: none.
        """
        from av.video.reformatter import VideoReformatter

        scale = min(1.0, longest / max(self.size))
        if self._scaler is None:
            self._scaler = VideoReformatter()
        for number, frame in self.decoded(first):
            if number >= (first if kept is None else kept):
                width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
                picture = self._scaler.reformat(frame, width=width, height=height, format="rgb24")
                yield number, self._orientation.upright(frame, picture.to_ndarray())

    def _adopt(self, times: array[int], keys: array[int]) -> None:
        self._known, self._key_times = times, keys
        self._times, self._times_ascend = times, True  # by which VideoFile reads backward
        self.count, self.count_is_exact = len(times), True

    def _number(self, time: int | None) -> int | None:
        known = self._known
        if known is None or time is None:
            return None
        number = bisect_left(known, time)
        return number if number < len(known) and known[number] == time else None
