"""The bytes that operators make, of tensors with data and without."""

import pytest
import torch
from torch.nn import functional

from vosops.benchmarking.live_bytes import LiveBytes


def network(x):
    """Operators of every kind that LiveBytes tells apart: new tensors, several, views, in place, lists of tensors."""
    weight = torch.ones(4, 8, 3, 3, device=x.device)
    for _ in range(3):
        y = functional.conv2d(x, weight, padding=1)
        y = functional.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        values, _ = functional.max_pool2d(y, 2, return_indices=True)
        first, second = values.split(2, 1)
        x = torch.cat([first, second, values], 1)
        x.relu_()
    return x


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_without_data_it_counts_what_it_counts_with(memory_format):
    counted = {}
    for device in ("cpu", "meta"):
        x = torch.ones(2, 8, 12, 20, device=device).to(memory_format=memory_format)
        with torch.no_grad():
            wanted = network(x)
            with LiveBytes() as live:
                result = network(x)
        counted[device] = live.now, live.peak
        assert (result.shape, result.stride()) == (wanted.shape, wanted.stride())
        assert (result.dtype, result.device) == (wanted.dtype, wanted.device)
        del result
        assert live.now == 0
    assert counted["cpu"] == counted["meta"]
    assert counted["meta"][0] == 4 * 2 * 8 * 12 * 20  # the last x; weight, y and values are gone


def test_equal_numbers_of_other_types_are_not_the_same_arguments():
    x = torch.ones(3, dtype=torch.int32, device="meta")
    with LiveBytes():
        for _ in range(2):
            assert (x * 1).dtype == torch.int32
            assert (x * 1.0).dtype == torch.float32
            assert (x * True).dtype == torch.int32
            assert (x[::2] + 1).stride() == (1,)


def test_what_lives_at_once_is_counted():
    held = torch.empty(100)
    with LiveBytes() as live:
        a = held + 1
        b = a[:10]
        del a
        assert live.now == live.peak == 400, "a view keeps its storage"
        del b
        assert live.now == 0
        for _ in range(3):
            c = torch.empty(200, device="meta") + 1
        held.add_(1)
        assert live.now == 800
    assert live.peak == 2400
    del c
