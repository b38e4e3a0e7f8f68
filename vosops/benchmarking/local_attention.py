"""Contenders and cases of local_attention.

The formulations are reimplementations of code in use: every window of key and value unfolded, a
shift of whole maps for each offset, and AOT's map from every pixel to every other with all but the window masked. They
take query, key, value (N,C,H,W), bias (heads,K), heads and radius, and give (N,C,H,W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import vosops
from vosops import reference
from vosops.benchmarking.cases import SMALL_SIDE, Benchmark, Formulation, Plan, Variant
from vosops.benchmarking.local_matching import one_thread

CHANNELS, HEADS, RADIUS = 256, 8, 7
"""Of AOT's short-term attention."""


@dataclass(frozen=True)
class AttentionSize:
    """A window in a feature map."""

    name: str
    height: int
    width: int
    channels: int = CHANNELS
    heads: int = HEADS
    radius: int = RADIUS
    batch: int = 1
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Contenders that this size does without, and why."""

    @property
    def title(self) -> str:
        """What it is, for people."""
        parts = [f"{self.height}x{self.width}", f"C={self.channels}", f"{self.heads} heads"]
        parts += [f"radius {self.radius}"] + ([f"batch {self.batch}"] if self.batch > 1 else [])
        return ", ".join(parts)

    @property
    def offsets(self) -> int:
        """Of the window."""
        return (2 * self.radius + 1) ** 2

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """query, key, value and bias: random numbers, the same on every machine."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.batch, self.channels, self.height, self.width)] * 3 + [(self.heads, self.offsets)]
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

    @property
    def differentiated(self) -> int:
        """How many of the tensors, from the first on, a backward pass differentiates."""
        return 3

    @property
    def peers(self) -> dict[str, Formulation]:
        """Other contenders, the one that torch.compile takes first; none that would fill a GPU."""
        names = ("shifts",) if self.left_out else ("unfold", "shifts", "dense map")
        return {name: self._sized(PEERS[name]) for name in names}

    def ours(self, precision: str | None) -> Formulation:
        """By vosops; always float32 inside: `precision` changes nothing."""
        return self._sized(ours)

    @property
    def naive(self) -> Formulation:
        """By PyTorch's operators, a shift at a time."""
        return self._sized(shifts)

    def _sized(self, formulation: Formulation) -> Formulation:
        return partial(formulation, heads=self.heads, radius=self.radius)

    def work(self, itemsize: int, backward: bool) -> tuple[float, float]:
        """Return the operations and bytes without which it cannot be done; scores need not leave the chip."""
        entries = self.batch * self.channels * self.height * self.width
        passes = 3 if backward else 1
        return 4.0 * entries * self.offsets * passes, 4.0 * entries * itemsize * (2 if backward else 1)


@dataclass(frozen=True)
class AttentionCase(Plan):
    """One size, and what is aimed at."""

    name: str
    size: AttentionSize

    @property
    def title(self) -> str:
        """What it is, for people."""
        return ", ".join([self.size.title, *self.run])

    def inputs(self, device: torch.device) -> AttentionInputs:
        """Return its tensors."""
        query, key, value, bias = self.size.tensors(self.dtype, device)
        weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
        return AttentionInputs(query, key, value, bias, self.size, weight)

    def small(self) -> AttentionCase:
        """Return the same of few pixels."""
        return replace(self, size=replace(self.size, height=SMALL_SIDE, width=SMALL_SIDE))


@dataclass(frozen=True)
class AttentionInputs:
    """The tensors of a case."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    size: AttentionSize
    weight: Tensor
    """(N,C,H,W): what the output's gradient is."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return self.query, self.key, self.value

    @property
    def rest(self) -> tuple[Tensor, int, int]:
        """What formulations take besides."""
        return self.bias, self.size.heads, self.size.radius


def ours(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int, radius: int) -> Tensor:
    """By vosops."""
    result: Tensor = vosops.local_attention(query, key, value, radius=radius, heads=heads, bias=bias)
    return result


def shifts(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int, radius: int) -> Tensor:
    """Products of whole maps, a shift for each offset."""
    with vosops.use_backend("reference"):
        return ours(query, key, value, bias, heads, radius)


def unfold(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int, radius: int) -> Tensor:
    """Every window of key and value, copied."""
    result = reference.local_attention(query, key, value, radius=radius, heads=heads, bias=bias)
    assert isinstance(result, Tensor)
    return result


def dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int, radius: int) -> Tensor:
    """Return a map from every pixel to every other, all but the window masked: AOT's way."""
    height, width = query.shape[2:]
    q, k, v = (x.unflatten(1, (heads, -1)).flatten(3) for x in (query, key, value))
    y, x = (
        torch.arange(size, device=query.device).view(shape)
        for size, shape in ((height, (-1, 1)), (width, (1, -1)))
    )
    places = [axis.expand(height, width).flatten() for axis in (y, x)]
    dy, dx = (place[None, :] - place[:, None] for place in places)
    inside = (dy.abs() <= radius) & (dx.abs() <= radius)
    offset = ((dy + radius) * (2 * radius + 1) + dx + radius).masked_fill(~inside, 0)
    scores = q.mT @ k * q.shape[2] ** -0.5 + bias[:, offset]
    weights = scores.masked_fill(~inside, -torch.inf).softmax(-1)
    attended: Tensor = (v @ weights.mT).flatten(1, 2).unflatten(2, (height, width))
    return attended


def _one_thread(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int, radius: int) -> Tensor:
    with one_thread():
        return ours(query, key, value, bias, heads, radius)


def attention_work(case: AttentionCase, inputs: AttentionInputs) -> tuple[float, float]:
    """Return the operations and bytes of a case."""
    return case.size.work(inputs.query.itemsize, case.backward)


PEERS = {"shifts": shifts, "unfold": unfold, "dense map": dense}
"""Contenders by name."""

ONE_THREAD = "vosops, one thread"
LEFT_OUT_1080P = {
    "unfold": "needs 3.8 GB for the windows of key and value alone",
    "dense map": "needs 2.1 GB for each map",
}
SIZE_480P = AttentionSize("480p", 31, 54)
SIZE_1080P = AttentionSize("1080p", 68, 120, left_out=LEFT_OUT_1080P)

BENCHMARK = Benchmark(
    op="local_attention",
    variants=(
        Variant("vosops", ours),
        *(Variant(name, formulation) for name, formulation in PEERS.items()),
        Variant(ONE_THREAD, _one_thread, special=True),
    ),
    cases=(
        AttentionCase("480p", SIZE_480P, quick=True, goals={"shifts": 2.5, "unfold": 50}),
        AttentionCase("training", SIZE_480P, backward=True, goals={"shifts": 2, "unfold": 40}),
        AttentionCase("1080p", SIZE_1080P, goals={"shifts": 2.5}, left_out=LEFT_OUT_1080P),
        AttentionCase(
            "1080p-training", SIZE_1080P, backward=True, goals={"shifts": 2}, left_out=LEFT_OUT_1080P
        ),
        AttentionCase("480p-bfloat16", SIZE_480P, dtype=torch.bfloat16),
        AttentionCase("480p-two-threads", SIZE_480P, threads=2, goals={ONE_THREAD: 1.5}, only=(ONE_THREAD,)),
    ),
    work=attention_work,
    result="attended values",
)
