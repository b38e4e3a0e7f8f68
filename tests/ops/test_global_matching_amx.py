"""global_matching on the matrix engine or its twin: what the float32 kernel finds, to the bit.

That kernel serves in the same process where few query pixels are wanted, so a frame is done again in parts.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.effort import examples
from tests.ops.backends import assert_same_bits
from tests.ops.matching import blobs

ON_AMX = torch.ops.vosops.cpu_capability().startswith("amx") and not torch.ops.vosops.amx_refusal()
pytestmark = pytest.mark.skipif(not ON_AMX, reason="needs the library for AMX, or its twin")

HEIGHT, WIDTH, FRAMES = 31, 40, 2
PART = 24
"""Rows of a frame that are done by the kernel without the filter: fewer pixels than the filter takes."""


def counts() -> dict[str, int]:
    counted = (entry.split("=") for entry in torch.ops.vosops.amx_counts().split())
    return {name: int(value) for name, value in counted}


def counted_by(call) -> tuple[object, dict[str, int]]:
    """Return a call's result, and what the filter counted meanwhile: frames served, queries left and why."""
    before = counts()
    result = call()
    return result, {
        name: counts()[f"global_matching.{name}"] - before[f"global_matching.{name}"]
        for name in ("filter", "overflow", "range", "hopeless")
    }


def embeddings(channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, channels, HEIGHT, WIDTH, generator=generator)
    return query, torch.randn(1, channels, FRAMES, HEIGHT, WIDTH, generator=generator)


def match(query: Tensor, key: Tensor, mask: Tensor, neighbors: int = 1, query_mask: Tensor | None = None):
    return torch.ops.vosops.global_matching(query, key, mask, neighbors, query_mask, "ieee")


def by_float32(query: Tensor, key: Tensor, mask: Tensor, neighbors: int = 1) -> tuple[Tensor, Tensor]:
    """Return what the kernel without the filter finds, a few rows at a time."""
    parts = []
    for first in (0, PART):
        wanted = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
        wanted[:, first : first + PART] = True
        rows, done = counted_by(lambda wanted=wanted: match(query, key, mask, neighbors, wanted))
        assert done["filter"] == 0
        parts.append([result[..., first : first + PART, :] for result in rows])
    distance, index = (torch.cat(part, -2) for part in zip(*parts, strict=True))
    return distance, index


def rounding(query: Tensor, key: Tensor) -> float:
    """Return what fused sums may change in a distance: some ulp of the longest embedding's square."""
    both = torch.cat([query.flatten(2), key.flatten(2)], 2).double().nan_to_num(0, 0, 0)
    return 2**-21 * both.square().sum(1).max().item()


def assert_is_that_of_float32(query: Tensor, key: Tensor, mask: Tensor, neighbors: int = 1) -> dict[str, int]:
    got, done = counted_by(lambda: match(query, key, mask, neighbors))
    assert done["filter"] == 1
    expected = by_float32(query, key, mask, neighbors)
    assert_same_bits(got, expected, 1e-5, max(1e-5, rounding(query, key)))
    return done


MASK = blobs((1, 3, FRAMES, HEIGHT, WIDTH), 0.7)
EVERYWHERE = torch.ones(1, 1, FRAMES, HEIGHT, WIDTH, dtype=torch.bool)


@pytest.mark.parametrize("neighbors", [1, 4, 16])
@pytest.mark.parametrize("channels", [1, 29, 32, 100])
def test_channels_and_neighbors(channels, neighbors):
    done = assert_is_that_of_float32(*embeddings(channels), MASK, neighbors)
    assert neighbors == 16 or channels == 1 or done["overflow"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    query, key = (side.to(dtype) for side in embeddings(70))
    got = match(query, key, MASK)
    assert_is_that_of_float32(query, key, MASK)
    in_float32 = match(query.float(), key.float(), MASK)
    assert all(torch.equal(a, b) for a, b in zip(got, in_float32, strict=True))


def one_in_a_hundred(like: Tensor) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(1)) < 0.01


