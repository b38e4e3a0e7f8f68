"""`vosops eval` on the command line."""

import csv
import io
import json
import os
import shutil

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from vosops.cli import eval as eval_command


@pytest.fixture
def run():
    app = typer.Typer()
    app.callback()(lambda: None)
    eval_command.register(app)
    return lambda *args: CliRunner().invoke(app, ["eval", *map(str, args)])


def write(root, true, predicted, frames):
    """One sequence of frames that are all alike: root/true/clip and root/pred/clip."""
    for name, mask in (("true", true), ("pred", predicted)):
        folder = root / name / "clip"
        folder.mkdir(parents=True)
        for t in range(frames):
            Image.fromarray(mask).save(folder / f"{t:05d}.png")
    return root


@pytest.fixture
def folders(tmp_path):
    """One sequence of two objects; the prediction halves object 1."""
    true = np.zeros((20, 30), dtype=np.uint8)
    true[2:10, 2:10], true[12:18, 12:18] = 1, 2
    predicted = true.copy()
    predicted[2:10, 6:10] = 0
    return write(tmp_path, true, predicted, frames=5)


def test_the_table_shows_every_object_and_the_means(run, folders):
    result = run(folders / "pred", folders / "true")
    assert result.exit_code == 0
    rows = [line for line in result.stdout.splitlines() if "clip" in line]
    assert [row.split()[1] for row in rows] == ["1", "2", "mean"]
    assert "0.500" in rows[0] and "1.000" in rows[1] and "0.750" in rows[2]


def test_json_holds_the_values_frame_by_frame(run, folders):
    assert run(folders / "pred", folders / "true", "--json", folders / "r.json").exit_code == 0
    report = json.loads((folders / "r.json").read_text())
    assert report["global"]["J-Mean"] == pytest.approx(0.75)
    assert report["protocol"] == {"merge_objects": False, "keep_ends": False, "ignore_void": False}
    frames = report["sequences"]["clip"]["objects"]["1"]["frames"]
    assert list(frames) == ["00001", "00002", "00003"]
    assert frames["00002"][0] == 0.5


def test_csv_has_a_row_per_object_and_one_for_all(run, folders):
    result = run(folders / "pred", folders / "true", "--csv", "--jobs", "1")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(r["sequence"], r["object"], float(r["J-Mean"])) for r in rows] == [
        ("clip", "1", 0.5),
        ("clip", "2", 1.0),
        ("all", "", 0.75),
    ]


def test_merged_objects_are_scored_as_one(run, folders):
    result = run(folders / "pred", folders / "true", "--csv", "--merge-objects")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert len(rows) == 2
    assert float(rows[0]["J-Mean"]) == pytest.approx((32 + 36) / (64 + 36), abs=1e-6)


def test_sequences_are_separated_by_commas(run, folders):
    assert run(folders / "pred", folders / "true", "--sequences", "clip").exit_code == 0
    result = run(folders / "pred", folders / "true", "--sequences", "clip,other")
    assert result.exit_code == 2
    assert "no ground truth for other" in result.stderr


def test_sequences_may_come_from_a_text_file(run, folders):
    (folders / "val.txt").write_text("clip\n\n")
    assert run(folders / "pred", folders / "true", "--sequence", folders / "val.txt").exit_code == 0
    result = run(folders / "pred", folders / "true", "--sequence", folders / "test.txt")
    assert result.exit_code == 2
    assert "no such file of names" in result.stderr and result.stderr.count("\n") == 1


def test_what_is_missing_is_said_in_one_line(run, folders):
    (folders / "pred" / "clip" / "00003.png").unlink()
    result = run(folders / "pred", folders / "true")
    assert result.exit_code == 2
    assert result.stderr == f"vosops eval: {folders / 'pred' / 'clip'}: no prediction for frame 00003\n"


class TestBrokenSequences:
    @pytest.fixture
    def broken(self, folders):
        """A second sequence, [b], of two frames."""
        for kind in ("true", "pred"):
            (folders / kind / "[b]").mkdir()
            for t in range(2):
                shutil.copy(folders / kind / "clip" / f"{t:05d}.png", folders / kind / "[b]")
        return folders

    def test_the_table_says_why_and_the_rest_is_scored(self, run, broken):
        result = run(broken / "pred", broken / "true")
        assert result.exit_code == 1
        text = " ".join(result.stdout.split())
        assert "0.750" in text
        assert "[b]" in text and "2 frames leave none to score" in text
        assert (
            result.stderr
            == "vosops eval: 1 of 2 sequences cannot be scored; the means are over the other one\n"
        )

    def test_csv_and_json_have_the_reason(self, run, broken):
        result = run(broken / "pred", broken / "true", "--csv", "--json", broken / "r.json")
        assert result.exit_code == 1
        rows = list(csv.DictReader(io.StringIO(result.stdout)))
        assert [row["sequence"] for row in rows] == ["clip", "clip", "[b]", "all"]
        assert "2 frames leave none" in rows[2]["problem"] and not rows[2]["J-Mean"]
        assert [row["problem"] for row in rows if row["sequence"] != "[b]"] == ["", "", ""]
        assert float(rows[3]["J-Mean"]) == 0.75
        report = json.loads((broken / "r.json").read_text())
        assert list(report["problems"]) == ["[b]"] and report["global"]["J-Mean"] == pytest.approx(0.75)

    def test_semantic(self, run, broken):
        (broken / "pred" / "[b]" / "00001.png").unlink()
        result = run(broken / "pred", broken / "true", "--task", "semantic", "--csv")
        assert result.exit_code == 1
        rows = {row["name"]: row for row in csv.DictReader(io.StringIO(result.stdout))}
        assert "no prediction for frame 00001" in rows["[b]"]["problem"] and float(rows["mIoU"]["IoU"]) > 0.5

    def test_names_that_are_not_utf8_are_shown(self, run, folders):
        for kind in ("true", "pred"):
            (folders / kind / "clip").rename(os.fsdecode(os.fsencode(folders / kind) + b"/caf\xe9"))
        result = run(folders / "pred", folders / "true")
        assert result.exit_code == 0 and r"caf\xe9" in result.stdout


