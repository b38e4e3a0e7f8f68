"""soft_aggregate: one distribution of the probabilities of objects that were segmented one by one."""

from __future__ import annotations

import pytest
import torch

import vosops
from vosops.reference.soft_aggregate import soft_aggregate as reference

CLAMPED_ODDS = 1e-7 / (1 - 1e-7)


def problem(dtype=torch.float32, *batch: int, objects: int = 3) -> torch.Tensor:
    probabilities = torch.rand(*batch, objects, 5, 7)
    probabilities[..., 0, 0, :] = 0
    probabilities[..., -1, 1, :] = 1
    return probabilities.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("slots", [None, 4, 11])
def test_the_reference_in_float64_agrees(dtype, batch, slots):
    probabilities = problem(dtype, *batch) * 0.9  # the clamp near 1 is coarser in float32
    result = vosops.soft_aggregate(probabilities, slots=slots)
    expected = reference(probabilities.double(), slots=slots)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=0)


def test_odds_divided_by_their_sum():
    probabilities = torch.tensor([0.75, 0.5]).view(2, 1, 1)
    odds = torch.tensor([0.125 / 0.875, 3.0, 1.0])
    torch.testing.assert_close(vosops.soft_aggregate(probabilities).flatten(), odds / odds.sum())


def test_a_given_background_takes_the_place_of_the_product():
    probabilities, background = torch.full((2, 3, 1, 1), 0.5), torch.tensor([0.2, 0.8]).view(2, 1, 1)
    result = vosops.soft_aggregate(probabilities, background=background)
    torch.testing.assert_close(result[:, 0].flatten(), torch.tensor([0.25 / 3.25, 4 / 7]))
    torch.testing.assert_close(result.sum(1), torch.ones(2, 1, 1))


def test_missing_slots_keep_their_share():
    """Where every class is as improbable as a slot without an object, all 11 share alike."""
    probabilities, background = torch.zeros(2, 1, 1), torch.zeros(1, 1)
    result = vosops.soft_aggregate(probabilities, background=background, slots=11)
    torch.testing.assert_close(result.flatten(), torch.full((3,), 1 / 11))


def test_logits_are_what_the_softmax_is_of():
    probabilities = problem()
    logits = vosops.soft_aggregate(probabilities, return_logits=True)
    torch.testing.assert_close(logits.softmax(0), vosops.soft_aggregate(probabilities))
    assert logits.abs().max() < 17


def test_golden_stm(golden):
    """STM's own logits and distribution, from the foreground's probability that its logits stand for."""
    case = golden("stm_model.pt")["single"]
    foreground = case["logit1"][:, 1:].double().sigmoid().float()
    logits = vosops.soft_aggregate(foreground, return_logits=True)
    torch.testing.assert_close(logits.exp(), case["logit1"].exp(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(vosops.soft_aggregate(foreground), case["Es"][:, :, 1], atol=1e-6, rtol=0)


def test_no_object_leaves_background():
    assert vosops.soft_aggregate(torch.zeros(2, 0, 3, 3)).eq(1).all()


def test_a_certain_object_in_half_precision_is_certain():
    for dtype in (torch.float16, torch.bfloat16):
        result = vosops.soft_aggregate(torch.ones(1, 2, 2, dtype=dtype))
        assert result.dtype == torch.float32 and result.isfinite().all()
        torch.testing.assert_close(result[0].max().item(), CLAMPED_ODDS**2, atol=1e-14, rtol=0)


def test_nan_stays_at_its_pixel():
    probabilities = torch.rand(2, 4, 4)
    probabilities[1, 2, 3] = float("nan")
    bad = vosops.soft_aggregate(probabilities).isnan()
    assert bad[:, 2, 3].all() and bad.sum() == 3


def test_derivatives_to_second_order():
    probabilities = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    background = torch.rand(2, 2, 2, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda p, b: vosops.soft_aggregate(p, slots=5),
        lambda p, b: vosops.soft_aggregate(p, background=b),
        lambda p, b: vosops.soft_aggregate(p, return_logits=True),
    ):
        inputs = (probabilities, background)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradient_of_a_clamped_probability_is_zero():
    probabilities = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1).requires_grad_()
    vosops.soft_aggregate(probabilities, background=torch.full((1, 1), 0.5))[0].sum().backward()
    assert probabilities.grad.flatten()[:2].tolist() == [0, 0]
    assert probabilities.grad.isfinite().all()


def test_autocast_leaves_it_in_float32():
    probabilities = problem(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vosops.soft_aggregate(probabilities).dtype == torch.float32


def test_strides_do_not_matter():
    probabilities = problem(torch.float32, 2)
    other = probabilities.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(vosops.soft_aggregate(other), vosops.soft_aggregate(probabilities))


def test_vmap_and_compile():
    probabilities = problem(torch.float32, 2)
    mapped = torch.vmap(vosops.soft_aggregate)(probabilities)
    compiled = torch.compile(vosops.soft_aggregate, fullgraph=True, backend="aot_eager")(probabilities)
    torch.testing.assert_close(mapped, vosops.soft_aggregate(probabilities))
    torch.testing.assert_close(compiled, vosops.soft_aggregate(probabilities))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5],), TypeError, "probabilities must be a tensor, got list"),
        ((torch.rand(3, 3),), ValueError, r"probabilities must have shape \(..., O, H, W\), got \(3, 3\)"),
        ((torch.ones(1, 3, 3, dtype=torch.uint8),), TypeError, "probabilities must be float32"),
    ],
)
def test_wrong_probabilities_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        vosops.soft_aggregate(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"background": torch.rand(1, 4, 4)}, ValueError, r"background must have shape \(4, 4\)"),
        ({"background": torch.ones(4, 4, dtype=torch.int64)}, TypeError, "background must be float32"),
        ({"slots": 2}, ValueError, "slots must be at least 3, got 2"),
        ({"slots": 2.5}, TypeError, "slots must be an int, got float"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        vosops.soft_aggregate(torch.rand(2, 4, 4), **options)
