"""Folders of masks: which files are compared, what their labels mean, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from vosops.metrics import EvaluationError, evaluate

SHAPE = (24, 32)


def labels(**boxes):
    """A label map from `o3=(top, left, height, width)` and the like."""
    result = np.zeros(SHAPE, dtype=np.uint8)
    for name, (top, left, height, width) in boxes.items():
        result[top : top + height, left : left + width] = int(name[1:])
    return result


def write(folder, frames, mode="P"):
    """Writes label maps as 00000.png, 00001.png ..."""
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        image = Image.fromarray(frame)
        if mode == "P":
            image.putpalette(list(range(256)) * 3)
        else:
            image = image.convert(mode)
        image.save(folder / f"{t:05d}.png")
    return folder


TRUE = [labels(o1=(2, 2 + t, 8, 8), o2=(12, 12, 8, 8)) for t in range(6)]
HALF = [labels(o1=(2, 2 + t, 8, 4), o2=(12, 12, 8, 8)) for t in range(6)]


@pytest.fixture
def folders(tmp_path):
    """Two sequences; the predictions are perfect but for object 1 of the second, which is half right."""
    for name, predicted in (("a", TRUE), ("b", HALF)):
        write(tmp_path / "true" / name, TRUE)
        write(tmp_path / "pred" / name, predicted)
    return tmp_path


@pytest.mark.parametrize("jobs", [1, 2])
def test_means_are_over_objects(folders, jobs):
    report = evaluate(folders / "pred", folders / "true", jobs=jobs)
    assert report.sequences == ("a", "b")
    assert [(s.sequence, s.object_id, s.j.mean) for s in report.objects] == [
        ("a", 1, 1.0),
        ("a", 2, 1.0),
        ("b", 1, 0.5),
        ("b", 2, 1.0),
    ]
    assert report.summary()["J-Mean"] == pytest.approx(3.5 / 4)
    assert report.summary("b")["J-Mean"] == pytest.approx(0.75)


def test_processes_and_one_process_agree(folders):
    reports = [evaluate(folders / "pred", folders / "true", jobs=jobs) for jobs in (1, 3)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("layout", ["Annotations/480p", "Annotations", "Annotations/240p"])
def test_the_root_of_a_dataset_is_understood(folders, layout):
    root = folders / "root"
    (root / layout).parent.mkdir(parents=True)
    (folders / "true").rename(root / layout)
    assert evaluate(folders / "pred", root, jobs=1).sequences == ("a", "b")


def test_one_sequence_may_be_scored_alone(folders):
    for predictions in (folders / "pred" / "b", folders / "pred"):
        report = evaluate(predictions, folders / "true" / "b", jobs=1)
        assert report.sequences == ("b",)
        assert report.objects[0].j.mean == 0.5
    assert evaluate(folders / "pred", folders / "true", sequences=["b"], jobs=1).sequences == ("b",)


def test_the_first_and_the_last_prediction_may_be_absent(folders):
    for name in ("a", "b"):
        (folders / "pred" / name / "00000.png").unlink()
        (folders / "pred" / name / "00005.png").unlink()
    report = evaluate(folders / "pred", folders / "true", jobs=1)
    assert report.objects[0].frames == ("00001", "00002", "00003", "00004")
    with pytest.raises(EvaluationError, match="no prediction for frame 00000, 00005"):
        evaluate(folders / "pred", folders / "true", keep_ends=True, jobs=1)


def test_merged_objects_are_one(folders):
    swapped = [labels(o2=(2, 2 + t, 8, 8), o1=(12, 12, 8, 8)) for t in range(6)]
    write(folders / "swapped" / "a", swapped)
    assert evaluate(folders / "swapped", folders / "true" / "a", jobs=1).summary()["J-Mean"] == 0.0
    report = evaluate(folders / "swapped", folders / "true" / "a", merge_objects=True, jobs=1)
    assert [(s.object_id, s.j.mean) for s in report.objects] == [(1, 1.0)]


@pytest.mark.parametrize("foreground", [1, 255])
def test_a_truth_of_0_and_255_is_one_object(tmp_path, foreground):
    true = write(tmp_path / "true" / "swan", [(f == 1).astype(np.uint8) * 255 for f in TRUE], mode="L")
    predicted = write(
        tmp_path / "pred" / "swan", [(f == 1).astype(np.uint8) * foreground for f in TRUE], mode="L"
    )
    assert evaluate(predicted, true, jobs=1).summary()["J&F-Mean"] == 1.0


def test_void_counts_as_background_unless_ignored(tmp_path):
    true = [np.where(labels(o9=(2, 10, 8, 8)) == 9, 255, labels(o1=(2, 2, 8, 8))).astype(np.uint8)] * 4
    wide = [labels(o1=(2, 2, 8, 16))] * 4
    write(tmp_path / "true", true)
    write(tmp_path / "pred", wide)
    assert evaluate(tmp_path / "pred", tmp_path / "true", jobs=1).summary()["J-Mean"] == 0.5
    assert evaluate(tmp_path / "pred", tmp_path / "true", ignore_void=True, jobs=1).summary()["J-Mean"] == 1.0
    merged = evaluate(tmp_path / "pred", tmp_path / "true", merge_objects=True, ignore_void=True, jobs=1)
    assert merged.summary()["J-Mean"] == 1.0


def test_an_object_that_comes_later_scores_1_while_it_is_rightly_absent(tmp_path):
    true = [labels(o1=(2, 2, 8, 8))] * 3 + [labels(o1=(2, 2, 8, 8), o4=(12, 12, 6, 6))] * 3
    write(tmp_path / "true", true)
    write(tmp_path / "pred", [true[0]] * 6)
    one, four = evaluate(tmp_path / "pred", tmp_path / "true", jobs=1).objects
    assert one.j.mean == 1.0
    assert four.j_values == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA"])
def test_every_way_to_store_a_binary_mask_is_read(tmp_path, mode):
    masks = [(f == 1).astype(np.uint8) * 255 for f in TRUE]
    true, predicted = write(tmp_path / "true", masks, mode="L"), write(tmp_path / "pred", masks, mode=mode)
    assert evaluate(predicted, true, jobs=1).summary()["J&F-Mean"] == 1.0


class TestRefusals:
    """Every refusal is one line that names the file or folder."""

    def refused(self, *args, **options):
        with pytest.raises(EvaluationError) as caught:
            evaluate(*args, jobs=1, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_missing_folder(self, folders):
        assert "nowhere: no such folder" in self.refused(folders / "nowhere", folders / "true")

    def test_missing_sequences(self, folders):
        (folders / "pred" / "a").rename(folders / "elsewhere")
        message = self.refused(folders / "pred", folders / "true")
        assert "no predictions for a; --sequences scores the others" in message

    def test_missing_frames(self, folders):
        for t in (1, 3):
            (folders / "pred" / "b" / f"{t:05d}.png").unlink()
        assert "no prediction for frame 00001, 00003" in self.refused(folders / "pred", folders / "true")

    def test_another_size(self, folders):
        Image.new("L", (16, 12)).save(folders / "pred" / "a" / "00002.png")
        message = self.refused(folders / "pred", folders / "true")
        assert message.endswith("00002.png: expected 32x24 pixels as in the ground truth; got 16x12")

    def test_an_object_that_does_not_exist(self, folders):
        Image.fromarray(labels(o5=(0, 0, 4, 4))).save(folders / "pred" / "a" / "00002.png")
        assert "labels 5 are not in the ground truth, which has 1, 2" in self.refused(
            folders / "pred", folders / "true"
        )

    def test_masks_of_0_and_255_for_several_objects(self, folders):
        Image.fromarray((TRUE[2] > 0).astype(np.uint8) * 255).save(folders / "pred" / "a" / "00002.png")
        assert "--merge-objects" in self.refused(folders / "pred", folders / "true")

    def test_an_unknown_sequence(self, folders):
        assert "no ground truth for c; there is a, b" in self.refused(
            folders / "pred", folders / "true", sequences=["c"]
        )

    def test_a_folder_without_masks(self, folders):
        (folders / "empty").mkdir()
        assert "holds neither PNG masks" in self.refused(folders / "pred", folders / "empty")

    def test_a_truth_without_objects(self, folders):
        write(folders / "blank", [labels()] * 4)
        assert "no frame holds an object" in self.refused(folders / "pred" / "a", folders / "blank")

    def test_a_broken_file(self, folders):
        (folders / "pred" / "a" / "00002.png").write_bytes(b"not a picture")
        assert "00002.png cannot be read" in self.refused(folders / "pred", folders / "true")

    def test_a_colour_picture(self, folders):
        Image.new("RGB", SHAPE[::-1], (200, 0, 0)).save(folders / "pred" / "a" / "00002.png")
        assert "is a colour image" in self.refused(folders / "pred", folders / "true")

    def test_an_error_in_another_process_is_the_same(self, folders):
        (folders / "pred" / "a" / "00002.png").write_bytes(b"not a picture")
        with pytest.raises(EvaluationError, match="cannot be read"):
            evaluate(folders / "pred", folders / "true", jobs=2)


def test_a_contact_sheet_is_no_mask_and_an_ending_may_be_in_capitals(folders):
    for kind in ("pred", "true"):
        Image.new("RGB", (5, 5), (200, 0, 0)).save(folders / kind / "a" / "contact_sheet.png")
        (folders / kind / "b" / "00002.png").rename(folders / kind / "b" / "00002.PNG")
    assert evaluate(folders / "pred", folders / "true", jobs=1).summary()["J-Mean"] == pytest.approx(3.5 / 4)
