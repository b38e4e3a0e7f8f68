"""AOT and DeAOT: long-term attention by `memory_read`, short-term attention by `local_attention`, in place.

The layers of `networks/layers/attention.py` keep their parameters; what is replaced is how they attend. Written from
the papers (Yang et al., AOT, NeurIPS 2021; Yang and Yang, DeAOT, NeurIPS 2022) and from the layers' results. Dropout
that is on, a dilation other than 1, options that are not known and long-term attention to very small maps on a CPU run
as before. Weights come back as tensors that are built where something looks at them, which nothing in the networks
does.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.integrations.affinity import Handle
from vosops.integrations.recipes import Function, Probe, Recipe, are_few, original_of, random_tensors
from vosops.ops import local_attention, memory_read

_HEADS, _CHANNELS, _SIZE, _REACH, _TOP_K = 2, 8, (4, 5), 1, 3
"""Of the layers on which the replacements are compared with the originals."""


class _Read(NamedTuple):
    """A read of all heads, which are in N: query (N,d,L), key (N,d,M), value (N,Cv,M), and memory_read's options."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]

    def weights(self) -> Tensor:
        """Return the softmax (N,L,M), built."""
        given = dict(self.options)
        scores = given.pop("scale") * (self.query.mT @ self.key)
        if given.get("bias") is not None:
            scores = scores + given["bias"].unsqueeze(1)
        if given.get("top_k") is not None:
            best, index = scores.topk(given["top_k"], dim=2)
            return torch.zeros_like(scores).scatter(2, index, best.softmax(2))
        weights: Tensor = scores.softmax(2)
        return weights


class _Windows(NamedTuple):
    """An attention to windows: query, key and value, and local_attention's options."""

    maps: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]


