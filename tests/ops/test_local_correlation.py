"""local_correlation: products of two maps at the displacements of a patch, on every backend.

Most inputs are small integers, whose sums are exact: results are those of float64, rounded once. The cases of the
package spatial-correlation-sampler, its check of gradients among them, are here with its own arguments.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import vosops
from tests.effort import leave_out, one_at_a_time
from tests.ops.backends import ALL, CPU, EMULATED, INTERPRETED, load
from vosops.reference.local_correlation import local_correlation as reference
from vosops.reference.local_correlation import local_correlation_core

OPTIONS = ("kernel_size", "patch_size", "stride", "padding", "dilation", "dilation_patch")

# (N,C,H,W), then the options of the correlation of single pixels: patch, stride, padding, dilation_patch
CASES = {
    "one pixel": ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    "the pixel alone": ((2, 3, 3, 5), (1, 1), (1, 1), (0, 0), (1, 1)),
    "a window": ((2, 5, 6, 7), (5, 5), (1, 1), (0, 0), (1, 1)),
    "several tiles": ((1, 9, 9, 71), (3, 3), (1, 1), (0, 0), (1, 1)),
    "many channels": ((1, 41, 3, 4), (3, 3), (1, 1), (0, 0), (1, 1)),
    "even patches": ((1, 4, 7, 8), (2, 4), (1, 1), (0, 0), (1, 1)),
    "a patch larger than the image": ((1, 2, 4, 3), (11, 13), (1, 1), (0, 0), (1, 1)),
    "more displacements than a tile": ((1, 2, 5, 6), (17, 19), (1, 1), (0, 0), (1, 1)),
    "displacements apart": ((2, 3, 7, 11), (5, 5), (1, 1), (0, 0), (3, 2)),
    "displacements beyond the image": ((1, 2, 3, 4), (3, 3), (1, 1), (0, 0), (6, 7)),
    "padding": ((1, 3, 4, 5), (3, 3), (1, 1), (2, 3), (1, 1)),
    "a stride": ((2, 3, 7, 9), (3, 5), (2, 3), (0, 0), (1, 1)),
    "a stride and padding": ((1, 3, 6, 35), (5, 5), (2, 2), (1, 3), (1, 1)),
    "a stride and displacements apart": ((1, 3, 9, 10), (5, 7), (2, 3), (1, 2), (2, 2)),
    "a stride with a common divisor": ((1, 2, 13, 15), (5, 4), (4, 6), (3, 5), (6, 4)),
    "a stride that passes the image over": ((1, 2, 1, 2), (3, 3), (3, 4), (1, 1), (1, 1)),
    "small": ((2, 3, 4, 5), (3, 3), (1, 2), (1, 0), (2, 1)),
}
PIECES = ("local_correlation", "local_correlation_query", "local_correlation_key")


@pytest.fixture
def backend(request):
    """The backend; skips where its library has no kernels of local correlation."""
    backend = load(request.param)
    name, key = f"local_correlation{backend.suffix}", "CUDA" if backend.device == "cuda" else "CPU"
    exists = hasattr(getattr(torch.ops, backend.namespace), name)
    if not exists or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{backend.namespace}::{name}", key):
        pytest.skip(f"{backend} has no kernels of local_correlation")
    return backend


EVERY_BACKEND = pytest.mark.parametrize("backend", ALL, ids=str, indirect=True)
EVERY_BACKEND_AND_DTYPE = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, dtype) for b in ALL for dtype in b.dtypes],
    ids=lambda value: str(value).removeprefix("torch."),
    indirect=["backend"],
)
EVERY_PIECE = pytest.mark.parametrize("piece", PIECES)


def integers(shape, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randint(-3, 4, shape).to(device, dtype)


def expected(piece: str, first: Tensor, second: Tensor, *options) -> Tensor:
    """What a piece gives, in float64, by the reference alone: its gradients are autograd's."""
    first, second = (t.detach().cpu().double() for t in (first, second))
    if piece == "local_correlation":
        return local_correlation_core(first, second, *options)
    leaf = torch.zeros_like(second, requires_grad=True)
    maps = (leaf, second) if piece == "local_correlation_query" else (second, leaf)
    return torch.autograd.grad(local_correlation_core(*maps, *options), leaf, first)[0]


