"""Somebody with a phone's video and no mask, on pages of three sizes: mark, follow, correct, look, take away."""

import re

import av
import numpy as np
import pytest

from tests.studio.browser.memory import until
from tests.studio.browser.servers import ended, started
from tests.studio.browser.test_page import ASTRONAUT, settled
from tests.studio.phone import write_phone_video

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(1800)]

COUNT = 24
LEFT, RIGHT, HEIGHT = 216, 600, 480  # of the demo clip, so that it stands upright


class Stage:
    """The frame on the page, by its own pixels."""

    def __init__(self, page):
        self.page = page

    def at(self, x, y):
        box = self.page.locator(".stage canvas").bounding_box()
        width = RIGHT - LEFT
        scale = min(box["width"] / width, box["height"] / HEIGHT) * 0.98
        return (
            box["x"] + (box["width"] - width * scale) / 2 + x * scale,
            box["y"] + (box["height"] - HEIGHT * scale) / 2 + y * scale,
        )

    def polygon(self, corners):
        self.page.keyboard.press("p")
        for x, y in corners:
            self.page.mouse.click(*self.at(x, y))
        self.page.keyboard.press("Enter")
        settled(self.page)


def go_to(page, frame):
    page.keyboard.press("Home")
    for _ in range(frame):
        page.keyboard.press("ArrowRight")
    page.locator(".where b").get_by_text(str(frame), exact=True).wait_for()
    settled(page)


def pictured(page, screenshot, name):
    """The page as it is, in each size and theme."""
    for size, (width, height) in {"wide": (1360, 850), "small": (1024, 700), "phone": (390, 844)}.items():
        page.set_viewport_size({"width": width, "height": height})
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            screenshot(f"newcomer-{name}-{size}-{theme}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 1360, "height": 850})


def test_from_a_phones_video_to_an_overlay(page, tmp_path, screenshot):
    from vosops.data import DemoClip

    clip = DemoClip(60)
    frames = (clip[index][0][:, LEFT:RIGHT] for index in range(COUNT))
    write_phone_video(tmp_path / "IMG_2041.mp4", frames)
    server, address = started(tmp_path / "IMG_2041.mp4", tmp_path / "work", "--size", "240")
    try:
        page.goto(address)
        settled(page)
        stage = Stage(page)
        stage.polygon([(x - LEFT, y) for x, y in ASTRONAUT])
        pictured(page, screenshot, "marked")

        page.get_by_role("button", name="Follow through the video").click()
        until(page, "document.querySelector('progress')?.value > 0.3", seconds=600)
        page.get_by_role("button", name="Pause").click()
        page.get_by_text("paused").wait_for()
        go_to(page, 3)
        stage.polygon([(20, 20), (120, 20), (120, 90), (20, 90)])
        pictured(page, screenshot, "paused")
        page.get_by_role("button", name="Continue").click()
        page.get_by_text("Frame 3 was corrected: it is followed again from there.").wait_for()
        page.get_by_text("Finished:").wait_for(timeout=600_000)
        folders = sorted((tmp_path / "work").glob("projects/*/runs/*"))
        assert [min(int(path.stem) for path in folder.glob("*.png")) for folder in folders] == [0, 3]

        go_to(page, 10)
        stage.polygon([(2, 2), (380, 2), (380, 478), (2, 478)])
        page.get_by_label("up to frame").fill("10")
        page.get_by_role("button", name="Forward from here").click()
        page.get_by_text("Finished: 1 frame,").wait_for(timeout=600_000)
        jump = page.locator(".look-here.size").first
        assert "look at frame 11: object 1 is suddenly at" in jump.get_attribute("title")
        go_to(page, 11)
        page.locator(".warning").get_by_text(re.compile("object 1 is suddenly at .* of its size")).wait_for()
        pictured(page, screenshot, "look")
        page.get_by_role("button", name="Take back the latest result").click()
        jump.wait_for(state="detached")
        go_to(page, 10)
        page.get_by_role("button", name="Clear this frame").click()
        page.get_by_text("marked by you").wait_for(state="detached")

        page.get_by_role("button", name="Export").click()
        with page.expect_download() as download:
            page.locator(".files a").first.click()
        with av.open(str(download.value.path())) as container:
            film = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert (len(film), film[0].shape[:2]) == (COUNT, (HEIGHT, RIGHT - LEFT))
        assert np.abs(film[-1].astype(int) - clip[COUNT - 1][0][:, LEFT:RIGHT]).mean() > 5  # it is tinted
        pictured(page, screenshot, "exported")
    finally:
        ended(server)
