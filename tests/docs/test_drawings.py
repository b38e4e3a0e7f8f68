"""The drawings of the segmentation networks: their boxes and arrows are those of a run of the network."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tests.scripts import load_script
from vosops.models import find_model, list_models

ROOT = Path(__file__).parents[2]
DRAWN = load_script(ROOT / "docs/draw_networks.py")
PAGES = ROOT / "docs/models"
NOT_DRAWN = {"lstm_icnet", "lstm_segnet", "rfcn", "hrnet_w18", "hrnet_w32"}  # with text, and as hrnet_w48
SVG = "{http://www.w3.org/2000/svg}"


def test_every_network_for_frames_is_drawn_on_its_page():
    assert set(list_models("semantic network")) - NOT_DRAWN == set(DRAWN.BOXES)
    assert {path.stem for path in DRAWN.IMAGES.glob("*.svg")} == set(DRAWN.BOXES)
    for name in DRAWN.BOXES:
        page = PAGES / find_model(name).page.partition("#")[0]
        assert f"(../images/networks/{name}.svg)" in page.read_text()


@pytest.mark.parametrize("name", DRAWN.BOXES)
def test_boxes_and_arrows_are_those_of_the_network(name):
    boxes = DRAWN.trace(name)
    image = ElementTree.parse(DRAWN.IMAGES / f"{name}.svg").getroot()
    ids = [group.get("id") for group in image.iter(f"{SVG}g")]
    assert [i for i in ids if ":" in i] == [f"{box.name}:{box.text}" for box in boxes]
    words = " ".join("".join(text.itertext()) for text in image.iter(f"{SVG}text"))
    for box in boxes:
        assert box.text in words
        for line in DRAWN.lines_of(box.name):
            assert line in words
    arrows = [f"{boxes[n].name}>{box.name}" for box in boxes for n in sorted(box.reads)]
    assert [i for i in ids if ">" in i] == arrows


def test_the_trace_of_a_network_is_what_its_modules_say():
    """Channels from the layers themselves, and the U of U-Net by hand."""
    boxes = {box.name: box for box in DRAWN.trace("unet")}
    with torch.device("meta"):
        network = find_model("unet").load()()
    for name, box in boxes.items():
        if name == DRAWN.INPUT:
            continue
        layers = [m for m in network.get_submodule(name).modules() if isinstance(m, torch.nn.Conv2d)]
        assert box.size[0] == layers[-1].out_channels
    order = list(boxes)
    assert order == ["image", "inc", "down1", "down2", "down3", "down4", "up1", "up2", "up3", "up4", "outc"]
    assert [sorted(order[n] for n in boxes[f"up{k}"].reads) for k in (1, 2, 3, 4)] == [
        ["down3", "down4"],
        ["down2", "up1"],
        ["down1", "up2"],
        ["inc", "up3"],
    ]
