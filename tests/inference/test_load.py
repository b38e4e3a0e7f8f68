"""Sixteen sessions in one process: memory stays flat, and a poisoned stream harms no other."""

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
THREADS = 2
POISONED = (3, 11)  # one of these gets NaN, the other changes its size
EVERY = 2  # frames between two that are poisoned
SECONDS = float(os.environ.get("VOSOPS_LOAD_SECONDS", "300"))
TURNS = 6  # of the short test
GROWTH = 16 << 20  # bytes that the process may grow from the first third to the last
SIZE = (96, 128)
BUDGET = 4_000_000
BOXES = moving(40, ids=(1, 2), size=SIZE)

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc"
)


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Stream:
    """A session with its frames, which come around again, what it made of them and how long each took."""

    def __init__(self, number, model):
        self.number = number
        self.session = Session(model, size=-1, device="cpu", memory_budget=BUDGET)
        self.given = truth(BOXES[0], SIZE)
        self.frames = [picture(boxes, SIZE) for boxes in BOXES]
        self.milliseconds = []
        self.labels = []
        self.refused = 0
        self.count = 0

    def push(self):
        if self.number in POISONED and self.count % EVERY == EVERY - 1:
            broken = (
                np.full((*SIZE, 3), np.nan, np.float32)
                if self.number == POISONED[0]
                else np.zeros((64, 64, 3), np.uint8)
            )
            with pytest.raises(InputError):
                self.session.push(broken)
            self.refused += 1
        began = time.monotonic()
        given = None if self.count else self.given
        found = self.session.push(self.frames[self.count % len(BOXES)], given)
        self.milliseconds.append(1000 * (time.monotonic() - began))
        if self.count < TURNS:
            self.labels.append(found.labels)
        self.count += 1


def together(streams, is_over):
    """Pushes a frame to each stream, turn after turn; the resident memory after each turn."""
    memory = []
    with ThreadPoolExecutor(THREADS) as pool:
        while not is_over(len(memory)):
            list(pool.map(Stream.push, streams))
            memory.append(resident())
    return memory


def check(streams, alone):
    """Asserts that each stream, the poisoned ones too, gave what a session alone gives."""
    assert all(stream.count == streams[0].count > EVERY for stream in streams)
    assert all((stream.refused > 0) == (stream.number in POISONED) for stream in streams)
    for stream in streams:
        assert all(torch.equal(a, b) for a, b in zip(stream.labels, alone.labels, strict=True))


def report_of(streams, memory, seconds):
    times = sorted(t for stream in streams for t in stream.milliseconds)
    return {
        "sessions": len(streams),
        "threads": THREADS,
        "seconds": round(seconds, 1),
        "frames": len(times),
        "frames_a_second": round(len(times) / seconds, 1),
        "p50_ms": round(statistics.median(times), 1),
        "p99_ms": round(times[len(times) * 99 // 100], 1),
        "resident_mib": [round(m / (1 << 20)) for m in (memory[len(memory) // 3], memory[-1])],
    }


@needs_proc
def test_a_poisoned_stream_harms_no_other(one_thread):
    alone = Stream(SESSIONS, "propagate")
    streams = [Stream(number, "propagate") for number in range(SESSIONS)]
    began = time.monotonic()
    memory = together(streams, lambda turns: turns == TURNS)
    report = report_of(streams, memory, time.monotonic() - began)
    for _ in range(TURNS):
        alone.push()
    check(streams, alone)
    assert len({tuple(labels.flatten().tolist()) for labels in alone.labels}) > 1  # the objects move
    assert report["frames"] == SESSIONS * TURNS and 0 < report["p50_ms"] <= report["p99_ms"]
    assert memory[-1] - memory[1] < SESSIONS * BUDGET + GROWTH


@pytest.mark.exhaustive
@pytest.mark.timeout(SECONDS + 300)
@needs_proc
def test_sixteen_sessions_for_minutes(one_thread, capsys):
    """Prints its report; VOSOPS_LOAD_SECONDS is how long (300), and the sessions share a network."""
    network = create_model("stm").eval()
    alone = Stream(SESSIONS, network)
    for _ in range(TURNS):
        alone.push()
    streams = [Stream(number, network) for number in range(SESSIONS)]
    began = time.monotonic()
    memory = together(streams, lambda turns: turns >= TURNS and time.monotonic() - began > SECONDS)
    report = report_of(streams, memory, time.monotonic() - began)
    check(streams, alone)
    third = len(memory) // 3
    assert max(memory[-third:]) - max(memory[third : 2 * third]) < GROWTH, report
    with capsys.disabled():
        print("\n" + json.dumps(report))
