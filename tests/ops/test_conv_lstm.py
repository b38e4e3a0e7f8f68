"""The convolutional LSTM: what it computes, for every variant, dtype, layout and order of derivative."""

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import vosops
from tests.effort import examples
from tests.ops.backends import EVERY_BACKEND_AND_DTYPE, load
from vosops import reference
from vosops.nn import ConvLSTM
from vosops.ops.conv_lstm import HAS_POINTWISE, HAS_WINOGRAD, WINOGRAD_CHANNELS
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
    data = golden("convlstm_tf.pt")[f"convlstm_{case}"]
    variables = {k.removeprefix("var_"): v for k, v in data.items() if k.startswith("var_")}
    lstm = ConvLSTM.from_tensorflow(variables, data["forget_bias"], precision=precision)
    x, hidden, cells = (data[name].permute(0, 1, 4, 2, 3) for name in ("x", "y", "c"))
    with torch.no_grad():
        output, (h, c) = lstm(x)
    torch.testing.assert_close(output, hidden, rtol=0, atol=1e-5)
    torch.testing.assert_close(h[0], hidden[:, -1], rtol=0, atol=1e-5)
    torch.testing.assert_close(c[0], cells[:, -1], rtol=0, atol=1e-5)


# ---- Derivatives.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("with_state", [True, False])
def test_gradients_to_second_order(variant, with_state):
    x, weights, bias, state = problem(variant, n=1, t=2, c=1, hidden=1, h=2, w=3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, bias, *weights, *(state if with_state else ()))]

    def op(x, bias, *rest):
        of_state = rest[len(weights) :]
        return flat(
            vosops.conv_lstm(
                x, rest[: len(weights)], bias, of_state or None, variant=variant, forget_bias=0.5
            )
        )

    assert torch.autograd.gradcheck(op, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


WINOGRAD_CASES = {
    # N, T, C, hidden, H, W, with a state
    "one of everything": (1, 1, 1, 1, 1, 1, True),
    "less than a tile": (2, 2, 3, 2, 3, 3, True),
    "ragged tiles": (2, 3, 5, 7, 9, 11, True),
    "without a state": (1, 3, 4, 6, 8, 10, False),
    "many channels": (1, 1, 70, 45, 5, 6, True),
    "many tiles": (1, 2, 3, 2, 70, 66, True),
    "one long row": (1, 2, 2, 3, 2, 850, False),
    "one column": (1, 2, 2, 3, 37, 1, False),
}


def winograd_problem(case):
    n, t, c, hidden, h, w, with_state = WINOGRAD_CASES[case]
    x, weights, bias, state = problem(n=n, t=t, c=c, hidden=hidden, h=h, w=w)
    return x, weights, bias, state if with_state else None


def leaves_of(x, weights, bias, state, dtype):
    return [t.detach().to(dtype).requires_grad_() for t in (x, *weights, bias, *(state or ()))]


def loss_of(op, leaves, precision=None):
    x, weight, bias, *state = leaves
    output, (h, c) = op(x, weight, bias, tuple(state) or None, precision=precision)
    of_output = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view(output.shape)
    of_cell = torch.linspace(1, -2, c.numel(), dtype=x.dtype).view(c.shape)
    return (of_output * output).sum() + (of_cell * c).sum() + h.square().sum()


@WINOGRAD
@pytest.mark.parametrize("case", WINOGRAD_CASES)
def test_core_winograd_and_its_gradients(case):
    given = winograd_problem(case)
    with torch.no_grad():
        kept = flat(vosops.conv_lstm(*given, precision="winograd"))
    leaves, wide = (leaves_of(*given, dtype) for dtype in (torch.float32, torch.float64))
    trained = flat(vosops.conv_lstm(*leaves[:3], tuple(leaves[3:]) or None, precision="winograd"))
    want = flat(reference.conv_lstm(*wide[:3], tuple(wide[3:]) or None))
    for name, a, b, c in zip(("output", "h", "c"), kept, trained, want, strict=True):
        assert_near(a, c, WINOGRAD_TOLERANCE, name)
        assert torch.equal(a, b), "with and without gradients alike"
    got = torch.autograd.grad(loss_of(vosops.conv_lstm, leaves, "winograd"), leaves)
    wanted = torch.autograd.grad(loss_of(reference.conv_lstm, wide), wide)
    for a, b in zip(got, wanted, strict=True):
        assert_near(a, b, WINOGRAD_TOLERANCE)


@WINOGRAD
@pytest.mark.parametrize(
    ("channels", "hidden", "size", "bound"),
    [(128, 128, 16, 8e-6), (1984, 64, 12, 1.2e-5), (4032, 64, 8, 2e-5)],
)
def test_winograd_has_the_documented_error(channels, hidden, size, bound):
    """Relative to the largest output, as the table of docs/ops/conv_lstm.md says: below the bound, and not exact."""
    given = problem(n=1, t=1, c=channels, hidden=hidden, h=size, w=size)
    want = reference.conv_lstm(*in_float64(*given))[0]
    error = {}
    for precision in ("winograd", "exact", None):
        got = vosops.conv_lstm(*given, precision=precision)[0]
        error[precision] = ((got - want).abs().max() / want.abs().max()).item()
    assert error["exact"] < 2e-6 < error["winograd"] < bound
    assert error[None] == error["winograd" if channels + hidden <= WINOGRAD_CHANNELS else "exact"]


def interpolation(points):
    """The matrices A, G, B of F(4,3) at five points and infinity."""
    a = torch.stack([points**i for i in range(4)])
    others = [[q for q in points if q != p] for p in points]
    scale = torch.tensor(
        [torch.stack([p - q for q in rest]).prod() for p, rest in zip(points, others, strict=True)]
    )
    g = torch.stack([points**i / scale for i in range(3)], 1)

    def polynomial(roots):
        coefficients = torch.ones(1, dtype=torch.float64)
        for root in roots:
            shifted = torch.nn.functional.pad(coefficients, (1, 0))
            coefficients = shifted - root * torch.nn.functional.pad(coefficients, (0, 1))
        return coefficients

    b = torch.stack(
        [torch.nn.functional.pad(polynomial(rest), (0, 1)) for rest in others] + [polynomial(points)]
    )
    last_a = torch.tensor([[0], [0], [0], [1.0]], dtype=torch.float64)
    last_g = torch.tensor([[0, 0, 1.0]], dtype=torch.float64)
    return torch.cat([a, last_a], 1), torch.cat([g, last_g]), b


def test_the_points_of_interpolation_have_a_third_of_the_usual_ones_error():
    """In PyTorch, tile by tile: what docs/ops/conv_lstm.md says of 0, 2/3, 3/2 and their negatives."""
    patches, filters = torch.randn(256, 64, 6, 6).double(), torch.randn(256, 8, 3, 3).double() / 48
    error = {}
    for name, points in {"usual": (0, 1, -1, 2, -2), "ours": (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}.items():
        found = []
        for dtype in (torch.float64, torch.float32):
            a, g, b = (m.to(dtype) for m in interpolation(torch.tensor(points, dtype=torch.float64)))
            data, weights = b @ patches.to(dtype) @ b.T, g @ filters.to(dtype) @ g.T
            total = torch.zeros(8, 64, 6, 6, dtype=dtype)
            for d, w in zip(data, weights, strict=True):  # one channel after the other, as the kernel adds
                total += d * w[:, None]
            found.append(a @ total @ a.T)
        wide, narrow = found
        windows = patches.unfold(2, 3, 1).unfold(3, 3, 1)
        torch.testing.assert_close(wide, torch.einsum("ctyxij,coij->otyx", windows, filters))
        error[name] = ((narrow - wide).abs().max() / wide.abs().max()).item()
    assert error["ours"] < error["usual"] / 2


@WINOGRAD
@pytest.mark.parametrize("with_state", [True, False])
def test_core_of_the_matrix_engine_without_it(with_state):
    """In float64, which the engine does not take: PyTorch's convolutions serve the op, forward and backward."""
    x, weights, bias, state = problem(n=2, t=3, c=3, hidden=2, h=3, w=4, dtype=torch.float64)
    leaves = leaves_of(x, weights, bias, state if with_state else None, torch.float64)
    padded = [*leaves, *([] if with_state else [None, None])]
    output, cell, _ = torch.ops.vosops.conv_lstm_direct(*padded, 1.0)
    want, (_, want_cell) = reference.conv_lstm(*leaves[:3], tuple(leaves[3:]) or None)
    directions = [torch.randn_like(output), torch.randn_like(cell)]
    got = torch.autograd.grad([output, cell], leaves, directions)
    wanted = torch.autograd.grad([want, want_cell], leaves, directions)
    for a, b in zip((output, cell, *got), (want, want_cell, *wanted), strict=True):
        assert_near(a, b, TOLERANCE[torch.float64])


@WINOGRAD
def test_core_of_the_matrix_engine_of_nothing():
    x, weight = torch.empty(0, 2, 3, 4, 5).bfloat16().requires_grad_(), torch.randn(8, 5, 3, 3).bfloat16()
    output, cell, _ = torch.ops.vosops.conv_lstm_direct(x, weight.requires_grad_(), None, None, None, 1.0)
    assert output.shape == (0, 2, 2, 4, 5) and cell.shape == (0, 2, 4, 5)
    of_x, of_weight = torch.autograd.grad(output.sum() + cell.sum(), (x, weight))
    assert of_x.shape == x.shape and torch.equal(of_weight, torch.zeros_like(weight))


@WINOGRAD
def test_winograd_second_derivatives():
    given = winograd_problem("less than a tile")
    found = []
    for op, dtype, precision in (
        (vosops.conv_lstm, torch.float32, "winograd"),
        (reference.conv_lstm, torch.float64, None),
    ):
        leaves = leaves_of(*given, dtype)
        first = torch.autograd.grad(loss_of(op, leaves, precision), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, create_graph=True)
        third = torch.autograd.grad(second[1].square().sum(), leaves[0])
        found.append((*second, *third))
    for a, b in zip(*found, strict=True):
        assert_near(a, b, 10 * WINOGRAD_TOLERANCE)


@WINOGRAD
@settings(
    max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 3, 9, 9, 21, 33))),
    layout=st.sampled_from(LAYOUTS),
    with_state=st.booleans(),
    with_bias=st.booleans(),
    forget_bias=st.sampled_from([0.0, 1.0, -2.5]),
)
def test_winograd_of_any_size_and_stride(sizes, layout, with_state, with_bias, forget_bias):
    n, t, c, hidden, h, w = sizes
    x, weights, bias, state = problem(n=n, t=t, c=c, hidden=hidden, h=h, w=w)
    x = torch.stack([laid_out(frame, layout) for frame in x.unbind(1)], 1)
    state = tuple(laid_out(s, layout) for s in state) if with_state else None
    given = (x, [laid_out(weights[0], layout)], bias if with_bias else None, state)
    got = flat(vosops.conv_lstm(*given, forget_bias=forget_bias, precision="winograd"))
    want = flat(reference.conv_lstm(*in_float64(*given), forget_bias=forget_bias))
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, WINOGRAD_TOLERANCE)


