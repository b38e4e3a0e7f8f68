"""local_attention: softmax attention in a window around each pixel, with what is learned for each offset."""

from __future__ import annotations

import pytest
import torch

import vosops
from vosops.ops.local_attention import HAS_COMPILED
from vosops.reference.local_attention import local_attention as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True, params=["cpp", "reference"])
def backend(request):
    """Every test on the compiled kernels and on shifts of whole maps."""
    if request.param == "cpp" and not HAS_COMPILED:
        pytest.skip("the CPU library has no local_attention")
    with vosops.use_backend(request.param):
        yield request.param


def maps(dtype=torch.float32, batch=2, channels=8, value_channels=6, size=(7, 9)) -> list[torch.Tensor]:
    return [torch.randn(batch, c, *size, dtype=dtype) for c in (channels, channels, value_channels)]


def learned(offsets: int, heads=2, channels=8, value_channels=6, dtype=torch.float32) -> dict:
    return {
        "relative_key": torch.randn(heads, channels // heads, offsets, dtype=dtype),
        "relative_value": torch.randn(heads, value_channels // heads, offsets, dtype=dtype),
        "bias": torch.randn(heads, offsets, dtype=dtype),
    }


def test_golden_aot(golden):
    """AOT's own layer: MultiheadLocalAttentionV2, with its embeddings of the offsets."""
    case = golden("aot_attention.pt")["local_v2_d2"]
    parameters = case["params"]
    out, weights = vosops.local_attention(
        *case["inputs"],
        radius=2,
        heads=4,
        relative_key=parameters["relative_emb_k.weight"].view(4, 25, 8).transpose(1, 2),
        bias=parameters["relative_emb_k.bias"].view(4, 25),
        relative_value=parameters["relative_emb_v"],
        return_weights=True,
    )
    projected = torch.nn.functional.linear(
        out.flatten(2).permute(2, 0, 1), parameters["projection.weight"], parameters["projection.bias"]
    )
    torch.testing.assert_close(projected, case["out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(weights.flatten(3), case["attn"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("radius", "dilation", "size"),
    [
        (2, 1, (7, 9)),
        (0, 1, (3, 4)),
        (5, 2, (6, 41)),
        (7, 1, (1, 1)),
        (9, 3, (4, 2)),
        (1, 2, (4, 4)),
        (8, 1, (3, 70)),
    ],
)
def test_the_reference_agrees(dtype, radius, dilation, size):
    q, k, v = maps(dtype, size=size)
    options = learned((2 * (radius // dilation) + 1) ** 2, dtype=dtype)
    arguments = {"radius": radius, "dilation": dilation, "heads": 2, "return_weights": True, **options}
    out, weights = vosops.local_attention(q, k, v, **arguments)
    exact = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    expected, expected_weights = reference(q.double(), k.double(), v.double(), **exact)
    assert out.dtype == dtype and weights.dtype == torch.promote_types(dtype, torch.float32)
    rounding = {torch.bfloat16: 4e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(out.double(), expected, atol=rounding, rtol=rounding)
    torch.testing.assert_close(weights.double(), expected_weights, atol=1e-5, rtol=0)


def test_a_window_over_the_whole_image_is_attention():
    q, k, v = maps(size=(3, 4))
    flat = [x.flatten(2).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(vosops.local_attention(q, k, v, radius=3), expected)


def test_offsets_are_those_of_the_key_row_by_row():
    """A bias that allows one offset alone moves the value against it; where it leads outside, the rest is shared."""
    q, k, v = maps(batch=1)
    bias = torch.full((1, 9), -1e4)
    bias[0, 5] = 0  # one pixel to the right
    out = vosops.local_attention(q * 0, k, v, radius=1, bias=bias)
    torch.testing.assert_close(out[..., :-1], v[..., 1:])


def test_a_bias_for_each_pixel():
    q, k, v = maps()
    bias = torch.randn(2, 9)
    for_pixels = bias[None, :, :, None, None].expand(2, 2, 9, 7, 9)
    expected = vosops.local_attention(q, k, v, radius=1, heads=2, bias=bias)
    torch.testing.assert_close(vosops.local_attention(q, k, v, radius=1, heads=2, bias=for_pixels), expected)


def test_scale_does_not_touch_the_relative_key():
    q, k, v = maps()
    options = learned(9)
    out = vosops.local_attention(q, k, v, radius=1, heads=2, scale=0.0, **options)
    torch.testing.assert_close(out, vosops.local_attention(q, k * 0, v, radius=1, heads=2, **options))


def test_weights_sum_to_one_and_are_zero_outside():
    weights = vosops.local_attention(*maps(), radius=2, heads=2, return_weights=True)[1]
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 2, 7, 9))
    assert weights[:, :, :10, 0].eq(0).all(), "above the first row"


def test_nan_stays_in_its_window():
    q, k, v = maps(batch=1)
    k[0, 0, 3, 4] = torch.nan
    bad = vosops.local_attention(q, k, v, radius=1).isnan().any(1)[0]
    assert bad[2:5, 3:6].all() and bad.sum() == 9


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
def test_nothing_gives_nothing(shape):
    x = torch.zeros(shape, requires_grad=True)
    out = vosops.local_attention(x, x, x, heads=2)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape


def test_strides_do_not_matter():
    q, k, v = maps()
    others = [x.to(memory_format=torch.channels_last) for x in (q, k)] + [v.transpose(2, 3).contiguous().mT]
    expected = vosops.local_attention(q, k, v, heads=2, radius=2)
    torch.testing.assert_close(vosops.local_attention(*others, heads=2, radius=2), expected)


@pytest.mark.parametrize(("radius", "dilation"), [(1, 1), (2, 2)])
def test_derivatives_to_second_order(radius, dilation):
    inputs = maps(torch.float64, batch=1, channels=2, value_channels=2, size=(3, 2))
    options = learned(9, heads=2, channels=2, value_channels=2, dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (*inputs, *options.values())]

    def function(q, k, v, *rest):
        given = dict(zip(options, rest, strict=True))
        return vosops.local_attention(q, k, v, radius=radius, dilation=dilation, heads=2, **given)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, gen_non_contig_grad_outputs=True)


def test_gradients_agree_with_the_reference():
    options = {"heads": 2, "radius": 3, **learned(49)}
    gradients = []
    for function in (vosops.local_attention, reference):
        torch.manual_seed(1)
        inputs = [x.requires_grad_() for x in maps()]
        out = function(*inputs, **options)
        gradients.append(torch.autograd.grad((out * torch.randn_like(out)).sum(), inputs))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dot", "weigh", "spread"])
def test_opcheck(name, backend):
    first = torch.randn(2, 4 if name == "dot" else 9, 3, 4, requires_grad=True)
    second = torch.randn(2, 4, 3, 4, requires_grad=True)
    op = getattr(torch.ops.vosops, f"local_attention_{name}{'' if backend == 'cpp' else '_shifts'}")
    torch.library.opcheck(op, (first, second, 1, 1))
    torch.library.opcheck(op, (first.detach().mT.contiguous().mT, second.detach(), 1, 2))


def test_compile_without_a_break():
    q, k, v = maps()
    options = {"heads": 2, "radius": 2, **learned(25)}
    compiled = torch.compile(vosops.local_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, **options), vosops.local_attention(q, k, v, **options))


def test_vmap_folds_into_the_batch():
    q, k, v = (torch.stack([x, x + 1]) for x in maps())
    mapped = torch.vmap(lambda q, k, v: vosops.local_attention(q, k, v, heads=2, radius=1))(q, k, v)
    one_by_one = [vosops.local_attention(*x, heads=2, radius=1) for x in zip(q, k, v, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(one_by_one))


def test_autocast_leaves_scores_in_float32():
    q, k, v = maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = vosops.local_attention(q, k, v, heads=2, return_weights=True)
    assert out.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(out, vosops.local_attention(q, k, v, heads=2))


def test_forward_mode_is_refused():
    q, k, v = maps()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="local_attention"):
        vosops.local_attention(torch.autograd.forward_ad.make_dual(q, q), k, v)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(8, 7, 9)}, ValueError, r"query must have shape \(N, C, H, W\)"),
        ({"key": torch.zeros(2, 8, 7, 8)}, ValueError, r"key must have shape \(2, 8, 7, 9\)"),
        ({"value": torch.zeros(1, 6, 7, 9)}, ValueError, r"value must have shape \(2, Cv, 7, 9\)"),
        ({"key": torch.zeros(2, 8, 7, 9).half()}, TypeError, "key must have the dtype of query"),
        ({"query": torch.zeros(2, 8, 7, 9, dtype=torch.int64)}, TypeError, "query must be float32"),
        ({"radius": -1}, ValueError, "radius must be at least 0, got -1"),
        ({"radius": 1.5}, TypeError, "radius must be an int, got float"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"heads": 3}, ValueError, "query must have a multiple of heads = 3 channels, got 8"),
        ({"heads": 4}, ValueError, "value must have a multiple of heads = 4 channels, got 6"),
        ({"relative_key": torch.zeros(2, 4, 9)}, ValueError, r"relative_key must have shape \(2, 4, 225\)"),
        (
            {"relative_value": torch.zeros(2, 4, 225)},
            ValueError,
            r"relative_value must have shape \(2, 3, 225\)",
        ),
        ({"bias": torch.zeros(1, 225)}, ValueError, r"bias must have shape \(2, 225\)"),
        ({"bias": torch.zeros(1, 2, 225, 7, 9)}, ValueError, r"bias must have shape \(2, 2, 225, 7, 9\)"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    q, k, v = maps()
    with pytest.raises(error, match=message):
        vosops.local_attention(**{"query": q, "key": k, "value": v, "heads": 2, **change})
