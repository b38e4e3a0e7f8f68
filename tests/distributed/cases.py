"""Memories to read on one rank and on several: what each case reads, and how its frames are divided."""

from __future__ import annotations

from typing import Any

import torch

import vosops
import vosops.distributed
from tests.effort import EXHAUSTIVE
from vosops.distributed import ShardedMemoryBank, count_traffic
from vosops.memory import MemoryBank

SIZES = (1, 2, 3, 4)
N, CK, CV, OBJECTS, T, H, W = 2, 8, 6, 3, 7, 3, 5
Q = (4, 3)  # 12 query pixels, which 1, 2, 3 and 4 ranks slice without a rest; 7 of "odd" they do not

READS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "l2": {"similarity": "l2", "scale": 0.3, "shrinkage": True, "selection": True},
    "bias": {"bias": True, "valid": True},
    "top_k": {"top_k": 5},
    "top_k of everything": {"top_k": 200, "similarity": "l2"},
    "top_k l2": {
        "top_k": 9,
        "similarity": "l2",
        "shrinkage": True,
        "selection": True,
        "bias": True,
        "valid": True,
    },
    "one rank without frames": {"top_k": 4, "empty": 1},
    "softmax, first rank without frames": {"empty": 0},
    "odd": {"top_k": 5, "query": (7,)},
    "ties": {"top_k": 11, "alike": True},
    "one key for all": {"batch": 1},
    "from rank 0": {"top_k": 6, "similarity": "l2", "selection": True, "query_from": 0},
}
TRACED = {"shrinkage", "selection", "bias"}


