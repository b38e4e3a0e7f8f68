"""What labels mean over a whole sequence."""

import numpy as np
import pytest

from vosops.io.annotations import annotation_style, values_of


@pytest.mark.parametrize(
    "values, first, binary",
    [
        ([{1}], 0, False),
        ([{255}, {255}], 0, True),
        ([set(), {255}, set()], 1, True),
        ([set(), set(), {3, 255}], 2, False),
        ([{255}, {255}, {1}], 2, False),
        ([{0, 255}, {0}, {0, 7}], 2, False),
        ([set(), {0}], None, False),
        ([], None, False),
    ],
)
def test_it_is_decided_over_the_sequence(values, first, binary):
    style = annotation_style(enumerate(values))
    assert (style.first, style.binary) == (first, binary)


def test_nothing_is_read_after_the_decision():
    def annotations():
        yield 0, {255}
        yield 1, {4}
        raise AssertionError("read on")

    assert annotation_style(annotations()).first == 1


def test_values_are_those_of_objects():
    assert values_of(np.array([[0, 3], [255, 3]], np.uint8)) == {3, 255}
    assert values_of(np.zeros((0, 4), np.uint8)) == set()
