"""What NaN and infinity mean to the ops that compare, on every backend: the table in docs/concepts.md.

The oracle is the same op without what is NaN: a position that cannot be chosen or is left out changes nothing.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vosops
from tests.effort import leave_out
from tests.ops.backends import ALL, CPU, EVERY_BACKEND, INTERPRETED, reason_not
from vosops import reference

INF, NAN = torch.inf, torch.nan
GARBAGE = (NAN, INF, -INF)

# Every panel, block, share and register of any kernel has its first, middle and last position among these.
MEMORY = 380
BAD = [0, 1, 13, 14, 15, 31, 64, 127, 128, 287, 299, *range(336, 352), MEMORY - 1]

SAME_KERNEL = "the interpreter differs between dtypes in how values are loaded alone"
KINDS_OF_ARITHMETIC = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (CPU, torch.float64),
        *((backend, dtype) for backend in ALL for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
    indirect=["backend"],
)


def spoil(tensor: Tensor, positions, value: float | Tensor = NAN, channel: int = 0) -> Tensor:
    """A copy of (N,C,M) or (N,O,C,M) with a channel of some positions spoiled."""
    tensor = tensor.clone()
    tensor[..., channel, positions] = value if isinstance(value, float) else value.to(tensor)
    return tensor


def without(tensor: Tensor | None, positions=BAD) -> Tensor | None:
    """The tensor without these positions of its last dimension."""
    if tensor is None:
        return None
    kept = torch.ones(tensor.shape[-1], dtype=torch.bool)
    kept[positions] = False
    return tensor[..., kept.to(tensor.device)]


def places_without(positions, size: int) -> Tensor:
    """The positions that `without` keeps."""
    return without(torch.arange(size), positions)


# ---- The cores of every backend.


@KINDS_OF_ARITHMETIC
def test_select_finds_the_best_beside_nan(backend, dtype):
    """As many as there are of the others, in their order, with their very scores."""
    leave_out(backend is INTERPRETED and dtype.itemsize == 2, SAME_KERNEL)
    query = torch.randn(2, 9, 35).to(dtype).to(backend.device)
    key = torch.randn(2, 9, MEMORY).to(dtype).to(backend.device)
    select = backend.op("memory_select")
    score, index = select(query, spoil(key, BAD, channel=4), None, None, None, 0.3, "ieee", 30)
    excluded = torch.zeros(2, MEMORY, dtype=score.dtype, device=backend.device)
    excluded[:, BAD] = -INF
    want, places = select(query, key, None, None, excluded, 0.3, "ieee", 30)
    assert torch.equal(index, places) and torch.equal(score, want)
    assert not torch.isin(index.cpu(), torch.tensor(BAD)).any()


@EVERY_BACKEND
@pytest.mark.parametrize("spoiled", ["key", "shrinkage", "key_bias", "excluded key", "squares"])
def test_select_finds_the_best_beside_nan_in_what_makes_a_score(backend, spoiled):
    wide, key = torch.randn(1, 18, 20), torch.randn(1, 9, MEMORY)
    query = wide if spoiled == "squares" else wide[:, :9].contiguous()
    shrinkage, bias = 1 + torch.rand(1, MEMORY), torch.randn(1, MEMORY)
    query_bias = torch.randn(1, 20)
    good = [query, key, shrinkage, query_bias, bias]
    bad = list(good)
    if "key" in spoiled.split() or spoiled == "squares":
        bad[1] = spoil(key, BAD)
    elif spoiled == "shrinkage":
        bad[2] = spoil(shrinkage[:, None], BAD)[:, 0]
    else:
        bad[4] = spoil(bias[:, None], BAD)[:, 0]
    good[4] = spoil(bias[:, None], BAD, -INF)[:, 0]
    if spoiled == "excluded key":
        bad[4] = good[4]
    select = backend.op("memory_select")
    got, want = (select(*(t.to(backend.device) for t in tensors), 0.3, "ieee", 25) for tensors in (bad, good))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@EVERY_BACKEND
@pytest.mark.parametrize("left", [0, 1, 7])
def test_select_takes_what_there_is_when_most_is_nan(backend, left):
    query, key = torch.randn(1, 5, 70), torch.full((1, 5, 200), NAN)
    places = torch.randperm(200)[:left].sort().values
    key[..., places] = torch.randn(1, 5, left)
    got = backend.op("memory_select")(
        query.to(backend.device), key.to(backend.device), None, None, None, 1.0, "ieee", 12
    )
    score, index = (t.cpu() for t in got)
    order = (key[..., places].transpose(1, 2) @ query).sort(1, descending=True)
    assert torch.equal(index[:, :left], places[order.indices])
    torch.testing.assert_close(score[:, :left], order.values)
    assert (index[:, left:] == -1).all() and score[:, left:].isneginf().all()


@EVERY_BACKEND
def test_select_of_a_nan_query_is_nothing_and_others_do_not_see_it(backend):
    query, key = torch.randn(1, 6, 80, device=backend.device), torch.randn(1, 6, 150, device=backend.device)
    bad = query.clone()
    bad[0, 3, [0, 41, 79]] = NAN
    select = backend.op("memory_select")
    (score, index), (want, places) = (select(q, key, None, None, None, 1.0, "ieee", 8) for q in (bad, query))
    undefined = bad.isnan().any(1)[0]
    assert (index[..., undefined] == -1).all() and score[..., undefined].isneginf().all()
    assert torch.equal(index[..., ~undefined], places[..., ~undefined])
    assert torch.equal(score[..., ~undefined], want[..., ~undefined])


@EVERY_BACKEND
@pytest.mark.parametrize("channel_last", [False, True])
def test_gather_and_its_gradients_do_not_look_at_what_was_not_chosen(backend, channel_last):
    value = torch.randn(1, 2, 33, 50)
    index = torch.randint(1, 25, (1, 4, 40)) * 2 - 1  # odd
    index[torch.rand(index.shape) < 0.3] = -1
    weight = torch.rand(1, 4, 40).masked_fill(index < 0, NAN)
    bad = value.clone()
    bad[..., ::2] = torch.tensor(GARBAGE * 9)[:25]  # position 0 among them, where -1 could be read
    if channel_last:
        value, bad = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (value, bad))
    grad = torch.randn(1, 2, 33, 40)
    value, bad, index, weight, grad = (t.to(backend.device) for t in (value, bad, index, weight, grad))
    defined = weight.nan_to_num(0)
    gather, backward = backend.op("memory_gather"), backend.op("memory_gather_backward")
    assert torch.equal(gather(weight, index, bad), gather(defined, index, value))
    got, want = backward(grad, weight, index, bad), backward(grad, defined, index, value)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (got[0][index < 0] == 0).all() and (got[1][..., ::2] == 0).all()


@EVERY_BACKEND
def test_a_nan_in_a_full_read_is_multiplied_like_any_number(backend):
    """A key makes all that is read NaN, a value its own channel; other batch elements do not see it."""
    query, key = (torch.randn(2, 6, n, device=backend.device) for n in (35, 120))
    value = torch.randn(2, 2, 5, 120, device=backend.device)
    read = backend.op("memory_read")
    out, lse = read(query, key, value, None, None, None, 1.0, "ieee")
    for position in (0, 77, 119):
        bad = key.clone()
        bad[0, 3, position] = NAN
        got, got_lse = read(query, bad, value, None, None, None, 1.0, "ieee")
        assert got[0].isnan().all() and got_lse[0].isnan().all()
        assert torch.equal(got[1], out[1]) and torch.equal(got_lse[1], lse[1])
        bad = value.clone()
        bad[0, 1, 2, position] = NAN
        got, got_lse = read(query, key, bad, None, None, None, 1.0, "ieee")
        assert got[0, 1, 2].isnan().all() and got.isnan().sum() == 35 and torch.equal(got_lse, lse)


MATCHINGS = {"local_matching": ([1, 3], 1), "global_matching": (1,), "global_matching, 5 neighbors": (5,)}


@KINDS_OF_ARITHMETIC
@pytest.mark.parametrize("matching", MATCHINGS)
def test_matching_finds_the_nearest_beside_nan(backend, dtype, matching):
    """With a third of the key NaN or infinite, an object of nothing else and queries that are NaN or infinite."""
    leave_out(backend is INTERPRETED and dtype.itemsize == 2, SAME_KERNEL)
    query, key = torch.randn(2, 1, 7, 6, 37).to(dtype)
    mask = torch.rand(1, 4, 6, 37) < 0.4
    places = torch.rand(6, 37) < 0.35
    bad = key.clone()
    bad[0, torch.randint(7, (int(places.sum()),)), places] = torch.tensor(GARBAGE)[
        torch.randint(3, (int(places.sum()),))
    ].to(dtype)
    mask[:, 3] = places
    spoiled = query.clone()
    spoiled[0, 2, 4, 5], spoiled[0, 0, 5, 36], spoiled[0, 6, 0, 0] = NAN, INF, -INF
    options = (*MATCHINGS[matching], None, "ieee")
    arrange = (lambda t: t.unsqueeze(-3)) if "global" in matching else (lambda t: t)
    core = backend.op(matching.split(",")[0])

    def match(query, key, mask):
        tensors = (query, arrange(key), arrange(mask))
        return [t.cpu() for t in core(*(t.to(backend.device) for t in tensors), *options)]

    distance, index = match(spoiled, bad, mask)
    want, best = match(query, key, mask & ~places)
    for row, column, value in ((4, 5, NAN), (5, 36, INF), (0, 0, INF)):
        want[..., row, column], best[..., row, column] = value, -1
    assert torch.equal(index, best) and (index[:, 3] == -1).all()
    torch.testing.assert_close(distance, want, rtol=0, atol=0, equal_nan=True)


# ---- The public ops, on every implementation that takes tensors of the CPU.


@pytest.fixture(params=["cpp", "triton", "reference"])
def implementation(request):
    backend = {"cpp": CPU, "triton": INTERPRETED, "reference": None}[request.param]
    if backend is not None and reason_not(backend):
        pytest.skip(reason_not(backend))
    with vosops.use_backend(request.param):
        yield request.param


OPTIONS = ("dot", "l2", "l2 shrinkage", "l2 shrinkage selection", "dot shrinkage bias")
# The interpreter of the Triton kernels is slow, and serves these two by the kernels of all five.
CALLS = [
    *((name, option) for name in ("cpp", "reference") for option in OPTIONS),
    *(("triton", option) for option in OPTIONS[3:]),
]
EVERY_CALL = pytest.mark.parametrize(("implementation", "option"), CALLS, indirect=["implementation"])


def problem(option: str, memory: int = 90, dtype: torch.dtype = torch.float32):
    """query (1,6,24), key, value (1,2,5,M) and the options that are named."""
    query, key, value = torch.randn(1, 6, 24), torch.randn(1, 6, memory), torch.randn(1, 2, 5, memory)
    shrinkage, selection, bias = 1 + torch.rand(1, 1, memory), torch.rand(1, 6, 24), torch.randn(1, memory)
    named = {"shrinkage": shrinkage, "selection": selection, "bias": bias}
    options: dict = {name: tensor.to(dtype) for name, tensor in named.items() if name in option}
    return query.to(dtype), key.to(dtype), value.to(dtype), {"similarity": option.split()[0], **options}


def read_and_differentiate(read, query, key, value, options, **more):
    """(out, usage, lse) and the gradients by name."""
    given = {"query": query, "key": key, "value": value}
    given |= {name: t for name, t in options.items() if isinstance(t, Tensor)}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    named = {name: leaves.get(name, option) for name, option in options.items()}
    results = read(
        leaves["query"], leaves["key"], leaves["value"], **named, **more, return_usage=True, return_lse=True
    )
    out, _, lse = results
    keep = ~lse.detach().isnan()  # what the user leaves out of the loss
    loss = torch.where(keep[:, None, None], out, 0).square().sum() + torch.where(keep, lse, 0).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return results, dict(zip(leaves, grads, strict=True))


def assert_reads_as_without(positions, got, want, tolerance=2e-5):
    """The results and gradients of a read, and of one without these positions, which have no usage or gradient."""
    (out, usage, lse), grads = got
    (want_out, want_usage, want_lse), want_grads = want
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out, want_out, **near)
    torch.testing.assert_close(lse, want_lse, **near)
    torch.testing.assert_close(without(usage, positions), want_usage, **near)
    assert (usage[..., positions] == 0).all()
    for name, grad in grads.items():
        if name in ("query", "selection"):
            torch.testing.assert_close(grad, want_grads[name], **near, msg=lambda m, n=name: f"{n}: {m}")
            continue
        torch.testing.assert_close(
            without(grad, positions), want_grads[name], **near, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (grad[..., positions] == 0).all(), name


FEW = [0, 13, 14, 47, 89]


def without_few(query, key, value, options):
    rest = {n: without(t, FEW) if n in ("shrinkage", "bias") else t for n, t in options.items()}
    return query, without(key, FEW), without(value, FEW), rest


def spoil_few(query, key, value, options):
    """The problem with a NaN at each of FEW: in its key, or its shrinkage, or its bias; and in its value."""
    named = {n: t.clone() for n, t in options.items() if n in ("shrinkage", "bias")}
    of_key = list(FEW)
    for tensor in named.values():
        tensor[..., of_key.pop()] = NAN
    return query, spoil(key, of_key), spoil(value, FEW), {**options, **named}


@EVERY_CALL
def test_top_k_reads_the_best_beside_nan(implementation, option):
    """Whatever of a position is NaN, it is not chosen: no other query's choice, usage or gradient changes."""
    tensors = problem(option)
    want = read_and_differentiate(vosops.memory_read, *without_few(*tensors), top_k=5)
    valid = ~torch.isin(torch.arange(90), torch.tensor(FEW))[None]
    for more in ({}, {"valid": valid}) if implementation != "triton" else ({"valid": valid},):
        got = read_and_differentiate(vosops.memory_read, *spoil_few(*tensors), top_k=5, **more)
        assert_reads_as_without(FEW, got, want)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_reference_reads_the_best_beside_nan(option):
    tensors = problem(option)
    got, want = (
        read_and_differentiate(reference.memory_read, *each, top_k=5)
        for each in (spoil_few(*tensors), without_few(*tensors))
    )
    assert_reads_as_without(FEW, got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@EVERY_CALL
def test_a_full_read_does_not_look_at_what_valid_leaves_out(implementation, option, dtype):
    if dtype == torch.float64 and implementation == "triton":
        pytest.skip("float64 is computed on the CPU and by the reference only")
    query, key, value, options = problem(option, dtype=dtype)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float64: 1e-10}[dtype]
    want = read_and_differentiate(vosops.memory_read, *without_few(query, key, value, options))
    garbage = torch.tensor([NAN, INF, -INF, NAN, INF])
    spoiled = {
        name: spoil(options[name].view(1, 1, 90), FEW, garbage)
        for name in ("shrinkage", "bias")
        if name in options
    }
    broken = {**options, **{name: tensor.view_as(options[name]) for name, tensor in spoiled.items()}}
    valid = ~torch.isin(torch.arange(90), torch.tensor(FEW))[None]
    bad = (query, spoil(key, FEW, garbage), spoil(value, FEW, garbage), broken)
    for read in (vosops.memory_read, reference.memory_read):
        got = read_and_differentiate(read, *bad, valid=valid)
        assert_reads_as_without(FEW, got, want, tolerance)


