"""LSTM-ICNet: ICNet for video, with convolutional LSTMs at one or more of its branches.

Source: Pfeuffer et al., "Semantic Segmentation of Video Sequences with Convolutional LSTMs" (2019),
"Separable Convolutional LSTMs for Faster Video Segmentation" (2019) and "Robust Semantic Segmentation in
Adverse Weather Conditions by means of Fast Video-Sequence Segmentation" (2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.models.icnet import (
    CHANNELS,
    MIN_SIDE,
    NUM_CLASSES,
    Branches,
    ICNet,
    batch_norm,
    double,
    draw_as_tensorflow,
    prepare_frames,
)
from vosops.models.semantic_network import SemanticNetwork, State
from vosops.models.tensorflow import load_variables
from vosops.nn import ConvLSTMCell

__all__ = ["LSTMICNet", "Segmentation", "segmentation_loss"]

_POSITIONS = {  # where the recurrent layers of each version are; "fused" is between the last fusion and the classifier
    "icnet": (),
    "v1": ("high",),
    "v2": ("fused",),
    "v3": ("low",),
    "v4": ("low", "medium"),
    "v5": ("low", "medium", "high"),
    "v6": ("low", "medium", "high", "fused"),
}
_LAYERS = {  # the recurrent layer at each position, and the 1x1 convolution beside a narrow one
    "low": ("convlstm5_4_sub4", "convlstm5_4_sub4_1x1_reduce"),
    "medium": ("convlstm3_1_sub2", "conv3_1_sub2_proj_1x1_reduce"),
    "high": ("convlstm3_sub1", "conv3_sub1_proj_1x1_reduce"),
    "fused": ("convlstm6_cls", "conv_sub12_sum_1x1_reduce"),
}
_KINDS = ("convolution", "spatial", "depthwise", "separable")
_PRESETS = {"fast": ("convolution", 64), "faster": ("depthwise", 64)}  # of the 2020 paper: kind, channels
_MIXES_CHANNELS = ("convolution", "spatial")
_LOSS_WEIGHTS = (0.16, 0.4, 1.0)
_IGNORED = 255


class Segmentation(NamedTuple):
    """Logits of a clip: (N,T,K,h,w) at about 1/4 of the frames, of two coarser heads where asked for, and the state."""

    logits: Tensor
    sub24: Tensor | None
    sub4: Tensor | None
    state: State


class LSTMICNet(ICNet, SemanticNetwork):
    """LSTM-ICNet in all its versions.

    version: "v1" to "v6", the position of the ConvLSTMs ("v5", one at the end of each branch, is the paper's
    best), or "icnet" for none. variant: "convolution", "spatial", "depthwise" or "separable", the ConvLSTM's
    kind; "fast" and "faster" are the 2020 paper's networks, "convolution" and "depthwise" on 64 channels.
    lstm_channels: of the ConvLSTMs, 128 or less (the original has 64, 48 and 32); if less, a 1x1 convolution
    passes the others by, and kinds that do not mix channels get their own 1x1 reduction. num_classes: K.
    precision: of the ConvLSTMs' convolutions, see :class:`vosops.nn.ConvLSTMCell`.

    Parameters bear the names of the original's layers (:mod:`vosops.models.icnet`) and are drawn as the
    original begins: Glorot-uniform. :meth:`from_tensorflow` loads the original's variables, and
    ``create_model`` an .npz of them. 10.3 million parameters in v5. Raises ValueError for a choice that does
    not exist.

        >>> import torch
        >>> from vosops.models import create_model
        >>> model = create_model("lstm_icnet", version="v5").eval()
        >>> clip = torch.rand(1, 4, 3, 128, 128)
        >>> model(clip).logits.shape
        torch.Size([1, 4, 19, 31, 31])
    """

    min_side = MIN_SIDE
    align_corners = True

    def __init__(
        self,
        num_classes: int = NUM_CLASSES,
        *,
        version: str = "v5",
        variant: str = "convolution",
        lstm_channels: int | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__(num_classes)
        self.version = version
        self.positions = _positions_of(version)
        self.kind, self.lstm_channels = _kind_of(variant, lstm_channels)
        for position in self.positions:
            self._add_recurrent(*_LAYERS[position], precision)
        if "fused" in self.positions:
            self.add_module("convlstm6_cls_bn", batch_norm(CHANNELS))

    def _add_recurrent(self, name: str, skip: str, precision: str | None) -> None:
        channels = self.lstm_channels
        narrow = channels < CHANNELS
        reduced = narrow and self.kind not in _MIXES_CHANNELS
        if reduced:
            self._add(f"{name}_input_reduction", CHANNELS, channels, 1, norm=False)
        inputs = channels if reduced else CHANNELS
        layer = ConvLSTMCell(inputs, channels, variant=self.kind, precision=precision)
        draw_as_tensorflow(layer)
        self.add_module(name, layer)
        if narrow:
            self._add(skip, CHANNELS, CHANNELS - channels, 1, norm=False)

    def load_tensorflow(self, variables: Mapping[str, Any]) -> None:
        """Load the original's variables, arrays by their names, such as ``conv_sub4/weights`` (3,3,256,128).

        Every one must be present with its shape, and nothing else except optimizer state. Kernels are
        (h,w,in,out), gates in TensorFlow's order. Raises ValueError that names the first missing, unexpected
        and misshapen.
        """
        load_variables(self, variables)

    @classmethod
    def from_tensorflow(cls, variables: Mapping[str, Any], **options: Any) -> LSTMICNet:
        """Return the network that the original's variables are of; see :meth:`load_tensorflow`.

        options: of the class; version, variant, lstm_channels and num_classes are found from the names and
        shapes if they are left out.
        """
        model = cls(**{**_options_of(variables), **options})
        model.load_tensorflow(variables)
        return model

    def freeze_branches(self) -> None:
        """Exclude the branches' convolutions from training, as the original's ``freezeBranches`` variants do.

        The fusions, the ConvLSTMs with what belongs to them, the last two classifiers and all batch norms go
        on learning.
        """
        trained = {"conv_sub4", "conv3_1_sub2_proj", "conv_sub2", "conv3_sub1_proj", "conv6_cls", "sub24_out"}
        for layer in self.positions:
            trained |= {*_LAYERS[layer], f"{_LAYERS[layer][0]}_input_reduction"}
        for name, module in self.named_children():
            if isinstance(module, nn.Conv2d) and name not in trained:
                module.requires_grad_(False)

    def forward(  # type: ignore[override]
        self, clip: Tensor, state: State | None = None, *, auxiliary: bool | None = None
    ) -> Segmentation:
        """Segments all frames of a clip.

        clip: (N,T,3,H,W) RGB, uint8 or floating in [0, 1], sides of at least 97. state: what an earlier part
        of the same clip returned; None begins with zeros. auxiliary: also the coarser heads; None means while
        training. Every frame's logits come out; the loss of the original looks at the last one's alone.
        """
        if clip.ndim != 5 or clip.shape[2] != 3:
            raise ValueError(f"clip must be (N,T,3,H,W), got {tuple(clip.shape)}")
        length = clip.shape[1]
        branches, pooled = self.branches(self.prepare(clip.flatten(0, 1)))
        sub24, sub12, state = self.recur(branches, length, state)
        logits = self.classify(sub12)
        coarse = self.training if auxiliary is None else auxiliary
        return Segmentation(
            logits.unflatten(0, (-1, length)),
            self.get_submodule("sub24_out")(sub24).unflatten(0, (-1, length)) if coarse else None,
            self.get_submodule("sub4_out")(pooled).unflatten(0, (-1, length)) if coarse else None,
            state,
        )

    def supervised(self, clips: Tensor) -> list[tuple[float, Tensor]]:
        """See :class:`SemanticNetwork`: the three heads, of the last frame of each clip, as the original does."""
        found = self(clips, auxiliary=True)
        heads = (found.sub4, found.sub24, found.logits)
        return [(weight, head[:, -1:]) for weight, head in zip(_LOSS_WEIGHTS, heads, strict=True)]

    def prepare(self, frames: Tensor) -> Tensor:
        """See :class:`SemanticNetwork`."""
        return prepare_frames(frames, next(self.parameters()).dtype)

    def features(self, images: Tensor) -> Branches:
        """See :class:`SemanticNetwork`: the three branches."""
        return self.branches(images)[0]

    def logits(
        self, features: tuple[Tensor, ...], length: int, state: State | None = None, *, last: bool = False
    ) -> tuple[Tensor, State]:
        """See :class:`SemanticNetwork`."""
        _, sub12, state = self.recur(Branches(*features), length, state, last=last)
        return self.classify(sub12), state

    def recur(
        self, branches: Branches, length: int, state: State | None = None, *, last: bool = False
    ) -> tuple[Tensor, Tensor, State]:
        """Return the recurrent half: branches of N clips of ``length`` frames -> (sub24, sub12, state).

        branches: of N*length frames, a clip's frames in order. sub24 and sub12: what :meth:`ICNet.fuse`
        gives, of all frames, or with ``last`` of each clip's last one alone. state: as for :meth:`forward`.
        """
        new: State = {}
        low, medium, high = branches
        low = self._recurrent("low", low, length, state, new)
        medium = self._recurrent("medium", medium, length, state, new)
        high = self._recurrent("high", high, length, state, new)
        fused_later = "fused" in self.positions
        if last and not fused_later:
            low, medium, high = (x[length - 1 :: length] for x in (low, medium, high))
        sub24, sub12 = self.fuse(low, medium, high)
        if fused_later:
            sub12 = self._recurrent("fused", sub12, length, state, new)
            if last:
                sub24, sub12 = sub24[length - 1 :: length], sub12[length - 1 :: length]
            sub12 = self._norm("convlstm6_cls_bn", sub12, relu=True)
        return sub24, sub12, new

    def classify(self, sub12: Tensor) -> Tensor:
        """(N,128,h,w) fused maps -> (N,K,2h-1,2w-1) logits."""
        logits: Tensor = self.get_submodule("conv6_cls")(double(sub12))
        return logits

    def _recurrent(self, position: str, x: Tensor, length: int, state: State | None, new: State) -> Tensor:
        """(N*T,128,h,w) through the ConvLSTM of this position, if there is one."""
        if position not in self.positions:
            return x
        name, skip = _LAYERS[position]
        inputs = x
        if self.lstm_channels < CHANNELS and self.kind not in _MIXES_CHANNELS:
            inputs = self.get_submodule(f"{name}_input_reduction")(x)
        before = None if state is None else state[name]
        layer = self.get_submodule(name)
        assert isinstance(layer, ConvLSTMCell)
        hidden, new[name] = layer.run(inputs.unflatten(0, (-1, length)), before)
        hidden = hidden.flatten(0, 1)
        if self.lstm_channels < CHANNELS:
            hidden = torch.cat([hidden, self.get_submodule(skip)(x)], dim=1)
        return hidden


def segmentation_loss(
    segmentation: Segmentation,
    labels: Tensor,
    *,
    weights: tuple[float, float, float] = _LOSS_WEIGHTS,
    ignore: int = _IGNORED,
) -> Tensor:
    """Return the original's loss on the last frame: 0.16 CE(sub4) + 0.4 CE(sub24) + 1.0 CE(logits).

    segmentation: with its coarser heads. labels: (N,H,W) integer classes of each clip's last frame, brought
    to each head's size by the nearest pixel; ``ignore`` and all values of K and above do not count, and
    without any that does the loss is 0. The original adds 1e-4/2 of the squares of all kernels (not biases,
    not batch norm). Returns a scalar.

        >>> import torch
        >>> from vosops.models.lstm_icnet import LSTMICNet, segmentation_loss
        >>> model = LSTMICNet(version="v3")
        >>> segmentation_loss(model(torch.rand(1, 2, 3, 97, 97)), torch.zeros(1, 97, 97, dtype=torch.int64)).ndim
        0
    """
    heads = (segmentation.sub4, segmentation.sub24, segmentation.logits)
    total = segmentation.logits.new_zeros(())
    for weight, head in zip(weights, heads, strict=True):
        if head is None:
            raise ValueError(
                "segmentation must hold the coarser heads, got None: call the model with auxiliary=True"
            )
        total = total + weight * _cross_entropy(head[:, -1], labels, ignore)
    return total


def _cross_entropy(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Average over labelled pixels after TensorFlow's nearest resize of the labels: src = floor(dst * in / out)."""
    near = F.interpolate(labels[:, None].float(), size=logits.shape[-2:], mode="nearest")[:, 0].long()
    counted = (near != ignore) & (near < logits.shape[1])
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(scores, near.where(counted, _IGNORED), ignore_index=_IGNORED, reduction="sum")
    return loss / counted.sum().clamp(min=1)


