"""Sixteen sessions in one process for minutes: memory stays flat, and a poisoned stream harms no other."""

from __future__ import annotations

import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.clips import moving, picture, truth
from vosops import Session
from vosops.io.errors import InputError
from vosops.models import create_model

SESSIONS = 16
POISONED = (3, 11)  # one of these gets NaN, the other changes its size
EVERY = 2  # frames between two that are poisoned
SECONDS = float(os.environ.get("VOSOPS_LOAD_SECONDS", "300"))
GROWTH = 16 << 20  # bytes that the process may grow from the first third to the last
SIZE = (96, 128)
BOXES = moving(40, ids=(1, 2), size=SIZE)


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Stream:
    """A session with its frames, which come around again, and how long each took."""

    def __init__(self, number, network):
        self.number = number
        self.session = Session(network, size=-1, device="cpu", memory_budget="4MB")
        self.frames = [picture(boxes, SIZE) for boxes in BOXES]
        self.milliseconds = []
        self.refused = 0
        self.count = 0

    def push(self):
        if self.number in POISONED and self.count % EVERY == EVERY - 1 and self.session.index >= 0:
            broken = (
                np.full((*SIZE, 3), np.nan, np.float32)
                if self.number == POISONED[0]
                else np.zeros((64, 64, 3), np.uint8)
            )
            with pytest.raises(InputError):
                self.session.push(broken)
            self.refused += 1
        began = time.monotonic()
        labels = truth(BOXES[0], SIZE) if self.session.index < 0 else None
        found = self.session.push(self.frames[self.count % len(BOXES)], labels)
        self.milliseconds.append(1000 * (time.monotonic() - began))
        self.count += 1
        return found


@pytest.mark.exhaustive
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_sixteen_sessions(one_thread, tmp_path):
    network = create_model("stm").eval()
    streams = [Stream(number, network) for number in range(SESSIONS)]
    alone = Stream(SESSIONS, network)
    expected = [alone.push().labels for _ in range(3)]
    first = {stream.number: [] for stream in streams}

    def turn(stream):
        found = stream.push()
        if stream.count <= len(expected):
            first[stream.number].append(found.labels)

    memory = []
    until = time.monotonic() + SECONDS
    with ThreadPoolExecutor(2) as pool:
        while time.monotonic() < until:
            list(pool.map(turn, streams))
            memory.append(resident())
    assert all(stream.count == streams[0].count for stream in streams)
    for labels in first.values():  # each is what a session alone gives, the poisoned ones too
        assert all(torch.equal(a, b) for a, b in zip(labels, expected, strict=False))
    assert streams[0].count > EVERY
    assert all((stream.refused > 0) == (stream.number in POISONED) for stream in streams)
    third = len(memory) // 3
    assert max(memory[-third:]) - max(memory[third : 2 * third]) < GROWTH
    times = sorted(t for stream in streams for t in stream.milliseconds)
    report = {
        "sessions": SESSIONS,
        "seconds": SECONDS,
        "frames": len(times),
        "p50_ms": round(statistics.median(times), 1),
        "p99_ms": round(times[len(times) * 99 // 100], 1),
        "resident_mib": [round(m / (1 << 20)) for m in (memory[third], memory[-1])],
    }
    print("\n" + json.dumps(report))
