"""ICNN against the originals' outputs, and what its options and sizes do."""

from __future__ import annotations

import pytest
import torch

from tests.models.segmentation import originals
from vosops.models import create_model

UNUSED = (
    *(f"interlink_layers.{cell}.iCNN_Nodelist.{row}.output_conv_node" for cell in (0, 1) for row in range(4)),
    *("interlink_layers.2.iCNN_Nodelist.3.output_conv_node", "last_con2_bnm", "last_conv3_bnm"),
)
"""What checkpoints hold and the original never runs."""


@pytest.mark.parametrize(("case", "part"), [("face", False), ("face_odd", False), ("part2", True)])
def test_logits_are_the_originals(case, part):
    golden = originals.case("icnn.pt", case)
    network = originals.with_weights_of(golden, originals.empty("icnn", part=part))
    with torch.no_grad():
        originals.assert_equals(golden, "logits", network(golden["x"].float()))


@pytest.mark.parametrize(
    ("part", "count", "file"),
    [(False, 822_943, "params_icnn_face.txt"), (True, 808_572, "params_icnn_part2.txt")],
)
def test_parameters_are_the_originals(part, count, file):
    originals.assert_parameters(originals.empty("icnn", part=part), count, file)


def test_a_checkpoint_of_the_original(tmp_path):
    originals.assert_checkpoint_loads(tmp_path / "w.pth", "icnn", dict, part=True, num_classes=4)


def test_training_and_sizes():
    network = create_model("icnn", num_classes=3)
    originals.assert_sees_its_input(network, (19, 26))
    originals.assert_trains(network, (16, 24), UNUSED)
    with torch.no_grad():
        assert network.eval()(torch.rand(1, 3, 1, 2)).shape == (1, 3, 1, 2)


def test_classes_by_default():
    assert create_model("icnn").num_classes == 9 and create_model("icnn", part=True).num_classes == 2