def test_an_unwritable_json_is_refused_before_the_work(run, folders):
    result = run(folders / "nowhere", folders / "true", "--json", folders / "absent" / "r.json")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr and result.stderr.count("\n") == 1


class TestSemantic:
    """Twenty rows of 29 pixels of class 0 and one of class 1, which was missed in half of the rows."""

    @pytest.fixture
    def classes(self, tmp_path):
        true = np.zeros((20, 30), dtype=np.uint8)
        true[:, 29] = 1
        predicted = true.copy()
        predicted[:10, 29] = 0
        return write(tmp_path, true, predicted, frames=3)

    @pytest.fixture
    def semantic(self, run, classes):
        return lambda *options: run(classes / "pred", classes / "true", "--task", "semantic", *options)

    def test_the_table_shows_every_class_and_the_means(self, semantic):
        result = semantic("--consistency", 2)
        assert result.exit_code == 0
        rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
        assert rows["road"] == ["0.983", str(3 * 580)]
        assert rows["sidewalk"] == ["0.500", str(3 * 20)]
        assert rows["mIoU"] == ["0.742"] and rows["Pixel-Accuracy"] == ["0.983"] and rows["VC2"] == ["1.000"]
        assert "bicycle" not in rows

    def test_json_and_csv(self, semantic, classes):
        result = semantic("--csv", "--classes", 2, "--json", classes / "r.json")
        rows = list(csv.DictReader(io.StringIO(result.stdout)))
        assert [(r["class"], r["name"], float(r["IoU"])) for r in rows] == [
            ("0", "0", pytest.approx(580 / 590, abs=1e-6)),
            ("1", "1", 0.5),
            ("all", "mIoU", pytest.approx((580 / 590 + 0.5) / 2, abs=1e-6)),
            ("all", "Pixel-Accuracy", pytest.approx(590 / 600, abs=1e-6)),
        ]
        report = json.loads((classes / "r.json").read_text())
        assert report["classes"]["1"]["IoU"] == 0.5
        assert report["sequences"]["clip"]["frames"] == 3
        assert report["confusion_matrix"] == [[3 * 580, 0, 0], [30, 30, 0]]
        assert report["protocol"] == {"task": "semantic", "classes": 2, "ids": ["train"], "consistency": None}

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--task", "panoptic"], "--task: expected one of objects, semantic; got 'panoptic'"),
            (["--task", "semantic", "--keep-ends"], "--keep-ends requires --task objects"),
            (["--ids", "label"], "--ids requires --task semantic"),
            (["--classes", "5"], "--classes requires --task semantic"),
            (["--task", "semantic", "--classes", "1"], "num_classes: expected 2 to 255; got 1"),
            (["--task", "semantic", "--ids", "x"], "ids: expected train or label; got 'x'"),
        ],
    )
    def test_errors_are_one_line(self, run, classes, options, message):
        result = run(classes / "pred", classes / "true", *options)
        assert result.exit_code == 2
        assert result.stderr == f"vosops eval: {message}\n"


class TestTheFileOfJson:
    def test_is_replaced_where_it_is_an_earlier_one(self, run, folders):
        options = (folders / "pred", folders / "true", "--json", folders / "r.json")
        assert run(*options).exit_code == 0
        first = (folders / "r.json").read_bytes()
        assert run(*options, "--keep-ends").exit_code == 0
        assert (folders / "r.json").read_bytes() != first
        assert not [path for path in folders.iterdir() if path.name.startswith(".")]

    @pytest.mark.parametrize("place", ["true/clip/00001.png", "notes.txt", "link.json"])
    def test_is_left_alone_where_it_is_something_else(self, run, folders, place):
        (folders / "notes.txt").write_text('{"protocol": 1}')
        (folders / "link.json").symlink_to(folders / "true" / "clip" / "00002.png")
        before = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
        result = run(folders / "pred", folders / "true", "--json", folders / place)
        assert result.exit_code == 2 and "already exists" in result.stderr
        assert {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()} == before

    def test_is_no_link_to_nothing(self, run, folders):
        (folders / "loop.json").symlink_to(folders / "loop.json")
        (folders / "lost.json").symlink_to(folders / "nowhere" / "r.json")
        for name in ("loop.json", "lost.json"):
            result = run(folders / "pred", folders / "true", "--json", folders / name)
            assert result.exit_code == 2 and f"{name} is a broken link" in result.stderr
        assert not (folders / "nowhere").exists() and (folders / "loop.json").is_symlink()

    def test_may_be_a_link_or_a_device(self, run, folders):
        (folders / "link.json").symlink_to(folders / "r.json")
        assert run(folders / "pred", folders / "true", "--json", folders / "link.json").exit_code == 0
        assert (folders / "link.json").is_symlink() and json.loads((folders / "r.json").read_text())["global"]
        assert run(folders / "pred", folders / "true", "--json", "/dev/null").exit_code == 0
        assert not os.path.isfile("/dev/null")
