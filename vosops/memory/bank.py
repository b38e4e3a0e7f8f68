"""`MemoryBank`: keys and values of past frames in storage that is allocated once, within a budget in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vosops import _checks
from vosops.memory.arena import Arena
from vosops.memory.budget import MemoryBudgetError
from vosops.memory.frames import Frames, StoredFrame
from vosops.memory.plan import LONG, WORK, Geometry, Groups, Plan, make_plan
from vosops.memory.reader import Query, Reader, Rows, View, defined
from vosops.memory.settings import MemorySettings

_INT8_MAX = 127
_MOST_RUNS = 6  # of frames that the same groups see, which one pass reads: each is read by itself and merged
NEW_LIFE = 1e-7  # reads that a new position has seen, so that usage / life is defined


class MemoryBank:
    """A memory of past frames for `vosops.memory_read`: preallocated, bounded, read in place.

    Frames are added with one key and one value per object, and read with the query key of a later frame. Objects that
    appeared in the same frame form a group. A group sees the frames since its first frame, which is permanent, as is
    every frame added with `permanent=True`. Old frames are dropped, condensed to prototypes or off-loaded to host
    memory, according to `MemorySettings`.

    Args:
        settings: a `MemorySettings`; alternatively pass its fields as keywords.
        device: device of the storage and of the queries.

    The storage is one channel-last allocation, in which columns move when objects are added or removed. With a budget
    it never uses more than that many bytes on its device, `bytes_reserved`; the output of a read and the workspace of
    the op, which do not depend on the size of the memory, are not included. Not differentiable: stored tensors are
    detached. One video per bank (batch 1).

        >>> import torch
        >>> from vosops.memory import MemoryBank
        >>> bank = MemoryBank(policy="window", top_k=4, budget="1MB")
        >>> key, value = torch.randn(1, 8, 6, 6), torch.randn(1, 2, 16, 6, 6)
        >>> bank.add(0, key, value, objects=[1, 2])
        True
        >>> bank.read(torch.randn(1, 8, 6, 6)).shape, bank.bytes_reserved
        (torch.Size([1, 2, 16, 6, 6]), 1000000)
    """

    def __init__(
        self,
        settings: MemorySettings | None = None,
        *,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> None:
        if settings is not None and options:
            raise TypeError(f"give settings or their fields as keywords, got both: {', '.join(options)}")
        self.settings = MemorySettings(**options) if settings is None else settings
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._arena = Arena(self.device)
        self._host_arena = Arena(torch.device("cpu"), pinned=self.device.type == "cuda")
        self._work, self._host = Frames(self._arena), Frames(self._host_arena)
        quantised = self.settings.dtype == torch.int8
        self._reader = Reader(self._arena, self.settings.similarity, self.settings.scale, quantised)
        self._geometry: Geometry | None = None
        self._groups: dict[int, list[int]] = {}
        self._next_group = 0
        self._serial = 0
        self._elements = 0  # used rows of the long-term table
        self._seen: dict[int, int] = {}  # how many of them each group sees
        self._last_frame: int | None = None
        self._has_temporary = False  # whether a place is kept for one

    # ---- Contents.

    @property
    def objects(self) -> list[int]:
        """The ids of the objects, in the order of the values that `read` returns."""
        return [o for group in self._groups.values() for o in group]

    @property
    def groups(self) -> list[list[int]]:
        """The objects by the frame in which they came."""
        return [list(group) for group in self._groups.values()]

    @property
    def frames(self) -> list[StoredFrame]:
        """The frames that are stored as they are, on the device or the host, in the order they came."""
        return sorted([*self._work.slots, *self._host.slots], key=lambda slot: slot.serial)

    @property
    def num_prototypes(self) -> int:
        """How many positions the long-term memory holds."""
        return self._elements

    @property
    def num_positions(self) -> int:
        """How many positions a read looks at."""
        return self._work.used + self._host.used + self._elements

    @property
    def bytes_used(self) -> int:
        """Bytes on the device that frames and prototypes occupy."""
        used = self._work.used * self._arena.row_bytes(WORK)
        return used + self._elements * self._arena.row_bytes(LONG)

    @property
    def bytes_reserved(self) -> int:
        """Bytes that the bank has allocated on its device: at most the budget."""
        return self._arena.size

    @property
    def host_bytes_used(self) -> int:
        """Bytes of host memory that frames occupy."""
        return self._host.used * self._host_arena.row_bytes(WORK)

    @property
    def host_bytes_reserved(self) -> int:
        """Bytes of host memory that the bank has allocated: at most the host budget."""
        return self._host_arena.size

    @property
    def room(self) -> int | None:
        """How many frames fit the budgets of device and host with the objects as they are; None: no limit.

        Without a budget, and before a frame was added, none is known.
        """
        if self._geometry is None or self.settings.budget_bytes is None:
            return None
        kept = self._work.count(permanent=True)
        plan = self._plan(self._geometry, self._groups, kept, self._has_temporary, kept)
        return plan.frames + plan.host_frames

    def due(self, frame: int) -> bool:
        """Return whether `mem_every` frames have passed since the last one that was added (and was not temporary)."""
        return self._last_frame is None or abs(frame - self._last_frame) >= self.settings.mem_every

    # ---- Adding and removing.

    @torch.no_grad()
    def add(
        self,
        frame: int,
        key: Tensor,
        value: Tensor,
        objects: Sequence[int],
        *,
        shrinkage: Tensor | None = None,
        selection: Tensor | None = None,
        permanent: bool = False,
        temporary: bool = False,
    ) -> bool:
        """Store a frame; first make room according to the policy.

        frame: its number; a frame that is already stored is replaced for the given objects. key (1,Ck,H,W), value
        (1,O,Cv,H,W) for the O `objects` (ids), shrinkage (1,1,H,W), selection (1,Ck,H,W), which "long_term" uses to
        condense. The known objects of a group must be given together or not at all; new objects form a new group,
        which makes the frame permanent. temporary: drop the frame at the next `add`.

        Returns whether the frame was stored, which it is not if the permanent frames leave no room for another.
        Raises MemoryBudgetError if the permanent frames do not fit the budget, and then changes nothing; TypeError,
        ValueError for wrong arguments. Time O(H W (Ck + O Cv)), and now and then that of condensing or of moving
        columns.
        """
        self._check(key, value, objects, shrinkage, selection)
        if permanent and temporary:
            raise ValueError("permanent and temporary are mutually exclusive: give one")
        known = next((slot for slot in self.frames if slot.frame == frame and not slot.temporary), None)
        new = [o for o in objects if o not in self.objects]
        permanent = permanent or bool(new) or (known is not None and known.permanent)
        temporary = temporary and not permanent and known is None
        grows = known is None and not (permanent or temporary)
        groups = {**self._groups, **({self._next_group: list(new)} if new else {})}
        geometry = self._geometry or geometry_of(key, value, shrinkage, selection)
        kept = {slot.frame for slot in self._work.slots if slot.permanent} | ({frame} if permanent else set())
        plan = self._plan(
            geometry, groups, len(kept), self._has_temporary or temporary, len(self._work.slots) + 1
        )

        if not temporary:
            self._last_frame = frame
        near = permanent or plan.frames > len(kept)
        if (not near and (temporary or plan.host_frames == 0)) or (grows and self.settings.most_frames == 0):
            return False
        self._geometry, self._has_temporary = geometry, self._has_temporary or temporary
        self._work.pixels = self._host.pixels = geometry.pixels
        self._drop_temporary()
        if known is not None:
            known.permanent = permanent
        store = self._work if near else self._host
        self._make_room(plan, len(kept), store if store.find(frame) is None else None, grows)
        self._groups, self._next_group = groups, self._next_group + bool(new)
        self._lay_out(plan)
        at = store.find(frame)
        if at is None:
            at = self._append(store, StoredFrame(frame, permanent, temporary, [], self._serial))
        self._write(store, at, key, value, objects, shrinkage, selection)
        if plan.elements and self._work.count() >= self._most_frames(plan, len(kept)):
            self._condense(self.settings.min_mid_term_frames - 1)
        return True

    def declare_objects(self, objects: Sequence[int]) -> None:
        """Make these a group of objects without a frame, so that frames added for them are not permanent by that.

        Raises ValueError where one is known or given twice, or none is given.
        """
        if len(objects) == 0 or len(set(objects)) != len(objects) or set(objects) & set(self.objects):
            raise ValueError(
                f"objects must be different new ids, at least one, got {list(objects)} beside {self.objects}"
            )
        self._groups = {**self._groups, self._next_group: list(objects)}
        self._next_group += 1

    @torch.no_grad()
    def remove_frames(self, frames: Iterable[int]) -> None:
        """Remove the frames with these numbers, including permanent ones; prototypes stay.

        Raises ValueError for one that is not stored.
        """
        gone = set(frames)
        if gone - {slot.frame for slot in self.frames}:
            raise ValueError(
                f"frames must be stored ones, {[slot.frame for slot in self.frames]}, got {sorted(gone)}"
            )
        for store in (self._work, self._host):
            store.remove_if(i for i, slot in enumerate(store.slots) if slot.frame in gone)

    @torch.no_grad()
    def remove_objects(self, objects: Iterable[int]) -> None:
        """Remove these objects, with the frames and prototypes that no other object sees.

        Raises ValueError for an unknown id.
        """
        gone = set(objects)
        if gone - set(self.objects):
            raise ValueError(f"objects must be among {self.objects}, got {sorted(gone)}")
        groups = {g: [o for o in members if o not in gone] for g, members in self._groups.items()}
        groups = {g: members for g, members in groups.items() if members}
        for store in (self._work, self._host):
            for slot in store.slots:
                slot.groups = [g for g in slot.groups if g in groups]
            store.remove_if(i for i, slot in enumerate(store.slots) if not slot.groups)
        if not groups:
            self._forget()
            return
        if self._elements and len(groups) < len(self._groups):
            masks = [self._long_rows().column(f"mask/{g}") for g in groups]
            self._keep_elements(torch.stack(masks).any(0).nonzero().flatten())
        self._groups = groups
        if self._geometry is None:
            return
        kept = self._work.count(permanent=True)
        plan = self._plan(self._geometry, groups, kept, self._has_temporary, len(self._work.slots))
        self._lay_out(plan)

    @torch.no_grad()
    def set_budget(self, budget: int | str | None) -> None:
        """Change the budget; the oldest frames and the least used prototypes are dropped if they no longer fit.

        Raises MemoryBudgetError if the permanent frames do not fit, and then changes nothing. Copies the stored data.
        """
        before, self.settings = self.settings, replace(self.settings, budget=budget)
        if self._geometry is None:
            return
        kept = self._work.count(permanent=True)
        try:
            plan = self._plan(self._geometry, self._groups, kept, self._has_temporary, len(self._work.slots))
        except MemoryBudgetError:
            self.settings = before
            raise
        if len(self._work.slots) > plan.frames:
            self._drop_temporary()
        self._make_room(plan, kept, None, grows=False)
        self.load_state_dict(self.state_dict())

    @torch.no_grad()
    def clear(self, *, keep_permanent: bool = True) -> None:
        """Drop all frames that are not permanent, or everything including the storage."""
        for store in (self._work, self._host):
            store.remove_if(i for i, slot in enumerate(store.slots) if not slot.permanent)
        self._elements, self._seen, self._last_frame = 0, {}, None
        if not keep_permanent or not self._work.slots:
            self._forget()

    # ---- Reading.

    @torch.no_grad()
    def read(
        self, query_key: Tensor, selection: Tensor | None = None, *, objects: Sequence[int] | None = None
    ) -> Tensor:
        """Read the memory for each pixel of a frame and each object.

        query_key (1,Ck,*Q) and selection (1,Ck,*Q), on the bank's device -> (1,O,Cv,*Q) in query_key's dtype, for the
        given objects, by default for all in the order of the property `objects`. Each group reads the positions that
        it sees, with the softmax over the `top_k` best or all of them. With "long_term" the usage of the first
        group's read is counted (it sees everything, unless frames were added without it).

        Raises RuntimeError if the bank is empty. Time and memory are those of `vosops.memory_read`, with one pass
        over the scores for all groups that see all prototypes or none, and one pass for each other group. For int8
        and off-loaded frames, copying one frame at a time adds to this.
        """
        if not self._groups or not self._has_frames():
            raise RuntimeError("the memory bank is empty: add a frame before reading")
        wanted = self.objects if objects is None else list(objects)
        if set(wanted) - set(self.objects) or not wanted:
            raise ValueError(f"objects must be some of {self.objects}, got {wanted}")
        query = Query(query_key, selection)
        members = {group: [o for o in ids if o in wanted] for group, ids in self._groups.items()}
        members = {group: some for group, some in members.items() if some}
        outs: dict[int, Tensor] = {}
        for group, out in self._read_groups(query, members).items():
            outs.update(zip(members[group], out.to(query_key.dtype).unbind(1), strict=True))
        return torch.stack([outs[o] for o in wanted], 1)

    def _read_groups(self, query: Query, members: Groups) -> dict[int, Tensor]:
        """Return what each group reads for its objects, (1,O,Cv,*Q); zeros where it sees nothing."""
        outs: dict[int, Tensor] = {}
        for view in self._views([group for group in members if self._parts_of(group)[0]]):
            reads = self._read_view(query, view, [list(members[group]) for group in view.groups])
            outs.update(zip(view.groups, reads, strict=True))
        for group in members.keys() - outs.keys():
            assert self._geometry is not None
            shape = (1, len(members[group]), self._geometry.value_channels, *query.key.shape[2:])
            outs[group] = query.key.new_zeros(shape)
        return outs

    def _read_view(self, query: Query, view: View, objects: list[list[int]]) -> list[Tensor]:
        """Return what each group of the view reads for its objects; counts usage as the bank's first group reads."""
        counts = self.settings.policy == "long_term" and view.groups[0] == next(iter(self._groups))
        seen = view.parts[view.firsts[0] :]
        usage: list[Tensor] | None = None
        if self.settings.top_k is None:
            outs = [out for out, _ in self._reader.full(query, view, objects)]
            if counts:
                usage = self._reader.usage(query, seen, view.mask)
        else:
            chosen, usage = self._reader.select(query, view, self.settings.top_k, counts)
            rest = [view.parts[first:] for first in view.firsts]
            outs = [self._reader.gather(*read) for read in zip(chosen, rest, objects, strict=True)]
        if usage is not None:
            self._count_usage(seen, usage)
        return outs

    def _count_usage(self, parts: Sequence[Rows], usage: Sequence[Tensor]) -> None:
        """Add what a read used of each part, (rows,), and that it was read."""
        for part, used in zip(parts, usage, strict=True):
            if part.table == WORK or self.settings.enable_long_term_count_usage:
                part.column("usage").add_(used)
                part.column("life").add_(1)

    def _has_frames(self) -> bool:
        return self.num_positions > 0

    def _views(self, groups: list[int]) -> list[View]:
        """Return how these groups read: together where what each sees can be put behind what only others see."""
        alone = [group for group in groups if self._seen.get(group, 0) not in (0, self._elements)]
        together = [group for group in groups if group not in alone]
        view = None
        if len(together) > 1 and self._reader.shares(bool(self._host.slots), self.settings.top_k):
            view = self._nested(together)
        if view is None:
            alone = groups
        views = [] if view is None else [view]
        for group in alone:
            parts, everything = self._parts_of(group)
            views.append(View((group,), parts, (0,), None if everything else f"mask/{group}"))
        return views

    def _nested(self, groups: list[int]) -> View | None:
        """One view for groups that see all prototypes or none; None where their frames are too mixed."""
        runs: list[tuple[Rows, frozenset[int]]] = []
        for store in (self._host, self._work):
            for i, slot in enumerate(store.slots):
                rows, viewers = store.rows(i), frozenset(slot.groups).intersection(groups)
                if i > 0 and runs[-1][1] == viewers:
                    rows = replace(runs.pop()[0], stop=rows.stop)
                runs.append((rows, viewers))
            if store is self._host and self._elements:
                runs.append((self._long_rows(), frozenset(g for g in groups if self._seen.get(g))))
        runs = sorted((run for run in runs if run[1]), key=lambda run: len(run[1]))
        nested = all(few <= more for (_, few), (_, more) in pairwise(runs))
        if not nested or len(runs) > _MOST_RUNS:
            return None
        firsts = tuple(next(i for i, (_, viewers) in enumerate(runs) if group in viewers) for group in groups)
        return View(tuple(groups), [rows for rows, _ in runs], firsts, None)

    def _parts_of(self, group: int) -> tuple[list[Rows], bool]:
        """Return what the group reads, oldest first, and whether it sees all of that."""
        parts, everything = [], True
        for store in (self._host, self._work):
            seen = [group in slot.groups for slot in store.slots]
            if any(seen):
                parts.append(store.all())
                everything &= all(seen)
            if store is self._host and self._seen.get(group):
                parts.append(self._long_rows())
                everything &= self._seen[group] == self._elements
        return parts, everything

    # ---- Saving.

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next read and add depend on, copied, as tensors, numbers, strings and lists."""
        return {
            "settings": self.settings.state_dict(),
            "geometry": list(self._geometry) if self._geometry else [],
            "groups": {str(group): list(members) for group, members in self._groups.items()},
            "next_group": self._next_group,
            "serial": self._serial,
            "last_frame": self._last_frame,
            "has_temporary": self._has_temporary,
            "work": self._work.state(),
            "host": self._host.state(),
            "work_columns": self._work.contents(),
            "host_columns": self._host.contents(),
            "long_columns": self._long_rows().contents(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`; the continuation is bit-identical (on the CPU).

        Raises ValueError for a state of a bank with other settings (but for the budgets), MemoryBudgetError where
        its frames exceed the budget.
        """
        ours = self.settings.state_dict()
        differing = [name for name in ours if state["settings"].get(name) != ours[name]]
        if differing:
            raise ValueError(f"state must be of a bank with the same settings, but differs in {differing}")
        groups = {int(group): list(members) for group, members in state["groups"].items()}
        if not groups:
            self._forget()
            return
        if not state["geometry"]:  # objects that were declared, without a frame
            self._forget()
            self._groups, self._next_group = groups, state["next_group"]
            self._last_frame = state["last_frame"]
            return
        size, *rest = state["geometry"]
        geometry = Geometry(tuple(size), *rest)
        slots = [StoredFrame(**slot) for slot in state["work"]]
        host_slots = [StoredFrame(**slot) for slot in state["host"]]
        elements = len(state["long_columns"].get("key", ()))
        kept = sum(slot.permanent for slot in slots)
        plan = self._plan(geometry, groups, kept, state["has_temporary"], len(slots))
        if plan.frames < len(slots) or plan.host_frames < len(host_slots) or plan.elements < elements:
            raise MemoryBudgetError(
                f"the state's {len(slots)} frames, {elements} prototypes and {len(host_slots)} frames on the host "
                f"must fit the budgets, but {plan.frames}, {plan.elements} and {plan.host_frames} do"
            )
        self._forget()
        self._geometry, self._groups = geometry, groups
        self._work.pixels = self._host.pixels = geometry.pixels
        self._next_group, self._serial = state["next_group"], state["serial"]
        self._last_frame, self._has_temporary = state["last_frame"], state["has_temporary"]
        self._lay_out(plan)
        self._lay_out_host(plan, first=bool(host_slots))
        self._work.slots, self._host.slots, self._elements = slots, host_slots, elements
        for rows, name in ((self._work.all(), "work"), (self._host.all(), "host"), (self._long_rows(), LONG)):
            rows.fill(state[f"{name}_columns"])
        self._count_seen()

    # ---- How it is done.

    def _forget(self) -> None:
        self._arena.free()
        self._host_arena.free()
        self._work.slots, self._host.slots = [], []
        self._geometry = None
        self._groups, self._next_group, self._serial = {}, 0, 0
        self._elements, self._seen = 0, {}
        self._last_frame, self._has_temporary = None, False

    def _long_rows(self) -> Rows:
        return Rows(self._arena, LONG, 0, self._elements)

    def _plan(self, geometry: Geometry, groups: Groups, permanent: int, temporary: bool, frames: int) -> Plan:
        return make_plan(
            self._own_settings(),
            geometry,
            groups,
            permanent=permanent,
            temporary=temporary,
            frames=frames,
            room=self._arena.capacity(WORK) // geometry.pixels,
            staged=self._reader.far_host,
        )

    def _own_settings(self) -> MemorySettings:
        """Return the settings by which this bank's storage is laid out."""
        return self.settings

    def _most_frames(self, plan: Plan, permanent: int) -> int:
        """Return how many frames come together before "long_term" condenses them."""
        return min(
            self.settings.max_mid_term_frames - 1, max(plan.frames - permanent - self._has_temporary, 1)
        )

    def _drop_temporary(self) -> None:
        self._work.remove_if(i for i, slot in enumerate(self._work.slots) if slot.temporary)

    def _make_room(self, plan: Plan, permanent: int, target: Frames | None, grows: bool) -> None:
        """Get what is stored within the plan, with a place for a frame in `target`.

        grows: whether there will be one more of the frames that the policy counts.
        """
        host, work = self._host, self._work
        limit = self.settings.most_frames
        if self.settings.policy == "window" and limit is not None:
            while host.count() + work.count() > limit - grows:
                store = host if host.oldest() is not None else work
                store.remove_oldest()
        while len(host.slots) > max(plan.host_frames - (target is host), 0):
            host.remove_oldest()
        self._lay_out_host(plan, first=target is host)
        if self._arena.capacity(LONG) and plan.elements:
            most = self._most_frames(plan, permanent)
            if work.count() > most - grows:
                self._condense(min(self.settings.min_mid_term_frames, most) - 1)
        self._evict(plan.elements)
        while len(work.slots) > plan.frames - (target is work):
            index = work.oldest()
            assert index is not None
            if plan.host_frames:
                while len(host.slots) >= plan.host_frames:
                    host.remove_oldest()
                self._lay_out_host(plan, first=True)
                host.append(work.slots[index], work.rows(index))
            work.remove(index)

    def _lay_out(self, plan: Plan) -> None:
        self._arena.relayout(
            plan.columns,
            plan.capacity,
            {WORK: self._work.used, LONG: self._elements},
            scratch=plan.scratch,
            limit=self.settings.budget_bytes,
        )
        self._lay_out_host(plan)

    def _lay_out_host(self, plan: Plan, *, first: bool = False) -> None:
        """Nothing is allocated on the host before a frame goes there: `first`."""
        if self._host.slots or first:
            self._host_arena.relayout(
                plan.host_columns,
                plan.host_capacity,
                {WORK: self._host.used},
                scratch=plan.scratch,
                limit=self.settings.host_budget_bytes,
            )

    def _append(self, store: Frames, slot: StoredFrame) -> int:
        """Add a frame without contents, or with those of the same frame in the other store."""
        other = self._host if store is self._work else self._work
        source = other.find(slot.frame)
        if source is None:
            self._serial += 1
            return store.append(slot)
        index = store.append(slot, other.rows(source))
        slot.groups, slot.serial = other.slots[source].groups, other.slots[source].serial
        other.remove(source)
        return index

    def _write(
        self,
        store: Frames,
        index: int,
        key: Tensor,
        value: Tensor,
        objects: Sequence[int],
        shrinkage: Tensor | None,
        selection: Tensor | None,
    ) -> None:
        rows, slot = store.rows(index), store.slots[index]
        store.arena.settle()
        rows.column("key").copy_(key[0].flatten(1).T)
        if shrinkage is not None:
            rows.column("shrinkage").copy_(shrinkage.flatten())
        if selection is not None and rows.has("selection"):
            rows.column("selection").copy_(selection[0].flatten(1).T)
        if rows.has("usage"):
            rows.column("usage").zero_()
            rows.column("life").fill_(NEW_LIFE)
        for group, members in self._groups.items():
            if members[0] in objects:
                rows.column(f"mask/{group}").fill_(True)
                slot.groups = sorted({*slot.groups, group})
        for i, o in enumerate(objects):
            store_values(value[0, i].flatten(1).T, rows, o)

    # ---- Long-term memory.

    def _condense(self, keep: int) -> None:
        """Turn all frames but the permanent, the temporary and the last `keep` into prototypes."""
        slots = self._work.slots
        frames = [i for i, slot in enumerate(slots) if not (slot.permanent or slot.temporary)]
        frames = sorted(frames, key=lambda i: slots[i].serial)
        frames = frames[: len(frames) - keep]
        if not frames:
            return
        parts = [self._work.rows(i) for i in frames]
        usage = torch.cat([usage_of(part) for part in parts])
        room = self._arena.capacity(LONG)
        count = min(self.settings.num_prototypes, len(usage), room)
        chosen = torch.sort(usage, descending=True, stable=True).indices[:count]
        places = [torch.arange(part.start, part.stop, device=self.device) for part in parts]
        chosen = torch.cat(places)[chosen]
        if self._elements >= room - count:
            self._evict(max(room - count - self.settings.buffer_tokens, 0))

        columns = {name: self._arena.view(WORK, name) for name in self._arena.columns(WORK)}
        selection = columns["selection"][chosen].T[None].float() if "selection" in columns else None
        query = Query(columns["key"][chosen].T[None].float(), selection)
        prototypes = Rows(self._arena, LONG, self._elements, self._elements + count)
        prototypes.column("key").copy_(columns["key"][chosen])
        if "shrinkage" in columns:
            average, _ = self._reader.average(query, parts, "shrinkage")
            prototypes.column("shrinkage").copy_(average.flatten())
        prototypes.column("usage").zero_()
        prototypes.column("life").fill_(NEW_LIFE)
        for group, members in self._groups.items():
            sees = columns[f"mask/{group}"][chosen]
            prototypes.column(f"mask/{group}").copy_(sees)
            seen = [part for i, part in zip(frames, parts, strict=True) if group in slots[i].groups]
            for o in members:
                if seen:
                    ((values, _),) = self._reader.full(query, View((group,), seen, (0,), None, True), [[o]])
                    values = values[0, 0].T
                    store_values(torch.where(sees[:, None], values, 0), prototypes, o)
                else:
                    prototypes.column(f"value/{o}").zero_()
        self._work.remove_if(frames)
        self._elements += count
        self._count_seen()

    def _evict(self, room: int) -> None:
        """Drop the prototypes of least usage until no more than `room` are left."""
        over = self._elements - room
        if over <= 0:
            return
        self._keep_elements(self._survivors(usage_of(self._long_rows()), over))

    def _survivors(self, usage: Tensor, over: int) -> Tensor:
        """Return the indices, ascending, of the prototypes that stay where `over` must go; usage: in their order."""
        if not self.settings.enable_long_term_count_usage or over >= len(usage):
            return torch.arange(over, len(usage), device=usage.device)
        gone = torch.sort(usage, stable=True).indices[:over]
        keep = usage > usage[gone[-1]]
        if not self.settings.evict_ties:
            keep = torch.ones_like(keep).index_fill(0, gone, False)
        return keep.nonzero().flatten()

    def _keep_elements(self, survivors: Tensor) -> None:
        self._arena.keep_rows(LONG, survivors)
        self._elements = len(survivors)
        self._count_seen()

    def _count_seen(self) -> None:
        rows = self._long_rows()
        self._seen = {g: int(rows.column(f"mask/{g}").sum()) for g in self._groups} if len(rows) else {}

    def _check_objects(self, objects: Sequence[int]) -> None:
        if len(objects) == 0 or len(set(objects)) != len(objects):
            raise ValueError(f"objects must be different ids, at least one, got {list(objects)}")
        for members in self._groups.values():
            if 0 < len(set(members) & set(objects)) < len(members):
                raise ValueError(
                    f"objects must include all of a group, {members}, or none, got {list(objects)}"
                )

    def _check(
        self,
        key: Tensor,
        value: Tensor,
        objects: Sequence[int],
        shrinkage: Tensor | None,
        selection: Tensor | None,
    ) -> None:
        """Raise TypeError or ValueError for arguments of `add` that do not fit each other or what is stored."""
        self._check_objects(objects)
        _checks.check_tensor("key", key, (1, "Ck", "H", "W"))
        _checks.check_tensor("value", value, (1, len(objects), "Cv", *key.shape[2:]))
        given: dict[str, Tensor | None] = {"key": key, "value": value}
        given |= {"shrinkage": shrinkage, "selection": selection}
        if shrinkage is not None:
            _checks.check_tensor("shrinkage", shrinkage, (1, 1, *key.shape[2:]))
        if selection is not None:
            _checks.check_tensor("selection", selection, tuple(key.shape))
        for name, tensor in given.items():
            if tensor is not None:
                _checks.check_floating(name, tensor)
        if 0 in (*key.shape, *value.shape):
            raise ValueError(f"key and value must not be empty, got {tuple(key.shape)}, {tuple(value.shape)}")
        geometry = geometry_of(key, value, shrinkage, selection)
        for name, ours, theirs in zip(Geometry._fields, self._geometry or geometry, geometry, strict=True):
            if ours != theirs:
                raise ValueError(f"{name} must be {ours} as in the frames before, got {theirs}")


