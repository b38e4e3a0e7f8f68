"""The memory read: softmax attention over a memory of past frames (STM, STCN, XMem, Cutie), never holding it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from vosops import _checks, backends
from vosops.ops._memory_scores import (
    GroupsValid,
    Lengths,
    Memory,
    Piece,
    ScoreOptions,
    Scores,
    Segments,
    Valid,
    Values,
    ValueSegments,
    check_groups,
    described,
    that_share_scores,
    without_excluded,
)
from vosops.ops._registration import register_op, without_argument
from vosops.ops.memory_select import (
    MemoryWeights,
    gather,
    memory_gather,
    memory_select,
    resolve_gather,
    resolve_select,
    select,
    softmax_of_selected,
    usage_of_selected,
)
from vosops.reference.memory_read import (
    memory_gather_core,
    memory_read_core,
    memory_read_prior_core,
    memory_select_core,
    memory_usage_core,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class ReadOptions(ScoreOptions, total=False):
        """The options of memory_read that do not change what it returns."""

        top_k: int | None
        prior: float | None


__all__ = ["MemoryWeights", "memory_gather", "memory_read", "memory_select", "merge_reads"]

Read = tuple[Tensor, list[Tensor | None], Tensor]
"""What a group reads, the usage of each piece (None: not used), and the log-sum-exp, as the core gives them."""


@overload
def memory_read(
    query_key: Tensor,
    memory_key: Segments,
    memory_value: ValueSegments,
    *,
    groups: None = None,
    return_usage: Literal[False] = False,
    return_lse: Literal[False] = False,
    **options: Unpack[ReadOptions],
) -> Tensor: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Segments,
    memory_value: ValueSegments,
    *,
    groups: None = None,
    return_usage: Literal[False] = False,
    return_lse: Literal[True],
    **options: Unpack[ReadOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: ValueSegments,
    *,
    groups: None = None,
    return_usage: Literal[True],
    return_lse: Literal[False] = False,
    **options: Unpack[ReadOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Sequence[Tensor],
    memory_value: ValueSegments,
    *,
    groups: None = None,
    return_usage: Literal[True],
    return_lse: Literal[False] = False,
    **options: Unpack[ReadOptions],
) -> tuple[Tensor, list[Tensor]]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: ValueSegments,
    *,
    groups: None = None,
    return_usage: Literal[True],
    return_lse: Literal[True],
    **options: Unpack[ReadOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Sequence[Tensor],
    memory_value: ValueSegments,
    *,
    groups: None = None,
    return_usage: Literal[True],
    return_lse: Literal[True],
    **options: Unpack[ReadOptions],
) -> tuple[Tensor, list[Tensor], Tensor]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Segments,
    memory_value: ValueSegments,
    *,
    groups: GroupsValid,
    return_usage: Literal[False] = False,
    return_lse: Literal[False] = False,
    **options: Unpack[ReadOptions],
) -> list[Tensor]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Segments,
    memory_value: ValueSegments,
    *,
    groups: GroupsValid,
    return_usage: Literal[False] = False,
    return_lse: Literal[True],
    **options: Unpack[ReadOptions],
) -> list[tuple[Tensor, Tensor]]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: ValueSegments,
    *,
    groups: GroupsValid,
    return_usage: Literal[True],
    return_lse: Literal[False] = False,
    **options: Unpack[ReadOptions],
) -> list[tuple[Tensor, Tensor]]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Sequence[Tensor],
    memory_value: ValueSegments,
    *,
    groups: GroupsValid,
    return_usage: Literal[True],
    return_lse: Literal[False] = False,
    **options: Unpack[ReadOptions],
) -> list[tuple[Tensor, list[Tensor]]]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: ValueSegments,
    *,
    groups: GroupsValid,
    return_usage: Literal[True],
    return_lse: Literal[True],
    **options: Unpack[ReadOptions],
) -> list[tuple[Tensor, Tensor, Tensor]]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Sequence[Tensor],
    memory_value: ValueSegments,
    *,
    groups: GroupsValid,
    return_usage: Literal[True],
    return_lse: Literal[True],
    **options: Unpack[ReadOptions],
) -> list[tuple[Tensor, list[Tensor], Tensor]]: ...
@overload
def memory_read(
    query_key: Tensor,
    memory_key: Segments,
    memory_value: ValueSegments,
    *,
    groups: None = None,
    return_usage: bool = False,
    return_lse: bool = False,
    **options: Unpack[ReadOptions],
) -> Tensor | tuple[Tensor | list[Tensor], ...]: ...
def memory_read(
    query_key: Tensor,
    memory_key: Segments,
    memory_value: ValueSegments,
    *,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Segments | None = None,
    selection: Tensor | None = None,
    bias: Segments | None = None,
    valid: Valid | None = None,
    memory_lengths: Lengths | None = None,
    groups: GroupsValid | None = None,
    top_k: int | None = None,
    prior: float | None = None,
    return_usage: bool = False,
    return_lse: bool = False,
    precision: str | None = None,
) -> Tensor | tuple[Tensor | list[Tensor], ...] | list[Any]:
    """Read a memory's values with the softmax, over the memory, of its keys' similarity to each query pixel.

    *Q and *M are one or more trailing dimensions each: (H,W) and (T,H,W), a flat bank (M,), P prototypes. For a
    query pixel p and a memory position m the score is, with `s` the scale and `w` the shrinkage (1 without it),

    - "dot": s w[m] memory_key[m] . query_key[p];
    - "l2": s w[m] (2 memory_key[m] . query_key[p] - |memory_key[m]|^2), where |query_key[p]|^2 is
      omitted as in STCN and XMem; with a selection e: -s w[m] sum over c of e[c,p] (memory_key[c,m] -
      query_key[c,p])^2;

    plus bias[m]. The result is the sum over m of softmax(score)[m,p] memory_value[m].

    Args:
        query_key: (N,Ck,*Q); float32, float16, bfloat16, on the CPU also float64.
        memory_key: (N,Ck,*M), or a sequence of such segments (long-term, working, temporary memory), which are read
            in order without being concatenated. Dtypes of query, key and value may differ.
        memory_value: (N,Cv,*M), or (N,O,Cv,*M) for O objects that share the keys; a sequence of segments if
            memory_key is one. Each tensor may be replaced by a sequence over objects, which is copied into one.
            Values stored channel-last are read in place, which is the fastest layout with top_k.
        similarity: "dot" or "l2".
        scale: factor of the similarity; 1 / sqrt(Ck) unless given.
        shrinkage: (N,1,*M), one per segment.
        selection: (N,Ck,*Q), with "l2" only.
        bias: (N,*M) added to the score, one per segment.
        valid: the memory positions that exist: bool (N,*M), one per segment, or a range (start, stop) of positions
            counted over all segments; positions outside it cost nothing.
        memory_lengths: number of memory positions of each batch element, counted over all segments: (N,) int64 or
            int32 on the device of query_key, or N ints. Positions beyond it may contain anything and are not read; on
            the CPU they cost almost nothing. With `valid`, positions must satisfy both.
        groups: one `valid` for each of several groups of objects, to read them in one call: memory_value is then a
            sequence with the values of each group, and the result is a list of the results of separate calls.
        top_k: use only the k highest scores of each query (all if the memory is smaller); exact, and the first
            position wins a tie.
        prior: standard deviation, in pixels of the query, of KMN's Gaussian around the query pixel with the highest
            score for each memory position. Needs the whole affinity in memory (plain PyTorch) and a single segment.
        return_usage: also return each memory position's weights summed over the queries: (N,*M) float32, not
            differentiable; a list with one tensor per segment if memory_key is a sequence.
        return_lse: also return log(sum over m of exp(score)), (N,*Q) float32, differentiable; see `merge_reads`.
        precision: of float32 products, with the names of torch.set_float32_matmul_precision: "highest", "high" or
            "medium"; None uses PyTorch's setting. It has an effect on Intel processors with AMX and on GPUs. "ieee",
            "tf32x3" and "tf32" name the arithmetic of a GPU: "highest" is "ieee" there, the others are "tf32". See
            Concepts, "Precision of float32".

    A batch of 1 on any side broadcasts without being repeated in memory. A query pixel without a valid memory position
    reads 0, its lse is -inf. A NaN query pixel reads NaN and is not counted in the usage. The content of positions
    excluded by `valid` or memory_lengths has no influence; to ensure this, a full read on a GPU copies key and value if
    `valid` is a mask, and with memory_lengths unless Triton reads channel-last ones without gradients. With top_k a
    position whose score is NaN is not chosen, and positions that are not chosen have no influence and no gradient. A
    full read multiplies NaN like any number.

    Returns:
        (N,Cv,*Q), or (N,O,Cv,*Q), in the value's dtype; with return_usage or return_lse a tuple of (out, usage, lse)
        with the requested parts.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        NotImplementedError: under forward-mode differentiation.

    Differentiable to any order in query_key, memory_key, memory_value, shrinkage, selection and bias,
    deterministic. Scores and softmax are float32. Time O(N P M (Ck + O Cv)), with top_k O(N P (M Ck + k O Cv));
    memory O(N P (Ck + O Cv)), independent of M. Second derivatives build the affinity.

    Source: Oh et al., STM, ICCV 2019 (dot); Cheng et al., STCN, NeurIPS 2021 (l2, top_k); Cheng and Schwing, XMem,
    ECCV 2022 (shrinkage, selection, usage); Seong et al., KMN, ECCV 2020 (prior).

        >>> import torch, vosops
        >>> keys, values = torch.randn(1, 64, 5, 30, 54), torch.randn(1, 2, 512, 5, 30, 54)
        >>> vosops.memory_read(torch.randn(1, 64, 30, 54), keys, values, similarity="l2", top_k=30).shape
        torch.Size([1, 2, 512, 30, 54])
    """
    _checks.refuse_forward_mode("memory_read")
    arguments = resolve_read(
        query_key,
        memory_key,
        memory_value,
        similarity=similarity,
        scale=scale,
        shrinkage=shrinkage,
        selection=selection,
        bias=bias,
        valid=valid,
        memory_lengths=memory_lengths,
        groups=groups,
        top_k=top_k,
        prior=prior,
        precision=precision,
    )
    kernels = backends.choose("memory_read", arguments.call)
    results: list[Any] = [None] * sum(len(together) for together, *_ in arguments.passes)
    for together, memory, values in arguments.passes:
        scores = Scores(memory)
        if prior is not None:
            reads = [_read_with_prior(kernels, scores, each, prior, top_k) for each in values]
        elif top_k is not None:
            reads = _read_selected(kernels, scores, values, top_k, return_usage)
        else:
            reads = _read(kernels, scores, values, return_usage)
        for g, each, read in zip(together, values, reads, strict=True):
            results[g] = _asked_for(scores, each, read, return_usage, return_lse)
    result: Tensor | tuple[Tensor | list[Tensor], ...] = results[0]
    return result if groups is None else results


class OtherParts(Protocol):
    """The parts of a memory that are elsewhere, for a read over all of it: see `read_part`."""

    def choose(self, found: list[tuple[Tensor, Tensor]], top_k: int) -> list[Tensor]:
        """Return the index of each group with -1 for what is not among the k best of all parts.

        found: for each group the scores (N,K,P), greatest first, and indices int64 (N,K,P) of this part.
        """

    def merge(self, reads: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return each group's out (N,O,Cv,P) and lse (N,P) over all parts, from those over this part."""


