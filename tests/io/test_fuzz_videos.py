"""Whatever is in a video file, its frames come until a problem of one line, or opening it is an InputError."""

import contextlib

import numpy as np
import pytest

from tests.clips import write_video
from tests.fuzz import damaged, examples
from vosops.io.datasets import find_sequences, open_source
from vosops.io.errors import InputError
from vosops.io.picture_stack import PictureStack

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FEW = 12
KINDS = {"v.mp4": "libx264", "v.mkv": "libx264", "v.avi": "mpeg4", "v.ts": "mpeg2video", "v.h264": "libx264"}


def survives(path, opener=open_source):
    try:
        source = opener(path)
    except InputError as error:
        assert "\n" not in str(error) and path.name in str(error)
        return
    frames = 0
    for frame in source.forward(range(40)):
        assert frame.image.shape == (*source.size, 3) and frame.image.dtype == np.uint8
        frames += 1
    assert source.problem is None or "\n" not in source.problem
    for _ in source.backward(range(frames - 1, -1, -3)):
        pass


@pytest.fixture(scope="module", params=KINDS)
def video(request, tmp_path_factory):
    noise = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("whole") / request.param
    rate = 25 if KINDS[request.param] == "mpeg2video" else 10
    return write_video(path, list(noise), codec=KINDS[request.param], rate=rate, lossless=False)


def test_damaged_files(video, tmp_path):
    path = tmp_path / video.name
    content = video.read_bytes()
    for number in range(examples(FEW)):
        path.write_bytes(damaged(content, number))
        try:
            survives(path)
        except BaseException:
            print(f"damaged({video.name}, {number})")
            raise


def test_damaged_stacks(tmp_path):
    from tests.io.test_fuzz_pictures import FILES

    for name in ("stack.tif", "f.gif"):
        for number in range(examples(FEW)):
            (tmp_path / name).write_bytes(damaged(FILES[name], number))
            survives(tmp_path / name, PictureStack)


@pytest.mark.parametrize("length", [0, 1, 100, 5000])
def test_random_bytes(tmp_path, length):
    for seed in range(examples(FEW) // 4 + 1):
        (tmp_path / "r.mp4").write_bytes(np.random.default_rng(seed).bytes(length))
        survives(tmp_path / "r.mp4")


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:9/x.ts", "../secret.txt", "/etc/hostname", "subfile,,start,0,end,9,,:x"]
)
def test_texts_that_name_other_files(tmp_path, kind, target):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "v.mp4"
    path.write_text(PLAYLISTS[kind].format(target))
    with pytest.raises(InputError):
        open_source(path)


@pytest.mark.parametrize(
    "name", ["../b", "/etc", "..", ".", "a/../../b", "", "\0", "a\nb", "~root", "C:\\x", "b" * 5000]
)
def test_names_of_sequences_lead_nowhere_else(tmp_path, name):
    for folder in ("ds/JPEGImages/a", "ds/Annotations/a", "b", "ds/b"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        find_sequences(tmp_path / "ds", [name])
    assert caught.value.exit_code == 2
    (tmp_path / "list.txt").write_bytes(b"a\n" + name.encode() + b"\n")
    with contextlib.suppress(InputError):
        assert [s.name for s in find_sequences(tmp_path / "ds", [str(tmp_path / "list.txt")])] == ["a"]
