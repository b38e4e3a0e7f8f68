"""conv_lstm in half precision on the matrix engine or its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vosops
from tests.effort import examples
from tests.ops.matching import LAYOUTS, embeddings
from vosops.reference.conv_lstm import conv_lstm_core

ON_AMX = torch.ops.vosops.cpu_capability().startswith("amx") and not torch.ops.vosops.amx_refusal()
pytestmark = pytest.mark.skipif(not ON_AMX, reason="needs the library for AMX, or its twin")

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Dtype -> the relative error of rounding to it."""


def counted_by(call):
    """Return a call's result, and how many calls were served and left to the steps meanwhile."""

    def counts():
        listed = (entry.split("=") for entry in torch.ops.vosops.amx_counts().split())
        found = {name: int(value) for name, value in listed}
        return found["conv_lstm.steps"], found["conv_lstm.range"]

    before = counts()
    result = call()
    return result, tuple(b - a for a, b in zip(before, counts(), strict=True))


def problem(n, t, c, hidden, h, w, dtype, layout="contiguous"):
    x = torch.stack([embeddings((n, c, h, w), dtype, layout) for _ in range(t)], 1)
    weight = (torch.randn(4 * hidden, c + hidden, 3, 3) / (9 * (c + hidden)) ** 0.5).to(dtype)
    state = tuple(embeddings((n, hidden, h, w), dtype, layout) for _ in range(2))
    return x, weight, torch.randn(4 * hidden).to(dtype), state


def assert_near(got, want, dtype, steps):
    """States lie within 1 or near it; each step rounds h and c."""
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.double() - want).abs().max() <= 2 * steps * HALF[dtype] * max(1, want.abs().max().item())


@settings(deadline=None, max_examples=examples(20))
@given(
    n=st.integers(1, 2),
    t=st.integers(1, 3),
    c=st.integers(1, 70),
    hidden=st.integers(1, 40),
    h=st.integers(1, 7),
    w=st.integers(1, 40),
    dtype=st.sampled_from(list(HALF)),
    layout=st.sampled_from(LAYOUTS),
    given_state=st.booleans(),
    biased=st.booleans(),
)
def test_states_are_those_of_the_definition(n, t, c, hidden, h, w, dtype, layout, given_state, biased):
    x, weight, bias, state = problem(n, t, c, hidden, h, w, dtype, layout)
    bias, state = bias if biased else None, state if given_state else None
    (output, (last, cell)), served = counted_by(lambda: vosops.conv_lstm(x, weight, bias, state))
    assert served == (1, 0)
    wide = [None if s is None else s.double() for s in (bias, *(state or (None, None)))]
    want, want_cell = conv_lstm_core(x.double(), [weight.double()], *wide, "convolution", 1.0)
    assert_near(output, want, dtype, t)
    assert_near(cell, want_cell, dtype, 2 * t)
    assert torch.equal(last, output[:, -1])


def test_changed_weights_are_packed_again():
    x, weight, bias, state = problem(1, 1, 16, 16, 5, 20, torch.bfloat16)
    first = vosops.conv_lstm(x, weight, bias, state)[0]
    weight.mul_(-1)
    assert not torch.equal(vosops.conv_lstm(x, weight, bias, state)[0], first)
    weight.mul_(-1)
    assert torch.equal(vosops.conv_lstm(x, weight, bias, state)[0], first)


@pytest.mark.parametrize("of_weight", [False, True])
def test_numbers_that_have_no_pieces_are_left_to_the_steps(of_weight):
    x, weight, bias, state = problem(1, 2, 16, 16, 5, 20, torch.float16)
    (weight if of_weight else x).view(-1)[7] = torch.inf
    (got, _), served = counted_by(lambda: vosops.conv_lstm(x, weight, bias, state))
    assert served == (0, 1)
    exact = vosops.conv_lstm(x, weight, bias, state, precision="exact")[0]
    torch.testing.assert_close(got, exact, equal_nan=True)


# ---- Gradients, of bfloat16.


def leaves_of(x, weight, bias, state, dtype=None):
    given = (x, weight, bias, *(state or (None, None)))
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in given]


def states_of(leaves, precision=None):
    """The hidden states and the last cell of x, weight, bias and state."""
    x, weight, bias, *state = leaves
    if x.dtype == torch.float64:
        return conv_lstm_core(x, [weight], bias, *state, "convolution", 1.0)
    state = None if state[0] is None else tuple(state)
    output, (_, cell) = vosops.conv_lstm(x, weight, bias, state, precision=precision)
    return output, cell


def gradients(leaves, directions, precision=None, **options):
    states = states_of(leaves, precision)
    wanted = [t for t in leaves if t is not None]
    return torch.autograd.grad(
        states, wanted, [d.to(s.dtype) for d, s in zip(directions, states, strict=True)], **options
    )


def error(got, want):
    return ((got.double() - want).square().mean() / want.square().mean().clamp_min(1e-30)).sqrt().item()


