"""Contenders and cases of local_correlation.

The formulations are those in use where the package spatial-correlation-sampler does not build: a shift of whole maps
for each displacement, every window unfolded, and the product of whole rows of which a band is kept; and that package,
where it is installed. They take query and key (N,C,H,W), patch and dilation, and give (N,patch,patch,H,W).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import vosops
from vosops import reference
from vosops.benchmarking.cases import SMALL_SIDE, Benchmark, Formulation, Plan, Variant
from vosops.benchmarking.local_matching import one_thread


@dataclass(frozen=True)
class CorrelationSize:
    """A patch of displacements on a feature map."""

    name: str
    height: int
    width: int
    channels: int = 64
    patch: int = 31
    dilation: int = 1
    batch: int = 1
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Contenders that this size does without, and why."""

    @property
    def title(self) -> str:
        """What it is, for people."""
        parts = [f"{self.height}x{self.width}", f"C={self.channels}", f"patch {self.patch}"]
        parts += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        return ", ".join(parts + ([f"batch {self.batch}"] if self.batch > 1 else []))

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Query and key: random numbers, the same on every machine."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.channels, self.height, self.width)
        scale = self.channels**-0.5  # products of about 1
        return [(torch.randn(shape, generator=generator) * scale**0.5).to(device, dtype) for _ in range(2)]

    @property
    def differentiated(self) -> int:
        """How many of the tensors, from the first on, a backward pass differentiates."""
        return 2

    @property
    def peers(self) -> dict[str, Formulation]:
        """Other contenders, the one that torch.compile takes first."""
        return {name: self._sized(PEERS[name]) for name in PEERS if name not in self.left_out}

    def ours(self, precision: str | None) -> Formulation:
        """By vosops; sums are always those of float32 products: `precision` changes nothing."""
        return self._sized(ours)

    @property
    def naive(self) -> Formulation:
        """By PyTorch's operators, a shift at a time."""
        return self._sized(shifts)

    def _sized(self, formulation: Formulation) -> Formulation:
        return partial(formulation, patch=self.patch, dilation=self.dilation)

    @property
    def products(self) -> int:
        """Of pixels that both exist."""
        reach = self.patch // 2 * self.dilation
        displacements = range(-reach, reach + 1, self.dilation)
        y, x = (sum(max(0, side - abs(d)) for d in displacements) for side in (self.height, self.width))
        return self.batch * y * x

    def work(self, itemsize: int, backward: bool) -> tuple[float, float]:
        """Return the operations and bytes without which it cannot be done."""
        maps = 2 * self.batch * self.channels * self.height * self.width
        outputs = self.batch * self.patch**2 * self.height * self.width
        passes = 3 if backward else 1
        return 2.0 * self.products * self.channels * passes, float(maps + outputs) * itemsize * (
            2 if backward else 1
        )


@dataclass(frozen=True)
class CorrelationCase(Plan):
    """One size, and what is aimed at."""

    name: str
    size: CorrelationSize

    @property
    def title(self) -> str:
        """What it is, for people."""
        return ", ".join([self.size.title, *self.run])

    def inputs(self, device: torch.device) -> CorrelationInputs:
        """Return its tensors."""
        query, key = self.size.tensors(self.dtype, device)
        shape = (self.size.batch, self.size.patch, self.size.patch, self.size.height, self.size.width)
        weight = (
            torch.randn(shape, generator=torch.Generator().manual_seed(1))
            if self.backward
            else torch.zeros(1)
        )
        return CorrelationInputs(query, key, self.size, weight.to(query))

    def small(self) -> CorrelationCase:
        """Return the same of few pixels."""
        return replace(self, size=replace(self.size, height=SMALL_SIDE, width=SMALL_SIDE, patch=3))


