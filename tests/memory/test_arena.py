"""Columns keep their rows wherever an arena moves them, within its bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.effort import examples
from vosops.memory.arena import Arena, Column, largest, layout_bytes

DTYPES = (torch.float32, torch.bool, torch.float16, torch.int8)
CPU = torch.device("cpu")


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 7), min_size=1), st.integers(0, 40), st.integers(0, 40)),
        min_size=1,
        max_size=8,
    ),
    st.integers(24, 200),
    st.booleans(),
)
def test_relayout_moves_columns_without_changing_them(layouts, scratch, reserves_limit):
    arena = Arena(CPU)
    arena.reserves_limit = reserves_limit
    expected, used = {}, {"a": 0, "b": 0}
    for names, rows_a, rows_b in layouts:
        columns = [
            Column("ab"[i % 2], str(i), (1 + i % 3, 2), DTYPES[i % len(DTYPES)]) for i in sorted(names)
        ]
        capacity = {"a": rows_a, "b": rows_b}
        used = {table: min(used[table], capacity[table]) for table in used}
        arena.relayout(columns, capacity, used, scratch=scratch, limit=20000)
        assert arena.size == 20000 or (not reserves_limit and arena.size <= 20000)
        for column in columns:
            view = arena.view(column.table, column.name)
            assert view.shape == (capacity[column.table], *column.shape) and view.dtype == column.dtype
            kept = expected.get(column.name)
            kept = torch.zeros_like(view) if kept is None else kept
            assert torch.equal(view[: used[column.table]], kept[: used[column.table]])
        used, expected = capacity, {}
        for column in columns:
            view = arena.view(column.table, column.name)
            view.copy_(torch.randint(0, 2 if column.dtype == torch.bool else 100, view.shape))
            expected[column.name] = view.clone()


@pytest.mark.parametrize("scratch", [24, 64, 4096])
def test_keep_rows_compacts_in_place(scratch):
    arena = Arena(CPU)
    columns = [Column("t", "x", (6,), torch.float32), Column("t", "m", (), torch.bool)]
    arena.relayout(columns, {"t": 50}, {}, scratch=scratch)
    values = torch.randn(50, 6)
    arena.view("t", "x").copy_(values)
    arena.view("t", "m").copy_(values[:, 0] > 0)
    survivors = torch.tensor([0, 3, 4, 17, 48, 49])
    arena.keep_rows("t", survivors)
    assert torch.equal(arena.view("t", "x")[:6], values[survivors])
    assert torch.equal(arena.view("t", "m")[:6], values[survivors, 0] > 0)


def test_a_layout_that_does_not_fit_is_refused():
    arena = Arena(CPU)
    columns = [Column("t", "x", (6,), torch.float32)]
    need = layout_bytes(columns, {"t": 10}, 64)
    assert need == 64 + 240
    arena.relayout(columns, {"t": 10}, {}, scratch=64, limit=need)
    with pytest.raises(ValueError, match="limit"):
        arena.relayout(columns, {"t": 11}, {"t": 10}, scratch=64, limit=need)


def test_largest_finds_the_last_that_fits():
    assert [largest(lambda n: n <= limit, 10) for limit in (-1, 0, 4, 10, 99)] == [-1, 0, 4, 10, 10]
