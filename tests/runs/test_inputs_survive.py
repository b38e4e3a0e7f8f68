"""No command destroys what it was given, nor what no run of ours wrote."""

import hashlib
import json
import os
import subprocess

import pytest
import torch

from tests.clips import ColourTracker, moving, picture, truth, write_folder, write_mask, write_video
from tests.runs.outputs import ALL, SETTINGS
from vosops.io.errors import InputError, InterruptedRunError, ResumeError
from vosops.runs.job import Job, Settings

COUNT = 6
BOXES = moving(COUNT, ids=(1, 2))


@pytest.fixture
def mask(tmp_path):
    return write_mask(tmp_path / "given" / "mask.png", truth(BOXES[0]))


@pytest.fixture
def out(clip, mask, tmp_path):
    """The folder of an earlier run."""
    Job(tmp_path / "out", settings=SETTINGS, outputs=ALL).video(clip, [str(mask)])
    return tmp_path / "out"


def everything(folder):
    """{path: content} of all files and folders below, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[path] = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
    return found


def refuse(tmp_path, match, job):
    """The job refuses in one line, with exit code 2, and has touched nothing."""
    before = everything(tmp_path)
    with pytest.raises(InputError, match=match) as error:
        job()
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    assert everything(tmp_path) == before


MODES = pytest.mark.parametrize("mode", ["overwrite", "resume"])


@MODES
class TestInputsInTheOutput:
    def test_masks_corrected_in_place(self, clip, out, tmp_path, mode):
        write_mask(out / "00003.png", truth(BOXES[4]))
        specs = [f"0={out}/00000.png", f"3={out}/00003.png"]
        refuse(tmp_path, "00000.png is an input", lambda: Job(out, mode, SETTINGS).video(clip, specs))

    def test_the_folder_of_the_masks(self, clip, out, tmp_path, mode):
        refuse(tmp_path, "is an input", lambda: Job(out, mode, SETTINGS).video(clip, [str(out)]))

    @pytest.mark.parametrize("spelling", ["same", "dots", "relative", "link", "parent", "linked parent"])
    def test_frames(self, clip, mask, tmp_path, monkeypatch, mode, spelling):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to(clip)
        (tmp_path / "up").symlink_to(tmp_path)
        out = {
            "same": clip,
            "dots": clip / ".." / "given" / ".." / "frames",
            "relative": type(clip)("frames"),
            "link": tmp_path / "link",
            "parent": tmp_path,
            "linked parent": tmp_path / "up",
        }[spelling]
        refuse(tmp_path, "is an input", lambda: Job(out, mode, SETTINGS).video(clip, [str(mask)]))

    def test_frames_that_are_links(self, clip, mask, out, tmp_path, mode):
        frames = tmp_path / "linked"
        frames.mkdir()
        (out / "raw").mkdir()
        for path in clip.iterdir():
            path.rename(out / "raw" / path.name)
            (frames / path.name).symlink_to(out / "raw" / path.name)
        refuse(tmp_path, "is an input", lambda: Job(out, mode, SETTINGS).video(frames, [str(mask)]))

    def test_the_output_has_links_to_the_inputs(self, clip, mask, out, tmp_path, mode):
        for name in os.listdir(out / "cutout"):
            (out / "cutout" / name).unlink()
        (out / "cutout").rmdir()
        (out / "cutout").symlink_to(clip)
        refuse(tmp_path, "is an input", lambda: Job(out, mode, SETTINGS, ALL).video(clip, [str(mask)]))

    def test_hard_links(self, clip, out, tmp_path, mode):
        os.link(out / "00003.png", tmp_path / "mine.png")
        specs = [f"3={tmp_path}/mine.png"]
        refuse(tmp_path, "hard link", lambda: Job(out, mode, SETTINGS).video(clip, specs))

    def test_a_bind_mount(self, clip, mask, tmp_path, mode):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        if subprocess.run(["mount", "--bind", clip, elsewhere], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            refuse(tmp_path, "is an input", lambda: Job(elsewhere, mode, SETTINGS).video(clip, [str(mask)]))
        finally:
            subprocess.run(["umount", elsewhere], check=True)

    def test_the_video(self, mask, out, tmp_path, mode):
        video = write_video(out / "v.mp4", [picture(b) for b in BOXES])
        refuse(tmp_path, "v.mp4 is an input", lambda: Job(out, mode, SETTINGS).video(video, [str(mask)]))

    def test_weights_and_checkout(self, clip, mask, out, tmp_path, mode):
        (out / "w.pth").write_bytes(b"weights")
        (out / "checkout").mkdir()
        for more in ({"weights": out / "w.pth"}, {"options": {"checkout": out / "checkout"}}):
            settings = Settings(device="cpu", size=32, **more)
            refuse(tmp_path, "is an input", lambda s=settings: Job(out, mode, s).video(clip, [str(mask)]))


class TestDatasets:
    def davis(self, root):
        for name in ("bear", "cow"):
            write_folder(root / "JPEGImages" / "480p" / name, [picture(b) for b in BOXES])
            for index, b in enumerate(BOXES):
                write_mask(root / "Annotations" / "480p" / name / f"{index:05d}.png", truth(b))
        return root

    @pytest.mark.parametrize("mode", ["new", "overwrite", "resume"])
    @pytest.mark.parametrize(
        "inside", ["", "JPEGImages", "JPEGImages/480p", "Annotations", "Annotations/480p"]
    )
    def test_the_output_coincides(self, tmp_path, mode, inside):
        root = self.davis(tmp_path / "d")
        refuse(tmp_path, "is an input", lambda: Job(root / inside, mode, SETTINGS).dataset(root))

    def test_a_sequence_of_the_output_is_a_link(self, tmp_path):
        root = self.davis(tmp_path / "d")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "cow").symlink_to(root / "Annotations" / "480p" / "cow")
        refuse(tmp_path, "is an input", lambda: Job(tmp_path / "out", "overwrite", SETTINGS).dataset(root))

    def test_a_list_in_the_output(self, tmp_path):
        root = self.davis(tmp_path / "d")
        out = tmp_path / "out"
        out.mkdir()
        (out / "list.txt").write_text("cow\n")
        job = Job(out, "overwrite", SETTINGS)
        refuse(tmp_path, "list.txt is an input", lambda: job.dataset(root, [str(out / "list.txt")]))

    def test_results_beside_the_data_are_fine(self, tmp_path):
        root = self.davis(tmp_path / "d")
        before = everything(root)
        out = root / "results"
        for mode in ("new", "resume", "overwrite"):
            assert len(Job(out, mode, SETTINGS).dataset(root)) == 2
        assert {path: x for path, x in everything(root).items() if out not in (path, *path.parents)} == before

    def test_a_report_of_somebody_else(self, tmp_path):
        root = self.davis(tmp_path / "d")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "report.json").write_text('{"mine": 1}')
        for mode in ("overwrite", "resume"):
            match = "report.json already exists"
            refuse(tmp_path, match, lambda m=mode: Job(tmp_path / "out", m, SETTINGS).dataset(root))


class TestDamagedState:
    """What --resume finds may be damaged, or come from somebody else."""

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            *(
                (name, c)
                for name in ("arguments.json", "complete.json")
                for c in (b"", b"{", b"[]", b"\xff\xfe")
            ),
            ("complete.json", b"{}"),
            *(("frames.jsonl", c) for c in (b"", b"x", b"[]\n", b"\xff\n", b'{"index": 0}\n')),
        ],
    )
    def test_it_is_told_and_can_be_replaced(self, clip, mask, out, tmp_path, name, content):
        (out / ".vosops" / name).write_bytes(content)
        before = everything(tmp_path)
        with pytest.raises(ResumeError, match=f"{name} is damaged: start again with --overwrite"):
            Job(out, "resume", SETTINGS).video(clip, [str(mask)])
        assert everything(tmp_path) == before
        assert Job(out, "overwrite", SETTINGS).video(clip, [str(mask)]).frames == COUNT

    def test_a_checkpoint_that_lacks_parts(self, clip, mask, out):
        (out / ".vosops" / "complete.json").unlink()
        torch.save({"version": 1}, out / ".vosops" / "checkpoint.pt")
        with pytest.raises(ResumeError, match=r"checkpoint.pt cannot be read \(parts of it are missing\)"):
            Job(out, "resume", SETTINGS).video(clip, [str(mask)])

    def test_names_that_lead_out_of_the_folder_are_not_followed(self, clip, mask, out, tmp_path):
        victim = tmp_path / "victim.txt"
        victim.write_bytes(b"mine")
        entry = {"size": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
        with (out / ".vosops" / "files.jsonl").open("a") as ledger:
            for name in ("../victim.txt", str(victim), "cutout/../../victim.txt"):
                ledger.write(json.dumps({"name": name, **entry}) + "\n")
        Job(out, "overwrite", SETTINGS).video(clip, [str(mask)])
        assert victim.read_bytes() == b"mine"
        record = out / ".vosops" / "frames.jsonl"
        record.write_bytes(record.read_bytes().replace(b'"00002"', b'"../00002"'))
        with pytest.raises(ResumeError, match="frames.jsonl is damaged"):
            Job(out, "resume", SETTINGS, ALL).video(clip, [str(mask)])


class TestFilesOfSomebodyElse:
    @pytest.mark.parametrize("name", ["00003.png", "report.json", "contact_sheet.png"])
    def test_what_was_changed_is_not_replaced(self, clip, mask, out, tmp_path, name):
        (out / name).write_bytes(b"mine now")
        job = Job(out, "overwrite", SETTINGS)
        refuse(tmp_path, f"{name} was changed after a run wrote it", lambda: job.video(clip, [str(mask)]))

    @pytest.mark.parametrize("name", ["overlay.mp4", "masks.json", "cutout/00002.png"])
    def test_what_is_not_asked_for_stays(self, clip, mask, out, tmp_path, name):
        (out / name).write_bytes(b"mine now")
        refuse(tmp_path, name, lambda: Job(out, "overwrite", SETTINGS, ALL).video(clip, [str(mask)]))
        Job(out, "overwrite", SETTINGS).video(clip, [str(mask)])
        assert (out / name).read_bytes() == b"mine now"
        assert not {"overlay.mp4", "masks.json"} & {p.name for p in out.iterdir()} - {name}

    def test_a_folder_of_files_that_no_run_made(self, clip, mask, tmp_path):
        out = write_folder(tmp_path / "out", [picture(b) for b in BOXES])
        refuse(
            tmp_path,
            "was not written by a run",
            lambda: Job(out, "overwrite", SETTINGS).video(clip, [str(mask)]),
        )

    def test_what_is_not_in_the_way_stays(self, clip, mask, out):
        write_mask(out / "00005.png", truth(BOXES[0]))
        corrected = (out / "00005.png").read_bytes()
        (out / "notes.txt").write_text("dear")
        Job(out, "overwrite", Settings(device="cpu", size=32, end=3)).video(clip, [str(mask)])
        kept = {"00000.png", "00001.png", "00002.png", "00005.png", "notes.txt"}
        assert {p.name for p in out.iterdir()} == kept | {"contact_sheet.png", "report.json", ".vosops"}
        assert (out / "00005.png").read_bytes() == corrected

    def test_a_link_in_the_place_of_a_mask(self, clip, mask, out, tmp_path):
        (out / "00003.png").rename(tmp_path / "mine.png")
        (out / "00003.png").symlink_to(tmp_path / "mine.png")
        job = Job(out, "overwrite", SETTINGS)
        refuse(tmp_path, "00003.png was changed", lambda: job.video(clip, [str(mask)]))

    def test_a_correction_beyond_the_checkpoint_is_not_replaced_by_resuming(self, clip, mask, tmp_path):
        out = tmp_path / "out"
        made = []

        class Dying(ColourTracker):
            def step(self, *arguments, **options):
                made.append(0)
                if len(made) == COUNT - 1:
                    raise SystemError("killed")
                return super().step(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemError):
            patch.setattr("vosops.runs.job.make_tracker", lambda *a, **o: Dying())
            patch.setattr("vosops.runs.run.CHECKPOINT_EVERY", 3)
            Job(out, settings=SETTINGS).video(clip, [str(mask)])
        write_mask(out / "00004.png", truth(BOXES[1]))  # after the last checkpoint
        write_mask(out / "00001.png", truth(BOXES[2]))  # before it
        refuse(
            tmp_path, "00004.png was changed", lambda: Job(out, "resume", SETTINGS).video(clip, [str(mask)])
        )
        corrected = (out / "00001.png").read_bytes()
        (out / "00004.png").unlink()
        assert Job(out, "resume", SETTINGS).video(clip, [str(mask)]).frames == COUNT
        assert (out / "00001.png").read_bytes() == corrected

    def test_a_frame_named_like_the_contact_sheet(self, clip, mask, tmp_path):
        (clip / "00004.png").rename(clip / "contact_sheet.jpg")
        refuse(
            tmp_path,
            "contact sheet|contact_sheet",
            lambda: Job(tmp_path / "o", settings=SETTINGS).video(clip, [str(mask)]),
        )


class TestRunsOfOldVersions:
    """They have no list of their files."""

    def stopped(self, clip, mask, out, frames=4):
        calls = []
        with pytest.raises(InterruptedRunError):
            Job(out, settings=SETTINGS, should_stop=lambda: calls.append(0) or len(calls) >= frames).video(
                clip, [str(mask)]
            )
        (out / ".vosops" / "files.jsonl").unlink()

    def test_they_go_on(self, clip, mask, out, tmp_path):
        old = tmp_path / "old"
        self.stopped(clip, mask, old)
        checkpoint = old / ".vosops" / "checkpoint.pt"
        checkpoint.unlink()  # killed before the first one
        assert Job(old, "resume", SETTINGS, ALL).video(clip, [str(mask)]).frames == COUNT
        for name in ("00003.png", "00005.png", "contact_sheet.png", "masks.json"):
            assert (old / name).read_bytes() == (out / name).read_bytes()
        Job(old, "overwrite", SETTINGS).video(clip, [str(mask)])

    def test_a_complete_one_gets_more(self, clip, mask, out):
        (out / ".vosops" / "files.jsonl").unlink()
        (out / "overlay.mp4").unlink()
        assert Job(out, "resume", SETTINGS, ALL).video(clip, [str(mask)]).already_complete
        assert (out / "overlay.mp4").exists()

    def test_what_was_changed_since_is_not_replaced(self, clip, mask, tmp_path):
        old = tmp_path / "old"
        self.stopped(clip, mask, old)
        (old / ".vosops" / "checkpoint.pt").unlink()
        write_mask(old / "00002.png", truth(BOXES[5]))
        corrected = (old / "00002.png").read_bytes()
        after = (old / ".vosops" / "frames.jsonl").stat().st_mtime + 60
        os.utime(old / "00002.png", (after, after))
        with pytest.raises(InputError, match="00002.png was changed"):
            Job(old, "resume", SETTINGS).video(clip, [str(mask)])
        assert (old / "00002.png").read_bytes() == corrected

    def test_they_cannot_be_replaced(self, clip, mask, out, tmp_path):
        (out / ".vosops" / "files.jsonl").unlink()
        refuse(tmp_path, "older version", lambda: Job(out, "overwrite", SETTINGS).video(clip, [str(mask)]))


class TestTwoRuns:
    def test_the_second_is_refused_while_the_first_runs(self, clip, mask, tmp_path):
        out = tmp_path / "out"
        refused = []

        def second():
            if not refused:
                for mode in ("resume", "overwrite"):
                    with pytest.raises(InputError, match="another run is writing") as error:
                        Job(out, mode, SETTINGS).video(clip, [str(mask)])
                    refused.append(error)
            return False

        Job(out, settings=SETTINGS, should_stop=second).video(clip, [str(mask)])
        assert len(refused) == 2
        assert Job(out, "resume", SETTINGS).video(clip, [str(mask)]).already_complete
