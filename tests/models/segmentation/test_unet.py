"""U-Net and U-Net++ against the originals' outputs, and what their options and sizes do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

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
