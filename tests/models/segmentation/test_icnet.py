"""ICNet against the original's outputs, its checkpoints and sizes."""

from __future__ import annotations

import pytest
import torch

from tests.models.segmentation import originals


@pytest.mark.parametrize("name", ["basic", "mid", "odd"])
def test_logits_of_all_branches_are_the_originals(name):
    golden = originals.case("icnet_resnet50.pt", name)
    network = originals.with_weights_of(golden, originals.empty("icnet"))
    images = golden["x"].float()
    with torch.no_grad():
        logits = network(images)
        outputs = originals.with_auxiliary_heads(network)(images)
    originals.assert_equals(golden, "logits", logits)
    for key, found in zip(("logits", "logits_s4", "aux_s8", "aux_s16"), outputs, strict=True):
        originals.assert_equals(golden, key, found)


def test_parameters_are_the_originals():
    originals.assert_parameters(originals.empty("icnet"), 28_298_376, "params_icnet_resnet50.txt")


def test_checkpoints_load_or_are_refused(tmp_path):
    network = originals.empty("icnet")
    originals.assert_loads(network, tmp_path / "icnet_resnet50_best_model.pth", layout=dict)


def test_it_learns():
    network = originals.draw(originals.empty("icnet", num_classes=3).to_empty(device="cpu"))
    originals.assert_learns(network, torch.rand(2, 3, 64, 96), unused=("pretrained.fc.",))


def test_logits_are_larger_than_images_of_other_sizes():
    network = originals.empty("icnet", num_classes=3, in_channels=1)
    assert network(torch.empty(2, 1, 97, 128, device="meta")).shape == (2, 3, 104, 128)
    with pytest.raises(ValueError, match="width 3: the nearest is 4"):
        network(torch.empty(1, 1, 4, 3, device="meta"))
