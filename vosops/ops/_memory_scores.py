"""What memory_read and memory_select share: checked arguments, and the pieces of the memory that scores are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from vosops import _checks, backends

SIMILARITIES = ("dot", "l2")
_SQUARED_LENGTH_POSITIONS = 1 << 15  # memory positions whose squares are held at a time

Segments = Tensor | Sequence[Tensor]
ValueSegments = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]
Valid = Tensor | Sequence[Tensor] | tuple[int, int]
Lengths = Tensor | Sequence[int]
GroupsValid = Sequence[Valid | None]


class ScoreOptions(TypedDict, total=False):
    """The options of memory_read and memory_select that make the scores, for their overloads."""

    similarity: str
    scale: float | None
    shrinkage: Segments | None
    selection: Tensor | None
    bias: Segments | None
    valid: Valid | None
    memory_lengths: Lengths | None
    precision: str | None


class Piece(NamedTuple):
    """Adjacent positions of one segment, with the arguments of the core ops for them.

    `core` is query, key (N,C,M), shrinkage, query_bias, key_bias, scale and precision.
    """

    core: tuple[Any, ...]
    segment: int
    start: int  # of the piece within its segment
    offset: int  # of the piece's first position among those of all segments
    size: int


class Values(NamedTuple):
    """A group's values as the core takes them: for each segment, tensors (N,O,Cv,M) of some objects after the other."""

    segments: list[list[Tensor]]
    starts: list[int]  # position of its segment that a tensor's first one is
    per_object: bool
    fold: tuple[int, int] | None  # (N,O) where the values of a batch under one affinity became objects
    dtype: torch.dtype

    def of(self, piece: Piece) -> list[Tensor]:
        first = piece.start - self.starts[piece.segment]
        return [value[..., first : first + piece.size] for value in self.segments[piece.segment]]

    def kind(self, piece: Piece) -> tuple[torch.dtype, int]:
        """Values of one dtype and as many channels fit one call of the core."""
        first = self.segments[piece.segment][0]
        return first.dtype, first.shape[2]

    @property
    def objects(self) -> int:
        return sum(value.shape[1] for value in self.segments[0])


