"""Local matching with the learned biases of CFBI, as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vosops.ops.local_matching import local_matching


class LocalMatching(nn.Module):
    """`vosops.local_matching` with its options, and CFBI's two biases: of the background and of all objects.

    Args:
        radius: pixels, or nested radii, as in `vosops.local_matching`.
        dilation: of the window.
        bias: whether the distances have learned biases, which start at 0.
        normalize: whether distances are mapped to [0, 1] (with negative biases to less).
        precision: as in `vosops.local_matching`.
        device: of the parameters.
        dtype: of the parameters.

    Parameters: `background_bias` and `object_bias`, scalars; class 0 of the masks is the background.

        >>> import torch, vosops.nn
        >>> module = vosops.nn.LocalMatching(radius=(2, 4))
        >>> now, before = torch.randn(2, 1, 16, 15, 27)
        >>> module(now, before, torch.randint(0, 3, (1, 15, 27)), num_objects=3).shape
        torch.Size([1, 3, 2, 15, 27])
    """

    def __init__(
        self,
        radius: int | Sequence[int] = 15,
        dilation: int = 1,
        *,
        bias: bool = True,
        normalize: bool = True,
        precision: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.radius = radius if isinstance(radius, int) else tuple(radius)
        self.dilation, self.normalize, self.precision = dilation, normalize, precision
        self.background_bias: nn.Parameter | None = None
        self.object_bias: nn.Parameter | None = None
        if bias:
            self.background_bias = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
            self.object_bias = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor,
        *,
        num_objects: int | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """Return distances (N,O,H,W), or (N,O,R,H,W) for R radii; arguments as in `vosops.local_matching`."""
        bias = None
        if self.background_bias is not None and self.object_bias is not None:
            objects = mask.shape[1] if num_objects is None else num_objects
            both = [self.background_bias.view(1), self.object_bias.expand(max(objects - 1, 0))]
            bias = torch.cat(both)[:objects]
        out = local_matching(
            query,
            key,
            mask,
            radius=self.radius,
            dilation=self.dilation,
            bias=bias,
            normalize=self.normalize,
            num_objects=num_objects,
            query_mask=query_mask,
            precision=self.precision,
        )
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        """Return the options beside the biases."""
        return f"radius={self.radius}, dilation={self.dilation}, normalize={self.normalize}"
