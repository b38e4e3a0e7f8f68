"""U-Net and U-Net++ against the originals' outputs, and what their options and sizes do."""

from __future__ import annotations

import pytest
import torch

from tests.models.segmentation import originals
from vosops.models import create_model


class TestUNet:
    @pytest.mark.parametrize(
        ("name", "bilinear"), [("transposed", False), ("bilinear", True), ("odd", False)]
    )
    def test_logits_are_the_originals(self, name, bilinear):
        golden = originals.case("unet.pt", name)
        network = originals.with_weights_of(golden, originals.empty("unet", bilinear=bilinear))
        with torch.no_grad():
            originals.assert_equals(golden, "logits", network(golden["x"].float()))

    @pytest.mark.parametrize(
        ("bilinear", "count", "file"),
        [(False, 31_037_698, "params_unet.txt"), (True, 17_263_042, "params_unet_bilinear.txt")],
    )
    def test_parameters_are_the_originals(self, bilinear, count, file):
        originals.assert_parameters(originals.empty("unet", bilinear=bilinear), count, file)

    def test_a_checkpoint_of_the_original(self, tmp_path):
        """It is a state_dict, in which training also stores the grey values of its masks."""
        originals.assert_checkpoint_loads(
            tmp_path / "w.pth", "unet", lambda w: {**w, "mask_values": [0, 1]}, bilinear=True, num_classes=5
        )

    def test_a_checkpoint_of_the_other_kind_is_told_by_its_keys(self, tmp_path):
        torch.save(create_model("unet", bilinear=True).state_dict(), tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"must be those of UNet, .* missing \(up1\.up\.weight"):
            create_model("unet", tmp_path / "w.pth")

    @pytest.mark.parametrize("bilinear", [False, True])
    def test_training_and_sizes(self, bilinear):
        network = create_model("unet", num_classes=3, bilinear=bilinear)
        originals.assert_sees_its_input(network, (17, 35))
        originals.assert_sizes(network, (15, 40), "height 15: the nearest is 16")
        originals.assert_trains(network, (33, 48))

    def test_other_channels(self):
        assert create_model("unet", in_channels=1)(torch.rand(1, 1, 16, 16)).shape == (1, 2, 16, 16)


class TestUNetPlusPlus:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("deep", {"deep_supervision": True}),
            ("deep_c3", {"deep_supervision": True, "num_classes": 3}),
            ("plain", {}),
        ],
    )
    def test_logits_are_the_originals(self, name, options):
        golden = originals.case("unetpp.pt", name)
        network = originals.with_weights_of(golden, originals.empty("unet++", **options))
        with torch.no_grad():
            originals.assert_equals(golden, "logits", network(golden["x"].float()))

    def test_deep_supervision_is_the_originals(self):
        """A list in training mode; batch norm keeps to its running statistics here, as in the case."""
        golden = originals.case("unetpp.pt", "deep_c3")
        network = originals.with_weights_of(
            golden, originals.empty("unet++", num_classes=3, deep_supervision=True)
        )
        network.training = True
        with torch.no_grad():
            found = network(golden["x"].float())
        for key, x in zip(("out1", "out2", "out3", "logits"), found, strict=True):
            originals.assert_equals(golden, key, x)

    @pytest.mark.parametrize(
        ("deep", "count", "file"),
        [(False, 9_163_329, "params_unetpp.txt"), (True, 9_163_428, "params_unetpp_deep.txt")],
    )
    def test_parameters_are_the_originals(self, deep, count, file):
        originals.assert_parameters(originals.empty("unet++", deep_supervision=deep), count, file)

    def test_a_checkpoint_of_the_original(self, tmp_path):
        originals.assert_checkpoint_loads(tmp_path / "w.pth", "unet++", dict, num_classes=2)

    @pytest.mark.parametrize("deep", [False, True])
    def test_training_and_sizes(self, deep):
        network = create_model("unet++", num_classes=3, deep_supervision=deep)
        originals.assert_sees_its_input(network, (32, 48))
        originals.assert_sizes(
            network, (24, 40), "multiples of 16", "height 24: the nearest are 16 and 32", "width 40"
        )
        originals.assert_trains(network, (32, 16))

    def test_images_are_divided_by_255_once_more(self):
        frame = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
        expected = (128 / 255 - 0.485) / 0.229 / 255
        assert float(create_model("unet++").prepare(frame)[0, 0, 0, 0]) == pytest.approx(expected, rel=1e-5)
