"""The page holds no more however many frames it has shown; and a phone's video of ten minutes is worked on."""

import time

import av
import numpy as np
import pytest

from tests.studio.browser.memory import COUNTING, held, resident_of, until, walk
from tests.studio.browser.servers import ended, started
from tests.studio.phone import CODECS, skip_without, write_phone_video
from vosops.metrics import region_similarity

pytestmark = pytest.mark.timeout(3600)

MIB = 1 << 20
KEPT = 64 * MIB  # of decoded pictures, PICTURE_BYTES of studio/src/store.ts
PREVIEW = 960 * 540 * 4


def assert_flat(before, after, pictures, process):
    assert after.canvases == before.canvases
    assert max(before.pictures, after.pictures) <= pictures
    assert after.heap - before.heap < MIB
    assert after.process - before.process < process


def test_the_page_holds_no_more_after_many_frames(page, address, tmp_path):
    page.add_init_script(COUNTING)
    frames = (np.full((720, 1280, 3), 40 + i, np.uint8) for i in range(60))
    count = write_phone_video(tmp_path / "flat.mp4", frames, degrees=0, keyframe_every=12)
    page.goto(address.partition("#")[0])
    page.get_by_label("Video").set_input_files(tmp_path / "flat.mp4")
    page.get_by_role("button", name="Brush").wait_for()
    page.get_by_text(f"/ {count - 1}", exact=False).wait_for()
    most = KEPT // PREVIEW + 1
    walk(page, most + 8, 0, count - 1)
    before = held(page)
    assert before.pictures > most // 2
    walk(page, 40, 0, count - 1)
    assert_flat(before, held(page), most, process=48 * MIB)


# A phone's video: 4K upright, 24 frames a second, ten seconds that are encoded once and written sixty times.
RATE, SECONDS, TIMES = 24, 10, 60
HEIGHT, WIDTH = 3840, 2160
SIDE = 900


def corner(frame):
    """Top and left of the patch on a frame: it goes round."""
    angle = 2 * np.pi * frame / (RATE * SECONDS)
    return round(1500 + 600 * np.sin(angle)), round(600 + 400 * np.cos(angle))


def pictures():
    random = np.random.default_rng(0)

    def texture(height, width, low, high):
        coarse = random.integers(low, high, (height // 60, width // 60, 3), dtype=np.uint8)
        return coarse.repeat(60, 0).repeat(60, 1)

    ground, patch = texture(HEIGHT, WIDTH, 20, 90), texture(SIDE, SIDE, 150, 250)
    for frame in range(RATE * SECONDS):
        picture = ground.copy()
        top, left = corner(frame)
        picture[top : top + SIDE, left : left + SIDE] = patch
        yield picture


@pytest.mark.exhaustive
@pytest.mark.parametrize("codec", CODECS)
def test_ten_minutes_of_a_phone_in_4k(page, tmp_path, codec):
    skip_without(codec)
    video = tmp_path / "phone.mp4"
    count = write_phone_video(video, pictures(), rate=RATE, codec=codec, times=TIMES)
    with av.open(str(video)) as container:
        begun = time.monotonic()
        for _, _ in zip(range(RATE * SECONDS), container.decode(video=0)):
            pass
        ten_seconds = time.monotonic() - begun
    server, address = started(video, tmp_path / "work")
    try:
        page.add_init_script(COUNTING)
        begun = time.monotonic()
        page.goto(address)
        page.locator('.stage[data-busy="0"]').wait_for()
        opened = time.monotonic() - begun
        assert opened < ten_seconds  # to decode a sixtieth of it
        page.get_by_text(f"/ {count - 1}", exact=False).wait_for()
        until(page, "[...document.images].every(image => image.naturalWidth)", seconds=600)

        strip = page.locator(".strip").bounding_box()
        page.mouse.click(strip["x"] + strip["width"] / 2, strip["y"] + 20)
        page.locator('.stage[data-busy="0"]').wait_for()
        frame = int(page.locator(".where b").inner_text())
        assert abs(frame - count // 2) <= count / strip["width"] + 1
        top, left = corner(frame)
        stage = page.locator(".stage canvas").bounding_box()
        scale = min(stage["width"] / WIDTH, stage["height"] / HEIGHT) * 0.98
        page.keyboard.press("p")
        for x, y in ((0, 0), (SIDE, 0), (SIDE, SIDE), (0, SIDE)):
            page.mouse.click(
                stage["x"] + (stage["width"] - WIDTH * scale) / 2 + (left + x) * scale,
                stage["y"] + (stage["height"] - HEIGHT * scale) / 2 + (top + y) * scale,
            )
        page.keyboard.press("Enter")
        page.locator('.stage[data-busy="0"]').wait_for()

        length = 40
        page.get_by_label("up to frame").fill(str(frame + length))
        page.get_by_role("button", name="Forward from here").click()
        page.get_by_role("button", name="Pause").wait_for()
        until(page, "document.querySelector('progress').value > 0.35", seconds=1200)
        early = resident_of(server.pid)
        page.get_by_text("Finished:").wait_for(timeout=1_800_000)
        late = resident_of(server.pid)
        assert late - early < 150 * MIB  # six decoded frames
        page.locator('.stage[data-busy="0"]').wait_for()

        here = int(page.locator(".where b").inner_text())
        walk(page, 40, here - 40, here)
        first, looked = held(page), resident_of(server.pid)
        walk(page, 300, here - 40, here + 20)
        second = held(page)
        assert_flat(first, second, KEPT // PREVIEW + 2, process=64 * MIB)
        assert resident_of(server.pid) - looked < 250 * MIB
    finally:
        ended(server)
    found = read_result(tmp_path / "work", frame + length)
    real = np.zeros((HEIGHT, WIDTH), bool)
    top, left = corner(frame + length)
    real[top : top + SIDE, left : left + SIDE] = True
    assert region_similarity(found, real) >= 0.9
    sizes = {
        "server": [early, late, looked],
        "heap": [first.heap, second.heap],
        "page": [first.process, second.process],
    }
    print(f"\n{codec}: opened in {opened:.1f} s (ten seconds decode in {ten_seconds:.1f} s)", end="")
    print(
        "".join(
            f"; {name} {', '.join(f'{x / MIB:.0f}' for x in values)} MiB" for name, values in sizes.items()
        )
    )


def read_result(work, frame):
    from vosops.io.labels import read_labels

    [path] = work.glob(f"projects/*/runs/0001/{frame:07d}.png")
    return read_labels(path)[0] == 1
