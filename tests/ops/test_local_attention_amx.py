"""local_attention in one pass on the matrix engine or its twin."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vosops
import vosops.ops.local_attention  # noqa: F401  (the module, which the package hides behind its function)
from tests.effort import examples
from tests.ops.matching import LAYOUTS, embeddings
from vosops.reference.local_attention import local_attention as reference

local_attention = sys.modules["vosops.ops.local_attention"]
ON_AMX = torch.ops.vosops.cpu_capability().startswith("amx") and not torch.ops.vosops.amx_refusal()
pytestmark = pytest.mark.skipif(not ON_AMX, reason="needs the library for AMX, or its twin")

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}
"""Dtype -> the relative error that rounding to it leaves, for float32 that of its sums."""
DTYPES = list(ROUNDING)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Calls that are faster otherwise, too, are made on tiles."""
    monkeypatch.setattr(local_attention, "_worthwhile", lambda *_: True)


COUNTERS = ("calls", "range", "gradients", "gradients_range")


def counted_by(call):
    """A call's result, and by how much each of COUNTERS grew."""

    def counts():
        found = dict(entry.split("=") for entry in torch.ops.vosops.amx_counts().split())
        return [int(found[f"local_attention.{name}"]) for name in COUNTERS]

    before = counts()
    result = call()
    return result, tuple(b - a for a, b in zip(before, counts(), strict=True))


def problem(dtype, n=1, channels=8, value_channels=6, size=(7, 9), layout="contiguous"):
    shapes = [(n, c, *size) for c in (channels, channels, value_channels)]
    return [embeddings(shape, dtype, layout) for shape in shapes]