def divided(count: int, size: int, empty: int | None = None) -> list[int]:
    """How many of the frames each rank has: as equal as can be, but nothing for the rank `empty`."""
    full = [rank for rank in range(size) if rank != empty or size == 1]
    return [(count + len(full) - 1 - full.index(r)) // len(full) if r in full else 0 for r in range(size)]


def slice_of(size: int, rank: int, empty: int | None = None) -> slice:
    counts = divided(T, size, empty)
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def read_case(
    name: str, size: int = 1, rank: int = 0, group: Any = None, dtype: torch.dtype = torch.float32
) -> Any:
    """Everything that a read of this rank's frames gives, with gradients; size 1 without a group is one process."""
    made = dict(READS[name])
    random = torch.Generator().manual_seed(len(name))

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    batch, query_shape = made.pop("batch", N), made.pop("query", Q)
    empty, query_from = made.pop("empty", None), made.pop("query_from", None)
    mine = slice_of(size, rank, empty)
    query, key, value = rand(N, CK, *query_shape), rand(batch, CK, T, H, W), rand(batch, OBJECTS, CV, T, H, W)
    if made.pop("alike", False):
        key = key[:, :, :1].expand(-1, -1, T, -1, -1).contiguous()
    weights, lse_weights = rand(N, OBJECTS, CV, *query_shape), rand(N, *query_shape).float()
    make = {
        "shrinkage": lambda: 1 + rand(batch, 1, T, H, W).abs(),
        "selection": lambda: rand(N, CK, *query_shape).sigmoid(),
        "bias": lambda: rand(batch, T, H, W),
        "valid": lambda: rand(batch, T, H, W) > -0.5,
    }
    along = {"shrinkage": 2, "bias": 1, "valid": 1}
    for option, tensor in make.items():
        whole = tensor()
        if made.get(option) is True:
            at = (slice(None),) * along.get(option, 0) + (mine,) if option in along else ...
            made[option] = whole[at].contiguous()
    leaves = {"query": query, "key": key[:, :, mine].contiguous(), "value": value[:, :, :, mine].contiguous()}
    leaves |= {option: made[option] for option in TRACED if option in made}
    leaves = {leaf: tensor.requires_grad_() for leaf, tensor in leaves.items()}
    query = leaves["query"]
    if group is None:
        read = vosops.memory_read
    else:
        made |= {"group": group, "query_from": query_from}
        read = vosops.distributed.memory_read
        if query_from is not None and rank != query_from:
            query = None
            made["selection"] = None
    out, usage, lse = read(query, leaves["key"], leaves["value"], return_usage=True, return_lse=True, **made)
    ((out * weights).sum() + (lse * lse_weights).sum()).backward()
    gradients = {f"d {leaf}": tensor.grad for leaf, tensor in leaves.items() if tensor.grad is not None}
    return {"out": out.detach(), "usage": usage, "lse": lse.detach(), **gradients}


def groups_case(size: int = 1, rank: int = 0, group: Any = None) -> Any:
    """A read of two groups of objects in segments, the second of which sees the later frames alone."""
    random = torch.Generator().manual_seed(5)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    query, key = rand(1, CK, *Q), rand(1, CK, T, H * W)
    values = [rand(1, 2, CV, T, H * W), rand(1, 1, CV, T, H * W)]
    mine, first = slice_of(size, rank), 3 * H * W  # the second group came in frame 3
    start = mine.start * H * W
    own = range(start, mine.stop * H * W)
    ranges = [(0, len(own)), (min(max(first - start, 0), len(own)), len(own))]
    keys = [part.flatten(2) for part in key[:, :, mine].split(2, 2)]
    segments = [[part.flatten(3) for part in value[:, :, :, mine].split(2, 3)] for value in values]
    read = vosops.memory_read if group is None else vosops.distributed.memory_read
    options = {} if group is None else {"group": group}
    results = read(
        query, keys, segments, groups=ranges, top_k=7, return_usage=True, return_lse=True, **options
    )
    return [
        {"out": out, "usage": torch.cat([part.flatten(1) for part in usage], 1), "lse": lse}
        for out, usage, lse in results
    ]


def matching_case(size: int = 1, rank: int = 0, group: Any = None, neighbors: int = 1) -> Any:
    random = torch.Generator().manual_seed(6)
    query = torch.randn(N, CK, *Q, generator=random)
    query[0, 0, 1, 1] = torch.nan
    key = torch.randn(N, CK, T, H, W, generator=random)
    mask = torch.rand(N, OBJECTS, T, H, W, generator=random) > 0.6
    mask[0, 1] = False
    mine = slice_of(size, rank)
    query.requires_grad_()
    key, mask = key[:, :, mine].contiguous().requires_grad_(), mask[:, :, mine].contiguous()
    bias = torch.randn(OBJECTS, generator=random).requires_grad_()
    weights = torch.randn(N, OBJECTS, *Q, generator=random)
    options: dict[str, Any] = {} if group is None else {"group": group}
    match = vosops.global_matching if group is None else vosops.distributed.global_matching
    out, index = match(query, key, mask, neighbors=neighbors, bias=bias, return_indices=True, **options)
    (out.nan_to_num() * weights).sum().backward()
    grads = {"d query": query.grad.nan_to_num(), "d key": key.grad.nan_to_num(), "d bias": bias.grad}
    return {"out": out.detach(), "index": index, **grads}


BANKS: dict[str, dict[str, Any]] = {
    "every": {},
    "top_k": {"top_k": 6},
    "window": {"policy": "window", "max_mem_frames": 4, "top_k": 6},
    "int8": {"dtype": torch.int8, "top_k": 6},
    "dot": {"similarity": "dot", "dtype": torch.float16},
}


def bank_case(name: str, group: Any = None, budget: int | None = None) -> dict[str, Any]:
    """Reads of a bank in which objects come, are corrected and go; of one bank, or of one over a group."""
    random = torch.Generator().manual_seed(7)
    settings = {**BANKS[name], "budget": budget}
    bank = MemoryBank(**settings) if group is None else ShardedMemoryBank(**settings, group=group)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    def add(frame: int, objects: list[int], **options: Any) -> bool:
        key, value = rand(1, CK, H, W), rand(1, len(objects), CV, H, W)
        return bank.add(frame, key, value, objects, shrinkage=1 + rand(1, 1, H, W).abs(), **options)

    reads, stored = [], []
    stored += [add(0, [1, 2]), add(1, [1, 2])]
    for frame in range(2, 9):
        if frame == 3:
            stored.append(add(3, [7]))  # a new object, in a frame of its own
        objects = [1, 2, 7] if frame > 3 else [1, 2]
        reads.append(bank.read(rand(1, CK, *Q)))
        stored.append(add(frame if frame != 6 else 1, objects, permanent=frame == 5, temporary=frame == 7))
    reads.append(bank.read(rand(1, CK, *Q), objects=[7]))
    bank.remove_objects([1, 2])
    reads.append(bank.read(rand(1, CK, *Q)))
    if group is not None:  # a bank is the same after it was saved and loaded
        other = ShardedMemoryBank(**settings, group=group)
        other.load_state_dict(bank.state_dict())
        query = rand(1, CK, *Q)
        assert torch.equal(other.read(query), bank.read(query))
        assert other.owners == bank.owners
    frames = [slot.frame for slot in bank.frames] if group is None else list(bank.owners)
    return {"reads": reads, "stored": stored, "frames": sorted(frames), "bytes": bank.bytes_used}


LONG_TERM: dict[str, Any] = {
    "policy": "long_term",
    "max_mid_term_frames": 4,
    "min_mid_term_frames": 2,
    "num_prototypes": 7,
    "max_long_term_elements": 17,
}
LONG_TERMS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "top_k": {"top_k": 9},
    "int8": {"dtype": torch.int8, "key_dtype": torch.float32, "top_k": 9},
    "half": {"dtype": torch.float16, "key_dtype": torch.float32},
    "Cutie": {"evict_ties": False, "buffer_tokens": 2, "top_k": 2},
    "oldest first": {"enable_long_term_count_usage": False, "top_k": 9},
    "selection": {"selection": True},
}


