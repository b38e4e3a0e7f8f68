"""memory_select on the matrix engine or its twin: what the FMA code selects, to the bit, and why it must.

The FMA code serves in the same process where there are few queries, so a problem is done again in parts.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.effort import examples
from tests.ops.backends import assert_same_bits

ON_AMX = torch.ops.vosops.cpu_capability().startswith("amx") and not torch.ops.vosops.amx_refusal()
pytestmark = pytest.mark.skipif(not ON_AMX, reason="needs the library for AMX, or its twin")

QUERIES, MEMORY, CHANNELS, TOP_K = 70, 1200, 40, 16
PART = 16
"""Queries of a part: fewer than the engine takes."""
SCALE = 0.3
VECTORS = ("shrinkage", "query_bias", "key_bias")


def counts():
    counted = (entry.split("=") for entry in torch.ops.vosops.amx_counts().split())
    return {name: int(value) for name, value in counted}


def counted_by(call):
    """A call's result, and what the selection counted meanwhile."""
    before = counts()
    result = call()
    return result, {
        name: counts()[f"memory_select.{name}"] - before[f"memory_select.{name}"]
        for name in ("filter", "overflow", "given_up", "range")
    }


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def problem(vectors="", *, n=1, c=CHANNELS, p=QUERIES, m=MEMORY, seed=0):
    """query, key, and the vectors of the scores that are named."""
    query, key = random(n, c, p, seed=seed), random(n, c, m, seed=seed + 1)
    given = {
        "shrinkage": 1 + random(n, m, seed=2).square(),
        "query_bias": random(n, p, seed=3),
        "key_bias": random(n, m, seed=4).masked_fill(random(n, m, seed=5) < -1, -torch.inf),
    }
    if "squares" in vectors:
        chosen = random(n, c, p, seed=6).sigmoid()
        query = torch.cat([2 * chosen * query, -chosen], 1)
    return query, key, [given[name] if name in vectors else None for name in VECTORS]


def select(query, key, vectors=(None, None, None), top_k=TOP_K, scale=SCALE):
    return torch.ops.vosops.memory_select(query, key, *vectors, scale, "highest", top_k)


def by_fma(query, key, vectors=(None, None, None), top_k=TOP_K, scale=SCALE):
    """What the FMA code selects, in float32."""
    shrinkage, query_bias, key_bias = vectors
    parts = []
    for first in range(0, query.shape[2], PART):
        some = slice(first, first + PART)
        bias = None if query_bias is None else query_bias[:, some]
        part, done = counted_by(
            lambda some=some, bias=bias: select(
                query[:, :, some].float(), key.float(), (shrinkage, bias, key_bias), top_k, scale
            )
        )
        assert not any(done.values())
        parts.append(part)
    return [torch.cat(rows, 2) for rows in zip(*parts, strict=True)]


def assert_same(got, expected):
    """Scores and positions are the same, to the bit; a sanitized library may round some ulp of the largest score."""
    largest = expected[0].double().nan_to_num(0, 0, 0).abs().max().item()
    assert_same_bits(got, expected, 1e-6, 2**-20 * largest)


def assert_selects_as_fma(query, key, vectors=(None, None, None), top_k=TOP_K, scale=SCALE, **counted):
    """The same scores and positions; `counted` is what else than a full service is counted."""
    got, done = counted_by(lambda: select(query, key, vectors, top_k, scale))
    expected = {"filter": query.shape[0], "overflow": 0, "given_up": 0, "range": 0, **counted}
    assert done == expected
    assert_same(got, by_fma(query, key, vectors, top_k, scale))
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vectors", ["", "key_bias", "shrinkage query_bias", "squares shrinkage query_bias"])
def test_selects_what_the_fma_code_selects(vectors, dtype):
    query, key, given = problem(vectors, n=2)
    query = query if "squares" in vectors else query.to(dtype)
    assert_selects_as_fma(query, key.to(dtype), given)


@pytest.mark.parametrize("channels", [1, 31, 64, 65, 300])
@pytest.mark.parametrize("memory", [512, 1023, 5000])
@pytest.mark.parametrize("top_k", [16, 60])
def test_any_size(channels, memory, top_k):
    query, key, given = problem("key_bias", c=channels, m=memory, p=33)
    assert_selects_as_fma(query, key, given, top_k)
    assert_selects_as_fma(query, key, top_k=top_k)


