"""`vosops semantic` on the command line: what it writes, resuming, one-line errors."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.commands import error_line, run_command, stop_after
from tests.clips import moving, picture, read_png, read_video, write_folder
from vosops import cli
from vosops.inference import SemanticTracker
from vosops.io.cityscapes import CITYSCAPES
from vosops.models import create_model

SIZE = (97, 130)
FRAMES = [picture(boxes, SIZE) for boxes in moving(5, ids=(1, 2), size=SIZE)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return create_model("lstm_icnet", version="v3", variant="faster")


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "v3.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def clip(tmp_path):
    return write_folder(tmp_path / "frames", FRAMES)


@pytest.fixture
def vosops(monkeypatch, capsys, weights):
    """Runs the command in this process; returns (exit code, what it printed)."""

    def run(*arguments):
        options = {"--version": "v3", "--variant": "faster", "--device": "cpu", "--weights": str(weights)}
        given = [part for pair in options.items() if pair[0] not in arguments for part in pair]
        return run_command(monkeypatch, capsys, "semantic", *arguments, *given)

    return run


@pytest.mark.parametrize("streaming", [False, True])
def test_label_maps_are_the_trackers(vosops, model, clip, out, streaming):
    code, printed = vosops(clip, "--out", out, *(["--streaming"] if streaming else []))
    assert code == 0, printed
    tracker = SemanticTracker(model, streaming=streaming)
    for t, frame in enumerate(FRAMES):
        expected = tracker.step(torch.from_numpy(frame).permute(2, 0, 1), output="labels")
        np.testing.assert_array_equal(read_png(out / f"{t:05d}.png"), expected.numpy())


def test_what_is_written(vosops, clip, out):
    code, _ = vosops(clip, "--out", out, "--overlay", "--end", 3)
    assert code == 0
    assert {p.name for p in out.iterdir()} == {
        *(f"{t:05d}.png" for t in range(3)),
        ".vosops",
        "contact_sheet.png",
        "overlay.mp4",
        "report.json",
    }
    palette = Image.open(out / "00000.png").getpalette()
    assert palette[:3] == [128, 64, 128]
    assert palette[3 * 18 : 3 * 19] == list(CITYSCAPES["bicycle"].colour)
    assert len(read_video(out / "overlay.mp4")) == 3
    report = json.loads((out / "report.json").read_text())
    assert report["complete"]
    assert report["events"] == []
    assert report["arguments"]["version"] == "v3"
    for frame in report["frames"]:
        assert sum(c["area"] for c in frame["objects"].values()) == SIZE[0] * SIZE[1]


def test_the_naive_way_agrees(vosops, clip, tmp_path, out):
    assert vosops(clip, "--out", out, "--end", 2)[0] == 0
    assert vosops(clip, "--out", tmp_path / "naive", "--end", 2, "--naive")[0] == 0
    for name in ("00000.png", "00001.png"):
        assert np.mean(read_png(out / name) == read_png(tmp_path / "naive" / name)) > 0.999


def test_computed_smaller_it_answers_at_the_inputs_size(vosops, tmp_path, out):
    large = [np.kron(frame, np.ones((2, 2, 1), np.uint8)) for frame in FRAMES[:1]]
    code, _ = vosops(write_folder(tmp_path / "large", large), "--out", out, "--size", 112)
    assert code == 0
    assert read_png(out / "00000.png").shape == (2 * SIZE[0], 2 * SIZE[1])


@pytest.mark.parametrize("streaming", [False, True])
def test_stopped_and_resumed_it_is_the_same(vosops, clip, tmp_path, out, streaming, monkeypatch):
    options = ["--streaming"] if streaming else []
    whole = tmp_path / "whole"
    assert vosops(clip, "--out", whole, *options)[0] == 0

    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        code, printed = vosops(clip, "--out", out, *options)
    assert code == 130
    assert "stopped after 2 frames" in error_line(printed)
    assert vosops(clip, "--out", out, "--resume", *options)[0] == 0
    for t in range(len(FRAMES)):
        assert (out / f"{t:05d}.png").read_bytes() == (whole / f"{t:05d}.png").read_bytes()
    code, printed = vosops(clip, "--out", out, "--resume", "--step", 2, *options)
    assert code == 2
    assert "--step was 1, is 2" in error_line(printed)


@pytest.fixture
def gridnet(monkeypatch, capsys, tmp_path):
    """Runs the command with a network that segments each frame alone."""
    path = tmp_path / "gridnet.pth"
    options = {"widths": (8, 8, 8), "num_classes": 4}
    torch.save(create_model("gridnet", **options).state_dict(), path)

    def run(*arguments):
        given = ["--model", "gridnet", "--weights", path, "--classes", 4, "--option", "widths=(8,8,8)"]
        return run_command(monkeypatch, capsys, "semantic", *arguments, *given, "--device", "cpu")

    return run


def test_tiles_give_what_predict_gives(gridnet, clip, tmp_path, out):
    assert gridnet(clip, "--out", out, "--tile", 64, "--tile-overlap", 16, "--end", 2)[0] == 0
    network = create_model("gridnet", tmp_path / "gridnet.pth", widths=(8, 8, 8), num_classes=4)
    for t, frame in enumerate(FRAMES[:2]):
        expected = network.predict(torch.from_numpy(frame).permute(2, 0, 1), tile=64, overlap=16)
        np.testing.assert_array_equal(read_png(out / f"{t:05d}.png"), expected.numpy())
    code, printed = gridnet(clip, "--out", out, "--resume", "--tile", 32, "--end", 2)
    assert code == 2
    assert "--tile was 64, is 32" in error_line(printed)
    assert gridnet(clip, "--out", tmp_path / "other", "--end", 1)[0] == 0
    code, printed = gridnet(clip, "--out", tmp_path / "other", "--resume", "--tile", 32, "--end", 1)
    assert code == 2
    assert "--tile" in error_line(printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tile", 0], "--tile 0 cannot be used: tile must be at least 1, got 0"),
        (["--tile", 32, "--tile-overlap", 30], "overlap must be at most 28 with tiles of 32, got 30"),
        (["--tile-overlap", 8], "--tile-overlap requires --tile"),
        (["--tile", 64, "--size", 48], "--tile segments frames at their own size: leave out --size"),
    ],
)
def test_wrong_tiles(gridnet, clip, out, arguments, message):
    code, printed = gridnet(clip, "--out", out, *arguments)
    assert code == 2
    assert message in error_line(printed)


def test_a_recurrent_network_forgets_where_a_scene_begins(monkeypatch, capsys, clip, tmp_path, out):
    options = {"widths": (8, 8, 8), "num_classes": 4, "recurrent": "row1,head:depthwise"}
    network = create_model("gridnet", **options)
    torch.save(network.state_dict(), tmp_path / "recurrent.pth")

    def run(*arguments):
        given = ["--model", "gridnet", "--weights", tmp_path / "recurrent.pth", "--classes", 4]
        given += [
            "--option",
            "widths=(8,8,8)",
            "--option",
            "recurrent=row1,head:depthwise",
            "--device",
            "cpu",
        ]
        return run_command(monkeypatch, capsys, "semantic", clip, "--out", out, *arguments, *given)

    code, printed = run("--streaming", "--reset", 3, "--step", 2)
    assert code == 0, printed
    tracker = SemanticTracker(network, streaming=True)
    for t in (0, 2, 4):
        if t == 4:  # the first that is read from frame 3 on
            tracker.reset()
        expected = tracker.step(torch.from_numpy(FRAMES[t]).permute(2, 0, 1), output="labels")
        np.testing.assert_array_equal(read_png(out / f"{t:05d}.png"), expected.numpy())
    code, printed = run("--resume", "--streaming", "--step", 2)
    assert code == 2
    assert "--reset" in error_line(printed)


def test_no_tiles_for_a_recurrent_network(vosops, clip, out):
    code, printed = vosops(clip, "--out", out, "--tile", 64)
    assert code == 2
    assert "--tile cannot be used with --model lstm_icnet, which is recurrent" in error_line(printed)


def test_a_folder_that_breaks_off(vosops, clip, out):
    (clip / "00003.png").write_bytes(b"not a picture")
    code, printed = vosops(clip, "--out", out)
    assert code == 1
    assert "00003.png cannot be read" in error_line(printed)
    assert (out / "00002.png").exists() and not (out / "00003.png").exists()


@pytest.mark.parametrize(
    "arguments, message, exit_code",
    [
        (["--weights", "absent.pth"], "--weights absent.pth does not exist", 2),
        (["--variant", "dense"], "variant must be one of convolution", 1),
        (["--version", "v5"], "convlstm3_1_sub2", 1),
        (["--classes", 7], "conv6_cls", 1),
        (["--classes", 1], "--classes must be from 2 to 255, got 1", 2),
        (["--size", 8], "--size must be", 2),
        (["--start", 9], "leaves no frame", 2),
        (["--dtype", "int8"], "--dtype must be one of", 2),
        (["--resume", "--overwrite"], "mutually exclusive", 2),
        (["--fps", 0], "--fps must be above 0", 2),
    ],
)
def test_errors_are_one_line(vosops, clip, out, arguments, message, exit_code):
    code, printed = vosops(clip, "--out", out, *arguments)
    assert code == exit_code
    assert message in error_line(printed)


def test_frames_that_are_too_small(vosops, tmp_path, out):
    code, printed = vosops(write_folder(tmp_path / "small", [picture({})]), "--out", out)
    assert code == 2
    assert "frames of 64x48 are too small: give --size 97 or more" in error_line(printed)


def test_weights_are_asked_for(monkeypatch, capsys, clip, out):
    monkeypatch.setattr(sys, "argv", ["vosops", "semantic", str(clip), "--out", str(out)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert "--weights" in capsys.readouterr().err
