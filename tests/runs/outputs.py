"""Runs with every output, and what lies in their folders."""

import json

from tests.clips import read_video
from vosops.io.outputs import PART_PREFIX
from vosops.runs.drawing_pass import Outputs
from vosops.runs.job import Settings

ALL = Outputs(overlay=True, cutout=True, coco=True)
SETTINGS = Settings(device="cpu", size=32)


def contents(out):
    """{relative path: content} of what a user sees, to compare runs by.

    The report goes without its times. The overlay is its pictures and their times, because the encoder does not
    always give the same bytes for the same pictures.
    """
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and ".vosops" not in path.parts and not path.name.startswith(PART_PREFIX):
            content = path.read_bytes()
            if path.name == "report.json":
                content = json.loads(content)
                for key in ("seconds", "peak_memory_mib"):
                    content.pop(key)
            if path.name == "overlay.mp4":
                content = [(time, picture.tobytes()) for time, picture in read_video(path)]
            found[str(path.relative_to(out))] = content
    return found


def parts(folder):
    """Temporary files that were left behind."""
    return list(folder.rglob(f"{PART_PREFIX}*"))
