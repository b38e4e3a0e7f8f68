"""The CUDA kernels' own corners on the emulator; tests/ops runs the specification of the ops on it.

Embeddings are small integers, so that every arithmetic is exact and the outputs equal the reference's bit by bit.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from tests.emulator.build import load_emulated_ops
from vosops.reference.conv_lstm import conv_lstm_pointwise_backward_core, conv_lstm_pointwise_core
from vosops.reference.global_conv import (
    global_conv_merge_core,
    global_conv_split_core,
    global_conv_weight_core,
)
from vosops.reference.global_matching import global_matching_core
from vosops.reference.local_attention import (
    local_attention_dot_core,
    local_attention_spread_core,
    local_attention_weigh_core,
)
from vosops.reference.local_correlation import local_correlation_core
from vosops.reference.local_matching import local_matching_core
from vosops.reference.memory_read import memory_read_core, memory_select_core

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux and g++")

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16

# (N,C,H,W), objects, radius, dilation, dtype, precision: each reaches a part of a kernel that ordinary sizes do not
LOCAL_CASES = {
    "fma: two groups of 32 vertical shifts": ((1, 8, 40, 9), 2, [18], 1, FLOAT, "ieee"),
    "fma: more than 32 objects": ((1, 4, 3, 3), 35, [4], 1, FLOAT, "ieee"),
    "tensor: channels in two chunks": ((1, 300, 6, 11), 2, [2, 5], 1, HALF, "ieee"),
    "tensor: TF32 in two chunks": ((1, 100, 5, 33), 2, [3], 1, FLOAT, "tf32"),
    "tensor: split TF32 in two chunks": ((1, 100, 5, 33), 2, [3], 1, FLOAT, "tf32x3"),
    "tensor: seven and eight steps": ((1, 121, 4, 9), 1, [2], 1, BFLOAT, "ieee"),
    "tensor: key rows in several spans": ((1, 17, 5, 90), 1, [40], 1, BFLOAT, "ieee"),
    "tensor: key rows in several batches": ((1, 4, 90, 8), 1, [40], 1, HALF, "ieee"),
    "tensor: more than 32 objects": ((1, 4, 3, 3), 35, [4], 1, HALF, "ieee"),
    "tensor: objects in several passes": ((1, 4, 3, 5), 9, [0, 1, 2, 3, 4], 1, HALF, "ieee"),
    "tensor: phases of the dilation": ((2, 5, 11, 19), 2, [3, 7], 3, BFLOAT, "ieee"),
    "one: few tiles, phases of the dilation": ((2, 5, 11, 19), 1, [7], 3, HALF, "ieee"),
    "one: rows shorter than the steps": ((1, 70, 4, 40), 1, [9], 1, BFLOAT, "ieee"),
    "one: shares of the key rows": ((1, 20, 48, 9), 1, [18], 1, BFLOAT, "ieee"),
}

# (N,C,H,W), (T,H2,W2), objects, neighbours, dtype, precision
GLOBAL_CASES = {
    "fma: many tiles of keys": ((1, 9, 12, 15), (3, 20, 21), 3, 1, FLOAT, "ieee"),
    "fma: sorted lists": ((2, 5, 5, 7), (2, 15, 16), 2, 5, FLOAT, "ieee"),
    "tensor: many tiles of keys": ((1, 9, 12, 25), (3, 20, 21), 3, 1, HALF, "ieee"),
    "tensor: sorted lists": ((2, 5, 5, 7), (2, 15, 16), 2, 5, BFLOAT, "ieee"),
    "tensor: fewer keys than neighbours": ((1, 3, 4, 4), (1, 3, 3), 2, 20, HALF, "ieee"),
    "tensor: seven steps": ((1, 100, 6, 7), (1, 11, 13), 2, 1, BFLOAT, "ieee"),
    "tensor: rows shorter than the steps": ((1, 70, 6, 7), (1, 11, 13), 2, 1, HALF, "ieee"),
    "tensor: eight steps": ((1, 250, 6, 7), (1, 11, 13), 2, 1, HALF, "ieee"),
    "tensor: queries that do not stay": ((1, 600, 3, 9), (1, 11, 13), 2, 2, BFLOAT, "ieee"),
    "tensor: TF32": ((1, 100, 6, 7), (1, 11, 13), 2, 1, FLOAT, "tf32"),
    "tensor: split TF32": ((1, 100, 6, 7), (1, 11, 13), 2, 2, FLOAT, "tf32x3"),
}

# N, O, C, Cv, P, M; dtypes of query and key, and of the value; whether the value is channel-last; precision
READ_CASES = {
    "fma: two tiles of columns": ((1, 2, 9, 150, 66, 40), FLOAT, FLOAT, False, "ieee"),
    "fma: rows too long for shared memory": ((1, 1, 1200, 8, 5, 40), HALF, HALF, False, "ieee"),
    "tensor: 16 bytes, channel-major": ((1, 2, 16, 24, 70, 64), BFLOAT, BFLOAT, False, "ieee"),
    "tensor: 8 bytes, channel-major": ((1, 1, 16, 24, 9, 68), HALF, HALF, False, "ieee"),
    "tensor: 4 bytes, channel-major": ((2, 1, 16, 24, 9, 70), BFLOAT, BFLOAT, False, "ieee"),
    "tensor: 2 bytes, channel-major": ((1, 1, 16, 24, 9, 71), HALF, HALF, False, "ieee"),
    "tensor: 16 bytes, channel-last": ((1, 2, 16, 24, 70, 64), HALF, HALF, True, "ieee"),
    "tensor: whole tiles, channel-major": ((1, 1, 16, 512, 9, 72), BFLOAT, BFLOAT, False, "ieee"),
    "tensor: whole tiles, channel-last": ((1, 1, 16, 512, 9, 72), HALF, HALF, True, "ieee"),
    "tensor: whole tiles of two objects": ((1, 2, 16, 256, 9, 40), HALF, HALF, False, "ieee"),
    "tensor: whole tiles of 128 queries": ((1, 1, 48, 256, 70, 72), BFLOAT, BFLOAT, True, "ieee"),
    "tensor: whole tiles in TF32": ((1, 1, 16, 256, 9, 40), FLOAT, FLOAT, False, "tf32"),
    "tensor: 8 bytes, channel-last": ((2, 2, 16, 20, 9, 50), BFLOAT, BFLOAT, True, "ieee"),
    "tensor: 4 bytes, channel-last": ((1, 2, 16, 18, 9, 50), HALF, HALF, True, "ieee"),
    "tensor: 2 bytes, channel-last": ((1, 2, 16, 19, 9, 50), BFLOAT, BFLOAT, True, "ieee"),
    "tensor: two tiles of 512 columns": ((1, 2, 24, 300, 9, 100), BFLOAT, BFLOAT, True, "ieee"),
    "tensor: long rows": ((1, 1, 256, 16, 9, 40), HALF, HALF, False, "ieee"),
    "tensor: other values than keys": ((1, 2, 20, 9, 70, 100), HALF, BFLOAT, True, "ieee"),
    "tensor: TF32, channel-major": ((1, 1, 20, 40, 9, 100), FLOAT, FLOAT, False, "tf32"),
    "tensor: TF32, channel-last": ((1, 1, 20, 40, 9, 100), FLOAT, FLOAT, True, "tf32"),
    "tensor: split TF32, channel-last": ((1, 2, 20, 140, 9, 100), FLOAT, FLOAT, True, "tf32x3"),
}
READ_ERROR = {FLOAT: 1e-5, HALF: 2e-3, BFLOAT: 1.5e-2}

# (N,C,H,W), rows of the first and second line, their taps, dtype, precision, whether all memory is channels_last
CONV_CASES = {
    "fma: several tiles of everything": ((1, 20, 17, 19), (70, 3), (5, 3), FLOAT, "ieee", False),
    "fma: shares of the channels": ((2, 150, 2, 3), (4, 6), (3, 3), FLOAT, "ieee", True),
    "tensor: several tiles of everything": ((1, 40, 31, 9), (67, 130), (3, 7), HALF, "ieee", False),
    "tensor: shares of the channels": ((1, 200, 3, 4), (9, 5), (7, 7), BFLOAT, "ieee", True),
    "tensor: rows in place that end within 16 bytes": ((2, 24, 5, 6), (8, 16), (1, 5), HALF, "ieee", True),
    "tensor: narrow stages of long lines": ((1, 9, 16, 15), (5, 4), (17, 17), FLOAT, "tf32", False),
    "tensor: TF32": ((1, 33, 6, 7), (10, 12), (3, 5), FLOAT, "tf32", True),
    "tensor: split TF32": ((1, 33, 6, 7), (10, 12), (3, 5), FLOAT, "tf32x3", False),
    "tensor: one line": ((1, 18, 9, 4), (17, 0), (9, 1), HALF, "ieee", False),
}

# (N,C,H,W), reach, dilation, dtype
ATTENTION_CASES = {
    "two blocks of channels, the second in part": ((1, 41, 5, 33), 1, 1, FLOAT),
    "two tiles of offsets, the second in part": ((1, 9, 6, 34), 9, 1, FLOAT),
    "phases of unequal size": ((2, 5, 11, 37), 2, 3, HALF),
    "a window beyond the image on all sides": ((1, 8, 3, 2), 7, 1, BFLOAT),
}
# (N,C,H,W), patch, stride, padding, dilation of the patch, dtype
CORRELATION_CASES = {
    "two warps of outputs, the second in part": ((1, 3, 2, 41), (3, 3), (1, 1), (0, 0), (1, 1), FLOAT),
    "two blocks of displacements each way": ((1, 2, 5, 6), (9, 17), (1, 1), (0, 0), (1, 1), HALF),
    "two blocks of channels, the second in part": ((1, 131, 3, 4), (3, 2), (1, 1), (0, 0), (1, 1), FLOAT),
    "a stride, padding and displacements apart": ((2, 17, 9, 10), (5, 6), (2, 3), (3, 1), (2, 2), BFLOAT),
    "a patch beyond the image on all sides": ((1, 5, 3, 2), (9, 9), (1, 1), (0, 0), (2, 1), FLOAT),
}
MORE_CASES = 3  # popular keys, a long backward, long lists
ALL_CASES = len(LOCAL_CASES) + len(GLOBAL_CASES) + len(READ_CASES) + len(CONV_CASES)
ALL_CASES += len(ATTENTION_CASES) + len(CORRELATION_CASES) + MORE_CASES


@pytest.fixture(autouse=True)
def emulated() -> None:
    load_emulated_ops()
    torch.manual_seed(0)


def integers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-3, 4, shape).to(dtype)


def local_inputs(case: str):
    shape, objects, radius, dilation, dtype, precision = LOCAL_CASES[case]
    mask = torch.rand(shape[0], objects, *shape[2:]) < 0.4
    wanted = torch.rand(shape[0], *shape[2:]) < 0.8
    return integers(shape, dtype), integers(shape, dtype), mask, radius, dilation, wanted, precision


def global_inputs(case: str):
    shape, pixels, objects, neighbors, dtype, precision = GLOBAL_CASES[case]
    query, key = integers(shape, dtype), integers((*shape[:2], *pixels), dtype)
    mask = torch.rand(shape[0], objects, *pixels) < 0.4
    return query, key, mask, neighbors, torch.rand(shape[0], *shape[2:]) < 0.8, precision


def assert_same(outputs: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(outputs[0], expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(outputs[1], expected[1])


@pytest.mark.parametrize("case", LOCAL_CASES)
def test_local_matching(case: str) -> None:
    inputs = local_inputs(case)
    assert_same(torch.ops.vosops_emulated.local_matching(*inputs), local_matching_core(*inputs[:-1]))


@pytest.mark.parametrize("case", GLOBAL_CASES)
def test_global_matching(case: str) -> None:
    inputs = global_inputs(case)
    assert_same(torch.ops.vosops_emulated.global_matching(*inputs), global_matching_core(*inputs[:-1]))


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_reduced_precision_is_the_one_that_was_asked_for(precision: str) -> None:
    """1 + 2^-12 is nearer to 1.5 than to 0.5; TF32 rounds it to 1 and takes the first pixel."""
    query = torch.full((1, 1, 1, 2), 1 + 2**-12)
    key = torch.tensor([0.5, 1.5]).view(1, 1, 1, 1, 2)
    mask = torch.ones(1, 1, 1, 1, 2, dtype=torch.bool)
    _, index = torch.ops.vosops_emulated.global_matching(query, key, mask, 1, None, precision)
    _, local = torch.ops.vosops_emulated.local_matching(
        query, key[:, :, 0], mask[:, :, 0], [1], 1, None, precision
    )
    wanted = 0 if precision == "tf32" else 1
    assert index.unique().tolist() == local.unique().tolist() == [wanted]


def read_inputs(sizes, dtype, value_dtype, channel_last) -> tuple[Tensor, Tensor, Tensor]:
    n, o, c, v, p, m = sizes
    value = torch.randn(n, o, v, m).to(value_dtype)
    value = value.mT.contiguous().mT if channel_last else value
    return torch.randn(n, c, p).to(dtype), torch.randn(n, c, m).to(dtype), value


@pytest.mark.parametrize("case", READ_CASES)
def test_memory_read(case: str) -> None:
    sizes, dtype, value_dtype, channel_last, precision = READ_CASES[case]
    inputs = read_inputs(sizes, dtype, value_dtype, channel_last)
    scale = sizes[2] ** -0.5
    out, lse = torch.ops.vosops_emulated.memory_read(*inputs, None, None, None, scale, precision)
    want, want_lse = memory_read_core(*(t.double() for t in inputs), None, None, None, scale)
    error = 4e-3 if precision == "tf32" else READ_ERROR[value_dtype]
    torch.testing.assert_close(out.double(), want, rtol=0, atol=error)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=4e-3 if precision == "tf32" else 1e-5)


@pytest.mark.parametrize("step", [0.1, 3.0, 9.0, -3.0])
@pytest.mark.parametrize("channel_last", [False, True])
def test_memory_read_of_scores_that_rise_from_tile_to_tile(step: float, channel_last: bool) -> None:
    """Sums are relative to a maximum that lags behind by up to 2^8, or is raised in every tile."""
    query, key, value = read_inputs((1, 1, 16, 72, 70, 200), HALF, HALF, channel_last)
    bias = step * (torch.arange(200.0) // 32)[None] + torch.rand(1, 200)
    shrinkage = 0.5 + torch.rand(1, 200)
    arguments = (shrinkage, torch.randn(1, 70), bias, 0.25)
    out, lse = torch.ops.vosops_emulated.memory_read(query, key, value, *arguments, "ieee")
    wide = [t.double() for t in (query, key, value, *arguments[:3])]
    want, want_lse = memory_read_core(*wide, 0.25)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=READ_ERROR[HALF])
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CONV_CASES)
def test_global_conv(case: str) -> None:
    """Sums of small integers are exact: the results are those of float64, rounded once."""
    (n, c, h, w), (m1, m2), (kh, kw), dtype, precision, last = CONV_CASES[case]

    def numbers(*shape: int) -> Tensor:
        tensor = torch.randint(-1, 2, shape).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if last else tensor

    ops = torch.ops.vosops_emulated
    biases = [integers((m,), dtype) for m in (m1, m2, c)]
    x, y, addend = numbers(n, c, h, w), numbers(n, m1 + m2, h, w), numbers(1, m1 + m2, h, w)
    split = (x, numbers(m1, c, kh, 1), numbers(m2, c, 1, kw), *biases[:2], addend)
    merge = (y, numbers(c, m1, 1, kw), numbers(c, m2, kh, 1), biases[2])
    for op, core, arguments in (
        (ops.global_conv_split, global_conv_split_core, split),
        (ops.global_conv_merge, global_conv_merge_core, merge),
    ):
        got = op(*arguments, precision)
        assert torch.equal(got, core(*(t.double() for t in arguments)).to(dtype))
        assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    for kernel in ((kh, 1), (1, kw)):
        got = ops.global_conv_weight(x, y, *kernel, precision)
        assert torch.equal(got, global_conv_weight_core(x.double(), y.double(), *kernel).to(dtype))


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_local_attention(case: str) -> None:
    """Sums of small integers are exact."""
    shape, reach, dilation, dtype = ATTENTION_CASES[case]
    ops, window = torch.ops.vosops_emulated, (reach, dilation)
    a, b = integers(shape, dtype), integers(shape, dtype).transpose(2, 3).contiguous().transpose(2, 3)
    weights = integers((shape[0], (2 * reach + 1) ** 2, *shape[2:]), FLOAT)
    for op, core, first, second in (
        (ops.local_attention_dot, local_attention_dot_core, a, b),
        (ops.local_attention_weigh, local_attention_weigh_core, weights, b),
        (ops.local_attention_spread, local_attention_spread_core, weights, a),
    ):
        want = core(first.double(), second.double(), *window)
        got = op(first, second, *window)
        assert torch.equal(got, want.to(got.dtype))


@pytest.mark.parametrize("case", CORRELATION_CASES)
def test_local_correlation(case: str) -> None:
    """Sums of small integers are exact."""
    shape, *options, dtype = CORRELATION_CASES[case]
    ops, options = torch.ops.vosops_emulated, [list(option) for option in options]
    query, key = integers(shape, dtype), integers(shape, dtype).mT.contiguous().mT
    leaves = [t.double().requires_grad_() for t in (query, key)]
    want = local_correlation_core(*leaves, *options)
    assert torch.equal(ops.local_correlation(query, key, *options), want.to(dtype))
    grad = integers(tuple(want.shape), dtype)
    of_query, of_key = torch.autograd.grad(want, leaves, grad.double())
    assert torch.equal(ops.local_correlation_query(grad, key, *options), of_query.to(dtype))
    assert torch.equal(ops.local_correlation_key(grad, query, *options), of_key.to(dtype))


@pytest.mark.parametrize("width", [5, 8])
def test_a_cell_of_float32_goes_with_gates_of_16_bits(width: int) -> None:
    gates, cell = torch.randn(2, 8, 3, width).half(), torch.randn(2, 2, 3, width)
    got = torch.ops.vosops_emulated.conv_lstm_pointwise(gates, None, cell, 1.0)
    for have, want in zip(got, conv_lstm_pointwise_core(gates, None, cell, 1.0), strict=True):
        torch.testing.assert_close(have, want)
    arguments = (got[0], got[1], got[2], cell, got[1])
    got = torch.ops.vosops_emulated.conv_lstm_pointwise_backward(*arguments)
    for have, want in zip(got, conv_lstm_pointwise_backward_core(*arguments), strict=True):
        torch.testing.assert_close(have, want)


def test_memory_select_of_lists_beyond_shared_memory() -> None:
    query, key = integers((1, 3, 70), FLOAT), integers((1, 3, 700), FLOAT)
    vectors = (None, None, None, 0.5)
    assert_same(
        torch.ops.vosops_emulated.memory_select(query, key, *vectors, "ieee", 500),
        memory_select_core(query, key, *vectors, 500),
    )


def test_memory_read_backward_in_chunks() -> None:
    query, key, value = read_inputs((1, 1, 5, 6, 600, 400), FLOAT, FLOAT, False)
    inputs = [t.double().requires_grad_() for t in (query, key, value)]
    results = memory_read_core(*inputs, None, None, None, 0.4)
    outputs = [t.detach().float() for t in results]
    grads = [torch.randn_like(t) for t in outputs]
    wanted = torch.autograd.grad(results, inputs, [t.double() for t in grads])
    got = torch.ops.vosops_emulated.memory_read_backward(
        *grads, query, key, value, None, None, None, 0.4, "ieee", *outputs
    )
    for have, want in zip(got, wanted, strict=False):
        torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("architecture", ["80", "86", "90"])
@pytest.mark.parametrize(
    "case", ["tensor: seven steps", "tensor: eight steps", "tensor: TF32", "fma: sorted lists"]
)
def test_shared_memory_fits_every_architecture(
    monkeypatch: pytest.MonkeyPatch, architecture: str, case: str
) -> None:
    monkeypatch.setenv("VOSOPS_EMULATOR_ARCH", architecture)
    test_global_matching(case)


def test_local_attention_fits_the_smallest_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOSOPS_EMULATOR_ARCH", "86")
    test_local_attention("two tiles of offsets, the second in part")


@pytest.mark.parametrize("architecture", ["86", "90"])
def test_long_lines_fit_every_architecture(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    monkeypatch.setenv("VOSOPS_EMULATOR_ARCH", architecture)
    test_global_conv("tensor: narrow stages of long lines")


def backward_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One key that most queries choose: its segment crosses many chunks."""
    index = torch.randint(-1, 40, (2, 2, 300))
    index[torch.rand(index.shape) < 0.7] = 17
    grad = torch.randn(2, 2, 300).masked_fill(index < 0, torch.nan)
    return grad, torch.randn(2, 5, 300), torch.randn(2, 5, 40), index


