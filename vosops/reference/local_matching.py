"""Local matching in plain PyTorch: a running minimum over the shifts of the window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vosops.reference._matching import finish_distance, object_masks


def local_matching_core(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    radius: Sequence[int],
    dilation: int,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Raw squared distance and flat index of the best key pixel for each object and radius.

    query, key (N,C,H,W); mask bool (N,O,H,W); radius ascending -> distance and int64 index (N,O,R,H,W),
    +inf and -1 where there is no such pixel. Differentiable to any order through the distance.
    """
    batch, _, height, width = query.shape
    objects = mask.shape[1]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k = query.to(accumulate), key.to(accumulate)
    matched, usable = (side.isfinite().all(1, keepdim=True) for side in (q, k))
    q, k, mask = torch.where(matched, q, 0), torch.where(usable, k, 0), mask & usable
    reach = radius[-1] // dilation * dilation
    # best[i]: the best within the ring between radius i - 1 and radius i.
    best = [q.new_full((batch, objects, height, width), torch.inf) for _ in radius]
    index = [torch.full_like(best[0], -1, dtype=torch.int64) for _ in radius]
    for dy in range(-reach, reach + 1, dilation):
        rows = slice(max(0, -dy), min(height, height - dy))
        for dx in range(-reach, reach + 1, dilation):
            columns = slice(max(0, -dx), min(width, width - dx))
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            shifted_rows = slice(rows.start + dy, rows.stop + dy)
            shifted_columns = slice(columns.start + dx, columns.stop + dx)
            difference = q[:, :, rows, columns] - k[:, :, shifted_rows, shifted_columns]
            candidate = difference.square().sum(1, keepdim=True)
            ring = next(i for i, r in enumerate(radius) if max(abs(dy), abs(dx)) <= r)
            current = best[ring][:, :, rows, columns]
            allowed = mask[:, :, shifted_rows, shifted_columns] & matched[:, :, rows, columns]
            closer = allowed & (candidate < current)
            y = torch.arange(shifted_rows.start, shifted_rows.stop, device=query.device)
            x = torch.arange(shifted_columns.start, shifted_columns.stop, device=query.device)
            flat = y[:, None] * width + x
            updated = torch.where(closer, candidate, current)
            best[ring] = best[ring].slice_scatter(
                best[ring][:, :, rows].slice_scatter(updated, 3, columns.start, columns.stop),
                2,
                rows.start,
                rows.stop,
            )
            index[ring][:, :, rows, columns] = torch.where(closer, flat, index[ring][:, :, rows, columns])
    for i in range(1, len(radius)):
        earlier = (index[i - 1] >= 0) & (index[i - 1] < index[i])
        inner = (best[i - 1] < best[i]) | ((best[i - 1] == best[i]) & earlier)
        best[i] = torch.where(inner, best[i - 1], best[i])
        index[i] = torch.where(inner, index[i - 1], index[i])
    return absent_queries(torch.stack(best, 2), torch.stack(index, 2), query, query_mask)


def absent_queries(
    distance: Tensor, index: Tensor, query: Tensor, query_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Give NaN to query pixels with a NaN channel, +inf and -1 to those outside `query_mask`."""
    undefined = query.isnan().any(1)[:, None, None]
    distance = torch.where(undefined, torch.nan, distance)
    index = torch.where(undefined, -1, index)
    if query_mask is not None:
        skipped = ~query_mask[:, None, None]
        distance = torch.where(skipped, torch.inf, distance)
        index = torch.where(skipped, -1, index)
    return distance, index


def local_matching(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    *,
    radius: int | Sequence[int] = 15,
    dilation: int = 1,
    bias: Tensor | None = None,
    normalize: bool = True,
    num_objects: int | None = None,
    query_mask: Tensor | None = None,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vosops.local_matching` in plain PyTorch; see there. Time and memory grow with the window."""
    radii = (radius,) if isinstance(radius, int) else tuple(radius)
    masks = object_masks(mask, num_objects)
    distance, index = local_matching_core(query, key, masks, radii, dilation, query_mask)
    if isinstance(radius, int):
        distance, index = distance.squeeze(2), index.squeeze(2)
    distance = finish_distance(distance, bias, normalize)
    return (distance, index) if return_indices else distance
