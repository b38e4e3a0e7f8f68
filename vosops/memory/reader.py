"""Reads over the tables of a bank: in place, or in pieces where something must be staged first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vosops.memory.arena import Arena
from vosops.memory.plan import FLOATS, STAGE
from vosops.ops import MemoryWeights, memory_gather, memory_read, memory_select, merge_reads
from vosops.ops.memory_read import usage_under

_SCORED = ("key", "shrinkage")  # the columns that make a row's score


@dataclass(frozen=True)
class Rows:
    """The rows from `start` up to `stop` of a table."""

    arena: Arena
    table: str
    start: int
    stop: int

    def column(self, name: str) -> Tensor:
        """Return these rows of a column, (rows, *shape)."""
        return self.arena.view(self.table, name)[self.start : self.stop]

    def has(self, name: str) -> bool:
        """Return whether the table has this column."""
        return self.arena.has(self.table, name)

    def contents(self) -> dict[str, Tensor]:
        """Return a copy of all columns."""
        names = self.arena.columns(self.table) if len(self) else []
        return {name: self.column(name).clone() for name in names}

    def fill(self, contents: Mapping[str, Tensor]) -> None:
        """Write columns by their names."""
        for name, rows in contents.items():
            self.column(name).copy_(rows)

    def __len__(self) -> int:
        return self.stop - self.start


class Query(NamedTuple):
    """What is asked of the memory: key and selection (1,Ck,*Q)."""

    key: Tensor
    selection: Tensor | None


class View(NamedTuple):
    """What groups of objects read in one pass: group i all parts from number firsts[i] on.

    mask names the column that says which rows count, for a view of a single group; None: all of them. defined: whether
    a full read of a single group leaves out rows with a NaN, of which one would make all that is read NaN.
    """

    groups: tuple[int, ...]
    parts: list[Rows]
    firsts: tuple[int, ...]
    mask: str | None
    defined: bool = False


def defined(rows: Rows, columns: Sequence[str]) -> Tensor:
    """(rows,) bool: which have no NaN in these columns, of those that there are."""
    present = [rows.column(name) for name in columns if rows.has(name)]
    return torch.stack([~column.isnan().view(len(rows), -1).any(1) for column in present]).all(0)


class Reader:
    """Reads what a bank stores.

    `arena` is the bank's own, on the device of the queries. Rows of another device are copied into its stage
    first, quantised values dequantised, a piece at a time. `mask` in all methods names the column that says which
    rows count; None: all of them.
    """

    def __init__(self, arena: Arena, similarity: str, scale: float | None, quantised: bool) -> None:
        self.arena = arena
        self.similarity = similarity
        self.scale = scale
        self.quantised = quantised
        self.far_host = arena.device.type != "cpu"  # whether another arena's rows must be copied to be read

    def shares(self, has_host: bool, top_k: int | None) -> bool:
        """Return whether several groups can read in one pass: where nothing must be staged or dequantised for it."""
        return not (self.far_host and has_host) and not (self.quantised and top_k is None)

    def full(self, query: Query, view: View, objects: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Return each group's objects' values under the softmax over all rows it sees (1,O,Cv,*Q), and lse (1,*Q)."""
        if len(view.groups) > 1:
            values = [[self._values(part, some) for part in view.parts] for some in objects]
            reads: list[tuple[Tensor, Tensor]] = self._read(
                query, view.parts, None, values, groups=_ranges(view), return_lse=True
            )
            return reads
        parts, some = view.parts, objects[0]

        def read(rows: Sequence[Rows]) -> tuple[Tensor, Tensor]:
            values = [self._values(part, some) for part in rows]
            wanted: dict[str, Any] = {"return_lse": True}
            if view.defined:
                wanted["valid"] = [
                    defined(part, _SCORED)[None] & ~value.isnan().flatten(1, 2).any(1)
                    for part, value in zip(rows, values, strict=True)
                ]
            out, lse = self._read(query, rows, view.mask, values, **wanted)
            return out, lse

        whole = [part for part in parts if self._in_place(part)]
        merged = read(whole) if whole else None
        for _, piece in self._pieces([part for part in parts if part not in whole], len(some)):
            latest = read([piece])
            merged = latest if merged is None else merge_reads(*zip(merged, latest, strict=True))
        assert merged is not None
        return [merged]

    def average(self, query: Query, parts: Sequence[Rows], column: str) -> tuple[Tensor, Tensor]:
        """Return a column of scalars under the softmax over all rows without a NaN (1,1,*Q), and the lse (1,*Q).

        The rows must be near.
        """
        values = [part.column(column)[None, None] for part in parts]
        valid = [defined(part, (*_SCORED, column))[None] for part in parts]
        out, lse = self._read(query, parts, None, values, valid=valid, return_lse=True)
        return out, lse

    def usage(
        self, query: Query, parts: Sequence[Rows], mask: str | None, lse: Tensor | None = None
    ) -> list[Tensor]:
        """For each part, which must be near, the weight of its rows summed over the queries: (rows,) float32.

        lse: (1,P) over all rows, where there are others than these.
        """
        keys = [part.column("key").T[None] for part in parts]
        if lse is not None:
            of_parts = usage_under(lse, query.key, keys, **self._options(query, parts, mask))
        else:
            _, of_parts = self._read(query, parts, mask, [key[:, :1] for key in keys], return_usage=True)
        return [part[0] for part in of_parts]

    def usage_of_chosen(self, chosen: MemoryWeights, parts: Sequence[Rows], lse: Tensor) -> list[Tensor]:
        """For each part the weights of its chosen rows summed over the queries: (rows,) float32; lse as of `usage`."""
        share = (chosen.lse.flatten(1) - lse).exp()
        weights = chosen.weights.flatten(2) * share[:, None]
        sizes = [len(part) for part in parts]
        counted = (chosen.indices.flatten(2) >= 0) & ~weights.isnan()
        sums = weights.new_zeros(sum(sizes) + 1)  # the last place takes what counts nowhere
        places = torch.where(counted, chosen.indices.flatten(2).long(), sum(sizes))
        sums = sums.scatter_add(0, places.flatten(), torch.where(counted, weights, 0).flatten())
        return list(sums[:-1].split(sizes))

    def select(
        self, query: Query, view: View, top_k: int, usage: bool
    ) -> tuple[list[MemoryWeights], list[Tensor] | None]:
        """Return the best rows of each group for each query, counted through the parts that it sees.

        With usage also that of these parts by the first group's read.
        """
        parts = view.parts
        near = [part for part in parts if self._is_near(part)]
        if near == parts:
            ranges = _ranges(view)
            options = self._options(query, near, view.mask)
            if len(ranges) > 1:
                del options["valid"]
                options["groups"] = ranges
            keys = [part.column("key").T[None] for part in near]
            results: Any = memory_select(query.key, keys, top_k, return_usage=usage, **options)
            results = results if len(ranges) > 1 else [results]
            best = [result[0] for result in results] if usage else results
            chosen = [_shifted(found, -start) for found, (start, _) in zip(best, ranges, strict=True)]
            used = [part[0] for part in results[0][1][view.firsts[0] :]] if usage else None
            return chosen, used
        found, offset = [], 0
        for part in parts:
            for start, piece in self._pieces([part], 1) if part not in near else [(0, part)]:
                (best_of_piece,), _ = self.select(query, view._replace(parts=[piece]), top_k, False)
                found.append(_shifted(best_of_piece, offset + start))
            offset += len(part)
        return [_best_of(found, top_k)], None

    def gather(self, chosen: MemoryWeights, parts: Sequence[Rows], objects: Sequence[int]) -> Tensor:
        """Return the objects' values at the chosen rows of all parts -> (1,O,Cv,*Q)."""
        outs = []
        for o in objects:
            if all(self._in_place(part) for part in parts):
                outs.append(memory_gather(chosen, [self._values(part, [o])[:, 0] for part in parts]))
                continue
            total = None
            for start, piece in self._pieces(parts, 1):
                inside = (chosen.indices >= start) & (chosen.indices < start + len(piece))
                local = chosen._replace(indices=torch.where(inside, chosen.indices - start, -1))
                out = memory_gather(local, self._values(piece, [o])[:, 0])
                total = out if total is None else total + out
            assert total is not None
            outs.append(total)
        return torch.stack(outs, 1)

    def _read(
        self, query: Query, parts: Sequence[Rows], mask: str | None, values: list[Any], **wanted: Any
    ) -> Any:
        keys = [part.column("key").T[None] for part in parts]
        options = self._options(query, parts, mask) | wanted
        if "groups" in wanted:
            del options["valid"]
        return memory_read(query.key, keys, values, **options)

    def _options(self, query: Query, parts: Sequence[Rows], mask: str | None) -> dict[str, Any]:
        shrinkage = [part.column("shrinkage")[None, None] for part in parts if part.has("shrinkage")]
        return {
            "similarity": self.similarity,
            "scale": self.scale,
            "selection": query.selection,
            "shrinkage": shrinkage or None,
            "valid": None if mask is None else [part.column(mask)[None] for part in parts],
        }

    def _values(self, rows: Rows, objects: Sequence[int]) -> Any:
        """Return the objects' values as memory_read takes them: (1,1,Cv,rows), or a sequence over several objects."""
        if self.quantised:
            count = len(rows)
            floats = self.arena.view(FLOATS, "value")
            for i, o in enumerate(objects):
                target = floats[i * count : (i + 1) * count]
                target.copy_(rows.column(f"value/{o}"))
                target.mul_(rows.column(f"scale/{o}")[:, None])
            return floats[: len(objects) * count].view(len(objects), count, -1).transpose(1, 2)[None]
        values = [rows.column(f"value/{o}").T[None] for o in objects]
        return values if len(values) > 1 else values[0][:, None]

    def _is_near(self, rows: Rows) -> bool:
        return rows.arena is self.arena or not self.far_host

    def _in_place(self, rows: Rows) -> bool:
        return self._is_near(rows) and not self.quantised

    def _pieces(self, parts: Sequence[Rows], objects: int) -> Iterator[tuple[int, Rows]]:
        """Yield the parts in pieces whose keys are on the device, small enough to dequantise that many objects' values.

        With each the number of rows before it. A piece is good until the next one is asked for.
        """
        offset = 0
        for part in parts:
            size = max(len(part), 1)
            if self.quantised:
                size = min(size, self.arena.capacity(FLOATS) // objects)
            if not self._is_near(part):
                size = min(size, self.arena.capacity(STAGE))
            for start in range(part.start, part.stop, size):
                piece = Rows(part.arena, part.table, start, min(start + size, part.stop))
                yield offset + start - part.start, piece if self._is_near(part) else self._staged(piece)
            offset += len(part)

    def _staged(self, rows: Rows) -> Rows:
        staged = Rows(self.arena, STAGE, 0, len(rows))
        for name in self.arena.columns(STAGE):
            staged.column(name).copy_(rows.column(name), non_blocking=True)
        return staged


def _ranges(view: View) -> list[tuple[int, int]]:
    """Return the rows that each group of a view sees, counted through its parts."""
    sizes = [len(part) for part in view.parts]
    return [(sum(sizes[:first]), sum(sizes)) for first in view.firsts]


def _shifted(chosen: MemoryWeights, rows: int) -> MemoryWeights:
    """Return the same rows, counted from `rows` further back."""
    if rows == 0:
        return chosen
    return chosen._replace(indices=torch.where(chosen.indices >= 0, chosen.indices + rows, -1))


def _best_of(selections: Sequence[MemoryWeights], top_k: int) -> MemoryWeights:
    """Return the best of selections from different rows, as one selection from all of them makes it."""
    scores = torch.cat([chosen.weights.log() + chosen.lse[:, None] for chosen in selections], 1)
    indices = torch.cat([chosen.indices for chosen in selections], 1)
    scores = torch.where(indices >= 0, scores, -torch.inf)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :top_k]
    scores, indices = scores.gather(1, order), indices.gather(1, order)
    lse = scores.logsumexp(1)
    weights = torch.where(indices >= 0, (scores - lse[:, None]).exp(), 0)
    undefined = torch.stack([chosen.lse for chosen in selections]).isnan().any(0)  # query pixels that are NaN
    weights, lse = weights.masked_fill(undefined[:, None], torch.nan), lse.masked_fill(undefined, torch.nan)
    return MemoryWeights(indices, weights, lse)
