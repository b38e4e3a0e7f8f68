"""A stranger's networks, entered in the registry by a line each, are found wherever models are."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vosops
from tests.cli.commands import error_line, run_command
from tests.clips import moving, picture, read_png, truth, write_folder, write_mask
from tests.scripts import load_script
from vosops import info
from vosops.inference import NetworkTracker
from vosops.models import create_model, create_tracker, find_model, list_models

ROOT = Path(__file__).parents[2]
BOXES = moving(3, ids=(1, 2))


@pytest.fixture(autouse=True)
def stranger(own_registry):
    """The stranger's module, imported anew."""
    sys.modules.pop("tests.models.stranger", None)
    return importlib.import_module("tests.models.stranger")


@pytest.fixture
def clip(tmp_path):
    return write_folder(tmp_path / "frames", [picture(boxes) for boxes in BOXES])


@pytest.fixture
def weights(tmp_path, stranger):
    """A file of weights that makes the class of every pixel 2."""
    network = stranger.StrangerClasses(num_classes=3)
    torch.nn.init.zeros_(network.last.weight)
    network.last.bias.data = torch.tensor([0.0, 1.0, 5.0])
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_they_are_listed():
    assert "stranger_classes" in list_models() and "stranger_masks" in list_models("mask network")
    assert find_model("stranger++").name == "stranger_classes"


def test_create_model(stranger, weights):
    network = create_model("stranger++", num_classes=7, in_channels=3)
    assert isinstance(network, stranger.StrangerClasses) and not network.training
    assert network(torch.rand(1, 3, 16, 24)).shape == (1, 7, 4, 6)
    again = create_model("stranger_classes", num_classes=7)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    loaded = create_model("stranger_classes", weights, num_classes=3)
    assert loaded.last.bias.tolist() == [0, 1, 5]


def test_create_tracker():
    tracker = create_tracker("stranger_masks", memory_every=2, sharpness=10.0)
    assert isinstance(tracker, NetworkTracker)
    assert tracker.memory_every == 2 and tracker.network.sharpness.item() == 10
    with pytest.raises(
        ValueError, match="model must track objects, got 'stranger_classes', a semantic network"
    ):
        create_tracker("stranger_classes")


def test_segment_in_python():
    found = list(
        vosops.segment([picture(b) for b in BOXES], truth(BOXES[0]), model="stranger_masks", size=-1)
    )
    for frame, boxes in zip(found, BOXES, strict=True):
        assert np.mean(frame.labels.numpy() == truth(boxes)) > 0.95


def test_segment_on_the_command_line(monkeypatch, capsys, clip, tmp_path):
    mask, out = write_mask(tmp_path / "mask.png", truth(BOXES[0])), tmp_path / "out"
    code, printed = run_command(
        monkeypatch, capsys, "segment", clip, "--mask", mask, "--out", out, "--model", "stranger_masks",
        "--size", -1, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, printed
    for t, boxes in enumerate(BOXES):
        assert np.mean(read_png(out / f"{t:05d}.png") == truth(boxes)) > 0.95


@pytest.fixture
def semantic(monkeypatch, capsys, clip, tmp_path):
    def run(*arguments):
        return run_command(
            monkeypatch, capsys, "semantic", clip, "--out", tmp_path / "out", "--device", "cpu", *arguments
        )

    return run


def test_semantic_on_the_command_line(semantic, weights, tmp_path):
    given = ["--model", "stranger_classes", "--weights", weights, "--classes", 3, "--option", "width=8"]
    code, printed = semantic(*given)
    assert code == 0, printed
    assert (read_png(tmp_path / "out" / "00002.png") == 2).all()
    arguments = json.loads((tmp_path / "out" / "report.json").read_text())["arguments"]
    assert arguments["model"] == "stranger_classes" and arguments["classes"] == 3
    assert semantic(*given, "--resume")[0] == 0
    code, printed = semantic(*given[:-1], "width=9", "--resume")
    assert code == 1 and "last.weight is (3, 8, 1, 1) and must be (3, 9, 1, 1)" in error_line(printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "stranger"],
            "--model stranger is unknown: choose one of ",
        ),
        (
            ["--model", "stranger_masks"],
            "--model stranger_masks does not segment into classes, see vosops segment",
        ),
        (
            ["--model", "stranger_classes"],
            "--model stranger_classes needs --weights FILE (stranger_classes.pth)",
        ),
        (["--model", "stranger++", "--weights", "absent.pth"], "--weights absent.pth does not exist"),
        (
            ["--model", "stranger++", "--weights", __file__, "--version", "v5"],
            "--version cannot be used with --model",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(semantic, arguments, message, tmp_path):
    code, printed = semantic(*arguments)
    assert code == 2
    assert message in error_line(printed)
    assert not (tmp_path / "out").exists()


def test_info():
    text = info.describe(info.collect())
    assert "stranger_masks     mask network: follows colours\n" in text
    assert (
        "two convolutions, for the class of every pixel; weights: stranger_classes.pth; also stranger++\n"
        in text
    )


def test_the_table_of_the_documentation():
    make_tables = load_script(ROOT / "benchmarks/make_tables.py")
    name, what = (
        "`stranger_classes`, `stranger++`",
        "two convolutions, for the class of every pixel (Nobody, 2026)",
    )
    count = 8 * 3 * 9 + 8 + 4 * 8 + 4
    options = "`num_classes`, `in_channels`, `width`"
    row = f"| {name} | {what} | {count} | stranger_classes.pth | {options} |"
    assert row in make_tables.of_models("classes").splitlines()
    assert "| `stranger_masks` | follows colours | 1 | optional | `sharpness` |" in make_tables.of_models(
        "objects"
    )
