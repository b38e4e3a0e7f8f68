"""The memory read: what it computes, for every option, dtype, layout and order of derivative."""

import collections
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import vosops
from tests.effort import examples, leave_out, one_at_a_time
from tests.ops.backends import EVERY_BACKEND, EVERY_BACKEND_AND_DTYPE, INTERPRETED, load
from tests.ops.matching import LAYOUTS
from vosops import reference
from vosops.reference.memory_read import (
    memory_gather_core,
    memory_read_core,
    memory_scores,
    memory_select_core,
    memory_usage_core,
)

LIBRARY = pytest.mark.skipif(
    not hasattr(torch.ops.vosops, "memory_read"), reason="the CPU library was not compiled"
)
OPTIONS = ("dot", "l2", "l2 shrinkage", "l2 selection", "l2 shrinkage selection", "dot bias valid shrinkage")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SINGLE_AND_HALF = (torch.float32, torch.bfloat16, torch.float16)
CORE_OPS = (
    "read",
    "read without vectors",
    "read_list",
    "read_backward",
    "usage",
    "select",
    "gather",
    "gather_backward",
)

pytestmark = LIBRARY


@pytest.fixture
def backend(request):
    backend = load(request.param)
    name, key = f"memory_read{backend.suffix}", "CUDA" if backend.device == "cuda" else "CPU"
    exists = hasattr(getattr(torch.ops, backend.namespace), name)
    if not exists or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{backend.namespace}::{name}", key):
        pytest.skip(f"{backend} has no kernels of memory_read yet")
    return backend


@pytest.fixture(params=["cpp", "reference"])
def implementation(request):
    with vosops.use_backend(request.param):
        yield request.param


