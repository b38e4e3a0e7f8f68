"""local_matching: the contract of the matching ops, what is its own, and the original implementations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vosops
from tests.effort import examples
from tests.ops.matching import (
    LAYOUTS,
    WRONG_ARGUMENTS,
    MatchingTester,
    assert_matches,
    blobs,
    channels_first,
    embeddings,
    pytest_parameters,
)
from vosops.reference import local_matching_core


class TestLocalMatching(MatchingTester):
    name = "local_matching"
    oracle = staticmethod(local_matching_core)
    cases = {
        "small": ((2, 4, 6, 7), (6, 7), 2, ([1, 2], 1)),
        "plain": ((1, 16, 12, 19), (12, 19), 2, ([3], 1)),
        "batch": ((2, 5, 9, 23), (9, 23), 3, ([2], 1)),
        "nested radii": ((1, 8, 11, 21), (11, 21), 2, ([1, 3, 6], 1)),
        "dilation": ((1, 7, 17, 20), (17, 20), 2, ([6], 3)),
        "nested radii and dilation": ((1, 4, 13, 18), (13, 18), 1, ([2, 4, 7], 2)),
        "dilation beyond a word of mask": ((1, 3, 3, 70), (3, 70), 2, ([66], 33)),
        "radius below the dilation": ((1, 4, 7, 9), (7, 9), 1, ([1], 4)),
        "radius zero": ((1, 3, 6, 17), (6, 17), 1, ([0], 1)),
        "window larger than the frame": ((1, 6, 5, 7), (5, 7), 2, ([40], 1)),
        "one pixel": ((1, 9, 1, 1), (1, 1), 1, ([2], 1)),
        "one column": ((1, 2, 33, 1), (33, 1), 1, ([5], 1)),
        "one channel": ((1, 1, 8, 9), (8, 9), 1, ([2], 1)),
        "wide": ((1, 33, 6, 67), (6, 67), 1, ([7], 1)),
    }
    variants = [{"radius": 2}, {"radius": (1, 3), "dilation": 2}]
    wrong_arguments = [
        *WRONG_ARGUMENTS,
        (lambda q, k, m: {"radius": -1}, ValueError, "radius must be at least 0, got -1"),
        (lambda q, k, m: {"radius": 1.5}, TypeError, "radius must be an int, got float"),
        (lambda q, k, m: {"radius": (2, 2)}, ValueError, "radius must be an int or an ascending sequence"),
        (lambda q, k, m: {"radius": ()}, ValueError, "radius must be an int or an ascending sequence"),
        (lambda q, k, m: {"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    ]

    def test_nested_radii_are_separate_radii_in_one_pass(self, problem):
        query, key, mask, _ = problem
        nested = vosops.local_matching(query, key, mask, radius=(1, 2, 5))
        for i, radius in enumerate((1, 2, 5)):
            assert torch.equal(nested[:, :, i], vosops.local_matching(query, key, mask, radius=radius))
        assert (nested.diff(dim=2) <= 0).all()


def pytest_generate_tests(metafunc):
    pytest_parameters(TestLocalMatching, metafunc)


@settings(max_examples=examples(60), deadline=None)
@given(
    n=st.integers(1, 2), c=st.integers(1, 20), h=st.integers(1, 20), w=st.integers(1, 40), o=st.integers(1, 4),
    radii=st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True), dilation=st.integers(1, 4),
    density=st.floats(0, 1), dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS), masked=st.booleans(),
)  # fmt: skip
def test_core_on_random_problems(n, c, h, w, o, radii, dilation, density, dtype, layout, masked):
    query, key = (embeddings((n, c, h, w), dtype, layout) for _ in range(2))
    mask, query_mask = blobs((n, o, h, w), density), blobs((n, h, w)) if masked else None
    options = (mask, sorted(radii), dilation, query_mask)
    distance, index = torch.ops.vosops.local_matching(query, key, *options, "ieee")
    assert_matches(
        distance, index, query, key, local_matching_core(query.double(), key.double(), *options)[0]
    )


@pytest.mark.parametrize("case", ["feelvos_basic", "feelvos_empty"])
def test_golden_feelvos(golden, case):
    data = golden("feelvos_tf_matching.pt")[case]
    mask = torch.stack([data["labels"] == v for v in data["gt_ids"]])[None]
    ours = vosops.local_matching(
        channels_first(data["query"]), channels_first(data["prev"]), mask, radius=int(data["max_distance"])
    )
    torch.testing.assert_close(ours[0].permute(1, 2, 0), data["local_out"][0, ..., 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("radii", "dilation", "half"),
    [((2, 4, 6), 1, False), ((4,), 1, False), ((4, 8), 2, False), ((2, 4, 6), 1, True)],
)
def test_golden_cfbi(golden, radii, dilation, half):
    data = golden("cfbi_matching.pt")["basic"]
    name = f"local/dist={list(radii)}/down=False/atrous={dilation}/fp16={half}"
    query, key = (channels_first(data[side]) for side in ("query", "prev"))
    mask = channels_first(data["labels"]) > 0.9
    ours = vosops.local_matching(
        query, key, mask, radius=radii, dilation=dilation, bias=data["dis_bias"].flatten()
    )
    ours = torch.cat([ours[:, :, -1:], ours[:, :, :-1]], 2)  # CFBI puts the largest window first
    # With fp16=True the original rounds its distances to half precision.
    torch.testing.assert_close(
        ours[0].permute(2, 3, 0, 1), data[name][0].float(), rtol=0, atol=5e-3 if half else 1e-5
    )


def test_golden_cfbi_downsampled(golden):
    data = golden("cfbi_matching.pt")["basic"]
    height, width = data["query"].shape[:2]
    size = (height // 2 + 1, width // 2 + 1)
    radii = (2, 4, 6, 8, 10, 12)

    def resize(x, size, mode):
        align = {"bilinear": True, "nearest": None}[mode]
        return torch.nn.functional.interpolate(x, size, mode=mode, align_corners=align)

    query, key = (resize(channels_first(data[side]), size, "bilinear") for side in ("query", "prev"))
    mask = resize(channels_first(data["labels"]), size, "nearest") > 0.9
    ours = vosops.local_matching(query, key, mask, radius=radii, bias=data["dis_bias"].flatten())
    ours = torch.cat([ours[:, :, -1:], ours[:, :, :-1]], 2)[0]
    ours = resize(ours, (height, width), "bilinear").permute(2, 3, 0, 1)
    name = f"local/dist={list(radii)}/down=True/atrous=1/fp16=False"
    torch.testing.assert_close(ours, data[name][0], rtol=0, atol=1e-5)


def test_golden_cfbi_gradients(golden):
    data = golden("cfbi_matching.pt")["basic"]
    query, key = (channels_first(data[side]).double().requires_grad_() for side in ("query", "prev"))
    mask = channels_first(data["labels"]) > 0.9
    ours = vosops.local_matching(query, key, mask, radius=3)
    torch.testing.assert_close(
        ours[0].permute(1, 2, 0), data["naive64_k3_nobias"].double(), rtol=0, atol=1e-6
    )
    ours.backward(data["naive64_grad_out"].double().permute(2, 0, 1)[None])
    for got, want in ((query, "naive64_grad_query"), (key, "naive64_grad_prev")):
        torch.testing.assert_close(got.grad[0].permute(1, 2, 0), data[want].double(), rtol=1e-5, atol=1e-6)
