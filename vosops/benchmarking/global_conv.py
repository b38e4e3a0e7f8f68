"""Contenders and cases of global_conv: RGMP's four convolutions by PyTorch, in each memory format and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

import vosops
from vosops.benchmarking.cases import BEST, SMALL_SIDE, Benchmark, Plan, Variant
from vosops.benchmarking.local_matching import MB, one_thread

KERNEL, MIDDLE, OUT = 7, 256, 256
"""RGMP's kernel size, the channels between the convolutions of a branch, and those of the result."""

OUTPUT_SCALE = 0.2
"""Standard deviation of the results, so that the runner's tolerance is 2e-5 of the greatest of them."""

SMALL_CHANNELS = 64

LESS_THAN_EAGER = 119 * MB
"""The least peak of the eager formulation in training that was measured; 69 MB are the gradients."""


@dataclass(frozen=True)
class ConvSize:
    """A map, the kernel's size being RGMP's; `prepared`: the second half of the channels is constant."""

    channels: int
    height: int
    width: int
    prepared: bool = False


@dataclass(frozen=True)
class ConvCase(Plan):
    """A global convolution of one size, and what is aimed at."""

    name: str
    size: ConvSize

    @property
    def title(self) -> str:
        """What it is, for people."""
        size = self.size
        parts = [f"{size.channels} channels, {size.height}x{size.width}, k={KERNEL}, to {OUT}"]
        parts += ["one half of the channels prepared"] if size.prepared else []
        return ", ".join([*parts, *self.run])

    def inputs(self, device: torch.device) -> ConvInputs:
        """Return its tensors."""
        return ConvInputs.of(self.size, self.dtype, device)

    def small(self) -> ConvCase:
        """Return the same of few pixels and channels."""
        small = replace(self.size, channels=SMALL_CHANNELS, height=SMALL_SIDE, width=SMALL_SIDE)
        return replace(self, size=small)


@dataclass(frozen=True)
class ConvInputs:
    """A map (1,C,H,W), the weights and biases (l1, l2, r1, r2), and the prepared half of the first stage or None."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    prepared: Tensor | None
    weight: Tensor
    """(1,M,H,W): what the output's gradient is."""

    @staticmethod
    def of(size: ConvSize, dtype: torch.dtype, device: torch.device) -> ConvInputs:
        """Random features after a ReLU and weights that keep their scale, the same on every machine."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        channels, height, width = size.channels, size.height, size.width
        first, second = (2 / (channels * KERNEL)) ** 0.5, OUTPUT_SCALE * (0.5 / (MIDDLE * KERNEL)) ** 0.5
        weights = (
            normal(MIDDLE, channels, KERNEL, 1, scale=first),
            normal(OUT, MIDDLE, 1, KERNEL, scale=second),
            normal(MIDDLE, channels, 1, KERNEL, scale=first),
            normal(OUT, MIDDLE, KERNEL, 1, scale=second),
        )
        biases = tuple(normal(w.shape[0], scale=OUTPUT_SCALE) for w in weights)
        x = normal(1, channels, height, width).relu()
        prepared = None
        if size.prepared:
            half = channels // 2
            halves = ((weights[0], biases[0], (KERNEL // 2, 0)), (weights[2], biases[2], (0, KERNEL // 2)))
            prepared = torch.cat([conv2d(x[:, half:], w[:, half:], b, padding=p) for w, b, p in halves], 1)
        return ConvInputs(x, weights, biases, prepared, normal(1, OUT, height, width))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return self.x, *self.weights

    @property
    def rest(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What formulations take besides."""
        return self.biases, self.prepared

    def channels_last(self) -> ConvInputs:
        """Return the same with maps and weights channels last."""
        last = functools.partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
        return replace(self, x=last(self.x), weights=tuple(map(last, self.weights)))

    def in_float32(self) -> ConvInputs:
        """Return the same numbers in float32."""
        wide = [tuple(t.float() for t in tensors) for tensors in (self.weights, self.biases)]
        return replace(self, x=self.x.float(), weights=wide[0], biases=wide[1], weight=self.weight.float())


