"""The page as a person uses it: by mouse and keyboard, from a clip without a mask to files."""

from __future__ import annotations

import io
import itertools
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.studio.browser.conftest import FRAMES
from vosops.metrics import boundary_accuracy, region_similarity

pytestmark = pytest.mark.timeout(300)

# Corners around two objects on the first frame, as somebody clicks them who looks at it; no truth is in them.
# fmt: off
ASTRONAUT = (
    (233, 479), (232, 446), (233, 411), (239, 378), (246, 352), (258, 323), (276, 308), (294,
    295), (295, 276), (300, 261), (311, 251), (326, 245), (340, 243), (337, 230), (330, 221),
    (321, 208), (317, 191), (320, 173), (330, 161), (346, 150), (367, 144), (387, 145), (408,
    154), (421, 167), (428, 185), (426, 202), (421, 217), (412, 230), (405, 240), (401, 253),
    (400, 262), (414, 270), (428, 284), (436, 302), (438, 309), (452, 314), (463, 326), (472,
    346), (480, 375), (482, 386), (499, 381), (519, 380), (540, 386), (557, 398), (572, 414),
    (582, 434), (587, 458), (592, 465), (595, 479),
)
CUP = (
    (23, 305), (26, 284), (35, 267), (47, 255), (54, 249), (55, 240), (60, 230), (70, 223), (88,
    218), (109, 216), (129, 219), (145, 225), (151, 225), (158, 228), (160, 239), (161, 245),
    (176, 253), (189, 267), (198, 284), (201, 302), (198, 323), (189, 340), (176, 355), (158,
    367), (138, 374), (114, 377), (91, 374), (67, 362), (47, 346), (32, 327),
)
# fmt: on
CUP_BOX = (21, 213, 204, 380)


def open_clip(page, address):
    page.goto(address)
    page.get_by_role("button", name="Brush").wait_for()
    settled(page)


def settled(page):
    """Waits until the frame is shown and what was drawn on it is saved."""
    page.locator('.stage[data-busy="0"]').wait_for()


def at(page, x, y):
    """Where a pixel of the frame is on the page, when the frame fits its stage."""
    box = page.locator(".stage canvas").bounding_box()
    scale = min(box["width"] / 854, box["height"] / 480) * 0.98
    return (
        box["x"] + (box["width"] - 854 * scale) / 2 + x * scale,
        box["y"] + (box["height"] - 480 * scale) / 2 + y * scale,
    )


def polygon(page, corners):
    page.keyboard.press("p")
    for x, y in corners:
        page.mouse.click(*at(page, x, y))
    page.keyboard.press("Enter")


def drag(page, *points):
    page.mouse.move(*at(page, *points[0]))
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*at(page, *point), steps=8)
    page.mouse.up()


def go_to(page, frame):
    """By the keyboard, from the first frame."""
    page.keyboard.press("Home")
    for _ in range(frame):
        page.keyboard.press("ArrowRight")
        settled(page)


def exported(page, kind):
    """The file that the page hands out."""
    page.get_by_label("Kind of file").select_option(kind)
    before = page.locator(".files a").count()
    page.get_by_role("button", name="Export").click()
    page.locator(".files a").nth(before).wait_for()
    with page.expect_download() as download:
        page.locator(".files a").first.click()
    return download.value.path()


def masks_of(path):
    with zipfile.ZipFile(path) as archive:
        return [np.array(Image.open(io.BytesIO(archive.read(name)))) for name in sorted(archive.namelist())]


def score(masks, truth, object_id, true_id):
    """Mean J&F of an object over the frames behind the first."""
    pairs = [
        (found == object_id, real == true_id) for found, real in itertools.islice(zip(masks, truth), 1, None)
    ]
    return np.mean([(region_similarity(a, b) + boundary_accuracy(a, b)) / 2 for a, b in pairs])


def test_from_a_clip_without_a_mask_to_files(page, address, clip, screenshot):
    open_clip(page, address)
    page.get_by_label("Name of object 1").fill("astronaut")
    page.get_by_label("Name of object 1").press("Enter")
    polygon(page, ASTRONAUT)
    page.get_by_role("button", name="Add an object").click()
    page.get_by_label("Name of object 2").wait_for()
    polygon(page, CUP)
    screenshot("mark")

    page.get_by_role("button", name="Follow through the video").click()
    page.get_by_role("button", name="Pause").wait_for()
    while page.locator("progress").evaluate("bar => bar.value") < 0.25:
        page.wait_for_timeout(50)
    page.reload()  # closing the page loses nothing
    page.get_by_text("Take back the latest result").wait_for()
    settled(page)
    assert page.get_by_label("Name of object 1").input_value() == "astronaut"
    page.keyboard.press("End")
    settled(page)
    screenshot("followed")

    masks = masks_of(exported(page, "masks"))
    assert len(masks) == FRAMES
    for object_id, true_id in ((1, 1), (2, 3)):
        assert score(masks, clip[1], object_id, true_id) >= 0.9
    assert exported(page, "overlay").stat().st_size > 10_000


