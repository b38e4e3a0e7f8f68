"""Errors of readers and writers that no test of a single format reaches: what was given, why it failed, what to do."""

import os
import stat
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.clips import moving, picture, truth, write_folder, write_mask, write_video
from vosops.io.datasets import VideoSequence, find_sequences, masks_of_sequence, open_source
from vosops.io.errors import InputError, VosopsError, require
from vosops.io.files import sample
from vosops.io.frames import ArraySource, ImageFolder
from vosops.io.labels import read_labels
from vosops.io.listing import pictures, read_names
from vosops.io.live import LiveSource
from vosops.io.masks import MaskSet, find_masks
from vosops.io.resize import wanted_size
from vosops.io.streams import FrameStream, Spooled
from vosops.io.video import Orientation, VideoFile
from vosops.io.video_writer import VideoWriter

BOXES = moving(3)
FRAMES = [picture(boxes) for boxes in BOXES]


def refuse(monkeypatch, method, path):
    """Make `method` of pathlib refuse one path, as for a user without permission."""
    original = getattr(Path, method)

    def refusing(self, *arguments, **options):
        if self == path and options.get("follow_symlinks", True):
            raise PermissionError(13, "Permission denied", str(path))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, method, refusing)


class TestWithoutPermission:
    def test_a_frame(self, tmp_path, monkeypatch):
        folder = write_folder(tmp_path / "f", FRAMES)
        first = sorted(folder.iterdir())[0]
        names = pictures(folder)
        monkeypatch.setattr("vosops.io.frames.pictures", lambda *_: names)
        refuse(monkeypatch, "stat", first)
        with pytest.raises(
            InputError, match=rf"{first.name} cannot be read \(Permission denied\): replace or remove"
        ):
            ImageFolder(folder)

    def test_an_entry_of_a_folder(self, tmp_path, monkeypatch):
        folder = write_folder(tmp_path / "f", FRAMES)
        first = sorted(folder.iterdir())[0]
        refuse(monkeypatch, "stat", first)
        with pytest.raises(InputError, match=f"{first.name} cannot be opened: Permission denied"):
            pictures(folder)

    def test_what_tells_that_a_file_changed(self, tmp_path, monkeypatch):
        file = tmp_path / "a.png"
        file.write_bytes(b"x" * 100)
        refuse(monkeypatch, "open", file)
        with pytest.raises(
            InputError, match=r"a.png cannot be read \(Permission denied\): replace or remove it"
        ):
            sample(file, 100)

    def test_a_list_of_names(self, tmp_path, monkeypatch):
        file = tmp_path / "val.txt"
        file.write_text("a\n")
        refuse(monkeypatch, "open", file)
        with pytest.raises(InputError, match="--sequence .*val.txt cannot be read: Permission denied"):
            read_names(file)

    def test_a_mask(self, tmp_path, monkeypatch):
        source = ArraySource(FRAMES)
        mask = write_mask(tmp_path / "m.png", truth(BOXES[0]))
        refuse(monkeypatch, "open", mask)
        with pytest.raises(
            InputError, match=r"mask .*m.png cannot be opened \(Permission denied\): fix or remove it"
        ):
            find_masks([str(mask)], source, range(3))


class TestDataSet:
    def test_a_device(self, tmp_path):
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFSOCK)
        with pytest.raises(
            InputError, match="null is not a file: give a video file, a folder of frames or a data set"
        ):
            open_source(tmp_path / "null")

    def test_of_other_resolutions(self, tmp_path):
        for folder in ("JPEGImages", "Annotations"):
            (tmp_path / folder / "480p").mkdir(parents=True)
        with pytest.raises(InputError, match="has no resolution 1080p: it has 480p"):
            find_sequences(tmp_path, [], "1080p")

    @pytest.fixture
    def sequence(self, tmp_path):
        (tmp_path / "masks").mkdir()
        write_mask(tmp_path / "masks" / "00000.png", truth({}))
        return VideoSequence(
            "s", write_folder(tmp_path / "f", FRAMES), tmp_path / "masks", first_mask_only=True
        )

    def test_no_mask_of_a_frame_that_is_processed(self, sequence):
        with pytest.raises(InputError, match="masks holds no mask of a processed frame"):
            masks_of_sequence(sequence, ImageFolder(sequence.frames), range(1, 3))

    def test_masks_without_objects(self, sequence):
        with pytest.raises(InputError, match="no mask in .*masks of a processed frame shows an object"):
            masks_of_sequence(sequence, ImageFolder(sequence.frames), range(3))


class TestFormats:
    def test_a_mask_of_inks(self, tmp_path):
        Image.new("CMYK", (8, 8)).save(tmp_path / "m.tif")
        with pytest.raises(
            InputError, match="is a CMYK image: save it as a palette or grey PNG whose values are object"
        ):
            read_labels(tmp_path / "m.tif")

    def test_a_video_whose_colours_cannot_be_converted(self, tmp_path, monkeypatch):
        clip = write_video(tmp_path / "v.mp4", FRAMES)

        def broken(*_):
            raise ValueError("no conversion from xyz12le")

        monkeypatch.setattr(Orientation, "upright", broken)
        with pytest.raises(
            InputError, match=r"cannot be converted to RGB \(no conversion from xyz12le\): convert it"
        ):
            VideoFile(clip)

    def test_a_build_without_an_encoder(self, tmp_path, monkeypatch):
        monkeypatch.setattr("av.codecs_available", set())
        with (
            pytest.raises(VosopsError, match="neither libx264 nor mpeg4: leave out --overlay"),
            VideoWriter(tmp_path / "o.mp4", (48, 64), Fraction(10), Fraction(1, 100)),
        ):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_live_file_of_sound_alone(self, tmp_path, monkeypatch):
        import av

        with av.open(str(tmp_path / "s.wav"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))
        original = av.open
        monkeypatch.setattr(av, "open", lambda name, **options: original(str(tmp_path / "s.wav")))
        with pytest.raises(InputError, match="rtsp://x has no video stream"):
            LiveSource("rtsp://x")


def test_frames_in_memory_cannot_be_resumed():
    for source in (ArraySource(FRAMES), FrameStream(iter(FRAMES), range(3))):
        with pytest.raises(VosopsError, match="frames in memory cannot be resumed"):
            source.fingerprint()


def test_a_download_that_breaks_off(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    class Broken:
        def read(self, size):
            raise ConnectionResetError("connection reset by peer")

    with pytest.raises(InputError, match="clip cannot be read to its end .*connection reset by peer"):
        Spooled(Broken(), "clip")
    assert list(tmp_path.iterdir()) == []


def test_a_scheme_that_is_not_read():
    with pytest.raises(
        InputError, match=r"ftp://h/v.mp4: ftp cannot be read: give http, https or a file \(ffmpeg -i URL"
    ):
        open_source("ftp://h/v.mp4")


def test_too_small_a_size():
    with pytest.raises(InputError, match=r"--size must be -1 \(the input's own\) or at least 16, got 15"):
        wanted_size((48, 64), 15)


def test_a_missing_package_is_one_line():
    with pytest.raises(VosopsError, match=r"not_a_package is not installed: pip install 'vosops\[studio\]'"):
        require("not_a_package", "studio")


def test_no_mask():
    with pytest.raises(InputError, match="no mask given: pass --mask PNG"):
        MaskSet([], (4, 4))
