"""Backbones and widths of which no case of an original is here: names and shapes follow from those that are."""

import ast
import re

import pytest

from tests.conftest import SHARED
from tests.models.segmentation import originals

BLOCKS = {"resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
PARAMETERS = {"resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808}  # of torchvision's
RESNETS = [
    ("deeplabv3plus", "params_deeplabv3plus_resnet50.txt", "resnet101"),
    ("danet", "params_danet_resnet50.txt", "resnet101"),
    ("danet", "params_danet_resnet50.txt", "resnet152"),
    ("pspnet", "params_pspnet_resnet50.txt", "resnet101"),
    ("pspnet", "params_pspnet_resnet50.txt", "resnet152"),
]
WIDTH = 48


def listed(file):
    """Names and shapes of a list in params/, or a skip."""
    path = SHARED / "params" / file
    if not path.exists():
        pytest.skip(f"{path} is not here (set VOSOPS_TEST_DATA)")
    lines = (line.split("\t") for line in path.read_text().splitlines() if line)
    return {name: ast.literal_eval(shape) for name, shape, _ in lines}


def shapes(network):
    return {name: tuple(x.shape) for name, x in network.state_dict().items()}


@pytest.mark.parametrize(("model", "file", "backbone"), RESNETS)
def test_deeper_resnets_have_more_of_the_same_blocks(model, file, backbone):
    of_50 = listed(file)
    expected = dict(of_50)
    for name, shape in of_50.items():
        block = re.match(r"(.*\blayer)([1-4])\.1\.(.*)", name)  # a second block, like all that follow it
        if block:
            before, stage, rest = block.groups()
            for number in range(1, BLOCKS[backbone][int(stage) - 1]):
                expected[f"{before}{stage}.{number}.{rest}"] = shape
    network = originals.empty(model, backbone=backbone)
    assert shapes(network) == expected
    counts = [sum(x.numel() for x in net.parameters()) for net in (network, originals.empty(model))]
    assert counts[0] - counts[1] == PARAMETERS[backbone] - PARAMETERS["resnet50"]


@pytest.mark.parametrize("width", [18, 32])
def test_narrower_hrnets_are_w48_in_other_widths(width):
    of_branches = [WIDTH << n for n in range(4)]
    scaled = {side: side * width // WIDTH for side in (*of_branches, sum(of_branches))}
    expected = {
        name: tuple(scaled.get(side, side) for side in shape)
        for name, shape in listed("params_hrnet_w48.txt").items()
    }
    assert shapes(originals.empty(f"hrnet_w{width}")) == expected


@pytest.mark.parametrize("bins", [(1,), (1, 2), (2, 4, 8, 16)])
def test_other_bins_share_the_channels(bins):
    """As many channels as the map has, divided among the bins; all else stays."""
    expected = {
        name: shape
        for name, shape in listed("params_pspnet_resnet50.txt").items()
        if not name.startswith("ppm.")
    }
    found = shapes(originals.empty("pspnet", bins=bins))
    assert {name: shape for name, shape in found.items() if not name.startswith("ppm.")} == expected
    weights = {name: shape for name, shape in found.items() if len(shape) == 4 and name.startswith("ppm.")}
    assert weights == {
        f"ppm.features.{n}.1.weight": (2048 // len(bins), 2048, 1, 1) for n in range(len(bins))
    }
