"""Reference systems for video object segmentation, by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vosops import _deprecation
from vosops.models.create import create_model
from vosops.models.network import Network
from vosops.models.registry import ModelEntry, find_model, list_models, register_model
from vosops.models.semantic_network import FrameNetwork, SemanticNetwork
from vosops.models.video_tracker import VideoTracker
from vosops.models.weights import load_weights

if TYPE_CHECKING:
    from vosops.inference.create import create_tracker
    from vosops.integrations.cutie import Cutie
    from vosops.integrations.sam2 import SAM2
    from vosops.integrations.xmem import XMem
    from vosops.models.feelvos import FEELVOS
    from vosops.models.lstm_icnet import LSTMICNet
    from vosops.models.lstm_segnet import RFCN, LSTMSegNet
    from vosops.models.propagate import Propagate
    from vosops.models.rgmp import RGMP
    from vosops.models.segmentation.danet import DANet
    from vosops.models.segmentation.deconvnet import DeconvNet
    from vosops.models.segmentation.deeplabv3plus import DeepLabV3Plus
    from vosops.models.segmentation.gridnet import GridNet
    from vosops.models.segmentation.hrnet import HRNetW18, HRNetW32, HRNetW48, HRNetW48OCR
    from vosops.models.segmentation.icnet import ICNet
    from vosops.models.segmentation.icnn import ICNN
    from vosops.models.segmentation.pspnet import PSPNet
    from vosops.models.segmentation.resunet import ResUNet, ResUNetPlusPlus
    from vosops.models.segmentation.segnet import SegNet
    from vosops.models.segmentation.unet import UNet, UNetPlusPlus
    from vosops.models.stm import STM
    from vosops.models.vosops_s import VosopsS

__all__ = [
    "FEELVOS",
    "ICNN",
    "RFCN",
    "RGMP",
    "SAM2",
    "STM",
    "Cutie",
    "DANet",
    "DeconvNet",
    "DeepLabV3Plus",
    "FrameNetwork",
    "GridNet",
    "HRNetW18",
    "HRNetW32",
    "HRNetW48",
    "HRNetW48OCR",
    "ICNet",
    "LSTMICNet",
    "LSTMSegNet",
    "ModelEntry",
    "Network",
    "PSPNet",
    "Propagate",
    "ResUNet",
    "ResUNetPlusPlus",
    "SegNet",
    "SemanticNetwork",
    "UNet",
    "UNetPlusPlus",
    "VideoTracker",
    "VosopsS",
    "XMem",
    "create_model",
    "create_tracker",
    "find_model",
    "list_models",
    "load_weights",
    "register_model",
]

_LAZY = {
    "FEELVOS": "vosops.models.feelvos",
    "RFCN": "vosops.models.lstm_segnet",
    "RGMP": "vosops.models.rgmp",
    "SAM2": "vosops.integrations.sam2",
    "STM": "vosops.models.stm",
    "Cutie": "vosops.integrations.cutie",
    "DANet": "vosops.models.segmentation.danet",
    "DeepLabV3Plus": "vosops.models.segmentation.deeplabv3plus",
    "HRNetW18": "vosops.models.segmentation.hrnet",
    "HRNetW32": "vosops.models.segmentation.hrnet",
    "HRNetW48": "vosops.models.segmentation.hrnet",
    "HRNetW48OCR": "vosops.models.segmentation.hrnet",
    "ICNet": "vosops.models.segmentation.icnet",
    "LSTMICNet": "vosops.models.lstm_icnet",
    "LSTMSegNet": "vosops.models.lstm_segnet",
    "PSPNet": "vosops.models.segmentation.pspnet",
    "Propagate": "vosops.models.propagate",
    "DeconvNet": "vosops.models.segmentation.deconvnet",
    "GridNet": "vosops.models.segmentation.gridnet",
    "ICNN": "vosops.models.segmentation.icnn",
    "ResUNet": "vosops.models.segmentation.resunet",
    "ResUNetPlusPlus": "vosops.models.segmentation.resunet",
    "SegNet": "vosops.models.segmentation.segnet",
    "UNet": "vosops.models.segmentation.unet",
    "UNetPlusPlus": "vosops.models.segmentation.unet",
    "VosopsS": "vosops.models.vosops_s",
    "XMem": "vosops.integrations.xmem",
    "create_tracker": "vosops.inference.create",  # which needs what runs a network; here beside create_model
}
"""Names that are imported on first use, so that ``import vosops.models`` imports no model."""


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:  # so that type checkers still report names that do not exist

    def __getattr__(name: str) -> object:
        if name in _LAZY:
            return getattr(import_module(_LAZY[name]), name)
        if name == "tracks_by_itself":
            _deprecation.warn(f"{__name__}.{name}", "find_model(name).kind == 'tracker'")
            return lambda model: find_model(model).kind == "tracker"
        if name == "follows_objects":
            _deprecation.warn(f"{__name__}.{name}", "find_model(name).tracks_objects")
            return lambda model: find_model(model).tracks_objects
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
