"""The memory read: softmax attention over a memory of past frames (STM, STCN, XMem, Cutie), never holding it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vosops import _checks, backends
from vosops.ops._registration import (
    HAS_CPP,
    cpp_reasons_not,
    define_triton_op,
    differentiate,
    register_pieces,
    register_vmap,
    triton_reasons_not,
    without_autocast,
)
from vosops.reference.memory_read import (
    gaussian_prior,
    memory_gather_core,
    memory_read_core,
    memory_scores,
    memory_select_core,
    memory_usage_core,
    softmax_over_memory,
)

SIMILARITIES = ("dot", "l2")
_SQUARED_LENGTH_POSITIONS = 1 << 15  # memory positions whose squares are held at a time

Segments = Tensor | Sequence[Tensor]
ValueSegments = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]
Valid = Tensor | Sequence[Tensor] | tuple[int, int]
GroupsValid = Sequence[Valid | None]


class MemoryWeights(NamedTuple):
    """The k best memory positions of each query, and what the read takes of each.

    `indices` int32 (N,k,*Q) count the positions of all segments in order, -1 where fewer than k exist; `weights`
    float32 (N,k,*Q), greatest first, sum to 1 (to 0 where there is none); `lse` float32 (N,*Q) is the logarithm
    of the sum of the chosen exp(score).
    """

    indices: Tensor
    weights: Tensor
    lse: Tensor


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
    groups: GroupsValid | None = None,
    top_k: int | None = None,
    prior: float | None = None,
    return_usage: bool = False,
    return_lse: bool = False,
    precision: str | None = None,
) -> Any:
    """Read a memory's values with the softmax, over the memory, of its keys' similarity to each query pixel.

    *Q and *M are one or more trailing dimensions each: (H,W) and (T,H,W), a flat bank (M,), P prototypes. For a
    query pixel p and a memory position m the score is, with `s` the scale and `w` the shrinkage (1 without it),

    - "dot": s w[m] memory_key[m] . query_key[p];
    - "l2": s w[m] (2 memory_key[m] . query_key[p] - |memory_key[m]|^2), where |query_key[p]|^2 is left out as in
      STCN and XMem; with a selection e: -s w[m] sum over c of e[c,p] (memory_key[c,m] - query_key[c,p])^2;

    plus bias[m]. The result is the sum over m of softmax(score)[m,p] memory_value[m].

    Args:
        query_key: (N,Ck,*Q); float32, float16, bfloat16, on the CPU also float64.
        memory_key: (N,Ck,*M), or a sequence of such segments (long-term, working, temporary memory), which are read
            in order without being concatenated. Dtypes of query, key and value may differ.
        memory_value: (N,Cv,*M), or (N,O,Cv,*M) for O objects that share the keys; a sequence of segments where
            memory_key is one; in place of a tensor a sequence over objects, which is copied into one. Values stored
            channel-last are read in place, fastest so with top_k.
        similarity: "dot" or "l2".
        scale: factor of the similarity; 1 / sqrt(Ck) unless given.
        shrinkage: (N,1,*M), one per segment.
        selection: (N,Ck,*Q), with "l2" only.
        bias: (N,*M) added to the score, one per segment.
        valid: the memory positions that exist: bool (N,*M), one per segment, or a range (start, stop) of positions
            counted over all segments; positions outside of it cost nothing.
        groups: groups of objects, each with its own `valid` (None: all of the memory) in this sequence and its own
            entry in the sequence that memory_value then is. Groups of ranges share one pass over the scores, a group
            of masks is read by itself. The result is a list with what a call for each group would return.
        top_k: use only the k greatest scores of each query (all where the memory is smaller); exact, on a tie the
            first position wins.
        prior: standard deviation, in pixels of the query, of KMN's Gaussian around the query pixel that each memory
            position likes best. Needs the whole affinity in memory (plain PyTorch) and a single segment.
        return_usage: also return each memory position's weights summed over the queries: (N,*M) float32, not
            differentiable; a list with one per segment where memory_key is a sequence.
        return_lse: also return log(sum over m of exp(score)), (N,*Q) float32, differentiable; see `merge_reads`.
        precision: of float32 products on tensor cores: "ieee", "tf32x3" or "tf32"; None means "ieee" unless
            torch.backends.cuda.matmul.allow_tf32 is on.

    A batch of 1 on any side broadcasts without being repeated in memory. A query pixel without a valid memory
    position reads 0, its lse is -inf. A query pixel that is NaN reads NaN; with top_k a key that is NaN is not chosen.

    Returns:
        (N,Cv,*Q), or (N,O,Cv,*Q), in the value's dtype; with return_usage or return_lse a tuple (out, usage, lse) of
        those asked for.

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
    if groups is None:
        valids, given = [valid], [memory_value]
    else:
        valids = _check_groups(groups, valid)
        if not isinstance(memory_value, Sequence) or len(memory_value) != len(valids):
            raise ValueError(
                f"memory_value must be a sequence with one entry for each of the {len(valids)} groups"
            )
        given = list(memory_value)
    if prior is not None:
        _check_prior(prior, query_key, top_k)
    results: list[Any] = [None] * len(valids)
    for together in _that_share_scores(valids):
        memory = _Memory(
            query_key, memory_key, similarity, scale, shrinkage, selection, bias, [valids[g] for g in together],
            precision,
        )  # fmt: skip
        values = [memory.values(given[g], i) for i, g in enumerate(together)]
        if prior is not None:
            reads = [_read_with_prior(memory, each, prior, top_k) for each in values]
        elif top_k is not None:
            reads = memory.read_selected(values, top_k, return_usage)
        else:
            reads = memory.read(values, return_usage)
        for g, each, (out, usage, lse) in zip(together, values, reads, strict=True):
            result: list[Any] = [memory.shape_out(out, each)]
            if return_usage:
                result.append(memory.shape_usage(usage, each))
            if return_lse:
                result.append(memory.shape_queries(lse, each))
            results[g] = result[0] if len(result) == 1 else tuple(result)
    return results[0] if groups is None else results


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
    groups: GroupsValid | None = None,
    return_usage: bool = False,
    precision: str | None = None,
) -> Any:
    """First phase of a top-k `memory_read`: the k best memory positions of each query and their weights.

    Arguments as those of `memory_read`. Returns `MemoryWeights`, differentiable through its weights and lse; with
    return_usage a pair of it and the usage; with groups a list with one or the other for each. Values of any number
    of objects are then read by `memory_gather`.

        >>> import torch, vosops
        >>> chosen = vosops.memory_select(torch.randn(1, 8, 6, 6), torch.randn(1, 8, 2, 6, 6), 4)
        >>> chosen.weights.shape
        torch.Size([1, 4, 6, 6])
    """
    _checks.refuse_forward_mode("memory_select")
    valids = [valid] if groups is None else _check_groups(groups, valid)
    results: list[Any] = [None] * len(valids)
    for together in _that_share_scores(valids):
        memory = _Memory(
            query_key, memory_key, similarity, scale, shrinkage, selection, bias, [valids[g] for g in together],
            precision,
        )  # fmt: skip
        for g, (score, index) in zip(together, memory.select(top_k), strict=True):
            weights, lse = memory.softmax_of_selected(score, index)
            chosen = MemoryWeights(*(memory.shape_queries(rows) for rows in (index.int(), weights, lse)))
            usage = memory.usage_of_selected(weights, index) if return_usage else None
            results[g] = chosen if usage is None else (chosen, memory.shape_usage(usage))
    return results[0] if groups is None else results


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
    if not isinstance(weights, MemoryWeights):
        raise TypeError(f"weights must be MemoryWeights of memory_select, got {type(weights).__name__}")
    segments = _segments("memory_value", memory_value, None)
    for value in segments:
        if not isinstance(value, Tensor):
            raise TypeError(f"memory_value must hold tensors, got {type(value).__name__}")
        if value.dim() not in (3, 4):
            raise ValueError(f"memory_value must have shape (N,Cv,M) or (N,O,Cv,M), got {tuple(value.shape)}")
        if value.shape[1:-1] != segments[0].shape[1:-1]:
            raise ValueError(
                f"memory_value must have equal objects and channels in all segments, "
                f"got {tuple(segments[0].shape)} and {tuple(value.shape)}"
            )
        _checks.check_floating("memory_value", value)
        _checks.check_same_device("memory_value", value, "weights", weights.weights)
    per_object, dtype = segments[0].dim() == 4, segments[0].dtype
    index, weight = weights.indices.flatten(2).long(), weights.weights.flatten(2)
    if any(tensor.dtype == torch.float64 for tensor in (weight, *segments)):
        weight, segments = weight.double(), [value.double() for value in segments]
    values = [value if per_object else value.unsqueeze(1) for value in segments]
    batch = _common_batch("memory_value", values, index.shape[0])
    index, weight = _expand(index, batch), _expand(weight, batch)
    values = [_expand(value, batch) for value in values]
    kernels = backends.choose("memory_read", (values[0],))
    sizes = [value.shape[3] for value in values]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    out = _gather_segments(kernels, weight, index, [[value] for value in values], offsets).to(dtype)
    out = torch.unflatten(out, 3, tuple(weights.indices.shape[2:]))
    return out if per_object else out.squeeze(1)


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
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be as many, at least one, got {len(outs)} and {len(lses)}")
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


