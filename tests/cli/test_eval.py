"""`vosops eval` on the command line."""

import csv
import io
import json

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


@pytest.fixture
def folders(tmp_path):
    """One sequence of two objects; the prediction halves object 1."""
    true = np.zeros((20, 30), dtype=np.uint8)
    true[2:10, 2:10], true[12:18, 12:18] = 1, 2
    predicted = true.copy()
    predicted[2:10, 6:10] = 0
    for name, mask in (("true", true), ("pred", predicted)):
        folder = tmp_path / name / "clip"
        folder.mkdir(parents=True)
        for t in range(5):
            Image.fromarray(mask).save(folder / f"{t:05d}.png")
    return tmp_path


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
    assert result.exit_code == 1
    assert "no ground truth for other" in result.stderr


def test_sequences_may_come_from_a_text_file(run, folders):
    (folders / "val.txt").write_text("clip\n\n")
    assert run(folders / "pred", folders / "true", "--sequence", folders / "val.txt").exit_code == 0
    result = run(folders / "pred", folders / "true", "--sequence", folders / "test.txt")
    assert result.exit_code == 1
    assert "No such file" in result.stderr and result.stderr.count("\n") == 1


def test_what_is_missing_is_said_in_one_line(run, folders):
    (folders / "pred" / "clip" / "00003.png").unlink()
    result = run(folders / "pred", folders / "true")
    assert result.exit_code == 1
    assert result.stderr == f"vosops eval: {folders / 'pred' / 'clip'}: no prediction for frame 00003\n"