def make(option="dot", *, n=1, o=None, c=8, v=5, q=(3, 5), m=(2, 3, 4), dtype=torch.float32, seed=0):
    """Arguments of a read: query, key, value, and the options named in `option`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    lead = (n, v) if o is None else (n, o, v)
    tensors = [t.to(dtype) for t in (random(n, c, *q), random(n, c, *m), random(*lead, *m))]
    options = {"similarity": option.split()[0]}
    if "shrinkage" in option:
        options["shrinkage"] = (1 + random(n, 1, *m).square()).to(dtype)
    if "selection" in option:
        options["selection"] = random(n, c, *q).sigmoid().to(dtype)
    if "bias" in option:
        options["bias"] = random(n, *m).to(dtype)
    if "valid" in option:
        options["valid"] = random(n, *m) > -0.5
    return tensors, options


def in_float64(tensors, options):
    """The same problem in float64."""
    wide = {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in options.items()
    }
    return [t.double() for t in tensors], wide


def assert_reads_like_reference(tensors, options, tolerance=None, **more):
    ours = vosops.memory_read(*tensors, **options, **more, return_usage=True, return_lse=True)
    wide, wide_options = in_float64(tensors, options)
    theirs = reference.memory_read(*wide, **wide_options, **more, return_usage=True, return_lse=True)
    assert ours[0].dtype == tensors[2].dtype
    tolerance = tolerance or TOLERANCE[tensors[2].dtype]
    for name, a, b in zip(("out", "usage", "lse"), ours, theirs, strict=True):
        assert a.shape == b.shape, name
        scale = max(1.0, b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0)
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- The core of every backend: (N,C,P), (N,C,M), (N,O,Cv,M) and the vectors of the scores.

# N, O, C, Cv, P, M; which of the scores' vectors there are; "squares": the query meets the key and its squares.
CORE_CASES = {
    "plain": (1, 1, 16, 8, 20, 50, ""),
    "objects": (2, 3, 9, 5, 33, 70, "shrinkage key_bias"),
    "anisotropic": (2, 2, 8, 6, 18, 45, "squares shrinkage query_bias"),
    "one of everything": (1, 1, 1, 1, 1, 1, "key_bias query_bias"),
    "one query": (1, 2, 5, 3, 1, 130, "shrinkage"),
    "many columns": (1, 2, 12, 300, 5, 36, ""),
    "many channels": (1, 1, 330, 4, 9, 40, "key_bias"),
    "many positions": (1, 1, 20, 10, 70, 390, "key_bias"),
}
CORE_TOLERANCE = {**TOLERANCE, torch.float32: 1e-5}
VECTORS = ("shrinkage", "query_bias", "key_bias")
SCALE = 0.3


def core_problem(case, dtype, device="cpu"):
    """query, key, value, and the vectors by name (None where the case has none)."""
    n, o, c, v, p, m, parts = CORE_CASES[case]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query, key, value = torch.randn(n, c, p), torch.randn(n, c, m), torch.randn(n, o, v, m)
    query = query.to(dtype)
    if "squares" in parts:
        chosen = torch.rand(n, c, p)
        query = torch.cat([2 * chosen * query, -chosen], 1).to(wide)
    vectors = {
        "shrinkage": 1 + torch.rand(n, m),
        "query_bias": torch.randn(n, p),
        "key_bias": torch.randn(n, m).masked_fill(torch.rand(n, m) < 0.2, -torch.inf),
    }
    if m == 1:
        vectors["key_bias"].fill_(0.5)
    given = {name: vectors[name].to(wide).to(device) if name in parts else None for name in VECTORS}
    return query.to(device), key.to(dtype).to(device), value.to(dtype).to(device), given


def wide_core(*tensors):
    """The same tensors in float64 on the CPU."""
    return [None if t is None else t.detach().cpu().double() for t in tensors]


def laid_out(tensor, layout):
    """A copy of (..., C, pixels) in one of several memory layouts."""
    if layout == "slice":
        room = torch.full([2 * size + 1 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
        return room.to(tensor.device)[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.mT.contiguous().mT if layout == "transposed" else tensor.contiguous()


def assert_near(got, want, tolerance, name):
    scale = max(1.0, want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0)
    torch.testing.assert_close(
        got.cpu().double(), want, rtol=0, atol=tolerance * scale, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def assert_selects(score, index, scores, top_k, tolerance=1e-5):
    """The greatest of the scores (N,M,P) in order, each with its position; -inf and -1 where there are fewer."""
    score, index = score.cpu().double(), index.cpu()
    count = (scores > -torch.inf).sum(1, keepdim=True).clamp(max=top_k)
    found = torch.arange(top_k)[None, :, None] < count
    assert torch.equal(index >= 0, found) and torch.equal(score > -torch.inf, found)
    assert (score[:, 1:] <= score[:, :-1]).all()
    for column in index.movedim(1, 2).flatten(0, 1):
        assert column[column >= 0].unique().numel() == (column >= 0).sum()
    if found.any():
        tolerance *= max(1.0, scores[scores.isfinite()].abs().max().item())
        padded = torch.nn.functional.pad(scores, (0, 0, 0, top_k), value=-torch.inf)
        best = padded.sort(dim=1, descending=True).values[:, :top_k]
        chosen = padded.gather(1, index.clamp(min=0))
        assert (score - chosen)[found].abs().max() <= tolerance
        assert (score - best)[found].abs().max() <= tolerance


@EVERY_BACKEND_AND_DTYPE
@pytest.mark.parametrize("case", CORE_CASES)
def test_core_read_usage_and_gradients(backend, dtype, case):
    leave_out(
        backend is INTERPRETED and dtype == torch.float16 and case != "objects",
        "the interpreter differs between float16 and bfloat16 in how values are loaded alone",
    )
    query, key, value, vectors = core_problem(case, dtype, backend.device)
    tensors = (query, key, value, *vectors.values())
    wide = [t if t is None else t.requires_grad_() for t in wide_core(*tensors)]
    want_out, want_lse = memory_read_core(*wide, SCALE)
    out, lse = backend.op("memory_read")(*tensors, SCALE, "ieee")
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = CORE_TOLERANCE[dtype]
    assert_near(out, want_out.detach(), tolerance, "out")
    assert_near(lse, want_lse.detach(), tolerance, "lse")

    usage = backend.op("memory_usage")(query, key, *vectors.values(), SCALE, "ieee", lse)
    assert_near(usage, memory_usage_core(*wide[:2], *wide[3:], SCALE, want_lse).detach(), tolerance, "usage")

    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = backend.op("memory_read_backward")(grad_out, grad_lse, *tensors, SCALE, "ieee", out, lse)
    reads = lse.isfinite().cpu()
    wanted = torch.autograd.grad(
        [want_out, want_lse[reads]], [t for t in wide if t is not None],
        [grad_out.cpu().double(), grad_lse.cpu().double()[reads]],
    )  # fmt: skip
    wanted = iter(wanted)
    for name, tensor, grad in zip(("query", "key", "value", *VECTORS), tensors, grads, strict=True):
        if tensor is None:
            assert grad.numel() == 0
        else:
            assert grad.dtype == tensor.dtype and grad.shape == tensor.shape
            assert_near(grad, next(wanted), 2 * tolerance, f"gradient of {name}")


@EVERY_BACKEND_AND_DTYPE
@pytest.mark.parametrize("top_k", [1, 5, 40, 130])
@pytest.mark.parametrize("case", CORE_CASES)
def test_core_selects_the_greatest_scores(backend, dtype, case, top_k):
    if backend is INTERPRETED and top_k != 5 and (dtype != torch.float32 or case == "many positions"):
        pytest.skip("seconds a case in Triton's interpreter; other lengths are selected in float32")
    leave_out(
        backend is INTERPRETED and dtype.itemsize == 2 and case not in ("plain", "anisotropic"),
        "the interpreter differs between dtypes in how values are loaded alone",
    )
    query, key, _, vectors = core_problem(case, dtype, backend.device)
    got = backend.op("memory_select")(query, key, *vectors.values(), SCALE, "ieee", top_k)
    assert_selects(*got, memory_scores(*wide_core(query, key, *vectors.values()), SCALE), top_k)


@EVERY_BACKEND
@pytest.mark.parametrize("top_k", [3, 70])
def test_core_first_position_wins_a_tie(backend, top_k):
    # Small integers: every score is exact in every implementation, and ties abound.
    query, key = (torch.randint(-1, 2, (2, 3, size)).float().to(backend.device) for size in (30, 400))
    got = backend.op("memory_select")(query, key, None, None, None, 0.5, "ieee", top_k)
    want = memory_select_core(*wide_core(query, key), None, None, None, 0.5, top_k)
    for have, wanted in zip(got, want, strict=True):
        assert torch.equal(have.cpu().double(), wanted.double())


@EVERY_BACKEND_AND_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_core_reads_any_stride(backend, dtype, layout):
    if backend is INTERPRETED:  # a second a cell; strides enter addresses, dtypes loads
        one_at_a_time((dtype, torch.float32), (layout, "contiguous"))
    query, key, value, vectors = core_problem("objects", dtype, backend.device)
    query, key, value = (laid_out(t, layout) for t in (query, key, value))
    vectors = {name: t if t is None else t.T.contiguous().T for name, t in vectors.items()}
    tensors = (query, key, value, *vectors.values())
    out, lse = backend.op("memory_read")(*tensors, SCALE, "ieee")
    assert_near(out, memory_read_core(*wide_core(*tensors), SCALE)[0], CORE_TOLERANCE[dtype], "out")
    grads = backend.op("memory_read_backward")(
        laid_out(torch.randn_like(out), layout), lse, *tensors, SCALE, "ieee", out, lse
    )
    assert all(grad.isfinite().all() for grad in grads)
    score, index = backend.op("memory_select")(query, key, *vectors.values(), SCALE, "ieee", 6)
    assert_selects(score, index, memory_scores(*wide_core(query, key, *vectors.values()), SCALE), 6)


@EVERY_BACKEND
@pytest.mark.parametrize("dtypes", list(itertools.product(SINGLE_AND_HALF, repeat=2)), ids=str)
@pytest.mark.parametrize("wide_query", [False, True])
def test_core_mixed_dtypes(backend, dtypes, wide_query):
    query, key, value, vectors = core_problem("plain", torch.float32, backend.device)
    key, value = (t.to(dtype) for t, dtype in zip((key, value), dtypes, strict=True))
    query = query if wide_query else query.to(key.dtype)
    tensors = (query, key, value, *vectors.values())
    out, lse = backend.op("memory_read")(*tensors, SCALE, "ieee")
    want_out, want_lse = memory_read_core(*wide_core(*tensors), SCALE)
    assert_near(out, want_out, CORE_TOLERANCE[value.dtype], "out")
    assert_near(lse, want_lse, 1e-5, "lse")


@EVERY_BACKEND
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("case", ["anisotropic", "many columns", "many positions"])
def test_core_in_reduced_precision(backend, precision, case):
    query, key, value, vectors = core_problem(case, torch.float32, backend.device)
    tensors = (query, key, value, *vectors.values())
    out, lse = backend.op("memory_read")(*tensors, SCALE, precision)
    want_out, want_lse = memory_read_core(*wide_core(*tensors), SCALE)
    tolerance = 1e-5 if precision == "tf32x3" else 4e-3
    assert_near(out, want_out, tolerance, "out")
    assert_near(lse, want_lse, tolerance, "lse")
    scores = memory_scores(*wide_core(query, key, *vectors.values()), SCALE)
    got = backend.op("memory_select")(query, key, *vectors.values(), SCALE, precision, 7)
    assert_selects(*got, scores, 7, tolerance)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_core_long_keys(backend, dtype):
    """Anisotropic scores of keys with entries up to 16, which cancel: within 1e-2 of float64."""
    n, c, p, m = 1, 64, 24, 90
    query, key = (t * 16 / t.abs().max() for t in (torch.randn(n, c, p), torch.randn(n, c, m)))
    query, key, chosen = query.to(dtype).float(), key.to(dtype).to(backend.device), torch.rand(n, c, p)
    rows = torch.cat([2 * chosen * query, -chosen], 1).to(backend.device)
    bias = -(chosen * query.square()).sum(1).to(backend.device) / 8
    score, index = backend.op("memory_select")(rows, key, None, bias, None, 1 / 8, "ieee", 10)
    scores = memory_scores(*wide_core(rows, key, None, bias, None), 1 / 8)
    assert (score.cpu().double() - scores.gather(1, index.cpu())).abs().max() < 1e-2
    lse = backend.op("memory_read")(rows, key, key[:, None], None, bias, None, 1 / 8, "ieee")[1]
    assert (lse.cpu().double() - scores.logsumexp(1)).abs().max() < 1e-2


@EVERY_BACKEND
def test_core_nan_query_gives_nan_and_nan_key_is_never_selected(backend):
    query, key, value, vectors = core_problem("objects", torch.float32, backend.device)
    query[1, 2, 7] = torch.nan
    out, lse = backend.op("memory_read")(query, key, value, *vectors.values(), SCALE, "ieee")
    undefined = torch.zeros(lse.shape, dtype=torch.bool)
    undefined[1, 7] = True
    assert torch.equal(lse.isnan().cpu(), undefined)
    assert torch.equal(out.isnan().cpu(), undefined[:, None, None].expand(out.shape))
    key[0, 3, 40] = torch.nan
    _, index = backend.op("memory_select")(query, key, *vectors.values(), SCALE, "ieee", 70)
    assert not (index[0] == 40).any() and (index[1, :, 7] == -1).all()


@EVERY_BACKEND
def test_core_nothing_valid_and_large_scores(backend):
    query, key, value, _ = core_problem("plain", torch.float32, backend.device)
    nothing = torch.full((1, 50), -torch.inf, device=backend.device)
    out, lse = backend.op("memory_read")(query, key, value, None, None, nothing, SCALE, "ieee")
    assert out.eq(0).all() and lse.isneginf().all()
    usage = backend.op("memory_usage")(query, key, None, None, nothing, SCALE, "ieee", lse)
    assert usage.eq(0).all()
    grads = backend.op("memory_read_backward")(
        torch.randn_like(out), torch.zeros_like(lse), query, key, value, None, None, nothing, SCALE, "ieee", out, lse
    )  # fmt: skip
    assert all(grad.eq(0).all() for grad in grads)
    out, lse = backend.op("memory_read")(query * 1e3, key, value, None, None, None, SCALE, "ieee")
    assert_near(
        out, memory_read_core(*wide_core(query * 1e3, key, value), None, None, None, SCALE)[0], 1e-3, "out"
    )


@EVERY_BACKEND
@pytest.mark.parametrize("dim", ["batch", "objects", "columns", "queries", "memory"])
def test_core_empty(backend, dim):
    n, o, v, p, m = (0 if dim == d else 2 for d in ("batch", "objects", "columns", "queries", "memory"))
    query, key = torch.randn(n, 3, p, device=backend.device), torch.randn(n, 3, m, device=backend.device)
    value = torch.randn(n, o, v, m, device=backend.device)
    settings_ = (None, None, None, SCALE, "ieee")
    out, lse = backend.op("memory_read")(query, key, value, *settings_)
    want = memory_read_core(*wide_core(query, key, value), None, None, None, SCALE)
    assert_near(out, want[0], 1e-5, "out")
    assert_near(lse, want[1], 1e-5, "lse")
    grads = backend.op("memory_read_backward")(
        out, torch.zeros_like(lse), query, key, value, *settings_, out, lse
    )
    assert [grad.shape for grad in grads[:3]] == [query.shape, key.shape, value.shape]
    assert all(grad.isfinite().all() for grad in grads)
    usage = backend.op("memory_usage")(query, key, *settings_, lse)
    assert usage.shape == (n, m) and (p > 0 or usage.eq(0).all())
    score, index = backend.op("memory_select")(query, key, *settings_, 3)
    assert score.shape == index.shape == (n, 3, p) and (index[:, m:] == -1).all()
    weight = score.softmax(1).nan_to_num()
    assert_near(
        backend.op("memory_gather")(weight, index, value),
        memory_gather_core(weight.cpu().double(), index.cpu(), value.cpu().double()), 1e-5, "gathered",
    )  # fmt: skip
    grads = backend.op("memory_gather_backward")(out, weight, index, value)
    assert grads[0].shape == weight.shape and grads[1].shape == value.shape
    assert all(grad.isfinite().all() for grad in grads)


@EVERY_BACKEND_AND_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["objects", "one query", "many columns"])
def test_core_gathers(backend, dtype, layout, case):
    if backend is INTERPRETED:  # a second a cell; strides enter addresses, dtypes loads, sizes the grid
        one_at_a_time((dtype, torch.float32), (layout, "contiguous"), (case, "objects"))
    n, o, _, v, p, m, _ = CORE_CASES[case]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value = laid_out(torch.randn(n, o, v, m).to(dtype).to(backend.device), layout)
    weight = torch.rand(n, 7, p, dtype=wide, device=backend.device)
    index = torch.randint(-1, m, (n, 7, p), device=backend.device)
    index[torch.rand(index.shape) < 0.3] = m // 2  # many queries choose one position
    inputs = [t.requires_grad_() for t in wide_core(weight, value)]
    want = memory_gather_core(inputs[0], index.cpu(), inputs[1])
    out = backend.op("memory_gather")(weight, index, value)
    assert out.dtype == dtype
    assert_near(out, want.detach(), CORE_TOLERANCE[dtype], "gathered")
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(want, inputs, grad.cpu().double())
    grads, again = (
        backend.op("memory_gather_backward")(laid_out(grad, layout), weight, index, value) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    for name, have, wanted_grad in zip(("weight", "value"), grads, wanted, strict=True):
        assert_near(have, wanted_grad, CORE_TOLERANCE[dtype], f"gradient of {name}")


@EVERY_BACKEND
def test_core_backward_is_deterministic(backend):
    tensors = core_problem("many positions", torch.float32, backend.device)
    query, key, value, vectors = tensors
    tensors = (query, key, value, *vectors.values())
    out, lse = backend.op("memory_read")(*tensors, SCALE, "ieee")
    run = [backend.op("memory_read_backward")(out, lse, *tensors, SCALE, "ieee", out, lse) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*run, strict=True))


# ---- The public op.


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("top_k", [None, 4])
def test_every_similarity_and_dtype(implementation, option, dtype, top_k):
    assert_reads_like_reference(*make(option, dtype=dtype, o=2), top_k=top_k)


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_memory_longer_than_a_block_and_more_queries_than_a_panel(top_k):
    assert_reads_like_reference(*make("l2 shrinkage selection", n=2, q=(70,), m=(700,), v=30), top_k=top_k)


def test_many_channels_and_objects():
    assert_reads_like_reference(*make(o=3, c=65, v=100, q=(33,), m=(301,)))


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize(
    "sizes", [{"q": (1,), "m": (1,)}, {"c": 1, "v": 1}, {"o": 0}, {"n": 0}, {"m": (0,)}], ids=str
)
def test_smallest_sizes(sizes, top_k):
    (query, key, value), options = make(**sizes)
    out = vosops.memory_read(query, key, value, top_k=top_k)
    assert out.shape == (*value.shape[: value.dim() - key.dim() + 2], *query.shape[2:])
    if key.shape[2:].numel() == 0:
        assert (out == 0).all()


@given(
    n=st.integers(1, 3), o=st.sampled_from([None, 1, 3]), c=st.integers(1, 40), v=st.integers(1, 30),
    q=st.integers(1, 40), m=st.integers(1, 320), option=st.sampled_from(OPTIONS),
    top_k=st.sampled_from([None, 1, 5, 400]), dtype=st.sampled_from(list(TOLERANCE)),
    channel_last=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_problems(n, o, c, v, q, m, option, top_k, dtype, channel_last, seed):
    tensors, options = make(option, n=n, o=o, c=c, v=v, q=(q,), m=(m,), dtype=dtype, seed=seed)
    if channel_last:
        tensors = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    if top_k is not None and dtype != torch.float64:
        # Scores that differ in the last digit may change places at the k-th: compare what was chosen.
        chosen, _ = vosops.memory_select(*tensors[:2], top_k, **options, return_usage=True)
        assert ((chosen.indices >= 0) == (chosen.weights > 0)).float().mean() > 0.5
        return
    assert_reads_like_reference(tensors, options, top_k=top_k)


# ---- Layouts, dtypes and batches.


def test_any_stride_is_read_in_place():
    (query, key, value), options = make("l2", o=2, m=(4, 6), q=(4, 5))
    want = vosops.memory_read(query, key, value, **options)
    strange = [t.mT.contiguous().mT for t in (query, key)] + [
        value.movedim(2, -1).contiguous().movedim(-1, 2)
    ]
    assert torch.equal(vosops.memory_read(*strange, **options), want)
    for top_k in (3,):
        a, b = (vosops.memory_read(*args, top_k=top_k, **options) for args in ((query, key, value), strange))
        torch.testing.assert_close(a, b)


def test_a_batch_of_one_broadcasts():
    (query, key, value), options = make("l2 selection bias", n=3, q=(6,), m=(20,))
    for one in (0, 1):
        tensors = [t[:1] if i == one else t for i, t in enumerate((query, key, value))]
        side = "selection" if one == 0 else "bias"
        narrow = {k: x[:1] if k == side else x for k, x in options.items()}
        whole = [t.expand(3, *t.shape[1:]) for t in tensors]
        wide = {k: x.expand(3, *x.shape[1:]) if isinstance(x, torch.Tensor) else x for k, x in narrow.items()}
        assert torch.equal(vosops.memory_read(*tensors, **narrow), vosops.memory_read(*whole, **wide))


def test_values_of_a_batch_under_one_affinity_are_objects():
    (query, key, _), options = make(q=(6,), m=(20,))
    value = torch.randn(4, 5, 20)
    out, usage, lse = vosops.memory_read(query, key, value, return_usage=True, return_lse=True, **options)
    one_by_one = torch.cat([vosops.memory_read(query, key, v[None], **options) for v in value])
    torch.testing.assert_close(out, one_by_one)
    assert usage.shape == (4, 20) and lse.shape == (4, 6)


@pytest.mark.parametrize("dtypes", list(itertools.product(SINGLE_AND_HALF, repeat=3)), ids=str)
def test_mixed_dtypes(dtypes):
    (query, key, value), _ = make(q=(7,), m=(30,), o=2)
    tensors = [t.to(dtype) for t, dtype in zip((query, key, value), dtypes, strict=True)]
    assert_reads_like_reference(tensors, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["l2", "l2 shrinkage", "l2 selection", "l2 shrinkage selection"])
def test_half_precision_scores_of_long_keys(option, dtype):
    """Scores of keys with entries up to 16 are within 1e-2 of float64 on the same rounded inputs."""
    tensors, options = make(option, c=64, q=(40,), m=(300,), dtype=dtype)
    tensors[0] = (tensors[0] * 16 / tensors[0].abs().max()).to(dtype)
    tensors[1] = (tensors[1] * 16 / tensors[1].abs().max()).to(dtype)
    chosen = vosops.memory_select(*tensors[:2], 30, **options)
    wide, wide_options = in_float64(tensors, options)
    theirs = vosops.memory_select(*wide[:2], 30, **wide_options)
    torch.testing.assert_close(chosen.lse.double(), theirs.lse, rtol=0, atol=1e-2)
    assert (chosen.indices == theirs.indices).float().mean() > 0.99


# ---- Parts of a memory.


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("option", OPTIONS)
def test_segments_equal_their_concatenation(option, top_k):
    (query, key, value), options = make(option, o=2, q=(7,), m=(40,), dtype=torch.float64)
    cuts = (slice(0, 11), slice(11, 12), slice(12, 40))
    split = [[t[..., cut] for cut in cuts] for t in (key, value)]
    parts = {
        k: [x[..., cut] for cut in cuts] if k in ("shrinkage", "bias", "valid") else x
        for k, x in options.items()
    }
    asked = {"top_k": top_k, "return_usage": True, "return_lse": True}
    out, usage, lse = vosops.memory_read(query, *split, **parts, **asked)
    want_out, want_usage, want_lse = vosops.memory_read(query, key, value, **options, **asked)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    torch.testing.assert_close(torch.cat(usage, 1), want_usage)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("segmented", [False, True])
def test_a_range_equals_the_slice(top_k, segmented):
    (query, key, value), options = make("l2 shrinkage", q=(7,), m=(40,))
    cut = slice(9, 31)
    sliced = {k: x[..., cut] if k == "shrinkage" else x for k, x in options.items()}
    want, want_usage = vosops.memory_read(
        query, key[..., cut], value[..., cut], **sliced, top_k=top_k, return_usage=True
    )
    if segmented:
        key, value = ([t[..., :15], t[..., 15:]] for t in (key, value))
        options["shrinkage"] = [options["shrinkage"][..., :15], options["shrinkage"][..., 15:]]
    out, usage = vosops.memory_read(
        query, key, value, **options, valid=(9, 31), top_k=top_k, return_usage=True
    )
    usage = torch.cat(usage, 1) if segmented else usage
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(usage[:, cut], want_usage)
    assert usage[:, :9].eq(0).all() and usage[:, 31:].eq(0).all()


def test_nothing_valid_reads_zero(implementation):
    (query, key, value), _ = make()
    nothing = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    for top_k in (None, 3):
        out, usage, lse = vosops.memory_read(
            query, key, value, valid=nothing, top_k=top_k, return_usage=True, return_lse=True
        )
        assert out.eq(0).all() and usage.eq(0).all() and lse.isneginf().all()


def test_merged_reads_of_parts_equal_the_read_with_gradients():
    (query, key, value), _ = make(o=2, q=(4,), m=(9,), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    cuts = (slice(0, 2), slice(2, 9))
    parts = [vosops.memory_read(query, key[..., c], value[..., c], return_lse=True) for c in cuts]
    merged = vosops.merge_reads(*zip(*parts, strict=True))
    whole = vosops.memory_read(query, key, value, return_lse=True)
    weights = [torch.randn_like(t) for t in whole]
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(
        torch.autograd.grad(merged, inputs, weights), torch.autograd.grad(whole, inputs, weights)
    )


# ---- Groups of objects, and objects that lie apart.


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The memory positions that each core op was given, all names, and the largest tensor that anything made."""

    def __init__(self):
        super().__init__()
        self.positions, self.names, self.largest = collections.Counter(), set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func.overloadpacket))
        if func.namespace == "vosops":
            self.positions[func._schema.name.removeprefix("vosops::")] += args[1].shape[-1]
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        made = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
        sizes = [t.numel() for t in made if t.untyped_storage().data_ptr() not in given]
        self.largest = max([self.largest, *sizes])
        return out


