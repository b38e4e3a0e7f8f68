"""What a benchmark is made of: a case, its inputs, and the contenders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

CHANNELS = 100
"""Channels of FEELVOS' and CFBI's embeddings."""

EMBEDDING_RANGE = 0.25
"""Embeddings are in [0, this), so that tanh(d / 2) still distinguishes distances."""


BEST = "the best other"
"""In a case's goals: whichever contender of other origin is fastest."""

SMALL_SIDE = 8
"""Side of the feature map of a small call."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every case has, whatever its op.

    Attributes:
        name: short, unique within the op.
        backward: time the gradients as well.
        dtype: of the embeddings.
        goals: least speed-up over contenders, by name (or `BEST`): what vosops sets out to reach.
        goal_share: least share of the machine's arithmetic.
        goal_memory: bytes above the inputs to stay below.
        left_out: contenders that this case does without, and why.
        quick: part of a quick run.
        only: contenders to run; empty for all but the special ones.
        threads: threads that the case is about; None leaves that to the run.
    """

    name: str
    backward: bool = False
    dtype: torch.dtype = torch.float32
    goals: Mapping[str, float] = field(default_factory=dict)
    goal_share: float | None = None
    goal_memory: float | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    quick: bool = False
    only: tuple[str, ...] = ()
    threads: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def title(self) -> str:
        """What it is, for people."""
        raise NotImplementedError

    @property
    def run(self) -> list[str]:
        """The end of every title: the dtype, what is computed, and threads if the case is about them."""
        parts = [str(self.dtype).removeprefix("torch."), "forward + backward" if self.backward else "forward"]
        return parts + ([f"{self.threads} threads"] if self.threads else [])

    @property
    def mismatched_share(self) -> float:
        """Share of the output that may differ between two contenders."""
        return 0.0

    def inputs(self, device: torch.device) -> Any:
        """Return the tensors of the case, `Inputs` or the like."""
        raise NotImplementedError

    def small(self) -> Plan:
        """Return the same of few pixels."""
        raise NotImplementedError


