"""Masks from the classes that a network finds: `vosops semantic --as-masks`, and tracks that `--init` begins."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.commands import error_line, run_command, stop_after
from tests.clips import COLOURS, moving, picture, read_png, truth, write_folder, write_mask
from vosops.inference.classes import find_classes, split_objects
from vosops.io.errors import InputError
from vosops.io.labels import davis_palette
from vosops.models import create_model

BOXES = moving(4, ids=(1, 2))
FRAMES = [picture(boxes) for boxes in BOXES]
CLASSES = 5
CLASS_OF_ID = (0, 3, 1)  # of background and the two objects; the other classes are nowhere
OPTIONS = {"widths": (6, 6), "num_classes": CLASSES}
STEPS = 40


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a network that has learned the objects of the first frame."""
    network = create_model("gridnet", **OPTIONS).train()
    images = torch.from_numpy(FRAMES[0]).permute(2, 0, 1)[None]
    labels = torch.tensor(CLASS_OF_ID)[torch.from_numpy(truth(BOXES[0])).long()][None]
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(network.prepare(images)), labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "gridnet.pth"
    torch.save(network.state_dict(), path)
    found = network.eval().predict(images[0])
    assert (found == labels[0]).double().mean() > 0.98
    return path


@pytest.fixture
def clip(tmp_path):
    return write_folder(tmp_path / "frames", FRAMES)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        return run_command(monkeypatch, capsys, *arguments, "--device", "cpu")

    return run


@pytest.fixture
def semantic(run, weights, clip, out):
    def semantic(*arguments):
        given = ["--model", "gridnet", "--weights", weights, "--option", "widths=(6,6)", "--classes", CLASSES]
        return run("semantic", clip, "--out", out, *given, *arguments)

    return semantic


@pytest.fixture
def segment(run, weights, clip, out):
    def segment(init, *arguments, out=out):
        given = ["--init-option", "widths=(6,6)", "--init-option", f"num_classes={CLASSES}"]
        given += ["--init-weights", weights, "--option", "pretrained=False"]
        return run("segment", clip, "--init", init, "--out", out, *given, *arguments)

    return segment


def agreement(path, expected):
    return np.mean(read_png(path) == expected)


def test_chosen_classes_are_the_objects_of_masks(semantic, out):
    code, printed = semantic("--as-masks", "3,1", "--overlay")
    assert code == 0, printed
    for t, boxes in enumerate(BOXES):
        assert agreement(out / f"{t:05d}.png", truth(boxes)) > 0.9
        assert set(np.unique(read_png(out / f"{t:05d}.png"))) == {0, 1, 2}
    assert bytes(Image.open(out / "00000.png").getpalette())[:9] == davis_palette()[:9]
    report = json.loads((out / "report.json").read_text())
    assert report["arguments"]["as-masks"] == [3, 1]
    for frame in report["frames"]:
        labels = read_png(out / f"{frame['name']}.png")
        assert {i: o["area"] for i, o in frame["objects"].items()} == {
            str(i): int((labels == i).sum()) for i in (1, 2)
        }
    code, printed = semantic("--as-masks", "1", "--resume")
    assert code == 2
    assert "--as-masks" in error_line(printed)


def test_one_class_of_several(semantic, out):
    assert semantic("--as-masks", "1", "--end", 1)[0] == 0
    assert agreement(out / "00000.png", truth(BOXES[0]) == 2) > 0.98


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("5", "class '5' is unknown: give a number from 0 to 4"),
        ("car", "class 'car' is unknown: give a number from 0 to 4"),
        ("1,1", "class '1' is named twice"),
        ("1,", "class '' is unknown"),
    ],
)
def test_classes_that_cannot_be(semantic, segment, classes, message):
    for code, printed in (semantic("--as-masks", classes), segment(f"gridnet:{classes}")):
        assert code == 2
        assert message in error_line(printed)


def test_a_track_begins_with_what_the_network_finds(segment, out, weights, clip, tmp_path, run):
    code, printed = segment("gridnet:3,1", "--end", 2)
    assert code == 0, printed
    first = read_png(out / "00000.png")
    assert np.mean(first == truth(BOXES[0])) > 0.98
    assert set(np.unique(read_png(out / "00001.png"))) <= {0, 1, 2}
    mask = write_mask(tmp_path / "mask.png", first)  # the same mask, painted
    painted = ["segment", clip, "--mask", mask, "--out", tmp_path / "painted", "--end", 2]
    assert run(*painted, "--option", "pretrained=False")[0] == 0
    for name in ("00000.png", "00001.png"):
        np.testing.assert_array_equal(read_png(out / name), read_png(tmp_path / "painted" / name))


