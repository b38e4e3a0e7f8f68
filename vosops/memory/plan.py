"""How much of what a bank has room for: the columns of its tables and their capacities under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from vosops.memory.arena import Column, largest, layout_bytes
from vosops.memory.budget import MemoryBudgetError
from vosops.memory.settings import MemorySettings

WORK = "work"  # the table of frames as they are
LONG = "long"  # the table of prototypes
STAGE = "stage"  # the table into which rows of another device are copied
FLOATS = "float"  # the table into which values are dequantised
_FIRST_FRAMES = 8  # room without a budget, doubled when it is used up
_LARGEST_SCRATCH = 1 << 20  # bytes for moving columns within the arena

Groups = Mapping[int, Sequence[int]]


class Geometry(NamedTuple):
    """What all frames of a bank have in common."""

    size: tuple[int, ...]  # (H,W)
    key_channels: int
    value_channels: int
    shrinkage: bool
    selection: bool

    @property
    def pixels(self) -> int:
        """Positions in a frame."""
        return math.prod(self.size)


class Plan(NamedTuple):
    """The layouts of a bank on its device and on the host."""

    frames: int  # room on the device
    elements: int  # room for prototypes
    host_frames: int  # room on the host
    columns: list[Column]
    host_columns: list[Column]
    capacity: dict[str, int]  # rows of each table on the device
    host_capacity: dict[str, int]
    scratch: int


def make_plan(
    settings: MemorySettings,
    geometry: Geometry,
    groups: Groups,
    *,
    permanent: int,
    temporary: bool,
    frames: int,
    room: int,
    staged: bool,
) -> Plan:
    """Return the plan for these groups and this many permanent frames; MemoryBudgetError if they do not fit.

    temporary: whether a temporary frame needs a place. frames: how many there are. room: how many there is room for,
    which grows only without a budget. staged: whether frames of the host must be copied to be read.
    """
    long_term = settings.policy == "long_term"
    objects = sum(len(group) for group in groups.values())
    quantised = settings.dtype == torch.int8
    staged = staged and settings.host_budget is not None
    frame_columns = _columns(WORK, settings, geometry, groups, usage=long_term, selection=long_term)
    columns = list(frame_columns)
    if long_term:
        columns += _columns(LONG, settings, geometry, groups, usage=True, selection=False)
    host_columns = _columns(WORK, settings, geometry, groups, usage=False, selection=False)
    if staged:
        columns += [column._replace(table=STAGE) for column in host_columns]
    if quantised:
        columns.append(Column(FLOATS, "value", (geometry.value_channels,), torch.float32))
    row = max(column.row_bytes for column in columns)
    scratch = max(min(row * geometry.pixels, _LARGEST_SCRATCH), row)

    def capacity(frames: int, elements: int) -> dict[str, int]:
        return {
            WORK: frames * geometry.pixels,
            LONG: elements,
            STAGE: geometry.pixels * staged,
            FLOATS: geometry.pixels * objects,
        }

    def need(frames: int, elements: int = 0) -> int:
        return layout_bytes(columns, capacity(frames, elements), scratch)

    budget = settings.budget_bytes
    beside, most = permanent + temporary, settings.most_frames
    elements = settings.max_long_term_elements if long_term else 0
    if budget is None:
        grown = room if frames <= room else max(_FIRST_FRAMES, 2 * room, frames)
        fit = grown if most is None else beside + most
    else:
        bound = budget // sum(c.row_bytes * geometry.pixels for c in frame_columns) + 1
        bound = bound if most is None else min(bound, beside + most)
        elements = largest(lambda n: need(bound, n) <= budget, elements)
        if long_term and elements < settings.num_prototypes:
            elements = settings.num_prototypes
            if need(beside + 1, elements) > budget:
                elements = 0
        elements = max(elements, 0)
        fit = largest(lambda n: need(n, elements) <= budget, bound)
        if fit < permanent:
            what = f"{permanent} permanent frames" + f" of {objects} objects" * (objects != 1)
            raise MemoryBudgetError.of(need(permanent), what, budget, max(fit, 0))
    host_frames = 0
    host_budget = settings.host_budget_bytes
    if host_budget is not None:
        host_frames = largest(
            lambda n: layout_bytes(host_columns, {WORK: n * geometry.pixels}, scratch) <= host_budget,
            host_budget // sum(c.row_bytes * geometry.pixels for c in host_columns),
        )
        host_frames = max(host_frames, 0)
    return Plan(
        frames=fit,
        elements=elements,
        host_frames=host_frames,
        columns=columns,
        host_columns=host_columns,
        capacity=capacity(fit, elements),
        host_capacity={WORK: host_frames * geometry.pixels},
        scratch=scratch,
    )


def _columns(
    table: str,
    settings: MemorySettings,
    geometry: Geometry,
    groups: Groups,
    *,
    usage: bool,
    selection: bool,
) -> list[Column]:
    """Return the columns of a table of positions."""
    keys = (geometry.key_channels,)
    columns = [Column(table, "key", keys, settings.stored_key_dtype)]
    if geometry.shrinkage:
        columns.append(Column(table, "shrinkage", (), torch.float32))
    if selection and geometry.selection:
        columns.append(Column(table, "selection", keys, settings.stored_key_dtype))
    if usage:
        columns += [Column(table, name, (), torch.float32) for name in ("usage", "life")]
    columns += [Column(table, f"mask/{group}", (), torch.bool) for group in groups]
    for o in (o for group in groups.values() for o in group):
        columns.append(Column(table, f"value/{o}", (geometry.value_channels,), settings.dtype))
        if settings.dtype == torch.int8:
            columns.append(Column(table, f"scale/{o}", (), torch.float32))
    return columns
