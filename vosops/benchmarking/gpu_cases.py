"""What is measured on a GPU: sizes, arithmetic, and the contenders of each op, vosops' implementations first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import vosops
from vosops.benchmarking.cases import Case, Inputs, Variant
from vosops.benchmarking.global_matching import pixels
from vosops.benchmarking.gpu_convolutions import (
    ConvolutionSize,
    Formulation,
    GlobalConvSize,
    LstmSize,
    call,
    channels_last,
)
from vosops.benchmarking.gpu_peers import NATTEN, NATTEN_DIFFERS, is_missing, natten, read_peers
from vosops.benchmarking.local_attention import SIZE_480P, SIZE_1080P, AttentionSize
from vosops.benchmarking.local_correlation import SIZE_480P as CORRELATION_480P
from vosops.benchmarking.local_correlation import SIZE_480P_WIDE as CORRELATION_480P_WIDE
from vosops.benchmarking.local_correlation import SIZE_AOT as CORRELATION_AOT
from vosops.benchmarking.local_correlation import CorrelationSize
from vosops.benchmarking.local_matching import normalise
from vosops.benchmarking.memory_read import (
    MemoryInputs,
    MemorySize,
    bag_read,
    flex_read,
    memory_work,
    naive_read,
    read_by,
)
from vosops.benchmarking.runner import BENCHMARKS

IMPLEMENTATIONS = ("cpp", "triton")

WindowSize = AttentionSize | CorrelationSize


@dataclass(frozen=True)
class Mode:
    """An arithmetic: the tensors' dtype and, for float32, what its products may be rounded to."""

    dtype: torch.dtype
    precision: str | None = None

    @property
    def tf32(self) -> bool:
        """Whether other packages may use TF32."""
        return self.precision == "tf32"


MODES: Mapping[str, Mode] = {
    "ieee": Mode(torch.float32, "ieee"),
    "tf32": Mode(torch.float32, "tf32"),
    "tf32x3": Mode(torch.float32, "tf32x3"),
    "bf16": Mode(torch.bfloat16),
    "f16": Mode(torch.float16),
}


@dataclass(frozen=True)
class Cell:
    """One op at one size in one arithmetic, forward or forward and backward.

    With `compiled` vosops meets torch.compile alone: its first calls take long.
    """

    op: str
    size: Case | MemorySize | WindowSize | ConvolutionSize
    mode: str
    backward: bool = False
    compiled: bool = False

    @property
    def key(self) -> str:
        """Names it within a run."""
        direction = "forward+backward" if self.backward else "forward"
        return "/".join([self.op, self.size.name, self.mode, direction, *["compiled"] * self.compiled])

    @property
    def title(self) -> str:
        """What it is, for people."""
        size = self.size
        if isinstance(size, Case):
            size = replace(size, dtype=MODES[self.mode].dtype, backward=self.backward)
            return f"{size.title}, {self.mode}"
        return f"{size.title}, {self.mode}, {'forward + backward' if self.backward else 'forward'}"


LOCAL_480P = Case("480p", 120, 214, objects=1, radius=15)
LOCAL_1080P = Case(
    "1080p", 270, 480, objects=3, radius=15, left_out={"unfold": "needs 50 GB for the unfolded windows alone"}
)
LOCAL_TRAINING = Case("training", 60, 107, objects=3, radius=12)
GLOBAL_480P = Case("480p", 120, 214, objects=3)
GLOBAL_TRAINING = Case("training", 60, 107, objects=3)
READ_5 = MemorySize("480p-5-frames", 1620, 5)
READ_20 = MemorySize("480p-20-frames", 1620, 20)
READ_64 = MemorySize("480p-20-frames-64-channels", 1620, 20, key_channels=64)
READ_1080P = MemorySize("1080p-5-frames", 8160, 5)
READ_OBJECTS = MemorySize("480p-5-frames-3-objects", 1620, 5, objects=3)
READ_TOP = MemorySize("480p-20-frames-top-30", 1620, 20, key_channels=64, top_k=30, anisotropic=True)
READ_TRAINING = MemorySize("training", 576, 3, objects=3, key_channels=64, batch=4)
CONV_RGMP = GlobalConvSize("4096x15x27", 4096, 15, 27)
CONV_PREPARED = GlobalConvSize("4096x15x27-prepared", 4096, 15, 27, prepared=True)
CONV_STRIDE_16 = GlobalConvSize("2048x30x54", 2048, 30, 54)
CONV_STRIDE_8 = GlobalConvSize("256x60x107", 256, 60, 107)
LSTM_64 = LstmSize("64x60x107", 64, 60, 107)
LSTM_128 = LstmSize("128x30x54", 128, 30, 54)
LSTM_256 = LstmSize("256x30x54", 256, 30, 54)
LSTM_TRAINING = LstmSize("128x30x54-4-frames", 128, 30, 54, frames=4)

