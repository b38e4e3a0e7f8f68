"""IoU of classes and consistency over time: the definitions, which files are compared, and what is refused."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from vosops.io.cityscapes import CITYSCAPES
from vosops.metrics import (
    Consistency,
    EvaluationError,
    class_iou,
    confusion_matrix,
    evaluate_semantic,
)

SHAPE = (12, 17)
CLASSES = 5


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def write(folder, frames, ending=""):
    """Writes label maps as 00000.png, 00001.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(frames):
        Image.fromarray(np.asarray(frame, np.uint8)).save(folder / f"{t:05d}{ending}.png")
    return folder


def slow_iou(predictions, truths, label):
    """The definition, by sets of pixels."""
    kept = [t != 255 for t in truths]
    both = sum(((p == label) & (t == label)).sum() for p, t in zip(predictions, truths, strict=True))
    either = sum(
        (((p == label) | (t == label)) & k).sum() for p, t, k in zip(predictions, truths, kept, strict=True)
    )
    return both / either if either else math.nan


class TestConfusion:
    def test_every_pair_is_counted(self, rng):
        predicted, true = rng.integers(0, CLASSES, (2, *SHAPE))
        matrix = confusion_matrix(predicted, true, CLASSES)
        for i in range(CLASSES):
            for j in range(CLASSES):
                assert matrix[i, j] == ((true == i) & (predicted == j)).sum()
        assert matrix.sum() == predicted.size

    def test_ignored_pixels_count_nowhere_and_no_class_is_always_wrong(self):
        true = np.array([[0, 0, 255, 255, 1, 1]], np.uint8)
        predicted = np.array([[0, 255, 1, 255, 1, 0]], np.uint8)
        matrix = confusion_matrix(predicted, true, 2)
        assert matrix.tolist() == [[1, 0, 1], [1, 1, 0]]
        assert class_iou(matrix).tolist() == [1 / 3, 1 / 2]

    def test_an_absent_class_has_no_value_and_one_that_is_only_predicted_has_0(self):
        iou = class_iou(confusion_matrix(np.array([[0, 2]]), np.array([[0, 0]]), 3))
        assert iou[0] == 0.5 and math.isnan(iou[1]) and iou[2] == 0

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
    def test_an_empty_map_and_any_integers(self, dtype):
        empty = np.zeros((0, 4), dtype)
        assert confusion_matrix(empty, empty, 2).tolist() == [[0, 0, 0], [0, 0, 0]]
        assert np.isnan(class_iou(confusion_matrix(empty, empty, 2))).all()

    @pytest.mark.parametrize(
        "predicted, true, classes, message",
        [
            ([[0]], [[0]], 1, "num_classes: expected 2 to 255; got 1"),
            ([[0]], [[0]], 256, "num_classes: expected 2 to 255; got 256"),
            ([[0, 0]], [[0]], 2, r"prediction: expected shape \(1, 1\) as ground_truth; got \(1, 2\)"),
            ([0], [0], 2, r"ground_truth: expected a label map \(H, W\); got shape \(1,\)"),
            ([[0.0]], [[0]], 2, "prediction: expected integers; got float64"),
            ([[2]], [[0]], 2, "prediction: expected labels from 0 to 1 or 255; got 2"),
            ([[0]], [[7]], 2, "ground_truth: expected labels from 0 to 1 or 255; got 7"),
            ([[0]], [[-1]], 2, "ground_truth: expected labels from 0 to 1 or 255; got -1 to -1"),
            ([[300]], [[0]], 2, "prediction: expected labels from 0 to 1 or 255; got 300 to 300"),
        ],
    )
    def test_refusals(self, predicted, true, classes, message):
        with pytest.raises(ValueError, match=message):
            confusion_matrix(np.array(predicted), np.array(true), classes)


class TestConsistency:
    @pytest.mark.parametrize("window", [2, 3, 5])
    def test_it_is_the_definition(self, rng, window):
        truths, predictions = rng.integers(0, 2, (2, 9, *SHAPE))
        truths[rng.random(truths.shape) < 0.1] = 255
        truths[:, :6], predictions[:, :9] = 1, 0  # or nothing would stay for long
        consistency = Consistency(window)
        got = [consistency.add(p, t) for p, t in zip(predictions, truths, strict=True)]
        assert got[: window - 1] == [None] * (window - 1)
        for end in range(window, len(truths) + 1):
            t, p = truths[end - window : end], predictions[end - window : end]
            same = (t == t[0]).all(0) & (t[0] != 255)
            assert got[end - 1] == pytest.approx((same & (p == p[0]).all(0)).sum() / same.sum())

    def test_without_a_steady_pixel_there_is_no_value(self):
        consistency = Consistency(2)
        consistency.add(np.zeros(SHAPE), np.zeros(SHAPE))
        assert consistency.add(np.zeros(SHAPE), np.ones(SHAPE)) is None

    def test_another_size_begins_anew(self):
        consistency = Consistency(2)
        for side in (3, 4):
            assert consistency.add(np.zeros((side, side)), np.zeros((side, side))) is None
        assert consistency.add(np.zeros((4, 4)), np.zeros((4, 4))) == 1

    def test_one_frame_is_no_window(self):
        with pytest.raises(ValueError, match="window: expected 2 frames or more; got 1"):
            Consistency(1)