def test_a_full_read_of_nothing_valid_is_zero_whatever_lies_there(implementation):
    query, _, _, _ = problem("dot")
    key, value = torch.full((1, 6, 20), NAN), torch.full((1, 3, 20), NAN)
    nothing = torch.zeros(1, 20, dtype=torch.bool)
    out, usage, lse = vosops.memory_read(query, key, value, valid=nothing, return_usage=True, return_lse=True)
    assert (out == 0).all() and (usage == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("option", ["dot", "l2", "l2 shrinkage selection"])
def test_a_nan_query_is_counted_nowhere_and_spoils_no_gradient_of_a_selection(implementation, option, top_k):
    query, key, value, options = problem(option)
    pixels = [0, 7, 23]
    others = {**options}
    if "selection" in options:
        others["selection"] = without(options["selection"], pixels)
    got = read_and_differentiate(vosops.memory_read, spoil(query, pixels), key, value, options, top_k=top_k)
    want = read_and_differentiate(vosops.memory_read, without(query, pixels), key, value, others, top_k=top_k)
    (out, usage, lse), grads = got
    assert out[..., pixels].isnan().all() and lse[:, pixels].isnan().all()
    torch.testing.assert_close(without(out, pixels), want[0][0])
    torch.testing.assert_close(usage, want[0][1], rtol=1e-4, atol=1e-5)
    if top_k is not None:
        for name in ("key", "value"):
            torch.testing.assert_close(grads[name], want[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 9])
def test_a_prior_is_centred_on_a_pixel_that_is_a_number(implementation, top_k):
    """argmax takes NaN for the greatest number: one NaN pixel would move every position's Gaussian to itself."""
    query, key, value = torch.randn(1, 4, 5, 7), torch.randn(1, 4, 60), torch.randn(1, 3, 60)
    scores = key[0].T @ query[0].flatten(1)
    key[..., scores.argmax(1) == 12] = key[..., scores.argmax(1) != 12][
        ..., :1
    ]  # nothing likes pixel 12 best
    bad = query.clone()
    bad[0, 1, 1, 5] = NAN
    for read in (vosops.memory_read, reference.memory_read):
        want = read(query, key, value, prior=2.0, top_k=top_k)
        out = read(bad, key, value, prior=2.0, top_k=top_k)
        assert out[..., 1, 5].isnan().all() and out.isnan().sum() == 3
        torch.testing.assert_close(out.nan_to_num(0), torch.where(out.isnan(), 0, want))
    if top_k is not None:
        key, value = torch.cat([key, key[..., :2]], 2), torch.cat([value, value[..., :2]], 2)
        key[..., 60:] = NAN
        for read in (vosops.memory_read, reference.memory_read):
            torch.testing.assert_close(read(query, key, value, prior=2.0, top_k=top_k), want)


def test_segments_and_groups_read_the_best_beside_nan(implementation):
    query, key, value, _ = problem("l2", 120)
    bad = spoil(key, [0, 39, 40, 41, 119])
    want = reference.memory_read(query, bad, value, similarity="l2", top_k=9)
    cuts = [slice(0, 40), slice(40, 41), slice(41, 120)]  # the second has nothing else
    keys, values = ([t[..., cut] for cut in cuts] for t in (bad, value))
    got, usage = vosops.memory_read(query, keys, values, similarity="l2", top_k=9, return_usage=True)
    torch.testing.assert_close(got, want)
    assert usage[1].eq(0).all() and all(used.isfinite().all() for used in usage)
    whole, late = vosops.memory_read(
        query, bad, [value, value[..., 30:]], similarity="l2", top_k=9, groups=[None, (30, 120)]
    )
    torch.testing.assert_close(whole, want)
    torch.testing.assert_close(
        late, reference.memory_read(query, bad, value, similarity="l2", top_k=9, valid=(30, 120))
    )


def test_second_derivatives_do_not_look_at_what_is_left_out(implementation):
    if implementation == "triton":
        pytest.skip("float64 is computed on the CPU and by the reference only")
    query, key, value, options = problem("l2 shrinkage", 20, torch.float64)
    options["shrinkage"] = options["shrinkage"].double()
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[0, [0, 5, 19]] = False
    for more in ({"valid": valid}, {"valid": valid, "top_k": 6}, {"top_k": 6}):
        second = []
        for spoiled in (False, True):
            places = [0, 5, 19]
            k, v, w = (spoil(t, places) if spoiled else t for t in (key, value, options["shrinkage"]))
            if not spoiled:
                more = {**more, "valid": valid}
            tensors = [t.clone().requires_grad_() for t in (query, k, v, w)]
            q, k, v, w = tensors
            out = vosops.memory_read(q, k, v, similarity="l2", shrinkage=w, **more)
            grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), tensors))
        for a, b in zip(*second, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ["local_matching", "global_matching", "global_matching, 3 neighbors"])
