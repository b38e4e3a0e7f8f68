"""A server that is killed while it works, and started again."""

import re

import numpy as np
import pytest

from tests import clips
from tests.studio.browser.memory import until
from tests.studio.browser.servers import ended, started

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(900)]

SIZE, COUNT = (240, 320), 80
BOX = (60, 90, 100, 110)  # top, left, height, width of the object on the first frame


def test_a_killed_server_goes_on_where_its_checkpoint_is(page, tmp_path):
    top, left, height, width = BOX
    boxes = [{1: (top, left + t, height, width)} for t in range(COUNT)]
    folder = clips.write_folder(tmp_path / "clip", [clips.picture(b, SIZE) for b in boxes])
    server, address = started(folder, tmp_path / "work", "--size", "240")
    page.goto(address)
    page.locator('.stage[data-busy="0"]').wait_for()
    stage = page.locator(".stage canvas").bounding_box()
    scale = min(stage["width"] / SIZE[1], stage["height"] / SIZE[0]) * 0.98
    page.keyboard.press("p")
    for x, y in ((0, 0), (width, 0), (width, height), (0, height)):
        page.mouse.click(
            stage["x"] + (stage["width"] - SIZE[1] * scale) / 2 + (left + x) * scale,
            stage["y"] + (stage["height"] - SIZE[0] * scale) / 2 + (top + y) * scale,
        )
    page.keyboard.press("Enter")
    page.locator('.stage[data-busy="0"]').wait_for()
    page.get_by_role("button", name="Follow through the video").click()
    until(page, "document.querySelector('progress')?.value > 0.7", seconds=600)
    server.kill()
    server.wait()
    page.get_by_text("The server does not answer").wait_for()

    server, address = started(folder, tmp_path / "work", "--size", "240")
    try:
        page.goto(address)
        page.get_by_text("paused: the server ended").wait_for()
        page.get_by_role("button", name="Continue").click()
        page.get_by_text(re.compile(f"Finished: {COUNT} frames")).wait_for(timeout=600_000)
    finally:
        ended(server)
    [run] = (tmp_path / "work").glob("projects/*/runs/*")
    masks = [clips.read_png(path) for path in sorted(run.glob("*.png"))]
    assert len(masks) == COUNT
    for mask, box in zip(masks, boxes):
        assert np.mean(mask == clips.truth(box, SIZE)) > 0.97
