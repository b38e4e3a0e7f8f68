"""global_conv on the matrix engine or its twin: direct sums of bfloat16 and float16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vosops  # noqa: F401 - loads the library
from tests.effort import examples
from tests.ops.matching import LAYOUTS, embeddings
from vosops.reference.global_conv import global_conv_merge_core, global_conv_split_core

ON_AMX = torch.ops.vosops.cpu_capability().startswith("amx") and not torch.ops.vosops.amx_refusal()
pytestmark = pytest.mark.skipif(not ON_AMX, reason="needs the library for AMX, or its twin")

OPS = torch.ops.vosops
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Dtype -> the relative error of rounding to it."""

SUMS = {torch.bfloat16: 1e-6, torch.float16: 1e-5}
"""Dtype -> the error of the sums beside it, of the greatest one: float32's, and the products of float16's last bits."""


def counted_by(call, *names):
    """Return a call's result, and how many sums of lines were served and left to other arithmetic meanwhile."""
    names = names or ("lines", "range")

    def counts():
        listed = (entry.split("=") for entry in OPS.amx_counts().split())
        found = {name: int(value) for name, value in listed}
        return tuple(found[f"global_conv.{name}"] for name in names)

    before = counts()
    result = call()
    return result, tuple(b - a for a, b in zip(before, counts(), strict=True))


def problem(n, c, h, w, m1, m2, kh, kw, dtype, layout="contiguous"):
    x = embeddings((n, c, h, w), dtype, layout)
    weights = torch.randn(m1, c, kh, 1), torch.randn(m2, c, 1, kw)
    biases = torch.randn(m1), torch.randn(m2)
    return x, *((t / (c * max(kh, kw)) ** 0.5).to(dtype) for t in weights), *(t.to(dtype) for t in biases)


def assert_rounded(got, want, dtype):
    """The error beside that of rounding the result is far below it."""
    assert got.dtype == dtype
    error = (got.double() - want).abs()
    assert (error <= HALF[dtype] * want.abs() + SUMS[dtype] * want.abs().max()).all()


@settings(deadline=None, max_examples=examples(25))
@given(
    n=st.integers(1, 3),
    c=st.integers(16, 80),
    h=st.integers(1, 9),
    w=st.integers(1, 40),
    m1=st.integers(16, 50),
    m2=st.integers(16, 35),
    kh=st.sampled_from([1, 3, 7, 11]),
    kw=st.sampled_from([1, 5, 9, 15]),
    dtype=st.sampled_from(list(HALF)),
    layout=st.sampled_from(LAYOUTS),
    weights_last=st.booleans(),
)
def test_results_are_the_rounded_sums(n, c, h, w, m1, m2, kh, kw, dtype, layout, weights_last):
    x, first, second, *biases = problem(n, c, h, w, m1, m2, kh, kw, dtype, layout)
    if weights_last:
        first, second = (t.contiguous(memory_format=torch.channels_last) for t in (first, second))
    split, served = counted_by(lambda: OPS.global_conv_split(x, first, second, *biases, None, "winograd"))
    assert served == (2, 0)
    wide = [t.double() for t in (x, first, second, *biases)]
    assert_rounded(split, global_conv_split_core(*wide, None), dtype)
    # The second stage, and the first one's gradient, sum both convolutions in the same tiles.
    grad = embeddings((n, m1 + m2, h, w), dtype, layout)
    gradient, served = counted_by(lambda: OPS.global_conv_split_input(grad, first, second, "winograd"))
    assert served == (1, 0)
    flipped = [t.double().flip(2, 3).transpose(0, 1) for t in (first, second)]
    assert_rounded(gradient, global_conv_merge_core(grad.double(), *flipped, None), dtype)


