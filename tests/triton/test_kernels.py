"""What the Triton kernels do beyond the contract that tests/ops checks: tilings, skipped work, scores.

They run in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU. The interpreter proves the logic; only a GPU proves
precision.
"""

from __future__ import annotations

import pytest
import torch

from tests.effort import one_at_a_time
from tests.ops.matching import assert_matches, blobs, embeddings
from tests.triton.device import DEVICE
from vosops.reference import global_matching_core, local_matching_core
from vosops.triton import _common, global_matching, local_matching, matching_backward

LOW = (torch.float16, torch.bfloat16)


def check_local(query, key, mask, radius, dilation=1, query_mask=None, precision="ieee"):
    inputs = [None if t is None else t.to(DEVICE) for t in (query, key, mask, query_mask)]
    distance, index = local_matching.local_matching(*inputs[:3], radius, dilation, inputs[3], precision)
    expected, _ = local_matching_core(query.double(), key.double(), mask, radius, dilation, query_mask)
    assert_matches(distance, index, query, key, expected, precision)
    return distance.cpu(), index.cpu()


def check_global(query, key, mask, neighbors=1, query_mask=None, precision="ieee"):
    inputs = [None if t is None else t.to(DEVICE) for t in (query, key, mask, query_mask)]
    distance, index = global_matching.global_matching(*inputs[:3], neighbors, inputs[3], precision)
    expected, _ = global_matching_core(query.double(), key.double(), mask, neighbors, query_mask)
    assert_matches(distance, index, query, key, expected, precision)
    return distance.cpu(), index.cpu()


def pair(channels, height, width, dtype, frames=None):
    query = embeddings((1, channels, height, width), dtype)
    pixels = (height, width) if frames is None else (frames, height, width)
    return query, embeddings((1, channels, *pixels), dtype)


class TestTilings:
    @pytest.mark.parametrize("capability", [0, 8, 9, 10])
    @pytest.mark.parametrize("dtype", LOW)
    def test_every_target_finds_the_same_pixels(self, chip, capability, dtype):
        chip(capability)
        query, key = pair(20, 21, 13, dtype)
        check_local(query, key, blobs((1, 2, 21, 13)), [4])
        check_global(query, key.unsqueeze(2), blobs((1, 2, 1, 21, 13)))

    @pytest.mark.parametrize("channels", [1, 16, 17, 100, 129, 600])
    @pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, "ieee"), (torch.float32, "tf32")])
    def test_any_number_of_channels(self, channels, dtype, precision):
        query, key = pair(channels, 5, 9, dtype)
        check_local(query, key, blobs((1, 1, 5, 9)), [2], precision=precision)
        check_global(query, key.unsqueeze(2), blobs((1, 1, 1, 5, 9)), precision=precision)

    @pytest.mark.parametrize("channels", [1, 17, 100])
    @pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
    def test_exact_float32_walks_over_blocks_of_channels(self, channels, precision):
        query, key = pair(channels, 5, 9, torch.float32)
        check_local(query, key, blobs((1, 1, 5, 9)), [2], precision=precision)
        check_global(query, key.unsqueeze(2), blobs((1, 1, 1, 5, 9)), precision=precision)

    @pytest.mark.parametrize("channels", [1, 64, 100, 256, 1000])
    @pytest.mark.parametrize("dtype", _common.SUPPORTED_DTYPES)
    @pytest.mark.parametrize("precision", _common.PRECISIONS)
    def test_resident_tiles_fit_in_shared_memory(self, channels, dtype, precision):
        for capability, minor in ((0, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 0)):
            target = _common.Target(capability, 132, minor)
            choices = _common.tilings(channels, dtype, precision, target, many_queries=True)
            for tiling in choices:
                rows = tiling.queries + tiling.options["num_stages"] * tiling.keys
                assert tiling.channels >= channels
                limits = target.architecture
                assert rows * tiling.block_c * dtype.itemsize <= limits.staged_bytes <= limits.shared_bytes

    @pytest.mark.parametrize(
        ("capability", "products", "kilobytes"),
        [
            ((8, 0), "mma.sync", 163),
            ((8, 6), "mma.sync", 99),
            ((8, 7), "mma.sync", 163),
            ((8, 9), "mma.sync", 99),
            ((9, 0), "wgmma", 227),
            ((10, 0), "tcgen05", 227),
            ((10, 3), "tcgen05", 227),
            ((11, 0), "tcgen05", 227),
            ((12, 0), "mma.sync", 99),
            ((12, 1), "mma.sync", 99),
            ((7, 5), "mma.sync", 99),
            ((0, 0), "mfma", 64),
        ],
    )
    def test_every_capability_has_an_architecture(self, capability, products, kilobytes):
        """sm_120 follows sm_100 in number alone: it multiplies as sm_86 does and has as little shared memory."""
        found = _common.architecture_of(capability)
        assert (found.products, found.shared_bytes) == (products, kilobytes * 1024)

    def test_a_small_map_gets_small_tiles(self):
        target = _common.Target(9, 132)
        choices = _common.tilings(100, torch.bfloat16, "ieee", target)

        def queries(height, width):
            shape = (1, 100, height, width)
            plan = local_matching.launch_plan(
                shape, 1, (12,), 1, choices, "ieee", exact=False, processors=target.processors
            )
            return plan.constants["BLOCK_Q"]

        assert queries(120, 214) == 128
        assert queries(60, 107) == 64