def sizes_of_long_term(name: str) -> tuple[int, ...]:
    """The numbers of ranks with which a case of LONG_TERMS is run: one for what differs in a rank's own columns."""
    return SIZES if EXHAUSTIVE or name == "top_k" else (4,) if name == "softmax" else (3,)


def long_term_case(name: str, group: Any = None, budget: int | None = None) -> dict[str, Any]:
    """Reads and prototypes of a bank that condenses and evicts, of one bank or of one over a group."""
    random = torch.Generator().manual_seed(8)
    settings = {**LONG_TERM, **LONG_TERMS[name], "budget": budget}
    selects = settings.pop("selection", False)
    bank = MemoryBank(**settings) if group is None else ShardedMemoryBank(**settings, group=group)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    def read(**options: Any) -> torch.Tensor:
        query = rand(1, CK, *Q)
        return bank.read(query, rand(1, CK, *Q).sigmoid() if selects else None, **options)

    reads, sizes, prototypes = [], [], []
    for frame in range(17):
        objects = [1, 2] if frame < 4 else [1, 2, 7] if frame < 14 else [1, 7]
        if frame == 4:  # a new object in a frame of its own
            bank.add(100, rand(1, CK, H, W), rand(1, 1, CV, H, W), [7], **_beside(rand, selects))
        if frame == 14:
            bank.remove_objects([2])
        if frame > 0:
            reads += [read() for _ in range(1 + frame % 2)]
        value = rand(1, len(objects), CV, H, W)
        kept = {"permanent": frame == 8, "temporary": frame == 10}
        bank.add(
            frame if frame != 12 else 11, rand(1, CK, H, W), value, objects, **_beside(rand, selects), **kept
        )
        if frame == 12 and group is not None:
            other = ShardedMemoryBank(**settings, group=group)
            other.load_state_dict(bank.state_dict())
            bank = other
        sizes.append(bank.num_prototypes)
        prototypes.append(_prototypes(bank))
    reads += [read(objects=[7]), read()]
    frames = [slot.frame for slot in bank.frames] if group is None else list(bank.owners)
    return {
        "reads": reads,
        "sizes": sizes,
        "prototypes": prototypes,
        "frames": sorted(frames),
        "bytes": bank.bytes_used,
        "reserved": bank.bytes_reserved,
    }


def _beside(rand: Any, selects: bool) -> dict[str, torch.Tensor]:
    selection = {"selection": rand(1, CK, H, W).sigmoid()} if selects else {}
    return {"shrinkage": 1 + rand(1, 1, H, W).abs(), **selection}


def _prototypes(bank: MemoryBank) -> dict[int, torch.Tensor]:
    """The keys of the prototypes by their numbers; of one bank in the order in which it has them."""
    rows = bank._long_rows()
    keys = rows.column("key").float().clone() if len(rows) else torch.zeros(0, CK)
    numbers = bank._serials.tolist() if isinstance(bank, ShardedMemoryBank) else range(len(rows))
    return dict(zip(numbers, keys, strict=True))


def traffic_case(group: Any, frames: int, top_k: int | None) -> tuple[int, int]:
    """Bytes that a read of this many frames on each rank sends and receives, with its backward pass."""
    query = torch.randn(1, CK, *Q).requires_grad_()
    key, value = torch.randn(1, CK, frames, H, W).requires_grad_(), torch.randn(1, OBJECTS, CV, frames, H, W)
    with count_traffic() as traffic:
        vosops.distributed.memory_read(query, key, value, top_k=top_k, group=group).sum().backward()
    return traffic.sent, traffic.received
