"""COCO run-length encoding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vosops.io.rle import compress, counts, encode


def decode(rle):
    """The (H, W) mask of a compressed run-length encoding, read as the COCO API documents it."""
    height, width = rle["size"]
    runs, text, position = [], rle["counts"], 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[position]) - 48
            position += 1
            value |= (code & 0x1F) << shift
            shift += 5
            more = bool(code & 0x20)
            if not more and code & 0x10:
                value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    flat = np.concatenate([np.full(run, i % 2, bool) for i, run in enumerate(runs)])
    return flat.reshape(width, height).T


@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_decoding_gives_the_mask_back(mask):
    np.testing.assert_array_equal(decode(encode(mask)), mask)


def test_runs_go_down_the_columns_and_start_with_background():
    assert counts(np.array([[0, 1], [1, 1]], bool)) == [1, 3]
    assert counts(np.array([[1, 0], [0, 0]], bool)) == [0, 1, 3]


def test_long_runs_and_falling_differences_are_compressed():
    mask = np.zeros((1000, 1000), bool)
    mask[10:900, 3:997] = True
    mask[500, 500] = False
    np.testing.assert_array_equal(decode(encode(mask)), mask)


def test_strings_are_those_of_pycocotools():
    mask_utils = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    mask = np.random.default_rng(0).random((37, 53)) > 0.8
    expected = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode(mask) == {"size": expected["size"], "counts": expected["counts"].decode()}


@pytest.mark.parametrize(
    ("runs", "text"),
    [([5], "5"), ([0, 15], "0?"), ([16], "`0"), ([1, 2, 3, 4], "1232"), ([1, 2, 3, 1], "123O")],
)
def test_known_strings(runs, text):
    assert compress(runs) == text
