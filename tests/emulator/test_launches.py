"""What the hosts of the CUDA kernels launch, and how often: each launch costs a GPU some microseconds."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cuda_model import trace
from tests.emulator.build import load_emulated_ops

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux and g++")
MULTIPROCESSORS = 132


@pytest.fixture(autouse=True)
def emulated() -> None:
    load_emulated_ops()
    torch.manual_seed(0)


def launches_of(call: Callable[[], Any]) -> Counter[str]:
    """Kernel, without its template arguments -> how often a call launches it on an H100."""
    names = [launch["kernel"].strip("()") for launch in trace(call, MULTIPROCESSORS, dry=True)]
    return Counter(name.split("<")[0].split("::")[-1] for name in names)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_of_conv_lstm_is_one_launch(layout: torch.memory_format) -> None:
    """Also where it is one of a sequence, whose gates are every T-th of a tensor."""
    ops = torch.ops.vosops_emulated

    def maps(channels: int) -> Tensor:
        return torch.randn(2 * 3, channels, 5, 7).contiguous(memory_format=layout).unflatten(0, (2, 3))[:, 1]

    gates, more, cell, hidden = (maps(channels) for channels in (32, 32, 8, 8))
    assert launches_of(lambda: ops.conv_lstm_pointwise(gates, more, cell, 1.0)) == {"forward_kernel": 1}
    backward = (hidden, cell, gates, cell, cell)
    assert launches_of(lambda: ops.conv_lstm_pointwise_backward(*backward)) == {"backward_kernel": 1}


def test_weights_of_a_global_convolution_are_rearranged_only_where_they_are_not_channels_last() -> None:
    ops, last = torch.ops.vosops_emulated, torch.channels_last
    x = torch.randn(1, 16, 6, 7).contiguous(memory_format=last)
    first, second = torch.randn(8, 16, 7, 1), torch.randn(8, 16, 1, 7)

    def launches(*weights: Tensor) -> Counter[str]:
        return launches_of(lambda: ops.global_conv_split(x, *weights, None, None, None, "ieee"))

    assert launches(first, second)["weight_kernel"] == 2
    assert "weight_kernel" not in launches(*(w.contiguous(memory_format=last) for w in (first, second)))


def backward_of(batch: int) -> Callable[[], Any]:
    query, key, value = torch.randn(batch, 8, 40), torch.randn(batch, 8, 60), torch.randn(batch, 2, 5, 60)
    out, lse = torch.randn(batch, 2, 5, 40), torch.randn(batch, 40)
    arguments = (out, lse, query, key, value, None, None, None, 0.3, "ieee", out, lse)
    return lambda: torch.ops.vosops_emulated.memory_read_backward(*arguments)


def test_small_batch_elements_share_the_launches_of_memory_read_backward() -> None:
    """A launch has 528 tiles of weights of 64 x 128: those of 40 queries and 60 positions are less than one."""
    one = launches_of(backward_of(1))
    assert one["weights_kernel"] == one["ds_kernel"] == 1 and one["product_kernel"] == 3
    assert launches_of(backward_of(50)) == one


def test_shares_leave_no_multiprocessor_without_a_block() -> None:
    """XMem's read at 480p: 26 tiles of queries, two blocks of select_kernel on each of 132 multiprocessors."""
    query, key = torch.randn(1, 64, 1620).bfloat16(), torch.randn(1, 64, 20 * 1620).bfloat16()
    blocks = {
        launch["kernel"].strip("()").split("<")[0]: launch["blocks"]
        for launch in trace(
            lambda: torch.ops.vosops_emulated.memory_select(query, key, None, None, None, 0.1, "ieee", 30),
            MULTIPROCESSORS,
            dry=True,
        )
    }
    assert blocks["select_kernel"] == 260

    lse = torch.randn(1, 1620)
    usage = trace(
        lambda: torch.ops.vosops_emulated.memory_usage(
            query, key[..., :1620], None, None, None, 0.1, "ieee", lse
        ),
        MULTIPROCESSORS,
        dry=True,
    )
    (main,) = [launch for launch in usage if "usage_kernel" in launch["kernel"]]
    assert MULTIPROCESSORS < main["blocks"] <= 2 * MULTIPROCESSORS  # of 13 without shares of the queries
