"""Small clips with known objects, and a tracker simple enough to predict."""

from __future__ import annotations

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vosops.models._tracking import most_probable

SIZE = (48, 64)
SKY = (40, 60, 80)
COLOURS = {1: (220, 40, 40), 2: (40, 220, 40), 3: (40, 40, 220)}


def picture(boxes, size=SIZE):
    """(H, W, 3) uint8: coloured boxes {id: (top, left, height, width)} on the sky."""
    image = np.empty((*size, 3), np.uint8)
    image[:] = SKY
    for object_id, (top, left, height, width) in boxes.items():
        image[top : top + height, left : left + width] = COLOURS[object_id]
    return image


def truth(boxes, size=SIZE):
    """(H, W) uint8 label map of the same boxes."""
    labels = np.zeros(size, np.uint8)
    for object_id, (top, left, height, width) in boxes.items():
        labels[top : top + height, left : left + width] = object_id
    return labels


def moving(count, ids=(1,), size=SIZE):
    """Boxes of each frame: objects below each other that move right by one pixel a frame."""
    return [{i: (4 + 14 * n, 4 + t % 40, 10, 12) for n, i in enumerate(ids)} for t in range(count)]


def write_folder(folder, frames, name="{:05d}.png", first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(first + index))
    return folder


def write_mask(path, labels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)
    return path


def write_video(
    path,
    frames,
    *,
    codec="libx264",
    rate=10,
    pts=None,
    time_base=None,
    movflags=None,
    lossless=True,
    keyframe_every=None,
):
    """A video of (H, W, 3) frames; ``pts`` are in units of ``time_base``."""
    options = {"movflags": movflags} if movflags else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "0" if lossless else "23", "preset": "ultrafast"}
        if keyframe_every:
            stream.codec_context.gop_size = keyframe_every
        if time_base:
            stream.codec_context.time_base = time_base
        for index, frame in enumerate(frames):
            video_frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if pts is not None:
                video_frame.pts, video_frame.time_base = pts[index], time_base
            container.mux(stream.encode(video_frame))
        container.mux(stream.encode())
    return path


def rotate_file(path, degrees_clockwise):
    """Set the display matrix of an MP4 by editing its track header."""
    matrices = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
    a, b, c, d = (value << 16 for value in matrices[degrees_clockwise])
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 4 + 20 + 16
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def resident():
    """Bytes of memory that this process has."""
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("the memory of this process cannot be seen here")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cut(path, share):
    """Keep the first ``share`` of a file's bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def read_video(path):
    """[(time as Fraction of a second, (H, W, 3))] of a video."""
    with av.open(str(path)) as container:
        return [
            (Fraction(f.pts) * f.time_base, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)
        ]


def read_png(path: Path):
    return np.array(Image.open(path))


class ColourTracker:
    """Gives each pixel to the object of the nearest mean colour; the means drift with what it sees.

    The drift makes every frame depend on all those before, so that a resumed run shows whether the state
    was kept to the last bit.
    """

    drift = 0.05
    sharpness = 30.0

    def __init__(self):
        self.calls = []
        self.reset()

    def reset(self):
        self.object_ids = []
        self.means = torch.empty(0, 3)
        self.frames_kept = 0

    def initialize(self, frame, labels):
        self.reset()
        self._learn(frame, labels)
        self.calls.append(("initialize", sorted(set(labels.flatten().tolist()))))

    def step(self, frame, labels=None, *, permanent=False, end=False, output="probs"):
        if labels is not None:
            self._learn(frame, labels)
            self.frames_kept += permanent
            self.calls.append(("step", sorted(set(labels.flatten().tolist()))))
        pixels = frame.float().div(255).flatten(1).T
        distance = torch.cdist(pixels, self.means, compute_mode="donot_use_mm_for_euclid_dist")
        probabilities = (-self.sharpness * distance).softmax(1)
        weights = probabilities.sum(0).clamp(min=1e-6)
        seen = (probabilities.T @ pixels) / weights[:, None]
        self.means = self.means + self.drift * (seen - self.means)
        self.latest = probabilities.T.reshape(-1, *frame.shape[1:])
        return self.latest if output == "probs" else most_probable(self.latest, self.object_ids)

    def predict(self, frame, *, output="probs"):
        means = self.means
        predicted = self.step(frame, output=output)
        self.means = means
        return predicted

    def confidence(self):
        return self.latest.amax(0)

    def add_objects(self, frame, labels):
        self._learn(frame, labels)

    def remove_object(self, object_id):
        kept = [0, *(1 + i for i, known in enumerate(self.object_ids) if known != object_id)]
        self.object_ids = [known for known in self.object_ids if known != object_id]
        self.means = self.means[kept]

    def _learn(self, frame, labels):
        pixels = frame.float().div(255)
        found = [i for i in labels.flatten().unique().tolist() if i not in (0, 255)]
        means = dict(zip([0, *self.object_ids], self.means))
        for i in [0, *found]:
            if (labels == i).any():
                means[i] = pixels[:, labels == i].mean(1)
        self.object_ids = sorted(set(means) - {0})
        self.means = torch.stack([means[i] for i in [0, *self.object_ids]])

    def state_dict(self):
        return {"ids": list(self.object_ids), "means": self.means.clone(), "kept": self.frames_kept}

    def load_state_dict(self, state):
        self.object_ids, self.means = list(state["ids"]), state["means"].clone()
        self.frames_kept = state["kept"]
