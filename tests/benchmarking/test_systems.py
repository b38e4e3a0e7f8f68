"""What whole networks cost: the cases, one small measurement, limits, and where 4 GB is predicted to be."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from vosops.benchmarking import systems
from vosops.benchmarking.systems import CASES, FITS, NETWORKS, Case, Measurement
from vosops.models import list_models

SMALL = Case("stm", "small", (32, 48), objects=2, frames=3)


def test_every_network_has_its_cases():
    assert set(NETWORKS) <= set(list_models())
    for network in NETWORKS:
        assert {f"{network}-{label}" for label in ("480p", "1080p", "4K")} <= set(CASES)
        assert f"{network}-fits" in FITS
    assert CASES["stm-1080p"].size == (1080, 1920)
    assert (CASES["stm-1080p"].objects, CASES["stm-1080p"].frames) == (3, 20)


@pytest.mark.parametrize("naive", [False, True])
def test_a_step_is_measured_with_the_memory_filled(naive, monkeypatch):
    found = Measurement(SMALL, naive, **systems._measure(SMALL, naive, 1, None))
    assert found.failure is None and found.seconds > 0
    assert found.memory >= SMALL.objects * SMALL.frames * 4 * (128 + 512) * 2 * 3
    assert found.peak > found.memory
    assert Measurement.from_dict(found.to_dict()) == found


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux")
def test_what_needs_more_than_the_limit_says_so():
    found = systems.measure(SMALL, naive=True, threads=1, limit=100_000_000)  # the weights are more
    assert found.failure == "more than 0.1 GB" and found.peak is None


@pytest.mark.parametrize("growth", [0.0, 0.4, 12.0, 60.0])
@pytest.mark.parametrize("visible", [1.0, 2.0])
def test_finds_the_largest_that_fits(growth, visible, monkeypatch):
    """Peaks that grow as a line and as the square of the pixels; beyond `visible` times the goal no peak is seen."""
    goal, tried = 4 * 10**9, []

    def peak(height: int) -> int:
        megapixels = height * systems._of_height(SMALL, height).size[1] / 1e6
        return int(1e9 * (0.7 + 1.1 * megapixels + growth * megapixels**2))

    def measure(case: Case, *, naive: bool, threads: int, limit: int) -> Measurement:
        tried.append(case.size[0])
        needed = peak(case.size[0])
        return (
            Measurement(case, naive, 1.0, needed, 0) if needed <= visible * goal else Measurement(case, naive)
        )

    monkeypatch.setattr(systems, "measure", measure)
    found = systems.largest_that_fits(SMALL, naive=False, threads=1, goal=goal, note=lambda line: None)
    height = found.case.size[0]
    assert peak(height) == found.peak <= goal
    assert found.peak > 0.95 * goal or peak(height + 16) > goal
    assert len(tried) == len(set(tried)) <= 9


def test_says_so_where_not_even_the_smallest_fits(monkeypatch):
    monkeypatch.setattr(systems, "measure", lambda case, **options: Measurement(case, True, 1.0, 5 * 10**9))
    found = systems.largest_that_fits(SMALL, naive=True, threads=1, note=lambda line: None)
    assert found.peak is None and found.failure == "more than 4 GB at 240p"


def test_the_table_names_the_frugal_frame_first():
    sizes = {True: (304, 512), False: (1712, 3040)}
    found = [Measurement(replace(SMALL, size=size), naive, 1.0, 10**9) for naive, size in sizes.items()]
    assert "| 3040 x 1712 / 512 x 304 |" in systems.table(found)
    assert "| 3040 x 1712 / 512 x 304 |" in systems.table(found[::-1])
