"""Runs that are killed, and disks that are full, lose nothing: no broken file, and resuming gives the same."""

import io
import os
import re
import resource
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.cli.test_eval import write as write_pair
from tests.clips import ColourTracker, moving, truth, write_mask
from tests.runs.faults import mounted, nearly_full, run_and_die, sample
from tests.runs.outputs import ALL, SETTINGS, contents, parts
from vosops.data.demo_clip import DemoClip, write_clip
from vosops.io.errors import InputError, VosopsError
from vosops.io.outputs import OwnedFolder, complete_or_absent, replace_result
from vosops.io.video_writer import VideoWriter
from vosops.runs.checkpoint import RunState
from vosops.runs.job import Job, Settings

COUNT = 5
BOXES = moving(COUNT, ids=(1, 2))


@pytest.fixture
def masks(tmp_path):
    """On the third frame and on the last but one, so that the run goes backward too."""
    first = write_mask(tmp_path / "m2.png", truth({1: BOXES[2][1]}))
    second = write_mask(tmp_path / "m3.png", truth({2: BOXES[3][2]}))
    return [f"2={first}", f"3={second}"]


@pytest.fixture
def whole(clip, masks, tmp_path):
    """What an undisturbed run gives."""
    Job(tmp_path / "whole", settings=SETTINGS, outputs=ALL).video(clip, masks)
    return contents(tmp_path / "whole")


def is_whole_so_far(out, whole):
    """Nothing in the output is broken: each file is there as in the undisturbed run, or not at all."""
    return contents(out).items() <= whole.items() if out.exists() else True


class TestKilled:
    def test_at_any_operation_a_run_resumes_to_the_bit(self, clip, masks, whole, tmp_path):
        def resume(out):
            return lambda: Job(out, "resume", SETTINGS, ALL).video(clip, masks)

        killed, count = run_and_die(resume(tmp_path / "counted"), tmp_path / "counted")
        assert not killed and count > 100
        assert contents(tmp_path / "counted") == whole
        for n in sample(count, 12):
            out = tmp_path / f"out{n}"
            assert run_and_die(resume(out), out, n)[0]
            assert is_whole_so_far(out, whole), f"a broken file after the death at operation {n}"
            run_and_die(resume(out), out, 1 + n * 7 % 40)  # and again
            assert is_whole_so_far(out, whole)
            resume(out)()
            assert contents(out) == whole, f"another result after the death at operation {n}"
            assert not parts(out)

    def test_what_a_checkpoint_holds_is_not_made_again(self, clip, masks, whole, tmp_path):
        out = tmp_path / "out"
        made = []

        class Counting(ColourTracker):
            def step(self, *arguments, **options):
                made.append(0)
                return super().step(*arguments, **options)

        _, count = run_and_die(
            lambda: Job(tmp_path / "c", settings=SETTINGS).video(clip, masks), tmp_path / "c"
        )
        run_and_die(lambda: Job(out, settings=SETTINGS).video(clip, masks), out, count - 15)
        assert len(list(out.glob("0*.png"))) == COUNT
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vosops.runs.job.make_tracker", lambda *a, **o: Counting())
            Job(out, "resume", SETTINGS, ALL).video(clip, masks)
        assert len(made) <= 2 and contents(out) == whole

    def test_while_replacing_a_run(self, clip, masks, whole, tmp_path):
        """--overwrite again, or --resume, gives what an undisturbed run gives."""
        short = Settings(device="cpu", size=32, start=2)

        def earlier(out):
            Job(out, settings=short, outputs=ALL).video(clip, masks[:1])
            (out / "letter.txt").write_text("dear")

        def replace(out):
            return lambda: Job(out, "overwrite", SETTINGS, ALL).video(clip, masks)

        earlier(tmp_path / "counted")
        _, count = run_and_die(replace(tmp_path / "counted"), tmp_path / "counted")
        letter = {"letter.txt": b"dear"}
        assert contents(tmp_path / "counted") == whole | letter
        for n in sample(count, 6):
            out = tmp_path / f"out{n}"
            earlier(out)
            assert run_and_die(replace(out), out, n)[0]
            replace(out)()
            assert contents(out) == whole | letter and not parts(out)


def one_line(error, text="the disk is full"):
    assert text in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == (2 if isinstance(error.value, InputError) else 1)


