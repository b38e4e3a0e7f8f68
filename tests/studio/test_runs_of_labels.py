"""Label maps as runs: the form in which they travel."""

import numpy as np
import pytest

from vosops.io.errors import InputError
from vosops.studio import runs_of_labels


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 60)])
def test_a_label_map_comes_back(shape):
    labels = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    assert (runs_of_labels.decode(runs_of_labels.encode(labels), shape) == labels).all()


def test_the_words_are_those_that_the_page_reads():
    labels = np.array([[0, 0, 7], [7, 7, 254]], np.uint8)
    words = np.frombuffer(runs_of_labels.encode(labels), "<u4")
    assert [(int(w >> 24), int(w & 0xFFFFFF)) for w in words] == [(0, 2), (7, 3), (254, 1)]


def test_a_run_longer_than_a_word_holds_is_several():
    labels = np.zeros((5000, 4000), np.uint8)
    labels[-1, -1] = 3
    data = runs_of_labels.encode(labels)
    assert len(data) == 3 * 4
    assert (runs_of_labels.decode(data, labels.shape) == labels).all()


def test_a_mask_is_0_and_1():
    mask = np.array([[True, False]])
    assert runs_of_labels.decode(runs_of_labels.encode(mask), (1, 2)).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("data", "what"), [(b"abc", "whole words"), (b"\x05\0\0\0", "must cover 6 pixels, got 5"), (b"", "got 0")]
)
def test_what_does_not_fill_the_map_is_refused(data, what):
    with pytest.raises(InputError, match=what):
        runs_of_labels.decode(data, (2, 3))
