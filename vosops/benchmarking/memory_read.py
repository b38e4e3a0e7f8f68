"""Contenders and cases of memory_read.

The formulations are reimplementations of code in use: STM's two products with a softmax between
them, STCN's scatter of the best weights into a dense affinity, and attention kernels, which want the values of all
objects side by side. They take query (N,Ck,P), key (N,Ck,M), value (N,O,Cv,M) and give (N,O,Cv,P).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad, scaled_dot_product_attention

import vosops
from vosops.benchmarking.cases import BEST, Benchmark, Plan, Variant
from vosops.benchmarking.local_matching import MB, one_thread

PIXELS_480P, PIXELS_1080P = 1620, 8160
"""Of feature maps of 1/16: 30x54 and 68x120."""

HALF_OF_STM_512, HALF_OF_STM_256 = 61.8 * MB, 39.4 * MB
"""Half the peak of STM's formulation in training (123.5 and 78.7 MB), by channels of the values."""

SMALL_PIXELS = 36
NEAR_TIES = 1e-2
"""Share of entries that may differ with top_k: rounding decides between scores that are equal but for it."""


@dataclass(frozen=True)
class MemorySize:
    """A memory read: `pixels` queries, `frames` times as many memory positions, `objects` values per position."""

    name: str
    pixels: int
    frames: int
    objects: int = 1
    key_channels: int = 128
    value_channels: int = 512
    batch: int = 1
    top_k: int | None = None
    anisotropic: bool = False
    """XMem's similarity, with shrinkage and selection, instead of the dot product."""
    channel_major: bool = False
    """With top_k: values as models make them, not channel-last as banks store them."""
    channel_last: bool = False
    """Keys and values as banks store them, also without top_k."""

    @property
    def title(self) -> str:
        """What it is, for people."""
        kind = "XMem's similarity" if self.anisotropic else "dot product"
        parts = [f"{self.pixels} queries, {self.frames} frames, {self.objects} objects", kind]
        parts += [f"keys {self.key_channels}, values {self.value_channels} channels"]
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        layout = ", channel-major values" if self.channel_major else ""
        parts += [f"top {self.top_k}{layout}"] if self.top_k else []
        parts += ["keys and values channel-last"] if self.channel_last else []
        return ", ".join(parts)


@dataclass(frozen=True)
class MemoryCase(Plan):
    """A memory read of one size, and what is aimed at."""

    name: str
    size: MemorySize

    @property
    def title(self) -> str:
        """What it is, for people."""
        return ", ".join([self.size.title, *self.run])

    @property
    def mismatched_share(self) -> float:
        """Share of the output that may differ."""
        return NEAR_TIES if self.size.top_k else 0.0

    def inputs(self, device: torch.device) -> MemoryInputs:
        """Return its tensors."""
        return MemoryInputs.of(self.size, self.dtype, device)

    def small(self) -> MemoryCase:
        """Return the same of few pixels."""
        return replace(self, size=replace(self.size, pixels=SMALL_PIXELS))


@dataclass(frozen=True)
class MemoryInputs:
    """The tensors of a read; shrinkage (N,1,M) and selection (N,Ck,P) of XMem's similarity, or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    shrinkage: Tensor | None
    selection: Tensor | None
    weight: Tensor
    """(N,O,Cv,P): what the output's gradient is."""
    top_k: int | None

    @staticmethod
    def of(size: MemorySize, dtype: torch.dtype, device: torch.device) -> MemoryInputs:
        """Random numbers, the same on every machine; the values' memory is channel-last with top_k, as banks store."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        n, c, o, cv = size.batch, size.key_channels, size.objects, size.value_channels
        memory = size.pixels * size.frames
        channel_last = size.channel_last or (size.top_k and not size.channel_major)
        value = normal(n, o, memory, cv).transpose(2, 3) if channel_last else normal(n, o, cv, memory)
        shrinkage = selection = None
        if size.anisotropic:
            shrinkage = normal(n, 1, memory).float().abs() + 1
            selection = normal(n, c, size.pixels).sigmoid()
        query, key, weight = normal(n, c, size.pixels), normal(n, c, memory), normal(n, o, cv, size.pixels)
        key = key.mT.contiguous().mT if size.channel_last else key
        return MemoryInputs(query, key, value, shrinkage, selection, weight, size.top_k)

    def call(self, read: Callable[[MemoryInputs], Tensor], backward: bool) -> Callable[[], list[Tensor]]:
        """Return the function to time: output, and with `backward` also the gradients of query, key and value."""

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [read(self)]

        def forward_backward() -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in (self.query, self.key, self.value)]
            output = read(replace(self, query=leaves[0], key=leaves[1], value=leaves[2]))
            return [output.detach(), *torch.autograd.grad(output, leaves, self.weight)]

        return forward_backward if backward else forward

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return self.query, self.key, self.value

    @property
    def rest(self) -> tuple[MemoryInputs]:
        """What formulations take besides."""
        return (self,)

    def in_float32(self) -> MemoryInputs:
        """Return the same numbers in float32."""
        query, key, value, weight = (t.float() for t in (*self.tensors, self.weight))
        return replace(self, query=query, key=key, value=value, weight=weight)

    def key_transposed(self) -> MemoryInputs:
        """Return the same with every position's key side by side, as the first product wants it."""
        return replace(self, key=self.key.transpose(1, 2).contiguous().transpose(1, 2))

    def position_major(self) -> MemoryInputs:
        """Return the same with every position's channels, of all objects, side by side: what attention kernels take."""
        query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (self.query, self.key))
        value = self.value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        return replace(self, query=query, key=key, value=value)