def test_a_track_by_classes_is_resumed(segment, out, tmp_path, monkeypatch, weights):
    assert segment("gridnet:3", "--end", 3, out=tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert segment("gridnet:3", "--end", 3)[0] == 130
    assert segment("gridnet:3", "--end", 3, "--resume")[0] == 0
    for t in range(3):
        assert (out / f"{t:05d}.png").read_bytes() == (tmp_path / "whole" / f"{t:05d}.png").read_bytes()
    code, printed = segment("gridnet:1", "--end", 3, "--resume")
    assert code == 2
    assert "the mask of frame 0 changed" in error_line(printed)


def test_each_part_is_an_object(run, segment, out, clip):
    """Both boxes in the first one's colour: one class."""
    frame = FRAMES[0].copy()
    frame[truth(BOXES[0]) == 2] = COLOURS[1]
    write_folder(clip, [frame])
    assert segment("gridnet:3", "--end", 1, out=out / "whole")[0] == 0
    whole = read_png(out / "whole" / "00000.png")
    assert set(np.unique(whole)) == {0, 1}
    code, printed = segment("gridnet:3", "--instances", "--end", 1, out=out / "parts")
    assert code == 0, printed
    parts = read_png(out / "parts" / "00000.png")
    np.testing.assert_array_equal(parts > 0, whole > 0)
    ids = [set(np.unique(parts[truth(BOXES[0]) == box])) - {0} for box in (1, 2)]
    assert ids in ([{1}, {2}], [{2}, {1}])


def test_parts_are_counted_on_and_specks_left_out():
    labels = np.zeros((50, 60), np.uint8)
    labels[2:10, 2:10] = 2
    labels[2:12, 30:40] = 2
    labels[40, 40] = 2  # a speck
    labels[20:30, 2:10] = 1
    labels[48, 58] = 3  # all that there is of it
    found = split_objects(labels)
    assert [int(found[y, x]) for y, x in ((25, 5), (5, 35), (5, 5), (40, 40), (48, 58))] == [1, 2, 3, 0, 4]
    np.testing.assert_array_equal(found > 0, (labels > 0) & ~((labels == 2) & (np.arange(50) == 40)[:, None]))
    many = np.zeros((31, 31), np.uint8)
    many[::2, ::2] = 1
    with pytest.raises(InputError, match="more than 254 parts"):
        split_objects(many)


def test_names_of_cityscapes():
    assert find_classes("car, traffic light,0", 19) == [13, 6, 0]
    with pytest.raises(InputError, match="give a number from 0 to 18, or one of road, sidewalk"):
        find_classes("lorry", 19)


@pytest.mark.parametrize(
    ("init", "arguments", "message"),
    [
        ("gridnet:4", [], "--init gridnet finds no pixel of class 4 in the first frame, only of 0, 1, 3"),
        ("gridnet", [], "--init must be NAME:CLASS[,CLASS]"),
        ("grid:1", [], "--init grid is unknown: choose one of danet"),
        ("stm:1", [], "--init stm does not segment into classes"),
        ("gridnet:1", ["--init-option", "depth=3"], "--init-option depth cannot be used with --init gridnet"),
        ("gridnet:1", ["--init-option", "depth"], "--init-option must be NAME=VALUE, got depth"),
        ("gridnet:1", ["--init-weights", "absent.pth"], "--init-weights absent.pth does not exist"),
        ("gridnet:1", ["--mask", "absent.png"], "mask absent.png does not exist"),
    ],
)
def test_errors_are_one_line(segment, out, init, arguments, message):
    code, printed = segment(init, *arguments)
    assert code == 2
    assert message in error_line(printed)
    assert not out.exists()


def test_options_of_init_need_it(run, clip, out):
    for flag in (["--init-weights", "x.pth"], ["--init-option", "a=1"], ["--instances"]):
        code, printed = run("segment", clip, "--out", out, *flag)
        assert code == 2
        assert f"{flag[0]} requires --init" in error_line(printed)


def test_init_needs_weights_and_no_data_set(run, clip, out, tmp_path):
    code, printed = run("segment", clip, "--out", out, "--init", "gridnet:1")
    assert code == 2
    assert "--init gridnet needs --init-weights FILE" in error_line(printed)
