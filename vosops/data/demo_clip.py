"""A short clip with exact masks, rendered from photographs that ship in scikit-image.

An astronaut, a space shuttle and a cup of coffee move, turn, change size and pass in front of one another
while the camera drifts over the Hubble deep field. The photographs are public domain or CC0 (NASA; Rachel
Michetti's cup of coffee; NASA and ESA's deep field), and the outlines of the objects are drawn by hand below.

The masks are exact: a pixel belongs to whatever covers most of it. Rendering is deterministic on one machine.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vosops.io.outputs import STATE_FOLDER, OwnedFolder, complete_or_absent

Image = NDArray[np.uint8]
Curve = NDArray[np.float64]

FRAMES = 60
SIZE = (480, 854)
"""Height and width, those of DAVIS."""

OBJECTS = {1: "astronaut", 2: "space shuttle", 3: "cup of coffee"}

COLOURS = {1: (0, 150, 255), 2: (255, 70, 200), 3: (130, 230, 50)}
"""Colours of the objects in written masks, far from their own."""

JPEG_QUALITY = 95
OUTLINE_SUBSAMPLES = 4
CURVE_STEPS = 8
EDGE_BLUR = 1.0
"""Standard deviation, in pixels of the photograph, of the blur of an outline."""

EDGE = 0.8
"""Share of the blurred outline at which an object ends: above 0.5 trims the fringe of its old background."""

EDGE_CONTRAST = 3.0
"""How much steeper than the blur the edge is."""


@dataclass(frozen=True)
class Pose:
    """Where a layer is at one time: its centre, its size and how it is turned.

    Attributes:
        time: 0 is the first frame, 1 the last.
        x: centre, as a share of the frame's width.
        y: centre, as a share of the frame's height.
        scale: pixels of a frame of `SIZE` per pixel of the photograph.
        angle: degrees, clockwise.
    """

    time: float
    x: float
    y: float
    scale: float
    angle: float = 0.0


@dataclass(frozen=True)
class Layer:
    """A photograph, the part of it to show, and how it moves.

    Attributes:
        photograph: file in `skimage/data`.
        poses: at ascending times, the first at 0 and the last at 1; smooth in between.
        outline: corners (x, y) of a smooth closed curve in pixels of the photograph; empty shows all of it.
    """

    photograph: str
    poses: tuple[Pose, ...]
    outline: tuple[tuple[float, float], ...] = ()


# fmt: off
ASTRONAUT = (
    (36, 516), (30, 485), (21, 450), (19, 415), (20, 385), (25, 350), (33, 318), (40, 295), (50, 270), (60,
    250), (76, 235), (98, 220), (115, 209), (113, 192), (116, 185), (124, 181), (129, 169), (140, 158), (156,
    150), (172, 147), (184, 148), (183, 141), (180, 132), (173, 129), (166, 118), (158, 106), (154, 88), (153,
    70), (157, 55), (168, 44), (180, 38), (190, 30), (208, 20), (230, 15), (252, 18), (274, 29), (291, 47),
    (300, 68), (302, 88), (296, 108), (287, 122), (278, 134), (269, 137), (266, 148), (261, 160), (256, 172),
    (270, 181), (286, 195), (298, 213), (304, 233), (318, 241), (334, 253), (345, 270), (352, 292), (358,
    315), (363, 342), (376, 346), (400, 343), (426, 348), (450, 361), (470, 380), (485, 402), (494, 425),
    (498, 452), (504, 459), (506, 470), (509, 495), (508, 516),
)
SHUTTLE = (
    (406, 1), (415, 0), (425, 1), (433, 15), (437, 35), (438, 46), (441.5, 41), (445, 39), (449.5, 43), (453,
    52), (455, 70), (455.5, 150), (455.5, 215), (457, 226), (455, 233), (446, 235), (438, 236), (425, 235),
    (414, 238), (409, 248), (406, 256), (399, 258), (393, 254), (390, 241), (384, 232), (381, 230), (357,
    227.5), (354, 222), (358, 210), (370, 192), (376, 177), (378.5, 150), (378.5, 100), (380, 84), (381, 55),
    (384, 46), (387.5, 41), (392.5, 45), (397, 50), (399, 30), (401, 15),
)
CUP = (
    (78, 205), (80, 180), (88, 150), (102, 123), (124, 100), (149, 84), (174, 74), (181, 58), (195, 42), (215,
    30), (240, 22), (268, 18), (295, 18), (325, 24), (355, 35), (380, 50), (395, 66), (404, 67), (416, 67),
    (423, 72), (424, 81), (420, 93), (417, 106), (440, 128), (460, 155), (473, 185), (479, 215), (479, 245),
    (472, 280), (458, 310), (436, 338), (405, 361), (370, 377), (330, 386), (290, 388), (250, 384), (212,
    374), (175, 358), (142, 336), (115, 310), (95, 280), (83, 245),
)
# fmt: on

BACKGROUND = Layer(
    "hubble_deep_field.jpg",
    (Pose(0, 0.50, 0.50, 1.10, -4), Pose(0.5, 0.46, 0.55, 1.18, 0), Pose(1, 0.54, 0.47, 1.12, 4)),
)
OBJECT_LAYERS: dict[int, Layer] = {
    2: Layer(
        "astronaut.png",
        (
            Pose(0, 0.83, 0.34, 0.80, 14),
            Pose(0.35, 0.66, 0.30, 0.84, 2),
            Pose(0.7, 0.36, 0.28, 0.92, -16),
            Pose(1, 0.14, 0.40, 1.02, -26),
        ),
        SHUTTLE,
    ),
    1: Layer(
        "astronaut.png",
        (
            Pose(0, 0.47, 0.68, 0.74, -3),
            Pose(0.3, 0.53, 0.66, 0.76, 3),
            Pose(0.65, 0.56, 0.66, 0.80, -2),
            Pose(1, 0.60, 0.67, 0.77, 3),
        ),
        ASTRONAUT,
    ),
    3: Layer(
        "coffee.png",
        (
            Pose(0, 0.13, 0.62, 0.44, -14),
            Pose(0.35, 0.33, 0.74, 0.50, 6),
            Pose(0.7, 0.66, 0.72, 0.46, 22),
            Pose(1, 0.87, 0.44, 0.40, 34),
        ),
        CUP,
    ),
}
"""From the back to the front."""


class DemoClip(Sequence[tuple[Image, Image]]):
    """The clip: item t is (frame, labels), (H, W, 3) uint8 RGB and (H, W) uint8 with the ids of `OBJECTS`.

    Frames are rendered when asked for, a few hundredths of a second each at 480p; nothing is kept.

    Args:
        frames: number of frames, at least 1; the same motion, faster or slower.
        size: height and width, each at least 32.

    Raises:
        ValueError: `frames` or `size` is too small.
        ImportError: scikit-image or Pillow is not installed (`pip install 'vosops[demo]'`).
    """

    def __init__(self, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> None:
        if frames < 1:
            raise ValueError(f"frames: expected at least 1; got {frames}")
        if min(size) < 32:
            raise ValueError(f"size: expected a height and width of at least 32; got {size}")
        self.size = size
        self._count = frames
        self._layers = [(0, _Sprite(BACKGROUND, size))]
        self._layers += [(i, _Sprite(layer, size)) for i, layer in OBJECT_LAYERS.items()]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Image, Image]]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Image, Image]:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected less than {len(self)}; got {index}")
        time = (index % len(self)) / max(len(self) - 1, 1)
        height, width = self.size
        colour = torch.zeros(3, height, width)
        cover = torch.zeros(len(self._layers), height, width)
        for layer, (_, sprite) in enumerate(self._layers):
            (top, bottom, left, right), picture = sprite.at(time)
            alpha = picture[3]
            colour[:, top:bottom, left:right].mul_(1 - alpha).add_(picture[:3])
            cover[:layer, top:bottom, left:right].mul_(1 - alpha)
            cover[layer, top:bottom, left:right] = alpha
        labels, most = torch.zeros(height, width, dtype=torch.uint8), cover[0]
        for (object_id, _), share in zip(self._layers[1:], cover[1:], strict=True):
            labels.masked_fill_(share > most, object_id)
            most = torch.maximum(most, share)
        frame = colour.mul_(255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)
        return frame.contiguous().numpy(), labels.numpy()


def write_clip(clip: DemoClip, root: Path, name: str = "demo") -> tuple[Path, Path]:
    """Write the clip as a dataset in DAVIS' layout, and returns the folders of its frames and of its masks.

    Files of an earlier clip of that name are removed, and no others: an `InputError` says where one is in the way.

    Args:
        clip: what to write.
        root: the dataset; frames go to `root/JPEGImages/480p/name/00000.jpg`, masks to
            `root/Annotations/480p/name/00000.png`, and so on.
        name: the sequence.
    """
    from PIL import Image as Pillow

    frames, masks = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    owned = OwnedFolder(root)
    folders = [folder.relative_to(root).as_posix() for folder in (frames, masks)]
    suffixes = (".jpg", ".png")
    names = [
        [f"{folder}/{t:05d}{s}" for folder, s in zip(folders, suffixes, strict=True)]
        for t in range(len(clip))
    ]
    owned.check_free(name for pair in names for name in pair)
    owned.remove_parts(["", STATE_FOLDER, *folders])
    owned.remove(name for name in owned.names() if name.rpartition("/")[0] in folders)
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[list(COLOURS)] = list(COLOURS.values())
    for (picture_name, mask_name), (frame, labels) in zip(names, clip, strict=True):
        encoded = io.BytesIO()  # as Pillow's errors while it writes a JPEG do not say that the disk is full
        Pillow.fromarray(frame).save(encoded, format="JPEG", quality=JPEG_QUALITY)
        with complete_or_absent(owned.file(picture_name)) as file:
            file.write(encoded.getvalue())
        mask = Pillow.fromarray(labels)
        mask.putpalette(palette.tobytes())
        with complete_or_absent(owned.file(mask_name)) as file:
            mask.save(file, format="PNG")
    return frames, masks


class _Sprite:
    """A layer ready to be drawn: a premultiplied RGBA picture, filtered for its largest scale."""

    def __init__(self, layer: Layer, size: tuple[int, int]) -> None:
        self.poses = layer.poses
        self.size = size
        height, width = SIZE
        self.unit = size[0] / height if layer.outline else max(size[0] / height, size[1] / width)
        picture, self.centre = _cut(layer)
        self.extent = (picture.shape[2], picture.shape[1])
        shrinkage = min(1.0, max(pose.scale for pose in layer.poses) * self.unit)
        if shrinkage < 1:
            shape = [max(1, round(n * shrinkage)) for n in picture.shape[1:]]
            small = F.interpolate(picture[None], shape, mode="bilinear", antialias=True, align_corners=False)[
                0
            ]
            picture = small.clamp(0, 1)
        self.picture = picture

    def at(self, time: float) -> tuple[tuple[int, int, int, int], Tensor]:
        """Return the box that the layer covers (top, bottom, left, right), and its picture there (4, h, w)."""
        pose = _interpolate(self.poses, time)
        height, width = self.size
        scale = pose.scale * self.unit
        cos, sin = math.cos(math.radians(pose.angle)), math.sin(math.radians(pose.angle))
        x0, y0 = pose.x * width, pose.y * height
        columns, rows = self.extent
        corners = [(x - self.centre[0], y - self.centre[1]) for x in (0, columns) for y in (0, rows)]
        xs = [x0 + scale * (cos * x - sin * y) for x, y in corners]
        ys = [y0 + scale * (sin * x + cos * y) for x, y in corners]
        left, right = (min(max(round(v), 0), width) for v in (min(xs) - 1, max(xs) + 1))
        top, bottom = (min(max(round(v), 0), height) for v in (min(ys) - 1, max(ys) + 1))
        x = torch.arange(left, right) + 0.5 - x0
        y = (torch.arange(top, bottom) + 0.5 - y0)[:, None]
        u = (cos * x + sin * y) / scale + self.centre[0]
        v = (cos * y - sin * x) / scale + self.centre[1]
        grid = torch.stack([2 * u / columns - 1, 2 * v / rows - 1], dim=-1)
        return (top, bottom, left, right), F.grid_sample(self.picture[None], grid[None], align_corners=False)[
            0
        ]


def _cut(layer: Layer) -> tuple[Tensor, tuple[float, float]]:
    """Return what the outline holds, (4, h, w) premultiplied RGBA in [0, 1], and its centre (x, y)."""
    photograph = _read(layer.photograph)
    if not layer.outline:
        picture = torch.cat([photograph, torch.ones_like(photograph[:1])])
        return picture, (picture.shape[2] / 2, picture.shape[1] / 2)
    alpha = _opacity(layer.outline, (photograph.shape[1], photograph.shape[2]))
    rows, columns = alpha.any(1).nonzero()[:, 0], alpha.any(0).nonzero()[:, 0]
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    picture = torch.cat([photograph * alpha, alpha[None]])[:, top:bottom, left:right]
    return F.pad(picture, (1, 1, 1, 1)), ((right - left) / 2 + 1, (bottom - top) / 2 + 1)


def _read(name: str) -> Tensor:
    """Return a photograph of scikit-image, (3, h, w) float in [0, 1]."""
    try:
        import skimage.data
        from PIL import Image as Pillow
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'vosops[demo]'") from None

    with Pillow.open(Path(skimage.data.__file__).parent / name) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def _opacity(outline: Sequence[tuple[float, float]], size: tuple[int, int]) -> Tensor:
    """Return the inside of a smooth closed curve through the corners, (h, w) in [0, 1], with a soft edge."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFilter

    height, width = size
    n = OUTLINE_SUBSAMPLES
    canvas = Pillow.new("L", (width * n, height * n))
    ImageDraw.Draw(canvas).polygon([(x * n, y * n) for x, y in _closed_curve(outline)], fill=255)
    canvas = canvas.filter(ImageFilter.GaussianBlur(EDGE_BLUR * n)).resize(
        (width, height), Pillow.Resampling.BOX
    )
    alpha = torch.from_numpy(np.array(canvas)) / 255
    return ((alpha - EDGE) * EDGE_CONTRAST + 0.5).clamp(0, 1)