def read_part(
    others: OtherParts,
    query_key: Tensor,
    memory_key: Segments,
    memory_value: ValueSegments,
    *,
    groups: GroupsValid | None = None,
    top_k: int | None = None,
    return_usage: bool = False,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Read a memory of which this is one part, as `memory_read` reads all of it; usage is of this part's positions.

    `others` is asked once for all groups in their order, whatever each of them sees of this part.
    """
    _checks.refuse_forward_mode("memory_read")
    arguments = resolve_read(query_key, memory_key, memory_value, groups=groups, top_k=top_k, **options)
    kernels = backends.choose("memory_read", arguments.call)
    count = sum(len(together) for together, *_ in arguments.passes)
    places: list[tuple[Scores, int, Values]] = [None] * count  # type: ignore[list-item]
    found: list[Any] = [None] * count
    for together, memory, values in arguments.passes:
        scores = Scores(memory)
        of_pass: list[Any]
        if top_k is None:
            of_pass = _full_reads(kernels, scores, values)
        else:
            of_pass = select(kernels, scores, top_k)
        for i, g in enumerate(together):
            places[g], found[g] = (scores, i, values[i]), of_pass[i]
    weights: list[Tensor] = []
    chosen: list[Tensor] = []
    reads: list[tuple[Tensor, Tensor]] = found
    if top_k is not None:
        chosen, reads = others.choose(found, top_k), []
        for (scores, _, each), (score, _), index in zip(places, found, chosen, strict=True):
            weight, lse = softmax_of_selected(scores, score, index)
            weights.append(weight)
            reads.append((_gather_selected(kernels, scores, each, weight, index), lse))
    results: list[Any] = []
    for g, (out, lse) in enumerate(others.merge(reads)):
        scores, group, each = places[g]
        usage: list[Tensor | None] = []
        if return_usage and top_k is None:
            usage = _usage_of_group(kernels, scores, group, lse.detach())
        elif return_usage:
            part, whole = reads[g][1].detach(), lse.detach()
            share = torch.where(part.isneginf(), 0, (part - whole).exp())
            usage = usage_of_selected(scores, weights[g].detach() * share[:, None], chosen[g])
        results.append(_asked_for(scores, each, (out, usage, lse), return_usage, return_lse))
    return results[0] if groups is None else results


@torch.no_grad()
def usage_under(lse: Tensor, query_key: Tensor, memory_key: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Return each segment's usage (N,*M) by a full read whose lse (N,P) over all parts of the memory is known."""
    arguments = resolve_read(query_key, memory_key, [key[:, :1] for key in memory_key], **options)
    kernels = backends.choose("memory_read", arguments.call)
    ((_, memory, (values,)),) = arguments.passes
    scores = Scores(memory)
    usage = _usage_of_group(kernels, scores, 0, lse)
    of_segments = memory.shape_usage(usage, scores.pieces, values)
    assert not isinstance(of_segments, Tensor)  # a sequence of keys was given
    return of_segments


class _Arguments(NamedTuple):
    """The checked arguments of a read: groups that share their scores, the inputs of these, and the values of each."""

    call: backends.Call
    passes: list[tuple[list[int], Memory, list[Values]]]

    @property
    def values_alike(self) -> list[Any]:
        """What must be alike in the parts of a memory: dtype, objects and channels of each group's values."""
        places = {
            g: each for together, _, values in self.passes for g, each in zip(together, values, strict=True)
        }
        return [
            (each.dtype, each.per_object, each.objects, each.segments[0][0].shape[2])
            for _, each in sorted(places.items())
        ]


def resolve_read(
    query_key: Tensor,
    memory_key: Segments,
    memory_value: ValueSegments,
    *,
    valid: Valid | None = None,
    groups: GroupsValid | None = None,
    top_k: int | None = None,
    prior: float | None = None,
    return_usage: bool = False,
    return_lse: bool = False,
    **options: Any,
) -> _Arguments:
    """Check the arguments of `memory_read`."""
    given: list[Any]
    if groups is None:
        valids, given = [valid], [memory_value]
    else:
        valids = check_groups(groups, valid)
        if not isinstance(memory_value, Sequence) or len(memory_value) != len(valids):
            raise ValueError(
                f"memory_value must be a sequence with one entry for each of the {len(valids)} groups, "
                f"got {described(memory_value)}"
            )
        given = list(memory_value)
    if top_k is not None:
        _checks.check_positive_int("top_k", top_k)
    plain = None
    if prior is not None:
        _check_prior(prior, query_key)
        plain = "a prior needs the whole affinity, which is plain PyTorch's to build"
    passes = []
    for together in that_share_scores(valids):
        memory = Memory(query_key, memory_key, [valids[g] for g in together], plain=plain, **options)
        if prior is not None and (memory.segmented or len(together) > 1):
            raise ValueError(f"prior must be None with segments or several groups, got {prior}")
        passes.append((together, memory, [memory.values(given[g], i) for i, g in enumerate(together)]))
    return _Arguments(passes[0][1].call, passes)


def _check_prior(prior: Any, query_key: Any) -> None:
    if not _checks.check_number("prior", prior) > 0:
        raise ValueError(f"prior must be greater than 0, got {prior}")
    if isinstance(query_key, Tensor) and query_key.dim() != 4:
        raise ValueError(f"query_key must have shape (N,Ck,H,W) with a prior, got {tuple(query_key.shape)}")


def merge_reads(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine reads over parts of a memory into the read over all of it: (out, lse), exactly and differentiably.

    outs: each (N,[O,]Cv,*Q); lses: each (N,*Q), from `memory_read(..., return_lse=True)` on each part.

        >>> import torch, vosops
        >>> q, k, v = torch.randn(1, 8, 6, 6), torch.randn(1, 8, 72), torch.randn(1, 4, 72)
        >>> parts = [vosops.memory_read(q, k[..., s], v[..., s], return_lse=True) for s in (slice(30), slice(30, 72))]
        >>> out, lse = vosops.merge_reads(*zip(*parts))
        >>> torch.allclose(out, vosops.memory_read(q, k, v), atol=1e-5)
        True
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, Sequence):
            raise TypeError(f"{name} must be a sequence of tensors, got {type(parts).__name__}")
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many, at least one, got {len(outs)} and {len(lses)}")
    for out, part_lse in zip(outs, lses, strict=True):
        for name, tensor in (("outs", out), ("lses", part_lse)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must hold tensors, got {type(tensor).__name__}")
        between = out.dim() - part_lse.dim()
        if out.shape != outs[0].shape or part_lse.shape != lses[0].shape:
            raise ValueError(
                f"outs and lses must have equal shapes, got {tuple(outs[0].shape)} and {tuple(out.shape)}, "
                f"{tuple(lses[0].shape)} and {tuple(part_lse.shape)}"
            )
        if between not in (1, 2) or (*out.shape[:1], *out.shape[1 + between :]) != tuple(part_lse.shape):
            raise ValueError(
                f"lses must have the shape (N,*Q) of outs (N,[O,]Cv,*Q), got {tuple(part_lse.shape)} and "
                f"{tuple(out.shape)}"
            )
    stacked = torch.stack(list(lses))
    greatest = stacked.detach().amax(0)
    exponentials = torch.exp(stacked - torch.where(greatest.isneginf(), 0, greatest))
    total = exponentials.sum(0)
    some = total != 0
    total = torch.where(some, total, 1)
    lse = torch.where(some, greatest + total.log(), -torch.inf)
    shares = exponentials / total
    merged = torch.zeros((), dtype=stacked.dtype, device=stacked.device)
    for out, share in zip(outs, shares, strict=True):
        ones = (1,) * (out.dim() - share.dim())
        merged = merged + out.to(share.dtype) * share.view(share.shape[0], *ones, *share.shape[1:])
    return merged.to(outs[0].dtype), lse


def _asked_for(scores: Scores, values: Values, read: Read, return_usage: bool, return_lse: bool) -> Any:
    """Return what a call returns for a group."""
    (out, usage, lse), memory = read, scores.memory
    asked_for: list[Any] = [_shape_out(out, values, memory)]
    if return_usage:
        asked_for.append(memory.shape_usage(usage, scores.pieces, values))
    if return_lse:
        asked_for.append(memory.shape_queries(lse, values))
    return asked_for[0] if len(asked_for) == 1 else tuple(asked_for)


def _read(
    kernels: backends.Implementation, scores: Scores, values: list[Values], return_usage: bool
) -> list[Read]:
    """Return the full softmax for each group."""
    results: list[Read] = []
    for group, (out, lse) in enumerate(_full_reads(kernels, scores, values)):
        usage: list[Tensor | None] = [None] * len(scores.pieces)
        if return_usage:
            usage = _usage_of_group(kernels, scores, group, lse)
        results.append((out, usage, lse))
    return results


def _full_reads(
    kernels: backends.Implementation, scores: Scores, values: list[Values]
) -> list[tuple[Tensor, Tensor]]:
    """Return out and lse of the full softmax for each group."""
    members = [scores.members(group) for group in range(len(values))]
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in values]
    for i, piece in enumerate(scores.pieces):
        inside = [group for group in range(len(values)) if i in members[group]]
        for alike in _by_kind(inside, values, piece):
            each = [values[group].of(piece) for group in alike]
            out, lse = _read_piece(kernels, piece, [value for part in each for value in part], scores.memory)
            sizes = [values[group].objects for group in alike]
            shares = [out] if len(alike) == 1 else out.split(sizes, 1)  # a split's gradient is a copy
            for group, share in zip(alike, shares, strict=True):
                parts[group].append((share, lse))
    return [reads[0] if len(reads) == 1 else merge_reads(*zip(*reads, strict=True)) for reads in parts]


@torch.no_grad()
def _usage_of_group(
    kernels: backends.Implementation, scores: Scores, group: int, lse: Tensor
) -> list[Tensor | None]:
    """Return each piece's usage by a group's full read, None where the group does not see it."""
    usage: list[Tensor | None] = [None] * len(scores.pieces)
    for i in scores.members(group):
        usage[i] = _usage(kernels, scores.pieces[i], lse)
    return usage


def _usage(kernels: backends.Implementation, piece: Piece, lse: Tensor) -> Tensor:
    """Each position's weights summed over the queries; a weight that is NaN counts as 0."""
    query, key, shrinkage, query_bias, *rest = piece.core
    query = query.masked_fill(query.isnan(), 0)
    query_bias = None if query_bias is None else query_bias.masked_fill(query_bias.isnan(), 0)
    lse = lse.masked_fill(lse.isnan(), torch.inf)
    used: Tensor = kernels.run("memory_usage", query, key, shrinkage, query_bias, *rest, lse)
    return used.masked_fill(used.isnan(), 0)


def _read_piece(
    kernels: backends.Implementation, piece: Piece, values: list[Tensor], memory: Memory
) -> tuple[Tensor, Tensor]:
    """One call of the core, with the values of all objects side by side: copied only where they must be."""
    query, key, *rest = piece.core
    value = values[0]
    if len(values) > 1:
        traced = _checks.wants_gradients(query, key, *values, *rest)
        together = None if traced else _side_by_side(values)
        if together is None and kernels.name == "cpp" and query.device.type == "cpu" and not traced:
            out, lse = torch.ops.vosops.memory_read_list(query, key, values, *rest)
            return out, lse
        value = torch.cat(values, 1) if together is None else together
    if _multiplies_excluded(kernels, memory, query, key, value, rest):
        shrinkage, query_bias, key_bias, *rest = rest
        key, value, shrinkage = without_excluded(key, value, shrinkage, key_bias)
        rest = [shrinkage, query_bias, key_bias, *rest]
    out, lse = kernels.run("memory_read", query, key, value, *rest)
    return out, lse


def _multiplies_excluded(
    kernels: backends.Implementation,
    memory: Memory,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vectors: list[Any],
) -> bool:
    """Whether a full read multiplies by 0 what `valid` or memory_lengths leaves out, and so passes NaN on.

    On the CPU no implementation but plain PyTorch does. Triton's read can end with a memory's length; its gradients do
    not, and the wrappers of vmap hide what is differentiated, and the strides.
    """
    if kernels.name == "cpp" and memory.call.device.type == "cpu":
        return False
    if any(mask is not None for mask in memory.masks):
        return True
    if memory.lengths is None:
        return False
    given = [query, key, value, *(vector for vector in vectors if isinstance(vector, Tensor))]
    if (
        kernels.name != "triton"
        or _checks.wants_gradients(*given)
        or torch.compiler.is_compiling()
        or any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in given)
    ):
        return True
    ends: bool = import_module("vosops.triton.memory_read").ends_with_memory(query, key, value)
    return not ends


