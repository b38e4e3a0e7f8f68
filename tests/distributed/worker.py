"""The ranks of the tests: each runs the cases in groups of 1, 2, 3 and 4 ranks and writes what it found.

python -m tests.distributed.worker FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which DTensor would import in every rank
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import vosops.distributed
from tests.distributed import cases, sequences
from tests.effort import EXHAUSTIVE
from vosops.distributed import Exchange, RankError, ShardedMemoryBank, exchange

RANKS = 4
DEAD, HANGING = 3, 2  # the ranks that die and hang at the end


def said(call: Callable[[], Any]) -> tuple[str, str]:
    """The kind and the text of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def disagreements(rank: int, group: Any) -> dict[str, tuple[str, str]]:
    """What is said on this rank where the ranks do not agree."""
    query, key, value = torch.randn(1, 8, 4), torch.randn(1, 8, 6), torch.randn(1, 3, 6)

    def read(**options: Any) -> Any:
        return vosops.distributed.memory_read(query, key, value, group=group, **options)

    def add_wrongly() -> None:
        bank = ShardedMemoryBank(group=group)
        channels = 4 if rank == 0 else 5  # rank 0 stores frames 0, and frame 1 has another size there
        bank.add(0, torch.randn(1, 4, 2, 2), torch.randn(1, 1, 3, 2, 2), [1])
        bank.add(0, torch.randn(1, channels + 1, 2, 2), torch.randn(1, 1, 3, 2, 2), [1])

    def too_little() -> None:
        budget = 200 if rank == 0 else 10**6
        bank = ShardedMemoryBank(group=group, budget=budget)
        bank.add(0, torch.randn(1, 4, 9, 9), torch.randn(1, 1, 3, 9, 9), [1])

    return {
        "top_k": said(lambda: read(top_k=3 + (rank == 1))),
        "query": said(
            lambda: vosops.distributed.memory_read(query[..., : 4 - (rank == 2)], key, value, group=group)
        ),
        "source": said(lambda: read(query_from=RANKS)),
        "wrong key": said(add_wrongly),
        "budget": said(too_little),
    }


def tensors_of_a_mesh(rank: int) -> dict[str, Any]:
    """The case "top_k" with DTensors."""
    mesh = init_device_mesh("cpu", (RANKS,))
    random = torch.Generator().manual_seed(len("top_k"))
    shapes = ((cases.N, cases.CK, *cases.Q), (cases.N, cases.CK, cases.T, cases.H, cases.W))
    query, key = (torch.randn(*shape, generator=random) for shape in shapes)
    value = torch.randn(cases.N, cases.OBJECTS, cases.CV, cases.T, cases.H, cases.W, generator=random)
    query = distribute_tensor(query, mesh, [Replicate()]).requires_grad_()
    key = distribute_tensor(key, mesh, [Shard(2)]).requires_grad_()
    value = distribute_tensor(value, mesh, [Shard(3)])
    out, usage = vosops.distributed.memory_read(query, key, value, top_k=5, return_usage=True)
    assert isinstance(out, DTensor) and isinstance(usage, DTensor)
    out.sum().backward()
    assert query.grad is not None and key.grad is not None
    wrong = said(
        lambda: vosops.distributed.memory_read(
            query, distribute_tensor(key.detach().full_tensor(), mesh, [Shard(3)]), value
        )
    )
    return {
        "out": out.full_tensor().detach(),
        "usage": usage.full_tensor(),
        "d query": query.grad.full_tensor(),
        "d key": key.grad.full_tensor(),
        "wrong": wrong,
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=400),
    )
    groups = {size: dist.new_group(range(size)) for size in cases.SIZES}
    living = dist.new_group([r for r in range(RANKS) if r != DEAD])
    found: dict[str, Any] = {}

    def save(name: str) -> None:
        torch.save(found, folder / f"part-{name}-{rank}")
        os.replace(folder / f"part-{name}-{rank}", folder / f"{name}-{rank}.pt")
        found.clear()

    for size, group in groups.items():
        if rank >= size:
            continue
        for name in cases.READS:
            found[f"read {name} {size}"] = cases.read_case(name, size, rank, group)
        again = cases.read_case("softmax", size, rank, group)
        found[f"again {size}"] = all(torch.equal(again[k], found[f"read softmax {size}"][k]) for k in again)
        found[f"bfloat16 {size}"] = cases.read_case("softmax", size, rank, group, torch.bfloat16)
        found[f"groups {size}"] = cases.groups_case(size, rank, group)
        for neighbors in (1, 3):
            found[f"matching {neighbors} {size}"] = cases.matching_case(size, rank, group, neighbors)
        for name in cases.BANKS:
            found[f"bank {name} {size}"] = cases.bank_case(name, group)
        for name in cases.LONG_TERMS:
            if size in cases.sizes_of_long_term(name):
                found[f"long term {name} {size}"] = cases.long_term_case(name, group)
        if size in cases.sizes_of_long_term("softmax"):
            found[f"bounded long term {size}"] = cases.long_term_case("top_k", group, budget=9000)
        if EXHAUSTIVE:
            found[f"sequences {size}"] = [sequences.Sequence(seed, group).run() for seed in sequences.SEEDS]
        found[f"bounded {size}"] = cases.bank_case("top_k", group, budget=6000)
        for top_k in (None, 3):
            found[f"traffic {top_k} {size}"] = [cases.traffic_case(group, f, top_k) for f in (2, 40)]
    found["disagreements"] = disagreements(rank, groups[RANKS])
    found["mesh"] = tensors_of_a_mesh(rank)
    Exchange(groups[RANKS], timeout=60).check()
    save("results")

    def wait_for(name: str, ranks: Iterable[int]) -> None:
        """Return when these ranks have come here too."""
        (folder / f"{name}-{rank}.here").touch()
        while not all((folder / f"{name}-{other}.here").exists() for other in ranks):
            time.sleep(0.1)

    query, key, value = torch.randn(1, 8, 4), torch.randn(1, 8, 6), torch.randn(1, 3, 6)
    if rank == DEAD:
        os._exit(9)
    exchange._PROBE_SECONDS = 15.0  # for a machine that has other things to do
    others = [r for r in range(RANKS) if r != DEAD]
    for what, group, timeout in (("dead", groups[RANKS], 60.0), ("hanging", living, 2.0)):
        noticed: dict[str, Any] = {}
        if what == "hanging":
            wait_for("dead", others)
            if rank == HANGING:
                save("errors")
                os.kill(os.getpid(), signal.SIGSTOP)
        began = time.monotonic()
        try:
            vosops.distributed.memory_read(query, key, value, group=group, timeout=timeout)
        except RankError as error:
            noticed = {"ranks": error.ranks, "text": str(error), "seconds": time.monotonic() - began}
        found[what] = noticed
    save("errors")
    wait_for("hanging", [r for r in others if r != HANGING])
    os._exit(0)  # the group cannot be destroyed in order any more


def start(folder: Path) -> None:
    """Fork the ranks, which costs the imports once, and wait for all that end."""
    ranks = {}
    for rank in range(RANKS):
        if child := os.fork():
            ranks[rank] = child
            continue
        log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            main(rank, folder)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    for rank, child in ranks.items():
        if rank != HANGING:
            os.waitpid(child, 0)


if __name__ == "__main__":
    start(Path(sys.argv[1]))