def ours(x: Tensor, *arguments: Any) -> Tensor:
    """Return the op; with a prepared half on the other half of the map."""
    *weights, biases, prepared = arguments
    l1, l2, r1, r2 = biases
    if prepared is not None:
        return vosops.global_conv(
            x[:, : x.shape[1] // 2], *weights, l2_bias=l2, r2_bias=r2, prepared=prepared
        )
    return vosops.global_conv(x, *weights, l1_bias=l1, l2_bias=l2, r1_bias=r1, r2_bias=r2)


def ours_by_one_thread(x: Tensor, *arguments: Any) -> Tensor:
    """Return the op on one thread, whatever the setting."""
    with one_thread():
        return ours(x, *arguments)


def exact(x: Tensor, *arguments: Any) -> Tensor:
    """Return the op without Winograd arithmetic."""
    *weights, (l1, l2, r1, r2), _ = arguments
    return vosops.global_conv(x, *weights, l1_bias=l1, l2_bias=l2, r1_bias=r1, r2_bias=r2, precision="exact")


def four_convolutions(x: Tensor, *arguments: Any) -> Tensor:
    """RGMP's block: the whole map through four convolutions."""
    l1, l2, r1, r2, (bl1, bl2, br1, br2), _ = arguments
    tall, wide = (KERNEL // 2, 0), (0, KERNEL // 2)
    left = conv2d(conv2d(x, l1, bl1, padding=tall), l2, bl2, padding=wide)
    return left + conv2d(conv2d(x, r1, br1, padding=wide), r2, br2, padding=tall)


class _Block(nn.Module):
    """The four convolutions as a module, whose parameters the compiler may take for constants."""

    def __init__(self, inputs: ConvInputs) -> None:
        super().__init__()
        constants = (*inputs.weights, *inputs.biases)
        self.constants = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in constants)

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = list(self.constants)[:4], tuple(self.constants)[4:]
        return four_convolutions(x, *weights, biases, None)


@dataclass(frozen=True)
class _Frozen:
    """A map and the compiled block that it goes through."""

    x: Tensor
    block: Callable[[Tensor], Tensor]
    weight: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x,)

    @property
    def rest(self) -> tuple[Callable[[Tensor], Tensor]]:
        return (self.block,)


def _frozen(inputs: ConvInputs) -> _Frozen:
    """Return the block, compiled with its weights as constants, which the compiler may repack."""
    compiled = torch.compile(_Block(inputs).eval(), dynamic=False, options={"freezing": True})
    return _Frozen(inputs.x, compiled, inputs.weight)


def conv_work(case: ConvCase, inputs: ConvInputs) -> tuple[float, float]:
    """Operations of the plain sums and bytes, each tensor read or written once."""
    size = case.size
    channels = size.channels // 2 if size.prepared else size.channels
    flops = 4.0 * KERNEL * size.height * size.width * MIDDLE * (channels + OUT)
    tensors = (inputs.x, *inputs.weights, inputs.weight)
    moved = float(sum(t.nbytes for t in tensors))
    return flops * (3 if case.backward else 1), moved * (2 if case.backward else 1)


EAGER, LAST, COMPILED = "four convolutions", "channels_last", "torch.compile, frozen"
EXACT, ONE_THREAD = "vosops exact", "vosops, one thread"
PEERS = (EAGER, LAST, COMPILED)
_DEEP, _MIDDLE, _LARGE = ConvSize(4096, 15, 27), ConvSize(2048, 30, 54), ConvSize(256, 60, 107)

BENCHMARK = Benchmark(
    op="global_conv",
    variants=(
        Variant("vosops", ours),
        Variant(EAGER, four_convolutions),
        Variant(LAST, four_convolutions, prepare=ConvInputs.channels_last),
        Variant(COMPILED, lambda x, block: block(x), prepare=_frozen, compiles=True, differentiable=False),
        Variant(EXACT, exact, special=True),
        Variant(ONE_THREAD, ours_by_one_thread, special=True),
    ),
    cases=(
        ConvCase("4096x15x27", _DEEP, goals={BEST: 1.9}, only=(*PEERS, EXACT)),
        ConvCase("4096x15x27-prepared", replace(_DEEP, prepared=True), goals={BEST: 3.5}, only=PEERS),
        ConvCase("2048x30x54", _MIDDLE, goals={BEST: 1.9}),
        ConvCase("256x60x107", _LARGE, goals={BEST: 1.9}, only=(*PEERS, EXACT)),
        ConvCase("4096x15x27-bfloat16", _DEEP, dtype=torch.bfloat16, goals={BEST: 0.95}),
        ConvCase("256x60x107-bfloat16", _LARGE, dtype=torch.bfloat16, goals={BEST: 0.95}),
        ConvCase("4096x15x27-backward", _DEEP, backward=True, goals={BEST: 1.8}, goal_memory=LESS_THAN_EAGER),
        ConvCase("256x60x107-backward", _LARGE, backward=True, goals={BEST: 1.8}),
        ConvCase(
            "4096x15x27-bfloat16-backward", _DEEP, dtype=torch.bfloat16, backward=True, goals={BEST: 1.2}
        ),
        ConvCase("256x60x107-two-threads", _LARGE, threads=2, only=(EAGER, ONE_THREAD)),
        ConvCase("small", ConvSize(128, 15, 27), only=(EAGER,), quick=True),
    ),
    work=conv_work,
    result="values",
)
