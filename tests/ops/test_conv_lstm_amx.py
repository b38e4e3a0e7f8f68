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


def test_gradients_come_from_the_steps():
    x, weight, bias, state = problem(1, 2, 16, 16, 5, 20, torch.bfloat16)
    weight.requires_grad_()
    output, served = counted_by(lambda: vosops.conv_lstm(x, weight, bias, state)[0])
    assert served == (0, 0)
    output.sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


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