# ---- How it fits into PyTorch.


def test_opcheck():
    gates, more_gates, cell = (t.requires_grad_() for t in pointwise_problem("odd sizes", torch.float64))
    op, backward = torch.ops.vosops.conv_lstm_pointwise, torch.ops.vosops.conv_lstm_pointwise_backward
    for more in (None, more_gates):
        torch.library.opcheck(op.default, (gates, more, cell, 1.0))
    last = gates.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(op.default, (last, more_gates, cell, 1.0))
    hidden, new_cell, saved = (t.detach().requires_grad_() for t in op(gates, None, cell, 1.0))
    torch.library.opcheck(backward.default, (hidden, new_cell, saved, cell, new_cell))


@WINOGRAD
@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck_winograd(with_state):
    x, weights, bias, state = problem(n=1, t=2, c=2, hidden=2, h=3, w=4)
    leaves = [t.requires_grad_() for t in (x, weights[0], bias, *state)]
    leaves = leaves if with_state else [*leaves[:3], None, None]
    op, backward = torch.ops.vosops.conv_lstm_winograd, torch.ops.vosops.conv_lstm_winograd_backward
    near = {"rtol": 1e-3, "atol": 1e-3}
    torch.library.opcheck(op.default, (*leaves, 1.0), **near)
    detached = [None if t is None else t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.vosops.conv_lstm_winograd_cached.default, (*detached, 1.0))
    if with_state:
        return
    output, cells = (t.detach() for t in op(*leaves, 1.0))
    grads = [torch.randn_like(output).requires_grad_() for _ in range(2)]
    # Without "test_aot_dispatch_dynamic": PyTorch's own convolution has no third derivative of symbolic size.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    arguments = (*grads, *leaves, 1.0, output, cells)
    torch.library.opcheck(backward.default, arguments, test_utils=utils, **near)


