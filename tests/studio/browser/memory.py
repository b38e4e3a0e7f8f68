"""What a page holds: its heap, its pictures and canvases, and the process that draws it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

# Counts canvases that are made, and decoded pictures that were not closed; both are outside of the JavaScript heap.
COUNTING = """
    window.held = {pictures: 0, canvases: 0};
    const decode = window.createImageBitmap;
    window.createImageBitmap = async (...given) => {
        const picture = await decode(...given);
        window.held.pictures++;
        return picture;
    };
    const close = ImageBitmap.prototype.close;
    ImageBitmap.prototype.close = function () {
        if (this.width) window.held.pictures--;
        close.call(this);
    };
    const make = document.createElement;
    document.createElement = function (name, ...rest) {
        if (name === "canvas") window.held.canvases++;
        return make.call(this, name, ...rest);
    };
"""

_STEP = """async ([frames, low, high]) => {
    const stage = () => document.querySelector(".stage").dataset.busy;
    const where = () => Number(document.querySelector(".where b").textContent);
    for (let i = 0, at = where(), by = 1; i < frames; i++) {
        if (at + by < low || at + by > high) by = -by;
        at += by;
        const key = by < 0 ? "ArrowLeft" : "ArrowRight";
        document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        do await new Promise(requestAnimationFrame); while (where() !== at || stage() !== "0");
    }
}"""


def until(page, expression, seconds=60):
    """Waits until a JavaScript expression holds; the page forbids the `eval` that Playwright's own waiting needs."""
    last = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < last, f"{expression} does not hold after {seconds} seconds"
        page.wait_for_timeout(100)


@dataclass
class Held:
    """heap: bytes of JavaScript's heap after a collection; process: bytes of the process that draws the page."""

    heap: int
    pictures: int
    canvases: int
    process: int


def walk(page, frames, low, high):
    """Shows this many frames one after the other by the arrow keys, to and fro between two frames."""
    page.evaluate(_STEP, [frames, low, high])


def held(page):
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    for _ in range(2):
        session.send("HeapProfiler.collectGarbage")
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    counts = page.evaluate("window.held")
    session.detach()
    return Held(int(metrics["JSHeapUsedSize"]), counts["pictures"], counts["canvases"], _of_renderers(page))


def _of_renderers(page):
    session = page.context.browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    return sum(resident_of(process["id"]) for process in processes if process["type"] == "renderer")


def resident_of(process):
    """Bytes of memory of a process; 0 where they cannot be seen."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
