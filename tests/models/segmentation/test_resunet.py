"""ResUNet and ResUNet++ against the originals' outputs, and what their options and sizes do."""

from __future__ import annotations

import pytest
import torch

from tests.models.segmentation import originals
from vosops.models import create_model

NETWORKS = [
    ("resunet", "resunet.pt", 13_043_009, "params_resunet.txt"),
    ("resunet++", "resunetpp.pt", 4_062_993, "params_resunetpp.txt"),
]


@pytest.mark.parametrize("case", ["basic", "small"])
@pytest.mark.parametrize(("name", "file"), [row[:2] for row in NETWORKS])
def test_logits_are_the_originals(name, file, case):
    golden = originals.case(file, case)
    network = originals.with_weights_of(golden, originals.empty(name))
    with torch.no_grad():
        logits = network(golden["x"].float())
    originals.assert_equals(golden, "logits", logits)
    if name == "resunet":  # which returns this
        originals.assert_equals(golden, "prob", logits.sigmoid())


@pytest.mark.parametrize(("name", "_", "count", "file"), NETWORKS)
def test_parameters_are_the_originals(name, _, count, file):
    originals.assert_parameters(originals.empty(name), count, file)


@pytest.mark.parametrize(("name", "options"), [("resunet", {"filters": (8, 12, 16, 24)}), ("resunet++", {})])
class TestEach:
    def test_a_checkpoint_of_the_original(self, tmp_path, name, options):
        originals.assert_checkpoint_loads(
            tmp_path / "w.pth", name, lambda w: {"epoch": 3, "state_dict": w}, **options
        )

    def test_training_and_sizes(self, name, options):
        network = create_model(name, num_classes=3, **options)
        originals.assert_sees_its_input(network, (24, 40))
        originals.assert_sizes(
            network, (30, 5), "height 30: the nearest are 24 and 32", "5: the nearest is 8"
        )
        originals.assert_trains(network, (24, 16))

    def test_one_logit_says_foreground(self, name, options):
        network = create_model(name, **options)
        image = torch.rand(3, 16, 24)
        with torch.no_grad():
            expected = network(image[None])[0, 0] > 0
        assert torch.equal(network.predict(image), expected.to(torch.uint8))


def test_filters_are_four():
    with pytest.raises(ValueError, match=r"filters must be four numbers of channels, got \(8, 16\)"):
        create_model("resunet", filters=(8, 16))