def problem(piece: str, case: str, dtype=torch.float32, device="cpu") -> tuple:
    """Two maps, or a gradient and a map, and the options."""
    shape, *options = CASES[case]
    options = [list(option) for option in options]
    second = integers(shape, dtype, device)
    first = integers(shape, dtype, device)
    if piece != "local_correlation":
        out = local_correlation_core(first.cpu().float(), second.cpu().float(), *options)
        first = integers(out.shape, dtype, device)
    return first, second, *options


# ---- The reference itself, against the definition.


def by_definition(q: Tensor, k: Tensor, kernel, patch, stride, padding, dilation, dilation_patch) -> Tensor:
    n, _, height, width = q.shape
    sizes = [
        (side + 2 * p - (size - 1) * d - 1) // s + 1
        for side, p, size, d, s in zip((height, width), padding, kernel, dilation, stride, strict=True)
    ]
    out = torch.zeros(n, *patch, *sizes, dtype=q.dtype)
    for p, r, y, x in itertools.product(*map(range, (*patch, *sizes))):
        for i, j in itertools.product(*map(range, kernel)):
            u = y * stride[0] - padding[0] + i * dilation[0]
            v = x * stride[1] - padding[1] + j * dilation[1]
            w = u + (p - (patch[0] - 1) // 2) * dilation_patch[0]
            z = v + (r - (patch[1] - 1) // 2) * dilation_patch[1]
            if min(u, v, w, z) >= 0 and max(u, w) < height and max(v, z) < width:
                out[:, p, r, y, x] += (q[:, :, u, v] * k[:, :, w, z]).sum(1)
    return out


# kernel_size, patch_size, stride, padding, dilation, dilation_patch
DEFINED = [
    ((1, 1), (3, 3), (1, 1), (0, 0), (1, 1), (1, 1)),
    ((3, 2), (2, 3), (2, 1), (1, 2), (1, 2), (2, 1)),
    ((2, 3), (3, 4), (3, 2), (0, 3), (2, 3), (1, 3)),
    ((3, 1), (3, 1), (2, 3), (1, 0), (1, 1), (5, 1)),
]


@pytest.mark.parametrize("options", DEFINED, ids=str)
def test_the_reference_is_the_definition(options):
    query, key = integers((2, 2, 5, 6), torch.float64), integers((2, 2, 5, 6), torch.float64)
    want = by_definition(query, key, *options)
    assert torch.equal(reference(query, key, **dict(zip(OPTIONS, options, strict=True))), want)


# ---- The pieces on every backend.


@EVERY_BACKEND_AND_DTYPE
@EVERY_PIECE
@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_float64(backend, dtype, piece, case):
    if backend in (EMULATED, INTERPRETED):  # dtypes differ in loads and stores alone
        one_at_a_time((dtype, torch.float32), (case, "small"))
    first, second, *options = problem(piece, case, dtype, backend.device)
    got = backend.op(piece)(first, second, *options)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got.cpu(), expected(piece, first, second, *options).to(dtype))


def slices(tensor: Tensor) -> Tensor:
    room = torch.full([2 * size + 1 for size in tensor.shape], torch.nan).to(tensor)
    return room[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)


LAYOUTS = {
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "rows and columns exchanged": lambda t: t.mT.contiguous().mT,
    "slices amid NaN": slices,
    "one element for all": lambda t: t[:1].expand_as(t),
}


@EVERY_BACKEND
@EVERY_PIECE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_stride_is_read(backend, piece, layout):
    first, second, *options = problem(piece, "small", device=backend.device)
    for maps in ((LAYOUTS[layout](first), second), (first, LAYOUTS[layout](second))):
        want = backend.op(piece)(*(t.contiguous() for t in maps), *options)
        assert torch.equal(backend.op(piece)(*maps, *options), want)


@EVERY_BACKEND
@EVERY_PIECE
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_touches_only_its_products(backend, piece, bad):
    """Neither what lies outside the image nor what no displacement leads to is multiplied by it."""
    first, second, *options = problem(piece, "a window", device=backend.device)
    touched = torch.zeros_like(second)
    touched[1, :, 0, 1] = 1
    reached = expected(piece, torch.ones_like(first), touched, *options).bool()
    second = second.abs() + 1
    want = backend.op(piece)(first, second, *options)
    second[1, :, 0, 1] = bad
    got = backend.op(piece)(first, second, *options)
    assert torch.equal(
        torch.where(reached.to(got.device), 0, got), torch.where(reached.to(got.device), 0, want)
    )


@EVERY_BACKEND
@pytest.mark.parametrize("piece", PIECES[1:])
def test_a_gradient_of_what_does_not_exist_is_ignored(backend, piece):
    grad, second, *options = problem(piece, "a stride and padding", device=backend.device)
    ones = torch.ones(second.shape, device="cpu")
    exists = local_correlation_core(ones, ones, *options).to(grad.device) > 0
    spoiled = grad.masked_fill(~exists, torch.nan)
    assert exists.any() and spoiled.isnan().any()
    assert torch.equal(
        backend.op(piece)(spoiled, second, *options), backend.op(piece)(grad, second, *options)
    )


@EVERY_BACKEND
@EVERY_PIECE
@pytest.mark.parametrize("empty", [0, 1, 2, 3])
def test_nothing_gives_nothing(backend, piece, empty):
    shape = [2, 3, 4, 5]
    shape[empty] = 0
    maps = torch.ones(shape, device=backend.device)
    first = maps if piece == "local_correlation" else torch.ones(shape[0], 3, 3, *shape[2:]).to(maps)
    got = backend.op(piece)(first, maps, [3, 3], [1, 1], [0, 0], [1, 1])
    assert got.shape == ((shape[0], 3, 3, *shape[2:]) if piece == "local_correlation" else maps.shape)
    assert got.eq(0).all()


@EVERY_BACKEND
@EVERY_PIECE
def test_derivatives_are_the_other_pieces(backend, piece):
    if backend.namespace != "vosops":
        pytest.skip("the emulated namespace has no derivatives")
    first, second, *options = problem(piece, "small", device=backend.device)
    leaves = [t.requires_grad_() for t in (first, second)]
    out = backend.op(piece)(*leaves, *options)
    cotangent = integers(out.shape, device=out.device)
    grads = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
    seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    for leaf in leaves:  # a sum of products: its gradient at a leaf does not contain the leaf
        others = [t.detach() for t in leaves]
        place = next(i for i, t in enumerate(leaves) if t is leaf)
        probe = torch.zeros_like(leaf, requires_grad=True)
        others[place] = probe
        linear = (backend.op(piece)(*others, *options) * cotangent).sum()
        assert torch.equal(torch.autograd.grad(linear, probe)[0], grads[place].detach())
    torch.testing.assert_close(
        sum((g * t).sum() for g, t in zip(seconds, leaves, strict=True)),
        2 * sum(g.square().sum() for g in grads),  # Euler: the squares are of degree 2 in both together
    )


@EVERY_BACKEND
@EVERY_PIECE
def test_registration(backend, piece):
    if backend.namespace != "vosops":
        pytest.skip("the emulated namespace has no derivatives")
    leave_out(backend is INTERPRETED and piece != PIECES[0], "one helper registers all three")
    first, second, *options = problem(piece, "small", device=backend.device)
    torch.library.opcheck(backend.op(piece), (first.requires_grad_(), second.requires_grad_(), *options))


@EVERY_BACKEND
def test_other_dtypes_are_refused(backend):
    maps = torch.zeros(1, 2, 3, 3, dtype=torch.int32 if backend is CPU else torch.float64).to(backend.device)
    options = [1, 1], [1, 1], [0, 0], [1, 1]
    with pytest.raises((RuntimeError, TypeError), match="dtype|float32"):
        backend.op("local_correlation")(maps, maps, *options)
    grad = torch.zeros(1, 1, 1, 3, 3).to(backend.device)
    with pytest.raises((RuntimeError, TypeError), match="dtype|float32"):
        backend.op("local_correlation_query")(grad, maps.half(), *options)


# ---- The op.


@pytest.fixture(params=["cpp", "reference"])
def served(request):
    if request.param == "cpp" and not load(CPU):
        pytest.skip("the CPU library is not built")
    with vosops.use_backend(request.param):
        yield request.param


# The original's: its defaults, FlowNetC's, each option by itself, and those that its check of gradients takes.
ORIGINAL = [
    {},
    {"patch_size": 21, "dilation_patch": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "patch_size": 3, "stride": 2, "padding": 1, "dilation": 2, "dilation_patch": 2},
    {"kernel_size": 3, "patch_size": 3, "stride": 2, "padding": 1, "dilation_patch": 2},
    {"kernel_size": 5, "patch_size": (3, 4), "stride": (1, 3), "padding": (5, 2), "dilation": (2, 1)},
    {"kernel_size": 2, "patch_size": 3, "stride": 4, "dilation": 6},
    {"kernel_size": (1, 3), "patch_size": 2, "stride": 2},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", ORIGINAL, ids=str)
def test_the_reference_agrees(served, options, dtype):
    query, key = integers((2, 3, 10, 10), dtype), integers((2, 3, 10, 10), dtype)
    got = vosops.local_correlation(query, key, **options)
    want = reference(query.double(), key.double(), **options)
    assert got.dtype == dtype and got.shape == want.shape
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("options", ORIGINAL[2:], ids=str)
def test_gradients_as_the_original_checks_them(served, options):
    shape = (1, 2, 8, 9) if options.get("dilation") == 6 else (1, 1, 5, 6)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda q, k: vosops.local_correlation(q, k, **options), inputs)


def test_second_derivatives(served):
    inputs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(q, k):
        return vosops.local_correlation(q, k, kernel_size=2, patch_size=3, stride=2, padding=1)

    assert torch.autograd.gradgradcheck(function, inputs, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_half_precision_are_rounded_once(served, dtype):
    """Also those over a kernel: 2 C k^2 products of which each sum of a pixel would lose its last bits."""
    query, key = torch.randn(2, 1, 33, 9, 9).to(dtype)
    got = vosops.local_correlation(query, key, kernel_size=3, patch_size=3)
    want = reference(query.double(), key.double(), kernel_size=3, patch_size=3)
    assert (got.double() - want).abs().max() <= 0.6 * torch.finfo(dtype).eps * want.abs().max()


def test_a_pixel_finds_where_it_went():
    """A map moved by (2, -1) has its largest product at that displacement, position (patch - 1) / 2 + the move."""
    query = torch.nn.functional.normalize(torch.randn(1, 32, 12, 14), dim=1)
    key = query.roll((2, -1), (2, 3))
    out = vosops.local_correlation(query, key, patch_size=7)[0, :, :, 3:-3, 3:-3]
    assert out.flatten(0, 1).argmax(0).eq(5 * 7 + 2).all()


def test_autocast_sums_in_float32():
    query, key = torch.randn(2, 1, 8, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = vosops.local_correlation(query, key.bfloat16(), patch_size=3)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, vosops.local_correlation(query, key.bfloat16().float(), patch_size=3))


@pytest.mark.parametrize(
    "options", [{"patch_size": 3}, {"patch_size": 3, "kernel_size": 3, "stride": 2}], ids=str
)
def test_compile_of_any_size_without_a_break(options):
    def function(q, k):
        return vosops.local_correlation(q, k, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 6), (7, 4)):
        query, key = torch.randn(2, 1, 3, *size)
        torch.testing.assert_close(compiled(query, key), function(query, key))


def test_vmap_folds_into_the_batch():
    query, key = torch.randn(2, 3, 2, 4, 5, 6)

    def function(q, k):
        return vosops.local_correlation(q, k, patch_size=3, kernel_size=2)

    one_by_one = [function(q, k) for q, k in zip(query, key, strict=True)]
    torch.testing.assert_close(torch.vmap(function)(query, key), torch.stack(one_by_one))


def test_forward_mode_is_refused():
    x = torch.randn(1, 2, 3, 3)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="local_correlation"),
    ):
        vosops.local_correlation(torch.autograd.forward_ad.make_dual(x, x), x)


def test_two_calls_agree_bit_by_bit(deterministic):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        leaves = [torch.randn(1, 9, 9, 40, requires_grad=True) for _ in range(2)]
        out = vosops.local_correlation(*leaves, patch_size=5)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
