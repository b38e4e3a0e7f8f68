"""The parts of a memory that other ranks hold: what of them a read needs, and gradients through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vosops.distributed.exchange import Exchange
from vosops.ops import merge_reads


class Ranks:
    """`vosops.ops.memory_read.OtherParts` of a group of ranks; a part's place among the others is its rank."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    @torch.no_grad()
    def choose(self, found: list[tuple[Tensor, Tensor]], top_k: int) -> list[Tensor]:
        """See `OtherParts`; equal scores go to the lower rank, and within it to the first position.

        Each rank's best are sorted, so that what is chosen of them is the first few: how many is all that comes back.
        Moves (W - 1) / W of N K P scores and as many small counts for W ranks.
        """
        if self.exchange.size == 1:
            return [index for _, index in found]
        scores = [torch.where(index >= 0, score, -torch.inf).detach() for score, index in found]
        parts = self.exchange.scatter(scores)
        counts: list[list[Tensor]] = [[] for _ in parts]
        for group in range(len(scores)):
            for rank, count in enumerate(_best_of([part[group] for part in parts], top_k)):
                counts[rank].append(count)
        mine = self.exchange.answer(counts, [score.shape[-1] for score in scores])
        results = []
        for (_, index), count in zip(found, mine, strict=True):
            order = torch.arange(index.shape[1], device=index.device)[:, None]
            results.append(torch.where(order < count[:, None], index, -1))
        return results

    def merge(self, reads: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """See `OtherParts`. Moves 2 (W - 1) / W of the bytes of out and lse for W ranks."""
        if self.exchange.size == 1:
            return reads
        outs, lses = zip(*reads, strict=True)
        merged = _Merge.apply(self.exchange, len(reads), *outs, *lses)
        return list(zip(merged[: len(reads)], merged[len(reads) :], strict=True))


def _best_of(scores: Sequence[Tensor], top_k: int) -> list[Tensor]:
    """Return how many of each rank's scores (N,K,p), greatest first, are among the best k: (N,p) int32 for each."""
    count = scores[0].shape[1]
    order = torch.sort(torch.cat(list(scores), 1), dim=1, descending=True, stable=True).indices[:, :top_k]
    return [
        ((order >= r * count) & (order < (r + 1) * count)).sum(1, dtype=torch.int32)
        for r in range(len(scores))
    ]


class _Merge(torch.autograd.Function):
    """outs (N,O,Cv,P) and lses (N,P) of this rank -> those over all ranks, alike on every rank.

    In the backward pass nothing moves: a rank's part of the gradient needs its own read and the merged one. The
    gradient that arrives is that of the whole loss, which every rank computes alike.
    """

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, groups: int, *reads: Tensor) -> tuple[Tensor, ...]:
        outs, lses = reads[:groups], reads[groups:]
        parts = exchange.scatter(reads)
        slices: list[Tensor] = []
        merged = [
            merge_reads([part[g] for part in parts], [part[groups + g] for part in parts])
            for g in range(groups)
        ]
        slices = [out for out, _ in merged] + [lse for _, lse in merged]
        whole = exchange.gather(slices, [read.shape[-1] for read in reads])
        ctx.groups = groups
        ctx.save_for_backward(*outs, *lses, *whole)
        return tuple(whole)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        groups, saved = ctx.groups, ctx.saved_tensors
        grad_outs, grad_lses = [], []
        for g in range(groups):
            out, lse, whole, whole_lse = (saved[g + i * groups] for i in range(4))
            grad_out, grad_lse = grads[g], grads[groups + g]
            share = torch.where(lse.isneginf(), 0, (lse - whole_lse).exp())
            wide = grad_out.to(share.dtype)
            apart = (out.to(share.dtype) - whole.to(share.dtype)) * wide
            grad_outs.append((wide * share[:, None, None]).to(out.dtype))
            grad_lses.append(share * (apart.sum((1, 2)) + grad_lse))
        return (None, None, *grad_outs, *grad_lses)


class _Shared(torch.autograd.Function):
    """A tensor that every rank has alike, whose gradient is the sum of what the ranks' parts say of it."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, tensor: Tensor, content: Tensor) -> Tensor:
        ctx.exchange = exchange
        return content.view_as(content)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.exchange.sum(grad.contiguous()), None


def check_served(exchange: Exchange, what: str, device: torch.device) -> None:
    """Raise ValueError unless the group has a backend for tensors on this device: NCCL has none for the CPU."""
    served = sorted({each.type for each in getattr(exchange.group, "_device_types", ())})
    if exchange.size > 1 and served and device.type not in served:
        raise ValueError(f"{what} one of the group's devices ({', '.join(served)}), got {device.type}")


def shared(exchange: Exchange, tensor: Tensor) -> Tensor:
    """Return a tensor that is alike on all ranks; its gradient is summed over them in the backward pass."""
    if exchange.size == 1 or not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    result: Tensor = _Shared.apply(exchange, tensor, tensor.detach())
    return result


def broadcast(exchange: Exchange, tensor: Tensor | None, source: int, device: torch.device) -> Tensor:
    """Return on every rank what the rank `source` of the group has; its gradient there is the sum over the ranks."""
    content, gradients = exchange.broadcast(tensor, source, device)
    if not (gradients and torch.is_grad_enabled()):
        return content
    if exchange.rank == source:
        assert tensor is not None
        root = tensor
    else:  # takes part in the backward pass
        root = torch.empty_like(content).requires_grad_()
    result: Tensor = _Shared.apply(exchange, root, content)
    return result
