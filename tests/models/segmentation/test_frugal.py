"""The segmentation networks by rows: the logits that they compute naively, and the memory that they need."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import vosops
from tests.effort import leave_out
from tests.models.segmentation import originals
from vosops.benchmarking.live_bytes import LiveBytes
from vosops.models import rows
from vosops.models.segmentation import deconvnet

HIGH = (1024, 2048)
NARROW = {"_STAGES": ((8, 8), (8, 12), (12, 12, 16), (16, 16, 16), (16, 16, 16)), "_FULL": 32}
CASES = {  # name: model, options, size, and the part of the naive peak that it may need at 1024 x 2048
    "unet": ("unet", {}, (50, 67), 0.4),
    "unet bilinear": ("unet", {"bilinear": True}, (49, 66), 0.35),
    "unet++": ("unet++", {"deep_supervision": True}, (48, 64), 0.5),
    "resunet": ("resunet", {}, (40, 48), 0.25),
    "resunet++": ("resunet++", {}, (40, 48), 0.35),
    "segnet": ("segnet", {}, (46, 90), 0.25),
    "deconvnet": ("deconvnet", {}, (224, 256), 0.25),
    "icnn": ("icnn", {}, (45, 67), 0.5),
    "gridnet": ("gridnet", {"widths": (8, 12, 16)}, (36, 52), 0.25),
    "deeplab": ("deeplabv3+", {}, (65, 81), 0.4),
    "deeplab os8": ("deeplabv3+", {"output_stride": 8}, (65, 81), 0.6),
    "deeplab mobilenet": ("deeplabv3+", {"backbone": "mobilenet_v2"}, (65, 81), 0.4),
    "deeplab paper": ("deeplabv3+", {"backbone": "mobilenet_v2", "paper": True}, (65, 81), 0.45),
    "deeplab xception": ("deeplabv3+", {"backbone": "xception"}, (80, 97), 0.5),
    "hrnet": ("hrnet_w18", {}, (65, 97), 0.5),
    "hrnet pixel centres": ("hrnet_w18", {"align_corners": False}, (64, 96), 0.5),
    "ocr": ("hrnet_w48_ocr", {}, (64, 96), 0.3),
    "danet": ("danet", {"multi_grid": (4, 8, 16)}, (64, 65), 0.2),
    "pspnet": ("pspnet", {}, (65, 73), 0.5),
    "pspnet without pyramid": ("pspnet", {"bins": (), "zoom_factor": 2}, (65, 73), 0.6),
    "icnet": ("icnet", {}, (97, 66), 0.6),
}
_BY_ATTENTION = ("ocr", "danet")  # whose kernels do not run without data
_VARIANTS = ("deeplab os8", "deeplab mobilenet")  # of a network that is measured
_SAME_MAPS = ("unet bilinear", "hrnet pixel centres", "pspnet without pyramid")  # as others have


def made(name, device="cpu", dtype=torch.float32):
    """The network with random weights."""
    model, options, *_ = CASES[name]
    network = originals.empty(model, **options)
    if device == "cpu":
        torch.manual_seed(0)
        network = originals.draw(network.to_empty(device="cpu"))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(std=0.2)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith("gamma"):
                parameter.data.fill_(0.5)
    return network.to(dtype)


@pytest.fixture(autouse=True)
def _narrow_deconvnet(request, monkeypatch):
    if "deconvnet" in request.node.name and "memory" not in request.node.name:
        for constant, value in NARROW.items():
            monkeypatch.setattr(deconvnet, constant, value)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_original_way(name, monkeypatch):
    monkeypatch.setattr(rows, "_BAND_BYTES", {"cpu": 1})  # the least bands
    network = made(name)
    images = torch.rand(2, 3, *CASES[name][2])
    with torch.no_grad():
        assert network.streams
        found = network(images)
        with vosops.use_backend("reference"):
            assert not network.streams
            naive = network(images)
    assert found.shape == naive.shape
    assert (found - naive).abs().max() <= 3e-5 * naive.abs().max()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("segnet", "deconvnet")])
def test_logits_of_large_images(name):
    """In bands as they are; where values are unpooled, near ties may be taken either way.

    MobileNetV2's random weights make more of float32's rounding, in the original way too.
    """
    network = made(name)
    images = torch.rand(1, 3, *(network.sides.at_least(side) for side in (512, 1024)))
    with torch.no_grad():
        found = network(images)
        with vosops.use_backend("reference"):
            naive = network(images)
            exact = network.double()(images.double())
    own = (naive - exact).abs().max()
    assert (found - exact).abs().max() <= max(3e-5 * exact.abs().max(), 1.5 * own)


GOLDEN = [
    ("unet", "unet.pt", "odd", {}),
    ("unet++", "unetpp.pt", "plain", {}),
    ("resunet", "resunet.pt", "small", {}),
    ("resunet++", "resunetpp.pt", "small", {}),
    ("segnet", "segnet.pt", "odd_below", {}),
    ("icnn", "icnn.pt", "face_odd", {}),
    ("gridnet", "gridnet.pt", "basic", {}),
    ("deeplabv3+", "deeplabv3plus_resnet50.pt", "os8", {"output_stride": 8}),
    ("deeplabv3+", "deeplabv3plus_mobilenetv2.pt", "os16", {"backbone": "mobilenet_v2"}),
    ("deeplabv3+", "deeplabv3plus_xception.pt", "os16", {"backbone": "xception"}),
    ("hrnet_w48", "hrnet_w48.pt", "ac1_odd", {}),
]


@pytest.mark.parametrize(("model", "file", "case", "options"), GOLDEN)
def test_the_original_way_gives_the_originals_logits(model, file, case, options):
    golden = originals.case(file, case)
    network = originals.with_weights_of(golden, originals.empty(model, **options))
    with torch.no_grad(), vosops.use_backend("reference"):
        logits = network(golden["x"].float())
    originals.assert_equals(golden, "logits", logits, quantile=0.999 if model == "segnet" else None)


@pytest.mark.parametrize("name", ["unet bilinear", "segnet", "gridnet", "hrnet", "resunet++", "icnn"])
def test_logits_are_exact_in_double_precision(name, monkeypatch):
    monkeypatch.setattr(rows, "_BAND_BYTES", {"cpu": 1})
    network = made(name, dtype=torch.float64)
    images = torch.rand(1, 3, *CASES[name][2], dtype=torch.float64)
    with torch.no_grad():
        found = network(images)
        with vosops.use_backend("reference"):
            naive = network(images)
    assert (found - naive).abs().max() <= 1e-6 * naive.abs().max()  # weights of resizing are float32


@pytest.mark.parametrize("name", ["resunet", "hrnet", "danet"])
def test_half_precision(name):
    network = made(name)
    images = torch.rand(1, 3, *CASES[name][2])
    with torch.no_grad():
        wanted = network(images)
        network.bfloat16()
        found = network(images.bfloat16())
        with vosops.use_backend("reference"):
            naive = network(images.bfloat16())
    assert found.dtype == naive.dtype == torch.bfloat16
    error, own = ((x.float() - wanted).square().mean().sqrt() for x in (found, naive))
    assert error <= 2 * own


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*_BY_ATTENTION, *_SAME_MAPS)])
def test_memory_at_high_resolution(name):
    leave_out(name in _VARIANTS, "the network that it varies keeps the same maps")
    network = made(name, "meta")
    _, _, _, share = CASES[name]
    size = [network.sides.at_least(side) for side in HIGH]
    peaks = {}
    for way in ("rows", "reference"):
        images = torch.empty(1, 3, *size, device="meta")
        context = vosops.use_backend("reference") if way == "reference" else nullcontext()
        with torch.no_grad(), context, LiveBytes() as live:
            found = network(images) if way == "reference" else network.rows(images)
            if way == "rows":
                for _ in found.bands():
                    pass
        peaks[way] = live.peak
        del found
    assert peaks["rows"] <= share * peaks["reference"], peaks


@pytest.mark.parametrize("name", _BY_ATTENTION)
def test_memory_of_attention(name, monkeypatch):
    monkeypatch.setattr(rows, "_BAND_BYTES", {"cpu": 1})
    network = made(name)
    images = torch.rand(1, 3, 256, 512)
    with torch.no_grad(), LiveBytes() as live:
        network.rows(images)
    most = {"danet": 90e6, "ocr": 45e6}  # a copy of the largest weight, 38 and 13 MB, and the maps
    assert live.peak <= most[name]


def test_it_streams_only_where_it_may():
    network = made("gridnet")
    assert not network.streams, "gradients"
    with torch.no_grad():
        assert network.streams
        assert not network.train().streams
        network.eval()
        seen = []
        handle = network.lateral_init.register_forward_hook(lambda *arguments: seen.append(arguments))
        assert not network.streams
        network(torch.rand(1, 3, 16, 16))
        assert len(seen) == 1
        handle.remove()
        assert network.streams


def test_it_maps_without_bands():
    network = made("gridnet")
    images = torch.rand(2, 1, 3, 16, 20)
    with torch.no_grad():
        wanted = torch.stack([network(x) for x in images])
        torch.testing.assert_close(torch.vmap(network)(images), wanted, rtol=1e-4, atol=1e-3)


def test_a_replaced_layer_is_run():
    network = made("gridnet")
    images = torch.rand(1, 3, 16, 20)

    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    conv = network.lateral_final.f[3]
    network.lateral_final.f[3] = Doubled(conv.in_channels, conv.out_channels, 3, padding=1)
    network.lateral_final.f[3].load_state_dict(conv.state_dict())
    with torch.no_grad():
        assert not network.streams
        found = network(images)
    network.lateral_final.f[3] = conv
    with torch.no_grad():
        assert network.streams
        assert (network(images) - found).abs().max() > 0.1 * found.abs().max()


def test_synchronised_batch_norm_streams():
    network, images = made("hrnet"), torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        wanted = network(images)
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        assert network.streams
        torch.testing.assert_close(network(images), wanted)


def test_it_compiles_and_exports_without_bands():
    network = made("gridnet")
    images = torch.rand(1, 3, 16, 20)
    with torch.no_grad():
        exported = torch.export.export(network, (images,))
        found = exported.module()(images)
        torch.testing.assert_close(found, network(images), rtol=1e-4, atol=1e-3)


def test_the_original_computes_what_it_discards():
    """ICNet's backbone runs all stages on the half-size image, DANet classifies what each attention sees."""
    counts = {}
    for name, discarded in (("icnet", "pretrained.layer4"), ("danet", "head.conv6")):
        network, calls = made(name), []
        network.get_submodule(discarded).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad(), vosops.use_backend("reference"):
            network(torch.rand(1, 3, 33, 48))
        counts[name] = len(calls)
    assert counts == {"icnet": 2, "danet": 1}
