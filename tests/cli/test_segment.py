"""`vosops segment` on the command line: exit codes, one-line errors, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.commands import error_line, run_command
from tests.clips import (
    ColourTracker,
    cut,
    moving,
    picture,
    truth,
    write_folder,
    write_mask,
    write_video,
)
from vosops import cli
from vosops.cli.segment import Console

BOXES = moving(12, ids=(1, 2))


@pytest.fixture
def clip(tmp_path):
    return write_folder(tmp_path / "frames", [picture(b) for b in BOXES])


@pytest.fixture
def mask(tmp_path):
    return write_mask(tmp_path / "mask.png", truth(BOXES[0]))


@pytest.fixture
def vosops(monkeypatch, capsys):
    """Runs the command in this process with a small model; returns (exit code, what it printed)."""
    monkeypatch.setattr("vosops.runs.job.make_tracker", lambda *args, **options: ColourTracker())
    return _runner(monkeypatch, capsys)


@pytest.fixture
def real_vosops(monkeypatch, capsys):
    """The same with the models that vosops ships."""
    return _runner(monkeypatch, capsys)


def _runner(monkeypatch, capsys):
    def run(*arguments):
        return run_command(monkeypatch, capsys, "segment", *arguments)

    return run


def test_everything(vosops, clip, mask, out):
    code, printed = vosops(
        clip, "--mask", mask, "--out", out, "--overlay", "--cutout", "--json", "--size", 32
    )
    assert code == 0
    assert "12 masks" in printed
    assert {p.name for p in out.iterdir()} == {
        *(f"{i:05d}.png" for i in range(12)),
        "overlay.mp4",
        "cutout",
        "masks.json",
        "contact_sheet.png",
        "report.json",
        ".vosops",
    }


def test_events_are_told(vosops, tmp_path, mask, out):
    boxes = [{**b, 2: BOXES[0][2]} if t < 5 else {1: b[1]} for t, b in enumerate(BOXES)]
    clip = write_folder(tmp_path / "f", [picture(b) for b in boxes])
    code, printed = vosops(clip, "--mask", mask, "--out", out)
    assert code == 0
    assert "object 2 lost at frame 5" in printed


def test_several_masks(vosops, clip, tmp_path, out):
    first = write_mask(tmp_path / "a.png", truth({1: BOXES[3][1]}))
    second = write_mask(tmp_path / "b.png", truth({2: BOXES[6][2]}))
    code, _ = vosops(clip, "--mask", f"3={first}", "--mask", f"00006={second}", "--out", out)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert [f["frame"] for f in report["frames"] if f["given"]] == [3, 6]


def test_the_memory_budget_reaches_the_model_and_an_excess_is_one_line(monkeypatch, capsys, clip, mask, out):
    from vosops.models import Propagate

    given = []

    def make_tracker(settings):
        given.append(settings.memory_budget)
        return Propagate(pretrained=False, memory_budget=settings.memory_budget)

    monkeypatch.setattr("vosops.runs.job.make_tracker", make_tracker)
    vosops = _runner(monkeypatch, capsys)
    arguments = (clip, "--mask", mask, "--end", 3, "--size", 48)
    assert vosops(*arguments, "--out", out, "--memory-budget", "20MB")[0] == 0
    code, printed = vosops(*arguments, "--out", out, "--memory-budget", "30MB", "--resume")
    assert code == 2 and "--memory-budget was 20MB, is 30MB" in error_line(printed)
    code, printed = vosops(*arguments, "--out", out.with_name("small"), "--memory-budget", "20kB")
    assert code == 1
    assert "--memory-budget is too small at frame 0" in error_line(printed) and "0 fit" in error_line(printed)
    assert given == ["20MB", "30MB", "20kB"]


def test_a_folder_in_use(vosops, clip, mask, out):
    arguments = (clip, "--mask", mask, "--out", out)
    assert vosops(*arguments)[0] == 0
    code, printed = vosops(*arguments)
    assert code == 2
    assert "--resume" in error_line(printed) and "--overwrite" in error_line(printed)
    assert vosops(*arguments, "--resume")[0] == 0
    assert vosops(*arguments, "--overwrite")[0] == 0
    code, printed = vosops(*arguments, "--resume", "--size", 64)
    assert code == 2
    assert "--size was 480, is 64" in error_line(printed)
    assert "mutually exclusive" in error_line(vosops(*arguments, "--resume", "--overwrite")[1])


class TestBadInput:
    def wrong(self, vosops, out, *arguments, code=2):
        got, printed = vosops(*arguments, "--out", out)
        assert got == code
        assert not out.exists(), "nothing may be written"
        return error_line(printed)

    def test_no_mask(self, vosops, clip, out):
        assert "no mask given: pass --mask PNG, FRAME=PNG or a folder" in self.wrong(vosops, out, clip)

    @pytest.mark.parametrize(
        ("flag", "value"),
        [("--mask", "m.png"), ("--init", "unet:1"), ("--points", "p.json"), ("--box", "b.json")],
    )
    def test_a_data_set_has_its_own_masks(self, vosops, tmp_path, out, flag, value):
        for folder in ("JPEGImages", "Annotations"):
            (tmp_path / "set" / folder).mkdir(parents=True)
        line = self.wrong(vosops, out, tmp_path / "set", flag, value)
        assert f"{flag} cannot be combined with the root of a data set, which has its own masks" in line

    def test_two_ways_to_mark_objects(self, vosops, clip, out):
        line = self.wrong(vosops, out, clip, "--init", "unet:1", "--points", "p.json")
        assert "--init cannot be combined with --points or --box" in line

    @pytest.mark.parametrize("text", ["rtsp_transport", "=tcp", ""])
    def test_an_option_of_a_stream_without_a_value(self, vosops, mask, out, text):
        line = self.wrong(
            vosops, out, "rtsp://127.0.0.1:9/x", "--live", "--mask", mask, "--input-option", text
        )
        assert line == f"vosops: --input-option must be NAME=VALUE, got {text}"

    def test_mask_of_another_size(self, vosops, clip, tmp_path, out):
        small = write_mask(tmp_path / "s.png", truth(BOXES[0])[:20])
        assert "is 64x20, but the frames are 64x48" in self.wrong(vosops, out, clip, "--mask", small)

    def test_mask_with_no_object(self, vosops, clip, tmp_path, out):
        empty = write_mask(tmp_path / "e.png", truth({}))
        assert "shows no object" in self.wrong(vosops, out, clip, "--mask", empty)

    def test_absent_input_and_empty_folder(self, vosops, tmp_path, mask, out):
        assert "does not exist" in self.wrong(vosops, out, tmp_path / "absent.mp4", "--mask", mask)
        (tmp_path / "empty").mkdir()
        assert "holds no image" in self.wrong(vosops, out, tmp_path / "empty", "--mask", mask)

    def test_unreadable_video(self, vosops, tmp_path, mask, out):
        (tmp_path / "v.mp4").write_bytes(b"rubbish" * 100)
        assert "cannot be opened" in self.wrong(vosops, out, tmp_path / "v.mp4", "--mask", mask)

    def test_sizes_devices_and_dtypes(self, vosops, clip, mask, out):
        def wrong(*options):
            return self.wrong(vosops, out, clip, "--mask", mask, *options)

        assert "--size" in wrong("--size", "0")
        assert "--device cuda:77" in wrong("--device", "cuda:77")
        assert "--device meta cannot be used" in wrong("--device", "meta")
        assert "--dtype" in wrong("--dtype", "int8")
        assert "no frame to process" in wrong("--start", "12")
        assert "--fps" in wrong("--fps", "0")
        assert "--scales must be numbers separated by commas" in wrong("--scales", "1;2")

    def test_model_and_backbone(self, real_vosops, clip, mask, out):
        arguments = (clip, "--mask", mask)
        assert "--scales cannot be used with" in self.wrong(real_vosops, out, *arguments, "--scales", "1,2")
        assert "--scales must be positive" in self.wrong(real_vosops, out, *arguments, "--scales", "0")
        assert "--scales must be positive" in self.wrong(real_vosops, out, *arguments, "--scales", "nan")
        assert "--model nothing" in self.wrong(real_vosops, out, *arguments, "--model", "nothing")
        assert "nothing.pth does not exist" in self.wrong(
            real_vosops, out, *arguments, "--weights", "nothing.pth"
        )
        line = self.wrong(real_vosops, out, *arguments, "--backbone", "nothing", code=1)
        assert "nothing" in line

    def test_what_a_model_does_not_take(self, real_vosops, clip, mask, tmp_path, out):
        def wrong(*options):
            return self.wrong(real_vosops, out, clip, "--mask", mask, *options)

        assert "--checkout cannot be used with --model propagate" in wrong("--checkout", tmp_path)
        assert "--backbone cannot be used with --model stm" in wrong("--model", "stm", "--backbone", "x")
        assert "is a folder: give a file" in wrong("--model", "stm", "--weights", tmp_path)

    @pytest.mark.parametrize("model", ["lstm_icnet", "lstm_segnet", "rfcn"])
    def test_a_model_that_segments_classes(self, real_vosops, clip, mask, out, model):
        line = self.wrong(real_vosops, out, clip, "--mask", mask, "--model", model)
        assert f"--model {model} does not track objects, see vosops semantic: choose one of cutie" in line
        assert model not in self.wrong(real_vosops, out, clip, "--mask", mask, "--model", "nothing")

    def test_an_overlay_without_its_extra_is_refused_before_the_work(
        self, vosops, clip, mask, out, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, "av", None)
        line = self.wrong(vosops, out, clip, "--mask", mask, "--overlay", code=1)
        assert line == "vosops: av is not installed: pip install 'vosops[video]'"

    def test_memory_budget(self, real_vosops, clip, mask, out):
        line = self.wrong(real_vosops, out, clip, "--mask", mask, "--memory-budget", "2 apples")
        assert "--memory-budget 2 apples" in line

    def test_options_of_data_sets(self, vosops, clip, mask, out):
        line = self.wrong(vosops, out, clip, "--mask", mask, "--sequence", "bear")
        assert "root of a data set" in line

    @pytest.mark.parametrize("package", ["typer", "rich"])
    def test_a_package_of_the_command_line_is_missing(self, monkeypatch, capsys, clip, mask, out, package):
        monkeypatch.setattr(
            sys, "argv", ["vosops", "segment", str(clip), "--mask", str(mask), "--out", str(out)]
        )
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == 1
        assert capsys.readouterr().err == f"vosops: {package} is not installed: pip install 'vosops[video]'\n"


class TestNames:
    def test_names_that_are_not_utf8_or_look_like_markup(self, vosops, tmp_path, mask):
        folder = tmp_path / os.fsdecode(b"caf\xe9 [bold]\n")
        folder.mkdir()
        for index, boxes in enumerate(BOXES[:3]):
            write_folder(tmp_path / "x", [picture(boxes)])
            (tmp_path / "x" / "00000.png").rename(folder / os.fsdecode(b"[red]\xe9\n%d.png" % index))
        out = tmp_path / os.fsdecode(b"out\xe9[/x]")
        arguments = (folder, "--mask", mask, "--out", out, "--overlay", "--json", "--size", 32)
        code, printed = vosops(*arguments)
        assert code == 0 and r"out\xe9[/x]: 3 masks" in "".join(printed.split("\n"))
        names = [os.fsdecode(b"[red]\xe9\n%d" % i) for i in range(3)]
        assert all((out / f"{name}.png").exists() for name in names)
        assert [f["name"] for f in json.loads((out / "report.json").read_text())["frames"]] == names
        assert vosops(*arguments, "--resume")[0] == 0
        code, printed = vosops(folder, "--mask", out / os.fsdecode(b"no\xe9\n"), "--out", out, "--resume")
        assert code == 2 and r"no\udce9\n does not exist" in error_line(printed)

    @pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "rtsp://x/y", "http://127.0.0.1:1/v.mp4"])
    def test_names_of_nothing(self, vosops, mask, out, name):
        code, printed = vosops(name, "--mask", mask, "--out", out)
        assert code == 2 and error_line(printed) and not out.exists()


def test_other_inputs_and_warnings(vosops, tmp_path, mask, out):
    from PIL import Image

    frames = [Image.fromarray(picture(boxes)) for boxes in BOXES]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    code, printed = vosops(tmp_path / "a.webp", "--mask", mask, "--out", out, "--overlay", "--size", 32)
    assert code == 0 and "12 masks" in " ".join(printed.split()) and (out / "0000011.png").exists()
    unknown = truth(BOXES[0])
    unknown[40:] = 255
    other = write_mask(tmp_path / "u.png", unknown)
    code, printed = vosops(tmp_path / "a.webp", "--mask", other, "--out", tmp_path / "o2", "--size", 32)
    assert code == 0
    assert [line for line in printed.splitlines() if line.startswith("warning")] == [
        f"warning: mask {other}: its 512 pixels of value 255 count as unknown, because there are other ids too: "
        "give an object another id"
    ]


def test_a_truncated_video(vosops, tmp_path, out):
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 255, (30, 96, 128, 3), dtype=np.uint8)
    video = write_video(tmp_path / "v.mp4", list(noise), movflags="faststart", lossless=False)
    labels = np.zeros((96, 128), np.uint8)
    labels[:20] = 1
    mask = write_mask(tmp_path / "m.png", labels)
    code, printed = vosops(cut(video, 0.6), "--mask", mask, "--out", out, "--overlay")
    assert code == 1
    assert "truncated" in error_line(printed)
    assert (out / "overlay.mp4").exists() and (out / "0000005.png").exists()


def test_a_data_set(vosops, tmp_path, out):
    root = tmp_path / "davis"
    for name in ("bear", "cow"):
        write_folder(root / "JPEGImages" / "480p" / name, [picture(b) for b in BOXES])
        write_mask(root / "Annotations" / "480p" / name / "00000.png", truth(BOXES[0]))
    code, printed = vosops(root, "--out", out)
    assert code == 0
    assert "bear" in printed and "cow" in printed
    assert (out / "bear" / "00011.png").exists() and (out / "cow" / "00011.png").exists()


SLOW_RUN = """
import sys, time
from tests.clips import ColourTracker
import vosops.runs.job as job
from vosops import cli

