"""DeepLabV3+ against the original's outputs with three backbones, its checkpoints, sizes and options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.models.segmentation import originals
from vosops.models import create_model

CASES = [
    ("resnet50", "deeplabv3plus_resnet50", "os16", 16),
    ("resnet50", "deeplabv3plus_resnet50", "os8", 8),
    ("mobilenet_v2", "deeplabv3plus_mobilenetv2", "os16", 16),
    ("mobilenet_v2", "deeplabv3plus_mobilenetv2", "os8", 8),
    ("xception", "deeplabv3plus_xception", "os16", 16),
]


@pytest.mark.parametrize(("backbone", "file", "name", "output_stride"), CASES)
def test_logits_are_the_originals(backbone, file, name, output_stride):
    golden = originals.case(f"{file}.pt", name)
    network = originals.empty("deeplabv3+", backbone=backbone, output_stride=output_stride)
    with torch.no_grad():
        logits = originals.with_weights_of(golden, network)(golden["x"].float())
    originals.assert_equals(golden, "logits", logits)


@pytest.mark.parametrize(
    ("backbone", "count", "file"),
    [
        ("resnet50", 39_761_845, "params_deeplabv3plus_resnet50.txt"),
        ("mobilenet_v2", 5_225_717, "params_deeplabv3plus_mobilenetv2.txt"),
        ("xception", 37_050_525, "params_deeplabv3plus_xception.txt"),
    ],
)
def test_parameters_are_the_originals(backbone, count, file):
    for output_stride in (16, 8):
        network = originals.empty("deeplabv3plus", backbone=backbone, output_stride=output_stride)
        originals.assert_parameters(network, count, file)


def test_the_backbone_resnet101_has_seventeen_blocks_more():
    network = originals.empty("deeplabv3plus", backbone="resnet101")
    block = 1024 * 256 * 2 + 256 * 256 * 9 + 2 * (256 + 256 + 1024)
    assert sum(x.numel() for x in network.parameters()) == 39_761_845 + 17 * block
    assert "backbone.layer3.22.conv3.weight" in network.state_dict()


def test_a_checkpoint_of_the_original_gives_its_logits(tmp_path):
    golden = originals.case("deeplabv3plus_mobilenetv2.pt", "os16")
    weights = originals.weights_of(golden, originals.empty("deeplabv3plus", backbone="mobilenet_v2"))
    path = tmp_path / "best_deeplabv3plus_mobilenet_voc_os16.pth"
    torch.save({"cur_itrs": 30000, "model_state": weights, "best_score": np.float64(0.71)}, path)
    network = create_model("deeplabv3plus", path, backbone="mobilenet_v2")
    with torch.no_grad():
        originals.assert_equals(golden, "logits", network(golden["x"].float()))


@pytest.mark.parametrize("backbone", ["resnet50", "xception"])
def test_checkpoints_load_or_are_refused(backbone, tmp_path):
    network = originals.empty("deeplabv3plus", backbone=backbone)
    originals.assert_loads(network, tmp_path / "best.pth", layout=lambda x: {"model_state": x})


def test_it_learns():
    network = originals.empty("deeplabv3plus", backbone="mobilenet_v2").to_empty(device="cpu")
    originals.draw(network)
    originals.assert_learns(network, torch.rand(2, 3, 33, 48))


@pytest.mark.parametrize(
    ("backbone", "output_stride", "least"),
    [("mobilenet_v2", 16, 3), ("xception", 16, 71), ("xception", 8, 103), ("resnet50", 8, 1)],
)
def test_the_smallest_sides(backbone, output_stride, least):
    network = originals.empty("deeplabv3plus", backbone=backbone, output_stride=output_stride)
    images = torch.empty(1, 3, least, least + 1, device="meta")
    assert network(images).shape == (1, 21, least, least + 1)
    if least > 1:
        with pytest.raises(ValueError, match=f"height {least - 1}: the nearest is {least}"):
            network(images[:, :, 1:])


def test_classes_and_channels():
    network = originals.empty("deeplabv3plus", num_classes=5, in_channels=4, backbone="mobilenet_v2")
    assert network(torch.empty(2, 4, 32, 48, device="meta")).shape == (2, 5, 32, 48)


def test_the_head_of_the_paper():
    """Separable convolutions in the pyramid, two of them in the decoder, epsilon 1e-3, and corners aligned."""
    network = originals.empty("deeplabv3plus", backbone="mobilenet_v2", paper=True).to_empty(device="cpu")
    originals.draw(network).double()
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(1e-3, 1)
    weights = network.classifier.state_dict()
    images = torch.rand(1, 3, 49, 66, dtype=torch.float64)

    def conv(x, at, *, dilation=1, norm=True):
        weight = weights[f"{at}.weight"]
        x = functional.conv2d(
            x,
            weight,
            weights.get(f"{at}.bias"),
            padding=weight.shape[-1] // 2 * dilation,
            dilation=dilation,
            groups=x.shape[1] // weight.shape[1],
        )
        if not norm:
            return x
        prefix, _, number = at.rpartition(".")
        mean, var, scale, shift = (
            weights[f"{prefix}.{int(number) + 1}.{what}"]
            for what in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, var, scale, shift, eps=1e-3).relu()

    with torch.no_grad():
        low, high = network.backbone(images)
        maps = [conv(high, "aspp.convs.0.0")]
        for branch, rate in enumerate((6, 12, 18), 1):
            maps.append(conv(conv(high, f"aspp.convs.{branch}.0", dilation=rate), f"aspp.convs.{branch}.3"))
        mean = conv(high.mean((2, 3), keepdim=True), "aspp.convs.4.1")
        high = conv(torch.cat([*maps, mean.expand_as(maps[0])], 1), "aspp.project.0")
        low = conv(low, "project.0")
        high = functional.interpolate(high, low.shape[2:], mode="bilinear", align_corners=True)
        x = torch.cat([low, high], 1)
        for at in ("classifier.0", "classifier.3", "classifier.6", "classifier.9"):
            x = conv(x, at)
        logits = conv(x, "classifier.12", norm=False)
        wanted = functional.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)
        found = network(images)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()  # the weights of resizing are float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet18"}, "backbone must be one of resnet50, .* got 'resnet18'"),
        ({"output_stride": 32}, "output_stride must be 8 or 16, got 32"),
        ({"num_classes": 0}, "num_classes must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("deeplabv3plus", **options)