def test_matching_has_no_gradient_where_there_is_nan(implementation, op):
    """Neither a NaN key nor a NaN query, left out of the loss, reaches the gradients of other pixels or of the bias."""
    query, key = torch.randn(2, 1, 5, 6, 8)
    mask, bias = torch.rand(1, 2, 6, 8) < 0.6, torch.randn(2)
    places = torch.zeros(6, 8, dtype=torch.bool)
    places[2, 3] = places[0, 0] = True
    options = {"neighbors": 3} if "3" in op else {"radius": 3} if "local" in op else {}
    grads = []
    for spoiled in (False, True):
        q, k = query.clone(), key.clone()
        if spoiled:
            q[0, 1, 4, 4], k[0, 2, places] = NAN, NAN
        leaves = [t.clone().requires_grad_() for t in (q, k, bias)]
        distance = getattr(vosops, op.split(",")[0])(
            *leaves[:2], mask & ~places if not spoiled else mask, bias=leaves[2], **options
        )
        assert distance[..., 4, 4].isnan().all() == spoiled and distance.isnan().sum() == 2 * spoiled
        loss = torch.where(torch.arange(48).view(6, 8) == 36, 0, distance).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for have, want in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(have, want)
    assert (grads[1][1][0, :, places] == 0).all() and (grads[1][0][0, :, 4, 4] == 0).all()