def _read_selected(
    kernels: backends.Implementation, scores: Scores, values: list[Values], top_k: int, return_usage: bool
) -> list[Read]:
    """Return the softmax over the top_k best positions for each group."""
    results = []
    for each, (score, index) in zip(values, select(kernels, scores, top_k), strict=True):
        weights, lse = softmax_of_selected(scores, score, index)
        out = _gather_selected(kernels, scores, each, weights, index)
        usage = usage_of_selected(scores, weights, index) if return_usage else []
        results.append((out, usage, lse))
    return results


def _gather_selected(
    kernels: backends.Implementation, scores: Scores, values: Values, weights: Tensor, index: Tensor
) -> Tensor:
    """Return the weighted sum of a group's values at the selected positions of all segments."""
    offsets = [offset + start for offset, start in zip(scores.memory.offsets, values.starts, strict=True)]
    return gather(kernels, weights, index, values.segments, offsets)


def _read_with_prior(
    kernels: backends.Implementation, scores: Scores, values: Values, prior: float, top_k: int | None
) -> Read:
    """Return the read with KMN's Gaussian."""
    (piece,) = scores.pieces
    *core, _ = piece.core
    out, usage, lse = kernels.run(
        "memory_read_prior", *core, values.of(piece), scores.memory.query_shape, prior, top_k
    )
    return out, [usage], lse


