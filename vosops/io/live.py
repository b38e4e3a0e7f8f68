"""Live input: cameras and network streams, whose frames come whether or not they are waited for."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from .errors import InputError, require
from .frames import RawFrame
from .listing import shown
from .pictures import reason
from .video import Orientation, video_stream

if TYPE_CHECKING:
    from av.container import InputContainer

Drop = Literal["oldest", "none"]
DROPS: tuple[Drop, ...] = ("oldest", "none")

_SCHEME = re.compile(r"(rtsp|rtsps|rtmp|rtmps|rtp|udp|srt|tcp|http|https)://", re.IGNORECASE)
_CAMERA = re.compile(r"/dev/video\d+")
_PASSWORD = re.compile(r"(://[^/@:]*):[^/@]*@")
_OPEN_SECONDS = 60.0  # until a stream must have answered
_READ_SECONDS = 10.0  # without a packet, after which a stream is over
_MOST_WAITING = 8  # decoded frames that "none" keeps before the reader waits
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class LiveFrame:
    """A frame of a stream: its number among all that came, and when it came by ``time.monotonic``."""

    raw: RawFrame
    came: float


def is_live(name: str) -> bool:
    """Say whether a text names a camera or a network stream."""
    return bool(_SCHEME.match(name) or _CAMERA.fullmatch(name))


class LiveSource:
    """A camera or stream; a thread reads it as fast as it comes.

    When frames come faster than they are taken, ``drop="oldest"`` keeps the newest one alone, so that what is computed
    is at most one frame late; ``"none"`` keeps all, and lets the sender wait once eight are waiting.

    Attributes:
        title: The name, without the password that it may have.
        received: Frames that came.
        dropped: Frames of these that nobody took.
        problem: Set when the stream ended with an error; one line.
    """

    def __init__(self, name: str, options: Mapping[str, str] | None = None, drop: Drop = "oldest") -> None:
        if drop not in DROPS:
            raise InputError(f"--drop must be one of {', '.join(DROPS)}, got {drop}")
        if not is_live(name):
            raise InputError(
                f"{shown(name)} is neither a stream (rtsp://, rtmp://, srt://, udp://, ...) nor a camera (/dev/video0)"
            )
        require("av")
        self._name = name
        self.title = _PASSWORD.sub(r"\1:***@", name)
        self.problem: str | None = None
        self.received = self.dropped = 0
        self._drop = drop
        self._options = dict(options or {})
        self._waiting: deque[LiveFrame] = deque()
        self._changed = threading.Condition()
        self._stop = self._ended = False
        self._container = self._open()
        self._thread = threading.Thread(target=self._read, name="vosops-live", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[LiveFrame]:
        """Yield frames until the stream ends or is closed."""
        while (frame := self._next()) is not None:
            yield frame

    def close(self) -> None:
        """Stop reading."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join(_READ_SECONDS)

    def __enter__(self) -> LiveSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _next(self) -> LiveFrame | None:
        with self._changed:
            while not self._waiting and not self._ended and not self._stop:
                self._changed.wait(_POLL_SECONDS)  # so that Ctrl-C is heard
            if self._stop or not self._waiting:
                return None
            frame = self._waiting.popleft()
            self._changed.notify_all()
            return frame

    def _open(self) -> InputContainer:
        import av

        camera = _CAMERA.fullmatch(self._name)
        options: dict[str, Any] = {"format": "v4l2"} if camera else {}
        try:
            container: InputContainer = av.open(
                self._name,
                options=self._options,
                timeout=(_OPEN_SECONDS, _READ_SECONDS),
                metadata_errors="replace",
                **options,
            )
        except Exception as error:
            raise InputError(f"{shown(self.title)} cannot be opened: {reason(error)}") from error
        if not container.streams.video:
            container.close()
            raise InputError(f"{shown(self.title)} has no video stream")
        return container

    def _read(self) -> None:
        orientation = Orientation()
        try:
            with self._container as container:
                for frame in container.decode(video_stream(container)):
                    when = time.monotonic()
                    seconds = Fraction(frame.pts or 0) * (frame.time_base or Fraction(1))
                    index = self.received
                    image = orientation.upright(frame)
                    self._put(LiveFrame(RawFrame(index, f"{index:07d}", image, seconds), when))
                    if self._stop:
                        return
        except Exception as error:  # FFmpeg's, and what damaged packets make PyAV raise
            if not self._stop:
                self.problem = f"{shown(self.title)} ended: {reason(error)}"
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, frame: LiveFrame) -> None:
        with self._changed:
            self.received += 1
            if self._drop == "oldest":
                self.dropped += len(self._waiting)
                self._waiting.clear()
            while len(self._waiting) >= _MOST_WAITING and not self._stop:
                self._changed.wait(_POLL_SECONDS)
            self._waiting.append(frame)
            self._changed.notify_all()
