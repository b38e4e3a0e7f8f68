"""What every tracker refuses: frames and labels that would be misread."""

import pytest
import torch

from vosops.models._tracking import check_first, check_frame

FRAME = torch.rand(3, 8, 10)
LABELS = torch.zeros(8, 10, dtype=torch.long)
LABELS[2:5, 3:7] = 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
def test_labels_of_any_integers(dtype):
    check_first(FRAME, LABELS.to(dtype))
    check_first((FRAME * 255).byte(), LABELS.to(dtype))
    check_first(FRAME.half() * 1.1 - 0.05, LABELS.to(dtype))


@pytest.mark.parametrize(
    ("frame", "error", "says"),
    [
        (FRAME * 255, ValueError, "not normalised"),
        ((FRAME - 0.5) / 0.2, ValueError, "not normalised"),
        ((FRAME * 65535).to(torch.uint16), TypeError, "divide by 65535"),
        ((FRAME * 255).long(), TypeError, "uint8 or floating"),
        (FRAME.numpy(), TypeError, "ndarray"),
        (FRAME.permute(1, 2, 0), ValueError, r"\(3,H,W\)"),
    ],
)
def test_frames_that_would_be_misread(frame, error, says):
    with pytest.raises(error, match=says):
        check_first(frame, LABELS)


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (LABELS.float(), TypeError, "integers"),
        (LABELS.to(torch.uint16), TypeError, r"labels\.long"),
        (LABELS - 1, ValueError, ">= 0"),
        (LABELS.numpy(), TypeError, "ndarray"),
        (LABELS[:4], ValueError, r"\(H,W\)"),
        (LABELS * 255, ValueError, "at least one object"),
    ],
)
def test_labels_that_would_be_misread(labels, error, says):
    with pytest.raises(error, match=says):
        check_first(FRAME, labels)


def test_later_frames_are_not_searched_for_their_range():
    check_frame(FRAME * 255, (8, 10))
