"""The peers that a user would pick on a GPU: what they compute, and why each that cannot run is left out."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vosops.benchmarking import gpu_cases, gpu_peers, gpu_steps
from vosops.benchmarking.gpu_cases import CELLS, READ_64, SDPA, Cell, MemorySize
from vosops.benchmarking.local_attention import AttentionSize
from vosops.benchmarking.measure import Clock
from vosops.benchmarking.memory_read import read_by

CPU = torch.device("cpu")
READ = Cell("memory_read", MemorySize("read", 20, 3, 2, 8, 16, batch=2), "bf16")
WINDOW = Cell("local_attention", AttentionSize("window", 6, 9, 12, 2, 2), "bf16")


def attention(query, key, value):
    """(N,length,heads,width), as FlashAttention takes them."""
    return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)


def packed_attention(query, key, value, query_ends, key_ends, longest_query, longest_key):
    """Sequences one after the other, (length,heads,width), each attending to its own keys."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert query_ends.diff().max() == longest_query and key_ends.diff().max() == longest_key
    sequences = zip(
        query.split(query_ends.diff().tolist()),
        key.split(key_ends.diff().tolist()),
        value.split(key_ends.diff().tolist()),
        strict=True,
    )
    return torch.cat([attention(*(t[None] for t in each))[0] for each in sequences])


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins for FlashAttention-3 (which returns a pair) and NATTEN."""

    def stand_in(name, **functions):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    def windows(query, key, value, kernel_size):
        assert query.is_contiguous() and query.shape == (1, 6, 9, 2, 6) and kernel_size == 5
        return 2 * value

    stand_in("flash_attn_interface", flash_attn_func=lambda *args: (attention(*args), None))
    stand_in("natten", na2d=windows)


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(gpu_peers, "is_missing", lambda package: True)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "values split"])
def test_flash_attention_3_computes_the_read(installed, split):
    inputs = gpu_cases.MemoryInputs.of(READ.size, torch.float32, CPU)
    read = read_by(gpu_peers.flash_3, split)
    torch.testing.assert_close(read(inputs.position_major()), gpu_cases.naive_read(inputs))


def test_attention_of_packed_sequences_computes_the_read(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", packed_attention)
    inputs = gpu_cases.MemoryInputs.of(READ.size, torch.float32, CPU)
    read = read_by(gpu_peers.varlen, split=True)
    torch.testing.assert_close(read(inputs.position_major()), gpu_cases.naive_read(inputs))


def test_a_read_meets_every_attention_kernel_that_is_installed(installed):
    names = set(gpu_cases.problem(READ, CPU).contenders)
    assert {f"SDPA {name}" for name in SDPA} | {"FlashAttention-3", "FlashAttention-3, values split"} <= names


def test_what_is_absent_is_named(absent):
    assert gpu_cases.problem(READ, CPU).left_out == {
        "FlashAttention-3": "flash_attn_interface is not installed",
        "FlashAttention-3, values split": "flash_attn_interface is not installed",
        "varlen_attn, values split": "this PyTorch has no torch.nn.attention.varlen",
    }
    assert gpu_cases.problem(WINDOW, CPU).left_out["NATTEN"] == "natten is not installed"


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (replace(READ, mode="ieee"), "it takes 16-bit numbers alone"),
        (replace(READ, backward=True), "it has values of 512 channels with keys of up to 64 alone, forward"),
        (replace(READ, size=replace(READ.size, key_channels=128)), "it has values of 512 channels with keys"),
        (
            replace(READ, size=replace(READ.size, value_channels=300)),
            "it has values of 512 channels with keys",
        ),
    ],
)
def test_shapes_and_arithmetic_that_flash_attention_3_has_not_are_named(installed, cell, why):
    assert gpu_cases.problem(cell, CPU).left_out["FlashAttention-3"].startswith(why)


def test_the_shape_of_flash_attention_3_is_timed():
    cells = [cell for cell in CELLS if cell.size == READ_64]
    assert [cell.mode for cell in cells] == ["bf16"]
    assert (READ_64.key_channels, READ_64.objects * READ_64.value_channels) == (64, 512)
    assert not READ_64.top_k and not READ_64.anisotropic


def test_a_peer_that_computes_something_near_is_timed_and_not_compared(installed):
    found = gpu_steps.measure(WINDOW, Clock(), None, rounds=1)
    by_name = {v["name"]: v for v in found["variants"]}
    assert by_name["NATTEN"]["differs"] == gpu_peers.NATTEN_DIFFERS
    assert not by_name["NATTEN"]["right"] and by_name["NATTEN"]["errors"] == []
    assert all(v["right"] and "differs" not in v for name, v in by_name.items() if name != "NATTEN")


def test_neighborhood_attention_gets_maps_by_heads(installed):
    query, key, value = (torch.randn(1, 12, 6, 9) for _ in range(3))
    formulation, reason = gpu_peers.natten(WINDOW.size)
    assert reason == ""
    assert torch.equal(formulation(query, key, value, torch.zeros(2, 25)), 2 * value)
    assert gpu_peers.natten(replace(WINDOW.size, height=4))[1] == "its window must fit into the map"