def test_the_best_alone():
    query, key, given = problem("shrinkage")
    assert_selects_as_fma(query, key, given, top_k=1)


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-20, 1e12])
def test_any_scale(scale):
    query, key, _ = problem()
    ties = {"filter": 0, "given_up": 1} if scale == 0 else {}
    assert_selects_as_fma(query, key, scale=scale, **ties)


def test_any_stride():
    query, key, given = problem("key_bias", n=2)
    want = by_fma(query, key, given)
    room = torch.full((2, 2 * CHANNELS, 2 * MEMORY), torch.nan)
    for laid_out in (key.mT.contiguous().mT, room[:, ::2, ::2].copy_(key)):
        got, done = counted_by(lambda laid_out=laid_out: select(query.mT.contiguous().mT, laid_out, given))
        assert done["filter"] == 2
        assert_same(got, want)


def test_results_do_not_depend_on_threads():
    query, key, given = problem("shrinkage", m=4000, p=300)
    query[:, :, ::9] = 0  # these overflow
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(counted_by(lambda: select(query, key, given)))
    finally:
        torch.set_num_threads(threads)
    (one, counted), (two, counted_too) = results
    assert counted == counted_too and counted["overflow"] == 34
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_few_scores_and_excluded_positions():
    query, key, _ = problem()
    bias = torch.full((1, MEMORY), -torch.inf)
    _, index = assert_selects_as_fma(query, key, (None, None, bias))
    assert index.eq(-1).all()
    bias[0, 1100:1104] = 2
    key[:, :, :1100] = torch.nan  # excluded positions may hold anything
    _, index = assert_selects_as_fma(query, key, (None, None, bias))
    assert index[:, 4:].eq(-1).all() and index[:, :4].sort(1).values[0, :, 0].tolist() == [
        1100,
        1101,
        1102,
        1103,
    ]


# ---- Ties, near ties, and lists that overflow.


def test_lowest_position_wins_a_tie():
    # Small integers: scores are exact, and some ten positions share each.
    query, key = (random(1, CHANNELS, size, seed=size).round() for size in (QUERIES, MEMORY))
    assert_selects_as_fma(query, key, scale=1.0)


def test_queries_whose_lists_overflow_are_left_to_the_fma_code():
    query, key, given = problem("key_bias")
    query[:, :, [3, 40, 69]] = 0
    _, index = assert_selects_as_fma(query, key, top_k=5, overflow=3)
    assert index[0, :, 40].tolist() == [0, 1, 2, 3, 4]


def test_equal_keys_are_given_up():
    query, key, _ = problem()
    _, index = assert_selects_as_fma(query, key[:, :, :1].expand_as(key), filter=0, given_up=1)
    assert torch.equal(index[0, :, 0], torch.arange(TOP_K))


@given(
    seed=st.integers(0, 2**20),
    copies=st.sampled_from([1, 5, 40]),
    step=st.sampled_from([0.0, 2.0**-23, 2.0**-16, 2.0**-9]),
    offset=st.sampled_from([0.0, 1.0, 30.0]),
    size=st.sampled_from([1e-18, 1.0, 1e9]),
)
@settings(max_examples=examples(25), deadline=None)
def test_near_ties(seed, copies, step, offset, size):
    """Keys that differ by little, with a common offset, small and large: always what the FMA code selects."""
    few = random(1, CHANNELS, MEMORY // copies, seed=seed).repeat(1, 1, copies)
    key = (few * (1 + step * torch.randint(-2, 3, few.shape)) + offset) * size
    query = (random(1, CHANNELS, 40, seed=seed + 1) + offset) * size
    assert_same(select(query, key, scale=1.0), by_fma(query, key, scale=1.0))


# ---- Numbers that the engine cannot take.


def test_a_query_that_is_not_finite_is_left_to_the_fma_code():
    query, key, _ = problem()
    query[0, 2, 5], query[0, 3, 8], query[0, :, 20] = torch.nan, torch.inf, 1e35
    _, index = assert_selects_as_fma(query, key, overflow=3)
    assert index[0, :, 5].eq(-1).all()
    bias = random(1, QUERIES)
    bias[0, 7] = torch.inf
    assert_selects_as_fma(random(1, CHANNELS, QUERIES), key, (None, bias, None), overflow=1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e35])
def test_keys_that_are_not_finite_are_left_to_the_fma_code(value):
    query, key, _ = problem()
    key[0, 3, 700] = value
    assert_selects_as_fma(query, key, filter=0, range=1)


