"""Banks under any sequence of calls, of which a number is the seed: the same on one bank and over a group."""

from __future__ import annotations

import random
from typing import Any

import torch

from vosops.distributed import ShardedMemoryBank
from vosops.memory import MemoryBank, MemoryBudgetError

SEEDS = range(24)
CK, CV, H, W, Q = 4, 3, 2, 3, (2, 2)
STEPS = 26


class Sequence:
    """Calls of a bank, and what came of them: `log` has the reads, and a text for each other call.

    The ranks' budgets are alike or not, and with an even seed there are none.
    """

    def __init__(self, seed: int, group: Any = None) -> None:
        self.random, self.numbers = random.Random(seed), torch.Generator().manual_seed(seed)
        self.bounded = seed % 2 == 1
        self.group = group
        choice = self.random.choice
        most = choice([2, 3, 5])
        self.settings = {
            "policy": choice(["long_term"] * 4 + ["every", "window"]),
            "max_mid_term_frames": most,
            "min_mid_term_frames": choice([1, min(2, most - 1)]),
            "num_prototypes": choice([1, 3, 8]),
            "max_long_term_elements": choice([8, 11, 20]),
            "top_k": choice([None, 4, 50]),
            "evict_ties": choice([True, False]),
            "buffer_tokens": choice([0, 2]),
            "enable_long_term_count_usage": self.random.random() < 0.8,
        }
        self.bank = self.make(choice([2500, 4000, 8000]) if self.bounded else None)
        self.groups: list[list[int]] = []
        self.frame, self.objects = 0, 0
        self.log: list[Any] = []

    def make(self, budget: int | None) -> MemoryBank:
        if self.group is None:
            return MemoryBank(**self.settings, budget=budget)
        if budget is not None and self.random.random() < 0.3:
            budget += 500 * torch.distributed.get_rank(self.group)
        return ShardedMemoryBank(**self.settings, budget=budget, group=self.group)

    def run(self) -> list[Any]:
        calls = [self.add] * 55 + [self.read] * 30 + [self.remove] * 5 + [self.change] * 4 + [self.clear] * 2
        calls += [self.reload] * 4
        for _ in range(STEPS):
            call = self.random.choice(calls)
            try:
                call()
            except MemoryBudgetError:
                assert self.bounded
                self.log.append("over the budget")
            self.check()
        return self.log

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.numbers)

    def add(self) -> None:
        new = []
        if not self.groups or self.random.random() < 0.12:
            new = [self.objects + 1, self.objects + 2][: self.random.choice([1, 2])]
            self.objects += 2
        seen = self.groups if self.random.random() < 0.8 else self.groups[:1]
        objects = [o for group in seen for o in group] + new
        frame = self.frame if self.random.random() < 0.85 else max(self.frame - 2, 0)
        self.frame += 1
        kind = self.random.choice([None, None, None, None, "permanent", "temporary"])
        key, value = self.rand(1, CK, H, W), self.rand(1, len(objects), CV, H, W)
        shrinkage = 1 + self.rand(1, 1, H, W).abs()
        kept = {kind: True} if kind else {}
        if self.bank.add(frame, key, value, objects, shrinkage=shrinkage, **kept):
            self.groups += [new] if new else []
            self.log.append(f"stored {frame} for {objects}, {kind}")
        else:
            self.log.append(f"did not store {frame}")

    def read(self) -> None:
        query = self.rand(1, CK, *Q)
        try:
            self.log.append(self.bank.read(query))
        except RuntimeError as error:
            assert "empty" in str(error)
            self.log.append("empty")

    def remove(self) -> None:
        if self.groups:
            gone = self.random.choice(self.groups)
            self.bank.remove_objects(gone)
            self.groups.remove(gone)
            self.log.append(f"removed {gone}")

    def change(self) -> None:
        if self.bounded:
            budget = self.random.choice([2500, 4000, 8000])
            self.bank.set_budget(budget)
            self.log.append(f"budget {budget}")

    def clear(self) -> None:
        self.bank.clear()
        self.log.append("cleared")

    def reload(self) -> None:
        state, budget = self.bank.state_dict(), self.bank.settings.budget
        kind = type(self.bank)
        of_group = {} if self.group is None else {"group": self.group}
        self.bank = kind(**self.settings, budget=budget, **of_group)
        self.bank.load_state_dict(state)
        self.log.append("loaded")

    def check(self) -> None:
        bank = self.bank
        assert sorted(bank.objects) == sorted(o for group in self.groups for o in group)
        assert not self.bounded or bank.bytes_reserved <= bank.settings.budget
        if isinstance(bank, ShardedMemoryBank):
            rank = bank.exchange.rank
            stored = [slot.frame for slot in bank.frames]
            assert sorted(stored) == sorted(frame for frame, owner in bank.owners.items() if owner == rank)
            assert bank.num_prototypes == len(bank._serials) == bank._prototypes[rank]
            assert sum(bank._prototypes) <= bank.settings.max_long_term_elements
