"""3x3 convolutions by Winograd's F(4x4,3x3), as the reference networks run them on a CPU."""

import pytest
import torch
from torch.nn import functional

import vosops
from vosops.models.convolution import Conv3x3, conv_norm
from vosops.ops.conv3x3 import HAS_ROWS, HAS_WINOGRAD, conv2d, conv2d_rows

TOLERANCE = 3e-6  # of the output's root mean square; PyTorch's own: 3e-7
SIZES = {  # N, C, M, H, W
    "one of everything": (1, 1, 1, 1, 1),
    "one row": (1, 5, 7, 1, 19),
    "one column": (2, 3, 25, 23, 1),
    "odd sizes": (2, 33, 50, 13, 67),
    "several bands and blocks": (1, 40, 64, 70, 130),
}
TAKEN = (1, 32, 32, 16, 16)  # the smallest that the networks convolve so

pytestmark = pytest.mark.skipif(not HAS_WINOGRAD, reason="the CPU library was not compiled")
needs_rows = pytest.mark.skipif(not HAS_ROWS, reason="the CPU library is an older one")


def problem(n, c, m, h, w):
    """x, weight, bias and addend."""
    return (
        torch.randn(n, c, h, w),
        torch.randn(m, c, 3, 3) / (3 * c**0.5),
        torch.randn(m),
        torch.randn(n, m, h, w),
    )


def exact(x, weight, bias=None, addend=None, relu=False):
    """In float64."""
    y = torch.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    y = y if addend is None else y + addend.double()
    return y.relu() if relu else y


def assert_near(got, want):
    assert got.dtype == torch.float32 and got.shape == want.shape
    error = (got.double() - want).abs().max()
    assert error <= 8 * TOLERANCE * want.square().mean().sqrt().clamp(min=0.1)  # 8 root mean squares at most


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("given", ["nothing", "bias", "bias and addend"])
def test_core_convolves(size, relu, given):
    x, weight, bias, addend = problem(*SIZES[size])
    bias, addend = (bias if "bias" in given else None), (addend if "addend" in given else None)
    got = torch.ops.vosops.conv3x3_winograd(x, weight, bias, addend, relu)
    assert_near(got, exact(x, weight, bias, addend, relu))


def test_core_reads_any_stride():
    x, weight, bias, addend = problem(*SIZES["odd sizes"])
    want = exact(x, weight, bias, addend)
    for make in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: torch.cat([t * torch.nan, t], 1)[:, t.shape[1] :],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert_near(torch.ops.vosops.conv3x3_winograd(make(x), make(weight), bias, make(addend), False), want)


def test_core_nan_stays_nan_and_stays_near():
    x, weight, bias, _ = problem(1, 8, 8, 40, 40)
    x[0, 3, 20, 20] = torch.nan
    y = torch.ops.vosops.conv3x3_winograd(x, weight, bias, None, True)
    assert y[0, :, 19:22, 19:22].isnan().all()
    far = torch.ones(40, 40, dtype=torch.bool)
    far[16:24, 16:24] = False  # the tiles whose patches see it
    assert not y[0][:, far].isnan().any()


@pytest.mark.parametrize("rows", [False, pytest.param(True, marks=needs_rows)])
def test_core_relu_of_what_is_below_zero_is_zero(rows):
    x, weight, bias, addend = problem(1, 8, 8, 12, 16)
    addend[..., ::2] = -torch.inf
    addend[..., 1::2] = -1e30
    if rows:
        got = torch.full_like(addend, torch.nan)
        torch.ops.vosops.conv3x3_winograd_rows([x], weight, bias, addend, got, 0.0, 0)
    else:
        got = torch.ops.vosops.conv3x3_winograd(x, weight, bias, addend, True)
    assert (got == 0).all() and not got.signbit().any()