TELLING: tuple[Any, ...] = (
    LOCAL_480P,
    GLOBAL_480P,
    READ_5,
    READ_TOP,
    CONV_RGMP,
    LSTM_128,
    SIZE_480P,
    CORRELATION_480P,
    LOCAL_TRAINING,
)
TELLING += (GLOBAL_TRAINING, READ_TRAINING, LSTM_TRAINING)
"""The sizes that say most of each op."""


def _cells() -> tuple[Cell, ...]:
    """Return everything that is timed, the most telling first."""

    def modes(
        op: str,
        size: Case | MemorySize | WindowSize | ConvolutionSize,
        names: str,
        backward: bool = False,
    ) -> list[Cell]:
        return [Cell(op, size, mode, backward) for mode in names.split()]

    local, over_all, read = "local_matching", "global_matching", "memory_read"
    conv, lstm, attention = "global_conv", "conv_lstm", "local_attention"
    correlation = "local_correlation"
    first = [
        *modes(local, LOCAL_480P, "bf16 ieee tf32x3 tf32 f16"),
        *modes(over_all, GLOBAL_480P, "bf16 ieee tf32x3 tf32 f16"),
        *modes(read, READ_5, "bf16 ieee tf32 tf32x3 f16"),
        *modes(read, READ_TOP, "bf16 ieee tf32 tf32x3 f16"),
        *modes(conv, CONV_RGMP, "bf16 ieee tf32 tf32x3 f16"),
        *modes(lstm, LSTM_128, "bf16 ieee tf32 tf32x3 f16"),
        *modes(attention, SIZE_480P, "ieee bf16 f16"),
        *modes(correlation, CORRELATION_480P, "ieee bf16 f16"),
        *modes(local, LOCAL_TRAINING, "ieee bf16 tf32 tf32x3 f16", backward=True),
        *modes(over_all, GLOBAL_TRAINING, "ieee bf16 tf32 tf32x3 f16", backward=True),
        *modes(read, READ_TRAINING, "bf16 ieee tf32 tf32x3 f16", backward=True),
        *modes(conv, CONV_RGMP, "bf16 ieee tf32 tf32x3 f16", backward=True),
        *modes(lstm, LSTM_TRAINING, "bf16 ieee tf32 tf32x3 f16", backward=True),
        *modes(attention, SIZE_480P, "ieee bf16 f16", backward=True),
        *modes(correlation, CORRELATION_480P, "ieee bf16 f16", backward=True),
        *modes(conv, CONV_PREPARED, "bf16 ieee"),
        *modes(conv, CONV_STRIDE_16, "bf16 ieee tf32"),
        *modes(conv, CONV_STRIDE_8, "bf16 ieee tf32"),
        *modes(lstm, LSTM_64, "bf16 ieee"),
        *modes(lstm, LSTM_256, "bf16 ieee"),
        *modes(local, LOCAL_1080P, "bf16 ieee"),
        *modes(read, READ_20, "bf16 ieee"),
        *modes(read, READ_64, "bf16"),
        *modes(read, READ_OBJECTS, "bf16"),
        *modes(read, READ_1080P, "bf16"),
        *modes(attention, SIZE_1080P, "ieee bf16"),
        *modes(attention, SIZE_1080P, "ieee", backward=True),
        *modes(correlation, CORRELATION_480P_WIDE, "ieee bf16"),
        *modes(correlation, CORRELATION_AOT, "ieee bf16"),
    ]
    compiled = [
        *modes(local, LOCAL_480P, "ieee"),
        *modes(over_all, GLOBAL_480P, "ieee"),
        *modes(read, READ_5, "bf16 ieee"),
        *modes(local, LOCAL_TRAINING, "ieee", backward=True),
        *modes(over_all, GLOBAL_TRAINING, "ieee", backward=True),
        *modes(read, READ_TRAINING, "bf16", backward=True),
        *modes(conv, CONV_RGMP, "bf16"),
        *modes(lstm, LSTM_128, "bf16"),
        *modes(attention, SIZE_480P, "ieee"),
        *modes(correlation, CORRELATION_AOT, "ieee"),
    ]
    return (*sorted(first, key=_urgency), *(replace(cell, compiled=True) for cell in compiled))


