"""Affinities that are described and never built: what the replaced functions of an accelerated checkout return."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from vosops.ops.memory_read import MemoryWeights, memory_gather, memory_read, memory_select
from vosops.reference.memory_read import similarity_scores, softmax_over_memory

_MIB = 1 << 20
_METADATA = frozenset(
    ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "size", "dim", "numel")
    + ("is_floating_point", "get_device", "nelement")
)
_warned: set[str] = set()  # names of the operations that were warned of

H = TypeVar("H", bound="Handle")


class Columns(NamedTuple):
    """The positions start:stop of a memory: key (B,C,M), shrinkage (B,1,M) or None."""

    key: Tensor
    shrinkage: Tensor | None
    start: int
    stop: int

    def narrowed(self) -> tuple[Tensor, Tensor | None]:
        """Return views of these positions."""
        part = slice(self.start, self.stop)
        return self.key[:, :, part], None if self.shrinkage is None else self.shrinkage[:, :, part]


class Handle(torch.Tensor):
    """A tensor (B,M,P) without storage: P queries' relation to M memory positions.

    The operations that memory managers apply to it are answered from its description, everything else from the
    tensor itself, which is then built, with one warning for each kind of operation. A slice is a view: what is
    written into it reaches the handle that it was taken from, and what is written there is seen in it.
    """

    _dense: Tensor | None
    _source: tuple[Handle, Any] | None  # the handle that this one is a view of, and the index
    _answers: Mapping[str, Callable[..., Any]]

    @classmethod
    def _make(cls: type[H], shape: tuple[int, int, int], like: Tensor) -> H:
        handle: H = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        handle._dense, handle._source = None, None
        return handle

    @property
    def is_built(self) -> bool:
        """Whether there is a tensor, into which something may have been written since."""
        return self._dense is not None or (self._source is not None and self._source[0].is_built)

    def build(self) -> Tensor:
        """Return the tensor itself."""
        raise NotImplementedError

    def dense(self, operation: str, *, writes: bool = False) -> Tensor:
        """Return the tensor itself, for an operation that needs it; from then on the handle is only its name.

        writes: whether the operation changes it, and with it the handle that this one is a view of.
        """
        if self._dense is None and self._source is not None and (writes or self.is_built):
            source, index = self._source
            self._dense = source.dense(operation, writes=writes)[index]
        if self._dense is None:
            if operation not in _warned:
                _warned.add(operation)
                size = math.prod(self.shape) * self.dtype.itemsize / _MIB
                warnings.warn(
                    f"{operation} on an accelerated affinity of shape {tuple(self.shape)} builds it ({size:.0f} MiB)",
                    RuntimeWarning,
                    stacklevel=4,
                )
            self._dense = self.build()
        return self._dense

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        if name in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        answer = cls._answers.get(name)
        handles = _handles((*args, *kwargs.values()))
        if answer is not None and not any(h.is_built for h in handles) and _accepts(answer, args, kwargs):
            result = answer(*args, **kwargs)
            if result is not NotImplemented:
                return result
        plain_args, plain_kwargs = _with_dense(name, (args, dict(kwargs)))
        return func(*plain_args, **plain_kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return what went past __torch_function__."""
        plain_args, plain_kwargs = _with_dense(str(func), (args, dict(kwargs or {})))
        return func(*plain_args, **plain_kwargs)


