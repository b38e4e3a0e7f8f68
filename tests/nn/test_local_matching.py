"""nn.LocalMatching: the op with CFBI's biases."""

from __future__ import annotations

import pytest
import torch

import vosops
from vosops.nn import LocalMatching


@pytest.fixture
def problem():
    return torch.randn(1, 5, 6, 7), torch.randn(1, 5, 6, 7), torch.randint(0, 3, (1, 6, 7))


@pytest.mark.parametrize("radius", [2, (1, 3)])
def test_adds_one_bias_for_the_background_and_one_for_all_objects(problem, radius):
    module = LocalMatching(radius=radius)
    module.background_bias.data.fill_(-0.5)
    module.object_bias.data.fill_(0.25)
    wanted = vosops.local_matching(
        *problem, radius=radius, num_objects=3, bias=torch.tensor([-0.5, 0.25, 0.25])
    )
    assert torch.equal(module(*problem, num_objects=3), wanted)


def test_may_have_no_biases(problem):
    module = LocalMatching(radius=3, dilation=3, bias=False, normalize=False)
    wanted = vosops.local_matching(*problem, radius=3, dilation=3, num_objects=3, normalize=False)
    assert torch.equal(module(*problem, num_objects=3), wanted)
    assert list(module.parameters()) == []


def test_counts_the_objects_of_masks(problem):
    query, key, labels = problem
    masks = torch.stack([labels == i for i in range(3)], 1)
    module = LocalMatching(radius=2)
    assert torch.equal(module(query, key, masks), module(query, key, labels, num_objects=3))


def test_biases_learn(problem):
    module = LocalMatching(radius=2)
    module(*problem, num_objects=3).sum().backward()
    assert module.background_bias.grad > 0 and module.object_bias.grad > 0


@pytest.mark.parametrize("objects", [0, 1])
def test_few_objects_have_few_biases(problem, objects):
    assert LocalMatching(radius=2)(*problem, num_objects=objects).shape == (1, objects, 6, 7)