@settings(deadline=None, max_examples=examples(20))
@given(
    n=st.integers(1, 3),
    c=st.integers(16, 70),
    m=st.integers(16, 70),
    h=st.integers(1, 9),
    w=st.integers(1, 40),
    taps=st.sampled_from([1, 3, 7, 11]),
    along_width=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_gradients_of_weights_are_the_rounded_sums(n, c, m, h, w, taps, along_width, layout, seed):
    torch.manual_seed(seed)
    x, grad = (embeddings((n, channels, h, w), torch.bfloat16, layout) for channels in (c, m))
    kernel = (1, taps) if along_width else (taps, 1)
    got, served = counted_by(lambda: OPS.global_conv_weight(x, grad, *kernel, "winograd"), "weights")
    assert served == (1,) and got.is_contiguous()
    padding = tuple(size // 2 for size in kernel)
    want = torch.nn.grad.conv2d_weight(x.double(), (m, c, *kernel), grad.double(), padding=padding)
    assert_rounded(got, want, torch.bfloat16)


def test_other_gradients_of_weights_are_left_to_winograd():
    for dtype, channels in ((torch.float32, 16), (torch.float16, 16), (torch.bfloat16, 8)):
        x = embeddings((1, channels, 3, 9), dtype)
        _, served = counted_by(lambda x=x: OPS.global_conv_weight(x, x, 3, 1, "winograd"), "weights")
        assert served == (0,)


@pytest.mark.parametrize("along_width", [False, True])
def test_a_gradient_that_is_not_finite_stays_in_its_channels(along_width):
    x, grad = (embeddings((1, 32, 5, 30), torch.bfloat16) for _ in range(2))
    x[0, 3, 2, 7] = torch.nan
    grad[0, 5, 1, 1] = torch.inf
    kernel = (1, 3) if along_width else (3, 1)
    bad = ~OPS.global_conv_weight(x, grad, *kernel, "winograd").isfinite()
    assert bad[:, 3].any(1).all() and bad[5].any(1).all()
    bad[:, 3] = bad[5] = False
    assert not bad.any()


def test_many_channels_are_summed_in_chunks():
    arguments = problem(1, 700, 9, 20, 40, 33, 7, 7, torch.bfloat16)
    got, served = counted_by(lambda: OPS.global_conv_split(*arguments, None, "winograd"))
    assert served == (2, 0)
    want = global_conv_split_core(*(t.double() for t in arguments), None)
    assert_rounded(got, want, torch.bfloat16)


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 1])
def test_numbers_that_have_no_pieces_are_left_to_winograd(number, place):
    arguments = list(problem(1, 16, 5, 30, 16, 16, 3, 3, torch.float16))
    arguments[place].view(-1)[37] = number
    got, served = counted_by(lambda: OPS.global_conv_split(*arguments, None, "winograd"))
    assert served == (0, 1)
    want = global_conv_split_core(*(t.double() for t in arguments), None)
    assert not got[~want.isfinite()].isfinite().any()


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_what_is_not_finite_in_bfloat16_reaches_the_pixels_that_see_it(number):
    arguments = list(problem(1, 16, 5, 30, 16, 16, 3, 3, torch.bfloat16))
    arguments[0][0, 3, 2, 7] = number
    got = OPS.global_conv_split(*arguments, None, "winograd")
    want = global_conv_split_core(*(t.double() for t in arguments), None)
    assert torch.equal(got.isfinite(), want.isfinite())


def test_least_numbers_of_float16_are_kept():
    x, first, second, *_ = problem(1, 16, 4, 20, 16, 16, 3, 3, torch.float16)
    x.fill_(2**-24)
    first.fill_(1024)
    second.fill_(-1024)
    got = OPS.global_conv_split(x, first, second, None, None, None, "winograd")
    want = global_conv_split_core(x.double(), first.double(), second.double(), None, None, None)
    assert torch.equal(got.double(), want) and want.abs().min() > 0


@pytest.mark.parametrize("dtype", HALF)
def test_threads_change_nothing(dtype):
    arguments = problem(2, 96, 30, 54, 64, 48, 7, 7, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            split = OPS.global_conv_split(*arguments, None, "winograd")
            results.append((split, OPS.global_conv_weight(arguments[0], split, 1, 7, "winograd")))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
