"""What the Triton kernels of the convolutions do beyond the contract that tests/ops checks: parts, tiles, copies.

They run in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from tests.triton.device import DEVICE
from vosops.reference.global_conv import (
    global_conv_merge_core,
    global_conv_split_core,
    global_conv_weight_core,
)
from vosops.triton import conv_lstm, global_conv


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small numbers, whose sums are exact in every order."""
    return torch.randint(-1, 2, shape).to(DEVICE, dtype)


def assert_is(got, core, *arguments) -> None:
    want = core(*(t.cpu().double() if isinstance(t, torch.Tensor) else t for t in arguments))
    assert torch.equal(got.cpu(), want.to(got.dtype))


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_any_number_of_parts_gives_the_same_sums(chip, processors):
    chip(9, processors)
    x, y, addend = integers(2, 40, 5, 7), integers(2, 73, 5, 7), integers(1, 73, 5, 7)
    split = (x, integers(70, 40, 3, 1), integers(3, 40, 1, 5), integers(70), integers(3), addend)
    assert_is(global_conv.global_conv_split(*split, "ieee"), global_conv_split_core, *split)
    merge = (y, integers(9, 70, 1, 3), integers(9, 3, 5, 1), integers(9))
    assert_is(global_conv.global_conv_merge(*merge, "ieee"), global_conv_merge_core, *merge)
    for kernel in ((3, 1), (1, 5)):
        got = global_conv.global_conv_weight(x, y, *kernel, "ieee")
        assert_is(got, global_conv_weight_core, x, y, *kernel)


@pytest.mark.parametrize("capability", [0, 8, 10])
def test_the_tiles_of_other_devices_give_the_same_sums(chip, capability):
    chip(capability, 2)
    for dtype, precision in ((torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3")):
        x = integers(1, 33, 4, 40, dtype=dtype)
        lines = integers(5, 33, 3, 1, dtype=dtype), integers(17, 33, 1, 3, dtype=dtype)
        split = (x, *lines, None, None, None)
        assert_is(global_conv.global_conv_split(*split, precision), global_conv_split_core, *split)


def test_only_what_cannot_be_read_in_wide_pieces_is_copied():
    wide = torch.randn(2, 32, 5, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    for as_it_is in (wide, wide[:, 16:], wide[:, :, 1:, ::2], wide[:1].expand(3, -1, -1, -1)):
        assert global_conv._channels_innermost(as_it_is) is as_it_is
    for copied in (wide[:, 1:], wide[:, ::2], torch.randn(2, 32, 5, 6, device=DEVICE)):
        copy = global_conv._channels_innermost(copied)
        assert copy.stride(1) == 1 and copy.shape[1] % global_conv.ALIGNMENT == 0
        assert torch.equal(copy[:, : copied.shape[1]], copied)
        assert copy[:, copied.shape[1] :].eq(0).all()


def test_what_the_kernels_cannot_take_is_refused():
    x, line = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    split = global_conv.global_conv_split
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16 for the Triton kernels"):
        split(x.double(), line.double(), line.double(), None, None, None, "ieee")
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32, tf32x3, got 'fp8'"):
        split(x, line, line, None, None, None, "fp8")
    with pytest.raises(ValueError, match="x must have fewer than 2\\*\\*30 pixels"):
        split(x.expand(1, 1, 2**15, 2**15), line, line, None, None, None, "ieee")
    with pytest.raises(TypeError, match="gates must be float32, float16 or bfloat16 for the Triton kernels"):
        conv_lstm.conv_lstm_pointwise(torch.zeros(1, 4, 1, 1).double(), None, x.double(), 1.0)


def test_a_cell_of_float32_goes_with_gates_of_16_bits():
    gates, cell = torch.randn(1, 8, 3, 5, device=DEVICE).half(), torch.randn(1, 2, 3, 5, device=DEVICE)
    hidden, new_cell, saved = conv_lstm.conv_lstm_pointwise(gates, None, cell, 1.0)
    assert (hidden.dtype, new_cell.dtype, saved.dtype) == (torch.float16, torch.float32, torch.float16)
    grads = conv_lstm.conv_lstm_pointwise_backward(hidden, new_cell, saved, cell, new_cell)
    assert [grad.dtype for grad in grads] == [torch.float16, torch.float32]