def _urgency(cell: Cell) -> int:
    """Return 0 for what a short run must not miss: bfloat16 of every op, then float32, then both with gradients."""
    telling = cell.size in TELLING
    ranks = {("bf16", False): 0, ("ieee", False): 1, ("bf16", True): 2, ("ieee", True): 3}
    return ranks.get((cell.mode, cell.backward), 4) if telling else 4


CELLS = _cells()

PROFILED = tuple(cell for cell in CELLS if _urgency(cell) < 2 and not cell.compiled)
"""Whose kernels are listed one by one: each op in bfloat16 and float32."""

SMALL = (
    Cell("local_matching", Case("small", 9, 13, objects=2, radius=3), "ieee"),
    Cell("global_matching", Case("small", 9, 13, objects=2), "ieee"),
    Cell("global_conv", GlobalConvSize("small", 20, 5, 9, True, 12, 10, 5, 2), "ieee"),
    Cell("conv_lstm", LstmSize("small", 6, 5, 9, 2, 2), "ieee"),
    Cell("local_attention", AttentionSize("small", 5, 9, 12, 2, 2, 2), "ieee"),
    Cell("local_correlation", CorrelationSize("small", 5, 9, 12, 5, 2, 2), "ieee"),
    Cell("memory_read", MemorySize("small", 35, 3, 2, 24, 40, batch=2, anisotropic=True), "ieee"),
    Cell("memory_read", MemorySize("small-top", 35, 3, 2, 24, 40, batch=2, top_k=7), "ieee"),
)
"""One small size of each op, for checks that are slow or need no more."""

Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Problem:
    """A cell on a device, ready to run.

    Attributes:
        tensors: the inputs; writing into them changes what the contenders of vosops read.
        oracle: the results in float32 on the CPU: the output, and with backward the gradients.
        contenders: by name; each call gives what the oracle gives.
        left_out: those who cannot run, and why.
        flops: useful operations.
        moved: bytes that must be read or written.
        differs: of contenders that compute something near, what: they are timed, and not compared.
    """

    tensors: tuple[Tensor, ...]
    oracle: Call
    contenders: dict[str, Call]
    left_out: dict[str, str]
    flops: float
    moved: float
    differs: dict[str, str] = field(default_factory=dict)


def problem(cell: Cell, device: torch.device) -> Problem:
    """Return the inputs and contenders of a cell."""
    if isinstance(cell.size, Case):
        return _matching(cell, cell.size, device)
    if isinstance(cell.size, MemorySize):
        return _memory(cell, cell.size, device)
    return _formulated(cell, cell.size, device)


def implementation(name: str) -> str:
    """Return the contender that an implementation of vosops is."""
    return f"vosops {name}"


