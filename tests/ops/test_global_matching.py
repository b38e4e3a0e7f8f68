"""global_matching: the contract of the matching ops, what is its own, and the original implementations."""

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
from vosops.reference import global_matching_core


class TestGlobalMatching(MatchingTester):
    name = "global_matching"
    oracle = staticmethod(global_matching_core)
    cases = {
        "small": ((2, 4, 4, 5), (2, 3, 4), 2, (2,)),
        "plain": ((1, 16, 12, 19), (1, 7, 12), 2, (1,)),
        "batch": ((2, 5, 9, 23), (2, 6, 7), 3, (1,)),
        "neighbors": ((1, 8, 7, 11), (1, 9, 10), 2, (5,)),
        "more neighbors than pixels": ((1, 8, 3, 5), (1, 2, 3), 2, (9,)),
        "one pixel": ((1, 9, 1, 1), (1, 1, 1), 1, (1,)),
        "one channel": ((1, 1, 8, 9), (1, 8, 9), 1, (2,)),
        "many channels": ((1, 131, 5, 13), (1, 5, 13), 1, (1,)),
        "many reference pixels": ((1, 6, 3, 17), (3, 20, 31), 2, (3,)),
    }
    variants = [{"neighbors": 1}, {"neighbors": 3}]
    wrong_arguments = [
        *WRONG_ARGUMENTS,
        (lambda q, k, m: {"neighbors": 0}, ValueError, "neighbors must be at least 1, got 0"),
        (lambda q, k, m: {"neighbors": 2.0}, TypeError, "neighbors must be an int, got float"),
        (
            lambda q, k, m: {"key": [k], "mask": m},
            ValueError,
            "mask must be a sequence with one mask for each",
        ),
        (lambda q, k, m: {"key": [], "mask": []}, ValueError, "at least one"),
    ]

    def test_frames_as_a_tensor_a_single_one_or_a_sequence_agree(self, problem):
        query, key, mask, _ = problem
        want = vosops.global_matching(query, key, mask)
        frames, masks = list(key.unbind(2)), list(mask.unbind(2))
        torch.testing.assert_close(vosops.global_matching(query, frames, masks), want)
        one = vosops.global_matching(query, frames[0], masks[0])
        torch.testing.assert_close(vosops.global_matching(query, frames[:1], masks[:1]), one)

    def test_is_local_matching_with_a_window_over_everything(self):
        query, key = torch.randn(2, 1, 6, 9, 20)
        mask = blobs((1, 2, 9, 20))
        want = vosops.local_matching(query, key, mask, radius=20, return_indices=True)
        got = vosops.global_matching(query, key, mask, return_indices=True)
        torch.testing.assert_close(got, want)


def pytest_generate_tests(metafunc):
    pytest_parameters(TestGlobalMatching, metafunc)


@settings(max_examples=examples(60), deadline=None)
@given(
    n=st.integers(1, 2), c=st.integers(1, 40), h=st.integers(1, 9), w=st.integers(1, 40), o=st.integers(1, 4),
    t=st.integers(1, 3), h2=st.integers(1, 9), w2=st.integers(1, 20), neighbors=st.integers(1, 7),
    density=st.floats(0, 1), dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS), masked=st.booleans(),
)  # fmt: skip
def test_core_on_random_problems(n, c, h, w, o, t, h2, w2, neighbors, density, dtype, layout, masked):
    query, key = embeddings((n, c, h, w), dtype, layout), embeddings((n, c, t, h2, w2), dtype, layout)
    mask, query_mask = blobs((n, o, t, h2, w2), density), blobs((n, h, w)) if masked else None
    options = (mask, neighbors, query_mask)
    distance, index = torch.ops.vosops.global_matching(query, key, *options, "ieee")
    assert_matches(
        distance, index, query, key, global_matching_core(query.double(), key.double(), *options)[0]
    )
    flat = index.movedim(2, -1)
    distinct = (flat.unsqueeze(-1) == flat.unsqueeze(-2)).tril(-1) & (flat >= 0).unsqueeze(-1)
    assert not distinct.any(), "a pixel was chosen twice"
    assert (distance.clamp(max=1e30).movedim(2, -1).diff() >= -1e-4).all()


@pytest.mark.parametrize("case", ["feelvos_basic", "feelvos_empty"])
def test_golden_feelvos(golden, case):
    data = golden("feelvos_tf_matching.pt")[case]
    mask = torch.stack([data["labels"] == v for v in data["gt_ids"]])[None]
    query, key = channels_first(data["query"]), channels_first(data["first"])
    ours = vosops.global_matching(query, key, mask)
    torch.testing.assert_close(ours[0].permute(1, 2, 0), data["global_out"][0, ..., 0], rtol=0, atol=1e-5)
    # Where an object is absent the original's k-nearest mode gives 0 and its nearest mode 1e20; ours +inf.
    present = mask.any((0, 2, 3))
    for neighbors, name in ((1, "global_dist"), (3, "global_dist_k3")):
        raw = vosops.global_matching(query, key, mask, neighbors=neighbors, normalize=False)[0].permute(
            1, 2, 0
        )
        want = data[name][0, ..., 0]
        torch.testing.assert_close(raw[..., present], want[..., present], rtol=1e-5, atol=1e-5)
        assert raw[..., ~present].isposinf().all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("frames", [1, 2])
def test_golden_cfbi(golden, frames, half):
    data = golden("cfbi_matching.pt")["basic"]
    name = f"global{'_eval2' if frames == 2 else ''}/atrous=1/fp16={half}"
    query = channels_first(data["query"])
    keys = [channels_first(data[side]) for side in ("ref", "prev")[:frames]]
    mask = channels_first(data["labels"]) > 0.9
    masks = [mask, mask.flip(2)][:frames]  # the case mirrors the labels of its second frame
    ours = vosops.global_matching(query, keys, masks, bias=data["dis_bias"].flatten())
    # With fp16=True the original rounds its distances to half precision.
    torch.testing.assert_close(
        ours[0].permute(1, 2, 0), data[name][0, ..., 0].float(), rtol=0, atol=5e-3 if half else 1e-5
    )


def test_golden_cfbi_without_a_label(golden):
    data = golden("cfbi_matching.pt")["basic"]
    nothing = torch.zeros_like(channels_first(data["labels"]))
    ours = vosops.global_matching(channels_first(data["query"]), channels_first(data["ref"]), nothing)
    assert torch.equal(ours[0].permute(1, 2, 0), data["global_nolabel"][0, ..., 0])
