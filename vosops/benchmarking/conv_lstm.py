"""Contenders and cases of conv_lstm.

The peers are the cell as people write it: the input and the state concatenated, one convolution for all gates, five
element-wise functions; the same in channels_last memory; and compiled, with the weights frozen where no gradient is
wanted. They take x (N,T,C,H,W), the weight, the bias, and the first state or zeros, and give every hidden state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vosops
from vosops.benchmarking.cases import BEST, SMALL_SIDE, Benchmark, Plan, Variant
from vosops.benchmarking.local_matching import MB, one_thread

FORGET_BIAS = 1.0
GATES, TAPS = 4, 9
TILE_PRODUCTS = 36 / (16 * TAPS)
"""Multiplications of Winograd's F(4x4,3x3), of those of the direct convolution."""

HALF_OF_EAGER = 44.9 * MB
"""Half the peak of the eager formulation in training (89.8 MB)."""


@dataclass(frozen=True)
class LstmCase(Plan):
    """`steps` steps of a layer with as many hidden as input channels; one step starts from a given state."""

    name: str
    channels: int
    height: int
    width: int
    steps: int = 1

    @property
    def title(self) -> str:
        """What it is, for people."""
        parts = [f"C={self.channels}, {self.height}x{self.width}"]
        parts += ["one step" if self.steps == 1 else f"{self.steps} steps"]
        return ", ".join([*parts, *self.run])

    def inputs(self, device: torch.device) -> LstmInputs:
        """Return its tensors."""
        return LstmInputs.of(self, device)

    def small(self) -> LstmCase:
        """Return the same of few pixels."""
        return replace(self, height=SMALL_SIDE, width=SMALL_SIDE)


@dataclass(frozen=True)
class LstmInputs:
    """The tensors of a case."""

    x: Tensor
    kernel: Tensor
    bias: Tensor
    state: tuple[Tensor, Tensor] | None
    weight: Tensor
    """(N,T,C,H,W): what the output's gradient is."""
    step: Callable[..., tuple[Tensor, Tensor]] | None = None
    """A compiled step that holds the weights: (x, h, c) -> (h, c)."""

    @staticmethod
    def of(case: LstmCase, device: torch.device) -> LstmInputs:
        """Return random numbers, the same on every machine."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, case.dtype)

        c, plane = case.channels, (case.height, case.width)
        frames = (1, case.steps, c, *plane)
        state = (normal(1, c, *plane), normal(1, c, *plane)) if case.steps == 1 else None
        kernel = normal(GATES * c, 2 * c, 3, 3) / (2 * c * TAPS) ** 0.5
        return LstmInputs(normal(*frames), kernel, normal(GATES * c), state, normal(*frames))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return self.x, self.kernel, self.bias

    @property
    def rest(self) -> tuple[LstmInputs]:
        """What formulations take besides."""
        return (self,)

    def channels_last(self) -> LstmInputs:
        """Return the same in channels_last memory."""

        def last(t: Tensor) -> Tensor:
            return t.contiguous(memory_format=torch.channels_last)

        x, weight = (torch.stack([last(frame) for frame in t.unbind(1)], 1) for t in (self.x, self.weight))
        state = None if self.state is None else (last(self.state[0]), last(self.state[1]))
        return replace(self, x=x, kernel=last(self.kernel), state=state, weight=weight)

    def frozen(self) -> LstmInputs:
        """Return the same with a step that is compiled for these weights."""
        compiled: Any = torch.compile(
            _Step(self.kernel, self.bias), options={"freezing": True}, dynamic=False
        )
        return replace(self, step=compiled)


class _Step(nn.Module):
    """A step with its weights, which the compiler may freeze."""

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(kernel), nn.Parameter(bias)
        self.eval()

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return eager_step(x, self.kernel, self.bias, h, c)


def eager_step(x: Tensor, kernel: Tensor, bias: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step as people write it."""
    i, f, g, o = F.conv2d(torch.cat([x, h], 1), kernel, bias, padding=1).chunk(GATES, 1)
    c = torch.sigmoid(f + FORGET_BIAS) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def eager(x: Tensor, kernel: Tensor, bias: Tensor, inputs: LstmInputs) -> Tensor:
    """Return the sequence, step by step."""
    h, c = inputs.state if inputs.state is not None else (torch.zeros_like(x[:, 0]),) * 2
    outputs = []
    for frame in x.unbind(1):
        h, c = eager_step(frame, kernel, bias, h, c) if inputs.step is None else inputs.step(frame, h, c)
        outputs.append(h)
    return torch.stack(outputs, 1)