@dataclass(frozen=True)
class Case(Plan):
    """One size of a matching.

    Attributes:
        height: of the feature map.
        width: of the feature map.
        objects: how many; together they cover the frame, unless `coverage` is below 1.
        radius: of the window, for local matching.
        coverage: share of the frame that belongs to objects.
    """

    name: str
    height: int
    width: int
    objects: int
    radius: int = 0
    coverage: float = 1.0

    @property
    def title(self) -> str:
        """What it is, for people."""
        parts = [f"{self.height}x{self.width}", f"{self.objects} object{'s' * (self.objects != 1)}"]
        parts += [f"radius {self.radius}"] if self.radius else []
        parts += [f"mask {self.coverage:.0%} of the frame"] if self.coverage < 1 else []
        return ", ".join([*parts, *self.run])

    def inputs(self, device: torch.device) -> Inputs:
        """Return its tensors."""
        return Inputs.of(self, device)

    def small(self) -> Case:
        """Return the same of few pixels."""
        return replace(self, height=SMALL_SIDE, width=SMALL_SIDE, radius=min(self.radius, 1))


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: query, key (1,C,H,W), masks bool (1,O,H,W), and the window's radius."""

    query: Tensor
    key: Tensor
    mask: Tensor
    radius: int
    weight: Tensor
    """(1,O,H,W): what the output's gradient is."""

    @staticmethod
    def of(case: Case, device: torch.device) -> Inputs:
        """Random embeddings and compact objects, the same on every machine."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, CHANNELS, case.height, case.width)
        query, key = (
            (torch.rand(shape, generator=generator) * EMBEDDING_RANGE).to(device, case.dtype)
            for _ in range(2)
        )
        mask = _objects(case).to(device)
        weight = torch.rand(mask.shape, generator=generator).to(device)
        return Inputs(query, key, mask, case.radius, weight)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return self.query, self.key

    @property
    def rest(self) -> tuple[Tensor, int]:
        """What formulations take besides."""
        return self.mask, self.radius

    def in_float32(self) -> Inputs:
        """Return the same embeddings in float32."""
        return replace(self, query=self.query.float(), key=self.key.float())


def _objects(case: Case) -> Tensor:
    """Compact objects (1,O,H,W): vertical bands of equal width, or a disk of the wanted area for each."""
    y, x = torch.meshgrid(torch.arange(case.height), torch.arange(case.width), indexing="ij")
    if case.coverage == 1:
        band = x * case.objects // case.width
        return torch.stack([band == o for o in range(case.objects)])[None]
    area = case.coverage * case.height * case.width / case.objects
    centres = [(o + 0.5) * case.width / case.objects for o in range(case.objects)]
    disks = [(y - case.height / 2) ** 2 + (x - c) ** 2 < area / torch.pi for c in centres]
    return torch.stack(disks)[None]


Formulation = Callable[..., Tensor]
"""An op on `tensors` and `rest` of the inputs; of a matching (query, key, mask, radius) -> distances (1,O,H,W)."""


@dataclass(frozen=True)
class Variant:
    """A contender.

    Attributes:
        name: for people.
        formulation: the code to time, ready to be called (compiled or not).
        differentiable: whether gradients can be asked of it.
        package: the optional package that it needs.
        gpu: whether it runs on a GPU.
        prepare: what is done to the inputs before the clock starts.
        special: runs only in the cases that name it.
        compiles: whether its first call of a size compiles.
    """

    name: str
    formulation: Formulation
    differentiable: bool = True
    package: str | None = None
    gpu: bool = True
    prepare: Callable[[Any], Any] = lambda inputs: inputs
    special: bool = False
    compiles: bool = False

    def call(self, inputs: Any, backward: bool) -> Callable[[], list[Tensor]]:
        """Return the function to time: the output, and with `backward` the gradients of the inputs' tensors as well."""
        prepared = self.prepare(inputs)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [self.formulation(*prepared.tensors, *prepared.rest)]

        def forward_backward() -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in prepared.tensors]
            output = self.formulation(*leaves, *prepared.rest)
            gradients = torch.autograd.grad(output, leaves, prepared.weight)
            return [output.detach(), *gradients]

        return forward_backward if backward else forward


def matching_work(flops: Callable[[Inputs], float]) -> Callable[[Any, Any], tuple[float, float]]:
    """Return the work of a matching with this many forward operations; each tensor is read or written once."""

    def work(case: Case, inputs: Inputs) -> tuple[float, float]:
        operations = flops(inputs)
        embeddings = inputs.query.nbytes + inputs.key.nbytes
        output = 4 * inputs.mask.numel()
        moved = embeddings + inputs.mask.nbytes + output
        if case.backward:
            operations += 4.0 * inputs.query.shape[1] * inputs.mask.numel()
            moved += embeddings * 2 + output
        return operations, moved

    return work


@dataclass(frozen=True)
class Benchmark:
    """An op: its contenders, vosops first, its cases, and how much work a case is."""

    op: str
    variants: tuple[Variant, ...]
    cases: tuple[Plan, ...]
    work: Callable[[Any, Any], tuple[float, float]]
    """(case, inputs) -> operations and bytes without which the case cannot be done."""
    result: str = "distances"
    """What the op's output holds."""

    def case(self, name: str) -> Plan:
        """Return the case of that name; ValueError with the known names if there is none."""
        for case in self.cases:
            if case.name == name:
                return case
        raise ValueError(f"case: expected one of {', '.join(map(str, self.cases))}; got {name!r}")

    def contenders(self, case: Plan) -> list[Variant]:
        """Those who run in a case, vosops first."""
        first, *others = self.variants
        if case.only:
            return [first, *(v for v in others if v.name in case.only)]
        return [first, *(v for v in others if not v.special and v.name not in case.left_out)]

    def our_call(self, case: Plan, device: str) -> Callable[[], list[Tensor]]:
        """Return the call of vosops alone that a case times."""
        return self.variants[0].call(case.inputs(torch.device(device)), case.backward)