ADVERSARIAL = {
    "equal keys": lambda q, k: (q, k[:, :, :1, :1, :1].expand_as(k).clone()),
    "pairs of equal keys": lambda q, k: (q, k[:, :, :1].expand_as(k).clone()),
    "small integers": lambda q, k: (q.round(), k.round()),
    "one ulp apart": lambda q, k: (
        q,
        torch.nextafter(k[:, :, :1, :1, :1].expand_as(k), k.sign() * torch.inf),
    ),
    "keys of the query": lambda q, k: (q, q.unsqueeze(2).expand_as(k) * (1 + 1e-7 * k)),
    "common offset": lambda q, k: (q + 3, k + 3),
    "large common offset": lambda q, k: (q + 1000, k + 1000),
    "one long key": lambda q, k: (q, k.where(torch.arange(WIDTH) != 7, 1e4)),
    "one key whose square is almost infinite": lambda q, k: (q, k.where(torch.arange(WIDTH) != 7, 1e18)),
    "infinite squares": lambda q, k: (
        q.where(~one_in_a_hundred(q[:, :1]), 1e25),
        k.where(~one_in_a_hundred(k[:, :1]), 1e25),
    ),
    "long": lambda q, k: (q * 1e16, k * 1e16),
    "short": lambda q, k: (q * 1e-18, k * 1e-18),
    "denormal": lambda q, k: (q * 1e-39, k * 1e-39),
    "some denormal": lambda q, k: (
        q.where(~one_in_a_hundred(q), 1e-40),
        k.where(~one_in_a_hundred(k), 1e-40),
    ),
    "every magnitude": lambda q, k: (
        q * 10 ** (9 * q.roll(1, 1)[:, :1]),
        k * 10 ** (9 * k.roll(1, 1)[:, :1]),
    ),
    "NaN": lambda q, k: (
        q.where(~one_in_a_hundred(q[:, :1]), torch.nan),
        k.where(~one_in_a_hundred(k[:, :1]), torch.nan),
    ),
    "infinite": lambda q, k: (
        q.where(~one_in_a_hundred(q[:, :1]), torch.inf),
        k.where(~one_in_a_hundred(k[:, :1]), -torch.inf),
    ),
}


@pytest.mark.parametrize("neighbors", [1, 3])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_embeddings(name, neighbors):
    assert_is_that_of_float32(*ADVERSARIAL[name](*embeddings(12)), MASK, neighbors)


@settings(max_examples=examples(6), deadline=None)
@given(
    channels=st.integers(1, 70), seed=st.integers(0, 999), neighbors=st.integers(1, 5),
    offset=st.floats(-30, 30), spread=st.floats(0, 1), density=st.floats(0.5, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_random_problems(channels, seed, neighbors, offset, spread, density, dtype):
    query, key = embeddings(channels, seed)
    query, key = ((offset + spread * side + side.round()).to(dtype) for side in (query, key))
    mask = blobs((1, 2, FRAMES, HEIGHT, WIDTH), density)
    if mask.any(1).sum() >= 1024:
        assert_is_that_of_float32(query, key, mask, neighbors)


def test_the_first_of_equal_keys_wins():
    query, key = embeddings(40)
    key[:, :, 1] = key[:, :, 0]
    _, index = match(query, key, EVERYWHERE)
    assert (index < HEIGHT * WIDTH).all()


def test_a_query_whose_list_overflows_is_left_to_float32():
    query, key = embeddings(40)
    key[..., :20] = key[:, :, :1, :1, :1]  # more equal keys than a list holds panels for
    query[..., :5, :] = key[:, :, 0, :1, :1]  # the nearest of these queries, and of few others
    done = assert_is_that_of_float32(query, key, EVERYWHERE)
    assert 5 * WIDTH <= done["overflow"] < HEIGHT * WIDTH
    assert assert_is_that_of_float32(*embeddings(40), EVERYWHERE)["overflow"] == 0


def test_where_most_lists_would_overflow_float32_serves_the_frame():
    query, key = embeddings(40)
    done = assert_is_that_of_float32(query, key[:, :, :1, :1, :1].expand_as(key), EVERYWHERE)
    assert done["hopeless"] == 1 and done["overflow"] <= 32  # those of the queries that were tried


def test_a_query_that_could_overflow_is_left_to_float32():
    query, key = embeddings(8)
    query[..., 3, 4:9] = 1e18
    assert assert_is_that_of_float32(query, key, EVERYWHERE) == {
        "filter": 1,
        "overflow": 0,
        "range": 5,
        "hopeless": 0,
    }


def test_strides_and_skipped_queries():
    query, key = embeddings(33)
    wanted = blobs((1, HEIGHT, WIDTH), 0.95)
    assert wanted.sum() >= 1024
    expected = match(query, key, MASK, 2, wanted)
    assert all(
        (result.movedim((0, 3, 4), (0, 1, 2))[~wanted] == absent).all()
        for result, absent in zip(expected, (torch.inf, -1), strict=True)
    )
    for permute in ((0, 2, 3, 1), (0, 1, 3, 2), (2, 3, 0, 1)):
        back = [permute.index(i) for i in range(4)]
        strided = query.permute(permute).contiguous().permute(back)
        keys = [frame.permute(permute).contiguous().permute(back) for frame in key.unbind(2)]
        last = torch.stack(keys, -1).movedim(-1, 2)
        got, done = counted_by(lambda q=strided, k=last: match(q, k, MASK, 2, wanted))
        assert done["filter"] == 1
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_threads_do_not_change_the_result():
    query, key = embeddings(20)
    key[..., 3, :] = query[..., :1, :1].unsqueeze(2).squeeze(-1)  # some ties
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(match(query, key, MASK, 3))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