GROUPS = [None, (15, 40), (9, 31), (40, 40), "mask"]


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("option", ["dot", "l2 shrinkage", "l2 shrinkage selection"])
def test_groups_equal_a_read_of_each(option, segmented, top_k):
    (query, key, _), options = make(option, q=(7,), m=(40,), dtype=torch.float64)
    values = [torch.randn(1, o, 3 + o % 2, 40).double() for o in (2, 2, 1, 2, 1)]
    groups = [torch.randn(1, 40) > 0 if valid == "mask" else valid for valid in GROUPS]
    asked = {"top_k": top_k, "return_usage": True, "return_lse": True}
    want = [
        vosops.memory_read(query, key, v, valid=valid, **options, **asked)
        for v, valid in zip(values, groups, strict=True)
    ]
    if segmented:
        cuts = (slice(0, 20), slice(20, 40))
        key, *values = ([t[..., c] for c in cuts] for t in (key, *values))
        options = {k: [x[..., c] for c in cuts] if k == "shrinkage" else x for k, x in options.items()}
        groups[-1] = [groups[-1][..., c] for c in cuts]
    got = vosops.memory_read(query, key, values, groups=groups, **options, **asked)
    for (out, usage, lse), (want_out, want_usage, want_lse) in zip(got, want, strict=True):
        torch.testing.assert_close(out, want_out)
        torch.testing.assert_close(torch.cat(usage, 1) if segmented else usage, want_usage)
        torch.testing.assert_close(lse, want_lse)