def test_a_soft_mask_of_nan_belongs_to_no_object(implementation):
    query, key = torch.randn(2, 1, 5, 6, 8)
    soft = torch.rand(1, 2, 6, 8)
    bad = soft.masked_fill(soft > 0.8, NAN)
    for op in (vosops.local_matching, vosops.global_matching):
        assert torch.equal(op(query, key, bad), op(query, key, (soft > 0.5) & (soft <= 0.8)))


def test_local_attention_is_nan_where_its_window_sees_nan(implementation):
    query, key = torch.randn(2, 1, 6, 7, 9)
    value = torch.randn(1, 4, 7, 9)
    want = vosops.local_attention(query, key, value, radius=1, heads=2)
    seen, alone = torch.zeros(2, 7, 9, dtype=torch.bool)
    seen[0:2, 3:6] = alone[0, 4] = True  # at the border: what lies outside must not matter either
    for spoiled, bad in (("query", alone), ("key", seen), ("value", seen)):
        tensors = {"query": query, "key": key, "value": value}
        tensors[spoiled] = tensors[spoiled].clone()
        tensors[spoiled][0, 0, 0, 4] = NAN
        out = vosops.local_attention(**tensors, radius=1, heads=2)
        touched = 2 if spoiled != "value" else 1  # channels of the first head, or the value's own
        assert torch.equal(out.isnan()[0, :touched], bad.expand(touched, -1, -1))
        assert not out[0, touched:].isnan().any()
        torch.testing.assert_close(torch.where(out.isnan(), 0, out), torch.where(out.isnan(), 0, want))
