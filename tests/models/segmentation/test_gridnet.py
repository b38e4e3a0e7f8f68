"""GridNet against the original's outputs, and what its options and sizes do."""

from __future__ import annotations

import pytest
import torch

from tests.models.segmentation import originals
from vosops.models import create_model


@pytest.mark.parametrize("case", ["basic", "small"])
def test_logits_are_the_originals(case):
    golden = originals.case("gridnet.pt", case)
    network = originals.with_weights_of(golden, originals.empty("gridnet"))
    with torch.no_grad():
        originals.assert_equals(golden, "logits", network(golden["x"].float()))


def test_parameters_are_the_originals():
    originals.assert_parameters(originals.empty("gridnet"), 2_259_076, "params_gridnet.txt")


def test_a_checkpoint_of_the_original(tmp_path):
    originals.assert_checkpoint_loads(
        tmp_path / "w.pth", "gridnet", lambda w: {f"module.{name}": x for name, x in w.items()}
    )


@pytest.mark.parametrize(
    ("widths", "size", "wrong", "messages"),
    [
        ((8, 12, 16), (20, 12), (2, 30), ("height 2: the nearest is 4", "30: the nearest are 28 and 32")),
        ((4, 6), (6, 10), (7, 8), ("multiples of 2", "height 7: the nearest are 6 and 8")),
    ],
)
def test_training_and_sizes(widths, size, wrong, messages):
    network = create_model("gridnet", num_classes=5, widths=widths)
    originals.assert_sees_its_input(network, size)
    originals.assert_sizes(network, wrong, *messages)
    originals.assert_trains(network, size)


def test_one_row_is_no_grid():
    with pytest.raises(ValueError, match=r"widths must be the channels of two rows or more, got \(32,\)"):
        create_model("gridnet", widths=(32,))