def geometry_of(key: Tensor, value: Tensor, shrinkage: Tensor | None, selection: Tensor | None) -> Geometry:
    """Return what a frame of these tensors has in common with all others of its bank."""
    size = tuple(key.shape[2:])
    return Geometry(size, key.shape[1], value.shape[2], shrinkage is not None, selection is not None)


def usage_of(rows: Rows) -> Tensor:
    """Return the usage per read since a row was stored; -1, the least, for NaN rows, which torch.sort puts first."""
    usage = rows.column("usage") / rows.column("life")
    return usage.masked_fill(~defined(rows, ("key", "shrinkage", "selection")) | usage.isnan(), -1)


def store_values(values: Tensor, rows: Rows, o: int) -> None:
    """Write an object's values (rows,Cv); for int8 rounded to 127ths of each row's greatest magnitude.

    An int8 row with a NaN or an infinity becomes NaN as a whole.
    """
    target = rows.column(f"value/{o}")
    if target.dtype != torch.int8:
        target.copy_(values)
        return
    low, high = torch.aminmax(values.float(), dim=1)
    scale = torch.maximum(-low, high) / _INT8_MAX
    finite = scale.isfinite()
    rows.column(f"scale/{o}").copy_(torch.where(finite, scale, torch.nan))
    steps = values.float() / torch.where(scale > 0, scale, 1)[:, None]
    target.copy_(torch.where(finite[:, None], steps, 0).round_())
