"""Local attention in plain PyTorch, as it is written where no extension is installed: every window unfolded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _unfolded(x: Tensor, radius: int, dilation: int) -> Tensor:
    """The windows (N,C,K,H,W) of x (N,C,H,W), zeros outside of it."""
    reach = radius // dilation
    around = [reach * dilation] * 4
    size = 2 * reach + 1
    windows: Tensor = functional.unfold(functional.pad(x, around), size, dilation=dilation)
    windows = windows.view(*x.shape[:2], size * size, *x.shape[2:])
    return windows


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    radius: int = 7,
    heads: int = 1,
    dilation: int = 1,
    scale: float | None = None,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
    bias: Tensor | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`vosops.local_attention`; memory (2 radius + 1)^2 times that of key and value."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype).unflatten(1, (heads, -1)).flatten(0, 1) for x in (query, key, value))
    scale = q.shape[1] ** -0.5 if scale is None else scale
    scores = torch.einsum("nchw,nckhw->nkhw", q * scale, _unfolded(k, radius, dilation))
    scores = scores.unflatten(0, (-1, heads))
    if relative_key is not None:
        by_head = q.unflatten(0, (-1, heads))
        scores = scores + torch.einsum("nmchw,mck->nmkhw", by_head, relative_key.to(dtype))
    if bias is not None:
        scores = scores + (bias[:, :, None, None] if bias.dim() == 2 else bias).to(dtype)
    inside = _unfolded(torch.ones_like(q[:1, :1]), radius, dilation)[0, 0] > 0
    weights = scores.masked_fill(~inside, -torch.inf).softmax(2)
    out = torch.einsum("nkhw,nckhw->nchw", weights.flatten(0, 1), _unfolded(v, radius, dilation))
    out = out.unflatten(0, (-1, heads))
    if relative_value is not None:
        out = out + torch.einsum("nmkhw,mck->nmchw", weights, relative_value.to(dtype))
    out = out.flatten(1, 2).to(value.dtype)
    return (out, weights) if return_weights else out
