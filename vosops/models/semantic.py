"""What :class:`vosops.inference.SemanticTracker` needs of a network that segments clips into classes."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

__all__ = ["SemanticNetwork", "State"]

State = dict[str, tuple[Tensor, Tensor]]
"""Hidden and cell (N,C,h,w) of each recurrent layer, by its name."""


class SemanticNetwork(nn.Module, ABC):
    """A network of two halves: one that sees a frame alone, and one that is recurrent."""

    num_classes: int
    min_side: int = 1
    """The least side of a frame."""

    align_corners: bool = False
    """How logits are enlarged to the frame's size."""

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