def assert_gradients_are_those_of_the_definition(arguments):
    """As near to float64 as PyTorch's convolutions, which round the gradients of states as well.

    Those of the gates are rounded, then the result: a gradient of few numbers may meet both at their worst.
    """
    n, t, _, h, w = arguments[0].shape
    hidden = arguments[1].shape[0] // 4
    directions = [torch.randn(n, t, hidden, h, w).bfloat16(), torch.randn(n, hidden, h, w).bfloat16()]
    got, served = counted_by(lambda: gradients(leaves_of(*arguments), directions))
    assert served == (1, 0)
    steps = gradients(leaves_of(*arguments), directions, "exact")
    want = gradients(leaves_of(*arguments, torch.float64), directions)
    for a, b, c in zip(got, steps, want, strict=True):
        assert a.dtype == torch.bfloat16 and a.shape == c.shape
        assert error(a, c) <= 1.5 * error(b, c) + 2 * HALF[torch.bfloat16]


@settings(deadline=None, max_examples=examples(15))
@given(
    n=st.integers(1, 2),
    t=st.integers(1, 4),
    c=st.integers(1, 70),
    hidden=st.integers(1, 40),
    h=st.integers(1, 7),
    w=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    given_state=st.booleans(),
    biased=st.booleans(),
)
def test_gradients_are_those_of_the_definition(n, t, c, hidden, h, w, layout, given_state, biased):
    x, weight, bias, state = problem(n, t, c, hidden, h, w, torch.bfloat16, layout)
    assert_gradients_are_those_of_the_definition(
        (x, weight, bias if biased else None, state if given_state else None)
    )


@pytest.mark.parametrize(("n", "t", "h", "w"), [(1, 3, 130, 130), (1, 5, 64, 101), (2, 3, 61, 100)])
@pytest.mark.parametrize("given_state", [False, True])
def test_weights_gather_their_gradient_over_groups_of_steps(n, t, h, w, given_state):
    """Of 16384 pixels: one step at a time, then two, the first alone; then one of a batch."""
    x, weight, bias, state = problem(n, t, 3, 5, h, w, torch.bfloat16)
    assert_gradients_are_those_of_the_definition((x, weight, bias, state if given_state else None))


def test_gradients_in_float16_come_from_the_steps():
    x, weight, bias, state = problem(1, 2, 16, 16, 5, 20, torch.float16)
    weight.requires_grad_()
    output, served = counted_by(lambda: vosops.conv_lstm(x, weight, bias, state)[0])
    assert served == (0, 0)
    output.sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_second_derivatives():
    arguments = problem(1, 2, 3, 4, 3, 5, torch.bfloat16)
    directions = [torch.randn(1, 2, 4, 3, 5).bfloat16(), torch.randn(1, 4, 3, 5).bfloat16()]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = leaves_of(*arguments, dtype)
        first = gradients(leaves, directions, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*found, strict=True):
        assert error(got, want) <= 12 * HALF[torch.bfloat16]


def test_opcheck():
    leaves = leaves_of(*problem(1, 2, 2, 3, 3, 4, torch.bfloat16))
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    op, backward = torch.ops.vosops.conv_lstm_direct, torch.ops.vosops.conv_lstm_direct_backward
    torch.library.opcheck(op.default, (*leaves, 1.0), test_utils=utils)
    output, cell, saved = (t.detach() for t in op(*leaves, 1.0))
    grads = [torch.randn_like(t).requires_grad_() for t in (output, cell)]
    torch.library.opcheck(backward.default, (*grads, *leaves, 1.0, output, saved), test_utils=utils[:3])


def test_every_gradient_is_written(deterministic):
    """In deterministic mode PyTorch fills what it allocates with NaN."""
    leaves = leaves_of(*problem(2, 3, 20, 18, 5, 21, torch.bfloat16))
    output, cell, _ = torch.ops.vosops.conv_lstm_direct(*leaves, 1.0)
    grads = torch.autograd.grad(output.float().sum() + cell.float().sum(), leaves)
    assert all(t.isfinite().all() for t in (output, cell, *grads))


def test_nan_in_a_gate_reaches_its_gradients():
    x, weight, bias, state = problem(1, 2, 4, 4, 6, 20, torch.bfloat16)
    x[0, 1, 0, 3, 10] = torch.nan
    of_x, of_weight, *_ = gradients(leaves_of(x, weight, bias, state), [torch.ones(1, 2, 4, 6, 20), state[0]])
    assert of_x[0, 0].isnan().any() and of_weight.isnan().any() and of_x[0, 1, :, 0, 0].isfinite().all()


# ---- Threads.


@pytest.mark.parametrize("dtype", HALF)
def test_threads_change_nothing(dtype):
    arguments = problem(2, 2, 40, 48, 30, 54, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(vosops.conv_lstm(*arguments)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_threads_change_no_gradient():
    arguments = problem(2, 2, 40, 48, 12, 33, torch.bfloat16)
    directions = [torch.randn(2, 2, 48, 12, 33), torch.randn(2, 48, 12, 33)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(leaves_of(*arguments), directions))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