def test_correcting_a_frame_and_going_on_from_there(page, address, screenshot):
    open_clip(page, address)
    go_to(page, 6)
    page.keyboard.press("2")
    before = mark_of(page, 6, "shown")
    assert (before == 2).any()
    page.keyboard.press("b")
    drag(page, (700, 400), (780, 430))
    marked = mark_of(page, 6, "mark")
    assert (marked == 2).sum() > (before == 2).sum() + 500
    page.keyboard.press("Control+z")
    page.get_by_text("confidence").first.wait_for()
    assert mark_of(page, 6, "mark") is None
    page.keyboard.press("Control+Shift+z")
    page.get_by_text("marked by you").wait_for()
    assert (mark_of(page, 6, "mark") == marked).all()
    page.keyboard.press("e")
    drag(page, (690, 390), (800, 440))
    assert (mark_of(page, 6, "mark") == 2).sum() < (marked == 2).sum()

    page.get_by_role("button", name="Forward from here").click()
    page.get_by_text("Finished:").wait_for()
    page.get_by_label("Compare with before").check()
    settled(page)
    page.get_by_text("white: the result before").wait_for()
    screenshot("compare")
    page.get_by_label("Compare with before").uncheck()
    go_to(page, 6)
    page.get_by_role("button", name="Clear this frame").click()
    page.get_by_text("Clear this frame").wait_for(state="detached")


def mark_of(page, frame, layer):
    """The labels that the server has of a frame, once it has those of the page."""
    settled(page)
    words = page.evaluate(
        """async ([frame, layer]) => {
            const token = new URLSearchParams(location.search).get("token");
            const id = location.hash.slice(1);
            const answer = await fetch(`api/projects/${id}/frames/${frame}/labels/${layer}`,
                                       {headers: {"x-vosops-token": token}});
            return answer.status === 204 ? null : [...new Uint32Array(await answer.arrayBuffer())];
        }""",
        [frame, layer],
    )
    if words is None:
        return None
    words = np.array(words, np.uint64)
    return np.repeat((words >> 24).astype(np.uint8), (words & 0xFFFFFF).astype(int)).reshape(480, 854)


def test_a_box_finds_an_object(page, address, clip, screenshot):
    open_clip(page, address)
    page.keyboard.press("Home")
    settled(page)
    page.get_by_role("button", name="Add an object").click()
    page.get_by_label("Name of object 3").wait_for()
    page.keyboard.press("g")
    left, top, right, bottom = CUP_BOX
    drag(page, (left, top), (right, bottom))
    page.wait_for_timeout(200)
    found = mark_of(page, 0, "mark") == 3
    real = clip[1][0] == 3
    assert (found & real).sum() / (found | real).sum() > 0.8
    screenshot("box")
    page.keyboard.press("Control+z")
    settled(page)


def test_an_outline_is_filled_and_an_open_one_is_not(page, address):
    open_clip(page, address)
    page.keyboard.press("End")
    settled(page)
    page.get_by_role("button", name="Take back the latest result").click()
    page.get_by_role("button", name="Brush").click()
    page.keyboard.press("1")
    drag(page, (300, 60), (380, 60), (380, 120), (300, 120), (300, 60))
    page.keyboard.press("f")
    page.mouse.click(*at(page, 340, 90))
    filled = mark_of(page, FRAMES - 1, "mark")
    assert (filled[58:122, 298:382] == 1).all()
    page.mouse.click(*at(page, 600, 20))
    page.get_by_text("The outline is open").wait_for()
    assert (mark_of(page, FRAMES - 1, "mark") == filled).all()
    for _ in range(2):
        page.keyboard.press("Control+z")
    settled(page)


def test_zooming_and_moving_keeps_the_brush_on_the_pixels(page, address):
    open_clip(page, address)
    page.keyboard.press("Home")
    settled(page)
    before = mark_of(page, 0, "shown")
    x, y = at(page, 760, 440)
    page.mouse.move(x, y)
    for _ in range(6):
        page.mouse.wheel(0, -240)
    page.keyboard.press("1")
    page.keyboard.press("b")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.up()
    changed = np.argwhere(mark_of(page, 0, "mark") != before)
    assert len(changed)
    assert np.abs(changed.mean(0) - (440, 760)).max() < 1.5
    page.keyboard.press("Control+z")
    settled(page)