def test_groups_of_values_that_hold_their_range_only():
    (query, key, value), options = make("l2", o=2, q=(7,), m=(5, 2, 4))
    late = value[:, :, :, 2:]
    for top_k in (None, 3):
        asked = {"top_k": top_k, **options}
        got = vosops.memory_read(query, key, [value, late], groups=[None, (16, 40)], **asked)
        torch.testing.assert_close(got[0], vosops.memory_read(query, key, value, **asked))
        torch.testing.assert_close(got[1], vosops.memory_read(query, key, value, valid=(16, 40), **asked))
        with pytest.raises(ValueError, match="memory_value must have shape"):
            vosops.memory_read(query, key, [value, late], groups=[None, (8, 40)], **asked)


@pytest.mark.parametrize("top_k", [None, 4])
def test_groups_share_one_pass_over_the_scores(top_k):
    (query, key, value), _ = make(o=1, q=(7,), m=(40,))
    with Calls() as calls:
        vosops.memory_read(query, key, [value] * 3, groups=[None, (15, 40), (25, 40)], top_k=top_k)
    scored = sum(calls.positions[op] for op in ("memory_read", "memory_read_list", "memory_select"))
    assert scored == 40


def test_groups_have_gradients():
    (query, key, value), _ = make(o=2, c=3, v=2, q=(4,), m=(9,), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    groups = [None, (4, 9)]
    together = vosops.memory_read(query, key, [value, value[..., 4:]], groups=groups)
    apart = [vosops.memory_read(query, key, value, valid=valid) for valid in groups]
    weights = [torch.randn_like(t) for t in together]
    torch.testing.assert_close(
        torch.autograd.grad(together, inputs, weights), torch.autograd.grad(apart, inputs, weights)
    )


def test_selection_for_groups():
    (query, key, value), options = make("l2 shrinkage", q=(7,), m=(40,))
    groups = [(9, 40), None]
    for valid, chosen in zip(
        groups, vosops.memory_select(query, key, 5, groups=groups, **options), strict=True
    ):
        alone = vosops.memory_select(query, key, 5, valid=valid, **options)
        assert torch.equal(chosen.indices, alone.indices)
        read = vosops.memory_read(query, key, value, valid=valid, top_k=5, **options)
        torch.testing.assert_close(vosops.memory_gather(chosen, value), read)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=str)
