"""`vosops studio` in a process of its own, and Chromium.

Without a browser these tests are skipped, unless VOSOPS_TEST_BROWSER=1 says that there must be one. VOSOPS_SCREENSHOTS
names a folder for the pictures that they make (`make studio-screenshots`).
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.studio.browser.servers import ended, started

NAMES = ("chromium", "chromium-browser", "google-chrome")
# The last: on a busy machine Chromium ends itself when it finds its process that draws slow a few times.
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-gpu-watchdog")
WIDTH, HEIGHT = 1360, 850
FRAMES = 10


def absent(reason: str) -> None:
    if os.environ.get("VOSOPS_TEST_BROWSER") == "1":
        pytest.fail(f"{reason}, and VOSOPS_TEST_BROWSER=1 says that there must be one")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    """Chromium; no longer than a module, since Playwright's event loop leaves no room for another in this thread."""
    for package in ("playwright", "starlette", "uvicorn", "cv2"):
        try:
            __import__(package)
        except ImportError:
            absent(f"no browser test: {package} is not installed (pip install 'vosops[studio,dev]')")
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        absent("no browser test: Chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The first frames of the demo clip, and its truth, which scores alone."""
    from vosops.data import DemoClip

    root = tmp_path_factory.mktemp("demo")
    clip, truth = DemoClip(60), []
    (root / "clip").mkdir()
    for index in range(FRAMES):
        frame, labels = clip[index]
        Image.fromarray(frame).save(root / "clip" / f"{index:05d}.jpg", quality=95)
        truth.append(labels)
    return root / "clip", truth


@pytest.fixture(scope="module")
def address(browser, clip, tmp_path_factory):
    """The URL that the command prints, of a server on the clip."""
    server, url = started(clip[0], tmp_path_factory.mktemp("work"))
    yield url
    ended(server)


@pytest.fixture
def page(browser):
    """A page that fails the test where it logs an error."""
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    troubles = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    yield page
    context.close()
    assert not troubles


@pytest.fixture
def screenshot(page, tmp_path):
    folder = Path(os.environ.get("VOSOPS_SCREENSHOTS") or tmp_path)

    def take(name: str) -> None:
        page.wait_for_timeout(150)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(folder / f"studio-{name}.png", optimize=True)

    return take