class AttentionMap(Handle):
    """The weights (batch,heads,L,M) of a read, which nothing in AOT looks at: built where something does."""

    _read: _Read
    _heads: int

    @staticmethod
    def of(read: _Read, heads: int) -> AttentionMap:
        """Return the weights of a read whose N is batch * heads."""
        shape = (read.query.shape[0] // heads, heads, read.query.shape[2], read.key.shape[2])
        self = AttentionMap._make(shape, read.query)  # type: ignore[arg-type]
        self._read, self._heads = read, heads
        return self

    def build(self) -> Tensor:
        """Return the weights."""
        weights: Tensor = self._read.weights().unflatten(0, (-1, self._heads))
        return weights


class LocalMap(Handle):
    """The weights (N,heads,K,H * W), or (N,heads,H * W,K), of windows: built where something looks at them."""

    _windows: _Windows
    _offsets_last: bool

    @staticmethod
    def of(windows: _Windows, offsets_last: bool) -> LocalMap:
        """Return the weights of an attention to windows."""
        query, options = windows.maps[0], windows.options
        offsets, pixels = (2 * options["radius"] + 1) ** 2, query.shape[2] * query.shape[3]
        sizes = (pixels, offsets) if offsets_last else (offsets, pixels)
        self = LocalMap._make((query.shape[0], options["heads"], *sizes), query)  # type: ignore[arg-type]
        self._windows, self._offsets_last = windows, offsets_last
        return self

    def build(self) -> Tensor:
        """Return the weights."""
        _, weights = local_attention(*self._windows.maps, **self._windows.options, return_weights=True)
        flat: Tensor = weights.flatten(3)
        return flat.mT if self._offsets_last else flat


AttentionMap._answers = LocalMap._answers = {}


def _drops(layer: Any) -> bool:
    """Whether some of a layer's weights, or scores, are dropped."""
    share = layer.dropout.p if isinstance(layer.dropout, nn.Dropout) else layer.dropout.drop_prob
    return bool(layer.training and share > 0)


def _attend(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, AttentionMap]:
    """Read (M,batch,heads * Cv) at (L,batch,heads * d): (L,batch,heads * Cv) and the weights."""
    heads = layer.num_head
    q, k, v = (t.unflatten(2, (heads, -1)).permute(1, 2, 3, 0).flatten(0, 1) for t in (query, key, value))
    length, memory = query.shape[0], key.shape[0]
    scale, longest = 1 / layer.T, getattr(layer, "max_mem_len_ratio", -1)
    if not layer.training and longest > 0 and memory / length > longest:
        scale *= math.log(memory / length) / math.log(longest)
    options: dict[str, Any] = {"scale": scale}
    if getattr(layer, "use_dis", False):
        options = {"scale": 2 * scale, "bias": -k.square().sum(1)}
    top_k = getattr(layer, "top_k", -1)
    if not layer.training and top_k != -1 and top_k < memory:
        options["top_k"] = _chosen(top_k, length, memory)
    read = _Read(q, k, v, options)
    out: Tensor = memory_read(q, k, v, similarity="dot", **options)
    attended = out.unflatten(0, (-1, heads)).permute(3, 0, 1, 2).flatten(2)
    return attended, AttentionMap.of(read, heads)


def _chosen(top_k: float, length: int, memory: int) -> int:
    """How many positions an option means: a number of them, or a share of the memory or, below 0, of the query."""
    if top_k >= 1:
        return int(top_k)
    share = int(memory * top_k) if top_k > 0 else int(-top_k * length)
    if not -1 < top_k < 1 or share < 1:
        raise NotImplementedError(f"top_k must be above 1 or a share between -1 and 1, got {top_k}")
    return share


def _attend_locally(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, *, offsets_last: bool = False
) -> tuple[Tensor, LocalMap]:
    """Attend from (N,heads * d,H,W) to windows: (N,heads * Cv,H,W) and the weights (N,heads,K,H * W).

    offsets_last: of the weights, (N,heads,H * W,K).
    """
    heads, window = layer.num_head, layer.window_size**2
    scale, embedding = 1 / layer.T, layer.relative_emb_k
    bias = embedding.bias.view(heads, window)
    if getattr(layer, "use_dis", False):
        norms = key.unflatten(1, (heads, -1)).square().sum(2)
        norms = functional.unfold(functional.pad(norms, [layer.max_dis] * 4), layer.window_size)
        norms = norms.view(key.shape[0], heads, window, *key.shape[2:])
        scale, bias = 2 * scale, bias[:, :, None, None] - norms
    options: dict[str, Any] = {
        "radius": layer.max_dis,
        "heads": heads,
        "scale": scale,
        "relative_key": embedding.weight.view(heads, window, -1).mT,
        "relative_value": getattr(layer, "relative_emb_v", None),
        "bias": bias,
    }
    windows = _Windows((query, key, value), options)
    attended: Tensor = local_attention(*windows.maps, **options)
    return attended, LocalMap.of(windows, offsets_last)


def _as_sequence(maps: Tensor) -> Tensor:
    """(H * W,N,C) of (N,C,H,W)."""
    return maps.flatten(2).permute(2, 0, 1)


# ---- AOT.


def _long_term(original: Function) -> Function:
    def forward(self: Any, Q: Tensor, K: Tensor, V: Tensor) -> Any:
        if _drops(self) or are_few(Q.shape[0] * K.shape[0], Q):
            return original(self, Q, K, V)
        if self.use_linear:
            Q, K, V = self.linear_Q(Q), self.linear_K(K), self.linear_V(V)
        attended, weights = _attend(self, Q, K, V)
        return self.projection(attended), weights

    return forward


def _short_term(original: Function, *, offsets_last: bool = False) -> Function:
    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        if _drops(self) or self.dilation != 1:
            return original(self, q, k, v)
        if self.use_linear:
            q, k, v = self.linear_Q(q), self.linear_K(k), self.linear_V(v)
        attended, weights = _attend_locally(self, q, k, v, offsets_last=offsets_last)
        return self.projection(_as_sequence(attended)), weights

    return forward


# ---- DeAOT. Values and gates of both branches go through halves of their own, a half of each head.


def _joined(layer: Any, first: Tensor, second: Tensor) -> Tensor:
    """Two halves (L,batch,heads * C / 2) as (L,batch,heads * C), a half of each after the other within a head."""
    halves = [half.unflatten(2, (layer.num_head, -1)) for half in (first, second)]
    return functional.silu(torch.cat(halves, 3).flatten(2))


def _gated(original: Function) -> Function:
    def forward(self: Any, Q: Tensor, K: Tensor, V: Tensor, U: Tensor, size_2d: Any) -> Any:
        if _drops(self) or are_few(Q.shape[0] * K.shape[0], Q):
            return original(self, Q, K, V, U, size_2d)
        if self.use_linear:
            Q = K = self.linear_QK(Q)
            (V1, V2), (U1, U2) = (t.split(self.d_vu // 2, dim=2) for t in (V, U))
            V = _joined(self, self.linear_V1(V1), self.linear_V2(V2))
            U = _joined(self, self.linear_U1(U1), self.linear_U2(U2))
        attended, weights = _attend(self, Q, K, V)
        return self.projection(self.dw_conv(attended * U, size_2d)), weights

    return forward


def _gated_locally(original: Function) -> Function:
    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, u: Tensor, size_2d: Any) -> Any:
        if _drops(self) or self.dilation != 1:
            return original(self, q, k, v, u, size_2d)
        if self.use_linear:
            q = k = self.linear_QK(q)
            v, u = functional.silu(self.linear_V(v)), functional.silu(self.linear_U(u))
            if self.num_head > 1:
                v, u = (t.unflatten(1, (2, self.num_head, -1)).transpose(1, 2).flatten(1, 3) for t in (v, u))
            u = _as_sequence(u)
        attended, weights = _attend_locally(self, q, k, v)
        return self.projection(self.dw_conv(_as_sequence(attended) * u, size_2d)), weights

    return forward


# ---- The problems on which both must agree.


def _layer(original: Function, *args: int, **options: Any) -> nn.Module:
    """Return a small layer of a method's class with random parameters; options that its version lacks are left out."""
    name = original.__qualname__.split(".")[0]
    kind = getattr(sys.modules[original.__module__], name)
    known = inspect.signature(kind).parameters
    with torch.random.fork_rng(devices=[]):
        layer: nn.Module = kind(
            *args, **{key: value for key, value in options.items() if key in known}
        ).eval()
    parameters = list(layer.parameters())
    for parameter, value in zip(
        parameters, random_tensors(*(tuple(p.shape) for p in parameters)), strict=True
    ):
        parameter.data = value - 0.5
    return layer


def _long_term_probes(original: Function) -> Iterator[Probe]:
    length = math.prod(_SIZE)
    query, key, value = random_tensors((length, 2, _CHANNELS), *[(2 * length, 2, _CHANNELS)] * 2)
    for options in ({}, {"top_k": _TOP_K}, {"use_dis": True, "max_mem_len_ratio": 1.5}):
        yield (_layer(original, _CHANNELS, _HEADS, **options), query, key, value), {}


def _judge_of_kin(original: Function, *, offsets_last: bool) -> Function:
    """Return what judges `MultiheadLocalAttentionV1` and `V3`: themselves, or the original `V2` where they do not run.

    Published versions of both raise in today's PyTorch (a difference from a bool; shapes that do not broadcast). `V2`
    computes the same from the same parameters.
    """
    module = sys.modules[original.__module__]

    def run(self: Any, *maps: Tensor) -> tuple[Tensor, Tensor]:
        try:
            out, weights = original(self, *maps)
        except RuntimeError:
            kin = module.MultiheadLocalAttentionV2(
                maps[0].shape[1],
                self.num_head,
                max_dis=self.max_dis,
                use_linear=self.use_linear,
                enable_corr=False,
            ).eval()
            kin.load_state_dict(self.state_dict())
            method = type(kin).forward
            out, weights = (original_of(method) or method)(kin, *maps)
            weights = weights.mT if offsets_last else weights
        return out, weights

    return run


def _short_term_probes(original: Function) -> Iterator[Probe]:
    maps = random_tensors(*[(2, _CHANNELS, *_SIZE)] * 3)
    for options in ({}, {"use_dis": True, "use_linear": False}):
        layer = _layer(original, _CHANNELS, _HEADS, max_dis=_REACH, enable_corr=False, **options)
        yield (layer, *maps), {}


def _gated_probes(original: Function, *, local: bool) -> Iterator[Probe]:
    shape = (2, _CHANNELS, *_SIZE) if local else (math.prod(_SIZE), 2, _CHANNELS)
    maps = random_tensors(*[shape] * 4)
    for heads in (1, _HEADS):
        layer = _layer(original, _CHANNELS, _CHANNELS, heads, max_dis=_REACH, enable_corr=False)
        yield (layer, *maps, _SIZE), {}


AOT_RECIPES = (
    Recipe("forward", ("self", "Q", "K", "V"), _long_term, _long_term_probes, "MultiheadAttention"),
    Recipe("forward", ("self", "q", "k", "v"), _short_term, _short_term_probes, "MultiheadLocalAttentionV2"),
    *(
        Recipe(
            "forward",
            ("self", "q", "k", "v"),
            functools.partial(_short_term, offsets_last=offsets_last),
            _short_term_probes,
            f"MultiheadLocalAttention{version}",
            functools.partial(_judge_of_kin, offsets_last=offsets_last),
        )
        for version, offsets_last in (("V1", False), ("V3", True))
    ),
    Recipe(
        "forward",
        ("self", "Q", "K", "V", "U", "size_2d"),
        _gated,
        functools.partial(_gated_probes, local=False),
        "GatedPropagation",
    ),
    Recipe(
        "forward",
        ("self", "q", "k", "v", "u", "size_2d"),
        _gated_locally,
        functools.partial(_gated_probes, local=True),
        "LocalGatedPropagation",
    ),
)