@pytest.mark.parametrize(
    ("variant", "compiler"),
    [("convolution", "inductor"), ("separable", "aot_eager"), ("spatial", "aot_eager")],
)
def test_compiles_without_graph_breaks(variant, compiler):
    x, weights, bias, state = problem(variant)
    inputs = [t.requires_grad_() for t in (x, bias, *weights)]

    def op(x, bias, *weights):
        return flat(vosops.conv_lstm(x, weights, bias, state, variant=variant))

    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*inputs), op(*inputs))
    grads = torch.autograd.grad(compiled(*inputs)[0].sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(op(*inputs)[0].sum(), inputs))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), op(*inputs))
        weights[0].mul_(2)
        torch.testing.assert_close(compiled(*inputs), op(*inputs))


def test_exports():
    x, weights, bias, state = problem()

    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return flat(vosops.conv_lstm(x, weight, bias, state))

    with torch.no_grad():
        program = torch.export.export(Module(), (x, weights[0]))
    torch.testing.assert_close(program.module()(x, weights[0]), Module()(x, weights[0]))


@pytest.mark.parametrize("precision", [None, "exact"])
def test_vmap_over_inputs_weights_and_gradients(precision):
    x, weights, bias, state = problem()
    xs, ws = torch.stack([x, x + 1, x - 1]), torch.stack([weights[0], 2 * weights[0], -weights[0]])

    def op(x, weight):
        return vosops.conv_lstm(x, weight, bias, state, precision=precision)[0]

    got = torch.vmap(op)(xs, ws)
    torch.testing.assert_close(got, torch.stack([op(x, w) for x, w in zip(xs, ws, strict=True)]))

    leaves = (x.requires_grad_(), weights[0].requires_grad_())
    output = op(*leaves)
    directions = torch.randn(3, *output.shape)
    got = torch.autograd.grad(output, leaves, directions, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(output, leaves, d, retain_graph=True) for d in directions]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.parametrize("precision", [None, "exact"])
