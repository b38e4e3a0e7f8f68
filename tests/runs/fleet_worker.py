"""A worker of the tests of fleets: python -m tests.runs.fleet_worker ROOT OUT SHARD WHEN SECONDS

It kills itself by SIGKILL in the middle of writing its WHEN-th mask ("write"), between two frames after WHEN masks
("hold"), or never ("0"). WHEN is write:N, hold:N or 0. Frames take SECONDS.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from tests.clips import ColourTracker
from vosops.runs import job, run
from vosops.runs.fleet import Shard


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(root: str, out: str, shard: str, when: str, seconds: str) -> None:
    kind, _, count = when.partition(":")
    masks = 0
    write = run.write_labels

    class Slow(ColourTracker):
        def step(self, *args, **options):
            time.sleep(float(seconds))
            return super().step(*args, **options)

    def write_labels(file, labels, palette):
        nonlocal masks
        masks += 1
        if kind == "write" and masks == int(count):
            part = file.path.with_name(".vosops-part-0123456789abcdef")
            part.write_bytes(b"half of a mask")
            die()
        write(file, labels, palette)
        if kind == "hold" and masks == int(count):
            die()

    run.CHECKPOINT_EVERY = 2
    run.write_labels = write_labels
    job.make_tracker = lambda *args, **options: Slow()
    settings = job.Settings(size=-1, device="cpu")
    work = job.Job(Path(out), settings=settings, shard=Shard.parse(shard), steal=True, lease_seconds=3.0)
    work.dataset(Path(root))


if __name__ == "__main__":
    main(*sys.argv[1:])
