"""`vosops train`: what it prints, writes and refuses."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")
pytest.importorskip("pydantic")
pytest.importorskip("lightning_fabric")

import yaml  # noqa: E402

from tests.cli.commands import error_line, run_command, stop_after  # noqa: E402
from tests.clips import moving, picture, truth, write_folder  # noqa: E402
from tests.training.conftest import strangers  # noqa: E402, F401


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: run_command(monkeypatch, capsys, "train", *arguments)


@pytest.fixture
def config(tmp_path):
    boxes = moving(4)
    write_folder(tmp_path / "images", [picture(x) for x in boxes])
    write_folder(tmp_path / "masks", [truth(x) for x in boxes])
    source = {"kind": "stills", "images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    content = {
        "model": "stranger_classes",
        "steps": 4,
        "batch": 1,
        "data": {
            "train": [source],
            "held_out": {"sources": [source]},
            "clips": {"frames": 1, "crop": 32},
            "workers": 0,
        },
        "tensorboard": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "config.yaml"


def test_it_trains_and_says_what_it_came_to(run, config, tmp_path):
    code, printed = run(config, "--out", tmp_path / "out")
    assert code == 0 and "4 steps in" in printed and "best 0." in printed
    assert (tmp_path / "out" / "weights.safetensors").exists()


def test_it_stops_and_goes_on(run, config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        code, printed = run(config, "--out", tmp_path / "out")
    assert code == 130 and "stopped after step 2; --resume" in error_line(printed)
    code, printed = run(config, "--out", tmp_path / "out", "--resume")
    assert code == 0 and "4 steps in" in printed


def test_show_prints_the_whole_configuration(run, config, tmp_path):
    code, printed = run(config, "--show", "--set", "optimizer.rate=0.5")
    assert code == 0
    shown = yaml.safe_load(printed)
    assert shown["optimizer"]["rate"] == 0.5 and shown["schedule"]["kind"] == "cosine"
    (tmp_path / "again.yaml").write_text(printed)
    assert run(tmp_path / "again.yaml", "--show") == (0, printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "optimiser.rate=1"], "optimiser is unknown: did you mean optimizer?"),
        ([], "--out must be given"),
    ],
)
def test_errors_are_one_line(run, config, arguments, message):
    code, printed = run(config, *arguments)
    assert code == 2 and message in error_line(printed)
