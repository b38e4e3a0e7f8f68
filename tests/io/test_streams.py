"""Inputs beside video files and folders: stacks and animations, pipes, URLs, iterators of frames."""

import http.server
import os
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import vosops
from tests.clips import ColourTracker, cut, moving, picture, truth, write_folder, write_video
from vosops.io.datasets import open_source
from vosops.io.errors import IncompleteInputError, InputError
from vosops.io.notes import InputWarning
from vosops.io.picture_stack import PictureStack
from vosops.io.streams import FrameStream

BOXES = moving(8)
FRAMES = [picture(boxes) for boxes in BOXES]
EVERY = range(1000)


def stack(path, frames=FRAMES, **options):
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


def close(a, b, most=0):
    return np.abs(a.astype(int) - b.astype(int)).max() <= most


class TestPictureStack:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("s.tif", {}),
            ("s.png", {"duration": 40}),
            ("s.gif", {"duration": 40}),
            ("s.webp", {"duration": 40, "lossless": True}),
            ("s.avif", {"duration": 40, "quality": 100, "subsampling": "4:4:4"}),
        ],
    )
    def test_every_picture_is_a_frame(self, tmp_path, name, options):
        source = open_source(stack(tmp_path / name, **options), Fraction(25))
        frames = list(source.forward(EVERY))
        assert [f.index for f in frames] == list(range(8)) and source.count == 8
        assert [f.time for f in frames] == [Fraction(i, 25) for i in range(8)]
        assert all(close(f.image, expected, 30) for f, expected in zip(frames, FRAMES, strict=True))
        assert source.problem is None and source.find("5") == 5
        some = list(source.forward([2, 5]))
        back = list(source.backward([5, 2]))
        assert [f.index for f in some] == [2, 5] and [f.index for f in back] == [5, 2]
        for frame in some + back:
            assert close(frame.image, frames[frame.index].image) and frame.time == frames[frame.index].time

    def test_16_bits(self, tmp_path):
        path = tmp_path / "s.tif"
        images = [Image.fromarray(frame[..., 0] * np.uint16(257)) for frame in FRAMES]
        images[0].save(path, save_all=True, append_images=images[1:])
        for frame, expected in zip(open_source(path).forward(EVERY), FRAMES, strict=True):
            assert close(frame.image[..., 0], expected[..., 0])

    def test_alone_in_a_folder(self, tmp_path):
        stack(tmp_path / "s.tif")
        assert open_source(tmp_path).count == 8

    def test_beside_other_pictures_it_is_refused(self, tmp_path):
        write_folder(tmp_path, FRAMES[:3], name="{:05d}.tif")
        stack(tmp_path / "00001.tif", FRAMES[:2])
        source = open_source(tmp_path)
        assert [f.index for f in source.forward(EVERY)] == [0]
        assert "00001.tif holds 2 pictures" in source.problem
        stack(tmp_path / "00000.tif", FRAMES[:2])
        with pytest.raises(InputError, match=r"00000.tif holds 2 pictures"):
            open_source(tmp_path)

    def test_smaller_copies_do_not_count(self, tmp_path):
        from PIL.TiffImagePlugin import AppendingTiffWriter

        with AppendingTiffWriter(str(tmp_path / "0.tif"), True) as file:
            Image.fromarray(FRAMES[0]).save(file, "TIFF")
            file.newFrame()
            Image.fromarray(FRAMES[0][::2, ::2]).save(file, "TIFF", tiffinfo={254: 1})
            file.newFrame()
        write_folder(tmp_path, FRAMES[1:2], name="1.tif")
        assert open_source(tmp_path).count == 2

    def test_a_change_of_size_ends_it(self, tmp_path):
        source = open_source(stack(tmp_path / "s.tif", [*FRAMES[:3], FRAMES[3][:20]]))
        assert len(list(source.forward(EVERY))) == 3
        assert "changes size at frame 3, from 64x48 to 64x20" in source.problem

    def test_a_truncated_file_gives_what_can_be_read(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), dtype=np.uint8)
        path = cut(stack(tmp_path / "s.webp", list(noise), lossless=True, duration=40), 0.6)
        try:
            source = PictureStack(path)
        except InputError as error:
            assert "\n" not in str(error)
            return
        assert len(list(source.forward(EVERY))) < 8 and source.problem

    def test_one_picture_is_none(self, tmp_path):
        for name in ("s.gif", "s.webp", "s.tif"):
            Image.fromarray(FRAMES[0]).save(tmp_path / name)
            with pytest.raises(InputError, match="single image"):
                open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["{}.ppm", "{}.jp2", "{}.gif", "{}.avif", "{}.PGM"])
