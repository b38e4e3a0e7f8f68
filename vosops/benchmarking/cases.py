"""What a benchmark is made of: a case, its inputs, and the contenders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

CHANNELS = 100
"""Channels of FEELVOS' and CFBI's embeddings."""

EMBEDDING_RANGE = 0.25
"""Embeddings lie in [0, this): distances then fall where tanh(d / 2) still tells them apart."""


@dataclass(frozen=True)
class Case:
    """One size of one op.

    Attributes:
        name: short, unique within the op.
        height: of the feature map.
        width: of the feature map.
        objects: how many; together they cover the frame, unless `coverage` is below 1.
        radius: of the window, for local matching.
        backward: time the gradients of query and key as well.
        dtype: of the embeddings.
        coverage: share of the frame that belongs to objects.
        goals: least speed-up over contenders, by name: what vosops sets out to reach.
        goal_share: least share of the machine's arithmetic.
        goal_memory: bytes above the inputs to stay below.
        left_out: contenders that this case does without, and why.
        quick: part of a quick run.
        only: contenders to run; empty for all but the special ones.
        threads: threads that the case is about; None leaves that to the run.
    """

    name: str
    height: int
    width: int
    objects: int
    radius: int = 0
    backward: bool = False
    dtype: torch.dtype = torch.float32
    coverage: float = 1.0
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
        parts = [f"{self.height}x{self.width}", f"{self.objects} object{'s' * (self.objects != 1)}"]
        parts += [f"radius {self.radius}"] if self.radius else []
        parts += [f"mask {self.coverage:.0%} of the frame"] if self.coverage < 1 else []
        parts += [str(self.dtype).removeprefix("torch.")]
        parts += ["forward + backward" if self.backward else "forward"]
        parts += [f"{self.threads} threads"] if self.threads else []
        return ", ".join(parts)


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

    def in_float32(self) -> Inputs:
        """The same embeddings in float32."""
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


Formulation = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(query, key, mask, radius) -> normalised distances (1,O,H,W)."""


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
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    special: bool = False
    compiles: bool = False

    def call(self, inputs: Inputs, backward: bool) -> Callable[[], list[Tensor]]:
        """The function to time: the distances, and with `backward` the gradients of query and key as well."""
        prepared = self.prepare(inputs)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [self.formulation(prepared.query, prepared.key, prepared.mask, prepared.radius)]

        def forward_backward() -> list[Tensor]:
            query, key = (t.detach().requires_grad_() for t in (prepared.query, prepared.key))
            output = self.formulation(query, key, prepared.mask, prepared.radius)
            gradients = torch.autograd.grad(output, (query, key), prepared.weight)
            return [output.detach(), *gradients]

        return forward_backward if backward else forward


@dataclass(frozen=True)
class Benchmark:
    """An op: its contenders, vosops first, its cases, and how much work a case is."""

    op: str
    variants: tuple[Variant, ...]
    cases: tuple[Case, ...]
    flops: Callable[[Inputs], float]
    """Useful operations of a forward call."""

    def case(self, name: str) -> Case:
        """The case of that name; ValueError with the names there are."""
        for case in self.cases:
            if case.name == name:
                return case
        raise ValueError(f"case: expected one of {', '.join(map(str, self.cases))}; got {name!r}")

    def contenders(self, case: Case) -> list[Variant]:
        """Those who run in a case, vosops first."""
        first, *others = self.variants
        if case.only:
            return [first, *(v for v in others if v.name in case.only)]
        return [first, *(v for v in others if not v.special and v.name not in case.left_out)]

    def our_call(self, case: Case, device: str) -> Callable[[], list[Tensor]]:
        """The call of vosops alone that a case times."""
        return self.variants[0].call(Inputs.of(case, torch.device(device)), case.backward)
