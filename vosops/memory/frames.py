"""The frames in a table: which lies where, and moving them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vosops.memory.arena import Arena
from vosops.memory.plan import WORK
from vosops.memory.reader import Rows


@dataclass
class StoredFrame:
    """A frame in a memory bank.

    frame: its number in the video. permanent: never evicted. temporary: dropped by the next `add`. groups: the
    object groups that see it. serial: how many frames were added before it.
    """

    frame: int
    permanent: bool
    temporary: bool
    groups: list[int]
    serial: int


class Frames:
    """The table "work" of an arena, `pixels` rows for each frame, without gaps; `slots[i]` tells of the i-th."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.slots: list[StoredFrame] = []
        self.pixels = 0

    @property
    def used(self) -> int:
        """Used rows."""
        return len(self.slots) * self.pixels

    def rows(self, index: int) -> Rows:
        """Return the rows of a frame."""
        return Rows(self.arena, WORK, index * self.pixels, (index + 1) * self.pixels)

    def all(self) -> Rows:
        """Return the rows of all frames."""
        return Rows(self.arena, WORK, 0, self.used)

    def find(self, frame: int) -> int | None:
        """Return the index of the frame of this number."""
        return next((i for i, slot in enumerate(self.slots) if slot.frame == frame), None)

    def oldest(self) -> int | None:
        """Return the index of the oldest frame that is neither permanent nor temporary."""
        evictable = [i for i, slot in enumerate(self.slots) if not (slot.permanent or slot.temporary)]
        return min(evictable, key=lambda i: self.slots[i].serial, default=None)

    def count(self, *, permanent: bool = False) -> int:
        """Return how many frames are permanent, or neither permanent nor temporary."""
        if permanent:
            return sum(slot.permanent for slot in self.slots)
        return sum(not (slot.permanent or slot.temporary) for slot in self.slots)

    def append(self, slot: StoredFrame, source: Rows | None = None) -> int:
        """Add a frame, a copy of `source` or all zeros; its index. Columns that source lacks are 0."""
        self.arena.settle()
        self.slots.append(slot)
        index = len(self.slots) - 1
        rows = self.rows(index)
        for name in self.arena.columns(WORK):
            if source is not None and source.has(name):
                rows.column(name).copy_(source.column(name))
            else:
                rows.column(name).zero_()
        return index

    def remove(self, index: int) -> StoredFrame:
        """Take a frame out; the last one moves to its place."""
        last = len(self.slots) - 1
        if index != last:
            self.arena.settle()
            for name in self.arena.columns(WORK):
                self.rows(index).column(name).copy_(self.rows(last).column(name))
        removed = self.slots[index]
        self.slots[index] = self.slots[last]
        self.slots.pop()
        return removed

    def remove_oldest(self) -> None:
        """Take out the frame that came first; a permanent or temporary one only where there is no other."""
        index = self.oldest()
        self.remove(0 if index is None else index)

    def remove_if(self, indices: Iterable[int]) -> None:
        """Take these frames out."""
        for index in sorted(indices, reverse=True):
            self.remove(index)

    def state(self) -> list[dict[str, Any]]:
        """Return the slots as plain data."""
        return [asdict(slot) for slot in self.slots]

    def contents(self) -> dict[str, Tensor]:
        """Return a copy of all columns' used rows."""
        return self.all().contents()
