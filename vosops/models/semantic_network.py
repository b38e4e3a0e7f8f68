"""What :class:`vosops.inference.SemanticTracker` needs of a network that segments clips into classes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["FrameNetwork", "SemanticNetwork", "State"]

State = dict[str, tuple[Tensor, Tensor]]
"""Hidden and cell (N,C,h,w) of each recurrent layer, by its name."""


class SemanticNetwork(nn.Module, ABC):
    """A network of two halves: one that sees a frame alone, and one that is recurrent.

    One that is not recurrent is a :class:`FrameNetwork`.
    """

    num_classes: int
    min_side: int = 1
    """The least side of a frame."""

    align_corners: bool = False
    """How logits are enlarged to the frame's size."""

    recurrent: bool = True
    """Whether a frame's logits depend on the frames before it."""

    @abstractmethod
    def prepare(self, frames: Tensor) -> Tensor:
        """(N,3,H,W) RGB, uint8 or floating in [0, 1] -> images in the network's dtype, normalised."""

    @abstractmethod
    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (N,3,H,W) -> maps, each of N, that later frames of the same clip need no more than once."""

    @abstractmethod
    def logits(
        self, features: tuple[Tensor, ...], length: int, state: State | None = None, *, last: bool = False
    ) -> tuple[Tensor, State]:
        """Features of N clips of ``length`` frames (N*length, a clip's frames in order) -> logits and the state.

        state: what an earlier part of the clips returned; None begins with zeros. Logits are (N*length,K,h,w), or
        with ``last`` of each clip's last frame alone, (N,K,h,w).
        """


class FrameNetwork(SemanticNetwork):
    """A network that segments each frame alone: it has ``num_classes`` and a ``forward``, and nothing else is needed.

    >>> import torch
    >>> from vosops.inference import SemanticTracker
    >>> from vosops.models import FrameNetwork
    >>> class OneLayer(FrameNetwork):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.num_classes = 5
    ...         self.layer = torch.nn.Conv2d(3, 5, 3, stride=4, padding=1)
    ...
    ...     def forward(self, images):
    ...         return self.layer(images)
    >>> SemanticTracker(OneLayer()).step(torch.rand(3, 32, 48), output="labels").shape
    torch.Size([32, 48])
    """

    recurrent = False
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Of the channels of frames in [0, 1], taken off before `forward`."""

    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """What they are divided by then."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images (N,3,H,W), as `prepare` gives them -> logits (N,K,h,w), in eval mode; they may be smaller."""

    def prepare(self, frames: Tensor) -> Tensor:
        """See :class:`SemanticNetwork`."""
        dtype = next(self.parameters()).dtype
        images = frames.to(dtype) / 255 if frames.dtype == torch.uint8 else frames.to(dtype)
        mean, std = (images.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (images - mean) / std

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """See :class:`SemanticNetwork`: the logits."""
        return (self(images),)

    def logits(
        self, features: tuple[Tensor, ...], length: int, state: State | None = None, *, last: bool = False
    ) -> tuple[Tensor, State]:
        """See :class:`SemanticNetwork`."""
        (logits,) = features
        return (logits[length - 1 :: length] if last else logits), {}
