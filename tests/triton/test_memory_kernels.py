"""What the Triton kernels of memory_read do beyond the contract that tests/ops checks: parts, copies, full lists.

They run in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU. The interpreter proves the logic; only a GPU proves
precision.
"""

from __future__ import annotations

import pytest
import torch

import vosops
from tests.triton.device import DEVICE
from vosops.reference.memory_read import memory_read_core, memory_select_core
from vosops.triton import memory_read, memory_scores, memory_select


def read(query, key, value, precision="ieee"):
    return memory_read.memory_read(query, key, value, None, None, None, 0.5, precision)


def problem(dtype=torch.float32, memory=200, queries=9, channels=6, columns=20):
    sizes = ((1, channels, queries), (1, channels, memory), (1, 1, columns, memory))
    return [torch.randn(size, dtype=torch.float32).to(DEVICE, dtype) for size in sizes]


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_any_number_of_parts_gives_the_same_read(chip, processors):
    query, key, value = problem()
    chip(9, processors)
    out, lse = read(query, key, value)
    want_out, want_lse = memory_read_core(*(t.double() for t in (query, key, value)), None, None, None, 0.5)
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("capability", [0, 8, 10])
def test_the_tiles_of_other_devices_read_the_same(chip, capability):
    query, key, value = problem(torch.float16, memory=70, columns=300)
    chip(capability, 2)
    out, _ = read(query, key, value)
    want, _ = memory_read_core(*(t.double() for t in (query, key, value)), None, None, None, 0.5)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-3)


def test_only_what_cannot_be_read_in_wide_pieces_is_copied():
    rows = torch.randn(2, 3, 32, 48, device=DEVICE)
    for as_it_is in (rows, rows.transpose(2, 3), rows[:1].expand(4, -1, -1, -1)):
        assert memory_scores.aligned(as_it_is) is as_it_is
    for copied in (rows[..., 1:], rows[..., :47], rows[..., ::2]):
        copy = memory_scores.aligned(copied)
        assert copy.shape[-1] % memory_scores.ALIGNMENT == 0 and copy.is_contiguous()
        assert (
            torch.equal(copy[..., : copied.shape[-1]], copied) and copy[..., copied.shape[-1] :].eq(0).all()
        )


@pytest.mark.parametrize(
    ("order", "processors"), [("rising", 1), ("equal", 1), ("equal", 132), ("random", 132)]
)
def test_lists_that_overflow_are_repaired(chip, monkeypatch, order, processors):
    """Rising scores defeat every threshold that comes from a part's own past, equal ones every threshold."""
    monkeypatch.setattr(memory_select, "GROUPS_PER_CHOICE", 0)
    chip(9, processors)
    scores = {"rising": torch.arange(300.0), "equal": torch.ones(300), "random": torch.randn(300)}[order]
    query, key = torch.ones(1, 1, 3, device=DEVICE), scores[None, None].to(DEVICE)
    for top_k in (2, 40):
        got = memory_select.memory_select(query, key, None, None, None, 1.0, "ieee", top_k)
        want = memory_select_core(query, key, None, None, None, 1.0, top_k)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_scores_of_both_signs_and_infinities_are_in_order():
    scores = torch.tensor([0.0, -1.5, 3.0, -0.0, torch.inf, -torch.inf, torch.nan, -1e-30, 1e-30, 3.0])
    bias = scores[None].to(DEVICE)
    query, key = torch.zeros(1, 1, 1, device=DEVICE), torch.zeros(1, 1, 10, device=DEVICE)
    score, index = memory_select.memory_select(query, key, None, None, bias, 1.0, "ieee", 10)
    assert index.flatten().tolist() == [4, 2, 9, 8, 0, 3, 7, 1, -1, -1]
    assert score.flatten().tolist()[-2:] == [-torch.inf] * 2


def test_the_public_op_with_selection_runs_on_triton_to_second_order():
    query, key = (torch.randn(1, 3, size, device=DEVICE, requires_grad=True) for size in (4, 6))
    value = torch.randn(1, 2, 3, 6, device=DEVICE, requires_grad=True)
    selection = torch.rand(1, 3, 4, device=DEVICE)
    inputs = (query, key, value)
    for top_k in (None, 2):
        results = []
        for name in ("triton", "reference"):
            with vosops.use_backend(name):
                out, usage = vosops.memory_read(
                    *inputs, similarity="l2", selection=selection, top_k=top_k, return_usage=True
                )
            first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
            results.append((out, usage, *first, *second))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_too_many_pixels_are_refused():
    query = torch.zeros(1, 1, 1).expand(1, 1, memory_scores.MAX_QUERIES + 1)
    with pytest.raises(ValueError, match="query and key must have at most"):
        read(query, torch.zeros(1, 1, 4), torch.zeros(1, 1, 1, 4))