def _closed_curve(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of the closed Catmull-Rom spline through the corners."""
    p = np.asarray(corners, dtype=np.float64)
    t = np.linspace(0, 1, CURVE_STEPS, endpoint=False)[:, None, None]
    points = _catmull_rom(np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0), t)
    return [(float(x), float(y)) for x, y in points.transpose(1, 0, 2).reshape(-1, 2)]


def _interpolate(poses: tuple[Pose, ...], time: float) -> Pose:
    """Return the pose at a time in [0, 1], on a smooth curve through the given ones."""
    after = next(i for i, pose in enumerate(poses[1:], start=1) if time <= pose.time or i == len(poses) - 1)
    chosen = [poses[min(max(i, 0), len(poses) - 1)] for i in range(after - 2, after + 2)]
    share = (time - chosen[1].time) / (chosen[2].time - chosen[1].time)
    table = np.array([(pose.x, pose.y, pose.scale, pose.angle) for pose in chosen])
    x, y, scale, angle = _catmull_rom(table[0], table[1], table[2], table[3], share)
    return Pose(time, float(x), float(y), float(scale), float(angle))


def _catmull_rom(a: Curve, b: Curve, c: Curve, d: Curve, t: float | Curve) -> Curve:
    """Return the point at share t between b and c of the smooth curve through a, b, c, d."""
    result: Curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return result
