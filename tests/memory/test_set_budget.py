"""MemoryBank.set_budget: what stays when the budget changes."""

from __future__ import annotations

import pytest
import torch

from vosops.memory import MemoryBank, MemoryBudgetError

FRAME = 4 * (8 + 16) * 64 * 64  # bytes of one object's frame: much more than alignment and scratch


def filled(frames: int, **options) -> MemoryBank:
    bank = MemoryBank(**options)
    for frame in range(frames):
        bank.add(frame, torch.randn(1, 8, 64, 64), torch.randn(1, 1, 16, 64, 64), [1])
    return bank


def numbers(bank: MemoryBank) -> list[int]:
    return [slot.frame for slot in bank.frames]


def test_the_first_and_the_latest_frames_stay():
    bank = filled(6)
    key, value = torch.randn(1, 8, 64, 64), torch.randn(1, 1, 16, 64, 64)
    bank.set_budget(6 * FRAME)
    kept = numbers(bank)
    assert kept[0] == 0 and kept[1:] == list(range(7 - len(kept), 6)) and 3 <= len(kept) < 6
    assert bank.bytes_reserved <= 6 * FRAME
    bank.add(6, key, value, [1])
    assert numbers(bank) == [0, *range(8 - len(kept), 7)]


def test_what_stays_is_read_as_before():
    bank, query = filled(3), torch.randn(1, 8, 4, 4)
    before = bank.read(query)
    for budget in (8 * FRAME, 5 * FRAME, None):
        bank.set_budget(budget)
        assert numbers(bank) == [0, 1, 2]
        assert torch.equal(bank.read(query), before)


def test_a_temporary_frame_goes_where_there_is_no_room():
    bank = filled(1)
    bank.add(1, torch.randn(1, 8, 64, 64), torch.randn(1, 1, 16, 64, 64), [1], temporary=True)
    bank.set_budget(FRAME + FRAME * 7 // 8)
    assert numbers(bank) == [0]


def test_permanent_frames_that_do_not_fit_change_nothing():
    bank, query = filled(3, budget=8 * FRAME), torch.randn(1, 8, 4, 4)
    before = bank.read(query)
    with pytest.raises(MemoryBudgetError, match="budget must be at least"):
        bank.set_budget(FRAME // 2)
    assert bank.settings.budget == 8 * FRAME and numbers(bank) == [0, 1, 2]
    assert torch.equal(bank.read(query), before)


def test_an_empty_bank_takes_any_budget():
    bank = MemoryBank()
    bank.set_budget("2MB")
    assert bank.settings.budget == "2MB"
