"""The memory attention of SAM 2, EdgeTAM, EfficientTAM and transformers' models, read by vosops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vosops.integrations.recipes import Function, Probe, Recipe
from vosops.integrations.rotary import FrameRecorder, Pooling, Rotation, attend, can_attend
from vosops.integrations.together import RaggedMemory

_SIDE, _CHANNELS, _MEMORY_CHANNELS = 4, 16, 8  # of the small layers that replacements are compared on
_FRAMES, _POINTERS = 2, 3  # frames, and unrotated tokens there
_SIDE_OF_KEYS = 2  # of EdgeTAM's summaries of a frame
_POOLINGS = (None, Pooling(bias=2 * math.log(2)), Pooling(shift=2 * math.log(2)))  # SAM 2; EfficientTAM's two


# ---- sam2: sam2/modeling/sam/transformer.py, RoPEAttention and related models.


def _rope_attention(original: Function) -> Function:
    """Return SAM 2's forward; EfficientTAM has classes of the same form that pool the memory."""

    def forward_with(pooling: Pooling | None) -> Function:
        def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Any:
            frame = q.shape[1]
            ragged = RaggedMemory.current()
            if pooling is not None or (ragged is not None and not ragged.fits(self, k)):
                ragged = None
            if ragged is None and not can_attend(self, q, k, frame, num_k_exclude_rope, self.num_heads):
                return original(self, q, k, v, num_k_exclude_rope)
            side = math.sqrt(frame)
            if pooling is not None and side % 2:
                return original(self, q, k, v, num_k_exclude_rope)
            rotation = _rotation_of(self, frame, side, q.device)
            if ragged is not None:
                return ragged.attend(self, q, k, v, rotation, self.out_proj)
            return attend(self, q, k, v, (rotation, rotation), num_k_exclude_rope, self.out_proj, pooling)

        forward._vosops_reads_ragged = pooling is None  # type: ignore[attr-defined]
        return forward

    ways = [forward_with(pooling) for pooling in _POOLINGS]
    with torch.no_grad():
        for way in ways[:-1]:
            if all(_agree(original, way, args, kwargs) for args, kwargs in _rope_attention_probes(original)):
                return way
    return ways[-1]


def _rotation_of(layer: Any, frame: int, side: float, device: torch.device) -> Rotation:
    """Return a layer's rotation of the positions of a frame, made and moved once.

    What the layer holds is left as it is: SAM 3 keeps the real and the imaginary part beside it, for one size.
    """
    for known in (layer.freqs_cis, getattr(layer, "_vosops_rotation", None)):
        if known is not None and known.shape[0] == frame and known.device == device:
            rotation: Rotation = known
            return rotation
    own = layer.freqs_cis
    rotation = own if own.shape[0] == frame else layer.compute_cis(end_x=side, end_y=side)
    layer._vosops_rotation = rotation = rotation.to(device)
    return rotation


