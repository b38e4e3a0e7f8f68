"""The attention of SAM 2's kin to a memory: each computation is recognised by its results, or refused."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import nn

from vosops.integrations import accelerate, recipes
from vosops.integrations.rotary import FrameRecorder, KeyCache, Part, rotate

POINTERS = 5


def memory(frame, channels=8, frames=3, dtype=torch.float32):
    """Query (1,16,16), key and value (1,frames*frame+POINTERS,channels)."""
    generator = torch.Generator().manual_seed(frame)
    shapes = (1, 16, 16), (1, frames * frame + POINTERS, channels), (1, frames * frame + POINTERS, channels)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.fixture
def kin(checkout):
    return importlib.import_module("model.kin_of_sam2")


@pytest.mark.parametrize(
    "name, frame", [("PooledByScore", 16), ("PooledByKey", 16), ("Summaries", 4), ("Summaries", 7)]
)
def test_kin_of_sam2(kin, name, frame):
    torch.manual_seed(1)
    layer = getattr(kin, name)(16, 1, kv_in_dim=8).eval()
    options, one = ({"rope_k_repeat": n} if name == "Summaries" else {} for n in (3, 1))
    with torch.no_grad():
        q, k, v = memory(frame)
        want = layer(q, k, v, POINTERS, **options)
        short = layer(q, k[:, -frame - POINTERS :], v[:, -frame - POINTERS :], POINTERS, **one)
        with accelerate(kin) as acceleration:
            got = layer(q, k, v, POINTERS, **options)
            got_short = layer(q, k[:, -frame - POINTERS :], v[:, -frame - POINTERS :], POINTERS, **one)
        zeros = layer(q, k, 0 * v, POINTERS, **options)
    assert f"model.kin_of_sam2.{name}.forward" in acceleration.replaced
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_short, short, rtol=0, atol=1e-5)
    assert (want - zeros).abs().max() > 1e-3


def test_another_size_leaves_the_layer_as_it_was(kin):
    """SAM 3's tracker keeps parts of its rotation beside it: they have to be of the same size after `undo`."""
    torch.manual_seed(1)
    layer = kin.TurnedByParts(16, 1, kv_in_dim=8).eval().requires_grad_(False)
    q, k, v = torch.randn(1, 36, 16), torch.randn(1, 72 + POINTERS, 8), torch.randn(1, 72 + POINTERS, 8)
    with accelerate(kin):
        got = [layer(q, k, v, POINTERS) for _ in range(2)]
        assert layer.freqs_cis.shape[0] == layer.freqs_cis_real.shape[0] == 16
    want = layer(q, k, v, POINTERS)
    assert (want - layer(q, k, 0 * v, POINTERS)).abs().max() > 1e-3
    for each in got:
        torch.testing.assert_close(each, want, rtol=0, atol=1e-5)


def test_gradients(kin):
    torch.manual_seed(1)
    layer = kin.PooledByScore(16, 1, kv_in_dim=8).eval()
    leaves = [x.requires_grad_() for x in memory(16)]

    def gradients():
        return torch.autograd.grad(layer(*leaves, POINTERS).square().sum(), [*leaves, *layer.parameters()])

    want = gradients()
    with accelerate(kin):
        got = gradients()
    for a, b in zip(want, got):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "why",
    [
        "two heads",
        "dropout in training",
        "values of as many channels as keys",
        "part of a frame",
        "few scores",
    ],
)
def test_what_is_not_exact_or_not_cheaper_is_left_to_the_original(kin, why, monkeypatch):
    torch.manual_seed(1)
    wide = 16 if why.startswith("values") else 8
    layer = kin.Summaries(16, 2 if why == "two heads" else 1, dropout=0.1, kv_in_dim=wide)
    layer.train(why == "dropout in training")
    q, k, v = memory(4, wide)
    repeats = 2 if why == "part of a frame" else 3
    with accelerate(kin), torch.no_grad():
        monkeypatch.setattr("vosops.integrations.rotary.memory_read", None)  # a call would fail
        if why == "part of a frame":
            k, v = k[:, 3:], v[:, 3:]
        if why == "few scores":
            scores = q.shape[1] * k.shape[1]
            monkeypatch.setattr(recipes, "_few_scores", [scores])
            with pytest.raises(TypeError):
                layer(q, k, v, POINTERS, repeats)
            monkeypatch.setattr(recipes, "_few_scores", [scores + 1])
        layer(q, k, v, POINTERS, repeats)


