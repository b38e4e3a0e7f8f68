"""Overlapping tiles of an image, each segmented by itself, of which the middles are put together."""

from __future__ import annotations

from dataclasses import dataclass

from vosops import _checks

__all__ = ["Tile", "cut_into_tiles"]


@dataclass(frozen=True)
class Tile:
    """Rows and columns of an image that are segmented by themselves, and those of them that count."""

    rows: range
    columns: range
    kept_rows: range
    kept_columns: range


def cut_into_tiles(size: tuple[int, int], tile: int, overlap: int, stride: int = 1) -> list[Tile]:
    """Cut an image of (height, width) into tiles, row by row.

    Args:
        size: (height, width).
        tile: Their greatest height and width; those on the right and at the bottom may be smaller.
        overlap: Rows and columns, at least, that neighbours share; half of them count in each one.
        stride: Tiles begin at multiples of it.

    Raises:
        ValueError, TypeError: A number is not positive (overlap may be 0), or tiles would not get on.

    >>> from vosops.models.tiles import cut_into_tiles
    >>> [(tile.columns, tile.kept_columns) for tile in cut_into_tiles((50, 100), 64, 16)]
    [(range(0, 64), range(0, 56)), (range(48, 100), range(56, 100))]
    """
    _checks.check_positive_int("tile", tile)
    if not isinstance(overlap, int) or isinstance(overlap, bool):
        raise TypeError(f"overlap must be an integer, got {type(overlap).__name__}")
    if overlap < 0:
        raise ValueError(f"overlap must be 0 or more, got {overlap}")
    if tile < stride:
        raise ValueError(f"tile must be at least {stride}, got {tile}")
    step = (tile - overlap) // stride * stride
    if step <= 0:
        raise ValueError(f"overlap must be at most {tile - stride} with tiles of {tile}, got {overlap}")
    rows, columns = (_along(side, tile, step) for side in size)
    return [Tile(r, c, kept_r, kept_c) for r, kept_r in rows for c, kept_c in columns]


def _along(side: int, tile: int, step: int) -> list[tuple[range, range]]:
    """Cut one side: what a tile sees, and what counts of it."""
    found = []
    kept, start = 0, 0
    while start + tile < side:
        stop = start + step + (tile - step) // 2
        found.append((range(start, start + tile), range(kept, stop)))
        kept, start = stop, start + step
    return [*found, (range(start, side), range(kept, side))]
