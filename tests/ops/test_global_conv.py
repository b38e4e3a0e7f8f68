"""global_conv: its core ops on every backend, the public op, the module, and RGMP's original."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vosops
from tests.effort import examples
from tests.ops.backends import ALL, CPU, EVERY_BACKEND
from tests.ops.matching import LAYOUTS, embeddings
from vosops import nn
from vosops.ops.global_conv import flipped
from vosops.reference.global_conv import (
    global_conv_merge_core,
    global_conv_split_core,
    global_conv_weight_core,
)

LINES = {"winograd": 2e-5, "exact": 2e-6, "ieee": 2e-6}
"""Precision -> the greatest error of a float32 line convolution relative to the greatest value of its result."""

ROUNDING = {torch.float32: 0.0, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# (N,C,H,W), output channels of the first and second convolution, (kh,kw). The channels of the first cases are enough
# for Winograd arithmetic, those of the others are not.
CASES = {
    "k7": ((1, 32, 15, 27), (48, 32), (7, 7)),
    "k7, odd channels": ((2, 17, 13, 20), (33, 19), (7, 7)),
    "k3 and k5": ((1, 21, 12, 17), (16, 40), (3, 5)),
    "k9": ((1, 16, 23, 31), (16, 16), (9, 9)),
    "several blocks of channels and tiles": ((1, 300, 31, 37), (20, 35), (7, 7)),
    "long lines": ((1, 16, 2, 1300), (16, 16), (1, 7)),
    "k11": ((1, 16, 12, 14), (16, 16), (11, 11)),
    "k1": ((1, 20, 6, 5), (18, 20), (1, 1)),
    "few channels": ((2, 3, 9, 11), (1, 5), (7, 7)),
    "kernel larger than the map": ((1, 16, 3, 4), (16, 17), (7, 9)),
    "one pixel": ((1, 16, 1, 1), (16, 16), (7, 7)),
    "second is empty": ((1, 18, 9, 10), (17, 0), (7, 7)),
}


ON_GPUS = ("few channels", "one pixel")
"""Cases of the kernels that are interpreted or emulated where there is no GPU; tests/emulator has their corners."""


def every_backend_and_case(cases, dtypes=None):
    """Parametrizes backend, dtype and case: all `cases` on the CPU, on others those that are small."""
    rows = [
        pytest.param(backend, dtype, case, id=f"{backend}-{str(dtype).removeprefix('torch.')}-{case}")
        for backend in ALL
        for dtype in dtypes or backend.dtypes
        for case in (cases if backend is CPU else [case for case in ON_GPUS if case in cases])
    ]
    return pytest.mark.parametrize(("backend", "dtype", "case"), rows, indirect=["backend"])


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def core(backend, op):
    try:
        return backend.op(f"global_conv_{op}")
    except AttributeError:
        pytest.skip(f"{backend} has no kernels of global_conv yet")


LOW_AND_FLOAT = tuple(dtype for dtype in CPU.dtypes if dtype != torch.float64)


def precisions(backend, dtype):
    if backend is not CPU:
        return ("ieee",)
    return ("exact",) if dtype == torch.float64 else ("exact", "winograd")


def split_problem(case, dtype=torch.float32, device="cpu", layout="contiguous"):
    (n, c, h, w), (m1, m2), (kh, kw) = CASES[case]
    scale = (2 / (c * max(kh, kw))) ** 0.5
    tensors = [embeddings((n, c, h, w), dtype, layout)]
    tensors += [
        normal(m1, c, kh, 1, dtype=dtype, scale=scale),
        normal(m2, c, 1, kw, dtype=dtype, scale=scale),
    ]
    tensors += [normal(m1, dtype=dtype), normal(m2, dtype=dtype), normal(1, m1 + m2, h, w, dtype=dtype)]
    return [t.to(device) for t in tensors]


def merge_problem(case, dtype=torch.float32, device="cpu", layout="contiguous"):
    (n, m, h, w), (c1, c2), (kh, kw) = CASES[case]
    scale = (1 / (m * max(kh, kw))) ** 0.5
    tensors = [embeddings((n, c1 + c2, h, w), dtype, layout)]
    tensors += [
        normal(m, c1, 1, kw, dtype=dtype, scale=scale),
        normal(m, c2, kh, 1, dtype=dtype, scale=scale),
    ]
    return [t.to(device) for t in (*tensors, normal(m, dtype=dtype))]


def wide(tensors):
    return [None if t is None else t.detach().cpu().double() for t in tensors]


def assert_near(got, want, precision, dtype=torch.float32, summed=1):
    """`summed`: how many convolutions, rounded each, are in the result."""
    assert got.dtype == dtype and got.shape == want.shape
    error = LINES[precision] if dtype == torch.float32 else ROUNDING[dtype]
    bound = summed * error * max(1e-30, want.abs().max().item() if want.numel() else 0)
    assert (got.cpu().double() - want).abs().nan_to_num(nan=torch.inf).le(bound).all()


# ---- The core of every backend


@every_backend_and_case(CASES)
def test_core_split(backend, dtype, case):
    problem = split_problem(case, dtype, backend.device)
    for precision in precisions(backend, dtype):
        for arguments in (problem, [*problem[:3], None, None, None], [*problem[:4], None, None]):
            want = global_conv_split_core(*wide(arguments))
            assert_near(core(backend, "split")(*arguments, precision), want, precision, dtype, summed=2)


@every_backend_and_case(CASES)
def test_core_merge(backend, dtype, case):
    problem = merge_problem(case, dtype, backend.device)
    for precision in precisions(backend, dtype):
        for arguments in (problem, [*problem[:3], None]):
            want = global_conv_merge_core(*wide(arguments))
            assert_near(core(backend, "merge")(*arguments, precision), want, precision, dtype, summed=3)


WEIGHTS = [case for case in CASES if case != "second is empty"]


@every_backend_and_case(WEIGHTS)
def test_core_weight(backend, dtype, case):
    x, first, second, *_ = split_problem(case, dtype, backend.device)
    for weight in (first, second):
        grad = normal(x.shape[0], weight.shape[0], *x.shape[2:], dtype=dtype).to(backend.device)
        for precision in precisions(backend, dtype):
            got = core(backend, "weight")(x, grad, *weight.shape[2:], precision)
            want = global_conv_weight_core(*wide([x, grad]), *weight.shape[2:])
            assert_near(got, want, precision, dtype)


INPUT_GRADIENTS = {
    "split_input": (split_problem, global_conv_split_core),
    "merge_input": (merge_problem, global_conv_merge_core),
}
"""Ops of the CPU -> the problem and the core whose gradient of x they are."""


def input_gradient(op, x, first, second, grad):
    """The gradient of x by differentiating the reference in float64."""
    core = INPUT_GRADIENTS[op][1]
    x, first, second, grad = wide([x, first, second, grad])
    biases = (None, None, None) if op == "split_input" else (None,)
    return torch.autograd.grad(core(x.requires_grad_(), first, second, *biases), x, grad)[0]


def input_problem(op, case, dtype, layout="contiguous"):
    """The arguments of an input gradient, and the gradient of the x that it is for."""
    x, first, second, *_ = INPUT_GRADIENTS[op][0](case, dtype)
    channels = first.shape[0] + second.shape[0] if op == "split_input" else first.shape[0]
    grad = embeddings((x.shape[0], channels, *x.shape[2:]), dtype, layout)
    if layout != "contiguous":
        first, second = (embeddings(weight.shape, dtype, layout) for weight in (first, second))
    return (grad, first, second), input_gradient(op, x, first, second, grad)


@pytest.mark.parametrize("op", INPUT_GRADIENTS)
@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_core_input_gradient(op, dtype, case):
    arguments, want = input_problem(op, case, dtype)
    for precision in precisions(CPU, dtype):
        assert_near(core(CPU, op)(*arguments, precision), want, precision, dtype, summed=3)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", ["k7", "k7, odd channels", "few channels"])
def test_core_gradients_read_any_stride(case, layout):
    for op in INPUT_GRADIENTS:
        arguments, want = input_problem(op, case, torch.float32, layout)
        for precision in ("exact", "winograd"):
            result = core(CPU, op)(*arguments, precision)
            assert_near(result, want, precision, summed=3)
            if layout == "channels_last":
                assert result.is_contiguous(memory_format=torch.channels_last)
    (n, c, h, w), (m, _), (kh, kw) = CASES[case]
    x, grad = (embeddings((n, channels, h, w), torch.float32, layout) for channels in (c, m))
    for kernel in ((kh, 1), (1, kw)):
        want = global_conv_weight_core(*wide([x, grad]), *kernel)
        for precision in ("exact", "winograd"):
            assert_near(core(CPU, "weight")(x, grad, *kernel, precision), want, precision)


@pytest.mark.parametrize("dtype", LOW_AND_FLOAT, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_core_weight_sums_several_rounds(dtype):
    x, grad = (
        normal(1, 20, 180, 240, dtype=dtype),
        normal(1, 17, 180, 240, dtype=dtype),
    )  # 7200 tiles in a row
    for kernel in ((7, 1), (1, 7)):
        got = core(CPU, "weight")(x, grad, *kernel, "winograd")
        assert_near(got, global_conv_weight_core(*wide([x, grad]), *kernel), "winograd", dtype)


def test_core_weight_error_stays_below_its_bound_over_many_pixels():
    x, grad = normal(2, 256, 60, 107).relu(), normal(2, 64, 60, 107)
    for kernel in ((7, 1), (1, 7)):
        got = core(CPU, "weight")(x, grad, *kernel, "winograd")
        want = global_conv_weight_core(x.double(), grad.double(), *kernel)
        error = got.double() - want
        assert 0 < error.square().mean().sqrt() < 1e-5 * want.square().mean().sqrt()
        assert error.abs().max() < 2e-5 * want.abs().max()


def test_core_exact_gradients_err_at_most_twice_as_much_as_pytorchs():
    x, first, second, *_ = split_problem("k7, odd channels")
    grad = normal(2, 33 + 19, 13, 20)
    halves = grad[:, :33], grad[:, 33:]
    inputs = [t.requires_grad_() for t in (x, first, second)]
    eager = torch.autograd.grad(global_conv_split_core(*inputs, None, None, None), inputs, grad)
    exact = [core(CPU, "split_input")(grad, first, second, "exact")]
    exact += [
        core(CPU, "weight")(x, half, *weight.shape[2:], "exact")
        for half, weight in zip(halves, (first, second), strict=True)
    ]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(global_conv_split_core(*doubles, None, None, None), doubles, grad.double())
    for ours, theirs, want in zip(exact, eager, wanted, strict=True):
        errors = [(t.detach().double() - want).abs().max() for t in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * want.abs().max()


@settings(max_examples=examples(25), deadline=None)
@given(
    n=st.integers(1, 3), c=st.integers(1, 60), h=st.integers(1, 30), w=st.integers(1, 30), m=st.integers(1, 40),
    k=st.sampled_from(range(1, 16, 2)), tall=st.booleans(), layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    precision=st.sampled_from(["exact", "winograd"]),
)  # fmt: skip
def test_core_gradients_on_random_problems(n, c, h, w, m, k, tall, layout, dtype, precision):
    kernel = (k, 1) if tall else (1, k)
    x, grad = embeddings((n, c, h, w), dtype, layout), embeddings((n, m, h, w), dtype, layout)
    weight = embeddings((m, c, *kernel), dtype, layout)
    got = core(CPU, "weight")(x, grad, *kernel, precision)
    assert_near(got, global_conv_weight_core(*wide([x, grad]), *kernel), precision, dtype)
    got = core(CPU, "split_input")(grad, weight, weight[:0], precision)
    want = input_gradient("split_input", x, weight, weight[:0], grad)
    assert_near(got, want, precision, dtype, summed=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend_and_case(["k7", "k7, odd channels", "few channels"], [torch.float32])
def test_core_reads_any_stride(backend, dtype, case, layout):
    for op, problem in (("split", split_problem), ("merge", merge_problem)):
        arguments = problem(case, layout=layout)
        for i in (1, 2):
            arguments[i] = embeddings(arguments[i].shape, torch.float32, layout)
        if op == "split":
            arguments[5] = embeddings(arguments[5].shape, torch.float32, layout)
        arguments = [t.to(backend.device) for t in arguments]
        want = {"split": global_conv_split_core, "merge": global_conv_merge_core}[op](*wide(arguments))
        for precision in precisions(backend, torch.float32):
            assert_near(core(backend, op)(*arguments, precision), want, precision, summed=3)


@EVERY_BACKEND
def test_core_writes_channels_last_where_it_reads_it(backend):
    for op, problem in (("split", split_problem), ("merge", merge_problem)):
        x, *others = problem("k7" if backend is CPU else "few channels", device=backend.device)
        last = x.contiguous(memory_format=torch.channels_last)
        for precision in precisions(backend, torch.float32):
            kernel = core(backend, op)
            assert kernel(x, *others, precision).is_contiguous()
            result = kernel(last, *others, precision)
            assert result.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(result, kernel(x, *others, precision))


@EVERY_BACKEND
@pytest.mark.parametrize("empty", ["batch", "rows"])
def test_core_empty(backend, empty):
    for op, problem in (("split", split_problem), ("merge", merge_problem)):
        x, *others = problem("few channels", device=backend.device)
        some = slice(0, 0)
        x = x[some] if empty == "batch" else x[:, :, some]
        if op == "split":
            others[4] = others[4] if empty == "batch" else others[4][:, :, some]
        for precision in precisions(backend, torch.float32):
            result = core(backend, op)(x, *others, precision)
            assert result.shape == (x.shape[0], result.shape[1], *x.shape[2:])
    grad = x[:, :1].expand(-1, 5, -1, -1)
    weight = core(backend, "weight")(x, grad, 7, 1, precisions(backend, torch.float32)[0])
    assert weight.shape == (5, x.shape[1], 7, 1) and (weight == 0).all()


@EVERY_BACKEND
def test_core_every_output_is_written_and_nothing_else_is_read(backend, deterministic):
    for op, problem in (("split", split_problem), ("merge", merge_problem)):
        for case in (
            ("k7, odd channels", "several blocks of channels and tiles") if backend is CPU else ON_GPUS
        ):
            x, *others = problem(case, device=backend.device, layout="slice")  # NaN between the values
            for precision in precisions(backend, torch.float32):
                assert core(backend, op)(x, *others, precision).isfinite().all()


@pytest.mark.parametrize("op", ["split", "merge"])
def test_core_does_not_depend_on_the_number_of_threads(op):
    arguments = {"split": split_problem, "merge": merge_problem}[op]("several blocks of channels and tiles")
    assert_same_with_any_threads(lambda: core(CPU, op)(*arguments, "winograd"))


def test_core_gradients_do_not_depend_on_the_number_of_threads():
    case = "several blocks of channels and tiles"
    for op in INPUT_GRADIENTS:
        arguments, _ = input_problem(op, case, torch.float32)
        assert_same_with_any_threads(lambda op=op, arguments=arguments: core(CPU, op)(*arguments, "winograd"))
    x, grad = normal(1, 100, 31, 37), normal(1, 200, 31, 37)
    assert_same_with_any_threads(lambda: core(CPU, "weight")(x, grad, 1, 7, "winograd"))


def assert_same_with_any_threads(compute):
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(compute())
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_core_winograd_error_stays_below_its_bound_over_many_channels():
    x, first, second = normal(1, 2048, 15, 27).relu(), normal(32, 2048, 7, 1), normal(32, 2048, 1, 7)
    got = core(CPU, "split")(x, first, second, None, None, None, "winograd")
    want = global_conv_split_core(x.double(), first.double(), second.double(), None, None, None)
    error = got.double() - want
    assert 0 < error.square().mean().sqrt() < 1e-5 * want.square().mean().sqrt()
    assert error.abs().max() < 2e-5 * want.abs().max()


def test_core_winograd_confines_a_nan_to_its_tiles():
    x, first, second, *_ = split_problem("k7")
    x[0, 3, 7, 13] = torch.nan
    for precision in ("exact", "winograd"):
        left, right = core(CPU, "split")(x, first, second, None, None, None, precision).split([48, 32], 1)
        assert left[..., 4:11, 13].isnan().all() and right[..., 7, 10:17].isnan().all()
        reach = 6 if precision == "winograd" else 0  # a tile has at most six results
        clean = torch.ones(15, 27, dtype=torch.bool)
        clean[max(0, 4 - reach) : 11 + reach, 13] = False
        assert left[..., clean].isfinite().all()
        clean[:] = True
        clean[7, 10 - reach : 17 + reach] = False
        assert right[..., clean].isfinite().all()


@settings(max_examples=examples(40), deadline=None)
@given(
    n=st.integers(0, 2), c=st.integers(1, 40), h=st.integers(1, 30), w=st.integers(1, 30), m1=st.integers(0, 40),
    m2=st.integers(1, 40), kh=st.sampled_from([1, 3, 5, 7, 9, 13]), kw=st.sampled_from([1, 3, 5, 7, 9, 13]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), layout=st.sampled_from(LAYOUTS),
    precision=st.sampled_from(["exact", "winograd"]),
)  # fmt: skip
def test_core_on_random_problems(n, c, h, w, m1, m2, kh, kw, dtype, layout, precision):
    x, middle = embeddings((n, c, h, w), dtype, layout), embeddings((n, m1 + m2, h, w), dtype, layout)
    first, second = embeddings((m1, c, kh, 1), dtype, layout), embeddings((m2, c, 1, kw), dtype, layout)
    addend = embeddings((1, m1 + m2, h, w), dtype, layout)
    split = (x, first, second, None, normal(m2, dtype=dtype), addend)
    got = torch.ops.vosops.global_conv_split(*split, precision)
    assert_near(got, global_conv_split_core(*wide(split)), precision, dtype, summed=3)
    merge = (middle, flipped(first), flipped(second), normal(c, dtype=dtype))
    got = torch.ops.vosops.global_conv_merge(*merge, precision)
    assert_near(got, global_conv_merge_core(*wide(merge)), precision, dtype, summed=4)


# ---- The public op and the module


@pytest.fixture
def problem():
    """A small problem in float64 with gradients: x (2,3,4,5) and the eight parameters, kernel (3,5)."""
    shapes = [(2, 3, 4, 5), (2, 3, 3, 1), (2, 2, 1, 5), (3, 3, 1, 5), (2, 3, 3, 1), (2,), (2,), (3,), (2,)]
    return [normal(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def conv(x, l1, l2, r1, r2, bl1=None, bl2=None, br1=None, br2=None, **options):
    return vosops.global_conv(
        x, l1, l2, r1, r2, l1_bias=bl1, l2_bias=bl2, r1_bias=br1, r2_bias=br2, **options
    )


def module(channels=34, out=18, **options):
    return nn.GlobalConv2d(channels, out, **{"mid_channels": 20, **options})


@pytest.mark.parametrize("biases", range(16))
def test_is_the_reference_with_any_biases(problem, biases):
    names = ("l1_bias", "l2_bias", "r1_bias", "r2_bias")
    given = {name: problem[5 + i] for i, name in enumerate(names) if biases >> i & 1}
    ours = vosops.global_conv(*problem[:5], **given)
    torch.testing.assert_close(ours, vosops.reference.global_conv(*problem[:5], **given))


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_prepared_reference_is_half_of_the_whole(name):
    gc, target, reference = module(), normal(3, 20, 15, 27), normal(1, 14, 15, 27)
    whole = gc.double()(torch.cat([target, reference.expand(3, -1, -1, -1)], 1).double())
    gc.float()
    with vosops.use_backend(name):
        assert_near(gc(target, gc.prepare(reference)).detach(), whole.detach(), "winograd", summed=2)


def test_prepared_reference_has_gradients(problem):
    x, *parameters = problem
    target, reference = x.detach()[:, :2].requires_grad_(), x.detach()[:1, 2:].requires_grad_()

    def op(target, reference, l1, l2, r1, r2, bl1, bl2, br1, br2):
        prepared = vosops.global_conv_prepare(reference, l1, r1, l1_bias=bl1, r1_bias=br1)
        return conv(target, l1, l2, r1, r2, bl2=bl2, br2=br2, prepared=prepared)

    inputs = (target, reference, *parameters)
    whole = conv(torch.cat([target, reference.expand(2, -1, -1, -1)], 1), *parameters)
    torch.testing.assert_close(op(*inputs), whole)
    grads = [torch.autograd.grad(y.sin().sum(), inputs) for y in (op(*inputs), whole)]
    torch.testing.assert_close(*grads)


def test_first_and_second_derivatives(problem):
    assert torch.autograd.gradcheck(conv, problem, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(conv, problem, fast_mode=True)


def test_second_derivatives_of_the_weight_gradient():
    x, grad = (normal(2, c, 4, 5, dtype=torch.float64).requires_grad_() for c in (3, 2))
    for kernel in ((3, 1), (1, 5)):

        def op(x, grad, kernel=kernel):
            return torch.ops.vosops.global_conv_weight(x, grad, *kernel, "exact")

        assert torch.autograd.gradcheck(op, (x, grad))
        assert torch.autograd.gradgradcheck(op, (x, grad))


def test_second_derivatives_of_the_input_gradients(problem):
    _, l1, l2, r1, r2, *_ = problem
    ops, grad = torch.ops.vosops, normal(2, 2, 4, 5, dtype=torch.float64).requires_grad_()
    cotangent = normal(2, 5, 4, 5, dtype=torch.float64).requires_grad_()
    for op, inputs in (
        (ops.global_conv_split_input, (cotangent, l1, r1)),
        (ops.global_conv_merge_input, (grad, l2, r2)),
    ):
        assert torch.autograd.gradcheck(lambda *a, op=op: op(*a, "exact"), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *a, op=op: op(*a, "exact"), inputs, fast_mode=True)
        torch.library.opcheck(op.default, (*inputs, "exact"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_winograd_gradients(layout):
    gc = module()
    x = embeddings((2, 34, 15, 27), torch.float32, layout).requires_grad_()
    got = gc(x)
    grad = torch.randn_like(got)
    grads = torch.autograd.grad(got, (x, *gc.parameters()), grad)
    gc.double()
    x64 = x.detach().double().requires_grad_()
    want = vosops.global_conv(
        x64, gc.conv_l1.weight, gc.conv_l2.weight, gc.conv_r1.weight, gc.conv_r2.weight,
        l1_bias=gc.conv_l1.bias, l2_bias=gc.conv_l2.bias, r1_bias=gc.conv_r1.bias, r2_bias=gc.conv_r2.bias,
    )  # fmt: skip
    assert_near(got.detach(), want.detach(), "winograd", summed=2)
    for have, expected in zip(
        grads, torch.autograd.grad(want, (x64, *gc.parameters()), grad.double()), strict=True
    ):
        assert_near(have, expected, "winograd", summed=2)


def test_changed_weights_count_at_once():
    gc, x = module().requires_grad_(False), normal(1, 34, 12, 13)
    before = gc(x)
    gc.conv_l1.weight.data.mul_(2)  # not seen by the tensor's version counter
    gc.conv_l2.weight.data.div_(2)
    gc.conv_l1.bias.data.mul_(2)
    torch.testing.assert_close(gc(x), before)
    gc.conv_r2.weight.numpy()[:] = 0
    gc.conv_l2.weight.numpy()[:] = 0
    assert torch.equal(gc(x), (gc.conv_l2.bias + gc.conv_r2.bias)[None, :, None, None].expand_as(before))


def test_a_module_that_leaves_the_cpu_keeps_its_weights_channels_last():
    gc = module(12, 8)
    weights = [conv.weight for conv in gc.children()]
    assert all(weight.is_contiguous() for weight in weights)
    for elsewhere in (gc.to("meta"), module(12, 8, device="meta"), gc.half()):
        for conv in elsewhere.children():
            assert isinstance(conv.weight, torch.nn.Parameter)
            assert conv.weight.is_contiguous(memory_format=torch.channels_last)
            assert not conv.weight.is_contiguous()


def test_precision_is_chosen_as_documented(deterministic):
    gc, x = module().requires_grad_(False), normal(1, 34, 12, 13)
    exact = vosops.reference.global_conv(
        x, gc.conv_l1.weight, gc.conv_l2.weight, gc.conv_r1.weight, gc.conv_r2.weight,
        l1_bias=gc.conv_l1.bias, l2_bias=gc.conv_l2.bias, r1_bias=gc.conv_r1.bias, r2_bias=gc.conv_r2.bias,
    )  # fmt: skip
    chosen = gc(x)  # under torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)
    results = {}
    for precision in (None, "winograd", "exact", "ieee", "tf32"):
        gc.precision = precision
        results[precision] = gc(x)
    assert torch.equal(results[None], results["winograd"])
    assert not torch.equal(results["exact"], results["winograd"])
    for same in (chosen, results["ieee"], results["tf32"]):
        assert torch.equal(same, results["exact"])
    torch.testing.assert_close(results["exact"], exact, rtol=1e-6, atol=1e-5)


def test_opcheck(problem):
    x, l1, l2, r1, r2, b1, b2, *_ = problem
    ops = torch.ops.vosops
    addend = normal(1, 5, 4, 5, dtype=torch.float64).requires_grad_()
    for x in (x, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        torch.library.opcheck(ops.global_conv_split.default, (x, l1, r1, b1, None, addend, "exact"))
        middle = normal(2, 5, 4, 5, dtype=torch.float64).requires_grad_()
        torch.library.opcheck(ops.global_conv_merge.default, (middle, l2, r2, b2, "exact"))
        torch.library.opcheck(ops.global_conv_weight.default, (x, middle, 3, 1, "exact"))


def test_compiles_without_graph_breaks():
    gc, x = module(), normal(1, 34, 12, 13).requires_grad_()
    compiled = torch.compile(gc, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gc(x))
    grads = [torch.autograd.grad(f(x).sin().sum(), (x, *gc.parameters())) for f in (compiled, gc)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_exports():
    gc, x = module().requires_grad_(False), normal(1, 34, 12, 13)
    program = torch.export.export(gc, (x,))
    assert "vosops.global_conv_split" in str(program.graph)
    torch.testing.assert_close(program.module()(x), gc(x))


def test_vmap(problem):
    x, *parameters = (t.detach() for t in problem)
    several = torch.stack([x, x + 1, x - 1])
    got = torch.vmap(lambda each: conv(each, *parameters))(several)
    torch.testing.assert_close(got, torch.stack([conv(each, *parameters) for each in several]))
    weights = torch.stack([parameters[0], -parameters[0]])
    got = torch.vmap(lambda l1: conv(x, l1, *parameters[1:]))(weights)
    torch.testing.assert_close(got, torch.stack([conv(x, l1, *parameters[1:]) for l1 in weights]))
    prepared = normal(3, 1, 5, 4, 5, dtype=torch.float64)
    got = torch.vmap(lambda each: conv(x, *parameters[:4], prepared=each))(prepared)
    torch.testing.assert_close(
        got, torch.stack([conv(x, *parameters[:4], prepared=each) for each in prepared])
    )


def test_forward_mode_is_refused(problem):
    x, *parameters = (t.detach() for t in problem)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: conv(x, *parameters), (x,), (x,))


def test_autocast_casts_as_pytorch_convolutions():
    gc, x = module().requires_grad_(False), normal(1, 34, 12, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gc(x)
        mixed = gc(x.bfloat16())
    assert got.dtype == torch.bfloat16 and torch.equal(got, mixed)
    assert torch.equal(got, gc.bfloat16()(x.bfloat16()))


def test_inference_mode_and_training_agree():
    gc, x = module(), normal(1, 34, 12, 13)
    with torch.inference_mode():
        inferred = gc(x)
    assert torch.equal(inferred, gc(x))


def test_golden_rgmp(golden):
    data = golden("rgmp_gc.pt")["gc_small"]
    gc = nn.GlobalConv2d(data["inplanes"], data["planes"], (data["kh"], data["kw"]))
    gc.load_state_dict(data["params"])
    x = data["x"].clone().requires_grad_()
    y = gc(x)
    assert_near(y.detach(), data["y64"], "winograd", summed=2)
    y.backward(data["grad_y"])
    assert_near(x.grad, data["grad_x"].double(), "winograd", summed=2)
    for name, parameter in gc.named_parameters():
        assert_near(parameter.grad, data["grad_params"][name].double(), "winograd", summed=2)


WRONG = [
    (lambda a: {"x": a["x"][0]}, ValueError, r"x must have shape \(N, C, H, W\)"),
    (lambda a: {"x": "map"}, TypeError, "x must be a tensor, got str"),
    (lambda a: {"x": a["x"].long()}, TypeError, "x must be float32"),
    (lambda a: {"x": a["x"][:, :0]}, ValueError, "x must have at least one channel"),
    (lambda a: {"x": a["x"][:, :3]}, ValueError, "l1_weight must read the 3 channels of x"),
    (lambda a: {"l1_weight": None}, TypeError, "l1_weight must be a tensor, got NoneType"),
    (lambda a: {"l1_weight": a["l1_weight"].half()}, TypeError, "l1_weight must have the dtype of x"),
    (lambda a: {"l1_weight": a["r1_weight"]}, ValueError, r"l1_weight must have shape \(M, C, kh, 1\)"),
    (
        lambda a: {"l1_weight": a["l1_weight"][:, :, :2]},
        ValueError,
        "l1_weight must have an odd kernel size, got 2",
    ),
    (lambda a: {"l2_weight": a["l2_weight"][:, :2]}, ValueError, "l2_weight must have shape"),
    (lambda a: {"r2_weight": a["r2_weight"][:, :2]}, ValueError, "r2_weight must have shape"),
    (lambda a: {"l1_bias": a["x"]}, ValueError, r"l1_bias must have shape \(5\)"),
    (lambda a: {"r2_bias": torch.zeros(4).to("meta")}, ValueError, "r2_bias must be on the device of x"),
    (lambda a: {"prepared": torch.zeros(3, 11, 8, 9)}, ValueError, "prepared must have shape"),
    (lambda a: {"prepared": 3}, TypeError, "prepared must be a tensor, got int"),
    (
        lambda a: {"prepared": torch.zeros(1, 11, 8, 9), "l1_bias": torch.zeros(5)},
        ValueError,
        "l1_bias and r1_bias must be None with prepared",
    ),
    (
        lambda a: {"prepared": torch.zeros(1, 11, 8, 9), "x": torch.zeros(2, 9, 8, 9)},
        ValueError,
        "x must have at most the 4 channels of l1_weight, got 9",
    ),
    (lambda a: {"precision": "half"}, ValueError, "precision must be None or one of exact, winograd"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_wrong_input_is_named(change, error, message):
    arguments = {
        "x": torch.zeros(2, 4, 8, 9), "l1_weight": torch.zeros(5, 4, 7, 1), "l2_weight": torch.zeros(3, 5, 1, 5),
        "r1_weight": torch.zeros(6, 4, 1, 5), "r2_weight": torch.zeros(3, 6, 7, 1),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        vosops.global_conv(**{**arguments, **change(arguments)})


def test_wrong_preparation_and_modules_are_named():
    l1, r1 = torch.zeros(5, 4, 7, 1), torch.zeros(6, 4, 1, 5)
    with pytest.raises(ValueError, match="reference must have shape"):
        vosops.global_conv_prepare(torch.zeros(4, 8, 9), l1, r1)
    with pytest.raises(ValueError, match="at least the 5 of reference, got 4 and 4"):
        vosops.global_conv_prepare(torch.zeros(1, 5, 8, 9), l1, r1)
    with pytest.raises(ValueError, match="precision must be None or 'exact' with float64, got 'winograd'"):
        vosops.global_conv_prepare(
            torch.zeros(1, 4, 8, 9).double(), l1.double(), r1.double(), precision="winograd"
        )
    for size in (4, (3, 3, 3), (7, 0)):
        with pytest.raises(ValueError, match="kernel_size must be an odd int or two of them"):
            nn.GlobalConv2d(8, 8, size)


def test_explains_what_serves_a_call():
    gc = module()
    weights = (gc.conv_l1.weight, gc.conv_l2.weight, gc.conv_r1.weight, gc.conv_r2.weight)
    assert "global_conv: cpp" in vosops.explain(vosops.global_conv, normal(1, 34, 12, 13), *weights)