def affinity(inputs: MemoryInputs) -> Tensor:
    """Return the scores (N,M,P) as STM, or XMem, computes them."""
    query, key, channels = inputs.query, inputs.key, inputs.query.shape[1]
    if inputs.selection is None or inputs.shrinkage is None:
        products: Tensor = key.transpose(1, 2) @ query / math.sqrt(channels)
        return products
    keys, selection = key.transpose(1, 2), inputs.selection
    squares = keys.square() @ selection
    products = 2 * (keys @ (query * selection))
    constant = (selection * query.square()).sum(1, keepdim=True)
    scores: Tensor = (products - squares - constant) * inputs.shrinkage.transpose(1, 2) / math.sqrt(channels)
    return scores


def naive_read(inputs: MemoryInputs) -> Tensor:
    """STM's bmm, softmax, bmm; with top_k STCN's scatter into the dense affinity."""
    scores, value = affinity(inputs), inputs.value
    if inputs.top_k is None:
        weights = scores.softmax(1)
    else:
        best, indices = scores.topk(inputs.top_k, 1)
        weights = torch.zeros_like(scores).scatter_(1, indices, best.softmax(1))
    out: Tensor = value.flatten(1, 2) @ weights.to(value.dtype)
    return torch.unflatten(out, 1, value.shape[1:3])


def bag_read(inputs: MemoryInputs) -> Tensor:
    """Return the best rewrite of top_k that we know in PyTorch: topk along the last dimension, embedding_bag."""
    assert inputs.top_k is not None
    if inputs.selection is None:
        scores = (inputs.query / math.sqrt(inputs.query.shape[1])).transpose(1, 2) @ inputs.key
    else:
        scores = affinity(inputs).transpose(1, 2).contiguous()
    best, indices = scores.topk(inputs.top_k, 2)
    weights = best.softmax(2).to(inputs.value.dtype)
    rows = [
        embedding_bag(indices[n], values.t().contiguous(), per_sample_weights=weights[n], mode="sum").t()
        for n, objects in enumerate(inputs.value)
        for values in objects
    ]
    return torch.unflatten(torch.stack(rows), 0, inputs.value.shape[:2])


def read_by(attention: Callable[..., Any], split: bool) -> Callable[[MemoryInputs], Tensor]:
    """Return a read of position-major inputs by `attention` (query, key, value: (N,heads,length,width))."""

    def read(inputs: MemoryInputs) -> Tensor:
        batch, objects, channels, memory = inputs.value.shape
        query, key = (t.transpose(1, 2)[:, None] for t in (inputs.query, inputs.key))
        value = inputs.value.permute(0, 3, 1, 2).reshape(batch, memory, 1, objects * channels).transpose(1, 2)
        if split:
            width = inputs.key.shape[1]
            value = value[:, 0].unflatten(2, (-1, width)).transpose(1, 2)
            query, key = (t.expand(-1, value.shape[1], -1, -1) for t in (query, key))
        out = attention(query, key, value)
        return torch.unflatten(out.transpose(1, 2).flatten(2).transpose(1, 2), 1, (objects, channels))

    return read