def test_folders_of_other_pictures(tmp_path, name):
    for index, frame in enumerate(FRAMES[:2]):
        image = Image.fromarray(frame[..., 0] if "PGM" in name else frame)
        image.save(tmp_path / name.format(index), **({"irreversible": False} if "jp2" in name else {}))
    assert [f.index for f in open_source(tmp_path).forward(EVERY)] == [0, 1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes there")
class TestPipes:
    @staticmethod
    def fed(path, content):
        os.mkfifo(path)
        threading.Thread(target=lambda: path.write_bytes(content), daemon=True).start()
        return path

    def test_a_pipe_is_copied_and_the_copy_removed(self, tmp_path, monkeypatch):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        content = write_video(tmp_path / "v.mp4", FRAMES).read_bytes()
        source = open_source(self.fed(tmp_path / "pipe", content))
        assert source.title == str(tmp_path / "pipe")
        for _ in range(2):
            assert len(list(source.forward(EVERY))) == 8
        assert [f.index for f in source.backward([3, 2])] == [3, 2]
        del source
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_standard_input(self, tmp_path, monkeypatch):
        import io

        content = write_video(tmp_path / "v.mp4", FRAMES).read_bytes()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert len(list(open_source("-").forward(EVERY))) == 8

    def test_nothing_and_rubbish(self, tmp_path):
        with pytest.raises(InputError, match="empty: no data was received"):
            open_source(self.fed(tmp_path / "a", b""))
        with pytest.raises(InputError, match=r"b cannot be opened as a video"):
            open_source(self.fed(tmp_path / "b", b"rubbish" * 100))


class TestUrls:
    @pytest.fixture
    def server(self, tmp_path, monkeypatch):
        monkeypatch.setenv("no_proxy", "*")
        (tmp_path / "www").mkdir()

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(tmp_path / "www"))

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.server_close()

    def test_http(self, server, tmp_path):
        write_video(tmp_path / "www" / "v.mp4", FRAMES)
        stack(tmp_path / "www" / "s.webp", lossless=True, duration=40)
        for name in ("v.mp4?x=1#y", "s.webp"):
            source = open_source(f"{server}/{name}")
            assert len(list(source.forward(EVERY))) == 8
            assert source.title == f"{server}/{name}"

    def test_what_is_not_there(self, server):
        with pytest.raises(InputError, match=r"absent.mp4 cannot be read \(.*404.*\)"):
            open_source(f"{server}/absent.mp4")

    def test_files(self, tmp_path):
        path = write_video(tmp_path / "a b.mp4", FRAMES)
        assert len(list(open_source(path.as_uri()).forward(EVERY))) == 8

    @pytest.mark.parametrize(
        "url", ["rtsp://x/y", "ftp://x/y", "concat://a", "http://", "http://[::1", "https://127.0.0.1:1/x"]
    )
    def test_others_are_refused(self, url):
        with pytest.raises(InputError, match="cannot be read"):
            open_source(url)


