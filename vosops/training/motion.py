"""Motion for still images: affine changes and thin-plate splines, as maps from a clip's pixels to the still's.

STM and RGMP are first trained on such clips (Oh et al., CVPR 2018, section 4.3; ICCV 2019, section 3.5).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from vosops.training.config import Motion

__all__ = ["Window", "sampled", "thin_plate", "walk"]

_POINTS = 4  # of the spline, along each side
_GRID = 8  # pixels between the places where the spline is computed; between them it is interpolated


class Window:
    """What part of a frame a clip shows: `grid` gives the place in the frame of each of the clip's pixels.

    size: (height, width) of the clip. frame: that of the frame. top, left: of the part; height, width: of it, in pixels
    of the frame. flipped: mirrored. Places are in [-1, 1], as ``grid_sample`` with align_corners=False takes them.
    """

    def __init__(
        self,
        size: tuple[int, int],
        frame: tuple[int, int],
        part: tuple[float, float, float, float],
        flipped: bool,
    ) -> None:
        self.size = size
        top, left, height, width = part
        self.scale = torch.tensor([width / frame[1], height / frame[0]])
        self.centre = torch.tensor([(2 * left + width) / frame[1] - 1, (2 * top + height) / frame[0] - 1])
        if flipped:
            self.scale = self.scale * torch.tensor([-1.0, 1.0])

    def places(self, own: Tensor) -> Tensor:
        """Places (...,2) in the clip, (x, y) in [-1, 1] -> places in the frame."""
        return own * self.scale + self.centre


def walk(motion: Motion, choice: random.Random, frames: int, *, begin: bool = False) -> Iterator[Tensor]:
    """Yield where each of a regular grid of points comes from in each frame: (_POINTS**2, 2) in [-1, 1].

    The first frame is as it is, unless it begins with a change; every further one changes the one before.
    """
    points = control_points()
    transform = torch.eye(3)
    bent = torch.zeros_like(points)
    for frame in range(frames):
        if frame or begin:
            transform = transform @ _affine(motion, choice)
            noise = torch.tensor([choice.gauss(0, 2 * motion.bend) for _ in range(points.numel())])
            bent = bent + noise.view_as(points)
        yield points @ transform[:2, :2].T + transform[:2, 2] + bent


def _affine(motion: Motion, choice: random.Random) -> Tensor:
    """Return a random change of places as a 3x3 matrix."""

    def within(most: float) -> float:
        return choice.uniform(-most, most)

    angle, zoom = math.radians(within(motion.rotation)), 1 + within(motion.zoom)
    shear = within(motion.shear)
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    turned = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    sheared = torch.tensor([[1.0, shear, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    moved = torch.eye(3)
    moved[0, 2], moved[1, 2] = 2 * within(motion.shift), 2 * within(motion.shift)
    return moved @ turned @ sheared


def control_points() -> Tensor:
    """Return the points (_POINTS**2, 2) whose movement a spline is made of."""
    along = torch.linspace(-1, 1, _POINTS)
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def thin_plate(places: Tensor, points: Tensor, moved: Tensor) -> Tensor:
    """Return where a thin-plate spline brings places (P,2), that brings points (N,2) to `moved` (N,2).

    An affine movement of the points is that of all places. Cost: N**3, and N for each place. Source: Bookstein,
    Principal warps, PAMI 1989.

    >>> import torch
    >>> points = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])
    >>> thin_plate(torch.tensor([[0.5, 0.25]]), points, points + 1)
    tensor([[1.5000, 1.2500]])
    """
    count = len(points)
    ones = points.new_ones(count, 1)
    system = points.new_zeros(count + 3, count + 3, dtype=torch.float64)
    system[:count, :count] = _kernel(points, points)
    system[:count, count:] = torch.cat([ones, points], 1)
    system[count:, :count] = system[:count, count:].T
    right = torch.cat([moved, moved.new_zeros(3, 2)]).double()
    solved = torch.linalg.solve(system, right).to(places.dtype)
    affine = torch.cat([places.new_ones(len(places), 1), places], 1)
    moved_places: Tensor = _kernel(places, points) @ solved[:count] + affine @ solved[count:]
    return moved_places


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """r^2 log r^2 between (P,2) and (N,2): (P,N)."""
    square = (a[:, None] - b[None]).square().sum(-1)
    return square * square.clamp(min=1e-12).log()


def sampled(frame: Tensor, labels: Tensor, window: Window, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a window of a frame (3,H,W) uint8 and its labels (H,W) uint8 shows while it moves.

    moved: of :func:`walk`. Beyond the frame's edges it is mirrored. Frame bilinear, labels by the nearest pixel:
    (3,h,w) and (h,w) uint8.
    """
    height, width = window.size
    coarse = _regular(height, width)
    places = window.places(thin_plate(coarse.view(-1, 2), control_points(), moved)).view_as(coarse)
    grid = functional.interpolate(
        places.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=True
    ).permute(0, 2, 3, 1)
    shown = functional.grid_sample(
        frame[None].float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    ids = functional.grid_sample(
        labels[None, None].float(), grid, mode="nearest", padding_mode="reflection", align_corners=False
    )
    return shown[0].round_().clamp_(0, 255).to(torch.uint8), ids[0, 0].to(torch.uint8)


def _regular(height: int, width: int) -> Tensor:
    """Return places (rows,columns,2) from the centre of the first pixel to that of the last."""
    along = [torch.linspace(1 / side - 1, 1 - 1 / side, -(-side // _GRID) + 1) for side in (height, width)]
    y, x = torch.meshgrid(*along, indexing="ij")
    return torch.stack([x, y], 2)
