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


def test_several_threads_and_one_agree(folders):
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


def reasons(report):
    return {problem.sequence: problem.reason for problem in report.problems}


class TestBrokenSequences:
    """A sequence that cannot be scored is named with the reason, in one line; the means are over the others."""

    @pytest.fixture(params=[1, 2])
    def reason(self, folders, request):
        """Says why sequence b was not scored, having looked that a was, as if it had been alone."""

        def of(**options):
            report = evaluate(folders / "pred", folders / "true", jobs=request.param, **options)
            alone = evaluate(folders / "pred", folders / "true", jobs=1, sequences=["a"], **options)
            assert report.objects == alone.objects and report.summary() == alone.summary()
            assert list(report.to_dict()["problems"]) == ["b"]
            text = reasons(report)["b"]
            assert "\n" not in text
            return text

        return of

    def test_no_predictions(self, folders, reason):
        (folders / "pred" / "b").rename(folders / "elsewhere")
        assert reason() == f"{folders / 'pred' / 'b'}: no predictions"

    def test_missing_frames(self, folders, reason):
        for t in (1, 3):
            (folders / "pred" / "b" / f"{t:05d}.png").unlink()
        assert reason() == f"{folders / 'pred' / 'b'}: no prediction for frame 00001, 00003"

    def test_too_short(self, folders, reason):
        for t in range(2, 6):
            (folders / "true" / "b" / f"{t:05d}.png").unlink()
        assert "b: 2 frames leave none to score" in reason()

    def test_another_size(self, folders, reason):
        Image.new("L", (16, 12)).save(folders / "pred" / "b" / "00002.png")
        assert reason().endswith("00002.png: expected 32x24 pixels as in the ground truth; got 16x12")

    def test_an_object_that_does_not_exist(self, folders, reason):
        Image.fromarray(labels(o5=(0, 0, 4, 4))).save(folders / "pred" / "b" / "00002.png")
        assert "labels 5 are not in the ground truth, which has 1, 2" in reason()

    def test_masks_of_0_and_255_for_several_objects(self, folders, reason):
        Image.fromarray((TRUE[2] > 0).astype(np.uint8) * 255).save(folders / "pred" / "b" / "00002.png")
        assert "--merge-objects" in reason()

    @pytest.mark.parametrize("kind", ["pred", "true"])
    def test_a_broken_file(self, folders, reason, kind):
        for t in (2, 3):
            (folders / kind / "b" / f"{t:05d}.png").write_bytes(b"not a picture")
        assert "00002.png cannot be read" in reason(), "the first one"

    def test_a_colour_picture(self, folders, reason):
        Image.new("RGB", SHAPE[::-1], (200, 0, 0)).save(folders / "pred" / "b" / "00002.png")
        assert "00002.png is a colour image" in reason()

    @pytest.mark.parametrize("kind", ["pred", "true"])
    def test_a_link_to_nothing(self, folders, reason, kind):
        (folders / kind / "b" / "00002.png").unlink()
        (folders / kind / "b" / "00002.png").symlink_to("/nowhere.png")
        assert "00002.png is a link to /nowhere.png" in reason()

    def test_two_files_for_one_frame(self, folders, reason):
        Image.fromarray(TRUE[2]).save(folders / "pred" / "b" / "00002.PNG")
        assert "two pictures named 00002" in reason()

    def test_a_folder_that_is_a_link_to_nothing(self, folders, reason):
        (folders / "true" / "b").rename(folders / "elsewhere")
        (folders / "true" / "b").symlink_to("/nowhere")
        assert "b cannot be listed" in reason()

    def test_a_truth_without_objects(self, folders, reason):
        for t in range(6):
            Image.fromarray(labels()).save(folders / "true" / "b" / f"{t:05d}.png")
        assert reason() == f"{folders / 'true' / 'b'}: no frame holds an object"

    def test_names_with_other_digits(self, folders, reason):
        for t in range(6):
            (folders / "pred" / "b" / f"{t:05d}.png").rename(folders / "pred" / "b" / f"{t:07d}.png")
        assert reason().endswith(
            "no prediction for frame 00001, 00002, 00003, 00004; predictions are named like 0000000.png, the truth "
            "like 00001.png: rename them, only the number of digits differs"
        )

    def test_other_names(self, folders, reason):
        for t in range(6):
            (folders / "pred" / "b" / f"{t:05d}.png").rename(folders / "pred" / "b" / f"mask{t}.png")
        assert reason().endswith("; predictions are named like mask0.png, the truth like 00001.png")

    def test_frames_that_the_truth_does_not_have_do_not_matter(self, folders):
        before = evaluate(folders / "pred", folders / "true", jobs=1)
        Image.fromarray(TRUE[0]).save(folders / "pred" / "b" / "00006.png")
        (folders / "pred" / "c").mkdir()
        assert evaluate(folders / "pred", folders / "true", jobs=1) == before

    def test_where_none_can_be_scored_the_first_reason_is_the_error(self, folders):
        for name in "ab":
            (folders / "pred" / name / "00002.png").write_bytes(b"not a picture")
        with pytest.raises(EvaluationError, match=r"a/00002.png cannot be read.* \(and 1 more sequences\)"):
            evaluate(folders / "pred", folders / "true", jobs=2)


