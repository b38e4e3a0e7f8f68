"""Maps by rows against plain PyTorch in float64, in bands of every height, and what they hold of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from vosops.benchmarking.live_bytes import LiveBytes
from vosops.models import rows
from vosops.models.rows import (
    Added,
    Convolved,
    Cropped,
    Doubled,
    Enlarged,
    Held,
    Mapped,
    Padded,
    Pooled,
    Repeated,
    Unpooled,
    pool_with_places,
)
from vosops.models.segmentation._layers import chain


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["bands", "whole"])
def height(request, monkeypatch):
    """Of the maps: several bands of the least height, or one band."""
    monkeypatch.setattr(rows, "_BAND_BYTES", {"cpu": 1 if request.param == "bands" else 1 << 30})
    return 45


def a_map(height, channels=3, width=14):
    return torch.randn(2, channels, height, width, dtype=torch.float64)


def assert_same(found, wanted):
    assert tuple(found.size) == tuple(wanted.shape)
    torch.testing.assert_close(found.whole(), wanted, rtol=1e-12, atol=1e-12)
    step = max(1, found.size[2] // 3)  # rows that begin anywhere, and some of them again
    for start in (0, step, max(0, step - 2), 2 * step):
        stop = min(start + step + 1, found.size[2])
        torch.testing.assert_close(found.rows(start, stop), wanted[:, :, start:stop], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("taps", "options"),
    [
        (3, {"padding": 1}),
        (1, {}),
        (3, {}),
        (3, {"stride": 2, "padding": 1}),
        (7, {"stride": 2, "padding": 3}),
        (3, {"padding": 2, "dilation": 2}),
        (3, {"padding": 6, "dilation": 6}),
        (3, {"padding": 50, "dilation": 50}),
        (9, {"padding": 4}),
        (3, {"padding": 1, "groups": 6}),
    ],
    ids=str,
)
def test_convolution_of_several_maps(height, taps, options):
    a, b = a_map(height, 4), a_map(height, 2)
    weight = torch.randn(6, 6 // options.get("groups", 1), taps, taps, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    wanted = functional.conv2d(torch.cat([a, b], 1), weight, bias, **options)
    addend = torch.randn_like(wanted)
    assert_same(Convolved([Held(a), Held(b)], weight, bias, **options), wanted)
    found = Convolved([Held(a), Held(b)], weight, bias, slope=0.0, addend=Held(addend), **options)
    assert_same(found, (wanted + addend).relu())
    slope = torch.tensor([0.25], dtype=torch.float64)
    assert_same(
        Convolved([Held(a), Held(b)], weight, bias, slope=slope, **options), functional.prelu(wanted, slope)
    )
    assert_same(
        Convolved([Held(a), Held(b)], weight, bias, slope=0.25, **options), functional.prelu(wanted, slope)
    )


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": 1}], ids=str)
def test_convolution_as_a_sum(height, options, monkeypatch):
    """As on a GPU: each map by itself."""
    monkeypatch.setattr(rows, "_SPLITTING", ("cpu",))
    monkeypatch.setattr(torch, "cat", None)
    a, b, c = a_map(height, 4), a_map(height, 2), a_map(height, 1)
    weight, bias = torch.randn(6, 7, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    wanted = functional.conv2d(torch.concat([a, b, c], 1), weight, bias, **options)
    addend = torch.randn_like(wanted)
    found = Convolved([Held(a), Held(b), Held(c)], weight, bias, slope=0.0, addend=Held(addend), **options)
    assert_same(found, (wanted + addend).relu())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(90, 28), (45, 28), (100, 31), (45, 14), (22, 7), (1, 1)])
def test_bilinear(height, size, align_corners):
    x = a_map(height)
    wanted = functional.interpolate(x, size, mode="bilinear", align_corners=align_corners)
    found = Enlarged(Held(x.float()), size, align_corners=align_corners)
    torch.testing.assert_close(found.whole(), wanted.float(), rtol=1e-5, atol=1e-4)
    other = Enlarged(Mapped(Held(x.float()), torch.abs), size, align_corners=align_corners)
    wanted = functional.interpolate(x.abs(), size, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(
        Added([found, other]).whole(), found.whole() + wanted.float(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("size", [(90, 28), (89, 27), (50, 14), (91, 33)])
def test_nearest(height, size):
    x = a_map(height)
    assert_same(Repeated(Held(x), size), functional.interpolate(x, size, mode="nearest"))


@pytest.mark.parametrize(("window", "padding"), [(2, 0), (3, 1)])
def test_pooling(height, window, padding):
    x = a_map(height)
    assert_same(Pooled(Held(x), window, padding=padding), functional.max_pool2d(x, window, 2, padding))


def test_pieces_that_compute_nothing(height):
    a = a_map(height)
    assert_same(Added([Held(a), Held(-2 * a)], slope=0.0), (-a).relu())
    assert_same(Mapped(Held(a), torch.tanh), a.tanh())
    assert_same(Cropped(Held(a), (33, 9)), a[:, :, :33, :9])
    assert_same(Padded(Held(a), (height + 3, 17), left=2, above=1), functional.pad(a, (2, 1, 1, 2)))


def test_transposed_convolution(height):
    x = a_map(height, 5)
    weight, bias = torch.randn(5, 4, 2, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    wanted = functional.conv_transpose2d(x, weight, bias, stride=2)
    assert_same(Doubled(Held(x), weight, bias), wanted)


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("width", [14, 17])
def test_pooling_with_places_and_unpooling(height, odd, width):
    height += odd
    x = a_map(height, width=width).relu_()  # windows of zeros: the first place counts
    wanted, indices = functional.max_pool2d(x, 2, return_indices=True)
    pooled, places = pool_with_places(Held(x))
    assert torch.equal(pooled, wanted)
    assert places.dtype == torch.uint8
    assert places.numel() == wanted[..., 0].numel() * -(-(width // 2) // 4)
    values = torch.randn_like(wanted)
    back = functional.max_unpool2d(values, indices, 2, output_size=(height, width))
    assert_same(Unpooled(Held(values), places, (height, width)), back)


def test_a_chain_of_modules_is_what_they_compute(height):
    modules = nn.Sequential(
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, padding=1),
        nn.BatchNorm2d(8),
        nn.PReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        nn.Tanh(),
        nn.Sequential(nn.ConvTranspose2d(8, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
        nn.Dropout(),
        nn.ConvTranspose2d(5, 4, 2, stride=2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU6(),
    ).double()
    for module in modules.modules():
        if isinstance(module, nn.BatchNorm2d):
            for x in (module.weight, module.bias, module.running_mean):
                x.normal_()
            module.running_var.uniform_(0.5, 2)
    x = a_map(height, 6)
    modules.eval()
    found = chain([Held(x[:, :2]), Held(x[:, 2:])], modules).whole()
    torch.testing.assert_close(found, modules(x), rtol=1e-6, atol=1e-6)  # weights of resizing are float32


def test_a_chain_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="modules must be ones that compute by rows, got Softmax"):
        chain(Held(a_map(8)), nn.Softmax(1))


def test_a_residual_block_changes_its_map_in_place(height):
    first, second = (nn.Conv2d(3, 3, 3, padding=1).double() for _ in range(2))
    x = a_map(height)
    wanted = x + second(first(x))
    assert chain(Held(x), first, second, addend=Held(x)).whole(into=x) is x
    torch.testing.assert_close(x, wanted)


def test_no_row_is_computed_twice(monkeypatch):
    monkeypatch.setattr(rows, "_BAND_BYTES", {"cpu": 1})
    made = []

    class Counted(Convolved):
        def make(self, start, stop, out):
            made.extend(range(start, stop))
            super().make(start, stop, out)

    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64)
    below = Counted([Held(a_map(45))], weight, padding=1)
    Convolved([Convolved([below], weight, padding=1)], weight, padding=1).whole()
    assert made == list(range(45))


def test_a_chain_holds_bands(monkeypatch):
    monkeypatch.setattr(rows, "_BAND_BYTES", {"cpu": 1})
    convolutions = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)), nn.Conv2d(8, 1, 1))
    x = torch.randn(1, 8, 512, 32)
    with LiveBytes() as live:
        found = chain(Held(x), convolutions).whole()
    assert live.peak - found.nbytes < 0.25 * x.nbytes
    with LiveBytes() as live:
        torch.testing.assert_close(convolutions(x), found)
    assert live.peak > 1.9 * x.nbytes


@pytest.mark.parametrize("size", [(0, 3, 9, 7), (1, 3, 1, 1), (1, 3, 0, 7)])
def test_small_and_empty_maps(size):
    x = torch.randn(size)
    weight = torch.randn(4, 3, 3, 3)
    if size[2]:
        torch.testing.assert_close(
            Convolved([Held(x)], weight, padding=1).whole(), functional.conv2d(x, weight, padding=1)
        )
    assert Mapped(Held(x), torch.abs).whole().shape == x.shape


@pytest.mark.parametrize("channels", [8, 40])  # 40: more than what is convolved by Winograd's algorithm
def test_autocast_and_channels_last(channels):
    x = torch.randn(1, channels, 40, 24).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    found = chain(Held(x), conv, nn.ReLU(), conv).whole()
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, conv(conv(x).relu()), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = chain(Held(x), conv, nn.ReLU(), conv).whole()
    torch.testing.assert_close(half, found, rtol=0.05, atol=0.05)