@dataclass(frozen=True)
class CorrelationInputs:
    """The tensors of a case."""

    query: Tensor
    key: Tensor
    size: CorrelationSize
    weight: Tensor
    """(N,patch,patch,H,W): what the output's gradient is; nothing where no case asks for one."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return self.query, self.key

    @property
    def rest(self) -> tuple[int, int]:
        """What formulations take besides."""
        return self.size.patch, self.size.dilation


def ours(query: Tensor, key: Tensor, patch: int, dilation: int) -> Tensor:
    """By vosops."""
    return vosops.local_correlation(query, key, patch_size=patch, dilation_patch=dilation)


def shifts(query: Tensor, key: Tensor, patch: int, dilation: int) -> Tensor:
    """Products of whole maps, a shift for each displacement."""
    return reference.local_correlation(query, key, patch_size=patch, dilation_patch=dilation)


def unfold(query: Tensor, key: Tensor, patch: int, dilation: int) -> Tensor:
    """Every window of the key, copied."""
    n, c, h, w = query.shape
    reach = patch // 2 * dilation
    windows = functional.unfold(functional.pad(key, [reach] * 4), patch, dilation=dilation)
    products = torch.einsum("nchw,nckhw->nkhw", query, windows.view(n, c, patch * patch, h, w))
    result: Tensor = products.unflatten(1, (patch, patch))
    return result


def rows(query: Tensor, key: Tensor, patch: int, dilation: int) -> Tensor:
    """Each row times a whole row of the key, for each displacement in y; a band of the products is kept."""
    n, _, h, w = query.shape
    reach = patch // 2 * dilation
    own = query.permute(0, 2, 3, 1)
    others = functional.pad(key, [reach] * 4).permute(0, 2, 1, 3)
    bands = []
    for i in range(0, patch * dilation, dilation):
        products = own @ others[:, i : i + h]
        along = products.stride()
        band = products.as_strided((n, patch, h, w), (along[0], dilation, along[1], along[2] + 1))
        bands.append(band)
    return torch.stack(bands, 1)


def original(query: Tensor, key: Tensor, patch: int, dilation: int) -> Tensor:
    """By the package spatial-correlation-sampler."""
    package = importlib.import_module("spatial_correlation_sampler")
    result: Tensor = package.spatial_correlation_sample(query, key, patch_size=patch, dilation_patch=dilation)
    return result


def _one_thread(query: Tensor, key: Tensor, patch: int, dilation: int) -> Tensor:
    with one_thread():
        return ours(query, key, patch, dilation)


def correlation_work(case: CorrelationCase, inputs: CorrelationInputs) -> tuple[float, float]:
    """Return the operations and bytes of a case."""
    return case.size.work(inputs.query.itemsize, case.backward)


PEERS = {"shifts": shifts, "row-wise matmul": rows, "unfold": unfold}
"""Contenders by name."""

ONE_THREAD, ORIGINAL = "vosops, one thread", "spatial-correlation-sampler"
LEFT_OUT_480P = {"unfold": "needs 6.3 GB for the windows of the key alone, or more"}
LEFT_OUT_HALF = {**LEFT_OUT_480P, ORIGINAL: "has no half precision on the CPU"}
LEFT_OUT_BACKWARD = {**LEFT_OUT_480P, ORIGINAL: "takes minutes"}
SIZE_480P = CorrelationSize("480p", 120, 214, left_out=LEFT_OUT_480P)
SIZE_480P_WIDE = replace(SIZE_480P, name="480p-256", channels=256)
SIZE_AOT = CorrelationSize("AOT", 31, 54, channels=32, patch=15, batch=8)
LEFT_OUT_FLOWNET = {"unfold": "needs 1.4 GB for the windows of the key alone"}
SIZE_FLOWNET = CorrelationSize(
    "FlowNetC", 48, 64, channels=256, patch=21, dilation=2, left_out=LEFT_OUT_FLOWNET
)

BENCHMARK = Benchmark(
    op="local_correlation",
    variants=(
        Variant("vosops", ours),
        *(Variant(name, formulation) for name, formulation in PEERS.items()),
        Variant(ORIGINAL, original, package="spatial_correlation_sampler_backend"),
        Variant(ONE_THREAD, _one_thread, special=True),
    ),
    cases=(
        CorrelationCase(
            "480p", SIZE_480P, quick=True, goals={"row-wise matmul": 3, ORIGINAL: 100}, left_out=LEFT_OUT_480P
        ),
        CorrelationCase("480p-256", SIZE_480P_WIDE, goals={"row-wise matmul": 3}, left_out=LEFT_OUT_480P),
        CorrelationCase("AOT", SIZE_AOT, quick=True, goals={"row-wise matmul": 2}),
        CorrelationCase("FlowNetC", SIZE_FLOWNET, goals={"row-wise matmul": 2}, left_out=LEFT_OUT_FLOWNET),
        CorrelationCase(
            "training", SIZE_480P, backward=True, goals={"row-wise matmul": 2}, left_out=LEFT_OUT_BACKWARD
        ),
        CorrelationCase("480p-bfloat16", SIZE_480P, dtype=torch.bfloat16, left_out=LEFT_OUT_HALF),
        CorrelationCase(
            "480p-two-threads", SIZE_480P, threads=2, goals={ONE_THREAD: 1.5}, only=(ONE_THREAD,)
        ),
    ),
    work=correlation_work,
    result="products",
)
