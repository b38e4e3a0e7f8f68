"""The convolutional LSTM: what it computes, for every variant, dtype, layout and order of derivative."""

import pytest
import torch

import vosops
from tests.ops.backends import EVERY_BACKEND_AND_DTYPE, load
from vosops import reference
from vosops.ops.conv_lstm import HAS_POINTWISE, HAS_WINOGRAD
from vosops.reference.conv_lstm import (
    VARIANTS,
    conv_lstm_pointwise_backward_core,
    conv_lstm_pointwise_core,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
WINOGRAD_TOLERANCE = 2e-5

pytestmark = pytest.mark.skipif(not HAS_POINTWISE, reason="the CPU library was not compiled")
WINOGRAD = pytest.mark.skipif(not HAS_WINOGRAD, reason="the CPU library has no Winograd kernels")


@pytest.fixture
def backend(request):
    backend = load(request.param)
    name, key = f"conv_lstm_pointwise{backend.suffix}", "CUDA" if backend.device == "cuda" else "CPU"
    exists = hasattr(getattr(torch.ops, backend.namespace), name)
    if not exists or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{backend.namespace}::{name}", key):
        pytest.skip(f"{backend} has no kernels of conv_lstm yet")
    return backend


# ---- The core of every backend: the cell update.

# N, C, H, W
POINTWISE_CASES = {
    "one of everything": (1, 1, 1, 1),
    "odd sizes": (2, 3, 5, 7),
    "many channels": (1, 130, 2, 3),
    "many pixels": (1, 2, 67, 65),
    "a batch": (5, 4, 3, 8),
}
LAYOUTS = ("contiguous", "channels_last", "step of a sequence", "slice")


def laid_out(tensor, layout):
    """A copy of (N,C,H,W) in one of several memory layouts."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "step of a sequence":
        return torch.stack([tensor, tensor * torch.nan], 1)[:, 0]
    if layout == "slice":
        room = torch.full([2 * size + 1 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
        return room.to(tensor.device)[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    return tensor.contiguous()


def pointwise_problem(case, dtype, device="cpu"):
    """gates, more gates and the cell."""
    n, c, h, w = POINTWISE_CASES[case]
    sizes = ((n, 4 * c, h, w), (n, 4 * c, h, w), (n, c, h, w))
    return [(2 * torch.randn(size)).to(device, dtype) for size in sizes]


def assert_near(got, want, tolerance, name="result"):
    scale = max(1.0, want.abs().max().item() if want.numel() else 1.0)
    torch.testing.assert_close(
        got.detach().cpu().double(),
        want.detach().double(),
        rtol=0,
        atol=tolerance * scale,
        msg=lambda m: f"{name}: {m}",
    )


@EVERY_BACKEND_AND_DTYPE
@pytest.mark.parametrize("case", POINTWISE_CASES)
@pytest.mark.parametrize("more", [False, True])
def test_core_cell_update_and_its_gradients(backend, dtype, case, more):
    gates, more_gates, cell = pointwise_problem(case, dtype, backend.device)
    more_gates = more_gates if more else None
    wide = [None if t is None else t.cpu().double() for t in (gates, more_gates, cell)]
    want = conv_lstm_pointwise_core(*wide, 1.0)
    got = backend.op("conv_lstm_pointwise")(gates, more_gates, cell, 1.0)
    for name, a, b in zip(("hidden", "new_cell", "saved"), got, want, strict=True):
        assert a.dtype == dtype
        assert_near(a, b, TOLERANCE[dtype], name)
    grads = [torch.randn_like(cell) for _ in range(2)]
    arguments = (*grads, got[2], cell, got[1])
    want = conv_lstm_pointwise_backward_core(*(t.cpu().double() for t in arguments))
    got = backend.op("conv_lstm_pointwise_backward")(*arguments)
    for name, a, b in zip(("grad_gates", "grad_previous_cell"), got, want, strict=True):
        assert a.dtype == dtype
        assert_near(a, b, TOLERANCE[dtype], name)


@EVERY_BACKEND_AND_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_core_cell_update_reads_any_stride(backend, dtype, layout):
    tensors = pointwise_problem("odd sizes", dtype, backend.device)
    strided = [laid_out(t, layout) for t in tensors]
    for mixed in (strided, [strided[0], *tensors[1:]], [tensors[0], *strided[1:]]):
        got = backend.op("conv_lstm_pointwise")(*mixed, 0.5)
        want = backend.op("conv_lstm_pointwise")(*tensors, 0.5)
        grads = backend.op("conv_lstm_pointwise_backward")(strided[2], tensors[2], got[2], mixed[2], got[1])
        wanted = backend.op("conv_lstm_pointwise_backward")(
            tensors[2], tensors[2], want[2], tensors[2], want[1]
        )
        for a, b in zip((*got, *grads), (*want, *wanted), strict=True):
            torch.testing.assert_close(a, b)


@EVERY_BACKEND_AND_DTYPE
def test_core_cell_update_at_extremes(backend, dtype):
    """Saturated gates are exactly 0 and 1, NaN stays NaN, and nothing overflows."""
    values = torch.tensor([-1e4, -90.0, 0.0, 1e-3, 90.0, 1e4, torch.nan])
    gates = values.view(1, 1, 1, -1).expand(1, 4, 1, -1).to(backend.device, dtype).contiguous()
    cell = torch.ones(1, 1, 1, len(values), dtype=dtype, device=backend.device)
    got = backend.op("conv_lstm_pointwise")(gates, None, cell, 0.0)
    want = conv_lstm_pointwise_core(gates.cpu().double(), None, cell.cpu().double(), 0.0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=TOLERANCE[dtype], atol=1e-7, equal_nan=True)


@EVERY_BACKEND_AND_DTYPE
def test_core_cell_update_of_nothing(backend, dtype):
    gates = torch.empty(0, 8, 3, 3, dtype=dtype, device=backend.device)
    hidden, cell, saved = backend.op("conv_lstm_pointwise")(gates, None, gates[:, :2], 1.0)
    assert hidden.shape == cell.shape == (0, 2, 3, 3) and saved.shape == (0, 8, 3, 3)


# ---- The op.


def problem(
    variant="convolution", *, n=2, t=3, c=4, hidden=None, h=5, w=6, kernel=(3, 3), dtype=torch.float32
):
    """x, weights, bias and state."""
    hidden = c if variant == "depthwise" else hidden or 3
    rows, columns, (kh, kw) = 4 * hidden, c + hidden, kernel
    shapes = {
        "convolution": [(rows, columns, kh, kw)],
        "spatial": [(rows, columns, kh, 1), (rows, 2 * hidden, 1, kw)],
        "depthwise": [(4, columns, kh, kw)],
        "separable": [(4, columns, kh, kw), (rows, columns, 1, 1)],
    }[variant]
    weights = [torch.randn(s, dtype=torch.float64).to(dtype) / (s[1] * s[2] * s[3]) ** 0.5 for s in shapes]
    x, bias = torch.randn(n, t, c, h, w, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    state = [torch.randn(n, hidden, h, w, dtype=torch.float64).to(dtype) for _ in range(2)]
    return x.to(dtype), weights, bias.to(dtype), tuple(state)


def flat(result):
    output, (h, c) = result
    return output, h, c


def in_float64(x, weights, bias, state):
    wide = None if state is None else tuple(t.double() for t in state)
    return x.double(), [w.double() for w in weights], None if bias is None else bias.double(), wide


def tolerance_of(dtype, precision):
    return WINOGRAD_TOLERANCE if precision != "exact" and dtype == torch.float32 else TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", [None, "exact"])
def test_is_the_reference_in_float64(implementation, dtype, variant, precision):
    given = problem(variant, dtype=dtype)
    with vosops.use_backend(implementation):
        got = flat(vosops.conv_lstm(*given, variant=variant, precision=precision))
    want = flat(reference.conv_lstm(*in_float64(*given), variant=variant))
    for name, a, b in zip(("output", "h", "c"), got, want, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert_near(a, b, 4 * tolerance_of(dtype, precision), name)


@pytest.mark.parametrize("case", ["convolution", "separable"])
@pytest.mark.parametrize("precision", [None, "exact"])
def test_golden_of_the_original(golden, case, precision):
    from vosops.nn import ConvLSTM

    data = golden("convlstm_tf.pt")[f"convlstm_{case}"]
    variables = {k.removeprefix("var_"): v for k, v in data.items() if k.startswith("var_")}
    lstm = ConvLSTM.from_tensorflow(variables, data["forget_bias"], precision=precision)
    x, hidden, cells = (data[name].permute(0, 1, 4, 2, 3) for name in ("x", "y", "c"))
    with torch.no_grad():
        output, (h, c) = lstm(x)
    torch.testing.assert_close(output, hidden, rtol=0, atol=1e-5)
    torch.testing.assert_close(h[0], hidden[:, -1], rtol=0, atol=1e-5)
    torch.testing.assert_close(c[0], cells[:, -1], rtol=0, atol=1e-5)
