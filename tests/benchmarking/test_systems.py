"""What whole networks cost: the cases, one small measurement, limits, and where 4 GB is predicted to be."""

from __future__ import annotations

import sys

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


@pytest.mark.parametrize(("quadratic", "growth"), [(False, 0.0), (True, 0.4)])
def test_predicts_where_the_goal_is_reached(quadratic, growth):
    def peak(height: int) -> int:
        megapixels = height * systems._of_height(SMALL, height).size[1] / 1e6
        return int(1e9 * (0.7 + 1.1 * megapixels + growth * megapixels**2))

    points = [(h * systems._of_height(SMALL, h).size[1], peak(h)) for h in (240, 360, 480)]
    height = systems._predict(points, 4 * 10**9, quadratic=quadratic)
    assert height % 16 == 0
    assert peak(height) <= 4e9 < peak(height + 32)