def _shape_out(out: Tensor, values: Values, memory: Memory) -> Tensor:
    """Return the core's (N,O,Cv,P) as the public output."""
    out = out.to(values.dtype)
    if values.fold is not None:
        out = torch.unflatten(out.squeeze(0), 0, values.fold)
    out = torch.unflatten(out, 3, memory.query_shape)
    return out if values.per_object else out.squeeze(1)


def _by_kind(groups: list[int], values: list[Values], piece: Piece) -> list[list[int]]:
    """Return the groups in sets whose values of a piece are of one kind."""
    sets: list[list[int]] = []
    for group in groups:
        kind = values[group].kind(piece)
        alike = next((each for each in sets if values[each[0]].kind(piece) == kind), None)
        if alike is None:
            sets.append([group])
        else:
            alike.append(group)
    return sets


def _side_by_side(values: list[Tensor]) -> Tensor | None:
    """Values (N,1,Cv,M) that lie at equal distances in one storage, as a bank's do, as one view (N,O,Cv,M); or None."""
    first = values[0]
    if (
        torch.compiler.is_compiling()
        or not isinstance(first.storage_offset(), int)
        or any(torch._C._functorch.is_functorch_wrapped_tensor(v) for v in values)
    ):
        return None
    alike = all(v.shape == first.shape and v.stride() == first.stride() for v in values)
    if first.shape[1] != 1 or not alike or len({v.untyped_storage()._cdata for v in values}) > 1:
        return None
    distances = {after.storage_offset() - before.storage_offset() for before, after in pairwise(values)}
    distance = distances.pop()
    if distances or distance <= 0:
        return None
    shape = (first.shape[0], len(values), *first.shape[2:])
    return first.as_strided(shape, (first.stride(0), distance, *first.stride()[2:]))


register_op(
    "memory_read",
    resolve={"memory_read": resolve_read, "memory_select": resolve_select, "memory_gather": resolve_gather},
    reference={
        "memory_read": without_argument(7, memory_read_core),
        "memory_usage": without_argument(6, memory_usage_core),
        "memory_select": without_argument(6, memory_select_core),
        "memory_gather": memory_gather_core,
        "memory_read_prior": memory_read_prior_core,
    },
    needs=["memory_read", "memory_usage", "memory_select", "memory_gather"],
)
