"""HRNet and HRNet with OCR against the originals' outputs, their modules, checkpoints and widths."""

from __future__ import annotations

import pytest
import torch

from tests.models.segmentation import originals
from vosops.models.segmentation.hrnet import ObjectAttention, SpatialGather


@pytest.mark.parametrize(("name", "align_corners"), [("ac1", True), ("ac1_odd", True), ("ac0", False)])
def test_logits_are_the_originals(name, align_corners):
    golden = originals.case("hrnet_w48.pt", name)
    network = originals.with_weights_of(golden, originals.empty("hrnet_w48", align_corners=align_corners))
    with torch.no_grad():
        originals.assert_equals(golden, "logits", network(golden["x"].float()))


@pytest.mark.parametrize("name", ["ac1", "ac1_odd"])
def test_logits_of_ocr_and_its_first_guess_are_the_originals(name):
    golden = originals.case("hrnet_w48_ocr.pt", name)
    network = originals.with_weights_of(golden, originals.empty("hrnet_w48_ocr"))
    images = golden["x"].float()
    with torch.no_grad():
        logits = network(images)
        aux, again = originals.with_auxiliary_heads(network)(images)
    for found in (logits, again):
        originals.assert_equals(golden, "logits", found)
    originals.assert_equals(golden, "aux", aux)


def test_gathering_and_its_gradients_are_the_originals():
    golden = originals.case("ocr_attention.pt", "gather_k19")
    given = [golden["feats"], golden["probs"]]
    originals.assert_module(SpatialGather(), given, golden, "context", "feats", "probs")


def test_object_attention_and_its_gradients_are_the_originals():
    golden = originals.case("ocr_attention.pt", "object_c48")
    module = ObjectAttention(48, 24).eval()
    module.load_state_dict(golden["params"])
    originals.assert_module(module, [golden["x"], golden["proxy"]], golden, "context", "x", "proxy")


@pytest.mark.parametrize(
    ("model", "count", "file"),
    [
        ("hrnet_w48", 65_859_379, "params_hrnet_w48.txt"),
        ("hrnet_w48_ocr", 70_372_678, "params_hrnet_w48_ocr.txt"),
    ],
)
def test_parameters_are_the_originals(model, count, file):
    originals.assert_parameters(originals.empty(model), count, file)


@pytest.mark.parametrize(("model", "width"), [("hrnet_w18", 18), ("hrnet_w32", 32)])
def test_other_widths_have_the_same_names(model, width):
    network, wide = originals.empty(model), originals.empty("hrnet_w48")
    assert list(network.state_dict()) == list(wide.state_dict())
    assert network.last_layer[0].weight.shape == (15 * width, 15 * width, 1, 1)
    assert network(torch.empty(2, 3, 33, 50, device="meta")).shape == (2, 19, 9, 13)


@pytest.mark.parametrize("model", ["hrnet_w48", "hrnet_w48_ocr"])
def test_checkpoints_load_or_are_refused(model, tmp_path):
    def layout(weights):
        prefixed = {f"model.{name}": x for name, x in weights.items()}
        return {**prefixed, "loss.criterion.weight": torch.ones(19)}

    originals.assert_loads(originals.empty(model), tmp_path / "hrnet_cs_torch11.pth", layout=layout)


@pytest.mark.parametrize("model", ["hrnet_w18", "hrnet_w48_ocr"])
def test_it_learns(model):
    network = originals.draw(originals.empty(model, num_classes=3, in_channels=4).to_empty(device="cpu"))
    originals.assert_learns(network, torch.rand(2, 4, 33, 48))
