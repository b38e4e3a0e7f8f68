"""RGMP: segmentation by propagating the previous mask, guided by a reference frame (Oh et al., CVPR 2018).

Two streams share one encoder: the current frame with the previous frame's mask, and the reference frame with its mask.
A large separable convolution over the deepest maps of both, the global convolution block, relates them; a decoder
refines the result by the shallower maps of the current frame. Each object is segmented for itself, their union
once more for the background, and the results are fused.

Written from the paper and from what the original code computes. Parameters bear the original names, so that the
published weights load. docs/models/rgmp.md tells what differs from the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops import soft_aggregate
from vosops.memory import MemoryBudgetError
from vosops.models.convolution import Conv3x3
from vosops.models.network import (
    Masks,
    Memory,
    Network,
    TensorMasks,
    objects_together,
    one_mask_each,
    resize_rows,
)
from vosops.models.resnet import ResNet50Encoder
from vosops.nn import GlobalConv2d

__all__ = ["RGMP", "RGMPOutput"]

_STAGES = (256, 512, 1024, 2048)  # channels of the encoder's maps, at strides 4, 8, 16, 32
_CHANNELS = 256  # of the decoder
_KERNEL = 7  # of the global convolution
_STRIP_PIXELS = 1 << 20  # of the frame whose last refinement is computed together
_HALO = 6  # rows of stride 4 that a strip sees beside its own: of six 3x3 convolutions
_STRIDE = 4  # of the decoder's finest map
_FLOAT = 4  # bytes


class RGMPOutput(NamedTuple):
    """Logits of background and object: the result, and those of each stage for the losses of deep supervision."""

    logits: Tensor  # (N,2,H,W): pred2 enlarged
    pred2: Tensor  # (N,2,H/4,W/4)
    pred3: Tensor  # (N,2,H/8,W/8)
    pred4: Tensor  # (N,2,H/16,W/16)
    pred5: Tensor  # (N,2,H/32,W/32)


class RGMP(Network):
    """The network; :func:`vosops.models.create_tracker` tracks objects with it.

    align_corners: of every enlargement in the decoder. The published weights need True, which was the meaning of the
    original code when they were trained; with False (what the same code means to PyTorch since 0.4) probabilities
    are off by up to 0.4. Parameters are those of the original checkpoint; the weights are random until some are loaded.

    Time of a frame: an encoder and decoder pass for each object, and one for their union if there are several, for each
    scale. Memory beside the weights: 2048 bytes for each object and 32 x 32 pixels, and about 450 bytes for each pixel
    while a frame is segmented, whatever the number of objects.

        >>> import torch
        >>> from vosops.models.rgmp import RGMP
        >>> network = RGMP()
        >>> frames, masks = torch.rand(2, 1, 3, 64, 96), torch.rand(2, 2, 64, 96)  # two frames, two objects
        >>> reference = network.reference(frames[0], masks[0])
        >>> output = network(frames[1], masks[0], reference)
        >>> [tuple(x.shape) for x in output[:2]]
        [(2, 2, 64, 96), (2, 2, 16, 24)]
    """

    stride = 32
    masks_cover_padding = True

    def __init__(self, *, align_corners: bool = True) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.Encoder = ResNet50Encoder(mask_inputs=("p",), last_stage=5, mask_bias=True)
        self.Decoder = _Decoder(align_corners)

    def forward(self, frame: Tensor, masks: Tensor, reference: Tensor) -> RGMPOutput:
        """Segments frames, for training: all stages, with gradients.

        frame: (N,3,H,W) in [0, 1], H and W multiples of 32; masks: (N,H,W) or (N,1,H,W), the object in the previous
        frame, a probability; reference: of :meth:`reference`. Frame, masks and reference may have a batch of 1 that
        goes with any other.
        """
        coarse, *others = self.Decoder(self.Encoder(frame, masks), reference)
        logits = _enlarged(coarse, frame.shape[2:], self.align_corners)
        return RGMPOutput(logits, coarse, *others)

    def clip_logits(self, frames: Tensor, labels: Tensor, objects: int) -> Tensor:
        """See :class:`vosops.models.Network`: the first frame is the reference, and each frame guides the next.

        Objects are fused by soft aggregation; the soft masks carry gradients back through the clip, as the paper's last
        phase of training does.
        """
        masks = one_mask_each(labels[:, 0], objects)
        first, *others = (x.repeat_interleave(objects, 0) for x in frames.unbind(1))
        reference = self.reference(first, masks.flatten(0, 1))
        logits = []
        for frame in others:
            two = self(frame, masks.flatten(0, 1), reference).logits.float()
            apart = (two[:, 1] - two[:, 0]).sigmoid().unflatten(0, (-1, objects))
            logits.append(soft_aggregate(apart, return_logits=True))
            masks = logits[-1].softmax(1)[:, 1:]
        return torch.stack(logits, 1)

    def reference(self, frame: Tensor, masks: Tensor) -> Tensor:
        """Encode reference frames (N,3,H,W) and masks (N,H,W) for the decoder, once per video: (N,512,H/32,W/32).

        It is the reference's half of the first stage of the global convolution, which is linear.
        """
        prepared: Tensor = self.Decoder.GC.prepare(self.Encoder.last(frame, masks))
        return prepared

    def padding(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """As the original: always to the next multiple of 32 above the size, even where it is one."""
        height, width = (self.stride - side % self.stride for side in size)
        return width // 2, width - width // 2, height // 2, height - height // 2

    def scaled_size(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        """As the original: a size that changes is enlarged to the next multiple of 32 above it."""
        if scale == 1:
            return size
        height, width = (int(side * scale) // self.stride * self.stride + self.stride for side in size)
        return height, width

    def new_memory(self, *, budget: int | None = None, naive: bool = False) -> Memory:
        """Return the memory of one video: the references and the previous frame's masks."""
        return _ReferenceMemory(self, budget, naive)

    def evidence(self, scores: Tensor, size: tuple[int, int], rows: range) -> Tensor:
        """Return the probability (K,len(rows),w) of each object for itself, and of their union if there are several."""
        return resize_rows(scores, size, rows, align_corners=self.align_corners).sigmoid_()

    def aggregate(self, evidence: Tensor) -> Tensor:
        """One object: its probability and the rest. Several: :func:`vosops.soft_aggregate`, the union's rest first."""
        if len(evidence) <= 1:
            return torch.cat([1 - evidence.sum(0, keepdim=True), evidence])
        return soft_aggregate(evidence[:-1], background=1 - evidence[-1])