def test_objects_that_lie_apart_are_read_without_a_copy(dtype, top_k):
    (query, key, value), options = make("l2", o=3, v=9, q=(7,), m=(301,), dtype=dtype)
    objects = [value[:, 0].clone(), value[:, 1].mT.contiguous().mT, value[:, 2].clone()]
    want = vosops.memory_read(query, key, value, top_k=top_k, **options)
    with Calls() as calls:
        got = vosops.memory_read(query, key, objects, top_k=top_k, **options)
    torch.testing.assert_close(got, want)
    assert got.shape == (1, 3, 9, 7) and calls.largest < objects[0].numel()
    cuts = (slice(0, 150), slice(150, 301))
    split = [[each[..., c] for each in objects] for c in cuts]
    parts = vosops.memory_read(query, [key[..., c] for c in cuts], split, top_k=top_k, **options)
    torch.testing.assert_close(parts, want, rtol=0, atol=TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_objects_at_equal_distances_are_one_view(backend):
    """What every backend reads without a copy, a bank's objects on a GPU for one."""
    (query, key, value), options = make("l2", o=3, v=9, q=(7,), m=(301,))
    storage = torch.randn(4, 310, 9)
    storage[1:, 5:306] = value[0].mT
    objects = [each[5:306].mT[None] for each in storage[1:]]
    apart = [objects[0], objects[2], objects[1].clone()]
    want = vosops.memory_read(query, key, value, **options)
    with vosops.use_backend(backend):
        with Calls() as calls:
            got = vosops.memory_read(query, key, objects, **options)
        assert "aten.cat" not in calls.names
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(vosops.memory_read(query, key, objects[::-1], **options), want.flip(1))
        torch.testing.assert_close(vosops.memory_read(query, key, apart, **options), want[:, [0, 2, 1]])


@pytest.mark.parametrize("top_k", [None, 3])
def test_objects_that_lie_apart_have_gradients_and_fold(top_k):
    (query, key, value), _ = make(o=2, n=3, q=(4,), m=(9,), dtype=torch.float64)
    inputs = [query[:1].clone(), key[:1].clone(), value]  # batch elements under one affinity are objects
    want = vosops.memory_read(*inputs, top_k=top_k)
    torch.testing.assert_close(vosops.memory_read(*inputs[:2], list(value.unbind(1)), top_k=top_k), want)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    reads = [vosops.memory_read(query, key, v, top_k=top_k) for v in (value, list(value.unbind(1)))]
    weight = torch.randn_like(reads[0])
    torch.testing.assert_close(*(torch.autograd.grad(read, inputs, weight) for read in reads))


# ---- Selection.


def test_ties_go_to_the_first_position():
    query, key = torch.ones(1, 4, 3), torch.ones(1, 4, 50)
    assert (
        vosops.memory_select(query, key, 6).indices == torch.arange(6, dtype=torch.int32)[None, :, None]
    ).all()
    split = [key[..., :20], key[..., 20:]]
    assert (vosops.memory_select(query, split, 30).indices[0, :, 0] == torch.arange(30)).all()


@pytest.mark.parametrize("top_k", [1, 5, 128])
def test_select_then_gather_equals_the_fused_read(top_k):
    (query, key, value), options = make("l2 shrinkage selection", o=2, q=(3, 4), m=(60,))
    chosen = vosops.memory_select(query, key, top_k, **options)
    assert chosen.indices.dtype == torch.int32 and chosen.weights.shape == (1, top_k, 3, 4)
    torch.testing.assert_close(chosen.weights.sum(1), torch.ones(1, 3, 4))
    fused = vosops.memory_read(query, key, value, top_k=top_k, **options)
    assert torch.equal(vosops.memory_gather(chosen, value), fused)
    split = [value[..., :7], value[..., 7:]]
    torch.testing.assert_close(vosops.memory_gather(chosen, split), fused)


def test_large_scores_do_not_overflow():
    """exp without the maximum taken away would be inf above 88."""
    (query, key, value), _ = make()
    for top_k in (None, 3):
        out = vosops.memory_read(query * 1e3, key * 10, value, top_k=top_k)
        assert out.isfinite().all()


# ---- Derivatives.


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("option", ["dot", "l2 shrinkage", "l2 shrinkage selection", "dot bias shrinkage"])
def test_first_and_second_derivatives(option, top_k):
    (query, key, value), options = make(option, o=2, c=3, v=2, q=(4,), m=(5,), dtype=torch.float64)
    names = [k for k, x in options.items() if isinstance(x, torch.Tensor)]
    inputs = [t.requires_grad_() for t in (query, key, value, *(options[k] for k in names))]

    def read(query, key, value, *rest):
        given = {**options, **dict(zip(names, rest, strict=True))}
        return vosops.memory_read(query, key, value, top_k=top_k, return_lse=True, **given)

    assert torch.autograd.gradcheck(read, inputs)
    assert torch.autograd.gradgradcheck(read, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_over_several_blocks(dtype):
    tensors, options = make("l2 shrinkage selection", n=2, o=2, c=20, v=30, q=(70,), m=(600,), dtype=dtype)
    wide, wide_options = in_float64(tensors, options)
    grads = []
    cases = ((vosops.memory_read, tensors, options), (reference.memory_read, wide, wide_options))
    for read, args, named in cases:
        inputs = [t.requires_grad_() for t in (*args, named["shrinkage"], named["selection"])]
        out = read(*args, **named)
        torch.manual_seed(1)
        grads.append(
            torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
        )
    for ours, theirs in zip(*grads, strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("queries", [70, 256])
@pytest.mark.parametrize("layout", ["contiguous", "pixels apart", "objects apart"])
def test_gradients_of_many_channels_whatever_the_layout_of_the_output_gradient(layout, queries):
    """More channels than are multiplied at a time, an object's split; rows of 256 lie in the same sets of a cache."""
    tensors, options = make(o=3, c=8, v=200, q=(queries,), m=(400,))
    wide, wide_options = in_float64(tensors, options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(1, 3, 200, queries, generator=generator)
    given = grad
    if layout == "pixels apart":
        given = grad.mT.contiguous().mT
    elif layout == "objects apart":
        given = torch.empty(1, 3, 201, queries)[:, :, :200].copy_(grad)
    grads = []
    cases = ((vosops.memory_read, tensors, options), (reference.memory_read, wide, wide_options))
    for read, args, named in cases:
        inputs = [t.requires_grad_() for t in args]
        out = read(*args, **named)
        cotangent = given if out.dtype == torch.float32 else grad.double()
        grads.append(torch.autograd.grad(out, inputs, cotangent))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours.double() - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_result_does_not_depend_on_the_number_of_threads():
    (query, key, value), options = make("l2 shrinkage", o=2, c=20, v=30, q=(200,), m=(700,))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        inputs = [t.detach().requires_grad_() for t in (query, key, value)]
        out = vosops.memory_read(*inputs, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_usage_is_not_differentiable_and_forward_mode_is_refused():
    (query, key, value), _ = make()
    _, usage = vosops.memory_read(query.requires_grad_(), key, value, return_usage=True)
    assert not usage.requires_grad
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: vosops.memory_read(q, key, value), (query.detach(),), (query.detach(),))


# ---- The registered ops.


def core_inputs(option="l2 shrinkage", requires_grad=True):
    (query, key, value), options = make(option, n=2, o=2, q=(5,), m=(7,), dtype=torch.float64)
    tensors = [
        query,
        key,
        value,
        options["shrinkage"].squeeze(1),
        torch.randn(2, 5).double(),
        torch.randn(2, 7).double(),
    ]
    return [t.requires_grad_(requires_grad) for t in tensors]


@pytest.mark.parametrize("op", CORE_OPS)
def test_opcheck(op):
    ops = torch.ops.vosops
    query, key, value, *vectors = core_inputs(requires_grad=op not in ("usage", "read_list"))
    settings_ = (0.4, "ieee")
    out, lse = ops.memory_read(query, key, value, *vectors, *settings_)
    score, index = ops.memory_select(query, key, *vectors, *settings_, 3)
    weight, grad = score.detach().softmax(1).requires_grad_(), torch.randn_like(out).requires_grad_()
    cases = {
        "read": (ops.memory_read, (query, key, value, *vectors, *settings_)),
        "read without vectors": (ops.memory_read, (query, key, value, None, None, None, *settings_)),
        "read_list": (ops.memory_read_list, (query, key, list(value.split(1, 1)), *vectors, *settings_)),
        "read_backward": (
            ops.memory_read_backward,
            (
                grad,
                torch.randn_like(lse),
                query,
                key,
                value,
                *vectors,
                *settings_,
                out.detach(),
                lse.detach(),
            ),
        ),
        "usage": (ops.memory_usage, (query, key, *vectors, *settings_, lse)),
        "select": (ops.memory_select, (query, key, *vectors, *settings_, 3)),
        "gather": (ops.memory_gather, (weight, index, value)),
        "gather_backward": (ops.memory_gather_backward, (grad, weight, index, value)),
    }
    torch.library.opcheck(*cases[op])


@pytest.mark.parametrize("top_k", [None, 3])
def test_vmap_folds_into_the_batch(top_k):
    query, key, value = torch.randn(3, 1, 4, 6), torch.randn(3, 1, 4, 9), torch.randn(1, 5, 9)
    mapped = torch.vmap(lambda q, k: vosops.memory_read(q, k, value, top_k=top_k))(query, key)
    one_by_one = [vosops.memory_read(q, k, value, top_k=top_k) for q, k in zip(query, key, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(one_by_one))
    objects = [value, -value]
    mapped = torch.vmap(lambda q, k: vosops.memory_read(q, k, objects, top_k=top_k))(query, key)
    torch.testing.assert_close(mapped, torch.stack([torch.stack([x, -x], 1) for x in one_by_one]))


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("objects", [1, 2])
def test_derivatives_through_vmap(top_k, objects):
    query, key = torch.randn(3, 1, 4, 6, requires_grad=True), torch.randn(1, 4, 9)
    values = list(torch.randn(objects, 1, 5, 9))

    def read(q):
        return vosops.memory_read(q, key, values, top_k=top_k).square()

    got = torch.autograd.grad(torch.vmap(read)(query).sum(), query)
    want = torch.autograd.grad(sum(read(q).sum() for q in query), query)
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 3])
def test_compile_without_graph_breaks(top_k):
    (query, key, value), options = make("l2 shrinkage selection", o=2)
    query.requires_grad_()

    def read(q):
        return vosops.memory_read(q, key, value, top_k=top_k, return_usage=True, **options)

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(query), read(query), strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(f(query)[0].sum(), query) for f in (compiled, read)]
    torch.testing.assert_close(*grads)


def test_autocast_does_not_cast_down():
    (query, key, value), options = make("l2 shrinkage")
    with torch.autocast("cpu", torch.bfloat16):
        cast = vosops.memory_read(query, key, value, **options)
    assert torch.equal(cast, vosops.memory_read(query, key, value, **options))


# ---- The originals.


def test_golden_stm(golden):
    for case in ("basic", "t1"):
        data = golden("stm_memory_read.pt")[case]
        inputs = [data[k].requires_grad_() for k in ("m_in", "m_out", "q_in", "q_out")]
        m_in, m_out, q_in, q_out = inputs
        out = torch.cat([vosops.memory_read(q_in, m_in, m_out), q_out], 1)
        torch.testing.assert_close(out, data["out64"], rtol=0, atol=1e-5)
        grads = torch.autograd.grad(out, inputs, data["grad_out"])
        for name, grad in zip(("m_in", "m_out", "q_in", "q_out"), grads, strict=True):
            torch.testing.assert_close(grad, data[f"grad_{name}"], rtol=1e-4, atol=1e-5)


def test_golden_stcn(golden):
    data = golden("stcn_affinity.pt")["basic"]
    for top_k, name in ((data["top_k"], "readout"), (None, "readout_full")):
        out = vosops.memory_read(data["qk"], data["mk"], data["mv"], similarity="l2", top_k=top_k)
        torch.testing.assert_close(out, data[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 30])
@pytest.mark.parametrize("name", ["l2", "shrink", "sel", "full"])
def test_golden_xmem(golden, name, top_k):
    data = golden("xmem_affinity.pt")["small"]
    options = {"shrinkage": data["ms"]} if name in ("shrink", "full") else {}
    options |= {"selection": data["qe"]} if name in ("sel", "full") else {}
    out, usage = vosops.memory_read(
        data["qk"], data["mk"], data["mv"], similarity="l2", top_k=top_k, return_usage=True, **options
    )
    torch.testing.assert_close(out, data[f"readout_{name}_top{top_k}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(usage[:1], data[f"usage_{name}_top{top_k}"], rtol=0, atol=2e-5)


def test_golden_xmem_training_gradients(golden):
    data = golden("xmem_affinity.pt")["small"]
    frames = data["train_grad_mk"].shape[2:]
    size = data["train_grad_qk"].shape[2:]
    inputs = [
        data["qk"].view(1, -1, *size), data["mk"].view(1, -1, *frames), data["mv"].reshape(1, -1, 90),
        data["ms"].view(1, 1, *frames), data["qe"].view(1, -1, *size),
    ]  # fmt: skip
    inputs = [t.requires_grad_() for t in inputs]
    query, key, value, shrinkage, selection = inputs
    out = vosops.memory_read(
        query, key, value.unflatten(2, frames), similarity="l2", shrinkage=shrinkage, selection=selection
    )
    torch.testing.assert_close(out, data["train_out64"].float(), rtol=0, atol=1e-5)
    grads = torch.autograd.grad(out, inputs, data["train_grad_out"].float())
    for name, grad in zip(("qk", "mk", "mv", "ms", "qe"), grads, strict=True):
        want = data[f"train_grad_{name}"].float()
        torch.testing.assert_close(grad, want.view(grad.shape), rtol=1e-4, atol=1e-5)


def test_golden_mask_propagation(golden):
    for data in golden("maskprop_reader.pt").values():
        out = vosops.memory_read(data["qk"], data["mk"], data["mv"], top_k=data["top_k"], prior=data["km"])
        torch.testing.assert_close(out, data["out"], rtol=0, atol=1e-5)


# ---- Wrong input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_key": torch.zeros(1, 7, 4)}, ValueError, "memory_key must have the channels"),
        ({"query_key": torch.zeros(4, 8)}, ValueError, "query_key must have shape"),
        ({"query_key": torch.zeros(1, 8, 4, dtype=torch.int64)}, TypeError, "query_key must be float32"),
        ({"memory_key": "keys"}, TypeError, "memory_key must"),
        ({"memory_value": torch.zeros(1, 5, 8)}, ValueError, "memory_value must have shape"),
        (
            {"memory_key": torch.zeros(2, 8, 9), "query_key": torch.zeros(3, 8, 4)},
            ValueError,
            "memory_key must have batch 1 or 3",
        ),
        ({"similarity": "cosine"}, ValueError, "similarity must be"),
        ({"selection": torch.zeros(1, 8, 4)}, ValueError, "selection must be None"),
        ({"shrinkage": torch.zeros(1, 9)}, ValueError, "shrinkage must have shape"),
        ({"bias": torch.zeros(1, 8)}, ValueError, "bias must have shape"),
        ({"valid": torch.zeros(1, 9)}, TypeError, "valid must be bool"),
        ({"valid": (3, 1)}, ValueError, "valid must be a range"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int"),
        ({"precision": "half"}, ValueError, "precision must be"),
        ({"memory_key": [torch.zeros(1, 8, 9)]}, ValueError, "memory_value must be a sequence"),
        ({"memory_value": ["x"]}, TypeError, "memory_value must hold tensors"),
        (
            {"memory_value": [torch.zeros(1, 5, 9), torch.zeros(1, 4, 9)]},
            ValueError,
            "memory_value must hold objects",
        ),
        ({"memory_value": [], "groups": []}, TypeError, "groups must be a sequence"),
        (
            {"groups": [None, (0, 3)]},
            ValueError,
            "memory_value must be a sequence with one entry for each of",
        ),
        ({"groups": [None], "valid": (0, 3)}, ValueError, "valid must be None with groups"),
        ({"valid": (0.0, 3.0)}, TypeError, "valid must be bool or a range"),
        ({"memory_key": None}, TypeError, "memory_key must be"),
        ({"memory_value": None}, TypeError, "memory_value must be"),
        ({"memory_value": 3, "groups": [None]}, ValueError, "memory_value must be a sequence"),
        ({"shrinkage": torch.ones(1, 1, 9, dtype=torch.bool)}, TypeError, "shrinkage must be float32"),
        ({"bias": torch.ones(1, 9, dtype=torch.bool)}, TypeError, "bias must be float32"),
        (
            {"selection": torch.ones(1, 8, 4, dtype=torch.int64), "similarity": "l2"},
            TypeError,
            "selection must be float32",
        ),
        ({"query_key": torch.zeros(3, 8, 4), "bias": torch.zeros(2, 9)}, ValueError, "bias must have batch"),
        ({"scale": "large"}, TypeError, "scale must be a number"),
        ({"prior": 0.0, "query_key": torch.zeros(1, 8, 2, 2)}, ValueError, "prior must be greater"),
        ({"prior": 2.0}, ValueError, "query_key must have shape"),
        (
            {
                "memory_key": [torch.zeros(1, 8, 9)] * 2,
                "memory_value": [[torch.zeros(1, 5, 9)] * 2, torch.zeros(1, 5, 9)],
            },
            ValueError,
            "memory_value must have equal",
        ),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, str) else None,
)
def test_wrong_input_is_named(change, error, message):
    good = {
        "query_key": torch.zeros(1, 8, 4),
        "memory_key": torch.zeros(1, 8, 9),
        "memory_value": torch.zeros(1, 5, 9),
    }
    with pytest.raises(error, match=message):
        vosops.memory_read(**{**good, **change})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(3, 5, 9), ValueError, "memory_value must have batch"),
        ([torch.zeros(1, 5, 4), torch.zeros(1, 4, 5)], ValueError, "memory_value must have equal"),
        ([], TypeError, "memory_value must be"),
        (torch.zeros(1, 5, 9, dtype=torch.int64), TypeError, "memory_value must be float32"),
    ],
)
def test_wrong_values_to_gather_are_named(value, error, message):
    chosen = vosops.memory_select(torch.zeros(2, 8, 4), torch.zeros(2, 8, 9), 3)
    with pytest.raises(error, match=message):
        vosops.memory_gather(chosen, value)
    with pytest.raises(TypeError, match="weights must be MemoryWeights"):
        vosops.memory_gather(chosen.weights, torch.zeros(2, 5, 9))


