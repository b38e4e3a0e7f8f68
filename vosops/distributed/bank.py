"""`ShardedMemoryBank`: a `MemoryBank` whose frames are divided over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vosops.distributed.exchange import RankError
from vosops.distributed.long_term import Entry, LongTermMemory, Room
from vosops.distributed.ranks import broadcast
from vosops.memory import MemoryBudgetError, MemorySettings
from vosops.memory.bank import geometry_of
from vosops.memory.plan import Geometry, Groups, Plan
from vosops.memory.reader import Query, View
from vosops.ops import MemoryWeights

_FINE, _OVER_BUDGET, _FAILED = range(3)
_UNLIMITED = -1


Result = TypeVar("Result")


class ShardedMemoryBank(LongTermMemory):
    """A memory of past frames that is sharded over the ranks of a group and read as one.

    Every rank makes a bank with the same settings (the budgets may differ) and makes the same calls with the same
    arguments. A frame is stored by one rank, the one that has the least in it, and stays there; reads are those of
    `vosops.distributed.memory_read`, so that every rank receives what one bank with all frames would read. A policy
    counts the frames and prototypes of all ranks: "window" keeps the latest frames, "long_term" condenses older ones
    as one bank would, by the usage of all ranks, and where all budgets are full the oldest frame goes.

    Args:
        settings: as in `MemoryBank`; the budgets are those of this rank.
        group: the process group; None: the default one.
        timeout: seconds to wait for a rank; None: the timeout of the group.
        device: device of this rank's part and of the queries.

    `frames`, `num_prototypes`, `bytes_used` and the like are of this rank's part; `owners` of all.

    Raises `RankError`, in every method, when a rank died, hangs or failed.

        >>> import torch, torch.distributed as dist
        >>> from vosops.distributed import ShardedMemoryBank
        >>> if not dist.is_initialized():
        ...     dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> bank = ShardedMemoryBank(top_k=4, budget="1MB")
        >>> key, value = torch.randn(1, 8, 6, 6), torch.randn(1, 2, 16, 6, 6)
        >>> bank.add(0, key, value, objects=[1, 2])
        True
        >>> bank.read(torch.randn(1, 8, 6, 6)).shape, bank.owners
        (torch.Size([1, 2, 16, 6, 6]), {0: 0})
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        settings: MemorySettings | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        timeout: float | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(settings, group, timeout, device, **options)
        self._rooms: list[int] = [_UNLIMITED] * self.exchange.size
        self._value_channels = 0

    @property
    def owners(self) -> dict[int, int]:
        """The rank of the group that stores each frame, in the order in which they came."""
        return {entry.frame: entry.rank for entry in self._entries}

    def owner(self, frame: int) -> int:
        """Return the rank that stores this frame, or would if it were added next: only it needs key and value."""
        known = self._find(frame)
        return self._place() if known is None else known.rank

    # ---- Adding and removing.

    @torch.no_grad()
    def add(
        self,
        frame: int,
        key: Tensor | None,
        value: Tensor | None,
        objects: Sequence[int],
        *,
        shrinkage: Tensor | None = None,
        selection: Tensor | None = None,
        permanent: bool = False,
        temporary: bool = False,
    ) -> bool:
        """Store a frame on one rank; see `MemoryBank.add`.

        key, value, shrinkage and selection are those of the rank that `owner(frame)` names; the others may pass None.
        """
        self._check_objects(objects)
        if permanent and temporary:
            raise ValueError("permanent and temporary are mutually exclusive: give one")
        known = self._find(frame)
        new = [o for o in objects if o not in self.objects]
        permanent = permanent or bool(new) or (known is not None and known.permanent)
        temporary = temporary and not permanent and known is None
        grows = known is None and not (permanent or temporary)
        owner = self._place() if known is None else known.rank
        mine = owner == self.exchange.rank
        self._together(
            f"store frame {frame}",
            lambda: self._rehearse(frame, key, value, objects, new, shrinkage, selection, mine, permanent),
        )
        room = None
        if self._is_long_term:
            coming = Entry(frame, owner, permanent, temporary)
            geometry = None
            if mine:
                assert key is not None and value is not None
                geometry = geometry_of(key, value, shrinkage, selection)
            room = self._prepare(coming, known, new, geometry)
            known = self._find(frame)
        before = self._stored()
        stored = False
        if mine:
            assert key is not None and value is not None
            stored = super().add(
                frame,
                key,
                value,
                objects,
                shrinkage=shrinkage,
                selection=selection,
                permanent=permanent,
                temporary=temporary,
            )
        (flag,) = self.exchange.numbers([int(stored)], self.device)[owner]
        if not temporary:
            self._last_frame = frame
        if flag:
            if not mine:
                self._drop_temporary()
                if room is not None:
                    self._settle(new)
                elif new:
                    self.declare_objects(new)
            if room is None or not sum(room.prototypes):
                self.remove_frames(self._beyond_window(grows) & self._stored())
            self._entries = [entry for entry in self._entries if not entry.temporary]
            if known is None:
                self._entries.append(Entry(frame, owner, permanent, temporary))
            else:
                known.permanent = permanent
        self._account(before - self._stored())
        if flag and room is not None:
            self._condense_when_due(room)
        return bool(flag)

    @torch.no_grad()
    def remove_objects(self, objects: Iterable[int]) -> None:
        """Forget these objects on every rank; see `MemoryBank.remove_objects`."""
        before = self._stored()
        super().remove_objects(objects)
        self._account(before - self._stored())

    @torch.no_grad()
    def set_budget(self, budget: int | str | None) -> None:
        """Change this rank's budget; every rank makes the call, each with its own. See `MemoryBank.set_budget`."""

        def rehearse() -> Plan | None:
            settings = self.settings
            self.settings = replace(settings, budget=budget)
            try:
                return self._plan_of_contents(self._groups) if self._geometry is not None else None
            finally:
                self.settings = settings

        plan = self._together("change the budget", rehearse)
        if self._is_long_term and plan is not None:
            room = self._common_room(plan, self._work.count(permanent=True), self._has_temporary)
            within = [min(pair) for pair in zip(room.laid_out, room.prototypes, strict=True)]
            passing = [entry for entry in self._entries if entry.passing]
            self._make_room_together(room._replace(laid_out=within), None, passing)
        before = self._stored()
        super().set_budget(budget)
        self._account(before - self._stored())

    @torch.no_grad()
    def clear(self, *, keep_permanent: bool = True) -> None:
        """Drop all frames that are not permanent, or everything including the storage, on every rank."""
        kept = {entry.frame for entry in self._entries if entry.permanent and keep_permanent}
        if kept:
            self.remove_frames(self._stored() - kept)
            self._last_frame = None
            self._elements, self._seen = 0, {}
            self._reset_prototypes()
        else:
            self._forget()
        self._entries = [entry for entry in self._entries if entry.frame in kept]
        self._account(set())

    # ---- Reading.

    @torch.no_grad()
    def read(
        self,
        query_key: Tensor | None,
        selection: Tensor | None = None,
        *,
        objects: Sequence[int] | None = None,
        query_from: int | None = None,
    ) -> Tensor:
        """Read the memory of all ranks for each pixel of a frame; see `MemoryBank.read`.

        query_key and selection are identical on all ranks; or given on the rank `query_from`, and None on the others.
        Traffic is that of `vosops.distributed.memory_read` for each group of objects.
        """
        if query_from is not None:
            (flag,) = self.exchange.numbers([int(selection is not None)], self.device)[query_from]
            query_key = broadcast(self.exchange, query_key, query_from, self.device)
            selection = broadcast(self.exchange, selection, query_from, self.device) if flag else None
        if query_key is None:
            raise TypeError("query_key must be a tensor unless query_from is given, got None")
        return super().read(query_key, selection, objects=objects)

    def _read_groups(self, query: Query, members: Groups) -> dict[int, Tensor]:
        top_k = self.settings.top_k
        seen = [group for group in members if self._parts_of(group)[0]]
        views = self._views(seen)
        pixels = query.key.shape[2:].numel()
        chosen: dict[int, MemoryWeights] = {}
        if top_k is None:
            found = self._full_reads(query, views, members)
        else:
            found, chosen = self._selected_reads(query, views, members, top_k)
        reads = []
        for group, ids in members.items():
            if group in found:
                out, lse = found[group]
            else:
                dtype = torch.float32 if self.settings.dtype == torch.int8 else self.settings.dtype
                shape = (1, len(ids), self._value_channels, pixels)
                out = torch.zeros(shape, dtype=dtype, device=self.device)
                lse = torch.full((1, pixels), -torch.inf, device=self.device)
            reads.append((out.flatten(3), lse.flatten(1)))
        merged = self._ranks.merge(reads)
        first = next(iter(self._groups))
        if self._is_long_term and first in members:
            _, lse = merged[list(members).index(first)]
            self._count_usage_of(query, views, first, chosen.get(first), lse)
        size = tuple(query.key.shape[2:])
        return {g: out.unflatten(3, size) for g, (out, _) in zip(members, merged, strict=True)}

    def _count_usage_of(
        self,
        query: Query,
        views: Sequence[View],
        group: int,
        chosen: MemoryWeights | None,
        lse: Tensor,
    ) -> None:
        """Count what the group's read used of this rank's part, under the softmax over all parts."""
        for view in views:
            if group in view.groups:
                parts = view.parts[view.firsts[view.groups.index(group)] :]
                if chosen is None:
                    usage = self._reader.usage(query, parts, view.mask, lse)
                else:
                    usage = self._reader.usage_of_chosen(chosen, parts, lse)
                self._count_usage(parts, usage)

    def _full_reads(
        self, query: Query, views: Sequence[View], members: Groups
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Return what this rank's frames say to the groups that see some, with the lse."""
        reads: dict[int, tuple[Tensor, Tensor]] = {}
        for view in views:
            objects = [list(members[group]) for group in view.groups]
            reads.update(zip(view.groups, self._reader.full(query, view, objects), strict=True))
        return reads

    def _selected_reads(
        self, query: Query, views: Sequence[View], members: Groups, top_k: int
    ) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, MemoryWeights]]:
        """Return what those of this rank's positions say that are among the best of all, and which these are."""
        selected: dict[int, tuple[MemoryWeights, View, int]] = {}
        for view in views:
            chosen, _ = self._reader.select(query, view, top_k, False)
            for group, best, first in zip(view.groups, chosen, view.firsts, strict=True):
                selected[group] = (best, view, first)
        pixels = query.key.shape[2:].numel()
        found = []
        for group in members:
            if group in selected:
                best = selected[group][0]
                scores = (best.weights.log() + best.lse[:, None]).flatten(2)
                found.append((scores, best.indices.flatten(2).long()))
            else:
                nothing = torch.full((1, top_k, pixels), -1, device=self.device)
                found.append((torch.full((1, top_k, pixels), -torch.inf, device=self.device), nothing))
        kept = dict(zip(members, self._ranks.choose(found, top_k), strict=True))
        reads: dict[int, tuple[Tensor, Tensor]] = {}
        chosen_of_all: dict[int, MemoryWeights] = {}
        for group, (best, view, first) in selected.items():
            narrowed = _narrowed(best, kept[group].view_as(best.indices))
            out = self._reader.gather(narrowed, view.parts[first:], list(members[group]))
            reads[group], chosen_of_all[group] = (out, narrowed.lse), narrowed
        return reads, chosen_of_all

    def _has_frames(self) -> bool:
        return bool(self._entries) or sum(self._prototypes) > 0

    # ---- Saving.

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part, and what all ranks know; to be loaded by the same rank of as many."""
        return {
            "rank": self.exchange.rank,
            "ranks": self.exchange.size,
            "entries": [asdict(entry) for entry in self._entries],
            "bytes": list(self._bytes),
            "rooms": list(self._rooms),
            "value_channels": self._value_channels,
            **self._prototypes_state(),
            "part": super().state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`, on every rank its own.

        Raises ValueError for a state of another rank or another number of ranks, and as `MemoryBank.load_state_dict`.
        """
        came = (state["rank"], state["ranks"])
        if came != (self.exchange.rank, self.exchange.size):
            raise ValueError(
                f"state must be of rank {self.exchange.rank} of {self.exchange.size}, "
                f"got one of rank {came[0]} of {came[1]}"
            )
        super().load_state_dict(state["part"])
        self._entries = [Entry(**entry) for entry in state["entries"]]
        self._bytes, self._rooms = list(state["bytes"]), list(state["rooms"])
        self._value_channels = state["value_channels"]
        self._load_prototypes_state(state)

    # ---- How it is done.

    def _forget(self) -> None:
        super()._forget()
        self._entries = []
        self._reset_prototypes()

    def _stored(self) -> set[int]:
        """Return the frames of this rank."""
        return {slot.frame for slot in self.frames}

    def _find(self, frame: int) -> Entry | None:
        return next((e for e in self._entries if e.frame == frame and not e.temporary), None)

    def _place(self) -> int:
        """Return the rank for a new frame: of least bytes where there is room, else the one with the oldest frame."""
        kept = [0] * self.exchange.size
        for entry in self._entries:
            kept[entry.rank] += not entry.temporary
        free = [rank for rank, room in enumerate(self._rooms) if room == _UNLIMITED or kept[rank] < room]
        if not free:
            oldest = next((e for e in self._entries if not (e.permanent or e.temporary)), None)
            if oldest is not None:
                return oldest.rank
        return min(free or range(self.exchange.size), key=lambda rank: (self._bytes[rank], rank))

    def _beyond_window(self, grows: bool) -> set[int]:
        """Return the oldest frames, on any rank, that are more than the policy keeps beside a new one."""
        limit = self.settings.most_frames
        if limit is None:
            return set()
        counted = [entry.frame for entry in self._entries if not (entry.permanent or entry.temporary)]
        return set(counted[: max(len(counted) - (limit - grows), 0)])

    def _rehearse(
        self,
        frame: int,
        key: Tensor | None,
        value: Tensor | None,
        objects: Sequence[int],
        new: Sequence[int],
        shrinkage: Tensor | None,
        selection: Tensor | None,
        mine: bool,
        permanent: bool,
    ) -> None:
        """Raise what storing the frame would raise on this rank, and change nothing."""
        groups = self._groups_with(new)
        geometry = self._geometry
        kept = {slot.frame for slot in self._work.slots if slot.permanent}
        if mine:
            if key is None or value is None:
                raise TypeError(
                    f"key and value must be tensors on the rank that stores frame {frame}, got None on rank "
                    f"{self.exchange.global_rank(self.exchange.rank)}"
                )
            self._check(key, value, objects, shrinkage, selection)
            geometry = geometry or geometry_of(key, value, shrinkage, selection)
            kept |= {frame} if permanent else set()
        if geometry is not None:
            self._plan(geometry, groups, len(kept), self._has_temporary, len(self._work.slots) + mine)

    def _prepare(
        self, coming: Entry, known: Entry | None, new: Sequence[int], geometry: Geometry | None
    ) -> Room:
        """Condense what leaves no room for a frame, and return what each rank has room for with it."""
        common = self._common_geometry(self._geometry or geometry)
        assert common is not None  # whoever stores the frame knows
        mine = coming.rank == self.exchange.rank
        kept = {slot.frame for slot in self._work.slots if slot.permanent}
        kept |= {coming.frame} if mine and coming.permanent else set()
        temporary = self._has_temporary or (mine and coming.temporary)
        groups = self._groups_with(new)
        plan = self._together(
            f"store frame {coming.frame}",
            lambda: self._plan(common, groups, len(kept), temporary, len(self._work.slots) + mine),
        )
        self._geometry = common
        self._work.pixels = self._host.pixels = common.pixels
        room = self._common_room(plan, len(kept), temporary)
        if coming.permanent or room.places[coming.rank] > 0:
            passing = [e for e in self._entries if e.passing and not (e is known and coming.permanent)]
            self._make_room_together(room, coming if known is None else None, passing)
        return room

    def _settle(self, new: Sequence[int]) -> None:
        """Lay out the storage for the objects that there are and new ones, whose prototypes may come here."""
        plan = self._plan_of_contents(self._groups_with(new))
        self._make_room(plan, self._work.count(permanent=True), None, grows=False)
        if new:
            self.declare_objects(new)
        self._lay_out(plan)

    def _groups_with(self, new: Sequence[int]) -> Groups:
        return {**self._groups, self._next_group: list(new)} if new else self._groups

    def _plan_of_contents(self, groups: Groups) -> Plan:
        assert self._geometry is not None
        kept, slots = self._work.count(permanent=True), len(self._work.slots)
        return self._plan(self._geometry, groups, kept, self._has_temporary, slots)

    def _together(self, what: str, attempt: Callable[[], Result]) -> Result:
        """Run on every rank what may fail there; raise on all where it failed on one."""
        failure: Exception | None = None
        result: Result
        try:
            result = attempt()
        except (TypeError, ValueError, MemoryBudgetError) as error:
            failure = error
        over = isinstance(failure, MemoryBudgetError)
        code = _FINE if failure is None else _OVER_BUDGET if over else _FAILED
        codes = [each for (each,) in self.exchange.numbers([code], self.device)]
        if failure is not None:
            raise failure
        for rank, each in enumerate(codes):
            name = self.exchange.global_rank(rank)
            if each == _OVER_BUDGET:
                raise MemoryBudgetError(f"rank {name} cannot {what}: the budget is too small there")
            if each == _FAILED:
                raise RankError(f"rank {name} cannot {what}, as its own error says", [name])
        return result

    def _account(self, lost: set[int]) -> None:
        """Bring every rank to the same knowledge of all: which frames this one lost, its bytes and room."""
        room = self.room
        if room is not None and self._is_long_term:
            room -= self._has_temporary
        channels = 0 if self._geometry is None else self._geometry.value_channels
        numbers = [
            self.bytes_used,
            _UNLIMITED if room is None else room,
            channels,
            len(lost),
            self._elements,
        ]
        every = self.exchange.numbers(numbers, self.device)
        self._bytes, self._rooms = [each[0] for each in every], [each[1] for each in every]
        self._value_channels = max(each[2] for each in every)
        self._prototypes = [each[4] for each in every]
        counts = [each[3] for each in every]
        if max(counts):
            padded = [*sorted(lost), *[0] * (max(counts) - len(lost))]
            listed = self.exchange.numbers(padded, self.device)
            gone = {f for count, frames in zip(counts, listed, strict=True) for f in frames[:count]}
            self._entries = [entry for entry in self._entries if entry.frame not in gone]


def _narrowed(best: MemoryWeights, kept: Tensor) -> MemoryWeights:
    """Return the weights of those that are kept (index not -1), which sum to 1 again, and their lse."""
    undefined = best.lse.isnan()
    weights = torch.where(kept >= 0, best.weights, 0).masked_fill(undefined[:, None], 0)
    total = weights.sum(1)
    some = total > 0
    weights = weights / torch.where(some, total, 1)[:, None]
    lse = torch.where(some, best.lse + total.clamp(min=torch.finfo(total.dtype).tiny).log(), -torch.inf)
    weights = weights.masked_fill(undefined[:, None], torch.nan)
    return MemoryWeights(kept.int(), weights, lse.masked_fill(undefined, torch.nan))