class Memory:
    """The checked arguments that scores are made of, for groups of objects that share them; nothing is computed yet.

    `valids` has what each group sees: None and ranges, or one mask for a group that is alone.
    """

    def __init__(
        self,
        query_key: Tensor,
        memory_key: Segments,
        valids: Sequence[Valid | None] = (None,),
        *,
        similarity: str = "dot",
        scale: float | None = None,
        shrinkage: Segments | None = None,
        selection: Tensor | None = None,
        bias: Segments | None = None,
        memory_lengths: Lengths | None = None,
        precision: str | None = None,
        plain: str | None = None,
    ) -> None:
        keys = segments_of("memory_key", memory_key)
        _check_keys(query_key, keys)
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be 'dot' or 'l2', got {similarity!r}")
        if selection is not None:
            if similarity != "l2":
                raise ValueError(f"selection must be None unless similarity is 'l2', got {similarity!r}")
            _checks.check_tensor("selection", selection, ("N", *query_key.shape[1:]))
            _checks.check_floating("selection", selection)
            _checks.check_same_device("selection", selection, "query_key", query_key)
        count = len(keys)
        self.query_key, self.keys, self.selection = query_key, keys, selection
        self.similarity = similarity
        self.scale = (
            1 / math.sqrt(query_key.shape[1]) if scale is None else _checks.check_number("scale", scale)
        )
        self.precision = _checks.resolve_precision(precision, query_key)
        self.segmented = not isinstance(memory_key, Tensor)
        self.query_shape = tuple(query_key.shape[2:])
        self.shapes = [tuple(key.shape[2:]) for key in keys]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.offsets = [sum(self.sizes[:i]) for i in range(count)]
        found = [_valid_range(valid, count, sum(self.sizes)) for valid in valids]
        self.ranges = [(start, max(start, stop)) for start, stop, _ in found]
        self.shrinkages = segments_of("shrinkage", shrinkage, count)
        self.biases = segments_of("bias", bias, count)
        self.masks = found[0][2]  # groups of masks are alone
        self.batch = common_batch("memory_key", keys, query_key.shape[0])
        if selection is not None:
            self.batch = common_batch("selection", [selection], self.batch)
        self._check_vectors("shrinkage", self.shrinkages, (1,))
        self._check_vectors("bias", self.biases, ())
        self._check_vectors("valid", self.masks, ())
        self.lengths = None if memory_lengths is None else _as_lengths(memory_lengths, query_key)
        if self.lengths is not None:
            self.batch = common_batch("memory_lengths", [self.lengths], self.batch)
        dtypes = {query_key.dtype, *[key.dtype for key in keys]}
        self.double = torch.float64 in dtypes
        self.wide = torch.float64 if self.double else torch.float32
        as_it_is = len(dtypes) == 1 and selection is None
        dtype = query_key.dtype if as_it_is else self.wide
        backward = _checks.wants_gradients(query_key, *self.keys)
        self.call = backends.Call(query_key.device, dtype, (), plain, self.precision, backward)

    def _check_vectors(self, name: str, vectors: list[Any], lead: tuple[int, ...]) -> None:
        """Check an argument (N,*lead,*M), one per segment."""
        for i, vector in enumerate(vectors):
            if vector is None:
                continue
            shape = self.shapes[i]
            _checks.check_tensor(name, vector, ("N", *lead, *shape))
            _checks.check_same_device(name, vector, "query_key", self.query_key)
            if name != "valid":
                _checks.check_floating(name, vector)
            elif vector.dtype != torch.bool:
                raise TypeError(f"valid must be bool or a range (start, stop), got {vector.dtype}")
            self.batch = common_batch(name, [vector], self.batch)

    def values(self, memory_value: ValueSegments, group: int) -> Values:
        """Return the values of a group, checked and in the core's form."""
        if self.segmented:
            if not isinstance(memory_value, Sequence) or len(memory_value) != len(self.shapes):
                raise ValueError(
                    "memory_value must be a sequence with one entry for each segment of memory_key, "
                    f"got {described(memory_value)}"
                )
            given: list[Any] = list(memory_value)
        else:
            given = [memory_value]
        segments: list[list[Tensor]] = []
        starts, per_object = [], False
        for value, shape, size, offset in zip(given, self.shapes, self.sizes, self.offsets, strict=True):
            first, last = (min(max(end - offset, 0), size) for end in self.ranges[group])
            objects = []
            for each in segments_of("memory_value", value):
                has_objects = isinstance(value, Tensor) and value.dim() == 3 + len(shape)
                per_object = has_objects or not isinstance(value, Tensor)
                objects.append(self._flat_value(each, shape, size, last - first, has_objects))
            if any(each.shape != objects[0].shape or each.dtype != objects[0].dtype for each in objects):
                raise ValueError(
                    "memory_value must hold objects of equal shape and dtype, got "
                    + ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in objects)
                )
            segments.append(objects)
            starts.append(first if objects[0].shape[3] != size else 0)
        every = [value for objects in segments for value in objects]
        dtype = every[0].dtype
        counts = [(len(objects) * objects[0].shape[1], objects[0].shape[2]) for objects in segments]
        if any(each != counts[0] for each in counts):
            raise ValueError(f"memory_value must have equal (O,Cv) in all segments, got {counts}")
        if not self.double and any(value.dtype == torch.float64 for value in every):
            raise TypeError(
                f"memory_value must be float64 only if query_key or memory_key is, got {torch.float64} with "
                f"query_key {self.query_key.dtype}"
            )
        if self.double:
            segments = [[value.to(torch.float64) for value in objects] for objects in segments]
        batch = common_batch("memory_value", every, self.batch)
        segments = [[expanded(value, batch) for value in objects] for objects in segments]
        if batch == self.batch:
            return Values(segments, starts, per_object, None, dtype)
        folded = [_fold_batch(objects) for objects in segments]
        return Values(folded, starts, per_object, (batch, counts[0][0]), dtype)

    def within_lengths(self, segment: int, first: int, last: int) -> Tensor | None:
        """Return which of the positions first:last of a segment a batch element has, bool (N,last-first)."""
        if self.lengths is None:
            return None
        offset = self.offsets[segment]
        places = torch.arange(offset + first, offset + last, device=self.lengths.device)
        return places < self.lengths[:, None]

    def _flat_value(
        self, value: Any, shape: tuple[int, ...], size: int, in_range: int, has_objects: bool
    ) -> Tensor:
        """Return a value of all positions of a segment, or only of those in the group's range, as (N,O,Cv,M)."""
        if not isinstance(value, Tensor):
            raise TypeError(f"memory_value must hold tensors, got {type(value).__name__}")
        _checks.check_floating("memory_value", value)
        _checks.check_same_device("memory_value", value, "query_key", self.query_key)
        lead = ("N", "O", "Cv") if has_objects else ("N", "Cv")
        positions = value.shape[len(lead) :]
        if not (len(positions) == len(shape) and math.prod(positions) == in_range < size):
            _checks.check_tensor("memory_value", value, (*lead, *shape))
        flat = value.flatten(len(lead))
        return flat if has_objects else flat.unsqueeze(1)

    def shape_queries(self, rows: Tensor, values: Values | None = None) -> Tensor:
        """Return the core's (N,...,P) with the trailing dimensions of the query."""
        return _unfold_batch(torch.unflatten(rows, -1, self.query_shape), values)

    def shape_usage(
        self, usage: list[Tensor | None], pieces: list[Piece], values: Values | None = None
    ) -> Tensor | list[Tensor]:
        """Return the pieces' usage (None: not used) as one (N,*M) per segment."""
        like = next((used for used in usage if used is not None), self.query_key)

        def unused(count: int) -> Tensor:
            return like.new_zeros((self.batch, count), dtype=self.wide)

        shaped = []
        for i, (shape, size) in enumerate(zip(self.shapes, self.sizes, strict=True)):
            parts, end = [], 0
            for piece, used in zip(pieces, usage, strict=True):
                if piece.segment == i and piece.size and used is not None:
                    parts += [unused(piece.start - end), used.detach()]
                    end = piece.start + piece.size
            whole = torch.cat([*parts, unused(size - end)], 1)
            shaped.append(_unfold_batch(torch.unflatten(whole, 1, shape), values))
        return shaped if self.segmented else shaped[0]


