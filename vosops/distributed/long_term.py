"""Long-term memory over the ranks of a group: the prototypes of one bank, each stored by one rank."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vosops.distributed.exchange import Exchange
from vosops.distributed.ranks import Ranks, check_served
from vosops.memory import MemoryBank, MemorySettings
from vosops.memory.bank import NEW_LIFE, store_values, usage_of
from vosops.memory.plan import LONG, WORK, Geometry, Plan
from vosops.memory.reader import Query, Rows, View

_NO_GEOMETRY = [0] * 6


@dataclass
class Entry:
    """A frame that some rank stores."""

    frame: int
    rank: int
    permanent: bool
    temporary: bool

    @property
    def passing(self) -> bool:
        """Whether the policy makes it go in the end."""
        return not (self.permanent or self.temporary)


class Room(NamedTuple):
    """What each rank has room for, known to all of them."""

    places: list[int]  # frames beside the permanent ones
    temporary: list[int]  # of these places, the one that is kept for a temporary frame
    prototypes: list[int]
    laid_out: list[int]  # prototypes, as the storage is now

    @property
    def frames(self) -> list[int]:
        """How many frames each rank keeps until they are condensed."""
        return [
            max(all_of_them - one, 0) for all_of_them, one in zip(self.places, self.temporary, strict=True)
        ]

    def most_frames(self, settings: MemorySettings) -> int:
        """Return how many frames come together, on all ranks, before they are condensed."""
        return min(settings.max_mid_term_frames - 1, max(sum(self.frames), 1))


class LongTermMemory(MemoryBank):
    """What a `ShardedMemoryBank` does with the policy "long_term", which needs all ranks at once.

    Every rank knows the usage of every position that is condensed or may be evicted, and so makes the same choice as
    one bank would. The positions that are chosen are sent to all, each rank reads its own frames with them, and the
    reads are merged. What a prototype becomes is stored by the rank that has the least bytes and room for it.
    Prototypes are numbered in the order in which one bank would have them.
    """

    _serials: Tensor  # the numbers of this rank's prototypes, ascending
    _prototypes: list[int]  # how many each rank has
    _next_serial: int

    def __init__(
        self,
        settings: MemorySettings | None,
        group: dist.ProcessGroup | None,
        timeout: float | None,
        device: str | torch.device,
        **options: Any,
    ) -> None:
        super().__init__(settings, device=device, **options)
        self.exchange = Exchange(group, timeout)
        check_served(self.exchange, "device must be", self.device)
        self._ranks = Ranks(self.exchange)
        self._entries: list[Entry] = []
        self._bytes = [0] * self.exchange.size
        self._reset_prototypes()

    @property
    def _is_long_term(self) -> bool:
        return self.settings.policy == "long_term"

    # ---- What the ranks must agree on before anything moves.

    def _common_geometry(self, mine: Geometry | None) -> Geometry | None:
        """Return the geometry of the frames, which some rank knows."""
        numbers = _NO_GEOMETRY if mine is None else [*mine.size, *map(int, mine[1:])]
        for each in self.exchange.numbers(numbers, self.device):
            if each != _NO_GEOMETRY:
                height, width, key_channels, value_channels, shrinkage, selection = each
                size = (height, width)
                return Geometry(size, key_channels, value_channels, bool(shrinkage), bool(selection))
        return None

    def _common_room(self, plan: Plan, permanent: int, temporary: bool) -> Room:
        """Return what every rank has room for by its plan."""
        numbers = [plan.frames - permanent, int(temporary), plan.elements, self._arena.capacity(LONG)]
        every = self.exchange.numbers(numbers, self.device)
        return Room(*([each[i] for each in every] for i in range(len(numbers))))

    def _make_room_together(self, room: Room, coming: Entry | None, passing: Sequence[Entry]) -> None:
        """Condense and evict what leaves no room for a frame, or for what is there under another budget.

        passing: the frames that the policy counts, without the one that comes.
        """
        more = int(coming is not None and coming.passing)
        counts = [sum(e.rank == rank for e in passing) for rank in range(self.exchange.size)]
        if coming is not None and more:
            counts[coming.rank] += 1
        if sum(room.laid_out) and sum(room.prototypes):
            most = room.most_frames(self.settings)
            crowded = any(count > free for count, free in zip(counts, room.frames, strict=True))
            if len(passing) > most - more or crowded:
                keep = min(self.settings.min_mid_term_frames, most) - 1
                self._condense_together(passing, keep, room.laid_out)
        self._evict_together(self._most_prototypes(room.prototypes))

    def _condense_when_due(self, room: Room) -> None:
        """Condense the older frames once enough have come together."""
        passing = [entry for entry in self._entries if entry.passing]
        if sum(room.prototypes) and len(passing) >= room.most_frames(self.settings):
            self._condense_together(passing, self.settings.min_mid_term_frames - 1, room.prototypes)

    def _most_prototypes(self, room: Sequence[int]) -> int:
        return min(self.settings.max_long_term_elements, sum(room))

    # ---- Condensing and evicting, which every rank does at the same time.

    def _condense_together(self, passing: Sequence[Entry], keep: int, room: Sequence[int]) -> None:
        """Turn these frames but for the last `keep` into prototypes; room: for how many each rank has a place."""
        old = passing[: max(len(passing) - keep, 0)]
        if not old:
            return
        assert self._geometry is not None
        pixels, rank = self._geometry.pixels, self.exchange.rank
        mine = [index for e in old if e.rank == rank and (index := self._work.find(e.frame)) is not None]
        most = self._most_prototypes(room)
        usage = self._usage_together(old, mine)
        count = min(self.settings.num_prototypes, len(usage), most)
        chosen = torch.sort(usage, descending=True, stable=True).indices[:count]
        columns = self._columns_of(old, mine, chosen)
        averages, values = self._averages(columns, mine)
        if sum(self._prototypes) >= most - count:
            self._evict_together(max(most - count - self.settings.buffer_tokens, 0))

        frame_bytes, row_bytes = pixels * self._arena.row_bytes(WORK), self._arena.row_bytes(LONG)
        self._work.remove_if(mine)
        for entry in old:
            self._bytes[entry.rank] -= frame_bytes
        gone = {entry.frame for entry in old}
        self._entries = [entry for entry in self._entries if entry.frame not in gone]
        owners = []
        for _ in range(count):
            free = [r for r, have in enumerate(self._prototypes) if have < room[r]]
            owners.append(min(free, key=lambda r: (self._bytes[r], r)))
            self._bytes[owners[-1]] += row_bytes
            self._prototypes[owners[-1]] += 1
        here = torch.tensor([i for i, owner in enumerate(owners) if owner == rank], dtype=torch.int64)
        here = here.to(self.device)
        rows = Rows(self._arena, LONG, self._elements, self._elements + len(here))
        for name, column in columns.items():
            if rows.has(name):
                rows.column(name).copy_(column[here])
        if averages is not None:
            rows.column("shrinkage").copy_(averages[here])
        rows.column("usage").zero_()
        rows.column("life").fill_(NEW_LIFE)
        for group, members in self._groups.items():
            sees = columns[f"mask/{group}"][:, None]
            for o in members:
                store_values(torch.where(sees, values[o], 0)[here], rows, o)
        self._serials = torch.cat([self._serials, here + self._next_serial])
        self._next_serial += count
        self._elements += len(here)
        self._count_seen()

    def _usage_together(self, old: Sequence[Entry], mine: Sequence[int]) -> Tensor:
        """Return the usage of all positions of these frames, of which those at the indices `mine` are here."""
        assert self._geometry is not None
        pixels, size = self._geometry.pixels, self.exchange.size
        counts = [sum(entry.rank == rank for entry in old) for rank in range(size)]
        padded = torch.zeros(max(counts), pixels, device=self.device)
        for i, index in enumerate(mine):
            padded[i] = usage_of(self._work.rows(index))
        (every,) = self.exchange.gather([padded.flatten()], [size * padded.numel()])
        of_ranks = every.view(size, max(counts), pixels)
        following = [iter(of_rank) for of_rank in of_ranks]
        return torch.cat([next(following[entry.rank]) for entry in old])

    def _columns_of(self, old: Sequence[Entry], mine: Sequence[int], chosen: Tensor) -> dict[str, Tensor]:
        """Return key, selection and masks, (count, ...), of the chosen positions of these frames, whoever has them."""
        assert self._geometry is not None
        pixels, rank = self._geometry.pixels, self.exchange.rank
        following = iter(mine)
        starts = [next(following) * pixels if entry.rank == rank else 0 for entry in old]
        owner = torch.tensor([entry.rank for entry in old], device=self.device)[chosen // pixels]
        rows = torch.tensor(starts, device=self.device)[chosen // pixels] + chosen % pixels
        here = (owner == rank).nonzero().flatten()
        names = ["key", *(["selection"] if self._arena.has(WORK, "selection") else [])]
        names += [f"mask/{group}" for group in self._groups]
        parts = []
        for name in names:
            column = self._arena.view(WORK, name)
            part = column.new_zeros(len(chosen), column.shape[1] if column.dim() > 1 else 1)
            part[here] = column[rows[here]].view(len(here), part.shape[1])
            parts.append(part.T.contiguous())
        every = self.exchange.gather(parts, [len(chosen) * self.exchange.size] * len(parts))
        places = owner * len(chosen) + torch.arange(len(chosen), device=self.device)
        picked = [each[:, places].T for each in every]
        return {
            name: each if name in ("key", "selection") else each[:, 0]
            for name, each in zip(names, picked, strict=True)
        }

    def _averages(
        self, columns: Mapping[str, Tensor], mine: Sequence[int]
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Return shrinkage (count,) and each object's values (count,Cv) of the prototypes, over all ranks."""
        selection = columns["selection"].T[None].float() if "selection" in columns else None
        query = Query(columns["key"].T[None].float(), selection)
        count, parts = len(columns["key"]), [self._work.rows(index) for index in mine]
        lse = torch.full((1, count), -torch.inf, device=self.device)
        reads: list[tuple[Tensor, Tensor]] = []
        has_shrinkage = self._arena.has(WORK, "shrinkage")
        if has_shrinkage:
            nothing = torch.zeros(1, 1, 1, count, device=self.device)
            average, of_average = self._reader.average(query, parts, "shrinkage") if parts else (nothing, lse)
            reads.append((average.view(1, 1, 1, count), of_average))
        assert self._geometry is not None
        dtype = torch.float32 if self.settings.dtype == torch.int8 else self.settings.dtype
        shape = (1, 1, self._geometry.value_channels, count)
        for group, members in self._groups.items():
            seen = [part for i, part in zip(mine, parts, strict=True) if group in self._work.slots[i].groups]
            view = View((group,), seen, (0,), None, True)
            for o in members:
                nothing = torch.zeros(shape, dtype=dtype, device=self.device)
                reads.append(self._reader.full(query, view, [[o]])[0] if seen else (nothing, lse))
        merged = [out[0, 0] for out, _ in self._ranks.merge(reads)]
        averages = merged.pop(0)[0] if has_shrinkage else None
        objects = [o for members in self._groups.values() for o in members]
        return averages, {o: out.T for o, out in zip(objects, merged, strict=True)}

    def _evict_together(self, most: int) -> None:
        """Drop the prototypes of least usage on all ranks until no more than `most` are left."""
        over = sum(self._prototypes) - most
        if over <= 0:
            return
        size, longest = self.exchange.size, max(self._prototypes)
        usage = torch.zeros(longest, device=self.device)
        serials = torch.zeros(longest, dtype=torch.int64, device=self.device)
        if self._elements:
            usage[: self._elements] = usage_of(self._long_rows())
            serials[: self._elements] = self._serials
        usages, numbers = self.exchange.gather([usage, serials], [size * longest] * 2)
        places = [torch.arange(count) + r * longest for r, count in enumerate(self._prototypes)]
        at = torch.cat(places).to(self.device)
        at = at[numbers[at].argsort()]
        kept = at[self._survivors(usages[at], over)]
        row_bytes = self._arena.row_bytes(LONG)
        for r, left in enumerate(torch.bincount(kept // longest, minlength=size).tolist()):
            self._bytes[r] -= (self._prototypes[r] - left) * row_bytes
            self._prototypes[r] = left
        self._keep_elements((kept[kept // longest == self.exchange.rank] % longest).sort().values)

    # ---- What is this rank's part of it.

    def _own_settings(self) -> MemorySettings:
        if not self._is_long_term:
            return self.settings
        size = self.exchange.size
        return replace(
            self.settings,
            max_long_term_elements=-(-self.settings.max_long_term_elements // size),
            num_prototypes=-(-self.settings.num_prototypes // size),
        )

    def _most_frames(self, plan: Plan, permanent: int) -> int:
        return sys.maxsize  # no rank condenses by itself

    def _keep_elements(self, survivors: Tensor) -> None:
        self._serials = self._serials[survivors]
        super()._keep_elements(survivors)

    def _reset_prototypes(self) -> None:
        self._serials = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._prototypes = [0] * self.exchange.size
        self._next_serial = 0

    def _prototypes_state(self) -> dict[str, Any]:
        return {
            "serials": self._serials,
            "prototypes": list(self._prototypes),
            "next_serial": self._next_serial,
        }

    def _load_prototypes_state(self, state: Mapping[str, Any]) -> None:
        self._serials = state["serials"].to(self.device)
        self._prototypes, self._next_serial = list(state["prototypes"]), state["next_serial"]
