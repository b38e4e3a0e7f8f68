"""A space-time memory read with its key and value heads, as in STM, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vosops import _checks
from vosops.ops.memory_read import memory_read


class MemoryRead(nn.Module):
    """STM's space-time read: keys and values of two kinds of features, attention over all memory, and both values.

    Args:
        in_channels: of the features, those of the query and of the memory.
        key_channels: of the keys.
        value_channels: of the values.
        kernel_size: odd; of the four convolutions that make keys and values.
        similarity: "dot" (STM) or "l2" (STCN), as in `vosops.memory_read`.
        top_k: read only this many best positions of the memory for each pixel; None: all.
        precision: as in `vosops.memory_read`.
        device: of the parameters.
        dtype: of the parameters.

    Parameters: `memory_key`, `memory_value`, `query_key` and `query_value`, convolutions initialised as those of
    torch.nn.Conv2d. The affinity of all pixels with the whole memory is never built, neither in the forward nor in
    the backward pass.

        >>> import torch, vosops.nn
        >>> module = vosops.nn.MemoryRead(32, key_channels=8, value_channels=16)
        >>> frame, memory = torch.randn(2, 32, 15, 27), torch.randn(2, 32, 3, 15, 27)
        >>> module(frame, memory).shape
        torch.Size([2, 32, 15, 27])
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int = 128,
        value_channels: int = 512,
        kernel_size: int = 3,
        *,
        similarity: str = "dot",
        top_k: int | None = None,
        precision: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if similarity not in ("dot", "l2"):
            raise ValueError(f"similarity must be 'dot' or 'l2', got {similarity!r}")
        self.in_channels = in_channels
        self.similarity, self.top_k, self.precision = similarity, top_k, precision
        for name, channels in (("key", key_channels), ("value", value_channels)):
            for side in ("memory", "query"):
                convolution = nn.Conv2d(
                    in_channels, channels, kernel_size, padding=kernel_size // 2, device=device, dtype=dtype
                )
                self.add_module(f"{side}_{name}", convolution)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Return the values read for each pixel, concatenated with the frame's own values: (N,2*value_channels,H,W).

        query (N,in_channels,H,W); memory (N,in_channels,T,H',W'), T frames of any size. Raises ValueError, TypeError.
        """
        key, value = self.memorise(memory)
        return self.read(query, key, value)

    def memorise(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (N,key_channels,T,H,W) and values (N,value_channels,T,H,W) of features (N,in_channels,T,H,W)."""
        _checks.check_tensor("memory", memory, ("N", self.in_channels, "T", "H", "W"))
        frames = memory.transpose(1, 2).flatten(0, 1)
        key, value = (
            x.unflatten(0, (memory.shape[0], memory.shape[2])).transpose(1, 2)
            for x in (self.get_submodule("memory_key")(frames), self.get_submodule("memory_value")(frames))
        )
        return key, value

    def read(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Read like `forward`, with keys and values from `memorise`, or from a part of many frames."""
        _checks.check_tensor("query", query, ("N", self.in_channels, "H", "W"))
        read = memory_read(
            self.get_submodule("query_key")(query),
            key,
            value,
            similarity=self.similarity,
            top_k=self.top_k,
            precision=self.precision,
        )
        return torch.cat([read, self.get_submodule("query_value")(query)], 1)

    def extra_repr(self) -> str:
        """Return the options beside the convolutions."""
        return f"similarity={self.similarity!r}, top_k={self.top_k}"
