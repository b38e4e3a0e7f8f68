"""The size of the computation: what --size asks for, within a bound."""

import warnings

import pytest

from vosops.io.notes import InputWarning
from vosops.io.resize import NATIVE, bounded_size, computation_size

MOST = 4 << 20


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((1080, 1920), 480, (480, 864)),
        ((1920, 1080), 480, (864, 480)),
        ((480, 854), 480, (480, 854)),
        ((1080, 1920), NATIVE, (1080, 1920)),
        ((2160, 3840), 2160, (2160, 3840)),
        ((4320, 7680), NATIVE, (4320, 7680)),
    ],
)
def test_what_is_asked_for(size, short_side, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bounded_size(size, short_side) == expected


@pytest.mark.parametrize("size", [(40, 3000), (3000, 40), (1, 100_000), (480, 36_000), (16, 9000), (1, 1)])
@pytest.mark.parametrize("short_side", [16, 480, 1080])
def test_the_area_is_bounded(size, short_side):
    height, width = computation_size(size, short_side)
    assert height * width <= max(MOST, min(size[0] * size[1], 4 * short_side**2))
    assert height > 0 and width > 0 and (height <= width) == (size[0] <= size[1])


def test_a_strip_keeps_its_shape():
    height, width = computation_size((40, 3000), 480)
    assert height % 16 == width % 16 == 0
    assert width / height == pytest.approx(3000 / 40, rel=0.1)
    assert height * width > 0.8 * MOST


def test_enlarging_without_end_and_huge_frames_are_bounded():
    assert computation_size((1080, 1920), 10_000)[0] * 16 / 9 < 3000
    height, width = computation_size((20_000, 20_000), NATIVE)
    assert height * width <= 32 << 20


def test_the_user_is_told():
    with pytest.warns(
        InputWarning, match="frames of 3000x40 are computed at .*: 36000x480, as requested by --size"
    ):
        bounded_size((40, 3000), 480)