def flex_read() -> Callable[[MemoryInputs], Tensor]:
    """FlexAttention, compiled, on position-major inputs."""
    from torch.nn.attention.flex_attention import flex_attention

    return read_by(torch.compile(flex_attention, dynamic=False), split=False)


def fused_read(inputs: MemoryInputs) -> Tensor:
    """Return the op of this package."""
    options: dict[str, Any] = {}
    if inputs.selection is not None:
        options = {"shrinkage": inputs.shrinkage, "selection": inputs.selection, "similarity": "l2"}
    result: Tensor = vosops.memory_read(inputs.query, inputs.key, inputs.value, top_k=inputs.top_k, **options)
    return result


def fused_by_one_thread(inputs: MemoryInputs) -> Tensor:
    """Return the op of this package on one thread, whatever the setting."""
    with one_thread():
        return fused_read(inputs)


def padded_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """scaled_dot_product_attention with query and key padded to the values' width, which its CPU kernel wants."""
    channels, wanted = query.shape[-1], value.shape[-1]
    query, key = (pad(t, (0, wanted - channels)) for t in (query, key))
    return scaled_dot_product_attention(query, key, value, scale=1 / math.sqrt(channels))


@functools.cache
def _compiled() -> Any:
    return torch.compile(naive_read, dynamic=False)


def compiled_read(inputs: MemoryInputs) -> Tensor:
    """STM's, or STCN's, code, compiled."""
    result: Tensor = _compiled()(inputs)
    return result


@functools.cache
def _flex() -> Callable[[MemoryInputs], Tensor]:
    return flex_read()


def _by(read: Callable[[MemoryInputs], Tensor]) -> Callable[..., Tensor]:
    """Return a read of inputs as a function of the tensors that are differentiated."""

    def formulation(query: Tensor, key: Tensor, value: Tensor, inputs: MemoryInputs) -> Tensor:
        return read(replace(inputs, query=query, key=key, value=value))

    return formulation


def memory_work(size: MemorySize, inputs: MemoryInputs, backward: bool) -> tuple[float, float]:
    """Return the operations and bytes without which the read cannot be done: each tensor read or written once.

    Forward: two products, scores and values. Backward: the scores again and the gradients of both products.
    """
    pairs = 2.0 * size.batch * size.pixels
    memory, values = size.pixels * size.frames, size.objects * size.value_channels
    scores = memory * size.key_channels * (2 if size.anisotropic else 1)
    read = (size.top_k or memory) * values
    flops = pairs * ((4 * scores + 3 * read) if backward else scores + read)
    tensors = inputs.query.nbytes + inputs.key.nbytes + inputs.weight.nbytes
    # With top_k only the chosen values must be read, each at least once: at most as many as there are.
    share = min(1.0, size.pixels * size.top_k / memory) if size.top_k else 1.0
    moved = tensors + share * inputs.value.nbytes
    return flops, moved * (2 if backward else 1)


STM, STCN, REWRITE = "bmm, softmax, bmm", "STCN top-k", "embedding_bag"
TRANSPOSED = "bmm, key transposed once"
ONE_THREAD = "vosops, one thread"
SDPA, PADDED, SPLIT = "SDPA", "SDPA padded", "SDPA, values split"
COMPILE, FLEX = "torch.compile", "flex_attention"
DENSE = (STM, TRANSPOSED, SDPA, PADDED, SPLIT)
SPARSE = (STCN, REWRITE)
_T5, _T20, _T100 = (MemorySize(f"T={t}", PIXELS_480P, t) for t in (5, 20, 100))
_TOP_20 = MemorySize("top 30, T=20", PIXELS_480P, 20, objects=3, key_channels=64, top_k=30)
_TOP_100 = MemorySize("top 30, T=100", PIXELS_480P, 100, key_channels=64, top_k=30)
_TRAINING = MemorySize("training", 24 * 24, 3, objects=3, key_channels=64, batch=4)


def _formulation(
    name: str, read: Callable[[MemoryInputs], Tensor], position_major: bool = False, **options: Any
) -> Variant:
    if position_major:
        options["prepare"] = MemoryInputs.position_major
    return Variant(name, _by(read), special=True, **options)


