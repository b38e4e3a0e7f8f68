"""The colour guided filter: brings coarse maps to the edges of an image.

He, Sun, Tang: "Guided Image Filtering" (2010) and "Fast Guided Filter" (2015). In every window of the image the
output is an affine function of its three colours, fitted to the values by ridge regression; a pixel takes the mean
of the functions of the windows that hold it. What depends on the image alone is computed once for all maps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["GuidedFilter", "box_mean", "guided_filter"]

# The upper triangle of the symmetric 3x3 matrix of colour products, in the order in which it is stored.
_ROWS = (0, 0, 0, 1, 1, 2)
_COLUMNS = (0, 1, 2, 1, 2, 2)


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Return the mean over windows of (2 radius + 1)^2 pixels, of those inside the image.

    x: (..., H, W) floating; returns the same shape. About 2 log2(radius) additions per pixel and axis, whatever the
    radius, and no running sums that lose precision along the image.
    """
    return _axis_mean(_axis_mean(x, radius, -1), radius, -2)


def _axis_mean(x: Tensor, radius: int, axis: int) -> Tensor:
    if radius == 0:
        return x
    size = x.shape[axis]
    padding = (radius, radius) if axis == -1 else (0, 0, radius, radius)
    run = functional.pad(x, padding)  # run[i] is the sum of `length` padded values from i on
    length = 1
    window = 2 * radius + 1
    parts: Tensor | None = None
    offset = 0  # where the next part of the window starts
    while True:
        if window & length:
            part = run.narrow(axis, offset, size)
            parts = part.clone() if parts is None else parts.add_(part)
            offset += length
        if 2 * length > window:
            break
        count = run.shape[axis] - length
        run = run.narrow(axis, 0, count) + run.narrow(axis, length, count)
        length *= 2
    assert parts is not None
    position = torch.arange(size, device=x.device)
    inside = (position + radius).clamp(max=size - 1) - (position - radius).clamp(min=0) + 1
    scale = inside.to(x.dtype).reciprocal()
    return parts.mul_(scale if axis == -1 else scale[:, None])


class GuidedFilter:
    """The filter of one image, for any number of maps.

    guide: (3,H,W) float32 or float64 in [0, 1]. radius: of the windows, in pixels of the guide. eps: the
    regularisation, in squared intensity: edges of a variance well below it are smoothed over. Raises ``ValueError``
    for another shape, a negative radius or an eps that is not positive. Time and memory are O(HW).
    """

    def __init__(self, guide: Tensor, radius: int, eps: float) -> None:
        if guide.ndim != 3 or guide.shape[0] != 3:
            raise ValueError(f"guide must be (3,H,W), got {tuple(guide.shape)}")
        if radius < 0:
            raise ValueError(f"radius must be >= 0, got {radius}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.guide = guide
        self.radius = radius
        self.mean = box_mean(guide, radius)
        products = torch.stack([guide[i] * guide[j] for i, j in zip(_ROWS, _COLUMNS, strict=True)])
        covariance = box_mean(products, radius)
        for k, (i, j) in enumerate(zip(_ROWS, _COLUMNS, strict=True)):
            covariance[k].addcmul_(self.mean[i], self.mean[j], value=-1)
            if i == j:
                covariance[k].add_(eps)
        self.inverse = _inverse(covariance)

    def coefficients(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """values (O,H,W) -> slopes (O,3,H,W), offsets (O,H,W), such that the output is slopes . guide + offsets."""
        if values.ndim != 3 or values.shape[1:] != self.guide.shape[1:]:
            raise ValueError(
                f"values must be (O,H,W) of the guide's size {tuple(self.guide.shape[1:])}, "
                f"got {tuple(values.shape)}"
            )
        moments = box_mean(torch.cat([values[:, None], values[:, None] * self.guide], 1), self.radius)
        mean, cross = moments[:, 0], moments[:, 1:]
        covariance = cross.addcmul_(mean[:, None], self.mean, value=-1)
        c0, c1, c2 = covariance.unbind(1)
        i00, i01, i02, i11, i12, i22 = self.inverse.unbind(0)
        fit = torch.empty(values.shape[0], 4, *values.shape[1:], dtype=values.dtype, device=values.device)
        fit[:, 0] = i00 * c0 + i01 * c1 + i02 * c2
        fit[:, 1] = i01 * c0 + i11 * c1 + i12 * c2
        fit[:, 2] = i02 * c0 + i12 * c1 + i22 * c2
        fit[:, 3] = mean - (fit[:, :3] * self.mean).sum(1)
        fit = box_mean(fit, self.radius)
        return fit[:, :3], fit[:, 3]

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values (O,H,W), which may leave their range by a little at strong edges."""
        slopes, offsets = self.coefficients(values)
        return apply_coefficients(slopes, offsets, self.guide)


def apply_coefficients(slopes: Tensor, offsets: Tensor, guide: Tensor) -> Tensor:
    """slopes (O,3,h,w), offsets (O,h,w), guide (3,H,W) -> (O,H,W); enlarges the coefficients to the guide's size."""
    fit = torch.cat([slopes, offsets[:, None]], 1)
    if fit.shape[2:] != guide.shape[1:]:
        fit = functional.interpolate(fit, guide.shape[1:], mode="bilinear", align_corners=False)
    return (
        torch.addcmul(fit[:, 3], fit[:, 0], guide[0])
        .addcmul_(fit[:, 1], guide[1])
        .addcmul_(fit[:, 2], guide[2])
    )


def guided_filter(guide: Tensor, values: Tensor, radius: int = 4, eps: float = 1e-3) -> Tensor:
    """Filter values (O,H,W) by guide (3,H,W) in [0, 1] -> (O,H,W). See :class:`GuidedFilter`."""
    return GuidedFilter(guide, radius, eps)(values)


def _inverse(m: Tensor) -> Tensor:
    """Return the inverse of symmetric 3x3 matrices, (6,H,W) upper triangles, by cofactors."""
    m00, m01, m02, m11, m12, m22 = m.unbind(0)
    inverse = torch.stack(
        [
            m11 * m22 - m12 * m12,
            m02 * m12 - m01 * m22,
            m01 * m12 - m02 * m11,
            m00 * m22 - m02 * m02,
            m01 * m02 - m00 * m12,
            m00 * m11 - m01 * m01,
        ]
    )
    determinant = m00 * inverse[0] + m01 * inverse[1] + m02 * inverse[2]
    return inverse.div_(determinant)
