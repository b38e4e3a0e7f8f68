"""The interpreter, as tests/interpreter.py hastens it, computes and checks as Triton's own."""

import pytest
import torch
import triton
import triton.language as tl

from vosops.ops._registration import TRITON_INTERPRETED

pytestmark = pytest.mark.skipif(not TRITON_INTERPRETED, reason="needs TRITON_INTERPRET=1")


@triton.jit
def _compute(x, y, result, operation: tl.constexpr):
    i = tl.arange(0, 4)
    if operation == "add":
        value = tl.load(x + i) + tl.load(y + i)
    elif operation == "sub":
        value = tl.load(x + i) - tl.load(y + i)
    else:
        value = tl.load(x + i) * tl.load(y + i)
    tl.store(result + i, value)


@triton.jit
def _outer_sum(x, y, result):
    i = tl.arange(0, 4)
    j = tl.arange(0, 8)
    rows = tl.load(x + i)[:, None]
    sums = rows + tl.load(y + j)[None, :]
    tl.static_assert(sums.shape[0] == 4)
    tl.static_assert(sums.shape[1] == 8)
    tl.store(result + i[:, None] * 8 + j[None, :], sums + rows)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
@pytest.mark.parametrize(
    ("operation", "of", "last", "beyond"),
    [
        ("add", "max", 0, 1),
        ("add", "min", 0, -1),
        ("sub", "min", 0, 1),
        ("mul", "max", 1, 2),
        ("mul", "min", 1, -1),
    ],
)
def test_a_result_beyond_its_dtype_is_an_error(operation, of, last, beyond, dtype):
    x = torch.tensor([1, -3, 0, getattr(torch.iinfo(dtype), of)], dtype=dtype)
    y = torch.tensor([5, 7, 2, last], dtype=dtype)
    result = torch.empty_like(x)
    _compute[(1,)](x, y, result, operation)
    assert torch.equal(result, getattr(torch, operation)(x, y))
    y[3] = beyond
    with pytest.raises(Exception, match=f"overflow detected for operation {operation}"):
        _compute[(1,)](x, y, result, operation)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float16])
def test_blocks_of_other_shapes_are_broadcast(dtype):
    x, y = torch.arange(4).to(dtype), torch.arange(10, 18).to(dtype)
    result = torch.empty(4, 8, dtype=dtype)
    _outer_sum[(1,)](x, y, result)
    assert torch.equal(result, 2 * x[:, None] + y)