def learned(names, radius, dilation, heads=2, channels=8, value_channels=6):
    offsets = (2 * (radius // dilation) + 1) ** 2
    shapes = {
        "bias": (heads, offsets),
        "relative_key": (heads, channels // heads, offsets),
        "relative_value": (heads, value_channels // heads, offsets),
    }
    return {name: torch.randn(shapes[name]) for name in names}


def exact(maps, **options):
    """The definition in float64."""
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return reference(*(x.double() for x in maps), **wide)


def error(got, want):
    """Root mean square, relative."""
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


@settings(deadline=None, max_examples=examples(25))
@given(
    n=st.integers(1, 2),
    heads=st.integers(1, 3),
    channels=st.integers(1, 35),
    value_channels=st.integers(1, 35),
    height=st.integers(1, 6),
    width=st.integers(1, 40),
    radius=st.integers(0, 10),
    dilation=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    names=st.sets(st.sampled_from(["bias", "relative_key", "relative_value"])),
    seed=st.integers(0, 2**16),
)
def test_attended_values_are_those_of_the_definition(
    n, heads, channels, value_channels, height, width, radius, dilation, dtype, layout, names, seed
):
    torch.manual_seed(seed)
    sizes = (heads, heads * channels, heads * value_channels)
    maps = problem(dtype, n, *sizes[1:], (height, width), layout)
    options = {"radius": radius, "heads": heads, "dilation": dilation}
    options |= learned(sorted(names), radius, dilation, *sizes)
    got, served = counted_by(lambda: vosops.local_attention(*maps, **options))
    want = exact(maps, **options)
    assert served == (1, 0, 0, 0)
    assert got.dtype == dtype and got.is_contiguous() and got.shape == want.shape
    bound = 2 * ROUNDING[dtype] * max(1, want.abs().max().item())
    assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_exact_as_the_pieces(dtype):
    """The pieces keep scores and weights in float32; what is returned with the weights comes from them."""
    torch.manual_seed(0)
    maps = problem(dtype, channels=64, value_channels=64, size=(20, 37))
    options = {"radius": 7, "heads": 2, **learned(["bias"], 7, 1)}
    (got, served), want = counted_by(lambda: vosops.local_attention(*maps, **options)), exact(maps, **options)
    by_pieces = vosops.local_attention(*maps, **options, return_weights=True)[0]
    assert served == (1, 0, 0, 0)
    assert error(got, want) <= 1.1 * error(by_pieces, want)


@pytest.mark.parametrize("scale", [0.0, -0.7, 30.0])
def test_large_scores_and_any_scale(scale):
    """At 30 a pixel's best score exceeds the others by hundreds."""
    maps = problem(torch.float32, size=(5, 20))
    got = vosops.local_attention(*maps, radius=3, scale=scale)
    want = exact(maps, radius=3, scale=scale)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4 if scale == 30 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_stays_in_its_window(dtype, place):
    maps = problem(dtype, size=(7, 25))
    maps[place][0, 0, 3, 14] = torch.nan
    bad = vosops.local_attention(*maps, radius=1).isnan().any(1)[0]
    if place == 0:
        assert bad[3, 14] and bad.sum() == 1
    else:
        assert bad[2:5, 13:16].all() and bad.sum() == 9


@pytest.mark.parametrize(
    ("dtype", "place", "number", "left"),
    [
        (torch.bfloat16, 0, torch.inf, False),  # rows and columns of scores that no other pixel needs
        (torch.bfloat16, 1, torch.inf, False),
        (torch.bfloat16, 2, torch.inf, True),
        (torch.float16, 0, torch.inf, True),
        (torch.float32, 1, 1e-35, True),
        (torch.float32, 2, 3.4e38, True),
    ],
)
def test_numbers_that_have_no_pieces_are_left_to_the_pieces(dtype, place, number, left):
    maps = problem(dtype)
    maps[place][0, 1, 2, 3] = number
    got, served = counted_by(lambda: vosops.local_attention(*maps, radius=2, heads=2))
    assert served == ((0, 1, 0, 0) if left else (1, 0, 0, 0))
    want = vosops.local_attention(*maps, radius=2, heads=2, return_weights=True)[0]
    torch.testing.assert_close(got, want, equal_nan=True, rtol=2 * ROUNDING[dtype], atol=ROUNDING[dtype])


def test_what_is_learned_must_have_pieces_too():
    maps, given = problem(torch.bfloat16), learned(["relative_key", "relative_value"], 1, 1)
    given["relative_value"][0, 0, 4] = torch.nan
    _, served = counted_by(lambda: vosops.local_attention(*maps, radius=1, heads=2, **given))
    assert served == (0, 1, 0, 0)


def test_small_windows_in_float32_are_left_to_the_pieces(monkeypatch):
    monkeypatch.undo()
    for dtype, radius, dilation, count in (
        (torch.float32, 1, 1, 0),
        (torch.float32, 5, 1, 1),
        (torch.bfloat16, 1, 1, 1),
        (torch.bfloat16, 8, 8, 0),
    ):
        maps = problem(dtype, size=(9, 30))
        _, served = counted_by(
            lambda maps=maps, r=radius, d=dilation: vosops.local_attention(*maps, radius=r, dilation=d)
        )
        assert served == (count, 0, 0, 0), (dtype, radius, dilation)


def test_what_only_the_pieces_can_is_left_to_them():
    maps = problem(torch.bfloat16)
    per_pixel = torch.randn(1, 2, 9, 7, 9)
    relative = learned(["relative_key"], 1, 1)["relative_key"].requires_grad_()
    for options in ({"return_weights": True}, {"bias": per_pixel}, {"relative_key": relative}):
        _, served = counted_by(
            lambda options=options: vosops.local_attention(*maps, radius=1, heads=2, **options)
        )
        assert served == (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "radius", "dilation", "biased"),
    [((5, 23), 2, 1, True), ((4, 40), 9, 1, False), ((6, 21), 4, 2, True), ((1, 1), 0, 1, True)],
)
def test_gradients_are_those_of_the_definition(dtype, size, radius, dilation, biased):
    torch.manual_seed(0)
    maps = [x.requires_grad_() for x in problem(dtype, n=2, size=size)]
    options = {"radius": radius, "dilation": dilation, "heads": 2}
    given = learned(["bias"] if biased else [], radius, dilation)
    leaves = [*maps, *(x.requires_grad_() for x in given.values())]
    cotangent = torch.randn(2, 6, *size).to(dtype)

    def differentiate():
        out = vosops.local_attention(*maps, **options, **given)
        return torch.autograd.grad(out, leaves, cotangent)

    got, served = counted_by(differentiate)
    assert served == (1, 0, 1, 0)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    out = reference(*wide[:3], **options, **dict(zip(given, wide[3:], strict=True)))
    want = torch.autograd.grad(out, wide, cotangent.double())
    for ours, exact_one, leaf in zip(got, want, leaves, strict=True):
        assert ours.dtype == leaf.dtype
        bound = 2 * ROUNDING[dtype] * max(1, exact_one.abs().max().item())
        assert (ours.double() - exact_one).abs().max() <= bound


def test_second_derivatives_are_those_of_the_definition():
    torch.manual_seed(0)
    maps, given = problem(torch.float32, size=(3, 4)), learned(["bias"], 1, 1)
    results = []
    for function, dtype in ((vosops.local_attention, torch.float32), (reference, torch.float64)):
        q, k, v, bias = (x.to(dtype).detach().requires_grad_() for x in (*maps, given["bias"]))
        out = function(q, k, v, radius=1, heads=2, bias=bias)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, bias), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v, bias)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_gradients_of_numbers_that_have_no_pieces_come_from_the_pieces():
    maps = [x.requires_grad_() for x in problem(torch.float32)]
    out = vosops.local_attention(*maps, radius=2, heads=2)
    cotangent = torch.full_like(out, 1e-36)
    got, served = counted_by(lambda: torch.autograd.grad(out, maps, cotangent))
    assert served == (0, 0, 0, 1)
    wide = [x.detach().double().requires_grad_() for x in maps]
    want = torch.autograd.grad(reference(*wide, radius=2, heads=2), wide, cotangent.double())
    for ours, exact_one in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact_one, rtol=1e-4, atol=1e-41)


@pytest.mark.parametrize("relative", [False, True])
def test_registration(relative):
    q, k, v = (x.requires_grad_() for x in problem(torch.float32, size=(3, 4)))
    given = learned(["bias", "relative_key", "relative_value"], 1, 1)
    given = list(given.values()) if relative else [given["bias"], None, None]
    op, backward = (getattr(torch.ops.vosops, f"local_attention_whole{end}") for end in ("", "_backward"))
    torch.library.opcheck(op, (q, k, v, *given, 2, 1, 1, 0.5))
    if not relative:
        out, lse = op(q, k, v, *given, 2, 1, 1, 0.5)
        cotangents = [torch.randn_like(x) for x in (out, lse)]
        arguments = (*cotangents, q, k, v, given[0], lse.detach(), 2, 1, 1, 0.5)
        torch.library.opcheck(backward, arguments)


def test_compile_and_vmap():
    maps = [torch.stack([x, x + 1]) for x in problem(torch.bfloat16)]

    def function(q, k, v):
        return vosops.local_attention(q, k, v, radius=2, heads=2)

    one_by_one = torch.stack([function(*each) for each in zip(*maps, strict=True)])
    assert torch.equal(torch.vmap(function)(*maps), one_by_one)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*(x[0] for x in maps)), one_by_one[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype):
    maps = [x.requires_grad_() for x in problem(dtype, n=2, size=(9, 33))]
    bias = learned(["bias"], 3, 1)["bias"].requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = vosops.local_attention(*maps, radius=3, heads=2, bias=bias)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (*maps, bias))))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