class Scores:
    """What the core makes the scores of a memory from: a query, and the memory in pieces.

    Segments are cut where a group's range begins or ends, so that a piece belongs to a group as a whole or not at all
    and its scores are computed once for all groups.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        wide, scale, selection = memory.wide, memory.scale, memory.selection
        squares = memory.similarity == "l2" and selection is None
        query = memory.query_key.flatten(2)
        query_bias: Tensor | None = None
        if selection is not None:
            query, chosen = torch.broadcast_tensors(query.to(wide), selection.flatten(2).to(wide))
            query_bias = -scale * (chosen * query.square()).sum(1)
            query = torch.cat([2 * chosen * query, -chosen], 1)
        self.query = query if query.dtype == memory.call.dtype else query.to(memory.call.dtype)
        settings = (2 * scale if squares else scale, memory.precision)

        self.pieces: list[Piece] = []
        for i, first, last in _cut(memory.sizes, memory.ranges):
            key = memory.keys[i].flatten(2)[:, :, first:last]
            key = key.to(wide) if memory.double else key
            shrinkage = _part(memory.shrinkages[i], first, last, wide)
            key_bias = _part(memory.biases[i], first, last, wide)
            mask = _both(
                _part(memory.masks[i], first, last, torch.bool), memory.within_lengths(i, first, last)
            )
            if squares:
                squared = _length_bias(key, shrinkage, scale, wide)
                key_bias = squared if key_bias is None else key_bias + squared
            if mask is not None:
                zero = torch.zeros((), dtype=wide, device=mask.device)
                key_bias = torch.where(mask, zero if key_bias is None else key_bias, -torch.inf)
            tensors = [
                None if t is None else expanded(t, memory.batch)
                for t in (self.query, key, shrinkage, query_bias, key_bias)
            ]
            offset = memory.offsets[i] + first
            self.pieces.append(Piece((*tensors, *settings), i, first, offset, key.shape[2]))

    def members(self, group: int) -> list[int]:
        """Return the pieces of a group; an empty one where its range is empty."""
        start, stop = self.memory.ranges[group]
        inside = [
            i for i, p in enumerate(self.pieces) if p.size and start <= p.offset and p.offset + p.size <= stop
        ]
        return inside or [next(i for i, piece in enumerate(self.pieces) if piece.size == 0)]


def softmax_over_memory(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of scores (N,M,P) over M, and the log-sum-exp (N,P); where nothing has a score, 0 and -inf."""
    if scores.shape[1] == 0:
        return scores, scores.new_full((scores.shape[0], scores.shape[2]), -torch.inf)
    greatest = scores.detach().amax(1, keepdim=True)
    exponentials = torch.exp(scores - torch.where(greatest.isneginf(), 0, greatest))
    total = exponentials.sum(1, keepdim=True)
    some = total != 0
    total = torch.where(some, total, 1)
    lse = torch.where(some, greatest + total.log(), -torch.inf)
    return exponentials / total, lse.squeeze(1)


