"""Memories of which each batch element has its own length: `memory_lengths`, and what the cores leave out for them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import vosops
from tests.ops.backends import INTERPRETED, load
from vosops import reference
from vosops.reference.memory_read import memory_read_core

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.vosops, "memory_read"), reason="the CPU library was not compiled"
)
read_module: Any = importlib.import_module("vosops.ops.memory_read")
SCALE = 0.3
LENGTHS = (41, 0, 64, 13)  # of 64 positions


@pytest.fixture(params=["cpp", "reference"])
def implementation(request: pytest.FixtureRequest) -> Any:
    with vosops.use_backend(request.param):
        yield request.param


def problem(
    option: str = "dot", dtype: torch.dtype = torch.float32, **sizes: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key and values of two objects, and options; N is that of LENGTHS."""
    generator = torch.Generator().manual_seed(0)
    n, m = len(LENGTHS), sizes.get("m", max(LENGTHS))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key, value = normal(n, 8, 3, 5), normal(n, 8, m), normal(n, 2, 5, m)
    options: dict[str, Any] = {"similarity": option.split()[0]}
    if "shrinkage" in option:
        options["shrinkage"] = 1 + normal(n, 1, m).square()
    if "selection" in option:
        options["selection"] = normal(n, 8, 3, 5).sigmoid()
    if "bias" in option:
        options["bias"] = normal(n, m)
    return [query, key, value], options


def filled_behind(tensors: list[Tensor], lengths: tuple[int, ...], filling: float) -> list[Tensor]:
    """Copies of tensors (N,...,M) with something else behind the length of each batch element."""
    copies = [tensor.clone() for tensor in tensors]
    for copy in copies:
        for n, length in enumerate(lengths):
            copy[n, ..., length:] = filling
    return copies


# ---- The cores on the CPU, whose loops end where the bias is -inf before the first and behind the last position read.


def core_problem() -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[slice, ...]]:
    """query, key, value and key_bias of four memories of 700 positions, and which of them each has."""
    parts = (slice(0, 700), slice(0, 130), slice(310, 311), slice(0, 0))
    query, key, value = torch.randn(4, 9, 18), torch.randn(4, 9, 700), torch.randn(4, 2, 6, 700)
    bias = torch.full((4, 700), -torch.inf)
    for n, part in enumerate(parts):
        bias[n, part] = torch.randn(700)[part]
    return query, key, value, bias, parts


def test_core_reads_between_what_is_left_out() -> None:
    query, key, value, bias, parts = core_problem()
    wide = [t.double() for t in (query, key, value, bias)]
    want, want_lse = memory_read_core(*wide[:3], None, None, wide[3], SCALE)
    for n, part in enumerate(parts):
        for tensor in (key, value):
            tensor[n, ..., : part.start] = tensor[n, ..., part.stop :] = torch.nan
    out, lse = torch.ops.vosops.memory_read(query, key, value, None, None, bias, SCALE, "ieee")
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)


def test_core_gives_what_is_left_out_no_usage_no_gradient_and_does_not_select_it() -> None:
    query, key, value, bias, parts = core_problem()
    shrinkage = 1 + torch.rand_like(bias)
    vectors = (shrinkage, None, bias, SCALE, "ieee")
    wide = [t.double().requires_grad_() for t in (query, key, value, shrinkage, bias)]
    want, want_lse = memory_read_core(*wide[:4], None, wide[4], SCALE)
    grads = [torch.randn_like(want), torch.randn_like(want_lse)]
    want_grads = torch.autograd.grad((want, want_lse), wide, grads)
    out, lse = torch.ops.vosops.memory_read(query, key, value, *vectors)
    got = torch.ops.vosops.memory_read_backward(
        *(grad.float() for grad in grads), query, key, value, *vectors, out, lse
    )
    for name, a, b in zip(
        ("query", "key", "value", "shrinkage", "key_bias"), got[:4] + got[5:], want_grads, strict=True
    ):
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=2e-5 * max(1, b.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )
    usage = torch.ops.vosops.memory_usage(query, key, *vectors, lse)
    _, index = torch.ops.vosops.memory_select(query, key, *vectors, 40)
    for n, part in enumerate(parts):
        inside = torch.zeros(700, dtype=torch.bool)
        inside[part] = True
        for each in (got[1][n], got[2][n], got[3][n], got[5][n], usage[n]):
            assert each[..., ~inside].eq(0).all()
        count = part.stop - part.start
        assert usage[n].sum().item() == pytest.approx(18 if count else 0, rel=1e-5)
        assert (index[n, : min(count, 40)] >= 0).all() and (index[n, count:] == -1).all()
        assert inside[index[n, : min(count, 40)]].all()