def test_core_empty():
    for n, c, m, h, w in ((0, 4, 4, 8, 8), (1, 4, 0, 8, 8), (1, 4, 4, 0, 8)):
        x, weight, bias, _ = problem(n, c, m, h, w)
        assert torch.ops.vosops.conv3x3_winograd(x, weight, bias, None, False).shape == (n, m, h, w)
    x, weight, bias, addend = problem(1, 0, 3, 5, 5)
    weight = torch.empty(3, 0, 3, 3)
    got = torch.ops.vosops.conv3x3_winograd(x, weight, bias, addend, False)
    torch.testing.assert_close(got, addend + bias[:, None, None])


def test_core_does_not_depend_on_the_number_of_threads():
    x, weight, bias, addend = problem(*SIZES["several bands and blocks"])
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(torch.ops.vosops.conv3x3_winograd(x, weight, bias, addend, True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("wrong", ["x", "weight", "bias", "addend"])
def test_wrong_sizes_are_refused(wrong):
    names = ("x", "weight", "bias", "addend")
    arguments = dict(zip(names, problem(*SIZES["odd sizes"]), strict=True))
    arguments[wrong] = arguments[wrong][:, 1:] if wrong != "bias" else arguments[wrong][1:]
    if wrong == "x":
        wrong = "weight"  # whose channels must be those of x
    with pytest.raises(RuntimeError, match=wrong):
        torch.ops.vosops.conv3x3_winograd(*arguments.values(), False)


# ---- Some rows of several maps.


@needs_rows
@pytest.mark.parametrize("slope", [1.0, 0.0, 0.25])
@pytest.mark.parametrize(("start", "stop"), [(0, 23), (0, 6), (5, 14), (9, 23), (22, 23)])
def test_rows_of_several_maps(start, stop, slope):
    n, height, width, counts = 2, 23, 37, (5, 1, 30)
    maps = [torch.randn(n, c, height, width) for c in counts]
    weight, bias = torch.randn(50, sum(counts), 3, 3) / 18, torch.randn(50)
    addend = torch.randn(n, 50, height, width)
    want = functional.leaky_relu(exact(torch.cat(maps, 1), weight, bias, addend), slope)[:, :, start:stop]
    low, high = max(start - 1, 0), min(stop + 1, height)
    whole = torch.full((n, 60, height, width), torch.nan)
    out = whole[:, 4:54, start:stop]
    parts = [x[:, :, low:high] for x in maps]
    conv2d_rows(parts, weight, bias, out, above=start - low, addend=addend[:, :, start:stop], slope=slope)
    assert_near(out, want)
    assert int(whole.isnan().sum()) == whole.numel() - out.numel(), "nothing else is written"


@needs_rows
def test_rows_of_maps_of_another_layout():
    x, weight, bias, addend = problem(*SIZES["odd sizes"])
    want = exact(x, weight, bias, addend)
    out = torch.empty_like(addend)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, addend)]
    conv2d_rows([last[0]], weight, bias, out, addend=last[1])
    assert_near(out, want)


@needs_rows
@pytest.mark.parametrize("wrong", ["maps", "weight", "bias", "addend", "none"])
def test_wrong_rows_are_refused(wrong):
    x, weight, bias, addend = problem(*SIZES["odd sizes"])
    given = {
        "maps": [x, x[:, :1]],
        "weight": torch.cat([weight, weight[:, :1]], 1),
        "bias": bias,
        "addend": addend,
    }
    out = torch.empty_like(addend)
    torch.ops.vosops.conv3x3_winograd_rows(*given.values(), out, 1.0, 0)
    if wrong == "maps":
        given["maps"][1] = x[:, :1, 1:]
    elif wrong == "none":
        given["maps"], wrong = [], "maps"
    else:
        given[wrong] = given[wrong][:, 1:] if wrong == "weight" else given[wrong][1:]
    with pytest.raises(RuntimeError, match=wrong):
        torch.ops.vosops.conv3x3_winograd_rows(*given.values(), out, 1.0, 0)


@needs_rows
def test_rows_are_registered_as_pytorch_wants():
    x, weight, bias, addend = problem(*SIZES["odd sizes"])
    arguments = ([x], weight, bias, addend, torch.empty_like(addend), 0.0, 0)
    torch.library.opcheck(torch.ops.vosops.conv3x3_winograd_rows.default, arguments)