BENCHMARK = Benchmark(
    op="memory_read",
    variants=(
        Variant("vosops", _by(fused_read)),
        _formulation(STM, naive_read),
        _formulation(TRANSPOSED, naive_read, prepare=MemoryInputs.key_transposed),
        _formulation(SDPA, read_by(scaled_dot_product_attention, split=False), position_major=True),
        _formulation(PADDED, read_by(padded_attention, split=False), position_major=True),
        _formulation(SPLIT, read_by(scaled_dot_product_attention, split=True), position_major=True),
        _formulation(COMPILE, compiled_read, compiles=True),
        _formulation(
            FLEX, lambda inputs: _flex()(inputs), position_major=True, compiles=True, differentiable=False
        ),
        _formulation(STCN, naive_read),
        _formulation(REWRITE, bag_read),
        _formulation("vosops float32", fused_read, prepare=MemoryInputs.in_float32),
        _formulation(ONE_THREAD, fused_by_one_thread),
    ),
    cases=(
        MemoryCase(
            "480p-T5",
            _T5,
            only=(*DENSE, COMPILE, FLEX),
            goals={BEST: 1.5},
            goal_share=0.8,
            goal_memory=20 * MB,
        ),
        MemoryCase(
            "480p-T20", _T20, only=(*DENSE, COMPILE), goals={BEST: 1.5}, goal_share=0.8, goal_memory=20 * MB
        ),
        MemoryCase(
            "480p-T100",
            _T100,
            only=(STM, TRANSPOSED, SDPA, SPLIT),
            goals={BEST: 1.8, STM: 2.4},
            goal_share=0.8,
            goal_memory=20 * MB,
        ),
        MemoryCase(
            "1080p-T5",
            MemorySize("1080p", PIXELS_1080P, 5),
            only=(STM, TRANSPOSED, SDPA),
            goals={STM: 2},
            goal_share=0.8,
            goal_memory=40 * MB,
        ),
        MemoryCase(
            "480p-T5-bfloat16", _T5, dtype=torch.bfloat16, only=(STM, TRANSPOSED, SDPA), goals={STM: 1.4}
        ),
        MemoryCase("480p-T20-bfloat16", _T20, dtype=torch.bfloat16, only=(STM, TRANSPOSED, SDPA)),
        MemoryCase(
            "480p-T20-two-threads",
            _T20,
            threads=2,
            only=("vosops, one thread",),
            goals={"vosops, one thread": 1.9},
        ),
        MemoryCase("top30-T20-bank", _TOP_20, only=SPARSE, goals={STCN: 13, REWRITE: 2.5}),
        MemoryCase("top30-T100-bank", _TOP_100, only=SPARSE, goals={STCN: 14, REWRITE: 3.3}),
        MemoryCase("top30-T20", replace(_TOP_20, channel_major=True), only=SPARSE, goals={REWRITE: 2}),
        MemoryCase("top30-T100", replace(_TOP_100, channel_major=True), only=SPARSE, goals={REWRITE: 3}),
        MemoryCase(
            "480p-T5-backward",
            _T5,
            backward=True,
            only=(STM, TRANSPOSED, SDPA, SPLIT),
            goals={SDPA: 1.25},
            goal_memory=60 * MB,
        ),
        MemoryCase(
            "480p-T5-bfloat16-backward",
            _T5,
            dtype=torch.bfloat16,
            backward=True,
            only=(STM, TRANSPOSED, SDPA),
        ),
        MemoryCase(
            "training-512",
            _TRAINING,
            backward=True,
            only=(STM, TRANSPOSED, SDPA),
            goals={STM: 1},
            goal_memory=HALF_OF_STM_512,
        ),
        MemoryCase(
            "training-512-bfloat16",
            _TRAINING,
            dtype=torch.bfloat16,
            backward=True,
            only=(STM, TRANSPOSED, SDPA),
        ),
        MemoryCase(
            "training-256",
            replace(_TRAINING, value_channels=256),
            backward=True,
            only=(STM, TRANSPOSED, SDPA),
            goals={STM: 1},
            goal_memory=HALF_OF_STM_256,
        ),
        MemoryCase(
            "small",
            MemorySize("T=2", 15 * 27, 2, objects=2, value_channels=256),
            only=(STM, SDPA),
            quick=True,
        ),
    ),
    work=lambda case, inputs: memory_work(case.size, inputs, case.backward),
    result="values",
)
