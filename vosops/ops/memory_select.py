"""A top-k memory read in two phases: which positions each query reads and with what weight, then their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from vosops import _checks, backends
from vosops.ops import _memory_autograd  # noqa: F401  (registers the pieces)
from vosops.ops._memory_scores import (
    GroupsValid,
    Lengths,
    Memory,
    Piece,
    ScoreOptions,
    Scores,
    Segments,
    Valid,
    ValueSegments,
    check_groups,
    common_batch,
    expanded,
    segments_of,
    softmax_over_memory,
    that_share_scores,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MemoryWeights(NamedTuple):
    """The k best memory positions of each query, and their weights.

    `indices` int32 (N,k,*Q) count the positions of all segments in order, -1 where fewer than k exist; `weights`
    float32 (N,k,*Q), in descending order, sum to 1 (to 0 if there is none); `lse` float32 (N,*Q) is the logarithm of
    the sum of the chosen exp(score).
    """

    indices: Tensor
    weights: Tensor
    lse: Tensor


@overload
def memory_select(
    query_key: Tensor,
    memory_key: Segments,
    top_k: int,
    *,
    groups: None = None,
    return_usage: Literal[False] = False,
    **options: Unpack[ScoreOptions],
) -> MemoryWeights: ...
@overload
def memory_select(
    query_key: Tensor,
    memory_key: Tensor,
    top_k: int,
    *,
    groups: None = None,
    return_usage: Literal[True],
    **options: Unpack[ScoreOptions],
) -> tuple[MemoryWeights, Tensor]: ...
@overload
def memory_select(
    query_key: Tensor,
    memory_key: Sequence[Tensor],
    top_k: int,
    *,
    groups: None = None,
    return_usage: Literal[True],
    **options: Unpack[ScoreOptions],
) -> tuple[MemoryWeights, list[Tensor]]: ...
@overload
def memory_select(
    query_key: Tensor,
    memory_key: Segments,
    top_k: int,
    *,
    groups: GroupsValid,
    return_usage: Literal[False] = False,
    **options: Unpack[ScoreOptions],
) -> list[MemoryWeights]: ...
@overload
def memory_select(
    query_key: Tensor,
    memory_key: Tensor,
    top_k: int,
    *,
    groups: GroupsValid,
    return_usage: Literal[True],
    **options: Unpack[ScoreOptions],
) -> list[tuple[MemoryWeights, Tensor]]: ...
@overload
def memory_select(
    query_key: Tensor,
    memory_key: Sequence[Tensor],
    top_k: int,
    *,
    groups: GroupsValid,
    return_usage: Literal[True],
    **options: Unpack[ScoreOptions],
) -> list[tuple[MemoryWeights, list[Tensor]]]: ...
@overload
def memory_select(
    query_key: Tensor,
    memory_key: Segments,
    top_k: int,
    *,
    groups: None = None,
    return_usage: bool,
    **options: Unpack[ScoreOptions],
) -> MemoryWeights | tuple[MemoryWeights, Tensor | list[Tensor]]: ...
def memory_select(
    query_key: Tensor,
    memory_key: Segments,
    top_k: int,
    *,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Segments | None = None,
    selection: Tensor | None = None,
    bias: Segments | None = None,
    valid: Valid | None = None,
    memory_lengths: Lengths | None = None,
    groups: GroupsValid | None = None,
    return_usage: bool = False,
    precision: str | None = None,
) -> MemoryWeights | tuple[MemoryWeights, Tensor | list[Tensor]] | list[Any]:
    """Select the k best memory positions of each query and their weights: the first phase of a top-k `memory_read`.

    The arguments are those of `memory_read`. Returns `MemoryWeights`, differentiable through its weights and lse;
    with return_usage a pair of it and the usage; with groups a list with one result per group. `memory_gather` then
    reads the values of any number of objects.

        >>> import torch, vosops
        >>> chosen = vosops.memory_select(torch.randn(1, 8, 6, 6), torch.randn(1, 8, 2, 6, 6), 4)
        >>> chosen.weights.shape
        torch.Size([1, 4, 6, 6])
    """
    _checks.refuse_forward_mode("memory_select")
    arguments = resolve_select(
        query_key,
        memory_key,
        top_k,
        similarity=similarity,
        scale=scale,
        shrinkage=shrinkage,
        selection=selection,
        bias=bias,
        valid=valid,
        memory_lengths=memory_lengths,
        groups=groups,
        precision=precision,
    )
    kernels = backends.choose("memory_read", arguments.call)
    results: list[Any] = [None] * sum(len(together) for together, _ in arguments.passes)
    for together, memory in arguments.passes:
        scores = Scores(memory)
        for g, (score, index) in zip(together, select(kernels, scores, top_k), strict=True):
            weights, lse = softmax_of_selected(scores, score, index)
            chosen = MemoryWeights(*(memory.shape_queries(rows) for rows in (index.int(), weights, lse)))
            if return_usage:
                usage = usage_of_selected(scores, weights, index)
                results[g] = (chosen, memory.shape_usage(usage, scores.pieces))
            else:
                results[g] = chosen
    result: MemoryWeights | tuple[MemoryWeights, Tensor | list[Tensor]] = results[0]
    return result if groups is None else results


class _Select(NamedTuple):
    """The checked arguments of a selection: groups that share their scores, with these."""

    call: backends.Call
    passes: list[tuple[list[int], Memory]]


def resolve_select(
    query_key: Tensor,
    memory_key: Segments,
    top_k: int,
    *,
    valid: Valid | None = None,
    groups: GroupsValid | None = None,
    return_usage: bool = False,
    **options: Any,
) -> _Select:
    """Check the arguments of `memory_select`."""
    _checks.check_positive_int("top_k", top_k)
    valids = [valid] if groups is None else check_groups(groups, valid)
    passes = [
        (together, Memory(query_key, memory_key, [valids[g] for g in together], **options))
        for together in that_share_scores(valids)
    ]
    return _Select(passes[0][1].call, passes)


def memory_gather(weights: MemoryWeights, memory_value: ValueSegments) -> Tensor:
    """Second phase of a top-k `memory_read`: the weighted sum of the chosen positions' values.

    memory_value: (N,Cv,M) or (N,O,Cv,M), its M positions flattened, or a sequence of such segments in the order of
    the keys' segments. A batch of 1 on either side broadcasts. Returns (N,Cv,*Q) or (N,O,Cv,*Q) in the value's
    dtype. Differentiable to any order in the weights and the values.

        >>> import torch, vosops
        >>> chosen = vosops.memory_select(torch.randn(1, 8, 6, 6), torch.randn(1, 8, 2, 6, 6), 4)
        >>> vosops.memory_gather(chosen, torch.randn(1, 3, 16, 72)).shape
        torch.Size([1, 3, 16, 6, 6])
    """
    _checks.refuse_forward_mode("memory_gather")
    call, values, batch = resolve_gather(weights, memory_value)
    dtype, per_object = values[0].dtype, values[0].dim() == 4
    index, weight = weights.indices.flatten(2).long(), weights.weights.flatten(2)
    if call.dtype == torch.float64:
        weight, values = weight.double(), [value.double() for value in values]
    values = [expanded(value if per_object else value.unsqueeze(1), batch) for value in values]
    sizes = [value.shape[3] for value in values]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    out = gather(
        backends.choose("memory_read", call),
        expanded(weight, batch),
        expanded(index, batch),
        [[value] for value in values],
        offsets,
    ).to(dtype)
    out = torch.unflatten(out, 3, tuple(weights.indices.shape[2:]))
    return out if per_object else out.squeeze(1)


class _Gather(NamedTuple):
    """The checked arguments of a gather: the values of each segment as they came, and the common batch."""

    call: backends.Call
    values: list[Tensor]
    batch: int


def resolve_gather(weights: MemoryWeights, memory_value: ValueSegments) -> _Gather:
    """Check the arguments of `memory_gather`."""
    if not isinstance(weights, MemoryWeights):
        raise TypeError(f"weights must be MemoryWeights of memory_select, got {type(weights).__name__}")
    values = segments_of("memory_value", memory_value)
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"memory_value must hold tensors, got {type(value).__name__}")
        if value.dim() not in (3, 4):
            raise ValueError(f"memory_value must have shape (N,Cv,M) or (N,O,Cv,M), got {tuple(value.shape)}")
        if value.shape[1:-1] != values[0].shape[1:-1]:
            raise ValueError(
                f"memory_value must have equal objects and channels in all segments, "
                f"got {tuple(values[0].shape)} and {tuple(value.shape)}"
            )
        _checks.check_floating("memory_value", value)
        _checks.check_same_device("memory_value", value, "weights", weights.weights)
    batch = common_batch("memory_value", values, weights.indices.shape[0])
    double = any(tensor.dtype == torch.float64 for tensor in (weights.weights, *values))
    dtype = torch.float64 if double else values[0].dtype
    backward = _checks.wants_gradients(weights.weights, *values)
    return _Gather(backends.Call(values[0].device, dtype, backward=backward), values, batch)


def select(kernels: backends.Implementation, scores: Scores, top_k: int) -> list[tuple[Tensor, Tensor]]:
    """Scores and indices (N,K,P) of the best positions of each group, greatest first."""
    top_k = int(top_k)  # also a symbol of torch.compile
    found: list[tuple[Tensor, Tensor]] = []
    for piece in scores.pieces:
        score, index = kernels.run("memory_select", *piece.core, top_k)
        found.append((score, torch.where(index >= 0, index + piece.offset, -1) if piece.offset else index))
    results = []
    for group in range(len(scores.memory.ranges)):
        members = [found[i] for i in scores.members(group)]
        if len(members) == 1:
            results.append(members[0])
            continue
        score, index = (torch.cat(parts, 1) for parts in zip(*members, strict=True))
        order = torch.sort(score.detach(), dim=1, descending=True, stable=True).indices[:, :top_k]
        results.append((score.gather(1, order), index.gather(1, order)))
    return results


def softmax_of_selected(scores: Scores, score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (N,K,P) and lse (N,P) of selected scores; -1 has weight 0, a query pixel that is NaN NaN."""
    weights, lse = softmax_over_memory(torch.where(index >= 0, score, -torch.inf))
    undefined = scores.query.detach().isnan().any(1)
    weights = torch.where(index >= 0, weights, 0).masked_fill(undefined[:, None], torch.nan)
    return weights, lse.masked_fill(undefined, torch.nan)