class TestIterators:
    def test_frames_come_as_they_are_asked_for(self):
        made = []

        def frames():
            for index, frame in enumerate(FRAMES):
                made.append(index)
                yield torch.from_numpy(frame)

        source = FrameStream(frames(), range(100))
        run = source.forward(range(2, 100))
        assert next(run).index == 2 and made == [0, 1, 2]
        assert [f.index for f in run] == [3, 4, 5, 6, 7]
        assert [f.index for f in source.backward([2, 1, 0])] == [2, 1, 0]

    def test_only_frames_that_are_wanted_are_kept(self):
        source = FrameStream(iter(FRAMES), range(1, 100, 2))
        assert [f.index for f in source.forward(range(5, 100, 2))] == [5, 7]
        assert sorted(source._kept) == [1, 3, 5]

    def test_another_size_ends_them(self):
        source = FrameStream(iter([*FRAMES[:2], FRAMES[2][:20]]), range(100))
        assert len(list(source.forward(range(100)))) == 2
        assert "frame 2 is 64x20, but the first is 64x48" in source.problem

    def test_wrong_frames_and_none(self):
        with pytest.raises(InputError, match="empty"):
            FrameStream(iter([]), range(9))
        with pytest.raises(InputError, match="by 255"):
            FrameStream(iter([FRAMES[0] / 255]), range(9))
        source = FrameStream(iter([FRAMES[0], FRAMES[1] / 255]), range(9))
        with pytest.raises(InputError, match="frame 1 must be"):
            list(source.forward(range(9)))

    @pytest.mark.parametrize("at", [0, 3])
    def test_segment_gives_what_it_gives_for_a_list(self, at):
        def run(frames):
            return {
                frame.index: frame.labels
                for frame in vosops.segment(frames, {at: truth(BOXES[at])}, model=ColourTracker(), size=48)
            }

        expected, got = run(FRAMES), run(iter(FRAMES))
        assert sorted(got) == list(range(8))
        assert all(torch.equal(got[i], expected[i]) for i in got)

    def test_errors_of_the_iterator_reach_the_caller(self):
        def frames():
            yield FRAMES[0]
            yield FRAMES[1]
            raise RuntimeError("camera unplugged")

        with pytest.raises(RuntimeError, match="unplugged"):
            list(vosops.segment(frames(), truth(BOXES[0]), model=ColourTracker(), size=48))

    @pytest.mark.parametrize(
        "video", [3, None, {0: FRAMES[0]}, {1, 2}, np.array(3), torch.tensor(3), b"x", [], FRAMES[0]]
    )
    def test_what_is_no_video(self, video):
        with pytest.raises(InputError, match="video must be|frames must be|is empty"):
            next(vosops.segment(video, truth(BOXES[0]), model=ColourTracker()))

    def test_an_array_of_another_dtype_later_on(self):
        frames = [*FRAMES[:3], FRAMES[3] / 255]
        with pytest.raises((InputError, IncompleteInputError), match="frame 3 must be"):
            list(vosops.segment(frames, truth(BOXES[0]), model=ColourTracker(), size=48))


class TestSharedMemory:
    """The caller may reuse the arrays that it gives, and change those that it gets."""

    @staticmethod
    def labels(video, change=lambda frame: None, at=3, size=48):
        found = {}
        mask = truth(BOXES[at])
        for frame in vosops.segment(video, {at: mask}, model=ColourTracker(), size=size):
            found[frame.index] = frame.labels.clone()
            mask[:] = 7
            change(frame)
        return found

    @staticmethod
    def reusing():
        buffer = np.empty_like(FRAMES[0])
        for frame in FRAMES:
            buffer[:] = frame
            yield buffer

    def same(self, got):
        expected = self.labels([frame.copy() for frame in FRAMES])
        assert sorted(got) == sorted(expected)
        assert all(torch.equal(got[i], expected[i]) for i in got)

    def test_one_array_for_all_frames(self):
        self.same(self.labels(self.reusing()))

    @pytest.mark.parametrize("kind", ["array", "tensor", "read-only", "list", "iterator"])
    def test_drawing_on_what_comes(self, kind, recwarn):
        given = np.stack(FRAMES)
        given.setflags(write=kind != "read-only")
        video = {"tensor": torch.from_numpy(given.copy()), "list": list(given), "iterator": iter(given)}.get(
            kind, given
        )
        self.same(self.labels(video, lambda frame: frame.image.zero_()))
        np.testing.assert_array_equal(given, np.stack(FRAMES))
        if kind == "tensor":
            np.testing.assert_array_equal(video.numpy(), given)
        assert not recwarn.list


class TestOrder:
    @staticmethod
    def names(tmp_path, *stems):
        for stem in stems:
            write_folder(tmp_path, FRAMES[:1], name=f"{stem}.png")
        return [f.name for f in open_source(tmp_path).forward(EVERY)]

    def test_no_doubt(self, tmp_path, recwarn):
        assert self.names(tmp_path, "a10_x", "a9_y", "a01") == ["a01", "a9_y", "a10_x"]
        assert not recwarn.list

    @pytest.mark.parametrize(
        ("stems", "order"),
        [
            (("0.5", "0.25", "1"), ["0.25", "0.5", "1"]),
            (("-2", "-1", "0", "1"), ["-2", "-1", "0", "1"]),
            (("frame2", "img1", "frame1"), ["frame1", "frame2", "img1"]),
            (("1", "01", "2"), None),
        ],
    )
    def test_doubt(self, tmp_path, stems, order):
        with pytest.warns(InputWarning, match="order of the frames in .* is doubtful"):
            names = self.names(tmp_path, *stems)
        assert order is None or names == order


def test_an_empty_frame_is_refused_before_the_work(tmp_path):
    write_folder(tmp_path, FRAMES[:3])
    (tmp_path / "00002.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"00002.png is an empty file"):
        open_source(tmp_path)
