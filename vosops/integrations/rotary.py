"""Attention of SAM 2 and related models to remembered frames: raw values are read, and keys are rotated once a frame.

Two identities of an attention with one head, linear projections and rotary positions make it cheaper and leave its
result as it is:

- softmax(.) (W m + b) = W (softmax(.) m) + b: the memory's own channels (64 in SAM 2) are read, and the read is
  projected, in place of the projection of every remembered position to 256 channels;
- R (W (m + s + t)) = R (W (m + s)) + R (W t), where R rotates by the position and t is the code of a frame's age: a
  frame is projected and rotated when it is first read, and a change of its age adds R (W (t' - t)).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vosops.integrations.recipes import are_few
from vosops.ops.memory_read import memory_read

_REARRANGE = frozenset(
    ("to", "cuda", "cpu", "flatten", "permute", "transpose", "unsqueeze", "contiguous", "float", "bfloat16")
)  # calls that leave the content of a frame as it is
_SUMS = frozenset(("add", "__add__", "__radd__"))
_JOINS = frozenset(("cat", "concat"))

Rotation = Tensor
"""Complex numbers (P,C/2): those that turn the pairs of channels of each of the P positions of a frame."""


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn adjacent pairs of the channels of x (B,r*P,C) by the rotation (P,C/2) of each position; keeps the dtype.

    Written over x where it is float32 and no gradients are recorded.
    """
    wide = x.float().contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    pairs = pairs.unflatten(1, (-1, rotation.shape[0]))
    turned = pairs * rotation if torch.is_grad_enabled() else pairs.mul_(rotation)
    return torch.view_as_real(turned).flatten(-2).flatten(1, 2).to(x.dtype)