class TestMeaning:
    """What labels mean is decided over a sequence, not from its first frame."""

    def test_a_first_frame_of_void_alone_is_not_a_binary_truth(self, tmp_path):
        true = [np.where(TRUE[0] > 0, 255, 0).astype(np.uint8), *TRUE[1:]]
        swapped = [np.choose(f, [0, 2, 1]).astype(np.uint8) for f in TRUE]
        write(tmp_path / "true", true)
        write(tmp_path / "swapped", swapped)
        write(tmp_path / "right", TRUE)
        wrong = evaluate(tmp_path / "swapped", tmp_path / "true", jobs=1)
        assert [(s.object_id, s.j.mean) for s in wrong.objects] == [(1, 0.0), (2, 0.0)]
        right = evaluate(tmp_path / "right", tmp_path / "true", jobs=1)
        assert [(s.object_id, s.j.mean) for s in right.objects] == [(1, 1.0), (2, 1.0)]

    @pytest.mark.parametrize("empty", [labels(), labels(o255=(0, 0, 3, 3))])
    @pytest.mark.parametrize("keep_ends", [False, True])
    def test_scoring_starts_with_the_first_frame_that_shows_an_object(self, tmp_path, empty, keep_ends):
        write(tmp_path / "true", [empty, empty, *TRUE])
        write(tmp_path / "pred", [labels(o1=(0, 0, 9, 9))] * 2 + HALF)
        (score, _) = evaluate(tmp_path / "pred", tmp_path / "true", keep_ends=keep_ends, jobs=1).objects
        numbers = range(2, 8) if keep_ends else range(3, 7)
        assert score.frames == tuple(f"{t:05d}" for t in numbers)
        assert score.j.mean == 0.5

    def test_a_binary_truth_may_begin_empty(self, tmp_path):
        write(tmp_path / "true", [labels(), *[(f == 1).astype(np.uint8) * 255 for f in TRUE]])
        write(tmp_path / "pred", [labels(), *[(f == 1).astype(np.uint8) for f in TRUE]])
        (score,) = evaluate(tmp_path / "pred", tmp_path / "true", jobs=1).objects
        assert (score.object_id, score.j.mean, len(score.frames)) == (1, 1.0, 4)

    def test_an_object_on_the_last_frame_alone_is_an_object(self, tmp_path):
        true = [*TRUE[:5], labels(o1=(2, 7, 8, 8), o2=(12, 12, 8, 8), o7=(0, 20, 5, 5))]
        write(tmp_path / "true", true)
        write(tmp_path / "pred", [*TRUE[:4], np.where(true[5] == 7, 7, TRUE[4]), TRUE[5]])
        scores = evaluate(tmp_path / "pred", tmp_path / "true", jobs=1).objects
        assert [s.object_id for s in scores] == [1, 2, 7]
        assert scores[2].j_values == (1.0, 1.0, 1.0, 0.0)

    def test_sequences_are_decided_one_by_one(self, tmp_path):
        write(tmp_path / "true" / "binary", [(f == 1).astype(np.uint8) * 255 for f in TRUE])
        write(tmp_path / "true" / "objects", TRUE)
        write(tmp_path / "pred" / "binary", TRUE)
        write(tmp_path / "pred" / "objects", TRUE)
        scores = evaluate(tmp_path / "pred", tmp_path / "true", jobs=1).objects
        assert [(s.sequence, s.object_id) for s in scores] == [("binary", 1), ("objects", 1), ("objects", 2)]
        assert [round(s.j.mean, 2) for s in scores] == [0.5, 1.0, 1.0]


