"""Attention kernels of other packages that a user would try on a GPU in place of a fused op.

Each is optional: one that is not installed, or does not take a size or an arithmetic, is named with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vosops.benchmarking.cases import Formulation
from vosops.benchmarking.local_attention import AttentionSize
from vosops.benchmarking.memory_read import MemorySize

FLASH_3, VARLEN, NATTEN = "FlashAttention-3", "varlen_attn", "NATTEN"
FLASH_3_KEY, FLASH_3_VALUE = 64, 512
"""Channels of FlashAttention-3's only shape with values so much wider than keys; it has no gradients."""

NATTEN_DIFFERS = "its windows are moved inside the map at the borders, and it adds no bias"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, key, value), each (N,heads,length,width), the same number of heads -> (N,heads,length,width)."""


@dataclass(frozen=True)
class ReadPeer:
    """An attention kernel as a memory read.

    Attributes:
        name: for people.
        attention: what computes it.
        split: the values become heads as wide as the key, each of which computes the scores anew.
        reason_not: why it cannot serve this size and arithmetic; "" if it may.
    """

    name: str
    attention: Attention
    split: bool
    reason_not: str


def is_missing(package: str) -> bool:
    """Whether a package, or a module of one, is not installed."""
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # its parent
        return True


def flash_3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention by FlashAttention-3, from the package flash_attn_interface."""
    from flash_attn_interface import flash_attn_func

    result: Any = flash_attn_func(*(t.transpose(1, 2) for t in (query, key, value)))
    out: Tensor = result[0] if isinstance(result, tuple) else result  # with the log-sum-exp in some versions
    return out.transpose(1, 2)


def varlen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention by PyTorch's kernel for sequences of several lengths, one after the other."""
    from torch.nn.attention.varlen import varlen_attn

    def packed(tensor: Tensor) -> tuple[Tensor, Tensor, int]:
        length = tensor.shape[2]
        ends = torch.arange(tensor.shape[0] + 1, dtype=torch.int32, device=tensor.device) * length
        return tensor.transpose(1, 2).flatten(0, 1), ends, length

    (q, q_ends, q_length), (k, k_ends, k_length) = packed(query), packed(key)
    out: Any = varlen_attn(q, k, packed(value)[0], q_ends, k_ends, q_length, k_length)
    attended: Tensor = out.unflatten(0, (query.shape[0], q_length)).transpose(1, 2)
    return attended


def read_peers(size: MemorySize, dtype: torch.dtype, backward: bool) -> Iterator[ReadPeer]:
    """Yield the packages' attention kernels for a dense read by dot products."""
    widths = ""
    if size.key_channels > FLASH_3_KEY or size.objects * size.value_channels > FLASH_3_VALUE or backward:
        widths = f"it has values of {FLASH_3_VALUE} channels with keys of up to {FLASH_3_KEY} alone, forward"
    uneven = "" if size.value_channels % size.key_channels == 0 else "the values do not make whole heads"
    width = "" if size.key_channels % 8 == 0 else "widths must be multiples of 8"
    arithmetic = "" if dtype.itemsize == 2 else "it takes 16-bit numbers alone"
    flash = "flash_attn_interface is not installed" if is_missing("flash_attn_interface") else arithmetic
    module = "torch.nn.attention.varlen"
    packed = "this PyTorch has no torch.nn.attention.varlen" if is_missing(module) else arithmetic
    yield ReadPeer(FLASH_3, flash_3, False, flash or widths)
    yield ReadPeer(f"{FLASH_3}, values split", flash_3, True, flash or uneven or width)
    yield ReadPeer(f"{VARLEN}, values split", varlen, True, packed or uneven or width)


def natten(size: AttentionSize) -> tuple[Formulation, str]:
    """Return neighborhood attention of NATTEN's, and why it cannot run; "" if it may."""

    def formulation(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        from natten import na2d

        maps = (x.unflatten(1, (size.heads, -1)).permute(0, 3, 4, 1, 2) for x in (query, key, value))
        out: Tensor = na2d(*(x.contiguous() for x in maps), kernel_size=2 * size.radius + 1)
        return out.permute(0, 3, 4, 1, 2).flatten(1, 2)

    reason = "natten is not installed" if is_missing("natten") else ""
    if 2 * size.radius + 1 > min(size.height, size.width):
        reason = reason or "its window must fit into the map"
    return formulation, reason
