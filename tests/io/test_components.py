"""Connected parts of masks, against a flood fill."""

import numpy as np
import pytest

from vosops.io.components import connected_parts


def flood(mask):
    """The parts as sets of pixels, the largest first, then from the top and the left."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    parts = []
    while left:
        first = min(left)
        part, near = set(), [first]
        left.remove(first)
        while near:
            y, x = near.pop()
            part.add((y, x))
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= around
            near += around
        parts.append(part)
    return sorted(parts, key=lambda part: (-len(part), min(part)))


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (17, 23), (40, 40)])
def test_parts_are_those_of_a_flood_fill(size, share):
    mask = np.random.default_rng(0).random(size) < share
    found = connected_parts(mask)
    assert found.shape == size
    expected = np.zeros(size, int)
    for number, part in enumerate(flood(mask), 1):
        for pixel in part:
            expected[pixel] = number
    np.testing.assert_array_equal(found, expected)


def test_a_spiral_is_one_part():
    """Runs that meet again far from where they began."""
    mask = np.zeros((31, 31), bool)
    y, x, dy, dx = 0, 0, 0, 1
    mask[y, x] = True
    for length in [30, 30, 30, *sorted([*range(2, 30, 2)] * 2, reverse=True)]:
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = True
        dy, dx = dx, -dy
    found = connected_parts(mask)
    assert len(flood(mask)) == 1
    assert set(np.unique(found)) == {0, 1}


def test_nothing_and_everything():
    assert not connected_parts(np.zeros((3, 4), bool)).any()
    assert (connected_parts(np.ones((3, 4), bool)) == 1).all()