class TestFolders:
    @pytest.mark.parametrize("jobs", [1, 3])
    def test_one_matrix_over_all_frames_of_all_sequences(self, rng, tmp_path, jobs):
        truths, predictions = rng.integers(0, CLASSES, (2, 2, 11, *SHAPE))
        truths[rng.random(truths.shape) < 0.2] = 255
        truths[truths == 3], predictions[predictions == 3] = 0, 1  # class 3 occurs nowhere
        for i, name in enumerate("ab"):
            write(tmp_path / "true" / name, truths[i])
            write(tmp_path / "pred" / name, predictions[i])
        report = evaluate_semantic(tmp_path / "pred", tmp_path / "true", num_classes=CLASSES, jobs=jobs)
        flat = (predictions.reshape(-1, *SHAPE), truths.reshape(-1, *SHAPE))
        expected = {str(i): slow_iou(*flat, i) for i in (0, 1, 2, 4)}
        assert report.iou() == pytest.approx(expected)
        summary = report.summary()
        assert summary["mIoU"] == pytest.approx(sum(expected.values()) / 4)
        kept = truths != 255
        assert summary["Pixel-Accuracy"] == pytest.approx((truths == predictions)[kept].mean())
        one = {i: slow_iou(predictions[1], truths[1], i) for i in (0, 1, 2, 4)}
        assert report.summary("b")["mIoU"] == pytest.approx(sum(one.values()) / 4)
        assert [row["pixels"] for row in report.table()] == [(truths == i).sum() for i in (0, 1, 2, 4)]

    def test_a_truth_for_some_frames_says_which_count(self, tmp_path):
        write(tmp_path / "pred", [np.full(SHAPE, t % 2) for t in range(30)])
        (tmp_path / "true").mkdir()
        Image.fromarray(np.zeros(SHAPE, np.uint8)).save(tmp_path / "true" / "00019.png")
        report = evaluate_semantic(tmp_path / "pred", tmp_path / "true", num_classes=2, jobs=1)
        assert report.sequences[0].frames == 1
        assert report.summary() == {"mIoU": 0, "Pixel-Accuracy": 0}

    @pytest.mark.parametrize("with_train_ids", [False, True])
    def test_a_split_of_cityscapes(self, tmp_path, rng, with_train_ids):
        """Label ids are read by their name, other kinds of files and of numbers do not get in the way."""
        classes = rng.integers(0, 19, SHAPE)
        labels = np.array([kind.label_id for kind in CITYSCAPES.values()])[classes]
        labels[0], labels[1] = 6, 255  # ground and license plate, which are not scored
        name = "ulm_000000_000019"
        write(tmp_path / "pred" / "ulm", [])
        Image.fromarray(classes.astype(np.uint8)).save(tmp_path / "pred" / "ulm" / f"{name}_leftImg8bit.png")
        Image.new("RGB", (5, 5)).save(tmp_path / "pred" / "ulm" / "contact_sheet.png")
        city = write(tmp_path / "gtFine" / "val" / "ulm", [])
        Image.fromarray(labels.astype(np.uint8)).save(city / f"{name}_gtFine_labelIds.png")
        Image.new("RGBA", SHAPE[::-1], (9, 8, 7, 255)).save(city / f"{name}_gtFine_color.png")
        Image.fromarray(np.full(SHAPE, 26001, np.uint16)).save(city / f"{name}_gtFine_instanceIds.png")
        if with_train_ids:
            train = np.where(np.arange(SHAPE[0])[:, None] < 3, 255, classes)
            Image.fromarray(train.astype(np.uint8)).save(city / f"{name}_gtFine_labelTrainIds.png")
        report = evaluate_semantic(tmp_path / "pred", tmp_path / "gtFine" / "val", jobs=1)
        assert report.protocol["ids"] == ["train" if with_train_ids else "label"]
        assert set(report.iou().values()) == {1.0}
        ignored_rows = 3 if with_train_ids else 2
        assert report.matrix.sum() == (SHAPE[0] - ignored_rows) * SHAPE[1]
        assert set(report.iou()) <= set(CITYSCAPES)
        forced = evaluate_semantic(tmp_path / "pred", tmp_path / "gtFine" / "val", ids="label", jobs=1)
        assert forced.matrix.sum() == (SHAPE[0] - 2) * SHAPE[1]

    def test_consistency_is_of_frames_that_follow_each_other(self, tmp_path):
        """Frames 0, 1, 2 and 4, 5 have a truth: three windows of two, one of them half steady."""
        predictions = [np.zeros(SHAPE) for _ in range(6)]
        predictions[2][: SHAPE[0] // 2] = 1
        write(tmp_path / "pred", predictions)
        write(tmp_path / "true", [np.zeros(SHAPE)] * 6)
        (tmp_path / "true" / "00003.png").unlink()
        report = evaluate_semantic(tmp_path / "pred", tmp_path / "true", num_classes=2, consistency=2, jobs=1)
        assert report.sequences[0].consistency == (1.0, 0.5, 1.0)
        assert report.summary()["VC2"] == pytest.approx(2.5 / 3)
        assert report.sequences[0].frames == 5

    def test_the_report_is_plain_json_even_where_nothing_counts(self, tmp_path):
        write(tmp_path / "pred", [np.zeros(SHAPE)])
        write(tmp_path / "true", [np.full(SHAPE, 255)])
        report = evaluate_semantic(tmp_path / "pred", tmp_path / "true", jobs=1)
        plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert plain["global"] == {"mIoU": None, "Pixel-Accuracy": None}
        assert plain["classes"] == {}


def test_a_broken_sequence_is_named_and_counts_for_nothing(tmp_path):
    for name in "abcde":
        write(tmp_path / "true" / name, [np.zeros(SHAPE)] * 9)
        write(tmp_path / "pred" / name, [np.zeros(SHAPE)] * 9)
    write(tmp_path / "pred" / "a", [np.ones(SHAPE)])  # one frame of nine is wrong
    (tmp_path / "pred" / "b" / "00008.png").write_bytes(b"broken")
    write(tmp_path / "pred" / "c", [np.full(SHAPE, 9)])
    (tmp_path / "pred" / "d" / "00004.png").unlink()
    (tmp_path / "pred" / "e").rename(tmp_path / "pred" / "f")
    for jobs, consistency in ((1, None), (3, 2)):
        report = evaluate_semantic(
            tmp_path / "pred", tmp_path / "true", num_classes=2, jobs=jobs, consistency=consistency
        )
        assert [counts.name for counts in report.sequences] == ["a"]
        assert report.summary()["Pixel-Accuracy"] == pytest.approx(8 / 9)
        reasons = report.to_dict()["problems"]
        assert list(reasons) == ["b", "c", "d", "e"]
        assert "00008.png cannot be read" in reasons["b"]
        assert "00000.png: expected labels from 0 to 1 or 255; got 9" in reasons["c"]
        assert reasons["d"].endswith("no prediction for frame 00004")
        assert reasons["e"].endswith("e: no predictions")


class TestRefusals:
    """Every refusal is one line that names the file or folder."""

    @pytest.fixture
    def folders(self, tmp_path):
        write(tmp_path / "pred" / "a", [np.zeros(SHAPE)] * 3)
        write(tmp_path / "true" / "a", [np.zeros(SHAPE)] * 3)
        return tmp_path

    def refused(self, folders, **options):
        with pytest.raises(EvaluationError) as caught:
            evaluate_semantic(folders / "pred", folders / "true", jobs=1, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_missing_frames(self, folders):
        (folders / "pred" / "a" / "00001.png").unlink()
        assert "no prediction for frame 00001" in self.refused(folders)

    def test_another_size(self, folders):
        Image.new("L", (16, 9)).save(folders / "pred" / "a" / "00002.png")
        message = self.refused(folders)
        assert message.endswith("00002.png: expected 17x12 pixels as in the ground truth; got 16x9")

    def test_a_predicted_class_that_does_not_exist(self, folders):
        write(folders / "pred" / "a", [np.full(SHAPE, 19)])
        message = self.refused(folders)
        assert "00000.png: expected labels from 0 to 18 or 255; got 19; --classes says how many" in message
        assert "pred" in message

    def test_label_ids_read_as_classes(self, folders):
        write(folders / "true" / "a", [np.full(SHAPE, 26)])
        message = self.refused(folders)
        assert "got 26; --ids label reads Cityscapes' label ids" in message and "true" in message

    def test_a_label_id_that_does_not_exist(self, folders):
        write(folders / "true" / "a", [np.full(SHAPE, 34)])
        message = self.refused(folders, ids="label")
        assert "00000.png: expected label ids from 0 to 33 or 255; got 34" in message

    def test_no_consecutive_frames(self, folders):
        (folders / "true" / "a" / "00001.png").unlink()
        assert "no 2 consecutive frames have a ground truth" in self.refused(folders, consistency=2)

    def test_a_missing_folder(self, folders):
        (folders / "true").rename(folders / "elsewhere")
        assert "true: no such folder" in self.refused(folders)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"num_classes": 1}, "num_classes: expected 2 to 255; got 1"),
            ({"ids": "panoptic"}, "ids: expected train or label; got 'panoptic'"),
            ({"ids": "label", "num_classes": 7}, "of 19 classes; got 7"),
            ({"consistency": 1}, "consistency: expected 2 frames or more; got 1"),
        ],
    )
    def test_options(self, folders, options, message):
        with pytest.raises(ValueError, match=message):
            evaluate_semantic(folders / "pred", folders / "true", jobs=1, **options)