def our_matching(op: str, backend: str | None, precision: str | None) -> Variant:
    """Return a matching by one implementation of vosops, or by the chosen one."""

    def formulation(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
        window = {"radius": radius} if radius else {}
        with vosops.use_backend(backend):
            result: Tensor = getattr(vosops, op)(query, key, mask, precision=precision, **window)
        return result

    return Variant(implementation(backend or "chosen"), formulation)


def our_read(
    backend: str | None, precision: str | None, anisotropic: bool
) -> Callable[[MemoryInputs], Tensor]:
    """Return a memory read by one implementation of vosops, or by the chosen one."""

    def read(given: MemoryInputs) -> Tensor:
        xmem = {"shrinkage": given.shrinkage, "selection": given.selection, "similarity": "l2"}
        options: dict[str, Any] = xmem if anisotropic else {}
        with vosops.use_backend(backend):
            result: Tensor = vosops.memory_read(
                given.query, given.key, given.value, top_k=given.top_k, precision=precision, **options
            )
        return result

    return read


def our_formulation(
    size: WindowSize | ConvolutionSize, backend: str | None, precision: str | None
) -> Formulation:
    """Return a convolution or an op on windows by one implementation of vosops, or by the chosen one."""
    formulation = size.ours(precision)

    def run(*given: Tensor) -> Tensor:
        with vosops.use_backend(backend):
            return formulation(*given)

    return run


def our_call(cell: Cell, device: torch.device, backend: str | None, wide: bool = False) -> Call:
    """Return one implementation of vosops on a cell's inputs, the same numbers on every device.

    wide: the inputs, rounded to the cell's dtype, in float64: what an oracle computes with.
    """
    mode = MODES[cell.mode]
    precision = None if wide else mode.precision

    def widened(tensor: Tensor) -> Tensor:
        return tensor.double() if wide and tensor.is_floating_point() else tensor

    if isinstance(cell.size, Case):
        inputs = Inputs.of(replace(cell.size, dtype=mode.dtype, backward=cell.backward), device)
        inputs = replace(
            inputs, query=widened(inputs.query), key=widened(inputs.key), weight=widened(inputs.weight)
        )
        return our_matching(cell.op, backend, precision).call(inputs, cell.backward)
    if isinstance(cell.size, MemorySize):
        given = MemoryInputs.of(cell.size, mode.dtype, device)
        names = ("query", "key", "value", "shrinkage", "selection", "weight")
        tensors = {name: getattr(given, name) for name in names}
        wider: dict[str, Any] = {name: None if t is None else widened(t) for name, t in tensors.items()}
        read = our_read(backend, precision, cell.size.anisotropic)
        return replace(given, **wider).call(read, cell.backward)
    maps = [widened(t) for t in cell.size.tensors(mode.dtype, device)]
    formulation = our_formulation(cell.size, backend, precision)
    return call(formulation, maps, cell.size.differentiated, cell.backward)


def _matching(cell: Cell, size: Case, device: torch.device) -> Problem:
    mode, benchmark = MODES[cell.mode], BENCHMARKS[cell.op]
    case = replace(size, dtype=mode.dtype, backward=cell.backward)
    inputs = Inputs.of(case, device)

    others = [v for v in benchmark.contenders(size)[1:] if v.gpu and v.compiles == cell.compiled]
    if cell.op == "global_matching" and not cell.compiled:
        others.append(Variant("faiss GPU", faiss_gpu, differentiable=False, package="faiss"))
    left_out = dict(size.left_out)
    contenders = {
        implementation(b): our_matching(cell.op, b, mode.precision).call(inputs, cell.backward)
        for b in IMPLEMENTATIONS
    }
    for variant in others:
        if cell.backward and not variant.differentiable:
            left_out[variant.name] = "has no gradients"
        elif variant.package is not None and is_missing(variant.package):
            left_out[variant.name] = f"{variant.package} is not installed"
        else:
            contenders[variant.name] = variant.call(inputs, cell.backward)
    on_cpu = Inputs.of(case, torch.device("cpu")).in_float32()
    oracle = our_matching(cell.op, None, None).call(on_cpu, cell.backward)
    flops, moved = benchmark.work(case, inputs)
    return Problem((inputs.query, inputs.key), oracle, contenders, left_out, flops, moved)


def faiss_gpu(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """faiss' brute-force search on the GPU, one for each object."""
    import faiss
    import faiss.contrib.torch_utils

    if not hasattr(faiss, "StandardGpuResources"):
        raise RuntimeError("this faiss was built without GPU support")
    resources = faiss.StandardGpuResources()
    q, reference = pixels(query.float()).contiguous(), pixels(key.float())
    nearest = [
        faiss.knn_gpu(resources, q, reference[chosen].contiguous(), 1)[0][:, 0]
        for chosen in mask[0].flatten(1)
    ]
    return normalise(torch.stack(nearest).view(mask.shape))


# ---- The memory read.


def attention_read(backend: SDPBackend, split: bool) -> Callable[[MemoryInputs], Tensor]:
    """scaled_dot_product_attention by one backend, on position-major inputs.

    Split, the values become heads as wide as the key, because most kernels want equal widths; the scores are then
    computed anew for each.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value)

    return read_by(attention, split)


SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _memory(cell: Cell, size: MemorySize, device: torch.device) -> Problem:
    mode = MODES[cell.mode]
    inputs = MemoryInputs.of(size, mode.dtype, device)
    left_out: dict[str, str] = {}

    contenders = {
        implementation(name): inputs.call(our_read(name, mode.precision, size.anisotropic), cell.backward)
        for name in IMPLEMENTATIONS
    }
    if cell.compiled:
        contenders["torch.compile"] = inputs.call(torch.compile(naive_read, dynamic=False), cell.backward)
        if not (size.anisotropic or size.top_k):
            contenders["FlexAttention"] = inputs.position_major().call(flex_read(), cell.backward)
    elif size.top_k:
        contenders["STCN"] = inputs.call(naive_read, cell.backward)
        contenders["embedding_bag"] = inputs.call(bag_read, cell.backward)
    else:
        contenders["naive"] = inputs.call(naive_read, cell.backward)
        if not size.anisotropic:
            laid_out = inputs.position_major()
            for name, backend in SDPA.items():
                contenders[f"SDPA {name}"] = laid_out.call(attention_read(backend, False), cell.backward)
                if backend is not SDPBackend.MATH and size.value_channels % size.key_channels == 0:
                    split = laid_out.call(attention_read(backend, True), cell.backward)
                    contenders[f"SDPA {name}, values split"] = split
            for peer in read_peers(size, mode.dtype, cell.backward):
                if peer.reason_not:
                    left_out[peer.name] = peer.reason_not
                else:
                    read = read_by(peer.attention, peer.split)
                    contenders[peer.name] = laid_out.call(read, cell.backward)
    on_cpu = MemoryInputs.of(size, mode.dtype, torch.device("cpu"))
    upcast = (
        None if t is None else t.float() for t in (on_cpu.query, on_cpu.key, on_cpu.value, on_cpu.selection)
    )
    query, key, value, selection = upcast
    assert query is not None and key is not None and value is not None
    on_cpu = replace(
        on_cpu, query=query, key=key, value=value, selection=selection, weight=on_cpu.weight.float()
    )
    oracle = on_cpu.call(our_read(None, None, size.anisotropic), cell.backward)
    flops, moved = memory_work(size, inputs, cell.backward)
    return Problem((inputs.query, inputs.key, inputs.value), oracle, contenders, left_out, flops, moved)


# ---- Convolutions, windowed attention and correlation.


def _formulated(cell: Cell, size: WindowSize | ConvolutionSize, device: torch.device) -> Problem:
    """vosops beside the size's other formulations, each in both memory formats."""
    mode = MODES[cell.mode]
    tensors, count = size.tensors(mode.dtype, device), size.differentiated
    last = channels_last(tensors)

    ours = {name: our_formulation(size, name, mode.precision) for name in IMPLEMENTATIONS}
    contenders = {
        implementation(name): call(ours[name], tensors, count, cell.backward) for name in IMPLEMENTATIONS
    }
    if cell.compiled:
        first = next(iter(size.peers.values()))
        others: dict[str, Formulation] = {"torch.compile": torch.compile(first, dynamic=False)}
    else:
        for name in IMPLEMENTATIONS:
            contenders[f"{implementation(name)}, channels_last"] = call(
                ours[name], last, count, cell.backward
            )
        others = size.peers
    for name, formulation in others.items():
        contenders[name] = call(formulation, tensors, count, cell.backward)
        contenders[f"{name}, channels_last"] = call(formulation, last, count, cell.backward)
    on_cpu = [t.float() for t in size.tensors(mode.dtype, torch.device("cpu"))]
    oracle = call(size.naive, on_cpu, count, cell.backward)
    left_out = dict(size.left_out) if isinstance(size, WindowSize) else {}
    differs = {}
    if isinstance(size, AttentionSize) and not cell.compiled:
        formulation, reason = natten(size)
        if reason:
            left_out[NATTEN] = reason
        else:
            contenders[NATTEN] = call(formulation, last, count, cell.backward)
            differs[NATTEN] = NATTEN_DIFFERS
    work = size.work(mode.dtype.itemsize, cell.backward)
    return Problem(tuple(tensors), oracle, contenders, left_out, *work, differs)
