"""SegNet and DeconvNet against the originals' outputs, and what their options and sizes do.

Values that are nearly equal in a window of pooling may change places under another convolution algorithm, so that their
outputs are compared by a quantile.
"""

from __future__ import annotations

import pytest
import torch

import vosops
from tests.models.segmentation import originals
from vosops.models import create_model

QUANTILE = 0.999


class TestSegNet:
    @pytest.mark.parametrize("case", ["basic", "odd_below"])
    def test_logits_are_the_originals(self, case):
        golden = originals.case("segnet.pt", case)
        network = originals.with_weights_of(golden, originals.empty("segnet"))
        with torch.no_grad():
            logits = network(golden["x"].float())
        originals.assert_equals(golden, "logits", logits, quantile=QUANTILE)
        originals.assert_equals(golden, "prob", logits.softmax(1), quantile=QUANTILE)  # which it returns

    def test_parameters_are_the_originals(self):
        originals.assert_parameters(originals.empty("segnet"), 29_449_956, "params_segnet.txt")

    def test_a_checkpoint_of_the_original(self, tmp_path):
        originals.assert_checkpoint_loads(
            tmp_path / "w.pth", "segnet", lambda w: {"epoch": 3, "state_dict": w, "loss": 0.5}, num_classes=5
        )

    def test_training_and_sizes(self):
        network = create_model("segnet", num_classes=3)
        originals.assert_sees_its_input(network, (34, 46))
        originals.assert_sizes(
            network, (30, 41), "of 32 pixels or more that are multiples of 2", "41: the nearest are 40 and 42"
        )
        originals.assert_trains(network, (32, 64), ("BNDe11",))


class TestDeconvNet:
    @pytest.mark.exhaustive  # 1 GB of weights, which take 8 CPU-seconds and 3.3 GB to make
    def test_logits_are_the_originals(self):
        """In the original way to the bit; Winograd's rounding decides near ties of five poolings, each a patch."""
        golden = {name: originals.case("deconvnet.pt", name) for name in ("basic", "wide")}
        network = originals.with_weights_of(golden["basic"], originals.empty("deconvnet"))
        for case in golden.values():
            with torch.no_grad():
                originals.assert_equals(case, "logits", network(case["x"].float()), quantile=0.99)
                with vosops.use_backend("reference"):
                    originals.assert_equals(case, "logits", network(case["x"].float()))

    def test_parameters_are_the_originals(self):
        network = originals.empty("deconvnet")
        originals.assert_parameters(network, 251_805_653, "params_deconvnet.txt")

    def test_sizes(self):
        network = originals.empty("deconvnet", num_classes=5, in_channels=4)
        assert network(torch.empty(2, 4, 224, 256, device="meta")).shape == (2, 5, 224, 256)
        originals.assert_sizes(
            originals.empty("deconvnet"),
            (2160, 200),
            "height 2160: the nearest are 2144 and 2176",
            "200: the nearest is 224",
        )
