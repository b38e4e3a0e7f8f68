"""Frames from videos and folders."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.clips import cut, moving, picture, resident, rotate_file, write_folder, write_video
from vosops.io.containers import is_cut_off
from vosops.io.datasets import open_source
from vosops.io.errors import InputError
from vosops.io.frames import ArraySource, ImageFolder, read_ahead, with_last
from vosops.io.video import VideoFile
from vosops.io.video_writer import VideoWriter

FRAMES = [picture(boxes) for boxes in moving(30)]


def close(a, b):
    """Whether two pictures agree up to the rounding of the colour conversion."""
    return np.abs(a.astype(int) - b.astype(int)).max() <= 3


def noise(count, size=(96, 128)):
    return list(np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8))


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "clip.mp4", FRAMES, keyframe_every=7)


class TestVideoFile:
    def test_every_frame_comes_once_and_in_order(self, video):
        source = VideoFile(video)
        frames = list(source.forward(range(1000)))
        assert [f.index for f in frames] == list(range(30))
        assert [f.name for f in frames[:2]] == ["0000000", "0000001"]
        assert all(close(f.image, expected) for f, expected in zip(frames, FRAMES))
        assert source.size == (48, 64)
        assert source.count == 30
        assert source.problem is None

    def test_some_frames(self, video):
        assert [f.index for f in VideoFile(video).forward([3, 4, 20])] == [3, 4, 20]

    @pytest.mark.parametrize("bytes_held", [1, 48 * 64 * 3 * 12])
    def test_backward_gives_the_same_pictures(self, video, monkeypatch, bytes_held):
        monkeypatch.setattr("vosops.io.frames._BACKWARD_BYTES", bytes_held)
        source = VideoFile(video)
        forward = list(source.forward(range(30)))
        backward = list(source.backward(range(25, -1, -1)))
        assert [f.index for f in backward] == list(range(25, -1, -1))
        for frame in backward:
            np.testing.assert_array_equal(frame.image, forward[frame.index].image)
            assert frame.time == forward[frame.index].time

    def test_backward_seeks(self, video, monkeypatch):
        monkeypatch.setattr("vosops.io.frames._MIN_CHUNK", 4)
        monkeypatch.setattr("vosops.io.frames._BACKWARD_BYTES", 1)
        source = VideoFile(video)
        read_from_start = []
        forward = source.forward
        monkeypatch.setattr(source, "forward", lambda i: read_from_start.append(list(i)) or forward(i))
        assert len(list(source.backward(range(25, -1, -1)))) == 26
        assert read_from_start == [[25]], "only to learn the presentation times"

    def test_backward_without_seeking(self, tmp_path):
        """A raw stream has no times: every chunk is decoded from the start."""
        path = write_video(tmp_path / "clip.h264", FRAMES)
        source = VideoFile(path)
        backward = list(source.backward(range(20, -1, -3)))
        assert [f.index for f in backward] == list(range(20, -1, -3))
        assert all(close(f.image, FRAMES[f.index]) for f in backward)

    @pytest.mark.parametrize(("degrees", "turns"), [(90, -1), (180, 2), (270, 1)])
    def test_rotation_metadata(self, video, degrees, turns):
        rotate_file(video, degrees)
        source = VideoFile(video)
        frame = next(source.forward([0]))
        assert close(frame.image, np.rot90(FRAMES[0], turns))
        assert source.size == frame.image.shape[:2]

    def test_frames_are_freed(self, tmp_path):
        """PyAV 18 never frees a frame whose side data was looked at."""
        frames = [np.full((720, 1280, 3), 5 * i, np.uint8) for i in range(40)]  # 2.6 MiB each when decoded
        source = VideoFile(write_video(tmp_path / "v.mp4", frames, lossless=False))
        for _ in source.forward(range(10)):
            pass
        before = resident()
        for _ in source.forward(range(40)):
            pass
        assert resident() - before < 50 << 20

    def test_variable_frame_rate(self, tmp_path):
        pts = [0, 1, 2, 10, 11, 30]
        path = write_video(tmp_path / "v.mkv", FRAMES[:6], pts=pts, time_base=Fraction(1, 1000))
        frames = list(VideoFile(path).forward(range(100)))
        assert [f.index for f in frames] == list(range(6))
        assert [f.time for f in frames] == [Fraction(p, 1000) for p in pts]

    @pytest.mark.parametrize(("suffix", "codec"), [("flv", "flv1"), ("wmv", "wmv2"), ("asf", "wmv2")])
    def test_a_file_that_ends_between_two_packets(self, tmp_path, suffix, codec):
        path = write_video(tmp_path / f"clip.{suffix}", noise(30), codec=codec, lossless=False, rate=25)
        assert not is_cut_off(path)
        content = path.read_bytes()
        assert len(list(VideoFile(path).forward(range(1000)))) == 30
        for length in range(len(content) - 1, len(content) // 2, -997):
            path.write_bytes(content[:length])
            assert is_cut_off(path), length
        source = VideoFile(path)
        assert 5 < len(list(source.forward(range(1000)))) < 30
        assert "truncated" in source.problem

    @pytest.mark.parametrize("length", [3, 12, 13, 60, 4000])
    @pytest.mark.parametrize("start", [b"FLV", b"FLV\x00\x08filesize\x00\x7f\xf0" + bytes(6)])
    def test_no_length_is_no_problem(self, tmp_path, start, length):
        path = tmp_path / "clip.flv"
        path.write_bytes((start + bytes(4000))[:length])
        assert not is_cut_off(path)

    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
    def test_a_truncated_file_gives_what_can_be_decoded_and_says_so(self, tmp_path, suffix):
        flags = "faststart" if suffix == "mp4" else None
        path = write_video(tmp_path / f"clip.{suffix}", noise(30), movflags=flags, lossless=False)
        assert not is_cut_off(path)
        source = VideoFile(cut(path, 0.6))
        assert is_cut_off(path)
        frames = list(source.forward(range(1000)))
        assert 5 < len(frames) < 30
        assert "truncated" in source.problem
        assert "\n" not in source.problem

    def test_an_end_before_the_cut_is_no_problem(self, tmp_path):
        path = write_video(tmp_path / "clip.mp4", noise(30), movflags="faststart", lossless=False)
        source = VideoFile(cut(path, 0.6))
        assert len(list(source.forward(range(4)))) == 4
        assert source.problem is None

    @pytest.mark.parametrize(
        "name",
        [
            "2024-05-01T10:20:30.mp4",
            "-i.mp4",
            "a%d.mp4",
            "%03d.mp4",
            "#1?x=y&z.mp4",
            "http:x.mp4",
            "pipe:1.mp4",
            "é.mp4",
        ],
    )
    def test_any_name_in_any_folder(self, video, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        video.rename(name)
        assert len(list(VideoFile(Path(name)).forward(range(100)))) == 30
        with VideoWriter(Path("a:%d") / name, (48, 64), Fraction(10), Fraction(1, 100)) as writer:
            writer.write(FRAMES[0], Fraction(0))
        assert len(list(VideoFile(Path("a:%d") / name).forward(range(100)))) == 1

    def test_names_and_metadata_that_are_not_utf8(self, video, tmp_path):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mkv"))
        with av.open(str(video)) as source, av.open(str(tmp_path / "t.mkv"), "w") as copy:
            copy.metadata["title"] = "cafe"
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    copy.mux(packet)
        path.write_bytes((tmp_path / "t.mkv").read_bytes().replace(b"cafe", b"caf\xe9"))
        assert len(list(VideoFile(path).forward(range(100)))) == 30

    def test_a_change_of_size_ends_the_input(self, tmp_path):
        parts = [FRAMES[:5], [np.ascontiguousarray(f[:32, :48]) for f in FRAMES[5:9]]]
        content = [
            write_video(tmp_path / f"{i}.ts", part, codec="mpeg2video", rate=25).read_bytes()
            for i, part in enumerate(parts)
        ]
        (tmp_path / "v.ts").write_bytes(b"".join(content))
        source = VideoFile(tmp_path / "v.ts")
        frames = list(source.forward(range(100)))
        assert 0 < len(frames) <= 5 and all(f.image.shape == (48, 64, 3) for f in frames)
        assert f"changes size at frame {len(frames)}, from 64x48 to 48x32" in source.problem

    def test_a_playlist_opens_no_other_thing(self, tmp_path):
        (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
        with pytest.raises(InputError):
            VideoFile(tmp_path / "list.m3u8")

    def test_no_video(self, tmp_path):
        path = tmp_path / "text.mp4"
        path.write_text("not a video")
        with pytest.raises(InputError, match="cannot be opened as a video"):
            VideoFile(path)

    def test_a_video_whose_index_is_cut_off(self, tmp_path):
        path = cut(write_video(tmp_path / "clip.mp4", noise(10)), 0.5)
        with pytest.raises(InputError, match="cannot be opened"):
            VideoFile(path)


class TestImageFolder:
    def test_natural_order(self, tmp_path):
        for number in (10, 2, 1):
            write_folder(tmp_path / "f", [FRAMES[number]], name="frame{}.png", first=number)
        source = ImageFolder(tmp_path / "f")
        assert [f.name for f in source.forward(range(9))] == ["frame1", "frame2", "frame10"]
        assert source.find("frame10") == 2
        assert source.find("frame10.png") == 2
        assert source.find("10") is None
        assert source.count == 3

    def test_a_name_is_found_without_its_suffix_alone(self, tmp_path):
        source = ImageFolder(write_folder(tmp_path / "f", FRAMES[:3], name="{}.png"))
        assert [source.find(key) for key in ("1", "1.png", "1.JPG", "1.5", "1.old", "a/1.x")] == [
            1,
            1,
            1,
            None,
            None,
            None,
        ]

    def test_backward(self, tmp_path):
        source = ImageFolder(write_folder(tmp_path / "f", FRAMES[:5]))
        assert [f.index for f in source.backward(range(3, -1, -1))] == [3, 2, 1, 0]

    def test_exif_orientation(self, tmp_path):
        from PIL import Image

        exif = Image.Exif()
        exif[0x0112] = 6  # turn 90 degrees clockwise to view
        (tmp_path / "f").mkdir()
        Image.fromarray(FRAMES[0]).save(tmp_path / "f" / "0.png", exif=exif)
        frame = next(ImageFolder(tmp_path / "f").forward([0]))
        np.testing.assert_array_equal(frame.image, np.rot90(FRAMES[0], -1))

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(InputError, match="holds no image"):
            ImageFolder(tmp_path)

    def test_a_damaged_frame_ends_the_input(self, tmp_path):
        folder = write_folder(tmp_path / "f", FRAMES[:5])
        (folder / "00003.png").write_bytes(b"broken")
        source = ImageFolder(folder)
        assert len(list(source.forward(range(9)))) == 3
        assert "00003.png cannot be read" in source.problem

    def test_a_frame_of_another_size_ends_the_input(self, tmp_path):
        folder = write_folder(tmp_path / "f", [*FRAMES[:2], FRAMES[2][:20]])
        source = ImageFolder(folder)
        assert len(list(source.forward(range(9)))) == 2
        assert "64x20, but the first frame is 64x48" in source.problem

    def test_frames_that_are_not_wanted_may_be_unusable(self, tmp_path):
        folder = write_folder(tmp_path / "f", FRAMES[:7])
        (folder / "00000.png").write_bytes(b"broken")
        write_folder(folder, [FRAMES[0][:20]], first=1)
        (folder / "00006.png").write_bytes(b"")
        wanted = range(2, 6)
        source = ImageFolder(folder, wanted=wanted)
        assert source.size == (48, 64) and source.count == 7
        assert [f.index for f in source.forward(wanted)] == [2, 3, 4, 5] and source.problem is None
        with pytest.raises(InputError, match="00006.png is an empty file"):
            ImageFolder(folder, wanted=range(2, 7))

    def test_two_frames_of_one_name(self, tmp_path):
        folder = write_folder(tmp_path / "f", FRAMES[:1])
        write_folder(folder, FRAMES[:1], name="{:05d}.bmp")
        with pytest.raises(InputError, match="two pictures named 00000, 00000.bmp and 00000.png: keep one"):
            ImageFolder(folder)

    def test_names_that_are_not_utf8(self, tmp_path):
        folder = tmp_path / "f"
        folder.mkdir()
        for index, frame in enumerate(FRAMES[:3]):
            write_folder(tmp_path / "x", [frame])
            name = os.fsdecode(b"caf\xe9_%d.png" % index)
            (tmp_path / "x" / "00000.png").rename(folder / name)
        source = ImageFolder(folder)
        assert [f.name for f in source.forward(range(9))] == [
            os.fsdecode(b"caf\xe9_%d" % i) for i in range(3)
        ]
        assert source.fingerprint() == ImageFolder(folder).fingerprint()

    def test_the_fingerprint_tells_changed_frames(self, tmp_path):
        folder = write_folder(tmp_path / "f", FRAMES[:2])
        before = ImageFolder(folder).fingerprint()
        assert ImageFolder(folder).fingerprint() == before
        write_folder(folder, noise(1, (48, 64)), first=1)
        assert ImageFolder(folder).fingerprint() != before


def test_what_is_neither_video_nor_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "absent.mp4")
    folder = write_folder(tmp_path / "f", FRAMES[:1])
    with pytest.raises(InputError, match="single image"):
        open_source(folder / "00000.png")


def test_arrays_are_a_source():
    assert ArraySource([FRAMES[0][:20], *FRAMES[1:3]], wanted=range(1, 3)).size == (48, 64)
    source = ArraySource(np.stack(FRAMES[:3]))
    assert [f.index for f in source.forward(range(1, 10))] == [1, 2]
    with pytest.raises(InputError, match=r"uint8 RGB, got \(48, 64\)"):
        ArraySource([FRAMES[0][..., 0]])


class TestReadAhead:
    def test_items_in_order(self):
        with read_ahead(range(20)) as items:
            assert list(items) == list(range(20))

    def test_errors_reach_the_consumer_after_the_items_before_them(self):
        def failing():
            yield 1
            raise InputError("broken")

        with read_ahead(failing()) as items:
            assert next(items) == 1
            with pytest.raises(InputError, match="broken"):
                next(items)

    def test_leaving_early_stops_reading(self):
        read = []
        with read_ahead(read.append(i) or i for i in range(10**9)) as items:
            next(items)
        assert len(read) < 10

    def test_last(self):
        assert list(with_last("abc")) == [("a", False), ("b", False), ("c", True)]
        assert list(with_last([])) == []
