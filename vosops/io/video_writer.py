"""Writing a video of overlays: H.264 if the encoder is available, else MPEG-4, with the input's own times."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .errors import VosopsError, require
from .outputs import OwnedFile, complete_or_absent

if TYPE_CHECKING:
    from av import VideoFrame

    from .frames import Image

_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "20", "preset": "veryfast"},
    "mpeg4": {"qscale": "3"},
}
_MPEG4_CLOCK = 60_000  # MPEG-4 counts at most 65535 ticks a second
_CLOCK_LIMIT = 65_535
_BT709, _LIMITED = (
    1,
    1,
)  # FFmpeg's numbers of the matrix, primaries and transfer of HD video, and of its range


def state_colours(encoder: Any) -> None:
    """Let an encoder say that its frames are those of :func:`in_stated_colours`.

    Where nothing is said, players take the matrix of HD video and FFmpeg's scaler that of SD: colours would shift.
    """
    encoder.colorspace = encoder.color_primaries = encoder.color_trc = _BT709
    encoder.color_range = _LIMITED


def in_stated_colours(frame: VideoFrame, pixel_format: str) -> VideoFrame:
    """Return an RGB frame in a YUV format by the matrix of BT.709."""
    return frame.reformat(format=pixel_format, dst_colorspace="ITU709")


class VideoWriter:
    """Writes RGB frames with their times to an MP4 that is complete or absent; use it as a context.

    The file says how its colours are to be read: BT.709, as of HD video.

    Args:
        path: The file.
        size: (H, W); an odd side is made even by repeating the last row or column.
        rate: Frames a second on average; only a hint where times vary.
        time_base: Unit of the input's presentation times, so that they are kept exactly.
        sample_aspect_ratio: Shape of a pixel, as in the input.
    """

    def __init__(
        self,
        path: Path | OwnedFile,
        size: tuple[int, int],
        rate: Fraction,
        time_base: Fraction,
        sample_aspect_ratio: Fraction | None = None,
    ) -> None:
        self.path = path
        self._even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        self._rate = rate
        self._time_base = time_base
        self._aspect = sample_aspect_ratio
        self._last_pts = -1

    def __enter__(self) -> VideoWriter:
        av: Any = require("av")
        self._file = complete_or_absent(self.path)
        file = self._file.__enter__()
        try:
            self._container = av.open(file, "w", format="mp4")
            self._stream = self._add_stream(av)
        except BaseException as error:
            self._file.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _add_stream(self, av: Any) -> Any:
        for name, options in _ENCODERS.items():
            if name in av.codecs_available:
                stream = self._container.add_stream(name, rate=self._rate, options=options)
                break
        else:
            raise VosopsError("this build of PyAV has neither libx264 nor mpeg4: leave out --overlay")
        stream.height, stream.width = self._even
        stream.pix_fmt = "yuv420p"
        if name == "mpeg4" and self._time_base.denominator > _CLOCK_LIMIT:
            self._time_base = Fraction(1, _MPEG4_CLOCK)
        context = stream.codec_context
        context.time_base = self._time_base
        if self._aspect:
            context.sample_aspect_ratio = self._aspect
        state_colours(context)
        return stream

    def write(self, image: Image, time: Fraction) -> None:
        """Add a (H, W, 3) uint8 frame shown from ``time`` seconds on; times must ascend."""
        import av
        import numpy as np

        height, width, _ = image.shape
        padding = ((0, self._even[0] - height), (0, self._even[1] - width), (0, 0))
        padded = av.VideoFrame.from_ndarray(np.pad(image, padding, mode="edge"), format="rgb24")
        frame = in_stated_colours(padded, "yuv420p")
        frame.pts = max(round(time / self._time_base), self._last_pts + 1)
        frame.time_base = self._time_base
        self._last_pts = frame.pts
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for packet in self._stream.encode():
                    self._container.mux(packet)
            self._container.close()
        except BaseException as closing:
            if error is None:
                self._file.__exit__(type(closing), closing, closing.__traceback__)
                raise
        self._file.__exit__(kind, error, trace)