def test_wrong_reads_to_merge_are_named():
    out, lse = torch.zeros(1, 5, 4), torch.zeros(1, 4)
    for outs, lses, error in (
        ([out], ["lse"], TypeError),
        ([out, out[:, :2]], [lse, lse], ValueError),
        ([out, out], [lse, lse[:, :2]], ValueError),
        ([lse], [out], ValueError),
    ):
        with pytest.raises(error, match="outs|lses"):
            vosops.merge_reads(outs, lses)


# ---- What broadcasts, and what is NaN.


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("batches", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1), (1, 0, 0)])
def test_an_empty_batch_broadcasts(batches, top_k):
    (query, key, value), _ = make()
    query, key, value = (t.expand(n, *t.shape[1:]) for t, n in zip((query, key, value), batches, strict=True))
    out, usage, lse = vosops.memory_read(query, key, value, top_k=top_k, return_usage=True, return_lse=True)
    assert (out.shape, usage.shape, lse.shape) == ((0, 5, 3, 5), (0, 2, 3, 4), (0, 3, 5))
    objects = vosops.memory_read(query, key, [value, value], top_k=top_k)
    assert objects.shape == (0, 2, 5, 3, 5)


def test_a_selection_of_one_broadcasts():
    (query, key, value), options = make("l2 shrinkage selection", n=3)
    options["selection"] = options["selection"][:1]
    one = vosops.memory_read(query, key, value, **options)
    options["selection"] = options["selection"].expand_as(query)
    assert torch.equal(one, vosops.memory_read(query, key, value, **options))