def _agree(original: Function, way: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        return torch.allclose(original(*args, **kwargs), way(*args, **kwargs), rtol=0, atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _rope_attention_probes(original: Function) -> Iterator[Probe]:
    size = (_SIDE, _SIDE)
    layer = _small_layer(
        original, _CHANNELS, 1, kv_in_dim=_MEMORY_CHANNELS, rope_k_repeat=True, feat_sizes=size
    )
    for memory in _small_memories(_SIDE**2):
        yield (layer, *memory), {"num_k_exclude_rope": _POINTERS}


# ---- EdgeTAM: RoPEAttentionv2. A frame is summaries without a position, then a grid of summaries.


def _rope_attention_v2(original: Function) -> Function:
    def forward(
        self: Any, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0, rope_k_repeat: int = -1
    ) -> Any:
        of_query, of_key = self.freqs_cis_q.to(q.device), self.freqs_cis_k.to(q.device)
        of_frame = _of_frame(of_key, k.shape[1] - num_k_exclude_rope, rope_k_repeat)
        if (
            of_frame is None
            or q.shape[1] != of_query.shape[0]
            or not can_attend(self, q, k, of_frame.shape[0], num_k_exclude_rope, self.num_heads)
        ):
            return original(self, q, k, v, num_k_exclude_rope, rope_k_repeat)
        return attend(self, q, k, v, (of_query, of_frame), num_k_exclude_rope, self.out_proj)

    return forward


def _of_frame(grid: Rotation, count: int, frames: int) -> Rotation | None:
    """Return how the positions of a frame are turned, of which the last ones are a grid; None if frames differ."""
    if frames < 1 or count % frames or count // frames < grid.shape[0]:
        return None
    return torch.cat([grid.new_ones(count // frames - grid.shape[0], grid.shape[1]), grid])


def _rope_attention_v2_probes(original: Function) -> Iterator[Probe]:
    sizes = {"q_sizes": (_SIDE, _SIDE), "k_sizes": (_SIDE_OF_KEYS, _SIDE_OF_KEYS)}
    layer = _small_layer(original, _CHANNELS, 1, kv_in_dim=_MEMORY_CHANNELS, **sizes)
    for without_position in (0, 3):
        for q, k, v in _small_memories(_SIDE_OF_KEYS**2 + without_position):
            yield (layer, q, k, v), {"num_k_exclude_rope": _POINTERS, "rope_k_repeat": _FRAMES}


# ---- transformers: Sam2VideoRoPEAttention and the classes generated from it.


def _transformers_attention(original: Function) -> Function:
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        num_k_exclude_rope: int = 0,
        **kwargs: Any,
    ) -> Any:
        rotation = _of_angles(position_embeddings, query.device)
        if kwargs or not _can_attend_once(self, query, key, rotation, rotation, num_k_exclude_rope):
            return original(self, query, key, value, position_embeddings, num_k_exclude_rope, **kwargs)
        return _attend_once(self, query, key, value, (rotation, rotation), num_k_exclude_rope)

    return forward


def _transformers_cross_attention(original: Function) -> Function:
    """Return the forward of EdgeTamVideoModel's attention."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        position_embeddings_k: tuple[Tensor, Tensor],
        num_k_exclude_rope: int = 0,
        rope_k_repeat: int = 0,
        **kwargs: Any,
    ) -> Any:
        of_query = _of_angles(position_embeddings, query.device)
        of_key = _of_angles(position_embeddings_k, query.device)
        of_frame = _of_frame(of_key, key.shape[-2] - num_k_exclude_rope, rope_k_repeat)
        if (
            kwargs
            or of_frame is None
            or not _can_attend_once(self, query, key, of_query, of_frame, num_k_exclude_rope)
        ):
            places = position_embeddings, position_embeddings_k
            return original(self, query, key, value, *places, num_k_exclude_rope, rope_k_repeat, **kwargs)
        return _attend_once(self, query, key, value, (of_query, of_frame), num_k_exclude_rope)

    return forward


def _of_angles(places: tuple[Tensor, Tensor], device: torch.device) -> Rotation:
    """Return the rotation of cosines and sines (...,P,C), each of them twice."""
    cos, sin = (each[..., ::2].float().flatten(0, -2).to(device) for each in places)
    return torch.complex(cos, sin)


def _can_attend_once(
    layer: Any, query: Tensor, key: Tensor, of_query: Rotation, of_frame: Rotation, unrotated: int
) -> bool:
    """Return whether `attend` computes what a layer does with (B,1,P,C)."""
    if query.dim() != 4 or query.shape[1] != 1 or query.shape[2] != of_query.shape[0]:
        return False
    frame, heads = of_frame.shape[0], layer.num_attention_heads
    return can_attend(layer, query[:, 0], key[:, 0], frame, unrotated, heads)


def _attend_once(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotations: tuple[Rotation, Rotation],
    unrotated: int,
) -> tuple[Tensor, None]:
    """Return what is read for (B,1,P,C), and no weights."""
    recorder = FrameRecorder.current()
    keys = key[:, 0] if recorder is None else recorder.alias(key[:, 0], key)
    out = attend(layer, query[:, 0], keys, value[:, 0], rotations, unrotated, layer.o_proj)
    return out.unsqueeze(1), None


def _transformers_attention_probes(original: Function) -> Iterator[Probe]:
    layer = _small_layer(original, _small_config(), kv_in_dim=_MEMORY_CHANNELS, rope_k_repeat=True)
    angles = _small_angles(_SIDE)
    for q, k, v in _small_memories(_SIDE**2):
        yield (layer, q[:, None], k[:, None], v[:, None], angles), {"num_k_exclude_rope": _POINTERS}


def _transformers_cross_attention_probes(original: Function) -> Iterator[Probe]:
    layer = _small_layer(original, _small_config(), kv_in_dim=_MEMORY_CHANNELS)
    places = _small_angles(_SIDE), _small_angles(_SIDE_OF_KEYS)
    for without_position in (0, 3):
        for q, k, v in _small_memories(_SIDE_OF_KEYS**2 + without_position):
            options = {"num_k_exclude_rope": _POINTERS, "rope_k_repeat": _FRAMES}
            yield (layer, q[:, None], k[:, None], v[:, None], *places), options


def _small_config() -> SimpleNamespace:
    return SimpleNamespace(
        memory_attention_hidden_size=_CHANNELS,
        memory_attention_downsample_rate=1,
        memory_attention_num_attention_heads=1,
        memory_attention_rope_dropout=0.0,
        _attn_implementation="sdpa",
    )


def _small_angles(side: int) -> tuple[Tensor, Tensor]:
    [angles] = _random((side**2, _CHANNELS // 2))
    angles = angles.repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


# ---- Where a model puts its memory together from frames: what they are is watched there.


def _watched(original: Function) -> Function:
    def _prepare_memory_conditioned_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        with FrameRecorder():
            return original(self, *args, **kwargs)

    return _prepare_memory_conditioned_features


def _nothing_to_compare(original: Function) -> Iterator[Probe]:
    """Yield nothing: what is computed changes in the attention, whose probes have a memory that is watched."""
    return iter(())


ATTENTION_RECIPES = (
    Recipe("forward", ("self", "q", "k", "v", "num_k_exclude_rope"), _rope_attention, _rope_attention_probes),
    Recipe(
        "forward",
        ("self", "q", "k", "v", "num_k_exclude_rope", "rope_k_repeat"),
        _rope_attention_v2,
        _rope_attention_v2_probes,
    ),
    Recipe(
        "forward",
        ("self", "query", "key", "value", "position_embeddings", "num_k_exclude_rope", "kwargs"),
        _transformers_attention,
        _transformers_attention_probes,
    ),
    Recipe(
        "forward",
        (
            *("self", "query", "key", "value", "position_embeddings", "position_embeddings_k"),
            *("num_k_exclude_rope", "rope_k_repeat", "kwargs"),
        ),
        _transformers_cross_attention,
        _transformers_cross_attention_probes,
    ),
)
KEY_RECIPES = (Recipe("_prepare_memory_conditioned_features", ("self",), _watched, _nothing_to_compare),)


def _small_layer(original: Function, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a small layer of the class that a forward is of, with random weights, always the same."""
    owner = getattr(original, "__globals__", {}).get(original.__qualname__.split(".")[0])
    if not isinstance(owner, type):
        raise ValueError(f"{original.__qualname__} must be a method of a class of its module: not replaced")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        layer: nn.Module = owner(*args, **kwargs).float().eval().requires_grad_(False)
    return layer


def _small_memories(frame: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield queries, keys and values before their projections: a memory, then one that is watched and becomes older."""
    cells = (frame, 1, _MEMORY_CHANNELS)
    query, pointers, place, *rest = _random(
        (1, _SIDE**2, _CHANNELS),
        (_POINTERS, 1, _MEMORY_CHANNELS),
        *[cells] * (_FRAMES + 1),
        *[(1, 1, _MEMORY_CHANNELS)] * 3,
    )
    features, ages = rest[:_FRAMES], rest[_FRAMES:]

    def joined(first: int, second: int) -> tuple[Tensor, Tensor, Tensor]:
        memory = torch.cat([*features, pointers]).transpose(0, 1)
        codes = [place + ages[first], place + ages[second], torch.zeros_like(pointers)]
        return query, memory + torch.cat(codes).transpose(0, 1), memory

    yield joined(0, 1)
    with FrameRecorder():
        yield joined(0, 1)
        yield joined(0, 2)


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Numbers of both signs, always the same; the global generator stays as it is."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
