"""What is checked: small problems of every op in every arithmetic, and who has to solve them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

import vosops
from vosops import _library, _verdicts
from vosops.benchmarking import gpu_cases
from vosops.benchmarking.cases import Case
from vosops.benchmarking.fresh import python_path
from vosops.benchmarking.gpu_convolutions import GlobalConvSize, LstmSize
from vosops.benchmarking.local_attention import AttentionSize
from vosops.benchmarking.local_correlation import CorrelationSize
from vosops.benchmarking.memory_read import MemorySize
from vosops.ops._registration import HAS_TRITON, TRITON_INTERPRETED

Problem = gpu_cases.Cell

MATCHINGS = (
    Problem("local_matching", Case("window 20x27", 20, 27, objects=3, radius=6), "ieee"),
    Problem("global_matching", Case("20x27", 20, 27, objects=3), "ieee"),
)
READS = (
    Problem("memory_read", MemorySize("dot", 150, 3, 2, 72, 130), "ieee"),
    Problem("memory_read", MemorySize("XMem", 150, 2, 1, 64, 96, anisotropic=True), "ieee"),
    Problem("memory_read", MemorySize("top 30", 150, 3, 1, 64, 96, top_k=30), "ieee"),
)
OTHERS = (
    Problem("global_conv", GlobalConvSize("70x9x17", 70, 9, 17, False, 36, 40, 7, 1), "ieee"),
    Problem("conv_lstm", LstmSize("34x13x19", 34, 13, 19, 2, 1), "ieee"),
    Problem("local_attention", AttentionSize("13x19", 13, 19, 48, 2, 4, 1), "ieee"),
    Problem("local_correlation", CorrelationSize("13x35", 13, 35, 34, 9, 1, 2), "ieee"),
)
TILES = (
    Problem("memory_read", MemorySize("tiles", 200, 3, 2, 72, 132), "ieee"),
    Problem("memory_read", MemorySize("tiles of rows", 200, 3, 2, 72, 256, channel_last=True), "ieee"),
)
"""Reads in the two layouts that tensor descriptors copy, of several tiles and a part of one."""

SIZES: tuple[Problem, ...] = (*gpu_cases.SMALL, *MATCHINGS, *READS, *OTHERS)
"""One problem of each op with tails in every dimension, and one that fills several tiles."""

OF_DESCRIPTORS: tuple[Problem, ...] = tuple(
    replace(size, mode=mode) for mode in ("bf16", "f16") for size in TILES
)
"""What the kernel of `Candidate.variant` "descriptors" has to solve."""

PROBLEMS: tuple[Problem, ...] = (
    *(
        replace(size, mode=mode, backward=backward)
        for backward in (False, True)
        for mode in gpu_cases.MODES
        for size in SIZES
    ),
    *OF_DESCRIPTORS,
)
"""Every size in every arithmetic, forward first."""


def quick_problems() -> tuple[Problem, ...]:
    """Return the smallest problem of each op alone."""
    small = {cell.size.name for cell in gpu_cases.SMALL}
    return tuple(problem for problem in PROBLEMS if problem.size.name in small)


@dataclass(frozen=True)
class Candidate:
    """An implementation on a device.

    Attributes:
        name: for people: "C++ avx2", "Triton".
        backend: as `vosops.use_backend` takes it.
        device: where it computes.
        environment: what its process needs.
        stored: whether its verdicts are those of the library that `import vosops` loads here.
        reason_not: why it cannot run here at all; "" if it may.
        variant: a kernel that serves the backend's calls only where it was found right: "descriptors"; "" otherwise.
    """

    name: str
    backend: str
    device: str
    environment: Mapping[str, str] = field(default_factory=dict)
    stored: bool = True
    reason_not: str = ""
    variant: str = ""

    @property
    def implementation(self) -> str:
        """Under which its verdicts are stored."""
        return f"{self.backend} {self.variant}".strip()

    def solves(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return those of the problems that are its to solve."""
        return [problem for problem in problems if not self.variant or problem in OF_DESCRIPTORS]


def candidates(device: torch.device) -> list[Candidate]:
    """Return all implementations for a device, those that cannot run here with the reason."""
    place = str(device)
    if device.type == "cpu":
        found = [
            Candidate(
                f"C++ {capability}",
                "cpp",
                place,
                {"VOSOPS_CPU_CAPABILITY": capability},
                stored=capability == _library.CPU_CAPABILITY,
            )
            for capability in _library.runnable_capabilities()
        ]
        if not found:
            found = [Candidate("C++", "cpp", place, reason_not="; ".join(_library.CPU_REASONS))]
        if TRITON_INTERPRETED and HAS_TRITON:
            found.append(Candidate("Triton (interpreted)", "triton", place, {"TRITON_INTERPRET": "1"}))
        return found
    cuda = Candidate("CUDA C++", "cpp", place, reason_not="; ".join(_library.CUDA_REASONS))
    lacking = "" if HAS_TRITON else "triton is not installed"
    lacking = "TRITON_INTERPRET=1 is set" if TRITON_INTERPRETED else lacking
    described = {_verdicts.DESCRIPTORS: "1"}
    return [
        cuda,
        Candidate("Triton", "triton", place, reason_not=lacking),
        Candidate(
            "Triton, descriptors",
            "triton",
            place,
            described,
            reason_not=lacking or _lacks_descriptors(device),
            variant="descriptors",
        ),
    ]


def _lacks_descriptors(device: torch.device) -> str:
    """Return why Triton's kernels do not read by tensor descriptors on a GPU, "" if they may."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    from vosops.triton import memory_descriptors
    from vosops.triton._common import target_of

    products = target_of(torch.empty(0, device=device)).architecture.products
    return "" if products in memory_descriptors.PRODUCTS else f"it multiplies by {products}"


def devices() -> list[torch.device]:
    """Return the CPU and every GPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(gpus))]


def of_ops(problems: Sequence[Problem], ops: Sequence[str]) -> list[Problem]:
    """Return the problems of some ops; ValueError for an unknown op."""
    unknown = [op for op in ops if op not in vosops.list_ops()]
    if unknown:
        raise ValueError(f"op must be one of {', '.join(vosops.list_ops())}, got {unknown[0]!r}")
    return [problem for problem in problems if not ops or problem.op in ops]


def entry_of(problem: Problem) -> str:
    """Return the key under which the verdicts of a problem's arithmetic and direction are stored."""
    mode = gpu_cases.MODES[problem.mode]
    known = _verdicts.mode_of(mode.dtype, mode.precision)
    assert known is not None
    return _verdicts.entry(known, problem.backward)


def base_environment() -> dict[str, str]:
    """Return the environment of every process: one thread on a CPU, nothing that earlier checks stored."""
    chosen = ("VOSOPS_BACKEND", _verdicts.DESCRIPTORS)
    environment = {k: v for k, v in os.environ.items() if k not in chosen}
    own = {"OMP_NUM_THREADS": "1", "VOSOPS_CACHE": os.devnull, "PYTHONPATH": python_path()}
    return {**environment, **own}