@pytest.mark.parametrize("top_k", [None, 4])
def test_values_of_one_and_of_a_batch_in_segments(top_k):
    (query, key, value), _ = make()
    batch = torch.randn(3, *value.shape[1:])
    for both in ([batch, value], [value, batch]):
        read = vosops.memory_read(query, [key, key + 1], both, top_k=top_k)
        expanded = [each.expand_as(batch) for each in both]
        torch.testing.assert_close(read, vosops.memory_read(query, [key, key + 1], expanded, top_k=top_k))


def test_values_and_weights_of_two_dtypes_are_gathered():
    (query, key, value), _ = make(dtype=torch.float64)
    read = vosops.memory_read(query, key, value, top_k=4)
    for weights in (
        vosops.memory_select(t(query), t(key), 4) for t in (torch.Tensor.float, torch.Tensor.double)
    ):
        for dtype in (torch.float64, torch.float32, torch.float16):
            out = vosops.memory_gather(weights, value.flatten(2).to(dtype))
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), read, rtol=0, atol=2e-3)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("option", ["dot", "l2 shrinkage selection"])
def test_a_nan_query_reads_nan_and_no_other_pixel_does(option, top_k, implementation):
    (query, key, value), options = make(option, o=2, m=(24,))
    query[:, 3, 1, 2] = torch.nan
    reads = [vosops.memory_read(query, key, value, **options, top_k=top_k, return_lse=True)]
    if top_k is not None:
        chosen = vosops.memory_select(query, key, top_k, **options)
        halves = [value[..., :9], value[..., 9:]]
        reads.append((vosops.memory_gather(chosen, halves), chosen.lse))
    for out, lse in reads:
        assert out[..., 1, 2].isnan().all() and out.isnan().sum() == out[..., 1, 2].numel()
        assert lse[:, 1, 2].isnan().all() and lse.isnan().sum() == 1