def _positions_of(version: str) -> tuple[str, ...]:
    if version not in _POSITIONS:
        raise ValueError(f"version must be one of {', '.join(_POSITIONS)}, got {version!r}")
    return _POSITIONS[version]


def _kind_of(variant: str, lstm_channels: int | None) -> tuple[str, int]:
    """Return the ConvLSTM's kind and its channels."""
    kind, channels = _PRESETS.get(variant, (variant, CHANNELS))
    if kind not in _KINDS:
        raise ValueError(f"variant must be one of {', '.join((*_KINDS, *_PRESETS))}, got {variant!r}")
    channels = channels if lstm_channels is None else lstm_channels
    if not 0 < channels <= CHANNELS:
        raise ValueError(f"lstm_channels must be from 1 to {CHANNELS}, got {channels}")
    return kind, channels


def _options_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the network that has these variables, as far as their names and shapes tell."""
    found = {position for position, (name, _) in _LAYERS.items() if f"{name}/rnn/{name}/biases" in variables}
    options: dict[str, Any] = {}
    for version, positions in _POSITIONS.items():
        if set(positions) == found:
            options["version"] = version
    if "conv6_cls/biases" in variables:
        options["num_classes"] = len(variables["conv6_cls/biases"])
    if found:
        name, _ = _LAYERS[min(found)]
        scope = f"{name}/rnn/{name}/"
        options["lstm_channels"] = len(variables[f"{scope}biases"]) // 4
        leaves = {leaf.removeprefix(scope) for leaf in variables if leaf.startswith(scope)}
        kinds = {"kernel_h": "spatial", "kernel_sep": "separable", "kernel_depth": "depthwise"}
        options["variant"] = next((kind for leaf, kind in kinds.items() if leaf in leaves), "convolution")
    return options
