"""PSPNet against the original's outputs, its checkpoints, sizes and options."""

from __future__ import annotations

import pytest
import torch

from tests.models.segmentation import originals
from vosops.models import create_model


@pytest.mark.parametrize(("name", "zoom_factor"), [("zoom8", 8), ("zoom1", 1)])
def test_logits_of_both_heads_are_the_originals(name, zoom_factor):
    golden = originals.case("pspnet_resnet50.pt", name)
    network = originals.with_weights_of(golden, originals.empty("pspnet", zoom_factor=zoom_factor))
    images = golden["x"].float()
    with torch.no_grad():
        logits = network(images)
        originals.assert_equals(golden, "logits", logits)
        again, aux = originals.with_auxiliary_heads(network)(images)
    originals.assert_equals(golden, "logits", again)
    originals.assert_equals(golden, "aux", aux)


def test_parameters_are_the_originals():
    originals.assert_parameters(originals.empty("pspnet"), 49_080_038, "params_pspnet_resnet50.txt")


def test_checkpoints_load_or_are_refused(tmp_path):
    def layout(weights):
        prefixed = {f"module.{name}": x for name, x in weights.items()}
        return {"epoch": 200, "state_dict": prefixed, "optimizer": {"state": {}}}

    originals.assert_loads(originals.empty("pspnet"), tmp_path / "train_epoch_200.pth", layout=layout)


def test_it_learns():
    network = originals.draw(originals.empty("pspnet", num_classes=3, bins=(1, 2)).to_empty(device="cpu"))
    originals.assert_learns(network, torch.rand(2, 3, 17, 33))


@pytest.mark.parametrize("zoom_factor", [1, 2, 4, 8])
def test_the_size_of_the_logits(zoom_factor):
    network = originals.empty("pspnet", num_classes=3, zoom_factor=zoom_factor)
    logits = network(torch.empty(2, 3, 65, 33, device="meta"))
    assert logits.shape == (2, 3, 8 * zoom_factor + 1, 4 * zoom_factor + 1)


def test_other_sizes_are_refused_with_the_nearest():
    network = originals.empty("pspnet")
    with pytest.raises(
        ValueError, match="height 2160: the nearest are 2153 and 2161; width 64: .* 57 and 65"
    ):
        network(torch.empty(1, 3, 2160, 64, device="meta"))


def test_without_bins_there_is_no_pyramid():
    network = originals.empty("pspnet", bins=(), backbone="resnet101")
    assert network.cls[0].weight.shape == (512, 2048, 3, 3)
    assert not any(name.startswith("ppm") for name in network.state_dict())
    assert network(torch.empty(1, 3, 33, 33, device="meta")).shape == (1, 19, 33, 33)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet18"}, "backbone must be one of resnet50, .* got 'resnet18'"),
        ({"zoom_factor": 3}, r"zoom_factor must be one of \(1, 2, 4, 8\), got 3"),
        ({"bins": (1, 0)}, "bins must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("pspnet", **options)
