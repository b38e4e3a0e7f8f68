"""local_matching by Intel's matrix engine or its twin: the bfloat16 filter loses nothing, and what is not for it."""

from __future__ import annotations

import os

import pytest
import torch

from tests.ops.matching import LAYOUTS, assert_matches, blobs, direct_distance, embeddings
from vosops._library import CPU_CAPABILITY
from vosops.reference import local_matching_core

pytestmark = pytest.mark.skipif(
    CPU_CAPABILITY != "amx" or torch.ops.vosops.amx_refusal() != "",
    reason="neither AMX nor its twin is loaded (VOSOPS_AMX_TWIN=1 VOSOPS_CPU_CAPABILITY=amx after such a build)",
)

TWIN = os.environ.get("VOSOPS_AMX_TWIN") == "1"
TWIN_ONLY = pytest.mark.skipif(not TWIN, reason="too small for tiles; the twin takes every size")
SHAPE = (1, 40, 34, 45)  # two steps of channels, the second of 8; three panels of columns, the last of 13
OPTIONS = ([16], 1)
CHECK_ERROR = 2e-6
"""Of a squared distance computed from differences in float32, relative: the nearest may be this much farther."""


def counts():
    return {name: int(n) for name, n in (item.split("=") for item in torch.ops.vosops.amx_counts().split())}


def counted(name, f):
    """The result of f(), which adds 1 to the counter `name` and nothing to the others of the op."""
    before = counts()
    result = f()
    added = {key: n - before[key] for key, n in counts().items() if key.startswith("local_matching")}
    assert {key: n for key, n in added.items() if n} == {name: 1}
    return result


def match(query, key, mask, options=OPTIONS, query_mask=None, counter="local_matching.filter"):
    call = torch.ops.vosops.local_matching
    return counted(counter, lambda: call(query, key, mask, *options, query_mask, "highest"))


def assert_nearest(result, query, key, mask, options=OPTIONS, query_mask=None):
    """Every pixel found is the nearest to the rounding of float32 differences, however close the next."""
    distance, index = result
    oracle = local_matching_core(query.double(), key.double(), mask, *options, query_mask)[0]
    found = oracle.isfinite()
    assert torch.equal(index >= 0, found)
    assert torch.equal(distance.isposinf(), ~found)
    chosen = direct_distance(query, key, index)
    torch.testing.assert_close(distance.double()[found], chosen[found], rtol=CHECK_ERROR, atol=0)
    torch.testing.assert_close(chosen[found], oracle[found], rtol=CHECK_ERROR, atol=0)


def smooth(noise):
    coarse = torch.randn(1, SHAPE[1], 4, 6)
    fine = torch.nn.functional.interpolate(coarse, size=SHAPE[2:], mode="bicubic")
    return fine + noise * torch.randn(SHAPE), fine + noise * torch.randn(SHAPE)


def one_rounding_apart():
    """All keys of a row are the same but for the last bit of one channel."""
    key = torch.randn(1, SHAPE[1], SHAPE[2], 1).expand(SHAPE).clone()
    channel = torch.randint(SHAPE[1], (SHAPE[3],))
    for x, c in enumerate(channel.tolist()):
        key[0, c, :, x] = torch.nextafter(key[0, c, :, x], torch.tensor(torch.inf))
    return torch.randn(SHAPE), key


def with_a_huge_key():
    query, key = torch.randn(SHAPE), torch.randn(SHAPE)
    key[..., 11, 17] *= 1e6
    return query, key


DATA = {
    "normal": lambda: (torch.randn(SHAPE), torch.randn(SHAPE)),
    "far from zero": lambda: (torch.randn(SHAPE) + 300, torch.randn(SHAPE) + 300),
    "smooth": lambda: smooth(0.02),
    "very smooth": lambda: smooth(1e-4),
    "one rounding apart": one_rounding_apart,
    "a huge key": with_a_huge_key,
    "wide range": lambda: tuple(torch.randn(SHAPE) * 10 ** torch.empty(SHAPE).uniform_(-9, 4) for _ in "qk"),
    "small": lambda: (torch.randn(SHAPE) * 1e-12, torch.randn(SHAPE) * 1e-12),
    "large": lambda: (torch.randn(SHAPE) * 1e15, torch.randn(SHAPE) * 1e15),
}


@pytest.mark.parametrize("data", DATA)
def test_the_nearest_pixel_is_found_whatever_the_data(data):
    query, key = DATA[data]()
    mask = blobs((1, 2, *SHAPE[2:]))
    assert_nearest(match(query, key, mask), query, key, mask)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("nearest_first", [True, False])
