"""Small pictures of a video's frames, decoded when they are asked for and kept in files.

Three sizes: thumbnails for the time line, of key frames alone as these decode at once; previews, which the page shows
and draws on; and whole frames, for a close look. A frame of a long video costs the decoding from the key frame before
it; frames that are asked for one after the other are decoded once. Memory holds one decoder, whatever the length.
"""

from __future__ import annotations

import io
import os
import threading
from bisect import bisect_right
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vosops.io.errors import DiskError, InputError
from vosops.io.frames import FrameSource
from vosops.io.outputs import complete_or_absent
from vosops.io.seeking import SeekableVideo

if TYPE_CHECKING:
    from vosops.io.frames import Image

__all__ = ["LONGEST_PREVIEW", "Previews"]

LONGEST_PREVIEW = 960
_LONGEST_THUMBNAIL = 160
_QUALITY, _THUMBNAIL_QUALITY, _WHOLE_QUALITY = 85, 70, 92
_READ_ON = 48  # frames that are decoded on rather than looked for from a key frame
_KEPT_BEFORE = 24  # frames on the way to the one asked for whose previews are kept too
_CACHE_BYTES = 2 << 30
_CHECK_EVERY = 256  # writes between two looks at the size of the cache


class Previews:
    """The small pictures of one video.

    Until it is known where the frames of a video are, what is far from its first frame is waited for: decoding a long
    video from its start would take minutes.

    Args:
        source: The frames; nobody else reads them.
        folder: Where the pictures are kept. What is in it may be deleted at any time, and where it cannot be written
            to nothing is kept.
        limit: Bytes of the folder above which the pictures that were not used for longest are deleted.
        settled: Set when no more becomes known of the source; None: nothing is being looked for.
    """

    def __init__(
        self,
        source: FrameSource,
        folder: Path,
        limit: int = _CACHE_BYTES,
        settled: threading.Event | None = None,
    ) -> None:
        self.source = source
        self.folder = folder
        self.limit = limit
        self._settled = settled
        self._lock = threading.Lock()  # of the decoder
        self._writing = threading.Lock()
        self._reading: Iterator[tuple[int, Image]] | None = None
        self._position = 0  # of the frame that is read next
        self._writes = 0

    def preview(self, frame: int) -> bytes:
        """Return a frame as a JPEG with sides of at most 960 pixels.

        Raises:
            InputError: It cannot be read.
        """
        kept = self._kept(f"preview/{frame:07d}.jpg")
        if kept is not None:
            return kept
        self._wait_for(frame)
        return self._decode(frame)

    def thumbnail(self, frame: int) -> bytes:
        """Return the frame, or the key frame before it, as a JPEG of at most 160 pixels.

        Raises:
            InputError: It cannot be read.
        """
        self._wait_for(frame)
        source = self.source
        if isinstance(source, SeekableVideo) and source.has_times:
            keys = source.key_frames
            frame = keys[max(0, bisect_right(keys, frame) - 1)]
        name = f"thumbnail/{frame:07d}.jpg"
        kept = self._kept(name)
        if kept is not None:
            return kept
        with self._lock:
            image = self._one(frame, _LONGEST_THUMBNAIL)
            return self._keep(name, small(image, _LONGEST_THUMBNAIL), _THUMBNAIL_QUALITY)

    def whole(self, frame: int) -> bytes:
        """Return a frame as a JPEG at its own size; it is not kept.

        Raises:
            InputError: It cannot be read.
        """
        return jpeg(self.image(frame), _WHOLE_QUALITY)

    def image(self, frame: int) -> Image:
        """Return a frame, (H, W, 3) uint8 RGB.

        Raises:
            InputError: It cannot be read.
        """
        self._wait_for(frame)
        with self._lock:
            for raw in self.source.forward(range(frame, frame + 1)):
                return raw.image
            raise InputError(
                f"frame {frame} cannot be read: {self.source.problem or 'the video ends before it'}"
            )

    def offer(self, frame: int, image: Image) -> None:
        """Keep the preview of a frame that was decoded for another purpose."""
        name = f"preview/{frame:07d}.jpg"
        if not (self.folder / name).exists():
            self._keep(name, small(image, LONGEST_PREVIEW), _QUALITY)

    def replace_source(self, source: FrameSource) -> None:
        """Read from another source of the same video from now on, such as one that knows its frames' times."""
        with self._lock:
            self._close()
            self.source = source

    def close(self) -> None:
        """Close the decoder; it is opened again when something is asked for."""
        with self._lock:
            self._close()

    def _wait_for(self, frame: int) -> None:
        if self._settled is not None and frame >= _READ_ON:
            self._settled.wait()

    def _decode(self, frame: int) -> bytes:
        name = f"preview/{frame:07d}.jpg"
        with self._lock:
            kept = self._kept(name)  # another request may have waited for the same one
            if kept is not None:
                return kept
            if not isinstance(self.source, SeekableVideo):
                return self._keep(name, small(self._one(frame, LONGEST_PREVIEW), LONGEST_PREVIEW), _QUALITY)
            if self._reading is None or not self._position <= frame < self._position + _READ_ON:
                self._stop_reading()
                self._reading = self.source.previews(frame, LONGEST_PREVIEW, max(0, frame - _KEPT_BEFORE))
            for number, image in self._reading:
                self._position = number + 1
                content = self._keep(f"preview/{number:07d}.jpg", image, _QUALITY)
                if number >= frame:
                    return content
            self._stop_reading()
            raise InputError(
                f"frame {frame} cannot be read: {self.source.problem or 'the video ends before it'}"
            )

    def _one(self, frame: int, longest: int) -> Image:
        """Return one frame, small where the source can make it so."""
        if isinstance(self.source, SeekableVideo):
            for _, image in self.source.previews(frame, longest):
                return image
        else:
            for raw in self.source.forward(range(frame, frame + 1)):
                return raw.image
        raise InputError(f"frame {frame} cannot be read: {self.source.problem or 'the video ends before it'}")

    def _close(self) -> None:
        self._stop_reading()
        if isinstance(self.source, SeekableVideo):
            self.source.close()

    def _stop_reading(self) -> None:
        if isinstance(self._reading, Generator):
            self._reading.close()
        self._reading = None

    def _kept(self, name: str) -> bytes | None:
        path = self.folder / name
        try:
            content = path.read_bytes()
            os.utime(path)
            return content
        except OSError:
            return None

    def _keep(self, name: str, image: Image, quality: int) -> bytes:
        content = jpeg(image, quality)
        with self._writing:
            try:
                with complete_or_absent(self.folder / name) as file:
                    file.write(content)
            except DiskError:
                return content
            self._writes += 1
            if self._writes % _CHECK_EVERY == 0:
                self._trim()
        return content

    def _trim(self) -> None:
        """Delete the pictures that were not used for longest, down to nine tenths of the limit."""
        found = []
        for path in self.folder.glob("*/*.jpg"):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self.limit:
            return
        for _, size, path in sorted(found):
            path.unlink(missing_ok=True)
            total -= size
            if total <= self.limit * 0.9:
                return


def small(image: Image, longest: int) -> Image:
    """Return an image with sides of at most this many pixels."""
    import numpy as np
    from PIL import Image as PILImage

    height, width, _ = image.shape
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = PILImage.fromarray(image).resize(size, PILImage.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(picture)


def jpeg(image: Image, quality: int) -> bytes:
    """Return an image as a JPEG."""
    from PIL import Image as PILImage

    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