# ---- When the networks use it.


@pytest.fixture
def calls(monkeypatch):
    """The calls that PyTorch's own convolution gets."""
    seen, own = [], functional.conv2d

    def conv2d(*arguments, **options):
        seen.append(arguments)
        return own(*arguments, **options)

    monkeypatch.setattr(functional, "conv2d", conv2d)
    return seen


@torch.no_grad()
def test_large_maps_are_convolved_so(calls):
    x, weight, bias, addend = problem(*TAKEN)
    assert_near(conv2d(x, weight, bias, padding=1), exact(x, weight, bias))
    assert_near(conv2d(x, weight, bias, 1, (1, 1), relu=True), exact(x, weight, bias, relu=True))
    layer = Conv3x3(32, 32)
    assert_near(layer(x, addend, relu=True), exact(x, layer.weight, layer.bias, addend, True))
    assert not calls


@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "padding": 1}, {"padding": 0}, {"padding": 2, "dilation": 2}, {"padding": "same"}],
)
@torch.no_grad()
def test_other_convolutions_are_pytorchs(calls, options):
    x, weight, bias, _ = problem(*TAKEN)
    assert torch.equal(conv2d(x, weight, bias, **options), torch.conv2d(x, weight, bias, **options))
    assert torch.equal(
        conv2d(x, weight[:, :1], bias, 1, 1, 1, 32), torch.conv2d(x, weight[:, :1], bias, 1, 1, 1, 32)
    )
    assert len(calls) == 2


def test_with_gradients_small_in_other_dtypes_and_by_the_reference_it_is_pytorchs(calls):
    x, weight, bias, addend = problem(*TAKEN)
    conv2d(x, weight, bias, padding=1, addend=addend, relu=True)  # gradients may be asked for
    with torch.no_grad():
        conv2d(x[..., 1:], weight, bias, padding=1)
        conv2d(x[:, :31], weight[:, :31], bias, padding=1)
        conv2d(x.double(), weight.double(), bias.double(), padding=1)
        with vosops.use_backend("reference"):
            conv2d(x, weight, bias, padding=1)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv2d(x, weight, bias, padding=1).dtype == torch.bfloat16
    assert len(calls) == 6


def test_gradients_are_those_of_the_plain_formula():
    x, weight, bias, addend = (t.double().requires_grad_() for t in problem(2, 3, 4, 5, 6))
    assert torch.autograd.gradcheck(
        lambda *args: conv2d(*args[:3], padding=1, addend=args[3], relu=True), (x, weight, bias, addend)
    )


def test_a_folded_norm_gives_the_same():
    conv, norm = torch.nn.Conv2d(32, 48, 3, padding=1, bias=False), torch.nn.BatchNorm2d(48)
    with torch.no_grad():
        (
            norm.running_mean.normal_(),
            norm.running_var.uniform_(0.5, 2),
            norm.weight.normal_(),
            norm.bias.normal_(),
        )
    conv.eval(), norm.eval()
    x = torch.randn(1, 32, 20, 21)
    want = conv_norm(conv, norm, x, relu=True)
    with torch.no_grad():
        torch.testing.assert_close(conv_norm(conv, norm, x, relu=True), want, rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_breaks():
    x, weight, bias, addend = problem(*TAKEN)
    compiled = torch.compile(
        lambda: conv2d(x, weight, bias, padding=1, addend=addend, relu=True),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        assert_near(compiled(), exact(x, weight, bias, addend, True))
    torch.library.opcheck(
        torch.ops.vosops.conv3x3_winograd.default,
        (x, weight, bias, addend, True),
        test_utils=("test_schema", "test_faketensor"),
    )


@torch.no_grad()
def test_vmap_is_one_call_after_the_other():
    x, weight, bias, _ = problem(*TAKEN)
    several = torch.stack([x, -x])
    mapped = torch.vmap(lambda x: conv2d(x, weight, bias, padding=1))(several)
    assert torch.equal(mapped, torch.stack([conv2d(x, weight, bias, padding=1) for x in several]))
