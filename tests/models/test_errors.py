"""Errors of the models that no other test is about: what was expected and what came."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from vosops.inference import SemanticTracker
from vosops.models import FrameNetwork, Propagate, create_model, load_weights
from vosops.models._tracking import check_first
from vosops.models.deeplab import DeepLabV3Plus
from vosops.models.features import create_backbone, import_extra
from vosops.models.feelvos import FEELVOS
from vosops.models.guided_filter import GuidedFilter
from vosops.models.network import Network
from vosops.models.resnet import ResNet50Encoder
from vosops.models.tensorflow import load_tensorflow, read_variables
from vosops.models.tiles import cut_into_tiles
from vosops.models.xception import Xception65


def test_a_folder_is_not_a_file_of_weights(tmp_path):
    for load in (lambda path: load_weights(torch.nn.Linear(1, 1), path), read_variables):
        with pytest.raises(FileNotFoundError, match="weights must be a file, got .*, which is a folder"):
            load(tmp_path)
        with pytest.raises(
            FileNotFoundError, match="weights must be a file, got .*absent, which does not exist"
        ):
            load(tmp_path / "absent")


@pytest.mark.parametrize("name", ["cutie", "xmem"])
@pytest.mark.parametrize("content", [b"<html>Quota exceeded</html>", b""])
def test_what_is_not_a_weights_file_for_other_peoples_code(tmp_path, name, content):
    if name == "cutie":
        pytest.importorskip("cutie")
    else:
        (tmp_path / "model").mkdir()
        for module in ("model/network.py", "model/resnet.py", "inference/inference_core.py"):
            (tmp_path / module).parent.mkdir(exist_ok=True)
            (tmp_path / module).touch()
    options = {} if name == "cutie" else {"checkout": tmp_path}
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights must be a checkpoint of tensors, got .*weights\.pth: \S"):
        create_model(name, tmp_path / "weights.pth", **options)


def test_cutie_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cutie", None)
    monkeypatch.setitem(sys.modules, "cutie.inference.inference_core", None)
    with pytest.raises(ImportError, match=r"cutie needs its package \(.*\): pip install 'vosops\[cutie\]'"):
        create_model("cutie", tmp_path / "weights.pth")


def test_a_checkout_behind_another_package_of_its_names(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "network.py").touch()
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pth")
    for name in ("model", "model.network", "model.resnet", "inference", "inference.inference_core"):
        other = types.ModuleType(name)
        other.__file__ = f"/elsewhere/{name}.py"
        monkeypatch.setitem(sys.modules, name, other)
    with pytest.raises(
        ImportError, match=r"checkout must be the only package with model\.network, got .*elsewhere"
    ):
        create_model("xmem", tmp_path / "w.pth", checkout=tmp_path)


def test_a_backbone_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"this backbone needs timm: pip install 'vosops\[models\]'"):
        create_backbone("timm:resnet18")
    assert import_extra("json", "") is importlib.import_module("json")


class FakeTimm(types.ModuleType):
    """timm as far as backbones look at it; its networks have maps of the strides that `reductions` says."""

    reductions = (4, 32)

    def __init__(self):
        super().__init__("timm")

    def list_models(self):
        return ["known", "broken"]

    def create_model(self, name, **options):
        if name == "broken":
            raise RuntimeError("no features_only\nfor this one")
        network = torch.nn.Identity()
        strides, channels = list(self.reductions), [8] * len(self.reductions)
        network.feature_info = types.SimpleNamespace(reduction=lambda: strides, channels=lambda: channels)
        return network


def test_backbones_of_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", FakeTimm())
    with pytest.raises(ValueError, match=r"with a name of timm\.list_models\(\), got 'timm:unknown'"):
        create_backbone("timm:unknown")
    with pytest.raises(ValueError, match="one that timm can create, got 'timm:broken': no features_only$"):
        create_backbone("timm:broken")
    with pytest.raises(ValueError, match=r"maps at strides 8 and 16, got 'timm:known' with \[4, 32\]"):
        create_backbone("timm:known")
    with pytest.raises(ValueError, match="one that timm can create, got 'timm:broken': no features_only$"):
        DeepLabV3Plus("timm:broken")
    with pytest.raises(ValueError, match=r"maps of strides 4 and 16, got 'timm:known' with \[4, 32\]"):
        DeepLabV3Plus("timm:known", 16)


def test_backbones_of_torchvision(monkeypatch):
    models = pytest.importorskip("torchvision.models")

    def get_model(name, weights):
        raise RuntimeError("no connection\nto anywhere")

    monkeypatch.setattr(models, "get_model", get_model)
    with pytest.raises(
        ValueError, match="that torchvision can create, got 'torchvision:resnet18': no connection$"
    ):
        create_backbone("torchvision:resnet18")


def test_safetensors_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(ImportError, match=r"safetensors files need: pip install 'vosops\[video\]'"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "w.safetensors")


def test_variables_that_are_not_the_networks(tmp_path):
    np = pytest.importorskip("numpy")
    np.savez(tmp_path / "w.npz", other=np.zeros(1))
    with pytest.raises(
        ValueError, match=r"variables must be those of Conv2d, got 2 missing .*other\) in .*w\.npz"
    ):
        load_tensorflow(torch.nn.Conv2d(1, 1, 1), tmp_path / "w.npz")


def test_masks_of_an_encoder():
    encoder = ResNet50Encoder(("m", "o"), last_stage=4, mask_bias=False)
    frame = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="masks must be 2 tensors, got 1"):
        encoder.last(frame, torch.zeros(1, 32, 32))
    with pytest.raises(ValueError, match=r"masks must be \(N,H,W\) or .* \(1, 3, 32, 32\), got \(1, 8, 8\)"):
        encoder.last(frame, *torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="last_stage must be one of .*, got 7"):
        ResNet50Encoder((), last_stage=7)


def test_xception():
    with pytest.raises(ValueError, match="output_stride must be 8 or 16, got 4"):
        Xception65(output_stride=4)


FRAME, LABELS = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("frame", "labels", "error", "message"),
    [
        (FRAME.numpy(), LABELS, TypeError, r"frame must be a tensor \(3,H,W\), got a ndarray"),
        (FRAME[:2], LABELS, ValueError, r"frame must be \(3,H,W\), got \(2, 8, 8\)"),
        (FRAME.long(), LABELS, TypeError, r"frame must be uint8 or floating in \[0, 1\], got torch\.int64"),
        (FRAME.to(torch.uint16), LABELS, TypeError, r"got torch\.uint16: divide by 65535 for \[0, 1\]"),
        (
            FRAME.float() - 3,
            LABELS,
            ValueError,
            r"in \[0, 1\], got values from -3 to -3: pass the image as displayed",
        ),
        (FRAME, LABELS.numpy(), TypeError, r"labels must be a tensor \(H,W\), got a ndarray"),
        (FRAME, LABELS[1:], ValueError, r"labels must be \(H,W\) = \(8, 8\), got \(7, 8\)"),
        (FRAME, LABELS.float(), TypeError, r"labels must be integers, got torch\.float32"),
        (
            FRAME,
            LABELS.to(torch.uint16),
            TypeError,
            r"labels must be uint8 or signed integers, got torch\.uint16: use",
        ),
        (FRAME, -LABELS.long(), ValueError, "labels must be >= 0, got -1"),
        (
            FRAME,
            0 * LABELS,
            ValueError,
            "labels must hold at least one object, got only background and unknown pixels",
        ),
    ],
)
def test_frames_and_labels_of_all_trackers(frame, labels, error, message):
    with pytest.raises(error, match=message):
        check_first(frame, labels)


def test_sizes_of_propagate():
    with pytest.raises(ValueError, match="size must be -1 or at least 16, got 15"):
        Propagate(pretrained=False, size=15)


def test_a_semantic_tracker_takes_semantic_networks_alone():
    for model in (torch.nn.Linear(1, 1), "lstm_icnet"):
        with pytest.raises(TypeError, match=f"model must be a SemanticNetwork, got {type(model).__name__}"):
            SemanticTracker(model)


def test_a_guided_filter():
    with pytest.raises(ValueError, match=r"guide must be \(3,H,W\), got \(1, 4, 4\)"):
        GuidedFilter(torch.zeros(1, 4, 4), 1, 1e-3)
    with pytest.raises(ValueError, match="radius must be >= 0, got -1"):
        GuidedFilter(torch.zeros(3, 4, 4), -1, 1e-3)
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        GuidedFilter(torch.zeros(3, 4, 4), 1, 0)
    with pytest.raises(
        ValueError, match=r"values must be \(O,H,W\) of the guide's size \(4, 4\), got \(2, 3, 4\)"
    ):
        GuidedFilter(torch.zeros(3, 4, 4), 1, 1e-3).coefficients(torch.zeros(2, 3, 4))


def test_a_frame_network_and_its_sizes():
    class Large(FrameNetwork):
        num_classes, min_side = 2, 9

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 2, 1)

        def forward(self, images):
            return self.layer(images)

    with pytest.raises(
        ValueError, match=r"dtype must be None, float32, bfloat16 or float16, got torch\.int8"
    ):
        SemanticTracker(Large(), dtype=torch.int8)
    tracker = SemanticTracker(Large())
    with pytest.raises(ValueError, match=r"frame must have sides of at least 9, got \(3, 8, 12\)"):
        tracker.step(torch.rand(3, 8, 12))
    assert tracker.window == 1
    with pytest.raises(ValueError, match="state must be of window=1, got 4"):
        tracker.load_state_dict({**tracker.state_dict(), "window": 4})


def test_an_output_stride_that_no_encoder_is_dilated_to():
    with pytest.raises(ValueError, match="output_stride must be 8 or 16, got 32"):
        DeepLabV3Plus("torchvision:resnet50", 32)


def test_a_checkpoint_of_feelvos_for_the_matching_of_cfbi():
    with torch.device("meta"):
        network = FEELVOS("torchvision:resnet50", matching="cfbi")
    with pytest.raises(
        ValueError, match="matching must be 'feelvos' to load a checkpoint of the original, got 'cfbi'"
    ):
        network.tensorflow_variables()


def test_a_network_that_does_not_say_how_it_is_trained():
    with torch.device("meta"):
        network = FEELVOS("torchvision:resnet50")
    with pytest.raises(NotImplementedError, match="FEELVOS has no clip_logits, which training needs"):
        Network.clip_logits(network, torch.empty(0), torch.empty(0), 1)


def test_an_overlap_that_is_no_integer():
    for overlap, name in ((1.5, "float"), (True, "bool")):
        with pytest.raises(TypeError, match=f"overlap must be an integer, got {name}"):
            cut_into_tiles((64, 64), 32, overlap)


def test_propagate_takes_no_weights():
    with pytest.raises(ValueError, match="weights must be None, got w.pth: propagate is not trained"):
        Propagate(weights="w.pth", pretrained=False)