def test_a_nan_query_stays_nan_in_merged_reads():
    (query, key, value), _ = make()
    query[:, :, 0, 0] = torch.nan
    out, lse = vosops.merge_reads(*zip(*[vosops.memory_read(query, key, value, return_lse=True)] * 2))
    for each in (out[0], lse):
        assert each[:, 0, 0].isnan().all() and each.isnan().sum() == each[:, 0, 0].numel()


@pytest.mark.parametrize("options", [{"prior": 2.0}, {}], ids=str)
def test_autocast_does_not_reach_plain_products(options, implementation):
    tensors, _ = make()
    expected = vosops.memory_read(*tensors, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = vosops.memory_read(*tensors, **options)
    assert torch.equal(expected, got)


def test_autocast_does_not_reach_second_derivatives():
    tensors = [t.requires_grad_() for t in make()[0]]

    def second():
        grads = torch.autograd.grad(vosops.memory_read(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    expected = second()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = second()
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_prior_of_no_pixels():
    (query, key, value), _ = make(q=(0, 5))
    assert vosops.memory_read(query, key, value, prior=2.0).shape == (1, 5, 0, 5)


@pytest.mark.filterwarnings("error")
def test_vmap_of_usage_needs_no_loop():
    (query, key, value), _ = make(n=2)
    both = torch.vmap(lambda *t: vosops.memory_read(*(x[None] for x in t), return_usage=True)[1])(
        query, key, value
    )
    torch.testing.assert_close(both[:, 0], vosops.memory_read(query, key, value, return_usage=True)[1])


# ---- One graph for memories and queries of every size.


@pytest.mark.parametrize(
    "options",
    [
        {"similarity": "l2", "return_usage": True, "return_lse": True},
        {"similarity": "l2", "top_k": 3, "return_usage": True},
        {"valid": (9, 10**6)},
        {"prior": 2.0},
    ],
    ids=str,
)
def test_compiled_once_for_a_growing_memory(options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    read = torch.compile(
        lambda q, k, v: vosops.memory_read(q, k, v, **options), backend=counter, fullgraph=True
    )
    for frames, height in ((2, 3), (3, 3), (5, 4), (6, 7)):
        tensors = [
            torch.randn(1, 4, height, 5),
            torch.randn(1, 4, frames, 3, 3),
            torch.randn(1, 2, frames, 3, 3),
        ]
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(read(*tensors), vosops.memory_read(*tensors, **options))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
def test_exported_for_a_memory_of_any_size(strict):
    class Read(torch.nn.Module):
        def forward(self, query, key, value):
            return vosops.memory_read(query, key, value, similarity="l2", return_usage=True, top_k=None)

    size = torch.export.Dim("M", min=2, max=4096)
    shapes = {"query": None, "key": {2: size}, "value": {2: size}}
    tensors = torch.randn(1, 4, 5), torch.randn(1, 4, 18), torch.randn(1, 2, 18)
    program = torch.export.export(Read(), tensors, dynamic_shapes=shapes, strict=strict).module()
    longer = tensors[0], torch.randn(1, 4, 50), torch.randn(1, 2, 50)
    torch.testing.assert_close(program(*longer), Read()(*longer))
