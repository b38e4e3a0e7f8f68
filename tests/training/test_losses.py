"""The losses against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import vosops
from vosops.training import aggregated_cross_entropy, annealed_share, bootstrapped_cross_entropy


@pytest.mark.parametrize(("share", "count"), [(1.0, 60), (0.15, 9), (0.001, 1)])
def test_bootstrapped_cross_entropy_is_the_mean_of_the_hardest_pixels(share, count):
    logits, labels = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 5, 6))
    losses = -logits.log_softmax(1).gather(1, labels[:, None]).flatten()
    want = losses.sort(descending=True).values[:count].mean()
    torch.testing.assert_close(bootstrapped_cross_entropy(logits, labels, share=share), want)


def test_only_the_hardest_pixels_get_gradients():
    logits = torch.randn(1, 3, 4, 5, requires_grad=True)
    bootstrapped_cross_entropy(logits, torch.randint(0, 3, (1, 4, 5)), share=0.25).backward()
    assert int((logits.grad.abs().sum(1) > 0).sum()) == 5


def test_ignored_pixels_count_nothing():
    logits, labels = torch.randn(1, 3, 4, 5), torch.randint(0, 3, (1, 4, 5))
    half = labels.clone()
    half[:, :2] = 255
    want = functional.cross_entropy(logits[:, :, 2:], labels[:, 2:])
    torch.testing.assert_close(bootstrapped_cross_entropy(logits, half, share=1.0), want)
    nothing = bootstrapped_cross_entropy(logits.requires_grad_(), torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()


def test_half_precision_is_computed_in_float32():
    logits, labels = torch.randn(1, 3, 4, 5).bfloat16(), torch.randint(0, 3, (1, 4, 5))
    loss = bootstrapped_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, bootstrapped_cross_entropy(logits.float(), labels))


def test_the_share_of_hard_pixels_falls_and_stays():
    assert [annealed_share(step, 10, 0.2) for step in (0, 5, 10, 11)] == pytest.approx([1, 0.6, 0.2, 0.2])
    assert annealed_share(0, 0, 0.2) == 0.2


def test_aggregated_cross_entropy_is_that_of_the_fused_probabilities():
    probabilities, labels = torch.rand(2, 3, 4, 5), torch.randint(0, 4, (2, 4, 5))
    fused = vosops.soft_aggregate(probabilities)
    want = functional.nll_loss(fused.log(), labels)
    torch.testing.assert_close(aggregated_cross_entropy(probabilities, labels), want)
    labels[:, 1:] = 255
    want = functional.nll_loss(fused.log()[:, :, :1], labels[:, :1])
    torch.testing.assert_close(aggregated_cross_entropy(probabilities, labels), want)
    assert aggregated_cross_entropy(probabilities, torch.full_like(labels, 255)) == 0


@pytest.mark.parametrize("loss", [bootstrapped_cross_entropy, aggregated_cross_entropy])
def test_wrong_arguments_are_named(loss):
    scores, labels = torch.rand(1, 2, 3, 4), torch.zeros(1, 3, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match="labels must be integers, got torch.float32"):
        loss(scores, labels.float())
    with pytest.raises(ValueError, match="labels must"):
        loss(scores, labels[:, :2])
    with pytest.raises(ValueError, match=r"must have shape \(N, K, H, W\)"):
        loss(scores[0], labels)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        bootstrapped_cross_entropy(scores, labels, share=0)