class TestFullDisk:
    @pytest.fixture
    def disk(self, tmp_path):
        with mounted(tmp_path / "disk", "size=1M") as disk:
            yield disk

    def test_a_run_ends_in_one_line_and_resumes(self, clip, masks, whole, disk):
        failed = set()
        levels = range(0, 192, 4)
        for level in [levels[n - 1] for n in sample(len(levels), 12)]:
            out = disk / "out"
            with nearly_full(disk, level):
                try:
                    Job(out, "resume", SETTINGS, ALL).video(clip, masks)
                except VosopsError as error:
                    assert re.search(
                        "^cannot write .*: the disk is full; free some space and .*--resume$", str(error)
                    )
                    failed.add(str(error).split(":")[0].rsplit("/", 1)[-1])
                assert not parts(disk) and is_whole_so_far(out, whole)
            assert Job(out, "resume", SETTINGS, ALL).video(clip, masks).frames == COUNT
            assert contents(out) == whole
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
        assert len(failed) > 3, failed

    def test_each_writer(self, disk, tmp_path):
        noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
        folder = OwnedFolder(disk / "out")
        state = RunState(folder)
        state.start({})

        def checkpoint():
            state.save({"a": torch.rand(300, 300), "b": torch.rand(300, 300)}, 1, 1.0, [])

        def video():
            with VideoWriter(folder.file("v.mp4"), (400, 400), Fraction(10), Fraction(1, 1000)) as writer:
                for i in range(12):
                    writer.write(np.roll(noise, 7 * i, 1) ^ np.uint8(i), Fraction(i, 10))

        def clip():
            write_clip(DemoClip(3, (96, 160)), disk / "clip")

        def result():
            replace_result(disk / "r.json", b"x" * 300_000, lambda content: True)

        for write in (checkpoint, video, clip, result):
            for level in (0, 8, 100):
                with nearly_full(disk, level):
                    if write is clip and level == 100:
                        continue
                    with pytest.raises(VosopsError) as error:
                        write()
                    one_line(error)
                    assert not parts(disk)
                assert not (disk / "out" / "v.mp4").exists() and not (disk / "r.json").exists()
                assert not state._checkpoint.exists()

    def test_what_was_there_stays(self, disk):
        def write(content):
            replace_result(disk / "r.json", content, lambda found: True)

        write(b"before")
        with nearly_full(disk, 0), pytest.raises(VosopsError) as error:
            write(b"x" * 300_000)
        one_line(error)
        assert (disk / "r.json").read_bytes() == b"before"

    def test_commands(self, disk, tmp_path, monkeypatch, capsys):
        from tests.cli.commands import run_command

        labels = np.zeros((20, 30), np.uint8)
        labels[2:10, 2:10] = 1
        pair = write_pair(tmp_path / "pair", labels, labels, 4)
        evaluate = ("eval", pair / "pred", pair / "true", "--json", disk / "r.json")
        demo = ("demo", "--out", disk / "demo", "--frames", 3, "--size", 64, "--no-naive", "--device", "cpu")
        with nearly_full(disk, 0):
            for arguments in (evaluate, demo):
                code, printed = run_command(monkeypatch, capsys, *arguments)
                lines = [line for line in printed.splitlines() if line.startswith("vosops")]
                assert code == 1 and len(lines) == 1 and "the disk is full" in lines[0]
                assert "Traceback" not in printed and "--resume" not in printed
                assert not (disk / "r.json").exists() and not parts(disk)


class TestOtherTrouble:
    def test_files_may_not_grow(self, clip, masks, tmp_path):
        """RLIMIT_FSIZE, as clusters set it."""

        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            with pytest.raises(VosopsError) as error:
                Job(tmp_path / "out", settings=SETTINGS, outputs=ALL).video(clip, masks)
            one_line(error, "larger than a file may be")
            assert not parts(tmp_path / "out")

        run_and_die(work, tmp_path / "nowhere")

    def test_a_read_only_file_system(self, clip, masks, tmp_path):
        with mounted(tmp_path / "disk", "size=1M,ro") as disk:
            for out in (disk, disk / "a" / "b"):
                with pytest.raises(VosopsError) as error:
                    Job(out, settings=SETTINGS).video(clip, masks)
                one_line(error, "read-only")

    def test_places_that_cannot_be_folders(self, clip, masks, tmp_path):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for name in ("file", "file/below", "file/far/below", "dangling", "dangling/below", "loop"):
            for mode in ("new", "resume", "overwrite"):
                with pytest.raises(InputError) as error:
                    Job(tmp_path / name, mode, SETTINGS).video(clip, masks)
                one_line(error, "give a folder")
        assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nothing").exists()

    def test_a_name_in_use_by_a_folder(self, clip, masks, tmp_path):
        (tmp_path / "out" / "00003.png").mkdir(parents=True)
        with pytest.raises(InputError, match="00003.png was not written by a run"):
            Job(tmp_path / "out", "overwrite", SETTINGS).video(clip, masks)


class TestFilesThatAreCompleteOrAbsent:
    def test_long_names(self, tmp_path):
        path = tmp_path / ("x" * 251 + ".png")
        with complete_or_absent(path) as file:
            file.write(b"whole")
        assert path.read_bytes() == b"whole" and len(os.listdir(tmp_path)) == 1

    def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(self, tmp_path):
        (tmp_path / "mine").write_text("mine")
        with complete_or_absent(tmp_path / "a"):
            temporary = parts(tmp_path)[0]
        (tmp_path / "a").unlink()
        temporary.symlink_to(tmp_path / "mine")
        with complete_or_absent(tmp_path / "a") as file:
            file.write(b"whole")
        assert (tmp_path / "mine").read_text() == "mine"
        assert (tmp_path / "a").read_bytes() == b"whole" and not (tmp_path / "a").is_symlink()

    def test_permissions_follow_the_umask(self, tmp_path):
        before = os.umask(0o027)
        try:
            with complete_or_absent(tmp_path / "a") as file:
                file.write(io.BytesIO(b"x").getvalue())
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