def test_derivatives_through_vmap(precision):
    x, weights, bias, state = problem()
    xs = torch.stack([x, x + 1]).requires_grad_()
    weight = weights[0].requires_grad_()

    def op(x):
        return vosops.conv_lstm(x, weight, bias, state, precision=precision)[0]

    got = torch.autograd.grad(torch.vmap(op)(xs).square().sum(), (xs, weight))
    want = torch.autograd.grad(sum(op(x).square().sum() for x in xs), (xs, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)

    nested = torch.vmap(torch.vmap(op))(xs.unsqueeze(0))
    got = torch.autograd.grad(nested.square().sum(), xs)
    torch.testing.assert_close(got[0], want[0])


@WINOGRAD
def test_a_program_exported_without_gradients_is_differentiable():
    module, x = ConvLSTM(3, 2), torch.randn(1, 2, 3, 5, 6)
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
    for each in (module, exported):
        output, (_, c) = each(x)
        (output.square().sum() + c.sum()).backward()
    for got, want in zip(exported.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_forward_mode_is_refused():
    x, weights, bias, state = problem()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: vosops.conv_lstm(x, weights, bias, state), (x,), (x,))


def test_autocast_computes_in_its_dtype_as_lstm_does():
    x, weights, bias, state = problem()
    low = [t.bfloat16() for t in (x, *weights, bias, *state)]
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flat(vosops.conv_lstm(leaf, weights, bias, state))
    # With gradients on both sides: AMX serves half precision without them, and rounds less.
    want = flat(vosops.conv_lstm(low[0].requires_grad_(), low[1], low[2], tuple(low[3:])))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got[0].float().sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_deterministic_mode_is_exact(deterministic):
    given = problem()
    got = flat(vosops.conv_lstm(*given))
    want = flat(vosops.conv_lstm(*given, precision="exact"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@WINOGRAD
def test_every_output_is_written(deterministic):
    """In deterministic mode PyTorch fills what it allocates with NaN."""
    leaves = leaves_of(*winograd_problem("ragged tiles"), torch.float32)
    grads = torch.autograd.grad(loss_of(vosops.conv_lstm, leaves, "winograd"), leaves)
    assert all(g.isfinite().all() for g in grads)


@WINOGRAD
def test_threads_do_not_change_the_result():
    threads, results = torch.get_num_threads(), []
    given = winograd_problem("many tiles")
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaves = leaves_of(*given, torch.float32)
        loss = loss_of(vosops.conv_lstm, leaves, "winograd")
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_a_stream_gives_what_the_sequence_gives():
    x, weights, bias, state = problem(t=4)
    with torch.no_grad():
        output, last = vosops.conv_lstm(x, weights, bias, state)
        frames = []
        for t in range(4):
            frame, state = vosops.conv_lstm(x[:, t : t + 1], weights, bias, state)
            frames.append(frame)
    assert torch.equal(torch.cat(frames, 1), output)
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))


def test_time_first():
    x, weights, bias, state = problem()
    got = vosops.conv_lstm(x.transpose(0, 1), weights, bias, state, batch_first=False)
    want = vosops.conv_lstm(x, weights, bias, state)
    assert torch.equal(got[0].transpose(0, 1), want[0]) and torch.equal(got[1][1], want[1][1])


def test_empty_batch():
    output, (h, c) = vosops.conv_lstm(torch.empty(0, 2, 3, 4, 5), torch.randn(8, 5, 3, 3))
    assert output.shape == (0, 2, 2, 4, 5) and h.shape == c.shape == (0, 2, 4, 5)


# ---- The transformed weights that are kept.


@WINOGRAD
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changed_weights_are_transformed_anew(mode):
    x, weights, bias, state = problem()
    weight = torch.nn.Parameter(weights[0])

    def agree():
        with mode():
            got = flat(vosops.conv_lstm(x, weight, bias, state))
        want = flat(reference.conv_lstm(x, weight, bias, state))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    agree()
    with torch.no_grad():
        weight.mul_(1.5)
    agree()
    weight.data = torch.randn_like(weight) / 5
    agree()
    torch.optim.SGD([weight], 0.1).zero_grad()
    flat(vosops.conv_lstm(x, weight, bias, state))[0].sum().backward()
    torch.optim.SGD([weight], 0.1).step()
    agree()
    torch.optim.SGD([weight], 0.1, fused=True).step()  # does not give the weight a new version
    agree()
    version = weight._version
    weight.data.mul_(0.5)
    assert weight._version == version
    agree()


@WINOGRAD
@pytest.mark.parametrize("shape", [(1, 2, 4, 5, 0), (1, 2, 4, 0, 5), (1, 2, 0, 5, 6)])
@pytest.mark.parametrize("kept", [False, True])
def test_the_kernels_take_maps_without_pixels_or_channels(shape, kept):
    x, weight = torch.zeros(shape), torch.randn(8, shape[2] + 2, 3, 3)
    op = torch.ops.vosops.conv_lstm_winograd_cached if kept else torch.ops.vosops.conv_lstm_winograd
    output, _ = op(x, weight, None, None, None, 1.0)
    assert output.shape == (1, 2, 2, *shape[3:])
    torch.testing.assert_close(output[:, 0], torch.zeros_like(output[:, 0]))


@WINOGRAD
def test_weights_of_inference_mode_are_not_kept():
    x, weights, bias, state = problem()
    with torch.inference_mode():
        weight = weights[0].clone()
        first = vosops.conv_lstm(x, weight, bias, state)[0]
        weight.mul_(0.5)  # leaves no trace
        second = vosops.conv_lstm(x, weight, bias, state)[0]
    assert not torch.equal(first, second)


@WINOGRAD
def test_kept_weights_die_with_their_module():
    from vosops.ops.conv_lstm import _packed

    x, weights, bias, state = problem()
    before = len(_packed)
    weight = weights.pop().clone()
    with torch.no_grad():
        vosops.conv_lstm(x, weight, bias, state)
        vosops.conv_lstm(x, weight, bias, state)
    assert len(_packed) == before + 1
    del weight
    assert len(_packed) == before


# ---- Wrong input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 2, 4, 5)}, ValueError, r"x must have shape \(N, T, C, H, W\), got"),
        ({"x": "video"}, TypeError, "x must be a tensor, got str"),
        ({"x": torch.zeros(2, 3, 4, 5, 6).long()}, TypeError, "x must be float32.*got torch.int64"),
        ({"x": torch.zeros(2, 0, 4, 5, 6)}, ValueError, "x must have at least one step, got T = 0"),
        ({"x": torch.zeros(2, 3, 0, 5, 6)}, ValueError, "x must have at least one channel and one pixel"),
        ({"x": torch.zeros(2, 3, 4, 0, 6)}, ValueError, "x must have at least one channel and one pixel"),
        ({"x": torch.zeros(2, 3, 4, 5, 0)}, ValueError, "x must have at least one channel and one pixel"),
        ({"variant": "dense"}, ValueError, "variant must be one of convolution.*got 'dense'"),
        ({"variant": "spatial"}, ValueError, r"weights of variant 'spatial' must be 2 tensor\(s\), got 1"),
        (
            {"weights": torch.zeros(12, 8, 3, 3)},
            ValueError,
            r"weights\[0\] must have shape \(12, 7, kh, kw\)",
        ),
        ({"weights": torch.zeros(13, 7, 3, 3)}, ValueError, r"weights\[0\] must have 4\*hidden rows"),
        ({"weights": torch.zeros(12, 7, 2, 3)}, ValueError, r"weights\[0\] must have odd kernel sizes"),
        ({"weights": torch.zeros(12, 7, 3, 3).half()}, TypeError, r"weights\[0\] must have the dtype of x"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(12\), got \(3,\)"),
        ({"bias": torch.zeros(12, device="meta")}, ValueError, "bias must be on the device of x"),
        ({"weights": None}, TypeError, "weights must be a tensor or a sequence of tensors, got NoneType"),
        ({"state": 5}, TypeError, r"state must be a pair \(h, c\)"),
        ({"state": torch.zeros(2, 3, 5, 6)}, TypeError, r"state must be a pair \(h, c\)"),
        ({"state": (torch.zeros(2, 3, 5, 6),) * 3}, TypeError, r"state must be a pair \(h, c\)"),
        ({"state": (torch.zeros(2, 3, 5, 5),) * 2}, ValueError, r"state\[0\] must have shape \(2, 3, 5, 6\)"),
        ({"precision": "tf32"}, ValueError, "precision must be None, 'exact' or 'winograd', got 'tf32'"),
        (
            {"precision": "winograd", "weights": torch.zeros(12, 7, 5, 5)},
            ValueError,
            "precision='winograd' must come with float32 tensors on the CPU and a 3x3",
        ),
    ],
)
def test_wrong_input_names_the_argument(change, error, message):
    x, weights, bias, state = problem()
    given = {"x": x, "weights": weights, "bias": bias, "state": state, **change}
    with pytest.raises(error, match=message):
        vosops.conv_lstm(**given)


def test_explains_the_choice():
    x, weights, bias, state = problem()
    assert vosops.explain(vosops.conv_lstm, x, weights, bias, state).startswith("conv_lstm: cpp")