class TestLocalWindow:
    @pytest.mark.parametrize("look", [True, False])
    @pytest.mark.parametrize("pixels", [[], [(0, 0)], [(19, 32)], [(2, 3), (18, 25)]])
    def test_blocks_that_no_object_needs_are_skipped_without_a_trace(self, monkeypatch, look, pixels):
        one_at_a_time((look, True), (pixels, [(2, 3), (18, 25)]))
        if not look:
            monkeypatch.setattr(local_matching, "MAX_WINDOW_BLOCKS", 0)
        query, key = pair(6, 20, 33, torch.float16)
        mask = torch.zeros(1, 2, 20, 33, dtype=torch.bool)
        for y, x in pixels:
            mask[0, 1, y, x] = True
        _, index = check_local(query, key, mask, [9])
        assert (index[:, 0] == -1).all()

    @pytest.mark.parametrize("objects", [1, 8, 9, 17])
    def test_more_objects_than_a_program_serves(self, objects):
        query, key = pair(4, 7, 10, torch.float16)
        check_local(query, key, blobs((1, objects, 7, 10)), [2])

    def test_more_radii_than_a_program_has_slots(self):
        query, key = pair(4, 9, 8, torch.float16)
        check_local(query, key, blobs((1, 2, 9, 8)), list(range(10)))

    def test_nested_distances_never_increase_although_scores_are_rounded(self):
        query, key = pair(3, 16, 17, torch.bfloat16)
        distance, _ = check_local(query, key, blobs((1, 1, 16, 17)), [1, 2, 3, 5, 8])
        assert (distance.diff(dim=2).nan_to_num(0) <= 0).all()

    def test_nothing_wanted(self):
        query, key = pair(4, 6, 6, torch.float32)
        unwanted = torch.zeros(1, 6, 6, dtype=torch.bool)
        distance, index = check_local(query, key, blobs((1, 1, 6, 6)), [2], query_mask=unwanted)
        assert distance.isposinf().all() and (index == -1).all()


class TestGlobalLists:
    @pytest.mark.parametrize("neighbors", [1, 3])
    def test_shares_of_a_list_are_merged(self, monkeypatch, neighbors):
        monkeypatch.setattr(global_matching, "SHARE", 64)
        query, key = pair(5, 13, 12, torch.float16, frames=3)
        check_global(query, key, blobs((1, 2, 3, 13, 12)), neighbors)

    def test_shares_are_bounded(self, monkeypatch):
        monkeypatch.setattr(global_matching, "SHARE", 1)
        monkeypatch.setattr(global_matching, "MAX_SHARES", 3)
        query, key = pair(5, 16, 17, torch.float16)
        check_global(query, key.unsqueeze(2), blobs((1, 1, 1, 16, 17)))

    @pytest.mark.parametrize("members", [0, 1, 5, 63, 64, 65, 130])
    def test_lists_of_any_length(self, members):
        query, key = pair(3, 13, 10, torch.float32)
        mask = (torch.randperm(130) < members).view(1, 1, 1, 13, 10)
        _, index = check_global(query, key.unsqueeze(2), mask, neighbors=4)
        assert ((index >= 0).sum(2) == min(members, 4)).all()

    @pytest.mark.parametrize("dtype", LOW)
    def test_no_neighbor_is_found_twice(self, dtype):
        query, key = pair(2, 9, 9, dtype)
        _, index = check_global(
            query, key.unsqueeze(2), torch.ones(1, 1, 1, 9, 9, dtype=torch.bool), neighbors=7
        )
        assert all(len(set(chosen)) == 7 for chosen in index[0, 0].flatten(1).T.tolist())

    def test_no_reference_pixels(self):
        query = embeddings((1, 3, 4, 5), torch.float32)
        query[0, 1, 2, 3] = torch.nan
        key, mask = query.new_empty(1, 3, 0, 4, 5), torch.ones(1, 2, 0, 4, 5, dtype=torch.bool)
        distance, index = global_matching.global_matching(
            *(t.to(DEVICE) for t in (query, key, mask)), 1, None, "ieee"
        )
        assert (index == -1).all()
        assert distance[:, :, :, 2, 3].isnan().all() and distance.isposinf().sum() == 2 * 19


def test_pixels_at_equal_distances_are_recognised():
    frames = torch.empty(2, 3, 4, 5, 6)
    assert global_matching.is_flat(frames)
    assert global_matching.is_flat(frames.to(memory_format=torch.channels_last_3d))
    assert global_matching.is_flat(frames[:, :, 1:3])
    assert global_matching.is_flat(frames[:, :, :, :, :1].contiguous())
    assert not global_matching.is_flat(frames[..., 1:])
    assert not global_matching.is_flat(frames[:, :, :, ::2])
    assert not global_matching.is_flat(frames.transpose(-1, -2))
    assert not global_matching.is_flat(frames[:, :, :, :1])
    assert not global_matching.is_flat(frames[..., :1])