# ---- The public functions.


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("option", ["dot", "l2", "l2 shrinkage selection", "dot bias shrinkage"])
def test_lengths_equal_a_read_of_each(option: str, top_k: int | None, implementation: str) -> None:
    (query, key, value), options = problem(option)
    vectors = [name for name in ("shrinkage", "bias") if name in options]
    given = filled_behind([key, value, *(options[name] for name in vectors)], LENGTHS, torch.nan)
    options_given = {**options, **dict(zip(vectors, given[2:], strict=True))}
    more = {"top_k": top_k, "return_usage": True, "return_lse": True}
    for lengths in (LENGTHS, torch.tensor(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)):
        got = vosops.memory_read(query, *given[:2], **options_given, memory_lengths=lengths, **more)
        for n, length in enumerate(LENGTHS):
            part = slice(n, n + 1)
            its = {k: x[part, ..., :length] if k in vectors else x for k, x in options.items()}
            if "selection" in its:
                its["selection"] = its["selection"][part]
            want = vosops.memory_read(
                query[part], key[part, ..., :length], value[part, ..., :length], **its, **more
            )
            torch.testing.assert_close(got[0][part], want[0])
            torch.testing.assert_close(got[1][part, :length], want[1])
            assert got[1][part, length:].eq(0).all()
            torch.testing.assert_close(got[2][part], want[2])
    theirs = reference.memory_read(query, *given[:2], **options_given, memory_lengths=LENGTHS, **more)
    torch.testing.assert_close(got, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("option", ["dot", "l2 shrinkage"])
@pytest.mark.parametrize(("layout", "gradients"), [("rows", False), ("rows", True), ("channel-major", False)])
def test_triton_reads_nothing_behind(
    option: str, layout: str, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a copy of channel-last keys and values, unless gradients may be asked for."""
    load(INTERPRETED)
    copies: list[Any] = []
    exclude = read_module.without_excluded
    monkeypatch.setattr(read_module, "without_excluded", lambda *args: copies.append(args) or exclude(*args))
    (query, key, value), options = problem(option)
    more = {"similarity": options.pop("similarity"), "memory_lengths": LENGTHS, "return_lse": True}
    want = reference.memory_read(query, key, value, **options, **more)
    key, value, *vectors = filled_behind([key, value, *options.values()], LENGTHS, torch.nan)
    if layout == "rows":
        key, value = (tensor.mT.contiguous().mT for tensor in (key, value))
    with vosops.use_backend("triton"):
        got = vosops.memory_read(
            query.requires_grad_(gradients), key, value, **dict(zip(options, vectors, strict=True)), **more
        )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert bool(copies) == (gradients or layout != "rows")


@pytest.mark.parametrize("top_k", [None, 4])
def test_lengths_count_over_segments_and_meet_ranges_and_masks(top_k: int | None) -> None:
    (query, key, value), _ = problem()
    within = torch.arange(64) < torch.tensor(LENGTHS)[:, None]
    some = torch.rand(4, 64) > 0.3
    cuts = (slice(0, 20), slice(20, 64))
    segments = [key[..., cut] for cut in cuts], [value[..., cut] for cut in cuts]
    late = within & (torch.arange(64) >= 10)
    for given, mask in (
        ({}, within),
        ({"valid": (10, 64)}, late),
        ({"valid": [some[:, c] for c in cuts]}, within & some),
    ):
        got = vosops.memory_read(query, *segments, **given, memory_lengths=LENGTHS, top_k=top_k)
        torch.testing.assert_close(got, vosops.memory_read(query, key, value, valid=mask, top_k=top_k))
    groups = vosops.memory_read(
        query, key, [value, value], groups=[None, (10, 64)], memory_lengths=LENGTHS, top_k=top_k
    )
    for got, mask in zip(groups, (within, late), strict=True):
        torch.testing.assert_close(got, vosops.memory_read(query, key, value, valid=mask, top_k=top_k))
    if top_k is not None:
        chosen = vosops.memory_select(query, key, top_k, memory_lengths=LENGTHS)
        assert (chosen.indices < torch.tensor(LENGTHS)[:, None, None, None]).all()
        assert torch.equal(chosen.indices, vosops.memory_select(query, key, top_k, valid=within).indices)


@pytest.mark.parametrize("top_k", [None, 4])
def test_gradients_of_what_lies_behind_are_zero(top_k: int | None, implementation: str) -> None:
    (query, key, value), options = problem("l2 shrinkage")
    inputs = [query, *filled_behind([key, value, options["shrinkage"]], LENGTHS, torch.nan)]
    clean = [query, *filled_behind([key, value, options["shrinkage"]], LENGTHS, 0)]
    weight = torch.randn(query.shape[0], 2, 5, *query.shape[2:])
    results = []
    for tensors, how in (
        (inputs, {"memory_lengths": LENGTHS}),
        (clean, {"valid": torch.arange(64) < torch.tensor(LENGTHS)[:, None]}),
    ):
        q, k, v, s = (t.clone().requires_grad_() for t in tensors)
        out = vosops.memory_read(q, k, v, similarity="l2", shrinkage=s, top_k=top_k, **how)
        results.append(torch.autograd.grad((out * weight).sum(), (q, k, v, s)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(*(t.ne(0) for t in (results[0][2][1], torch.zeros_like(results[0][2][1]))))


def test_first_and_second_derivatives() -> None:
    query, key, value = (torch.randn(2, 3, size, dtype=torch.float64).requires_grad_() for size in (4, 5, 5))

    def read(*tensors: Tensor) -> Any:
        return vosops.memory_read(*tensors, memory_lengths=(5, 2), return_lse=True)

    assert torch.autograd.gradcheck(read, (query, key, value))
    assert torch.autograd.gradgradcheck(read, (query, key, value))


def test_a_batch_of_one_is_read_in_several_lengths() -> None:
    (query, key, value), _ = problem()
    got = vosops.memory_read(query[:1], key[:1], value[:1], memory_lengths=LENGTHS)
    assert got.shape == (4, 2, 5, 3, 5)
    for n, length in enumerate(LENGTHS):
        want = vosops.memory_read(query[:1], key[:1, :, :length], value[:1, ..., :length])
        torch.testing.assert_close(got[n : n + 1], want)
    one = vosops.memory_read(query, key, value, memory_lengths=[13])
    torch.testing.assert_close(one, vosops.memory_read(query, key[..., :13], value[..., :13]))


def test_vmap_and_compile_take_lengths() -> None:
    (query, key, value), _ = problem()
    lengths = torch.tensor(LENGTHS)

    def read(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return vosops.memory_read(q, k, v, memory_lengths=given)

    want = read(query, key, value, lengths)
    split = [t[:, None] for t in (query, key, value, lengths)]
    torch.testing.assert_close(torch.vmap(read)(*split)[:, 0], want)
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value, lengths), want)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1.0]), TypeError, "memory_lengths must be int64 or int32"),
        (torch.tensor([[1]]), ValueError, r"memory_lengths must have shape \(N\)"),
        ("four", TypeError, "memory_lengths must be a tensor or a sequence of ints, got str"),
        (3, TypeError, "memory_lengths must be a tensor or a sequence of ints, got int"),
        ([2.5], TypeError, "memory_lengths must be a tensor or a sequence of ints"),
        ([3, -1, 2, 2], ValueError, "memory_lengths must be at least 0, got -1"),
        ([3, 1], ValueError, "memory_lengths must have batch 1 or 4, got 2"),
    ],
    ids=str,
)
def test_wrong_lengths_are_named(lengths: Any, error: type[Exception], message: str) -> None:
    (query, key, value), _ = problem()
    with pytest.raises(error, match=message):
        vosops.memory_read(query, key, value, memory_lengths=lengths)