def test_a_large_key_makes_the_bound_of_its_block_useless_at_most():
    query, key, _ = problem(m=6000)
    key[0, :, 700] *= 1e15
    got, done = counted_by(lambda: select(query, key))
    assert done["range"] == 0
    assert_same(got, by_fma(query, key))


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -3.4e38])
def test_vectors_that_are_not_finite(name, value):
    query, key, given = problem(name)
    vector = given[VECTORS.index(name)]
    vector[0, 50] = value
    got, done = counted_by(lambda: select(query, key, given))
    assert done["overflow"] == 1 or done["filter"] == 0
    assert_same(got, by_fma(query, key, given))


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e-19])
def test_denormals_and_small_numbers(size):
    query, key, _ = problem()
    assert_same(select(query, key * size), by_fma(query, key * size))


# ---- The bound.


def bounds(query, key, vectors=(None, None, None), scale=SCALE):
    """Of every score: its distance from the approximation, and the bound of that, by float64 and by FMA."""
    near, bound = torch.ops.vosops.memory_select_bounds(query, key, *vectors, scale)
    shrinkage, query_bias, key_bias = vectors
    wide = key.double()
    if query.shape[1] != key.shape[1]:
        wide = torch.cat([wide, key.square().double()], 1)
    scores = torch.tensor(scale, dtype=torch.float32).double() * (wide.mT @ query.double())
    scores = scores + (0 if query_bias is None else query_bias.double()[:, None])
    scores = scores * (1 if shrinkage is None else shrinkage.double()[:, :, None])
    scores = scores + (0 if key_bias is None else key_bias.double()[:, :, None])
    seen = scores.isfinite()
    assert torch.equal(near.isfinite(), seen)
    score, index = by_fma(query, key, vectors, key.shape[2], scale)
    found = index >= 0
    far = torch.where(found, score.double() - near.double().gather(1, index.clamp(min=0)), 0)
    assert (far.abs() <= bound.double().gather(1, index.clamp(min=0))).all()
    return (near.double() - scores)[seen].abs(), bound.double()[seen]


def aligned(size):
    """16 equal channels in all, rounded by nearly half a unit of bfloat16 each, all downwards."""
    return torch.full((1, 16, size), 1 + 2.0**-8 - 2.0**-16)


ADVERSARIAL = {
    "normal": lambda: (*problem(p=33, m=300)[:2], (None, None, None)),
    "every vector": lambda: problem("squares shrinkage query_bias key_bias", p=33, m=300),
    "offset": lambda: (*(t + 50 for t in problem(p=33, m=300)[:2]), (None, None, None)),
    "aligned losses": lambda: (aligned(33), aligned(300), (None, None, None)),
    "one ulp": lambda: (aligned(33), aligned(300) + 2.0**-23 * torch.arange(300), (None, None, None)),
    "huge": lambda: (*(t * 1e14 for t in problem(p=33, m=300)[:2]), (None, None, None)),
    "tiny": lambda: (*(t * 1e-20 for t in problem(p=33, m=300)[:2]), (None, None, None)),
    "denormal": lambda: (*(t * 1e-40 for t in problem(p=33, m=300)[:2]), (None, None, None)),
    "huge and tiny": lambda: (
        random(1, 40, 33) * 10.0 ** (3 * random(1, 40, 33, seed=1)),
        random(1, 40, 300) * 10.0 ** (3 * random(1, 40, 300, seed=2)),
        (None, None, None),
    ),
    "large bias": lambda: (*problem(p=33, m=300)[:2], (None, None, -1e9 * random(1, 300).square())),
    "cancelling": lambda: (
        torch.cat([random(1, 20, 33), -random(1, 20, 33)], 1) * 1e3,
        random(1, 20, 300, seed=1).repeat(1, 2, 1),
        (None, None, None),
    ),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_no_score_is_farther_from_its_approximation_than_the_bound(case):
    distance, bound = bounds(*ADVERSARIAL[case]())
    assert (distance <= bound).all()


def test_half_the_bound_would_not_hold():
    distance, bound = bounds(*ADVERSARIAL["aligned losses"]())
    assert (distance > 0.9 * bound).all()


def test_the_bound_is_near_what_rounding_does():
    """It chooses: on normal numbers its greatest is a twentieth of the scores' spread."""
    query, key, _ = problem(c=64, m=3000)
    near, bound = torch.ops.vosops.memory_select_bounds(query, key, None, None, None, SCALE)
    assert bound.max() < 0.06 * near.std()