def test_backward_of_a_popular_key() -> None:
    grad, query, key, index = backward_inputs()
    outputs = torch.ops.vosops_emulated.matching_backward(grad, query, key, index)
    q, k = query.double().requires_grad_(), key.double().requires_grad_()
    chosen = k.gather(2, index.clamp(min=0).flatten(1)[:, None].expand(-1, 5, -1)).view(2, 5, 2, 300)
    distance = (q[:, :, None] - chosen).square().sum(1)
    expected = torch.autograd.grad(distance, (q, k), grad.double().masked_fill(index < 0, 0))
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_results_do_not_depend_on_the_order_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = torch.ops.vosops_emulated
    calls = [
        lambda: ops.local_matching(*local),
        lambda: ops.global_matching(*across),
        lambda: ops.matching_backward(*backward),
        lambda: ops.memory_read(*read, None, None, None, 0.3, "ieee"),
        lambda: ops.memory_select(*read[:2], None, None, None, 0.3, "ieee", 40),
        lambda: (ops.global_conv_split(image, *lines, None, None, None, "tf32x3"),),
        lambda: (ops.global_conv_weight(image, image[:, :7], 3, 1, "ieee"),),
        lambda: ops.conv_lstm_pointwise(image, None, image[:, :5], 1.0),
        lambda: (ops.local_attention_dot(image, image.flip(3), 2, 1),),
        lambda: (ops.local_attention_weigh(scores, image, 2, 2),),
        lambda: (ops.local_attention_spread(scores, image, 2, 2),),
        lambda: (ops.local_correlation(image, image.flip(3), [3, 5], [2, 1], [1, 0], [1, 2]),),
        lambda: (ops.local_correlation_key(volume, image, [3, 5], [1, 1], [0, 0], [1, 2]),),
    ]
    read = read_inputs((1, 2, 16, 24, 70, 200), BFLOAT, BFLOAT, True)
    local, across = local_inputs("tensor: phases of the dilation"), global_inputs("tensor: sorted lists")
    backward = backward_inputs()
    image = torch.randn(2, 20, 9, 11)
    lines = image[:, :, :3, :1], image[:, :, :1, :3]
    scores = torch.randn(2, 25, 9, 11)
    volume = torch.randn(2, 3, 5, 9, 11)
    in_order = [call() for call in calls]
    for seed in ("1", "2"):
        monkeypatch.setenv("VOSOPS_EMULATOR_SHUFFLE", seed)
        for call, first in zip(calls, in_order, strict=True):
            for result, expected in zip(call(), first, strict=True):
                torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


if __name__ == "__main__":
    assert sys.modules["triton"] is None, (
        "Triton is kept out of the process that looks for accesses out of bounds"
    )
    load_emulated_ops()
    for name in LOCAL_CASES:
        test_local_matching(name)
    for name in GLOBAL_CASES:
        test_global_matching(name)
    for name in READ_CASES:
        test_memory_read(name)
    test_backward_of_a_popular_key()
    test_memory_select_of_lists_beyond_shared_memory()
    test_memory_read_backward_in_chunks()
    for name in CONV_CASES:
        test_global_conv(name)
    for name in ATTENTION_CASES:
        test_local_attention(name)
    for name in CORRELATION_CASES:
        test_local_correlation(name)
    print(ALL_CASES, "cases")