class TestRefusals:
    """Every refusal is one line that names the file or folder."""

    def refused(self, *args, **options):
        with pytest.raises(EvaluationError) as caught:
            evaluate(*args, jobs=1, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_missing_folder(self, folders):
        assert "nowhere: no such folder" in self.refused(folders / "nowhere", folders / "true")

    def test_a_file(self, folders):
        file = folders / "pred" / "a" / "00000.png"
        assert "00000.png: is a file; give a folder" in self.refused(folders / "pred", file)

    def test_no_predictions_at_all(self, folders):
        (folders / "empty").mkdir()
        assert self.refused(folders / "empty", folders / "true").endswith("empty: no predictions for a, b")

    def test_masks_of_which_nobody_knows_the_sequence(self, folders):
        message = self.refused(folders / "pred" / "a", folders / "true")
        assert "it holds masks itself, but the truth has 2 sequences: --sequences says which" in message
        assert evaluate(folders / "pred" / "a", folders / "true", sequences=["a"], jobs=1).sequences == ("a",)

    def test_swapped_arguments(self, folders):
        (folders / "davis" / "Annotations").mkdir(parents=True)
        (folders / "true").rename(folders / "davis" / "Annotations" / "480p")
        message = self.refused(folders / "davis", folders / "pred")
        assert message.endswith("it is the root of a data set: predictions come first, the truth second")

    def test_several_resolutions(self, folders):
        for name in ("240p", "1080p"):
            write(folders / "davis" / "Annotations" / name / "a", TRUE)
        message = self.refused(folders / "pred", folders / "davis")
        assert message.endswith(f"; give one of the folders in {folders / 'davis/Annotations'}: 240p, 1080p")

    def test_an_unknown_sequence(self, folders):
        assert "no ground truth for c; there is a, b" in self.refused(
            folders / "pred", folders / "true", sequences=["c"]
        )
        assert "no ground truth for c; there is a" in self.refused(
            folders / "pred" / "a", folders / "true" / "a", sequences=["c"]
        )

    def test_a_folder_for_a_list(self, folders):
        assert "pred is not a file: give a text file" in self.refused(
            folders / "pred", folders / "true", sequences=[str(folders / "pred")]
        )

    def test_a_folder_without_masks(self, folders):
        (folders / "empty").mkdir()
        assert "holds neither PNG masks" in self.refused(folders / "pred", folders / "empty")

    def test_a_truth_without_objects(self, folders):
        write(folders / "blank", [labels()] * 4)
        assert "no frame holds an object" in self.refused(folders / "pred" / "a", folders / "blank")


@pytest.mark.parametrize("name", ["._00003.png", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/00003.png"])
def test_files_that_are_no_masks_do_not_matter(folders, name):
    before = evaluate(folders / "pred", folders / "true", jobs=1)
    for folder in (folders / "true", folders / "true" / "b", folders / "pred", folders / "pred" / "b"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert evaluate(folders / "pred", folders / "true", jobs=1) == before


def test_a_contact_sheet_is_no_mask_and_an_ending_may_be_in_capitals(folders):
    for kind in ("pred", "true"):
        Image.new("RGB", (5, 5), (200, 0, 0)).save(folders / kind / "a" / "contact_sheet.png")
        (folders / kind / "b" / "00002.png").rename(folders / kind / "b" / "00002.PNG")
    assert evaluate(folders / "pred", folders / "true", jobs=1).summary()["J-Mean"] == pytest.approx(3.5 / 4)