def test_another_tab_shows_what_one_draws(page, address):
    open_clip(page, address)
    page.keyboard.press("Home")
    settled(page)
    other = page.context.new_page()
    open_clip(other, address)
    other.keyboard.press("Home")
    settled(other)
    picture = other.locator(".stage canvas").screenshot()
    other.bring_to_front()
    page.keyboard.press("1")
    drag(page, (700, 60), (780, 90))
    marked = mark_of(page, 0, "mark")
    for _ in range(100):
        if other.locator(".stage canvas").screenshot() != picture:
            break
        other.wait_for_timeout(50)
    drag(other, (700, 150), (780, 180))  # on top of the first tab's stroke, not instead of it
    both = mark_of(other, 0, "mark")
    assert (both[marked > 0] == marked[marked > 0]).all()
    assert (both[140:190, 690:790] == 1).sum() > (marked[140:190, 690:790] == 1).sum()
    other.keyboard.press("Control+z")
    settled(other)
    other.close()
    page.keyboard.press("Control+z")
    settled(page)


def test_choosing_a_tool_keeps_what_one_has_zoomed_to(page, address):
    page.set_viewport_size({"width": 1024, "height": 700})  # where the header has one line or two
    open_clip(page, address)
    page.keyboard.press("b")
    page.mouse.move(*at(page, 300, 200))
    page.mouse.wheel(0, -600)
    page.keyboard.press("p")
    page.get_by_text("Click around the object").wait_for()
    page.keyboard.press("b")
    box = page.locator(".stage canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    zoomed = dab(page, middle)
    page.keyboard.press("0")
    assert np.abs(dab(page, middle) - (240, 427)).max() < 3
    assert np.abs(zoomed - (240, 427)).max() > 50


def dab(page, place):
    """Where the brush paints on the frame when one clicks on a place of the page; it is taken back."""
    before = mark_of(page, 0, "shown")
    page.keyboard.press("2")  # if there is a second object: what is of the first one already would not change
    page.mouse.click(*place)
    after = mark_of(page, 0, "mark")
    page.keyboard.press("Control+z")
    settled(page)
    return np.argwhere(after != (0 if before is None else before)).mean(0)


def test_wrong_files_are_said_in_one_line(page, address, tmp_path, screenshot):
    page.goto(address.partition("#")[0])
    page.get_by_role("button", name="Choose a video").wait_for()
    screenshot("start")
    letter = tmp_path / "letter.mp4"
    letter.write_text("dear reader")
    page.get_by_label("Video").set_input_files(letter)
    said = page.get_by_role("alert").inner_text()
    assert "letter.mp4" in said
    assert "\n" not in said

    page.locator(".known button").first.click()
    page.get_by_role("button", name="Brush").wait_for()
    settled(page)
    drop(page, "notes.txt", b"no mask", "text/plain")
    page.get_by_text("notes.txt is not a mask").wait_for()
    drop(page, "small.png", png_of(np.ones((4, 4), np.uint8)), "image/png")
    page.get_by_text("mask small.png is 4x4, but the frames are 854x480").wait_for()


def test_a_dropped_mask_is_the_frames(page, address, clip):
    open_clip(page, address)
    page.keyboard.press("End")
    settled(page)
    drop(page, "given.png", png_of(clip[1][FRAMES - 1]), "image/png")
    page.get_by_text("given.png is the mask of frame").wait_for()
    assert (mark_of(page, FRAMES - 1, "mark") == clip[1][FRAMES - 1]).all()
    page.keyboard.press("Control+z")
    settled(page)


def png_of(labels):
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, format="PNG")
    return buffer.getvalue()


def drop(page, name, content, kind):
    page.evaluate(
        """([name, bytes, type]) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], name, {type}));
            dispatchEvent(new DragEvent("drop", {dataTransfer: files, cancelable: true}));
        }""",
        [name, list(content), kind],
    )


def test_without_the_token_the_page_says_what_to_do(page, address):
    page.goto(address.partition("?")[0])
    assert "the token is missing or wrong" in page.get_by_role("alert").inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_names_roles_and_contrast(page, address, theme):
    """axe finds nothing to object to, on either page."""
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=theme)
    for where in (address.partition("#")[0], address):
        page.goto("about:blank")
        page.goto(where)
        page.get_by_role("button", name="Choose a video" if "#" not in where else "Brush").wait_for()
        found = Axe().run(page).response["violations"]
        assert not [(entry["id"], [node["html"] for node in entry["nodes"]]) for entry in found]


@pytest.mark.parametrize(("name", "width", "height"), [("small", 1024, 700), ("phone", 390, 844)])
def test_narrow_pages_show_everything(page, address, screenshot, name, width, height):
    page.set_viewport_size({"width": width, "height": height})
    open_clip(page, address)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for button in ("Brush", "Follow through the video", "Export"):
        control = page.get_by_role("button", name=button)
        control.scroll_into_view_if_needed()
        box = control.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    page.get_by_role("button", name="Brush").scroll_into_view_if_needed()
    page.evaluate("() => [window, document.querySelector('.side')].forEach((part) => part.scrollTo(0, 0))")
    screenshot(name)
