"""DANet against the original's outputs, its attention modules, checkpoints and options."""

from __future__ import annotations

import pytest
import torch

from tests.models.segmentation import originals
from vosops.models import create_model
from vosops.models.segmentation.danet import ChannelAttention, PositionAttention

CASES = [("deepstem", {}), ("mg_plainstem_odd", {"deep_stem": False, "multi_grid": (4, 8, 16)})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_logits_of_all_heads_are_the_originals(name, options):
    golden = originals.case("danet_resnet50.pt", name)
    network = originals.with_weights_of(golden, originals.empty("danet", **options))
    images = golden["x"].float()
    with torch.no_grad():
        logits = network(images)
        outputs = originals.with_auxiliary_heads(network)(images)
    originals.assert_equals(golden, "logits", logits)
    for key, found in zip(("logits", "sa_logits", "sc_logits"), outputs, strict=True):
        originals.assert_equals(golden, key, found)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (PositionAttention(64), "pam_c64"),
        (ChannelAttention(), "cam_c48"),
        (ChannelAttention(), "cam_peaked"),
    ],
)
def test_attention_and_its_gradients_are_the_originals(module, name):
    golden = originals.case("danet_attention.pt", name)
    module.load_state_dict(golden["params"])
    originals.assert_module(module, [golden["x"]], golden, "y", "x")


@pytest.mark.parametrize(
    ("deep_stem", "count", "file"),
    [
        (True, 47_586_427, "params_danet_resnet50.txt"),
        (False, 47_462_651, "params_danet_resnet50_plainstem.txt"),
    ],
)
def test_parameters_are_the_originals(deep_stem, count, file):
    originals.assert_parameters(originals.empty("danet", deep_stem=deep_stem), count, file)


def test_checkpoints_load_or_are_refused(tmp_path):
    def layout(weights):
        older = {"pretrained.fc.weight": torch.zeros(10, 2), "pretrained.fc.bias": torch.zeros(10)}
        return {"epoch": 240, "state_dict": {**weights, **older}, "best_pred": 0.8}

    originals.assert_loads(originals.empty("danet"), tmp_path / "DANet101.pth.tar", layout=layout)


def test_it_learns():
    network = originals.draw(originals.empty("danet", num_classes=3).to_empty(device="cpu"))
    network.head.sa.gamma.data.fill_(0.5)
    originals.assert_learns(network, torch.rand(2, 3, 33, 48))


def test_published_options():
    network = originals.empty("danet", backbone="resnet101", deep_stem=False, multi_grid=(4, 8, 16))
    assert [block.conv2.dilation[0] for block in network.pretrained.layer4] == [4, 8, 16]
    assert [block.conv2.dilation[0] for block in network.pretrained.layer3] == [1] + [2] * 22


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet18"}, "backbone must be one of resnet50, .* got 'resnet18'"),
        ({"multi_grid": (4, 8)}, r"multi_grid must be None or three dilations, got \(4, 8\)"),
        ({"multi_grid": (4, 8, 0)}, "multi_grid must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("danet", **options)
