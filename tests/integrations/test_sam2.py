"""SAM 2's video predictor, as it is installed, with seeded weights: the same masks, and sessions in fixed bytes."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from tests.integrations.sam2_models import SIDE, small_predictor, write_frames
from vosops.integrations import accelerate
from vosops.integrations.rotary import KeyCache
from vosops.integrations.sessions import reachable_bytes
from vosops.memory import MemoryBudgetError
from vosops.ops.memory_read import memory_read

TOLERANCE = 1e-4  # of logits
FRAMES = 12
HEIGHT, WIDTH = 96, 128


@pytest.fixture(scope="module")
def predictor():
    pytest.importorskip("sam2", reason="the package sam2 is not installed")
    return small_predictor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_frames(tmp_path_factory.mktemp("frames"), FRAMES, HEIGHT, WIDTH)


def session(predictor, folder):
    """Two objects by clicks and a box, corrections, a third object later, one removed -> all logits."""
    torch.manual_seed(0)
    results = []

    def propagate(first, count):
        for _, _, logits in predictor.propagate_in_video(state, first, count - 1):
            results.append(logits.clone())

    with torch.inference_mode():
        state = predictor.init_state(str(folder))
        add = predictor.add_new_points_or_box
        add(state, 0, 1, points=[[30.0, 40.0], [90.0, 20.0]], labels=[1, 0])
        add(state, 0, 2, box=[40.0, 30.0, 80.0, 90.0])
        propagate(0, 5)
        add(state, 4, 1, points=[[50.0, 50.0]], labels=[1])  # a correction
        mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        mask[10:40, 60:100] = True
        predictor.add_new_mask(state, 4, 7, mask)
        propagate(4, 4)
        predictor.remove_object(state, 2)
        propagate(8, 4)
    return results, state


@pytest.fixture(scope="module")
def expected(predictor, folder):
    return session(predictor, folder)[0]


@pytest.mark.parametrize("options", [{}, {"cache_keys": True}, {"objects_together": True}], ids=str)
def test_the_same_masks(predictor, folder, expected, options):
    with accelerate(predictor, **options) as acceleration:
        got, _ = session(predictor, folder)
    assert any("RoPEAttention.forward" in name for name in acceleration.replaced)
    assert len(got) == len(expected) == FRAMES + 1
    for a, b in zip(expected, got):
        torch.testing.assert_close(b, a, rtol=0, atol=TOLERANCE)
    assert [len(logits) for logits in got][-1] == 2


def test_objects_that_came_at_different_frames_are_read_in_one_call(predictor, folder, monkeypatch):
    calls = []

    def noted(query, key, value, *, memory_lengths=None, **options):
        lengths = None if memory_lengths is None else memory_lengths.tolist()
        calls.append((query.shape[0], lengths))
        return memory_read(query, key, value, memory_lengths=memory_lengths, **options)

    for module in ("rotary", "together"):
        monkeypatch.setattr(f"vosops.integrations.{module}.memory_read", noted)
    layers, frame = len(predictor.memory_attention.layers), (predictor.image_size // 16) ** 2
    with accelerate(predictor, objects_together=True):
        session(predictor, folder)
    assert "memory_attention" not in vars(predictor)
    # Frames 1 to 4, and 4 after a correction: two objects; 5 to 7: three, of which one was marked in frame 4; 8 to 11:
    # the two that are left.
    together = [lengths for batch, lengths in calls if batch > 1]
    assert [len(lengths) for lengths in together] == [2] * 5 * layers + [3] * 3 * layers + [2] * 4 * layers
    first_of_three = together[5 * layers]
    assert sorted(length // frame for length in first_of_three) == [1, 5, 5]
    assert len({tuple(lengths) for lengths in together}) > 5


def test_an_exception_leaves_nothing_of_the_frame(predictor, folder, expected, monkeypatch):
    with accelerate(predictor, objects_together=True):
        decode, failures = predictor._forward_sam_heads, [True, False]

        def fails(*args, **kwargs):
            if failures and failures.pop():
                raise KeyError("decoder")
            return decode(*args, **kwargs)

        with torch.inference_mode():
            state = predictor.init_state(str(folder))
            for number in (1, 2):
                predictor.add_new_points_or_box(state, 0, number, points=[[30.0, 40.0]], labels=[1])
            list(predictor.propagate_in_video(state, 0, 0))
            monkeypatch.setattr(predictor, "_forward_sam_heads", fails)
            with pytest.raises(KeyError):
                list(predictor.propagate_in_video(state, 1, 0))
            assert "memory_attention" not in vars(predictor)
        got, _ = session(predictor, folder)
    torch.testing.assert_close(got[-1], expected[-1], rtol=0, atol=TOLERANCE)


def test_the_memory_is_read(predictor, folder, expected, monkeypatch):
    """A memory of zeros changes the masks: weights that ignored it would hide every error of the read."""
    encode = predictor._encode_new_memory

    def nothing(*args, **kwargs):
        features, positions = encode(*args, **kwargs)
        return torch.zeros_like(features), positions

    monkeypatch.setattr(predictor, "_encode_new_memory", nothing)
    got, _ = session(predictor, folder)
    tracked = [(a - b).abs().max().item() for a, b in zip(expected, got)][1:]
    assert min(tracked) > 100 * TOLERANCE


def test_keys_are_made_once_a_frame(predictor, folder):
    layers = [layer.cross_attn_image for layer in predictor.memory_attention.layers]
    before = [KeyCache.of(layer).hits for layer in layers]
    with accelerate(predictor, cache_keys=True):
        _, state = session(predictor, folder)
        held = sum(1 for _ in KeyCache.held_by(layers[0]))
        assert 0 < held <= 3 * (predictor.num_maskmem + 1)
        hits = [KeyCache.of(layer).hits - n for layer, n in zip(layers, before)]
        assert min(hits) > 2 * FRAMES
        del state
        assert sum(1 for _ in KeyCache.held_by(layers[0])) == 0  # no session needs them
        _, state = session(predictor, folder)
    assert sum(1 for _ in KeyCache.held_by(layers[0])) == 0  # nothing reads them


def test_other_weights_are_not_answered_with_old_keys(predictor, folder):
    mine = copy.deepcopy(predictor)
    with accelerate(mine, cache_keys=True):
        session(mine, folder)
        with torch.no_grad():
            for layer in mine.memory_attention.layers:
                layer.cross_attn_image.k_proj.weight.mul_(-1)
        got, _ = session(mine, folder)
    want, _ = session(mine, folder)
    for a, b in zip(want, got):
        torch.testing.assert_close(b, a, rtol=0, atol=TOLERANCE)


def test_frames_are_read_when_they_are_needed(predictor, folder):
    plain = predictor.init_state(str(folder))
    with accelerate(predictor, memory_budget="1GB"):
        state = predictor.init_state(str(folder))
    assert len(state["images"]) == len(plain["images"]) == FRAMES
    assert (state["video_height"], state["video_width"]) == (HEIGHT, WIDTH)
    for t in (0, 7, FRAMES - 1):
        torch.testing.assert_close(state["images"][t], plain["images"][t], rtol=0, atol=1e-6)
    assert reachable_bytes(state["images"]) < reachable_bytes(plain["images"]) / 100


def test_kept_keys_are_of_one_object_at_a_time(predictor):
    with pytest.raises(ValueError, match="cache_keys must be None with objects_together"):
        accelerate(predictor, cache_keys=True, objects_together=True)


def track(predictor, folder, **options):
    """Bytes that tensors reachable from a session take, after each frame; and the logits. Without options: plain."""
    used, results = [], []
    accelerated = accelerate(predictor, **options) if options else contextlib.nullcontext()
    with accelerated, torch.inference_mode():
        state = predictor.init_state(str(folder))
        predictor.add_new_points_or_box(state, 0, 1, points=[[30.0, 40.0]], labels=[1])
        for _, _, logits in predictor.propagate_in_video(state):
            used.append(reachable_bytes(state))
            results.append(logits)
    return used, results


@pytest.mark.parametrize("side, frames", [(SIDE, 44), pytest.param(256, 300, marks=pytest.mark.exhaustive)])
def test_a_session_does_not_grow(predictor, tmp_path, side, frames):
    predictor = predictor if side == SIDE else small_predictor(side=side)
    folder = write_frames(tmp_path, frames, side * 3 // 4, side)
    window = max(predictor.num_maskmem, predictor.max_obj_ptrs_in_encoder)
    plain, want = track(predictor, folder)
    growth = (plain[-1] - plain[window + 1]) / (frames - window - 2)
    assert growth > 1000  # without vosops the output of every frame stays
    assert all(a < b for a, b in zip(plain, plain[1:]))
    used, got = track(predictor, folder, memory_budget=int(growth * (window + 6)))
    full = window + 8
    assert len(set(used[full:])) == 1 and len(used[full:]) > 10
    assert max(used) < min(plain)  # which hold all frames from the first
    for a, b in zip(want, got):
        torch.testing.assert_close(b, a, rtol=0, atol=TOLERANCE)


def test_a_budget_that_is_too_small_says_how_much_is_needed(predictor, folder):
    with pytest.raises(
        MemoryBudgetError, match=r"budget must be at least [0-9]+ bytes for the [0-9]+ frames"
    ):
        track(predictor, folder, memory_budget="2kB")


def test_options_of_other_systems():
    pytest.importorskip("cutie", reason="the package rf-cutie is not installed")
    import cutie.inference.inference_core

    with pytest.raises(ValueError, match="memory_budget must be None except for SAM 2"):
        accelerate(cutie.inference.inference_core, memory_budget="1GB")