class _ReferenceMemory(Memory):
    """For each object its reference, of the frame where it appeared first; for the union, if there are several objects,
    that of the first frame since the objects are these. And the previous frame's masks.

    naive: keep the references' deepest maps, four times as large, and convolve them with every frame, object by object.
    """

    def __init__(self, network: RGMP, budget: int | None, naive: bool) -> None:
        self._network = network
        self._budget = budget
        self._naive = naive
        self.object_ids = []
        self._references: dict[int, Tensor] = {}  # (1,512,h/32,w/32) of each object
        self._union: Tensor | None = None
        self._masks: Masks = TensorMasks(torch.ones(1, 1, 1), [])

    def add(self, image: Tensor, masks: Masks, *, frame: int, permanent: bool, keep: bool) -> None:
        """Keep the masks for the next frame, and references to this frame for what has none."""
        self._check_budget(image, len(masks.object_ids))
        if masks.object_ids != self.object_ids:
            self._union = None
        self.object_ids = list(masks.object_ids)
        self._masks = masks
        with_union = len(self.object_ids) > 1 and self._union is None
        for key, mask in self._keys_and_masks(with_union):
            if key is None:
                self._union = self._encoded(image, mask[None])
            elif key not in self._references:
                self._references[key] = self._encoded(image, mask[None])

    def segment(self, image: Tensor, *, frame: int) -> Tensor:
        """Logits (K,h/4,w/4) of each object, then of the union if there are several objects."""
        batch = 1 if self._naive else objects_together(image)
        waiting = self._keys_and_masks(len(self.object_ids) > 1)
        scores = []
        while chosen := list(islice(waiting, batch)):
            references = torch.cat([self._reference(key) for key, _ in chosen])
            masks = torch.stack([mask for _, mask in chosen])
            features = self._network.Encoder(image, masks)
            logits = self._network.Decoder.coarse(features, references, strips=not self._naive).float()
            scores.append(logits[:, 1] - logits[:, 0])
        return (
            torch.cat(scores)
            if scores
            else image.new_empty(0, *(side // _STRIDE for side in image.shape[2:]))
        )

    def remove_object(self, object_id: int) -> None:
        """Forgets an object; the union's reference is then that of the next frame that is added."""
        self.object_ids = [x for x in self.object_ids if x != object_id]
        del self._references[object_id]
        self._union = None

    def state_dict(self) -> dict[str, Any]:
        """Return the references and the previous frame's masks."""
        masks = [mask for _, mask in self._keys_and_masks(False)]
        return {
            "object_ids": list(self.object_ids),
            "references": [self._references[x].clone() for x in self.object_ids],
            "union": None if self._union is None else self._union.clone(),
            "masks": torch.stack(masks) if masks else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        device = self._network.Encoder.mean.device
        self.object_ids = list(state["object_ids"])
        references = (x.to(device, copy=True) for x in state["references"])
        self._references = dict(zip(self.object_ids, references, strict=True))
        self._union = None if state["union"] is None else state["union"].to(device, copy=True)
        masks = torch.ones(1, 1, 1) if state["masks"] is None else state["masks"].to(device)
        if self.object_ids:  # class 0, the background, is never asked for
            masks = torch.cat([masks.new_zeros(1, *masks.shape[1:]), masks])
        self._masks = TensorMasks(masks, self.object_ids)

    def memory_bytes(self) -> int:
        """Return the bytes of the references; the previous frame's masks are the tracker's."""
        kept = [*self._references.values(), *([] if self._union is None else [self._union])]
        return sum(x.numel() * x.element_size() for x in kept)

    def _check_budget(self, image: Tensor, objects: int) -> None:
        """Raise MemoryBudgetError unless the references of that many objects fit."""
        channels = _STAGES[-1] if self._naive else 2 * _CHANNELS
        cells = image.shape[2] * image.shape[3] // self._network.stride**2
        needed = (objects + (objects > 1)) * channels * cells * _FLOAT
        if self._budget is not None and needed > self._budget:
            raise MemoryBudgetError.of(needed, f"the references of {objects} objects", self._budget)

    def _encoded(self, image: Tensor, mask: Tensor) -> Tensor:
        return (
            self._network.Encoder.last(image, mask) if self._naive else self._network.reference(image, mask)
        )

    def _reference(self, key: int | None) -> Tensor:
        reference = self._union if key is None else self._references[key]
        assert reference is not None
        return self._network.Decoder.GC.prepare(reference) if self._naive else reference

    def _keys_and_masks(self, with_union: bool) -> Iterator[tuple[int | None, Tensor]]:
        """Yield the previous mask (h,w) of each object, then on request that of their union under the key None."""
        union: Tensor | None = None
        for key in self.object_ids:
            mask = self._masks.of(1 + self._masks.object_ids.index(key))
            if with_union:
                union = mask.clone() if union is None else union.add_(mask)
            yield key, mask
        if union is not None:
            yield None, union


class _Decoder(nn.Module):
    """The global convolution block over both streams, and three steps of refinement."""

    def __init__(self, align_corners: bool) -> None:
        super().__init__()
        self.GC = GlobalConv2d(2 * _STAGES[-1], _CHANNELS, _KERNEL, _CHANNELS)
        self.convG1 = _conv(_CHANNELS)
        self.convG2 = _conv(_CHANNELS)
        self.RF4 = _Refine(_STAGES[2], align_corners)
        self.RF3 = _Refine(_STAGES[1], align_corners)
        self.RF2 = _Refine(_STAGES[0], align_corners)
        self.pred5 = _conv(_CHANNELS, 2)
        self.pred4 = _conv(_CHANNELS, 2)
        self.pred3 = _conv(_CHANNELS, 2)
        self.pred2 = _conv(_CHANNELS, 2)

    def forward(self, features: list[Tensor], reference: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the logits (N,2,...) of all stages, the finest first; features: the encoder's maps."""
        m5, m4, m3 = self._refined(features, reference)
        heads = (
            (self.pred2, self.RF2(features[0], m3)),
            (self.pred3, m3),
            (self.pred4, m4),
            (self.pred5, m5),
        )
        p2, p3, p4, p5 = (head(functional.relu(x)) for head, x in heads)
        return p2, p3, p4, p5

    def coarse(self, features: list[Tensor], reference: Tensor, *, strips: bool = True) -> Tensor:
        """Return the logits (N,2,H/4,W/4) of the finest stage alone; strips: compute large maps a strip at a time."""
        finest, m3 = features[0], self._refined(features, reference)[-1]
        batch, _, height, width = finest.shape
        most = max(1, _STRIP_PIXELS // (batch * width * _STRIDE**2)) if strips else height
        parts = []
        for start in range(0, height, most):
            seen = range(max(0, start - _HALO), min(height, start + most + _HALO))
            enlarged = resize_rows(
                m3.flatten(0, 1), (height, width), seen, align_corners=self.RF2.align_corners
            )
            enlarged = enlarged.to(m3.dtype).unflatten(0, (batch, -1))
            m2 = self.RF2.merged(finest[:, :, seen.start : seen.stop], enlarged)
            logits = self.pred2(functional.relu(m2))
            parts.append(logits[:, :, start - seen.start :][:, :, :most])
        return torch.cat(parts, 2)

    def _refined(self, features: list[Tensor], reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the maps of the decoder at strides 32, 16 and 8."""
        _, r3, r4, r5 = features
        m5 = _residual(self.GC(r5, reference), self.convG1, self.convG2)
        m4 = self.RF4(r4, m5)
        return m5, m4, self.RF3(r3, m4)


class _Refine(nn.Module):
    """Brings a coarse map to the size of a map of the encoder, by that map."""

    def __init__(self, inputs: int, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.convFS1 = _conv(inputs)
        self.convFS2 = _conv(_CHANNELS)
        self.convFS3 = _conv(_CHANNELS)
        self.convMM1 = _conv(_CHANNELS)
        self.convMM2 = _conv(_CHANNELS)

    def forward(self, features: Tensor, coarse: Tensor) -> Tensor:
        return self.merged(features, _enlarged(coarse, features.shape[2:], self.align_corners))

    def merged(self, features: Tensor, enlarged: Tensor) -> Tensor:
        """Return the refined map; enlarged, which this writes over: the coarse map at the size of the features."""
        enlarged += _residual(self.convFS1(features), self.convFS2, self.convFS3)
        return _residual(enlarged, self.convMM1, self.convMM2)


def _conv(inputs: int, outputs: int = _CHANNELS) -> Conv3x3:
    return Conv3x3(inputs, outputs)


def _residual(x: Tensor, first: Conv3x3, second: Conv3x3) -> Tensor:
    """x + second(relu(first(relu(x)))), with two buffers beside x."""
    y: Tensor = second(first(functional.relu(x), relu=True), x)
    return y


def _enlarged(x: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    return functional.interpolate(x, size, mode="bilinear", align_corners=align_corners)