def without_excluded(
    key: Tensor, value: Tensor, shrinkage: Tensor | None, key_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """key (N,C,M), value (N,O,Cv,M) and shrinkage (N,M) with zeros where key_bias is -inf: 0 times NaN is NaN."""
    if key_bias is None:
        return key, value, shrinkage
    excluded = key_bias.detach().isneginf()
    shrinkage = None if shrinkage is None else shrinkage.masked_fill(excluded, 0)
    return key.masked_fill(excluded[:, None], 0), value.masked_fill(excluded[:, None, None], 0), shrinkage


def check_groups(groups: Any, valid: Any) -> list[Valid | None]:
    """Return what each group sees."""
    if valid is not None:
        raise ValueError(
            f"valid must be None with groups, which hold one for each group, got {described(valid)}"
        )
    if not isinstance(groups, Sequence) or isinstance(groups, str) or len(groups) == 0:
        raise TypeError(
            f"groups must be a sequence of what valid may be, one for each group, got {described(groups)}"
        )
    return list(groups)


def that_share_scores(valids: list[Valid | None]) -> list[list[int]]:
    """Return the groups in sets that one pass over the scores serves: all those of ranges, each of masks alone."""
    shared = [g for g, valid in enumerate(valids) if valid is None or _is_range(valid)]
    alone = [[g] for g in range(len(valids)) if g not in shared]
    return [shared, *alone] if shared else alone


def segments_of(name: str, value: Any, count: int | None = None) -> list[Any]:
    """`value` as a list with one entry per segment; None stands for `count` times None."""
    if value is None and count is not None:
        return [None] * count
    if isinstance(value, Tensor):
        values: list[Any] = [value]
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0:
        values = list(value)
    else:
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {described(value)}")
    if count is not None and len(values) != count:
        raise ValueError(
            f"{name} must have one entry for each of the {count} segments of memory_key, got {len(values)}"
        )
    return values


def common_batch(name: str, tensors: Sequence[Tensor], batch: int) -> int:
    """Return what `batch` and those of the tensors, which `name` holds, broadcast to."""
    for tensor in tensors:
        size = tensor.shape[0]
        if size not in (1, batch) and batch != 1:
            raise ValueError(f"{name} must have batch 1 or {batch}, got {size}")
        batch = batch if size == 1 else size
    return batch


def expanded(tensor: Tensor, batch: int) -> Tensor:
    """Return the tensor with a batch of 1 repeated, without a copy."""
    return tensor if tensor.shape[0] == batch else tensor.expand(batch, *tensor.shape[1:])


def described(value: Any) -> str:
    """Return what came in place of a sequence: its type, and its length if it has one."""
    name = type(value).__name__
    return f"{name} of length {len(value)}" if isinstance(value, Sequence) else name


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


def _is_range(valid: Any) -> bool:
    if not isinstance(valid, (tuple, list)) or len(valid) != 2:
        return False
    return not any(end is None or isinstance(end, Tensor) for end in valid)


def _valid_range(valid: Valid | None, count: int, total: int) -> tuple[int, int, list[Any]]:
    """Return `valid` as a range of positions and one mask (or None) per segment."""
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
    return 0, total, segments_of("valid", valid, count)


def _cut(sizes: list[int], ranges: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(segment, start, stop) of the pieces between the ranges' ends within a range; an empty one if a range is."""
    total = sum(sizes)
    if total > 0 and all(start == 0 and stop == total for start, stop in ranges):
        return [(segment, 0, size) for segment, size in enumerate(sizes) if size > 0]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    uncut = [(segment, 0, size) for segment, size in enumerate(sizes)]
    for end in (end for each in ranges for end in each):  # one by one: symbols cannot be sorted
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
    if any(start >= min(stop, total) for start, stop in ranges):
        pieces.append((0, 0, 0))
    return pieces


def _part(vector: Tensor | None, first: int, last: int, dtype: torch.dtype) -> Tensor | None:
    """Return the positions first:last of an argument (N,...,*M), (N,last-first) in `dtype`."""
    return None if vector is None else vector.flatten(1)[:, first:last].to(dtype)


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return what both masks leave, of which either may be missing."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _as_lengths(given: Any, query_key: Tensor) -> Tensor:
    """Return the lengths of memories as a tensor (N,), or (1,) for all."""
    if isinstance(given, Tensor):
        _checks.check_tensor("memory_lengths", given, ("N",))
        _checks.check_same_device("memory_lengths", given, "query_key", query_key)
        if given.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"memory_lengths must be int64 or int32, got {given.dtype}")
        return given
    if (
        not isinstance(given, Sequence)
        or isinstance(given, str)
        or not all(hasattr(n, "__index__") for n in given)
    ):
        raise TypeError(f"memory_lengths must be a tensor or a sequence of ints, got {described(given)}")
    for each in given:
        if each < 0:
            raise ValueError(f"memory_lengths must be at least 0, got {each}")
    return torch.tensor(list(given), dtype=torch.int64, device=query_key.device)


def _squared_length(key: Tensor, wide: torch.dtype) -> Tensor:
    """|key|^2 (N,M) of key (N,C,M) in `wide`, some positions at a time."""
    step = _SQUARED_LENGTH_POSITIONS
    if torch.compiler.is_compiling() or not isinstance(key.shape[2], int):  # one graph for every size
        return key.to(wide).square().sum(1)
    starts = range(0, max(key.shape[2], 1), step)
    parts = [key[:, :, i : i + step].to(wide).square().sum(1) for i in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _length_bias(key: Tensor, shrinkage: Tensor | None, scale: float, wide: torch.dtype) -> Tensor:
    """-scale times shrinkage (N,M) times |key|^2; where that is not finite it has no derivative, which would be NaN."""

    def product(key: Tensor, shrinkage: Tensor | None) -> Tensor:
        squared = -scale * _squared_length(key, wide)
        return squared if shrinkage is None else squared * shrinkage

    differentiated = key.requires_grad or (shrinkage is not None and shrinkage.requires_grad)
    if not (differentiated and torch.is_grad_enabled()):
        return product(key, shrinkage)
    with torch.no_grad():
        exact = product(key, shrinkage)
        finite = exact.isfinite()
    key = torch.where(finite[:, None], key, 0)
    shrinkage = None if shrinkage is None else torch.where(finite, shrinkage, 0)
    return torch.where(finite, product(key, shrinkage), exact)


def _fold_batch(values: list[Tensor]) -> list[Tensor]:
    """Values (N,O,Cv,M) as those (1,O,Cv,M) of N times as many objects, batch element by batch element."""
    if len(values) == 1:
        return [values[0].flatten(0, 1).unsqueeze(0)]
    if values[0].shape[0] == 0:
        return _fold_batch([torch.cat(values, 1)])
    return [value[n : n + 1] for n in range(values[0].shape[0]) for value in values]


def _unfold_batch(tensor: Tensor, values: Values | None) -> Tensor:
    """Return what batch elements that became objects share, (1,...), repeated for each."""
    if values is None or values.fold is None:
        return tensor
    return tensor.expand(values.fold[0], *tensor.shape[1:])