def test_another_computation_is_refused(kin, monkeypatch):
    def half(self, q, k, v, num_k_exclude_rope=0, rope_k_repeat=-1):
        return plain(self, q / 2, k, v, num_k_exclude_rope, rope_k_repeat)

    plain = kin.Summaries.forward
    half.__qualname__ = "Summaries.forward"
    half = type(half)(
        half.__code__, vars(kin) | {"plain": plain}, "forward", half.__defaults__, half.__closure__
    )
    half.__qualname__, half.__module__ = "Summaries.forward", kin.__name__
    monkeypatch.setattr(kin.Summaries, "forward", half)
    with pytest.raises(ValueError, match="Summaries.forward does not compute the same as its replacement"):
        accelerate(kin)
    assert kin.Summaries.forward is half


def test_rotation():
    rotation = torch.polar(torch.ones(3, 2), torch.rand(3, 2) * math.pi)
    x = torch.randn(2, 6, 4)
    got = rotate(x.clone(), rotation)
    for place in range(6):
        for pair in range(2):
            a = rotation[place % 3, pair]
            matrix = torch.tensor([[a.real, -a.imag], [a.imag, a.real]])
            want = x[:, place, 2 * pair : 2 * pair + 2] @ matrix.T
            torch.testing.assert_close(got[:, place, 2 * pair : 2 * pair + 2], want)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.k_proj = nn.Linear(4, 8)


def test_the_frames_of_a_memory_are_known_however_they_are_arranged():
    features = [torch.randn(1, 4, 2, 3) for _ in range(2)]
    place, ages = torch.randn(1, 4, 2, 3), torch.randn(3, 1, 1, 4)
    pointers = torch.randn(5, 1, 4)
    with FrameRecorder() as recorder:
        arranged = [x.to("cpu").flatten(2).permute(2, 0, 1) for x in features]
        codes = [place.flatten(2).permute(2, 0, 1) + ages[i] for i in (2, 0)]
        memory = torch.cat([*arranged, pointers], dim=0).transpose(0, 1)
        positions = torch.cat([*codes, torch.zeros_like(pointers)], dim=0).transpose(0, 1)
        parts = recorder.frames_of(memory + positions)
        assert recorder.frames_of(memory * positions) is None
        assert recorder.frames_of(memory) is None
    assert [part.size for part in parts] == [6, 6, 5]
    assert all(part.features is x for part, x in zip(parts, features))
    assert parts[0].place is place and torch.equal(parts[1].age, ages[0])
    assert parts[2].features is None
    assert FrameRecorder.current() is None


def test_keys_of_frames_that_become_older():
    """As if each were projected anew; features that are written to, or are no longer there, are not answered for."""
    layer, rotation = Layer().requires_grad_(False), torch.polar(torch.ones(6, 4), torch.rand(6, 4))
    features = [torch.randn(6, 1, 4) for _ in range(3)]
    place, ages = torch.randn(6, 1, 4), torch.randn(3, 1, 1, 4)
    cache = KeyCache.of(layer)

    def keys(*read):
        with FrameRecorder() as recorder:
            memory = torch.cat([features[i] for i, _ in read]).transpose(0, 1)
            key = memory + torch.cat([place + ages[age] for _, age in read]).transpose(0, 1)
            got = cache.keys(key, recorder.frames_of(key), rotation, key.shape[1])
        torch.testing.assert_close(got, rotate(layer.k_proj(key), rotation), rtol=0, atol=1e-5)

    keys((0, 0))
    keys((0, 0), (1, 2))
    assert cache.hits == 1
    keys((0, 0), (1, 1), (2, 2))
    assert cache.hits == 3
    keys((0, 0), (2, 1))
    assert cache.hits == 5 and sum(1 for _ in KeyCache.held_by(layer)) == 2
    features[2].mul_(2)
    keys((0, 0), (2, 1))
    assert cache.hits == 6
    layer.k_proj.weight.mul_(2)
    keys((0, 0), (2, 1))
    assert cache.hits == 6
    features.clear()
    cache.keys(torch.randn(1, 6, 4), [Part(6)], rotation, 6)
    assert sum(1 for _ in KeyCache.held_by(layer)) == 0