class _Piece(NamedTuple):
    """Adjacent positions of one segment as the core takes them: key (N,C,M), and (N,M) that make scores of products."""

    key: Tensor
    shrinkage: Tensor | None
    key_bias: Tensor | None
    segment: int
    start: int  # of the piece within its segment
    offset: int  # of the piece's first position among those of all segments

    @property
    def size(self) -> int:
        return self.key.shape[2]


class _Values(NamedTuple):
    """A group's values: for each segment tensors (N,O,Cv,M), one after the other over the objects."""

    segments: list[list[Tensor]]
    starts: list[int]  # position of its segment that a tensor's first one is
    per_object: bool
    fold: (
        tuple[int, int] | None
    )  # (N,O) where values of several batch elements under one affinity became objects
    dtype: torch.dtype

    def of(self, piece: _Piece) -> list[Tensor]:
        first = piece.start - self.starts[piece.segment]
        return [value[..., first : first + piece.size] for value in self.segments[piece.segment]]

    def kind(self, piece: _Piece) -> tuple[torch.dtype, int]:
        """Values of one dtype and as many channels fit one call of the core."""
        first = self.segments[piece.segment][0]
        return first.dtype, first.shape[2]

    @property
    def objects(self) -> int:
        return sum(value.shape[1] for value in self.segments[0])