def test_the_bound_holds_where_rounding_does_its_worst(sign, nearest_first):
    # Rounding to bfloat16 takes the most it can from every channel. The nearest key lies where that makes its
    # product with the query too small, the other where it makes it too large: together their scores are wrong by
    # 0.7 of the sum of their bounds, and in the wrong order by 0.67. With half the bound, or without the share of the
    # query or the key, the filter loses the nearest.
    lost = 0.98 * 2**-8  # of numbers from 1 to 2, where bfloat16 are 2^-7 apart
    down, up = 1 + lost, 1 + 2**-7 - lost
    query, near, far = torch.zeros(3, 33)
    query[:16], query[16:32] = down, up
    near[:16], far[16:32] = down, up
    far[32] = 0.171875  # a bfloat16: makes the second key the farther one
    assert torch.equal(query[[0, 16]] - query[[0, 16]].bfloat16().float() > 0, torch.tensor([True, False]))
    key = torch.zeros(1, 33, *SHAPE[2:])  # nothing but these two, where the mean is not sampled: it stays 0
    places = (2, 20), (3, 21)
    mask = torch.zeros(1, 1, *SHAPE[2:], dtype=torch.bool)
    for (y, x), value in zip(places, (near, far) if nearest_first else (far, near), strict=True):
        key[0, :, y, x] = sign * value
        mask[0, 0, y, x] = True
    queries = (sign * query)[None, :, None, None].expand(1, 33, *SHAPE[2:])
    assert_nearest(match(queries, key, mask), queries, key, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout_with_everything_at_once(dtype, layout):
    query, key = (embeddings((2, *SHAPE[1:]), dtype, layout) for _ in "qk")
    mask, query_mask = blobs((2, 3 if TWIN else 1, *SHAPE[2:])), blobs((2, *SHAPE[2:]))
    options = ([2, 5, 12], 2) if TWIN else ([7, 16], 1)
    assert_nearest(match(query, key, mask, options, query_mask), query, key, mask, options, query_mask)


@TWIN_ONLY
def test_more_groups_than_are_kept_are_checked_in_between():
    query, key = torch.randn(SHAPE), torch.randn(SHAPE)
    mask, options = blobs((1, 9, *SHAPE[2:]), 0.6), ([2, 4, 6, 8, 10, 20], 1)
    assert_nearest(match(query, key, mask, options), query, key, mask, options)


def test_the_first_pixel_wins_a_tie_across_panels_and_rows():
    # Few different vectors of small integers: distances are exact and most are equal.
    query, key = (torch.randint(0, 2, SHAPE).float() * (torch.arange(40) < 3)[:, None, None] for _ in "qk")
    mask, options = blobs((1, 1, *SHAPE[2:])), ([3, 16], 1)
    want = local_matching_core(query, key, mask, *options)
    for have, expected in zip(match(query, key, mask, options), want, strict=True):
        assert torch.equal(have, expected)


def test_distances_that_are_denormal_are_what_they_are_without_tiles():
    # One channel holds numbers whose squares are denormal, another numbers that are denormal themselves.
    query, key = torch.zeros(SHAPE), torch.zeros(SHAPE)
    key[0, 5] = torch.randn(SHAPE[2:]) * 1e-21
    key[0, 6] = torch.randn(SHAPE[2:]) * 1e-41
    mask = blobs((1, 2, *SHAPE[2:]))
    want = local_matching_core(query, key, mask, *OPTIONS)
    assert (want[0] > 0).any() and want[0][want[1] >= 0].max() < 1e-38
    for have, expected in zip(match(query, key, mask), want, strict=True):
        assert torch.equal(have, expected)


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e18], ids=str)
def test_numbers_beyond_the_bound_are_left_to_multiply_adds(side, value):
    query, key = torch.randn(SHAPE), torch.randn(SHAPE)
    (query if side == "query" else key)[0, 3, 4, 5] = value
    mask = torch.ones(1, 1, *SHAPE[2:], dtype=torch.bool)
    result = match(query, key, mask, counter="local_matching.range")
    assert_matches(*result, query, key, local_matching_core(query.double(), key.double(), mask, *OPTIONS)[0])
    # What nobody asks for does not matter.
    wanted = torch.ones(1, *SHAPE[2:], dtype=torch.bool)
    (wanted if side == "query" else mask)[..., 4, 5] = False
    assert_nearest(
        match(query, key, mask, query_mask=wanted),
        query.nan_to_num(0, 0, 0),
        key.nan_to_num(0, 0, 0),
        mask,
        OPTIONS,
        wanted,
    )


def test_threads_do_not_change_the_result():
    query, key, mask = torch.randn(SHAPE), torch.randn(SHAPE), blobs((1, 2, *SHAPE[2:]))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(match(query, key, mask))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.skipif(TWIN, reason="the twin takes every size")
def test_small_problems_are_left_to_multiply_adds():
    query, key, mask = torch.randn(SHAPE), torch.randn(SHAPE), blobs((1, 1, *SHAPE[2:]))
    result = match(query, key, mask, ([2], 1), counter="local_matching.small")
    assert_nearest(result, query, key, mask, ([2], 1))
