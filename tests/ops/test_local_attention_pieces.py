"""The three linear pieces of local attention, dot, weigh and spread, on every backend: any shape, stride and dtype.

Their inputs are small integers, whose sums are exact: results are those of float64, rounded once. At the end the op
that is made of them, which test_local_attention.py specifies, on every backend's device.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vosops
from tests.ops.backends import ALL, CPU, load
from vosops import reference
from vosops.reference.local_attention import (
    local_attention_dot_core,
    local_attention_spread_core,
    local_attention_weigh_core,
)

CORES = {
    "dot": local_attention_dot_core,
    "weigh": local_attention_weigh_core,
    "spread": local_attention_spread_core,
}
HALF = (torch.float16, torch.bfloat16)

# (N,C,H,W), reach, dilation
CASES = {
    "one pixel": ((1, 1, 1, 1), 0, 1),
    "the pixel alone": ((2, 3, 3, 5), 0, 1),
    "a batch": ((2, 5, 6, 7), 2, 1),
    "several tiles": ((1, 9, 9, 71), 1, 1),
    "many channels": ((1, 41, 3, 4), 1, 1),
    "a window larger than the image": ((1, 2, 4, 3), 5, 1),
    "more offsets than a tile": ((1, 2, 5, 6), 8, 1),
    "phases of the dilation": ((2, 3, 7, 11), 2, 3),
    "steps beyond the image": ((1, 2, 3, 4), 1, 6),
    "small": ((2, 3, 4, 5), 1, 2),
}


@pytest.fixture
def backend(request):
    """The backend; skips where its library has no kernels of local attention."""
    backend = load(request.param)
    name, key = f"local_attention_dot{backend.suffix}", "CUDA" if backend.device == "cuda" else "CPU"
    exists = hasattr(getattr(torch.ops, backend.namespace), name)
    if not exists or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{backend.namespace}::{name}", key):
        pytest.skip(f"{backend} has no kernels of local_attention")
    return backend


EVERY_BACKEND = pytest.mark.parametrize("backend", ALL, ids=str, indirect=True)
EVERY_BACKEND_AND_DTYPE = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, dtype) for b in ALL for dtype in b.dtypes if b is not CPU or dtype not in HALF],
    ids=lambda value: str(value).removeprefix("torch."),
    indirect=["backend"],
)
EVERY_PIECE = pytest.mark.parametrize("piece", CORES)


def problem(piece: str, case: str, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, int, int]:
    """Weights or a map, a map, reach and dilation."""
    shape, reach, dilation = CASES[case]
    first = shape if piece == "dot" else (shape[0], (2 * reach + 1) ** 2, *shape[2:])
    tensors = [torch.randint(-3, 4, size).to(device, dtype) for size in (first, shape)]
    if piece != "dot":
        tensors[0] = tensors[0].to(torch.promote_types(dtype, torch.float32))
    return *tensors, reach, dilation


def run(backend, piece: str, *arguments) -> Tensor:
    return backend.op(f"local_attention_{piece}")(*arguments)


@EVERY_BACKEND_AND_DTYPE
@EVERY_PIECE
@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_float64(backend, dtype, piece, case):
    first, second, *window = problem(piece, case, dtype, backend.device)
    got = run(backend, piece, first, second, *window)
    want = CORES[piece](first.cpu().double(), second.cpu().double(), *window)
    assert got.dtype == (torch.promote_types(dtype, torch.float32) if piece == "dot" else dtype)
    assert got.is_contiguous() and torch.equal(got.cpu(), want.to(got.dtype))


def slices(tensor: Tensor) -> Tensor:
    room = torch.full([2 * size + 1 for size in tensor.shape], torch.nan).to(tensor)
    return room[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "rows and columns exchanged": lambda t: t.mT.contiguous().mT,
    "slices amid NaN": slices,
}


@EVERY_BACKEND
@EVERY_PIECE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_stride_is_read(backend, piece, layout):
    first, second, *window = problem(piece, "small", device=backend.device)
    want = run(backend, piece, first, second, *window)
    for case in ((LAYOUTS[layout](first), second), (first, LAYOUTS[layout](second))):
        assert torch.equal(run(backend, piece, *case, *window), want)
    repeated = first[:1].expand_as(first)
    assert torch.equal(
        run(backend, piece, repeated, second, *window),
        run(backend, piece, repeated.contiguous(), second, *window),
    )


@EVERY_BACKEND
@EVERY_PIECE
def test_nan_stays_in_its_window(backend, piece):
    first, second, *window = problem(piece, "a batch", device=backend.device)
    second[1, 0, 3, 3] = torch.nan
    bad = run(backend, piece, first, second, *window).isnan().any(1)
    expected = torch.zeros_like(bad)
    expected[1, 1:6, 1:6] = True
    assert torch.equal(bad, expected)


@EVERY_BACKEND
@EVERY_PIECE
@pytest.mark.parametrize("empty", [0, 1, 2, 3])
def test_nothing_gives_nothing(backend, piece, empty):
    shape = [2, 3, 4, 5]
    shape[empty] = 0
    second = torch.ones(shape, device=backend.device)
    first = second if piece == "dot" else torch.ones(shape[0], 9, *shape[2:], device=backend.device)
    got = run(backend, piece, first, second, 1, 1)
    assert got.shape == (shape[0], 9 if piece == "dot" else shape[1], *shape[2:])
    assert got.eq(0).all()


@EVERY_BACKEND
@EVERY_PIECE
def test_derivatives_are_the_other_pieces(backend, piece):
    if backend.namespace != "vosops":
        pytest.skip("the emulated namespace has no derivatives")
    first, second, *window = problem(piece, "small", device=backend.device)
    gradients = []
    for function in (backend.op(f"local_attention_{piece}"), CORES[piece]):
        leaves = [t.clone().requires_grad_() for t in (first, second)]
        out = function(*leaves, *window)
        cotangent = torch.arange(out.numel(), device=out.device).view(out.shape).remainder(5).to(out)
        grads = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
        seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        gradients.append([g.detach() for g in (*grads, *seconds)])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@EVERY_BACKEND
@EVERY_PIECE
def test_two_calls_agree_bit_by_bit(backend, piece):
    shape, reach, dilation = CASES["several tiles"]
    offsets = shape[1] if piece == "dot" else (2 * reach + 1) ** 2
    first = torch.randn(shape[0], offsets, *shape[2:], device=backend.device)
    arguments = (first, torch.randn(shape, device=backend.device), reach, dilation)
    assert torch.equal(run(backend, piece, *arguments), run(backend, piece, *arguments))


@EVERY_BACKEND
def test_other_dtypes_are_refused(backend):
    maps, weights = torch.zeros(1, 2, 3, 3), torch.zeros(1, 9, 3, 3)
    wrong = torch.int32 if backend is CPU else torch.float64
    for piece, first, second in (
        ("dot", maps.to(wrong), maps.to(wrong)),
        ("weigh", weights, maps.to(wrong)),
        ("spread", weights.half(), maps),
    ):
        with pytest.raises((RuntimeError, TypeError), match="dtype|float32"):
            run(backend, piece, first.to(backend.device), second.to(backend.device), 1, 1)


# ---- The op on every backend.


@pytest.fixture
def forced(backend):
    """The backend, which then serves all calls of the op."""
    if backend.namespace != "vosops":
        pytest.skip("no call of the op reaches the emulated namespace")
    with vosops.use_backend("triton" if backend.suffix else "cpp"):
        yield backend


@EVERY_BACKEND_AND_DTYPE
@pytest.mark.parametrize("relative", [False, True])
def test_the_op_and_its_gradients(forced, dtype, relative):
    """Values of half precision are read as they are unless something is added to them."""
    maps = [torch.randn(1, c, 4, 5).to(forced.device, dtype) for c in (8, 8, 6)]
    options = {"bias": torch.randn(2, 9)} | ({"relative_value": torch.randn(2, 3, 9)} if relative else {})
    results = []
    for function, wider in ((vosops.local_attention, dtype), (reference.local_attention, torch.float64)):
        leaves = [t.to(wider).detach().requires_grad_() for t in maps]
        given = {name: t.to(forced.device, wider) for name, t in options.items()}
        out, weights = function(*leaves, radius=1, heads=2, return_weights=True, **given)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        assert out.dtype == wider and weights.dtype == torch.promote_types(wider, torch.float32)
        results.append([t.detach().double() for t in (out, weights, *grads)])
    rounding = {torch.bfloat16: 4e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * max(1, theirs.abs().max().item()))


@EVERY_BACKEND
@EVERY_PIECE
def test_registration(forced, piece):
    first, second, *window = problem(piece, "small", device=forced.device)
    arguments = (first.requires_grad_(), second.requires_grad_(), *window)
    torch.library.opcheck(forced.op(f"local_attention_{piece}"), arguments)


@EVERY_BACKEND
def test_compile_and_vmap(forced):
    q, k, v = (torch.randn(2, 1, 4, 3, 4, device=forced.device) for _ in range(3))

    def function(q, k, v):
        return vosops.local_attention(q, k, v, radius=1, heads=2)

    one_by_one = torch.stack([function(*maps) for maps in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(q, k, v), one_by_one)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q[0], k[0], v[0]), one_by_one[0])
