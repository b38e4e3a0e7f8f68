"""Small data to train on, and configurations of it."""

from __future__ import annotations

import importlib
import sys

import pytest

from vosops.models import registry


@pytest.fixture(autouse=True)
def strangers(monkeypatch):
    """Two small networks of another package, in the registry while a test lasts."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(registry, "_NAMES", dict(registry._NAMES))
    sys.modules.pop("tests.models.stranger", None)
    return importlib.import_module("tests.models.stranger")


@pytest.fixture(scope="session")
def davis(tmp_path_factory):
    """Three sequences in DAVIS' layout: two objects that move right by one pixel a frame."""
    from tests.clips import moving, picture, truth, write_folder

    root = tmp_path_factory.mktemp("davis")
    for name in ("one", "two", "three"):
        boxes = moving(9, ids=(1, 2))
        write_folder(root / "JPEGImages" / "480p" / name, [picture(x) for x in boxes])
        write_folder(root / "Annotations" / "480p" / name, [truth(x) for x in boxes])
    return root


@pytest.fixture(scope="session")
def stills(tmp_path_factory):
    """Six images, each with a red or a green box on the sky."""
    from tests.clips import picture, truth, write_folder

    root = tmp_path_factory.mktemp("stills")
    boxes = [{1 + n % 2: (4 + 3 * n, 6 + 5 * n, 16, 20)} for n in range(6)]
    write_folder(root / "images", [picture(x) for x in boxes])
    write_folder(root / "masks", [truth(x) for x in boxes])
    return root


@pytest.fixture
def classes_config(stills):
    """Returns the configuration of a tiny network for classes, changed by keys."""

    from vosops.training.config import parse_config

    def configure(**changes):
        source = {"kind": "stills", "images": str(stills / "images"), "masks": str(stills / "masks")}
        content = {
            "model": "stranger_classes",
            "steps": 6,
            "batch": 2,
            "data": {
                "train": [source],
                "held_out": {"sources": [source], "frames": 2},
                "clips": {"frames": 1, "crop": [32, 32]},
                "workers": 0,
            },
            "optimizer": {"rate": 0.01},
            "every": {"log": 1, "score": 3, "save": 2, "pictures": 6},
            "tensorboard": False,
        }
        return parse_config(changed(content, changes))

    return configure


def changed(content, changes):
    """The content with values put at keys such as ``data__workers``."""
    for key, value in changes.items():
        *within, last = key.split("__")
        place = content
        for part in within:
            place = place.setdefault(part, {})
        place[last] = value
    return content


def break_file(path):
    """Leaves the first bytes of a file."""
    path.write_bytes(path.read_bytes()[:40])