def usage_of_selected(scores: Scores, weights: Tensor, index: Tensor) -> list[Tensor | None]:
    """Each piece's selected weights, summed over the queries."""
    total = sum(scores.memory.sizes)
    sums = weights.new_zeros(weights.shape[0], total + 1)  # the last place takes what has no position
    places = torch.where(index >= 0, index, total)
    sums = sums.scatter_add(1, places.flatten(1), weights.detach().flatten(1))

    def of(piece: Piece) -> Tensor:
        return sums[:, piece.offset : piece.offset + piece.size]

    return [of(piece) for piece in scores.pieces]


def gather(
    kernels: backends.Implementation,
    weights: Tensor,
    index: Tensor,
    values: list[list[Tensor]],
    offsets: list[int],
) -> Tensor:
    """Gather from each segment what was chosen of it, and add up; `offsets`: position of its first value.

    Weights of NaN, which a query pixel of NaN has, give NaN whatever was chosen.
    """
    total: Tensor | None = None
    for objects, offset in zip(values, offsets, strict=True):
        local = index - offset
        local = torch.where((index >= 0) & (local >= 0) & (local < objects[0].shape[3]), local, -1)
        parts = [kernels.run("memory_gather", weights, local, value) for value in objects]
        part = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        total = part if total is None else total + part
    assert total is not None
    undefined = weights.detach().isnan().any(1)
    return total.masked_fill_(undefined[:, None, None], torch.nan)