class TestScores:
    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("shift", [0.0, 30.0])
    def test_a_perfect_match_is_found_at_distance_zero(self, dtype, shift):
        key = embeddings((1, 40, 12, 13), dtype) + shift
        everything = torch.ones(1, 1, 12, 13, dtype=torch.bool)
        pixel = torch.arange(12 * 13).view(12, 13)
        for distance, index in (
            check_local(key, key, everything, [5]),
            check_global(key, key.unsqueeze(2), everything.unsqueeze(2)),
        ):
            assert (distance == 0).all()
            assert torch.equal(index[0, 0, 0], pixel)

    @pytest.mark.parametrize("dtype", _common.SUPPORTED_DTYPES)
    def test_the_first_of_equal_pixels_wins(self, dtype):
        query, key = (side.round() for side in pair(5, 12, 19, dtype))
        key = key[:, :, :1, :1].expand(-1, -1, 12, 19)
        mask = blobs((1, 2, 12, 19))
        distance, index = local_matching.local_matching(
            query.to(DEVICE), key.to(DEVICE), mask.to(DEVICE), [2, 9], 1, None, "ieee"
        )
        expected = local_matching_core(query.double(), key.double(), mask, [2, 9], 1)[1]
        assert torch.equal(index.cpu(), expected)
        distance, index = global_matching.global_matching(
            query.to(DEVICE), key.unsqueeze(2).to(DEVICE), mask.unsqueeze(2).to(DEVICE), 3, None, "ieee"
        )
        expected = global_matching_core(query.double(), key.unsqueeze(2).double(), mask.unsqueeze(2), 3)[1]
        assert torch.equal(index.cpu(), expected)

    def test_the_bits_given_to_the_position_cost_little(self):
        query, key = pair(3, 12, 25, torch.float16)
        everything = torch.ones(1, 1, 12, 25, dtype=torch.bool)
        nearest = local_matching_core(query.double(), key.double(), everything, [9], 1)[0]
        distance, _ = check_local(query, key, everything, [9])
        # One part in 2**17 for the position (64 keys), two norms' rounding in float32 for the score.
        norms = query.double().square().sum(1) + key.double().square().sum(1).amax()
        assert ((distance - nearest) <= 2**-16 * nearest + 2**-20 * norms).all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 2e18])
    def test_embeddings_that_cannot_be_matched(self, value):
        query, key = pair(4, 6, 9, torch.float32)
        key[0, 1, 2, 3] = key[0, 0, 5, 5] = value
        query[0, 2, 1, 1] = value
        mask = torch.ones(1, 1, 6, 9, dtype=torch.bool)
        inputs = [t.to(DEVICE) for t in (query, key, mask)]
        for distance, index in (
            local_matching.local_matching(*inputs, [3], 1, None, "ieee"),
            global_matching.global_matching(
                inputs[0], inputs[1][:, :, None], inputs[2][:, :, None], 1, None, "ieee"
            ),
        ):
            distance, index = distance.cpu()[0, 0, 0], index.cpu()[0, 0, 0]
            assert not torch.isin(index, torch.tensor([2 * 9 + 3, 5 * 9 + 5])).any()
            assert index[1, 1] == -1
            assert distance[1, 1].isnan() if value != value else distance[1, 1].isposinf()
            assert distance.isfinite().sum() == 6 * 9 - 1


class TestBackward:
    @pytest.mark.parametrize("dtype", _common.SUPPORTED_DTYPES)
    def test_a_key_chosen_by_every_query(self, dtype):
        query, key = embeddings((2, 3, 70), dtype), embeddings((2, 3, 4), dtype)
        index = torch.full((2, 2, 70), 2)
        grad = torch.rand(2, 2, 70)
        gradients = matching_backward.matching_backward(*(t.to(DEVICE) for t in (grad, query, key, index)))
        pull = 2 * grad.sum(1, keepdim=True).double() * (query.double() - key[:, :, 2:3].double())
        torch.testing.assert_close(gradients[0].cpu(), pull.to(dtype))
        assert (gradients[1][:, :, [0, 1, 3]] == 0).all()
        torch.testing.assert_close(gradients[1][:, :, 2].cpu(), -pull.sum(-1).to(dtype))

    def test_absent_entries_contribute_nothing(self):
        query, key = embeddings((1, 3, 5), torch.float32), embeddings((1, 3, 4), torch.float32)
        grad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, torch.nan]).view(1, 1, 5)
        index = torch.full((1, 1, 5), -1)
        for gradient in matching_backward.matching_backward(
            *(t.to(DEVICE) for t in (grad, query, key, index))
        ):
            assert (gradient == 0).all()


def test_float64_is_refused():
    query, key = pair(2, 3, 3, torch.float64)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="float32, float16 or bfloat16 for the Triton kernels"):
        local_matching.local_matching(query, key, mask, [1], 1, None, "ieee")


def test_unknown_precision_is_refused():
    query, key = pair(2, 3, 3, torch.float32)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32, tf32x3, got 'fp8'"):
        local_matching.local_matching(query, key, mask, [1], 1, None, "fp8")