@functools.cache
def _compiled() -> Any:
    return torch.compile(eager_step, dynamic=False)


def compiled(x: Tensor, kernel: Tensor, bias: Tensor, inputs: LstmInputs) -> Tensor:
    """Return the same with a compiled step, which has gradients."""
    step = functools.partial(_with_weights, kernel, bias)
    return eager(x, kernel, bias, replace(inputs, step=step))


def _with_weights(kernel: Tensor, bias: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _compiled()(x, kernel, bias, h, c)
    return result


def _ours(precision: str | None) -> Callable[..., Tensor]:
    def formulation(x: Tensor, kernel: Tensor, bias: Tensor, inputs: LstmInputs) -> Tensor:
        return vosops.conv_lstm(x, kernel, bias, inputs.state, forget_bias=FORGET_BIAS, precision=precision)[
            0
        ]

    return formulation


def lstm_work(case: LstmCase, inputs: LstmInputs) -> tuple[float, float]:
    """Operations and bytes without which the steps cannot be done: the products of F(4x4,3x3) in float32, those of
    the direct convolution in other dtypes; each tensor read or written once.
    """
    pixels = inputs.x.shape[1] * case.height * case.width
    products = 2.0 * pixels * inputs.kernel.numel()
    if case.dtype == torch.float32:
        products *= TILE_PRODUCTS
    moved = 2 * inputs.x.nbytes + inputs.kernel.nbytes
    return products * (3 if case.backward else 1), moved * (2 if case.backward else 1)


EAGER, CHANNELS_LAST, EXACT = "eager", "channels_last", "vosops exact"
FROZEN, COMPILE, ONE_THREAD = "torch.compile, frozen", "torch.compile", "vosops, one thread"
PEERS = (EAGER, CHANNELS_LAST, FROZEN, EXACT)


def _one_thread(x: Tensor, kernel: Tensor, bias: Tensor, inputs: LstmInputs) -> Tensor:
    with one_thread():
        return _ours(None)(x, kernel, bias, inputs)


BENCHMARK = Benchmark(
    op="conv_lstm",
    variants=(
        Variant("vosops", _ours(None)),
        Variant(EAGER, eager, special=True),
        Variant(CHANNELS_LAST, eager, prepare=LstmInputs.channels_last, special=True),
        Variant(
            FROZEN,
            eager,
            prepare=LstmInputs.frozen,
            compiles=True,
            differentiable=False,
            gpu=False,
            special=True,
        ),
        Variant(COMPILE, compiled, compiles=True, special=True),
        Variant(EXACT, _ours("exact"), special=True),
        Variant(ONE_THREAD, _one_thread, special=True),
    ),
    cases=(
        LstmCase("64-60x107", 64, 60, 107, only=PEERS, goals={BEST: 1.5}),
        LstmCase("128-30x54", 128, 30, 54, only=PEERS, goals={BEST: 1.9}),
        LstmCase("256-30x54", 256, 30, 54, only=PEERS, goals={BEST: 2.2}),
        LstmCase("128-30x54-4-steps", 128, 30, 54, 4, only=(EAGER, CHANNELS_LAST, FROZEN)),
        LstmCase(
            "training",
            128,
            30,
            54,
            4,
            backward=True,
            only=(EAGER, CHANNELS_LAST, COMPILE, EXACT),
            goals={EAGER: 1.5},
            goal_memory=HALF_OF_EAGER,
        ),
        LstmCase(
            "training-bfloat16",
            128,
            30,
            54,
            4,
            dtype=torch.bfloat16,
            backward=True,
            only=(EAGER, CHANNELS_LAST, COMPILE, EXACT),
        ),
        LstmCase(
            "128-30x54-bfloat16",
            128,
            30,
            54,
            dtype=torch.bfloat16,
            only=(EAGER, CHANNELS_LAST, FROZEN),
            goals={EAGER: 0.95},
        ),
        LstmCase(
            "128-30x54-two-threads",
            128,
            30,
            54,
            threads=2,
            only=(ONE_THREAD,),
            goals={ONE_THREAD: 1.7},
        ),
    ),
    work=lstm_work,
    result="hidden states",
)