class _Memory:
    """The checked arguments of a read in the core's form, and the core's kernels over all pieces.

    Segments are cut where a group's range begins or ends, so that a piece belongs to a group as a whole or not at all
    and its scores are computed once for all groups.
    """

    def __init__(
        self,
        query_key: Tensor,
        memory_key: Segments,
        similarity: str,
        scale: float | None,
        shrinkage: Segments | None,
        selection: Tensor | None,
        bias: Segments | None,
        valids: list[Valid | None],
        precision: str | None,
    ) -> None:
        self.segmented = not isinstance(memory_key, Tensor)
        keys = _segments("memory_key", memory_key, None)
        _check_keys(query_key, keys)
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be 'dot' or 'l2', got {similarity!r}")
        if selection is not None:
            if similarity != "l2":
                raise ValueError("selection must be None unless similarity is 'l2'")
            _checks.check_tensor("selection", selection, ("N", *query_key.shape[1:]))
            _checks.check_floating("selection", selection)
            _checks.check_same_device("selection", selection, "query_key", query_key)
        channels = query_key.shape[1]
        scale = 1 / math.sqrt(channels) if scale is None else _checked_number("scale", scale)
        self.query_shape = tuple(query_key.shape[2:])
        double = any(tensor.dtype == torch.float64 for tensor in (query_key, *keys))
        self.wide = torch.float64 if double else torch.float32
        self.precision = _checks.resolve_precision(precision, query_key)
        self.batch = _common_batch("memory_key", keys, query_key.shape[0])
        if selection is not None:
            self.batch = _common_batch("selection", [selection], self.batch)
        count = len(keys)
        shrinkages = _segments("shrinkage", shrinkage, count)
        biases = _segments("bias", bias, count)
        self.shapes = [tuple(key.shape[2:]) for key in keys]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.offsets = [sum(self.sizes[:i]) for i in range(count)]
        found = [_valid_range(valid, count, sum(self.sizes)) for valid in valids]
        self.ranges = [(start, max(start, stop)) for start, stop, _ in found]
        masks = found[0][2]  # groups of masks are alone

        query = query_key.flatten(2)
        self.query_bias: Tensor | None = None
        self.scale = scale
        if similarity == "l2" and selection is not None:
            query, chosen = torch.broadcast_tensors(query.to(self.wide), selection.flatten(2).to(self.wide))
            self.query_bias = -scale * (chosen * query.square()).sum(1)
            query = torch.cat([2 * chosen * query, -chosen], 1)
        elif similarity == "l2":
            self.scale = 2 * scale
        if query.dtype != keys[0].dtype or double or any(key.dtype != query.dtype for key in keys):
            query = query.to(self.wide)
        self.query = query

        self.pieces: list[_Piece] = []
        for i, first, last in _cut(self.sizes, self.ranges):
            key = keys[i]

            def part(
                name: str, vector: Tensor | None, lead: tuple[int, ...], key: Tensor = key
            ) -> Tensor | None:
                """An (N,*lead,*M) argument as (N,M), of the piece's positions."""
                if vector is None:
                    return None
                _checks.check_tensor(name, vector, ("N", *lead, *key.shape[2:]))
                _checks.check_same_device(name, vector, "query_key", query_key)
                if name != "valid":
                    _checks.check_floating(name, vector)
                elif vector.dtype != torch.bool:
                    raise TypeError(f"valid must be bool or a range (start, stop), got {vector.dtype}")
                self.batch = _common_batch(name, [vector], self.batch)
                flat = vector.flatten(1)[:, first:last]  # noqa: B023
                return flat if flat.dtype == torch.bool else flat.to(self.wide)

            flat_key = key.flatten(2)[:, :, first:last]
            flat_key = flat_key.to(self.wide) if double else flat_key
            shrink = part("shrinkage", shrinkages[i], (1,))
            key_bias = part("bias", biases[i], ())
            if similarity == "l2" and selection is None:
                squared = -scale * _squared_length(flat_key, self.wide)
                squared = squared if shrink is None else squared * shrink
                key_bias = squared if key_bias is None else key_bias + squared
            mask = part("valid", masks[i], ())
            if mask is not None:
                zero = torch.zeros((), dtype=self.wide, device=mask.device)
                key_bias = torch.where(mask, zero if key_bias is None else key_bias, -torch.inf)
            self.pieces.append(_Piece(flat_key, shrink, key_bias, i, first, self.offsets[i] + first))
        self.kernels = backends.choose("memory_read", (self.query,))

    def members(self, group: int) -> list[int]:
        """The pieces of a group; an empty one where its range is empty."""
        start, stop = self.ranges[group]
        inside = [
            i for i, p in enumerate(self.pieces) if p.size and start <= p.offset and p.offset + p.size <= stop
        ]
        return inside or [next(i for i, piece in enumerate(self.pieces) if piece.size == 0)]

    def values(self, memory_value: ValueSegments, group: int) -> _Values:
        """The checked values of a group."""
        if self.segmented:
            if not isinstance(memory_value, Sequence) or len(memory_value) != len(self.shapes):
                raise ValueError(
                    "memory_value must be a sequence with one entry for each segment of memory_key"
                )
            given: list[Any] = list(memory_value)
        else:
            given = [memory_value]
        start, stop = self.ranges[group]
        segments: list[list[Tensor]] = []
        starts = []
        per_object = False
        for value, shape, size, offset in zip(given, self.shapes, self.sizes, self.offsets, strict=True):
            first, last = (min(max(end - offset, 0), size) for end in (start, stop))
            objects = _segments("memory_value", value, None)
            flat = []
            for each in objects:
                if not isinstance(each, Tensor):
                    raise TypeError(f"memory_value must hold tensors, got {type(each).__name__}")
                _checks.check_floating("memory_value", each)
                _checks.check_same_device("memory_value", each, "query_key", self.query)
                alone = isinstance(value, Tensor)
                lead = ("N", "O", "Cv") if alone and each.dim() == 3 + len(shape) else ("N", "Cv")
                positions = each.shape[len(lead) :]
                of_range_only = len(positions) == len(shape) and math.prod(positions) == last - first < size
                if not of_range_only:
                    _checks.check_tensor("memory_value", each, (*lead, *shape))
                per_object = not alone or len(lead) == 3
                each = each.flatten(len(lead))
                flat.append(each if len(lead) == 3 else each.unsqueeze(1))
            if any(each.shape != flat[0].shape or each.dtype != flat[0].dtype for each in flat):
                raise ValueError("memory_value must hold objects of equal shape and dtype")
            segments.append(flat)
            starts.append(first if flat[0].shape[3] != size else 0)
        every = [value for flat in segments for value in flat]
        dtype = every[0].dtype
        counts = [(len(flat) * flat[0].shape[1], flat[0].shape[2]) for flat in segments]
        if any(each != counts[0] for each in counts):
            raise ValueError(f"memory_value must have equal (O,Cv) in all segments, got {counts}")
        if self.wide == torch.float64 or any(value.dtype == torch.float64 for value in every):
            if self.wide != torch.float64:
                raise TypeError("memory_value must not be float64 unless query_key or memory_key is")
            segments = [[value.to(torch.float64) for value in flat] for flat in segments]
        fold = None
        batch = _common_batch("memory_value", every, self.batch)
        if batch != self.batch:
            fold = (batch, counts[0][0])
            segments = [_fold_batch([_expand(value, batch) for value in flat]) for flat in segments]
        return _Values(segments, starts, per_object, fold, dtype)

    def core(self, piece: _Piece) -> tuple[Any, ...]:
        """query, key, shrinkage, query_bias, key_bias, scale, precision of a core op."""
        vectors = (piece.shrinkage, self.query_bias, piece.key_bias)
        expanded = [None if vector is None else _expand(vector, self.batch) for vector in vectors]
        query, key = _expand(self.query, self.batch), _expand(piece.key, self.batch)
        return query, key, *expanded, self.scale, self.precision

    def read(
        self, values: list[_Values], return_usage: bool
    ) -> list[tuple[Tensor, list[Tensor | None], Tensor]]:
        """(out, usage, lse) of the full softmax for each group."""
        members = [self.members(group) for group in range(len(values))]
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in values]
        for i, piece in enumerate(self.pieces):
            inside = [group for group in range(len(values)) if i in members[group]]
            for alike in _by_kind(inside, values, piece):
                each = [values[group].of(piece) for group in alike]
                out, lse = self._read_piece(piece, [value for parts in each for value in parts])
                sizes = [values[group].objects for group in alike]
                shares = [out] if len(alike) == 1 else out.split(sizes, 1)  # a split's gradient is a copy
                for group, share in zip(alike, shares, strict=True):
                    parts[group].append((share, lse))
        results = []
        for group, reads in enumerate(parts):
            out, lse = reads[0] if len(reads) == 1 else merge_reads(*zip(*reads, strict=True))
            usage: list[Tensor | None] = [None] * len(self.pieces)
            if return_usage:
                with torch.no_grad():
                    for i in members[group]:
                        usage[i] = self.kernels.run("memory_usage", *self.core(self.pieces[i]), lse)
            results.append((out, usage, lse))
        return results

    def _read_piece(self, piece: _Piece, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        query, key, *rest = self.core(piece)
        values = [_expand(value, self.batch) for value in values]
        if len(values) > 1:
            tensors = [query, key, *values, *(t for t in rest if isinstance(t, Tensor))]
            traced = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            together = None if traced else _side_by_side(values)
            if together is None and self.kernels.name == "cpp" and query.device.type == "cpu" and not traced:
                out, lse = torch.ops.vosops.memory_read_list(query, key, values, *rest)
                return out, lse
            values = [torch.cat(values, 1) if together is None else together]
        out, lse = self.kernels.run("memory_read", query, key, values[0], *rest)
        return out, lse

    def select(self, top_k: int) -> list[tuple[Tensor, Tensor]]:
        """Scores and indices (N,K,P) of the best positions of each group, greatest first."""
        top_k = _checks.check_positive_int("top_k", top_k)
        scores, indices = [], []
        for piece in self.pieces:
            score, index = self.kernels.run("memory_select", *self.core(piece), top_k)
            scores.append(score)
            indices.append(torch.where(index >= 0, index + piece.offset, -1) if piece.offset else index)
        results = []
        for group in range(len(self.ranges)):
            members = self.members(group)
            if len(members) == 1:
                results.append((scores[members[0]], indices[members[0]]))
                continue
            score, index = (torch.cat([found[i] for i in members], 1) for found in (scores, indices))
            order = torch.sort(score.detach(), dim=1, descending=True, stable=True).indices[:, :top_k]
            results.append((score.gather(1, order), index.gather(1, order)))
        return results

    def read_selected(
        self, values: list[_Values], top_k: int, return_usage: bool
    ) -> list[tuple[Tensor, list[Tensor | None], Tensor]]:
        """(out, usage, lse) of the softmax over the top_k best positions for each group."""
        results = []
        for each, (score, index) in zip(values, self.select(top_k), strict=True):
            weights, lse = self.softmax_of_selected(score, index)
            expanded = [[_expand(value, self.batch) for value in flat] for flat in each.segments]
            offsets = [offset + start for offset, start in zip(self.offsets, each.starts, strict=True)]
            out = _gather_segments(self.kernels, weights, index, expanded, offsets)
            usage = self.usage_of_selected(weights, index) if return_usage else []
            results.append((out, usage, lse))
        return results

    def softmax_of_selected(self, score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N,K,P) and lse (N,P) of selected scores; -1 has weight 0, a query pixel that is NaN NaN."""
        weights, lse = softmax_over_memory(torch.where(index >= 0, score, -torch.inf))
        undefined = self.query.detach().isnan().any(1)
        weights = torch.where(index >= 0, weights, 0).masked_fill(undefined[:, None], torch.nan)
        return weights, lse.masked_fill(undefined, torch.nan)

    def usage_of_selected(self, weights: Tensor, index: Tensor) -> list[Tensor | None]:
        total = sum(self.sizes)
        sums = weights.new_zeros(weights.shape[0], total + 1)  # the last place takes what has no position
        places = torch.where(index >= 0, index, total)
        sums = sums.scatter_add(1, places.flatten(1), weights.detach().flatten(1))
        return [sums[:, piece.offset : piece.offset + piece.size] for piece in self.pieces]

    def shape_out(self, out: Tensor, values: _Values) -> Tensor:
        """The core's (N,O,Cv,P) as the public output."""
        out = out.to(values.dtype)
        if values.fold is not None:
            out = torch.unflatten(out.squeeze(0), 0, values.fold)
        out = torch.unflatten(out, 3, self.query_shape)
        return out if values.per_object else out.squeeze(1)

    def shape_queries(self, rows: Tensor, values: _Values | None = None) -> Tensor:
        return _unfold_batch(torch.unflatten(rows, -1, self.query_shape), values)

    def shape_usage(self, usage: list[Tensor | None], values: _Values | None = None) -> Tensor | list[Tensor]:
        """The pieces' usage (None: not used) as one (N,*M) per segment."""
        like = next((used for used in usage if used is not None), self.query)

        def unused(count: int) -> Tensor:
            return like.new_zeros((self.batch, count), dtype=self.wide)

        shaped = []
        for i, (shape, size) in enumerate(zip(self.shapes, self.sizes, strict=True)):
            parts, end = [], 0
            for piece, used in zip(self.pieces, usage, strict=True):
                if piece.segment == i and piece.size and used is not None:
                    parts += [unused(piece.start - end), used.detach()]
                    end = piece.start + piece.size
            whole = torch.cat([*parts, unused(size - end)], 1)
            shaped.append(_unfold_batch(torch.unflatten(whole, 1, shape), values))
        return shaped if self.segmented else shaped[0]


def _by_kind(groups: list[int], values: list[_Values], piece: _Piece) -> list[list[int]]:
    """The groups in sets whose values of a piece are of one kind."""
    sets: list[list[int]] = []
    for group in groups:
        kind = values[group].kind(piece)
        alike = next((each for each in sets if values[each[0]].kind(piece) == kind), None)
        if alike is None:
            sets.append([group])
        else:
            alike.append(group)
    return sets


def _fold_batch(values: list[Tensor]) -> list[Tensor]:
    """Values (N,O,Cv,M) as those (1,O,Cv,M) of N times as many objects, batch element by batch element."""
    if len(values) == 1:
        return [values[0].flatten(0, 1).unsqueeze(0)]
    if values[0].shape[0] == 0:
        return _fold_batch([torch.cat(values, 1)])
    return [value[n : n + 1] for n in range(values[0].shape[0]) for value in values]


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


def _unfold_batch(tensor: Tensor, values: _Values | None) -> Tensor:
    """What batch elements that became objects share, (1,...), repeated for each."""
    if values is None or values.fold is None:
        return tensor
    return tensor.expand(values.fold[0], *tensor.shape[1:])


def _check_groups(groups: Any, valid: Any) -> list[Valid | None]:
    if valid is not None:
        raise ValueError("valid must be None with groups, which hold one for each group")
    if not isinstance(groups, Sequence) or isinstance(groups, str) or len(groups) == 0:
        raise TypeError("groups must be a sequence of what valid may be, one for each group")
    return list(groups)


def _is_range(valid: Any) -> bool:
    if not isinstance(valid, (tuple, list)) or len(valid) != 2:
        return False
    return not any(end is None or isinstance(end, Tensor) for end in valid)


def _that_share_scores(valids: list[Valid | None]) -> list[list[int]]:
    """The groups in sets that one pass over the scores serves: all those of ranges, each of masks alone."""
    shared = [g for g, valid in enumerate(valids) if valid is None or _is_range(valid)]
    alone = [[g] for g in range(len(valids)) if g not in shared]
    return [shared, *alone] if shared else alone


def _cut(sizes: list[int], ranges: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(segment, start, stop) of the pieces between the ranges' ends that lie in a range; an empty one if a range is."""
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    uncut = [(segment, 0, size) for segment, size in enumerate(sizes)]
    for end in (
        end for each in ranges for end in each
    ):  # one by one: sizes may be symbols, which cannot be sorted
        cut = []
        for segment, first, last in uncut:
            inner = end - offsets[segment]
            if first < inner and inner < last:
                cut += [(segment, first, inner), (segment, inner, last)]
            else:
                cut.append((segment, first, last))
        uncut = cut
    pieces = []
    for segment, first, last in uncut:
        offset = offsets[segment]
        wanted = any(start <= offset + first and offset + last <= stop for start, stop in ranges)
        if first < last and wanted:
            pieces.append((segment, first, last))
    total = sum(sizes)
    if any(start >= min(stop, total) for start, stop in ranges):
        pieces.append((0, 0, 0))
    return pieces


def _segments(name: str, value: Any, count: int | None) -> list[Any]:
    """`value` as a list with one entry per segment; None stands for `count` times None."""
    if value is None and count is not None:
        return [None] * count
    if isinstance(value, Tensor):
        values: list[Any] = [value]
    elif isinstance(value, Sequence) and len(value) > 0:
        values = list(value)
    else:
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(value).__name__}")
    if count is not None and len(values) != count:
        raise ValueError(
            f"{name} must have one entry for each of the {count} segments of memory_key, got {len(values)}"
        )
    return values


def _check_keys(query_key: Tensor, keys: list[Tensor]) -> None:
    for name, tensor in (("query_key", query_key), *(("memory_key", key) for key in keys)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() < 3:
            raise ValueError(
                f"{name} must have shape (N, Ck, ...) with a pixel dimension, got {tuple(tensor.shape)}"
            )
        _checks.check_floating(name, tensor)
    for key in keys:
        _checks.check_same_device("memory_key", key, "query_key", query_key)
        if key.shape[1] != query_key.shape[1] or key.shape[1] == 0:
            raise ValueError(
                f"memory_key must have the channels of query_key ({query_key.shape[1]}), at least one, "
                f"got {key.shape[1]}"
            )


def _valid_range(valid: Valid | None, count: int, total: int) -> tuple[int, int, list[Any]]:
    """`valid` as a range of positions and one mask (or None) per segment."""
    if valid is None:
        return 0, total, [None] * count
    if _is_range(valid):
        if not all(hasattr(end, "__index__") for end in valid):
            raise TypeError(f"valid must be bool or a range (start, stop) of ints, got {valid}")
        ends: list[Any] = [end if isinstance(end, (int, torch.SymInt)) else int(end) for end in valid]
        start, stop = ends
        if not 0 <= start <= stop:
            raise ValueError(f"valid must be a range (start, stop) with 0 <= start <= stop, got {valid}")
        return start, min(stop, total), [None] * count
    return 0, total, _segments("valid", valid, count)


def _common_batch(name: str, tensors: Sequence[Tensor], batch: int) -> int:
    """What `batch` and those of the tensors, which `name` holds, broadcast to."""
    for tensor in tensors:
        size = tensor.shape[0]
        if size not in (1, batch) and batch != 1:
            raise ValueError(f"{name} must have batch 1 or {batch}, got {size}")
        batch = batch if size == 1 else size
    return batch


def _checked_number(name: str, value: Any) -> float:
    """Return `value` as a float; raise TypeError where it is none."""
    if isinstance(value, (Tensor, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def _check_prior(prior: Any, query_key: Any, top_k: Any) -> None:
    if not _checked_number("prior", prior) > 0:
        raise ValueError(f"prior must be greater than 0, got {prior}")
    if isinstance(query_key, Tensor) and query_key.dim() != 4:
        raise ValueError(f"query_key must have shape (N,Ck,H,W) with a prior, got {tuple(query_key.shape)}")
    if top_k is not None:
        _checks.check_positive_int("top_k", top_k)


def _expand(tensor: Tensor, batch: int) -> Tensor:
    return tensor if tensor.shape[0] == batch else tensor.expand(batch, *tensor.shape[1:])


def _squared_length(key: Tensor, wide: torch.dtype) -> Tensor:
    """|key|^2 (N,M) of key (N,C,M) in `wide`, some positions at a time."""
    step = _SQUARED_LENGTH_POSITIONS
    if torch.compiler.is_compiling() or not isinstance(key.shape[2], int):  # one graph for every size
        return key.to(wide).square().sum(1)
    starts = range(0, max(key.shape[2], 1), step)
    parts = [key[:, :, i : i + step].to(wide).square().sum(1) for i in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _gather_segments(
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


def _read_with_prior(
    memory: _Memory, values: _Values, prior: float, top_k: int | None
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """The read with KMN's Gaussian, through the whole affinity."""
    if len(memory.pieces) > 1 or memory.segmented:
        raise ValueError("prior must be None with segments or several groups")
    (piece,) = memory.pieces
    query, key, shrinkage, query_bias, key_bias, scale, _ = memory.core(piece)
    with without_autocast(query.device.type):
        scores = memory_scores(query, key, shrinkage, query_bias, key_bias, scale)
        scores = scores + gaussian_prior(scores, memory.query_shape, prior)
        if top_k is not None and top_k < scores.shape[1]:
            order = torch.sort(scores.detach(), dim=1, descending=True, stable=True).indices[:, :top_k]
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
            scores = scores.masked_fill(~kept, -torch.inf)
        weights, lse = softmax_over_memory(scores)
        objects = [value.to(weights.dtype) @ weights[:, None] for value in values.of(piece)]
    return torch.cat(objects, 1), [weights.sum(2)], lse


# ---- The registered pieces.


def _wide(key: Tensor) -> torch.dtype:
    return torch.float64 if key.dtype == torch.float64 else torch.float32


def _fake_read(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries = query.shape[0], query.shape[2]
    return value.new_empty(*value.shape[:3], queries), query.new_empty((batch, queries), dtype=_wide(key))


def _fake_read_list(query: Tensor, key: Tensor, values: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    out, lse = _fake_read(query, key, values[0])
    objects = sum(value.shape[1] for value in values)
    return out.new_empty(out.shape[0], objects, *out.shape[2:]), lse


def _read_list(query: Tensor, key: Tensor, values: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    """memory_read_list under vmap, below whose wrappers it is seen whether a derivative is wanted: it has none."""
    tensors = [t for t in (query, key, *values, *rest) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out, lse = torch.ops.vosops.memory_read(query, key, torch.cat(values, 1), *rest)
    else:
        out, lse = torch.ops.vosops.memory_read_list(query, key, values, *rest)
    return out, lse


def _setup_read(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.precision = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward_read_by(op: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        grads = getattr(torch.ops.vosops, op)(
            grad_out, grad_lse, *tensors, ctx.scale, ctx.precision, out, lse
        )
        return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None, None

    return backward


def _fake_read_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    def vector(given: Tensor | None) -> Tensor:
        size = (query.shape[0], 0) if given is None else tuple(given.shape)
        return query.new_empty(size, dtype=_wide(key))

    matrices = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return *matrices, *(vector(given) for given in (shrinkage, query_bias, key_bias))


def _setup_read_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.scale = inputs[8]
    ctx.save_for_backward(*inputs[:8])


def _backward_read_backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """Second derivatives through the plain formula of the first; its out and lse are functions of the others."""
    grads = differentiate(
        lambda *saved: _read_gradients(*[*saved, ctx.scale]),
        ctx.saved_tensors,
        ctx.needs_input_grad[: len(ctx.saved_tensors)],
        cotangents,
    )
    return *grads, None, None, None, None


def _read_gradients(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """What memory_read_backward computes, in differentiable PyTorch."""
    wide = _wide(key)
    squares = query.shape[1] != key.shape[1]
    wide_key = key.to(wide)
    keys = torch.cat([wide_key, wide_key.square()], 1) if squares else wide_key
    raw = scale * keys.transpose(1, 2) @ query.to(wide)
    raw = raw if query_bias is None else raw + query_bias[:, None]
    scores = raw if shrinkage is None else raw * shrinkage[:, :, None]
    scores = scores if key_bias is None else scores + key_bias[:, :, None]
    weights, _ = softmax_over_memory(scores)
    grad = grad_out.to(wide)
    grad_weights = (value.to(wide).transpose(2, 3) @ grad).sum(1)
    base = (weights * grad_weights).sum(1, keepdim=True) - grad_lse[:, None]
    slopes = weights * (grad_weights - base)
    grad_raw = slopes if shrinkage is None else slopes * shrinkage[:, :, None]
    grad_keys = scale * query.to(wide) @ grad_raw.transpose(1, 2)
    channels = key.shape[1]
    if squares:
        grad_keys = grad_keys[:, :channels] + 2 * wide_key * grad_keys[:, channels:]
    return (
        (scale * keys @ grad_raw).to(query.dtype),
        grad_keys.to(key.dtype),
        (grad @ weights.transpose(1, 2)[:, None]).to(value.dtype),
        None if shrinkage is None else (slopes * raw).sum(2),
        None if query_bias is None else grad_raw.sum(1),
        None if key_bias is None else slopes.sum(2),
    )


def _fake_usage(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=_wide(key))


def _fake_select(
    query: Tensor, key: Tensor, s: Any, qb: Any, kb: Any, scale: float, precision: str, top_k: int
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], top_k, query.shape[2])
    return query.new_empty(shape, dtype=_wide(key)), query.new_empty(shape, dtype=torch.int64)


def _setup_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.scale = inputs[5]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], output[1])


def _backward_select_by(gather: str, gather_backward: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        """Through the selected scores only, by the gather ops, which sum in a fixed order: with the score's gradient
        as weights, the query's gradient is a gather of keys, and the keys' is that of values under the query.
        """
        query, key, shrinkage, query_bias, key_bias, index = ctx.saved_tensors
        if key.shape[2] == 0:
            return *(None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors[:5]), *(None,) * 3
        wide, scale, channels = _wide(key), ctx.scale, key.shape[1]
        forward, backward = (getattr(torch.ops.vosops, name) for name in (gather, gather_backward))
        grad = torch.where(index >= 0, grad, 0)
        grad_raw = grad
        if shrinkage is not None:
            at = index.clamp(min=0).flatten(1)
            grad_raw = grad * torch.unflatten(shrinkage.gather(1, at), 1, index.shape[1:])
        keys, queries = key.to(wide), query.to(wide)[:, None]
        keys = torch.cat([keys, keys.square()], 1) if query.shape[1] != channels else keys
        raw, grad_keys = backward(queries, grad_raw, index, keys[:, None])
        raw, grad_keys = scale * raw, scale * grad_keys.squeeze(1)
        if query_bias is not None:
            raw = raw + query_bias[:, None]
        if query.shape[1] != channels:
            grad_keys = grad_keys[:, :channels] + 2 * keys[:, :channels] * grad_keys[:, channels:]
        one, empty = torch.ones_like(queries[:, :, :1]), torch.zeros_like(keys[:, None, :1])

        def sum_at_positions(vector: Tensor | None, rows: Tensor) -> Tensor | None:
            return None if vector is None else backward(one, rows, index, empty)[1].flatten(1)

        return (
            (scale * forward(grad_raw, index, keys[:, None]).squeeze(1)).to(query.dtype),
            grad_keys.to(key.dtype),
            sum_at_positions(shrinkage, grad * raw),
            None if query_bias is None else grad_raw.sum(1),
            sum_at_positions(key_bias, grad),
            *(None,) * 3,
        )

    return backward


def _fake_gather(weight: Tensor, index: Tensor, value: Tensor) -> Tensor:
    return value.new_empty(*value.shape[:3], weight.shape[2])


def _setup_gather(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_gather_by(op: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, index, value = ctx.saved_tensors
        grad_weight, grad_value = getattr(torch.ops.vosops, op)(grad, weight, index, value)
        return grad_weight, None, grad_value

    return backward


def _fake_gather_backward(
    grad: Tensor, weight: Tensor, index: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), value.new_empty(value.shape)


def _setup_gather_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward_gather_backward_by(gather: str, gather_backward: str) -> Callable[..., Any]:
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        """The op is bilinear in grad and (weight, value): with cotangents a, b they take each other's places."""
        grad, weight, index, value = ctx.saved_tensors
        forward, backward = (getattr(torch.ops.vosops, name) for name in (gather, gather_backward))
        grad_grad = forward(a, index, value) + forward(weight, index, b)
        grad_weight, _ = backward(grad, weight, index, b)
        _, grad_value = backward(grad, a, index, value)
        return grad_grad, grad_weight, None, grad_value

    return backward


_SCORES = "Tensor query, Tensor key, Tensor? shrinkage, Tensor? query_bias, Tensor? key_bias"
_READ = _SCORES.replace("Tensor key", "Tensor key, Tensor value")
_SCHEMAS = {
    "memory_read": f"({_READ}, float scale, str precision) -> (Tensor out, Tensor lse)",
    "memory_read_backward": f"(Tensor grad_out, Tensor grad_lse, {_READ}, float scale, str precision, Tensor out, "
    "Tensor lse) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_shrinkage, "
    "Tensor grad_query_bias, Tensor grad_key_bias)",
    "memory_usage": f"({_SCORES}, float scale, str precision, Tensor lse) -> Tensor",
    "memory_select": f"({_SCORES}, float scale, str precision, int top_k) -> (Tensor score, Tensor index)",
    "memory_gather": "(Tensor weight, Tensor index, Tensor value) -> Tensor",
    "memory_gather_backward": "(Tensor grad, Tensor weight, Tensor index, Tensor value)"
    " -> (Tensor grad_weight, Tensor grad_value)",
}
"""Of the ops' Triton twins; csrc/ops.cpp holds those of the C++ ops."""


def _define_triton(name: str) -> None:
    module = "memory_select" if name.startswith(("memory_select", "memory_gather")) else "memory_read"

    def kernel(*args: Any) -> Any:
        return getattr(import_module(f"vosops.triton.{module}"), name)(*args)

    define_triton_op(name, _SCHEMAS[name], kernel)


def _register(suffix: str) -> None:
    """The pieces of all ops: C++ ("") or Triton ("_triton")."""
    read, gather = f"memory_read_backward{suffix}", f"memory_gather_backward{suffix}"
    pieces: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., None]]] = {
        "memory_read": (_fake_read, _backward_read_by(read), _setup_read),
        "memory_read_backward": (_fake_read_backward, _backward_read_backward, _setup_read_backward),
        "memory_select": (
            _fake_select,
            _backward_select_by(f"memory_gather{suffix}", gather),
            _setup_select,
        ),
        "memory_gather": (_fake_gather, _backward_gather_by(gather), _setup_gather),
        "memory_gather_backward": (
            _fake_gather_backward,
            _backward_gather_backward_by(f"memory_gather{suffix}", gather),
            _setup_gather_backward,
        ),
    }
    for name, (fake, backward, setup_context) in pieces.items():
        register_pieces(name + suffix, fake=fake, backward=backward, setup_context=setup_context)
    torch.library.register_fake(f"vosops::memory_usage{suffix}", _fake_usage)
    register_vmap(f"memory_usage{suffix}")


for _name in _SCHEMAS:
    _define_triton(_name)
for _suffix, _available in (("", HAS_CPP), ("_triton", True)):
    if _available:
        _register(_suffix)
if HAS_CPP:
    torch.library.register_fake("vosops::memory_read_list", _fake_read_list)
    register_vmap("memory_read_list", _read_list)


def _cpp(kernel: str, *args: Any) -> Any:
    return getattr(torch.ops.vosops, kernel)(*args)


def _triton(kernel: str, *args: Any) -> Any:
    return getattr(torch.ops.vosops, f"{kernel}_triton")(*args)


def _reference(kernel: str, *args: Any) -> Any:
    cores: dict[str, Any] = {
        "memory_read": lambda q, k, v, s, qb, kb, scale, _: memory_read_core(q, k, v, s, qb, kb, scale),
        "memory_usage": lambda q, k, s, qb, kb, scale, _, lse: memory_usage_core(q, k, s, qb, kb, scale, lse),
        "memory_select": lambda q, k, s, qb, kb, scale, _, top_k: memory_select_core(
            q, k, s, qb, kb, scale, top_k
        ),
        "memory_gather": memory_gather_core,
    }
    with without_autocast(args[0].device.type):
        return cores[kernel](*args)


def _prepare(
    query_key: Tensor, memory_key: Segments, memory_value: ValueSegments, **options: Any
) -> tuple[Any, ...]:
    """The core's query of a call of memory_read; enough to say what serves it."""
    query = query_key if isinstance(query_key, Tensor) else torch.empty(0)
    return (query,)


backends.register_op(
    backends.Op(
        name="memory_read",
        prepare=_prepare,
        implementations=(
            backends.Implementation("cpp", _cpp, cpp_reasons_not),
            backends.Implementation("triton", _triton, triton_reasons_not),
            backends.Implementation("reference", _reference, lambda *_: []),
        ),
        orders={
            "cpu": backends.Order(measured="benchmarks/results/memory_read_cpu.json"),
            "cuda": backends.UNMEASURED,
        },
    )
)
