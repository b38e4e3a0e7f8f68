"""Every op has a configuration for each amount of shared memory that a block may have on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cuda_model import trace
from tests.emulator.build import load_emulated_ops
from vosops.reference.memory_read import memory_read_core

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux and g++")

SHARED = {"80": 163 << 10, "86": 99 << 10, "90": 227 << 10}
"""Bytes of a block by architecture; 8.9 and 12.0 have what 8.6 has, 10.0 what 9.0 has."""
FLOAT, BFLOAT = torch.float32, torch.bfloat16
MULTIPROCESSORS = 84


def launches(architecture: str, call: Callable[[], Any]) -> list[dict[str, Any]]:
    load_emulated_ops()
    return trace(call, MULTIPROCESSORS, dry=True, architecture=architecture)


def read(dtype: torch.dtype, precision: str, keys: int, last: bool = False) -> Callable[[], Any]:
    query, key = (torch.zeros(1, keys, 70, dtype=dtype) for _ in range(2))
    value = torch.zeros(1, 1, 70, 512, dtype=dtype).mT if last else torch.zeros(1, 1, 512, 70, dtype=dtype)
    return lambda: torch.ops.vosops_emulated.memory_read(query, key, value, None, None, None, 0.1, precision)


def calls(dtype: torch.dtype, precision: str) -> dict[str, Callable[[], Any]]:
    """The ops whose blocks take most shared memory, with the channels of the models that have them."""
    ops = torch.ops.vosops_emulated

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    one, three = (torch.ones(1, objects, 12, 20, dtype=torch.bool) for objects in (1, 3))
    x, query, key = zeros(1, 100, 12, 20), zeros(1, 64, 70), zeros(1, 64, 300)
    out, lse = zeros(1, 1, 512, 70), torch.zeros(1, 70)
    value = zeros(1, 1, 512, 300)
    vectors = (None, None, None, 0.1, precision)
    return {
        "local_matching": lambda: ops.local_matching(x, x, one, [15], 1, None, precision),
        "local_matching of objects": lambda: ops.local_matching(x, x, three, [2, 12], 1, None, precision),
        "global_matching": lambda: ops.global_matching(x, x[:, :, None], one[:, :, None], 1, None, precision),
        "memory_read": read(dtype, precision, 128),
        "memory_read_backward": lambda: ops.memory_read_backward(
            out, lse, query, key, value, *vectors, out, lse
        ),
        "memory_select": lambda: ops.memory_select(query, key, *vectors, 30),
        "memory_select of long lists": lambda: ops.memory_select(query, key, *vectors, 256),
        "memory_usage": lambda: ops.memory_usage(query, key, *vectors, lse),
        "global_conv": lambda: ops.global_conv_split(
            x, zeros(8, 100, 17, 1), zeros(8, 100, 1, 17), None, None, None, precision
        ),
        "global_conv_weight": lambda: ops.global_conv_weight(x, x, 1, 17, precision),
        "local_attention": lambda: ops.local_attention_dot(x, x, 7, 1),
    }


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize(
    ("dtype", "precision"), [(BFLOAT, "ieee"), (FLOAT, "ieee"), (FLOAT, "tf32"), (FLOAT, "tf32x3")]
)
def test_every_op_fits(architecture: str, dtype: torch.dtype, precision: str) -> None:
    load_emulated_ops()
    for name, call in calls(dtype, precision).items():
        found = launches(architecture, call)
        assert found, name
        assert max(launch["shared_bytes"] for launch in found) <= SHARED[architecture], name


@pytest.mark.parametrize(
    ("architecture", "keys", "last", "by_tensor_cores"),
    [
        ("80", 128, False, True),
        ("90", 128, False, True),
        ("86", 128, False, True),  # in blocks of 256 columns: 512 need 122 KB
        ("86", 128, True, True),
        ("86", 64, True, True),
        ("86", 256, True, False),  # blocks of 256 columns need 107 KB: products by FMA
    ],
)
def test_what_serves_a_read_of_512_channels(
    architecture: str, keys: int, last: bool, by_tensor_cores: bool
) -> None:
    found = launches(architecture, read(BFLOAT, "ieee", keys, last))
    assert any("tensor::" in launch["kernel"] for launch in found) == by_tensor_cores


@pytest.mark.parametrize("last", [False, True])
def test_a_read_in_blocks_of_256_columns_is_right(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    monkeypatch.setenv("VOSOPS_EMULATOR_ARCH", "86")
    load_emulated_ops()
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 128, n).to(BFLOAT) for n in (70, 40, 40 * 3))
    value = value.view(1, 1, 384, 40)
    value = value.mT.contiguous().mT if last else value
    out, lse = torch.ops.vosops_emulated.memory_read(query, key, value, None, None, None, 0.1, "ieee")
    want, want_lse = memory_read_core(query.double(), key.double(), value.double(), None, None, None, 0.1)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1.5e-2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)