class Slow(ColourTracker):
    def step(self, *args, **options):
        time.sleep(0.1)
        return super().step(*args, **options)

job.make_tracker = lambda *args, **options: Slow()
cli.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are sent another way there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(vosops, clip, mask, out, tmp_path, number):
    arguments = [clip, "--mask", mask, "--out", out, "--device", "cpu", "--size", 32]
    command = [sys.executable, "-c", SLOW_RUN, "segment", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    patience = time.monotonic() + 120
    while not (out / "00002.png").exists():
        assert process.poll() is None, process.stderr.read()
        if time.monotonic() > patience:
            process.kill()
            pytest.fail("no third mask after two minutes")
        time.sleep(0.01)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "--resume" in error_line(printed)
    assert not (out / "00011.png").exists()
    assert vosops(*arguments, "--resume")[0] == 0
    whole = tmp_path / "whole"
    assert vosops(*[whole if a == out else a for a in arguments])[0] == 0
    for index in range(12):
        assert (out / f"{index:05d}.png").read_bytes() == (whole / f"{index:05d}.png").read_bytes()


def test_names_with_brackets_are_shown_as_they_are(capsys):
    with Console() as console:
        console.sequence("clip[/red]", None)
        console.begin("segment", 1, 0)
        console.note("wrote a[1].png")
        console.end()
    assert "wrote a[1].png" in capsys.readouterr().err


def test_the_second_signal_stops_at_once():
    from vosops.cli.segment import StopSignals
    from vosops.io.errors import InterruptedRunError

    said = []
    with StopSignals(said.append) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.requested and said == ["stopping after this frame (again: at once)"]
        with pytest.raises(
            InterruptedRunError, match="stopped at once; --resume continues from the last checkpoint"
        ):
            signal.raise_signal(signal.SIGTERM)