class Similarity(Handle):
    """The scores of a read, before the softmax over the memory (dim 1)."""

    query: Tensor  # (B,C,P)
    selection: Tensor | None  # (B,C,P)
    columns: tuple[Columns, ...]
    options: dict[str, Any]  # similarity and scale, as memory_read takes them

    @staticmethod
    def of(
        key: Tensor,
        query: Tensor,
        *,
        shrinkage: Tensor | None = None,
        selection: Tensor | None = None,
        similarity: str = "l2",
        scale: float | None = None,
    ) -> Similarity:
        """Return the scores of query (B,C,...) and key (B,C,...), shrinkage (B,1,...), selection (B,C,...)."""
        key, query = key.flatten(2), query.flatten(2)
        shrinkage = None if shrinkage is None else shrinkage.flatten(1).unsqueeze(1)
        selection = None if selection is None else selection.flatten(2)
        scale = 1 / math.sqrt(key.shape[1]) if scale is None else scale
        columns = (Columns(key, shrinkage, 0, key.shape[2]),)
        return Similarity._of(query, selection, columns, {"similarity": similarity, "scale": scale})

    @staticmethod
    def _of(
        query: Tensor, selection: Tensor | None, columns: tuple[Columns, ...], options: dict[str, Any]
    ) -> Similarity:
        batch = max(query.shape[0], columns[0].key.shape[0])
        positions = sum(part.stop - part.start for part in columns)
        self = Similarity._make((batch, positions, query.shape[2]), query)
        self.query, self.selection, self.columns, self.options = query, selection, columns, options
        return self

    def build(self) -> Tensor:
        """Return the scores (B,M,P)."""
        parts = (part.narrowed() for part in self.columns)
        scores = (
            similarity_scores(self.query, key, shrinkage=shrinkage, selection=self.selection, **self.options)
            for key, shrinkage in parts
        )
        return torch.cat(list(scores), 1).to(self.dtype)

    def arguments(self) -> dict[str, Any]:
        """Return what memory_read and memory_select take, but for the values."""
        keys, shrinkages = zip(*(part.narrowed() for part in self.columns), strict=True)
        shrinkage = None if shrinkages[0] is None else list(shrinkages)
        return {
            "query_key": self.query,
            "memory_key": list(keys),
            "shrinkage": shrinkage,
            "selection": self.selection,
            **self.options,
        }

    def sizes(self) -> list[int]:
        """Positions of each segment."""
        return [part.stop - part.start for part in self.columns]

    def select_queries(self, index: Any) -> Similarity:
        """Return the scores of some queries."""
        selection = None if self.selection is None else self.selection[:, :, index]
        return Similarity._of(self.query[:, :, index], selection, self.columns, self.options)

    def _getitem(self, index: Any) -> Any:
        rows, queries, plain = _parse_index(index, self.shape[1])
        if not plain:
            return NotImplemented
        kept: list[Columns] = []
        offset = 0
        for part, size in zip(self.columns, self.sizes(), strict=True):
            first, last = max(rows.start - offset, 0), min(rows.stop - offset, size)
            if first < last:
                kept.append(part._replace(start=part.start + first, stop=part.start + last))
            offset += size
        if not kept:
            kept = [self.columns[0]._replace(stop=self.columns[0].start)]
        result = Similarity._of(self.query, self.selection, tuple(kept), self.options)
        result = result if queries is None else result.select_queries(queries)
        if not isinstance(queries, Tensor):
            result._source = (self, index)
        return result

    @staticmethod
    def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
        first = tensors[0]
        if dim not in (1, -2) or not isinstance(first, Similarity):
            return NotImplemented
        columns: list[Columns] = []
        for other in tensors:
            if not isinstance(other, Similarity) or not first._has_queries_of(other):
                return NotImplemented
            for part in other.columns:
                last = columns[-1] if columns else None
                if last is not None and last.key is part.key and last.stop == part.start:
                    columns[-1] = last._replace(stop=part.stop)
                elif part.start < part.stop or not columns:
                    columns.append(part)
        if len(columns) > 1:
            columns = [part for part in columns if part.start < part.stop]
        return Similarity._of(first.query, first.selection, tuple(columns), first.options)

    def _has_queries_of(self, other: Similarity) -> bool:
        return (
            self.query is other.query
            and self.selection is other.selection
            and self.options == other.options
            and (self.columns[0].shrinkage is None) == (other.columns[0].shrinkage is None)
        )

    def _softmax(self, dim: int | None = None, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Any:
        return Affinity.of(self) if dim in (1, -2) and dtype in (None, self.dtype) else NotImplemented


class Affinity(Handle):
    """The weights of a read: each column sums to 1."""

    scores: Similarity
    chosen: MemoryWeights | None  # with top-k

    @staticmethod
    def of(scores: Similarity, top_k: int | None = None) -> Affinity:
        """Return the softmax of scores over the memory, with top_k over the greatest scores of each query."""
        chosen = None
        if top_k is not None:
            arguments = scores.arguments()
            chosen = memory_select(
                arguments.pop("query_key"), arguments.pop("memory_key"), top_k, **arguments
            )
        return Affinity._of(scores, chosen, scores.shape[0])

    @staticmethod
    def _of(scores: Similarity, chosen: Any, batch: int) -> Affinity:
        self = Affinity._make((batch, scores.shape[1], scores.shape[2]), scores.query)
        self.scores, self.chosen = scores, chosen
        return self

    def build(self) -> Tensor:
        """Return the weights (B,M,P)."""
        if self.chosen is None:
            weights, _ = softmax_over_memory(self.scores.build())
        else:
            index, weight = self.chosen.indices.long().clamp(min=0), self.chosen.weights
            weights = weight.new_zeros(weight.shape[0], *self.shape[1:]).scatter_add(1, index, weight)
        return weights.expand(self.shape).to(self.dtype)

    def read(self, value: Tensor) -> Tensor:
        """Return the weighted sums of value (N,O,Cv,M), N being 1 or the batch of the scores -> (N,O,Cv,P)."""
        if self.chosen is not None:
            return memory_gather(self.chosen, value)
        arguments = self.scores.arguments()
        values = value.split(self.scores.sizes(), 3)
        out: Tensor = memory_read(
            arguments.pop("query_key"), arguments.pop("memory_key"), values, **arguments
        )
        return out

    def usage(self) -> Tensor:
        """Each position's weights, summed over the queries: (B,M)."""
        if self.chosen is not None:
            index = self.chosen.indices.long().clamp(min=0)
            weight = torch.where(self.chosen.indices >= 0, self.chosen.weights.detach(), 0)
            return weight.new_zeros(weight.shape[0], self.shape[1]).scatter_add(
                1, index.flatten(1), weight.flatten(1)
            )
        arguments = self.scores.arguments()
        keys = arguments.pop("memory_key")
        ones = [key.new_ones(1, 1, key.shape[2]) for key in keys]
        with torch.no_grad():
            _, usage = memory_read(arguments.pop("query_key"), keys, ones, **arguments, return_usage=True)
        return torch.cat(usage, 1)

    def _getitem(self, index: Any) -> Any:
        rows, queries, plain = _parse_index(index, self.shape[1])
        if not plain or (rows.start, rows.stop) != (0, self.shape[1]):
            return NotImplemented
        if queries is None:
            return self
        chosen = self.chosen and MemoryWeights(*(part[..., queries] for part in self.chosen))
        result = Affinity._of(self.scores.select_queries(queries), chosen, self.shape[0])
        if not isinstance(queries, Tensor):
            result._source = (self, index)
        return result

    def _expand(self, *sizes: Any) -> Any:
        if len(sizes) == 1 and not isinstance(sizes[0], int):
            sizes = tuple(sizes[0])
        if len(sizes) != 3 or any(
            size not in (-1, own) for size, own in zip(sizes[1:], self.shape[1:], strict=True)
        ):
            return NotImplemented
        batch = self.shape[0] if sizes[0] == -1 else int(sizes[0])
        if self.shape[0] not in (1, batch):
            return NotImplemented
        return Affinity._of(self.scores, self.chosen, batch)

    def _sum(self, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
        if dim not in (2, -1, (2,), [2], (-1,), [-1]) or dtype is not None:
            return NotImplemented
        usage = self.usage().to(self.dtype)
        usage = usage.expand(self.shape[0], -1)
        return usage.unsqueeze(2) if keepdim else usage

    @staticmethod
    def _matmul(value: Tensor, affinity: Any = None, **other: Any) -> Any:
        if other or not isinstance(affinity, Affinity) or not _readable(value, affinity):
            return NotImplemented
        batch, own = affinity.shape[0], affinity.scores.shape[0]
        if own == 1 and value.dim() >= 2 and (batch == 1 or (value.dim() == 3 and value.shape[0] == batch)):
            lead = value.shape[:-2]
            objects = value.flatten(0, -3) if value.dim() > 2 else value.unsqueeze(0)
            out = affinity.read(objects.unsqueeze(0))[0]
            return out.unflatten(0, lead) if value.dim() > 2 else out
        if value.dim() == 3 and value.shape[0] in (1, own):
            return affinity.read(value.unsqueeze(1)).squeeze(1)
        return NotImplemented

    @staticmethod
    def _einsum(equation: Any, *operands: Any) -> Any:
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
            return NotImplemented
        terms, result = equation.replace(" ", "").split("->")
        (value, names), (affinity, (b, m, p)) = _handle_last(operands, terms.split(","))
        if not isinstance(affinity, Affinity) or not _readable(value.movedim(names.find(m), -1), affinity):
            return NotImplemented
        others = [name for name in names if name not in (b, m)]
        if p in names or m in result or b not in result or affinity.shape[0] != affinity.scores.shape[0]:
            return NotImplemented
        if len(set(names)) != len(names) or sorted(result) != sorted([b, p, *others]):
            return NotImplemented
        # (1 or b, others, m) as one object of many channels, and back.
        lead = value.permute([names.index(n) for n in ([b] if b in names else []) + [*others, m]])
        lead = lead if b in names else lead.unsqueeze(0)
        sizes = lead.shape[1:-1]
        out = affinity.read(lead.reshape(lead.shape[0], 1, -1, lead.shape[-1])).squeeze(1)
        out = out.reshape(out.shape[0], *sizes, out.shape[-1])
        order = [b, *others, p]
        return out.permute([order.index(name) for name in result])


Similarity._answers = {
    "__getitem__": Similarity._getitem,
    "cat": Similarity._cat,
    "concat": Similarity._cat,
    "softmax": Similarity._softmax,
    "contiguous": lambda handle: handle,
}
Affinity._answers = {
    "__getitem__": Affinity._getitem,
    "expand": Affinity._expand,
    "sum": Affinity._sum,
    "matmul": Affinity._matmul,
    "bmm": Affinity._matmul,
    "einsum": Affinity._einsum,
    "contiguous": lambda handle: handle,
}


def _handles(args: Any) -> list[Handle]:
    found: list[Handle] = []
    for arg in args:
        if isinstance(arg, Handle):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += _handles(arg)
    return found


def _with_dense(operation: str, arguments: Any) -> Any:
    """Return the arguments with every handle replaced by its tensor."""
    writes = _writes(operation)
    return tree_map(lambda a: a.dense(operation, writes=writes) if isinstance(a, Handle) else a, arguments)


def _writes(operation: str) -> bool:
    """Return whether an operation of this name changes its first argument: add_, __iadd__, __setitem__."""
    name = operation.removeprefix("aten.").split(".")[0]
    in_place = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return name == "__setitem__" or in_place or (name.endswith("_") and not name.endswith("__"))


def _accepts(answer: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation was called with arguments, and by the names, that its answer knows."""
    try:
        inspect.signature(answer).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _parse_index(index: Any, positions: int) -> tuple[slice, Any, bool]:
    """Return an index of a (B,M,P) tensor as a range of M and an index of P (None: all); False for any other index."""
    parts = index if isinstance(index, tuple) else (index,)
    rows: slice = slice(0, positions)
    queries = None
    plain = len(parts) <= 3 and (not parts or _is_full(parts[0]))
    if plain and len(parts) > 1:
        plain = isinstance(parts[1], slice) and parts[1].step in (None, 1)
        if plain:
            start, stop, _ = parts[1].indices(positions)
            rows = slice(start, max(start, stop))
    if plain and len(parts) > 2:
        given = parts[2]
        plain = isinstance(given, slice) or (
            isinstance(given, Tensor) and given.dim() == 1 and given.dtype in (torch.bool, torch.int64)
        )
        queries = None if isinstance(given, slice) and _is_full(given) else given
    return rows, queries, plain


def _is_full(index: Any) -> bool:
    return isinstance(index, slice) and (index.start, index.stop, index.step) == (None, None, None)


def _readable(value: Any, affinity: Affinity) -> bool:
    """Return whether value (...,M) can be read by the op."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, Handle)
        and value.is_floating_point()
        and value.shape[-1] == affinity.shape[1]
    )


def _handle_last(operands: Sequence[Any], terms: list[str]) -> Any:
    """Return the (operand, labels) of the other operand and of the handle."""
    pairs = list(zip(operands, terms, strict=True))
    return pairs if isinstance(operands[1], Handle) else pairs[::-1]