class Pooling(NamedTuple):
    """How EfficientTAM reads means of 2 x 2 positions where the memory is longer than the frame.

    bias is added to the score of each mean, shift to every channel of its key.
    """

    bias: float = 0.0
    shift: float = 0.0

    def means(self, x: Tensor, positions: int, rotated: int) -> Tensor:
        """Means of 2 x 2 of the first `rotated` of x (B,M,C), frames of `positions`, and the others as they are."""
        side = round(positions**0.5)
        grid = x[:, :rotated].unflatten(1, (-1, side // 2, 2, side // 2, 2))
        return torch.cat([grid.mean((3, 5)).flatten(1, 3), x[:, rotated:]], 1)


def attend(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotations: tuple[Rotation, Rotation],
    unrotated: int,
    output: Callable[[Tensor], Tensor],
    pooling: Pooling | None = None,
) -> Tensor:
    """Attend with layer's projections q_proj, k_proj and v_proj, reading the raw values: what is exact for one head.

    query (B,P,Cq), key and value (B,M,Cv) before their projections; rotations of the query's and of a frame's
    positions; the last `unrotated` keys have no position; output is the projection of the result (B,P,C). Returns
    what `output` does. Time O(B P M (C + Cv)), memory O(B (P + M) C).
    """
    of_query, of_key = rotations
    queries = rotate(layer.q_proj(query), of_query)
    rotated = key.shape[1] - unrotated
    keys = _keys(layer, key, of_key, rotated)
    bias = None
    if pooling is not None and rotated > query.shape[1]:
        positions = query.shape[1]
        keys = pooling.means(keys, positions, rotated)
        value = pooling.means(value, positions, rotated)
        means = keys.shape[1] - unrotated
        keys[:, :means] += pooling.shift
        bias = torch.zeros(1, keys.shape[1], device=key.device)
        bias[:, :means] = pooling.bias
    value = value.to(keys.dtype)
    read = memory_read(queries.transpose(1, 2), keys.transpose(1, 2), value.transpose(1, 2), bias=bias)
    result: Tensor = output(layer.v_proj(read.transpose(1, 2)))
    return result


def can_attend(layer: Any, query: Tensor, key: Tensor, frame: int, unrotated: int, heads: int) -> bool:
    """Return whether `attend` computes what a layer does, and is worth its calls: frames of `frame` keys are read.

    One head; no dropout; values of fewer channels than keys, as a projection of values to as many or more channels
    is cheaper than reading them raw; not few scores on a CPU.
    """
    rotated = key.shape[1] - unrotated
    return (
        heads == 1
        and not (layer.training and layer.dropout_p > 0)
        and key.shape[2] < layer.k_proj.out_features
        and rotated >= 0
        and frame > 0
        and rotated % frame == 0
        and query.is_floating_point()
        and not are_few(query.shape[1] * key.shape[1], query)
    )


def _keys(layer: Any, key: Tensor, rotation: Rotation, rotated: int) -> Tensor:
    """Project key (B,M,Cv) and rotate its first positions: of frames that are known, once."""
    recorder = FrameRecorder.current()
    parts = None if recorder is None or torch.is_grad_enabled() else recorder.frames_of(key)
    if parts is not None and type(layer.k_proj) is nn.Linear:
        return KeyCache.of(layer).keys(key, parts, rotation, rotated)
    projected = layer.k_proj(key)
    turned = rotate(projected[:, :rotated], rotation)
    return turned if rotated == key.shape[1] else torch.cat([turned, projected[:, rotated:]], 1)


class Part(NamedTuple):
    """Adjacent positions of a memory: those of a frame, if its features, place and age are known."""

    size: int
    features: Tensor | None = None  # as the session holds them: known by identity
    place: Tensor | None = None  # the code of the positions within a frame
    age: Tensor | None = None  # the code of the frame's age, (1,1,Cv)


class _Made(NamedTuple):
    tensor: Tensor  # held, so that its id is not given to another
    how: str
    inputs: tuple[Any, ...]


class FrameRecorder(TorchFunctionMode):
    """Records, while a model puts its memory together from frames, which frames that are.

    The model's own code chooses and joins the frames; only `cat`, sums and calls that rearrange are noted. A memory
    put together in any other way is unknown, and read without its frames' keys being kept.
    """

    _active = threading.local()

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, _Made] = {}

    @classmethod
    def current(cls) -> FrameRecorder | None:
        """Return the innermost one in use by this thread."""
        stack = getattr(cls._active, "stack", ())
        return stack[-1] if stack else None

    def __enter__(self) -> FrameRecorder:
        if not hasattr(self._active, "stack"):
            self._active.stack = []
        self._active.stack.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._active.stack.pop()
        self._made.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _REARRANGE:
            inputs: tuple[Any, ...] = args[:1]
        elif name in _JOINS and args:
            inputs = tuple(args[0])
        elif name in _SUMS:
            inputs = args[:2]
        else:
            return out
        if isinstance(out, Tensor) and not any(out is each for each in inputs):
            self._made[id(out)] = _Made(out, name, inputs)
        return out

    def alias(self, tensor: Tensor, source: Tensor) -> Tensor:
        """Take a tensor for another of the same content; returns it."""
        made = self._made.get(id(source))
        if made is not None:
            self._made[id(tensor)] = made._replace(tensor=tensor)
        return tensor

    def frames_of(self, key: Tensor) -> list[Part] | None:
        """Return the parts of key (B,M,Cv), a sum of joined features and joined positions; None: they are unknown."""
        memory, positions = (self._joined(each) for each in self._sum(key))
        if memory is None or positions is None or len(memory) != len(positions):
            return None
        parts = [self._part(*each) for each in zip(memory, positions, strict=True)]
        if any(m.shape[0] != p.shape[0] for m, p in zip(memory, positions, strict=True)):
            return None
        return parts if sum(part.size for part in parts) == key.shape[1] else None

    def _part(self, features: Tensor, position: Tensor) -> Part:
        """Return a part of the memory, joined from features (n,B,Cv) and their positions."""
        place, age = self._sum(self._source(position))
        if place is None or age is None:
            return Part(features.shape[0])
        if place.shape[:-1].numel() == 1:
            place, age = age, place
        if age.shape[:-1].numel() != 1:
            return Part(features.shape[0])
        return Part(features.shape[0], self._source(features), self._source(place), age)

    def _sum(self, tensor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        made = self._made.get(id(tensor))
        if made is None or made.how not in _SUMS or not all(isinstance(x, Tensor) for x in made.inputs):
            return None, None
        return made.inputs  # type: ignore[return-value]

    def _joined(self, tensor: Tensor | None) -> tuple[Tensor, ...] | None:
        made = None if tensor is None else self._made.get(id(self._source(tensor)))
        return made.inputs if made is not None and made.how in _JOINS else None

    def _source(self, tensor: Tensor) -> Tensor:
        """Return what a tensor was rearranged from."""
        made = self._made.get(id(tensor))
        while made is not None and made.how in _REARRANGE:
            tensor = made.inputs[0]
            made = self._made.get(id(tensor))
        return tensor


class _Frame(NamedTuple):
    features: weakref.ref[Tensor]
    place: Tensor
    age: Tensor  # a copy
    state: Any  # of the features: they are written to nowhere that we know of
    keys: Tensor  # (B,P,C), of that age


class KeyCache:
    """The rotated keys of the frames that a layer reads, made when a frame is first read.

    Frames that are read together, and those of later reads that share one with them, are of one object; what its
    latest read left out is forgotten, and so is a frame whose features no longer exist. O(P C) numbers a frame.
    """

    _caches: ClassVar[weakref.WeakKeyDictionary[nn.Module, KeyCache]] = weakref.WeakKeyDictionary()

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)
        self._weights: Any = None
        self._objects: list[dict[int, _Frame]] = []
        self.hits = 0
        """Frames whose keys were not made again."""

    @classmethod
    def of(cls, layer: nn.Module) -> KeyCache:
        """Return the layer's own."""
        found = cls._caches.get(layer)
        if found is None:
            found = cls._caches[layer] = cls(layer)
        return found

    def keys(self, key: Tensor, parts: list[Part], rotation: Rotation, rotated: int) -> Tensor:
        """Return the projected keys (B,M,C) of key (B,M,Cv), the first `rotated` of them rotated."""
        projection = self._projection()
        known = self._known(parts)
        latest: dict[int, _Frame] = {}
        pieces = []
        start = 0
        for part in parts:
            tokens, end = key[:, start : start + part.size], start + part.size
            if part.features is not None and part.size == rotation.shape[0] and end <= rotated:
                frame = self._frame(known, part, tokens, projection, rotation)
                latest[id(part.features)] = frame
                pieces.append(self._aged(frame, part, projection, rotation))
            else:
                piece, turned = projection(tokens), max(0, min(end, rotated) - start)
                pieces.append(rotate(piece, rotation) if turned == part.size and turned else piece)
            start = end
        known.clear()
        known.update(latest)
        return torch.cat(pieces, 1)

    def clear(self) -> None:
        """Forget all frames."""
        self._objects.clear()

    @classmethod
    def clear_all(cls) -> None:
        """Forget the frames of all layers; what reads them again makes their keys anew."""
        for cache in list(cls._caches.values()):
            cache.clear()

    @classmethod
    def held_by(cls, layer: nn.Module) -> Iterator[Tensor]:
        """Yield the keys that are held of a layer, but for frames whose features no longer exist."""
        found = cls._caches.get(layer)
        for frames in () if found is None else found._objects:
            yield from (frame.keys for frame in frames.values() if frame.features() is not None)

    def _projection(self) -> nn.Linear:
        """Return the projection of keys; with other weights than before all frames are forgotten."""
        layer = self._layer()
        assert layer is not None
        projection: nn.Linear = layer.k_proj  # type: ignore[assignment]
        weights = [_state(x) for x in (projection.weight, projection.bias) if x is not None]
        if weights != self._weights:
            self._weights = weights
            self.clear()
        return projection

    def _known(self, parts: list[Part]) -> dict[int, _Frame]:
        """Return the frames of the object that is read."""
        self._objects = [
            frames for frames in self._objects if any(f.features() is not None for f in frames.values())
        ]
        wanted = {id(part.features): part.features for part in parts if part.features is not None}
        for frames in self._objects:
            if any(i in wanted and frame.features() is wanted[i] for i, frame in frames.items()):
                return frames
        self._objects.append({})
        return self._objects[-1]

    def _frame(
        self,
        known: dict[int, _Frame],
        part: Part,
        tokens: Tensor,
        projection: nn.Linear,
        rotation: Rotation,
    ) -> _Frame:
        assert part.features is not None and part.place is not None and part.age is not None
        frame = known.get(id(part.features))
        if (
            frame is not None
            and frame.features() is part.features
            and frame.state == _state(part.features)
            and frame.place is part.place
            and frame.keys.shape[:2] == tokens.shape[:2]
            and frame.keys.device == tokens.device
            and frame.keys.dtype == _dtype_of_linear(projection, tokens)
        ):
            self.hits += 1
            return frame
        keys = rotate(projection(tokens), rotation)
        return _Frame(weakref.ref(part.features), part.place, part.age.clone(), _state(part.features), keys)

    def _aged(self, frame: _Frame, part: Part, projection: nn.Linear, rotation: Rotation) -> Tensor:
        """Return the keys of a frame that has become older."""
        assert part.age is not None
        if part.age.device.type == "cpu" and torch.equal(part.age, frame.age):  # elsewhere a look costs more
            return frame.keys
        with torch.autocast(frame.keys.device.type, enabled=False):
            weight = projection.weight.float()
            step = functional.linear((part.age.float() - frame.age.float()).flatten(), weight)
            turned = rotation * torch.view_as_complex(step.unflatten(0, (-1, 2)))
            return (frame.keys + torch.view_as_real(turned).flatten(1)).to(frame.keys.dtype)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Return by what a tensor's content is known without a look at it: where it is, and how often it was written."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def _dtype_of_linear(projection: nn.Linear, x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else projection.weight.dtype
