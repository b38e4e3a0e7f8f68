"""One allocation that holds the columns of several tables, and can change their capacities in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a column starts on a cache line, and on a multiple of every element size


class Column(NamedTuple):
    """A column of a table: `shape` and `dtype` of what a row has in it."""

    table: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """The column's name in the arena."""
        return f"{self.table}.{self.name}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Arena:
    """Columns in one uint8 tensor, each a dense (rows, *shape) array.

    `relayout` moves them in place, with nothing but `scratch` bytes at the start of the arena beside them, so that
    the arena never needs more than its size. Without a limit a larger arena is made when one is needed, and old and
    new exist side by side for the time of the copy. With a limit they never do: in pageable memory of the
    CPU, where untouched pages cost nothing, all of it is reserved at once; elsewhere what is needed, and to grow the
    contents go by way of such memory.
    """

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self.device = device
        self.pinned = pinned
        self.reserves_limit = device.type == "cpu" and not pinned
        self.free()

    def free(self) -> None:
        """Give everything back."""
        self._bytes = self._allocate(0)
        self._columns: dict[str, Column] = {}
        self._offsets: dict[str, int] = {}
        self._capacity: dict[str, int] = {}
        self._scratch = 0

    @property
    def size(self) -> int:
        """Allocated bytes."""
        return self._bytes.numel()

    def capacity(self, table: str) -> int:
        """Return how many rows the table has room for."""
        return self._capacity.get(table, 0)

    def row_bytes(self, table: str) -> int:
        """Return the bytes of one row of the table."""
        return sum(column.row_bytes for column in self._columns.values() if column.table == table)

    def columns(self, table: str) -> list[str]:
        """Return the names of the table's columns."""
        return [column.name for column in self._columns.values() if column.table == table]

    def view(self, table: str, name: str) -> Tensor:
        """Return the column as (capacity, *shape); writes reach the arena."""
        key = f"{table}.{name}"
        column, start = self._columns[key], self._offsets[key]
        rows = self._capacity[table]
        flat = self._bytes[start : start + rows * column.row_bytes]
        return flat.view(column.dtype).view(rows, *column.shape)

    def has(self, table: str, name: str) -> bool:
        """Return whether there is such a column."""
        return f"{table}.{name}" in self._columns

    @torch.no_grad()
    def relayout(
        self,
        columns: Sequence[Column],
        capacity: Mapping[str, int],
        used: Mapping[str, int],
        *,
        scratch: int,
        limit: int | None = None,
    ) -> None:
        """Take these columns with this many rows for each table, and keep the first `used` rows of each table.

        Columns must keep their order; new ones are 0 in their used rows. limit: the most bytes to allocate; ValueError
        where the layout needs more.
        """
        if list(columns) == list(self._columns.values()) and dict(capacity) == self._capacity:
            return
        offsets, need = _layout(columns, capacity, scratch)
        if limit is not None and need > limit:
            raise ValueError(f"limit must be at least {need}, got {limit}")
        old = self._columns, self._offsets
        kept = [column for column in columns if column.key in old[0]]
        moves = [(old[1][c.key], offsets[c.key], used.get(c.table, 0) * c.row_bytes) for c in kept]
        if need <= self.size and scratch == self._scratch:
            # A column that moves down is done before those above it, one that moves up before those below it.
            for source, target, count in moves:
                if target < source:
                    self._move(source, target, count)
            for source, target, count in reversed(moves):
                if target > source:
                    self._move(source, target, count)
        else:
            contents = [self._bytes[source : source + count] for source, _, count in moves]
            if limit is not None:
                contents = [piece.to("cpu", copy=True) for piece in contents]
                self._bytes = self._allocate(0)
            self._bytes = self._allocate(need if limit is None or not self.reserves_limit else limit)
            for (_, target, count), piece in zip(moves, contents, strict=True):
                self._bytes[target : target + count] = piece
        self._scratch = scratch
        self._columns = {column.key: column for column in columns}
        self._offsets, self._capacity = offsets, dict(capacity)
        for column in columns:
            if column.key not in old[0]:
                self.view(column.table, column.name)[: used.get(column.table, 0)] = 0

    @torch.no_grad()
    def keep_rows(self, table: str, survivors: Tensor) -> None:
        """Move the rows of these indices (ascending, int64) to the table's start, in place."""
        for name in self.columns(table):
            view = self.view(table, name)
            column = self._columns[f"{table}.{name}"]
            step = self._scratch // column.row_bytes
            for start in range(0, len(survivors), step):
                rows = survivors[start : start + step]
                piece = self._bytes[: len(rows) * column.row_bytes].view(column.dtype)
                piece = piece.view(len(rows), *column.shape)
                torch.index_select(view, 0, rows, out=piece)
                view[start : start + len(rows)] = piece

    def settle(self) -> None:
        """Wait for copies out of pinned memory that are still under way, before it is changed."""
        if self.pinned and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _allocate(self, size: int) -> Tensor:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            pinned = self.pinned and torch.cuda.is_available()
            return torch.empty(size, dtype=torch.uint8, device=self.device, pin_memory=pinned)

    def _move(self, source: int, target: int, count: int) -> None:
        """Like memmove, within the arena, through the scratch bytes where the pieces would be tiny."""
        distance = abs(target - source)
        step = max(distance, self._scratch)
        starts = range(0, count, step)
        for start in starts if target < source else reversed(starts):
            stop = min(start + step, count)
            piece = self._bytes[source + start : source + stop]
            if distance < step:
                self._bytes[: stop - start] = piece
                piece = self._bytes[: stop - start]
            self._bytes[target + start : target + stop] = piece


def layout_bytes(columns: Sequence[Column], capacity: Mapping[str, int], scratch: int) -> int:
    """Return the bytes that an arena needs for these columns."""
    return _layout(columns, capacity, scratch)[1]


def largest(fits: Callable[[int], bool], bound: int) -> int:
    """Return the largest integer from 0 to `bound` that fits, where all below one that fits do; -1 if 0 does not."""
    low, high = -1, bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _layout(
    columns: Sequence[Column], capacity: Mapping[str, int], scratch: int
) -> tuple[dict[str, int], int]:
    """Return where each column starts, and where the last one ends."""
    offsets, end = {}, scratch
    for column in columns:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        offsets[column.key] = start
        end = start + capacity.get(column.table, 0) * column.row_bytes
    return offsets, end
