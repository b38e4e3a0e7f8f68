"""Local attention in plain PyTorch, as it is written where no extension is installed: every window unfolded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _unfolded(x: Tensor, reach: int, dilation: int) -> Tensor:
    """Return the windows (N,C,K,H,W) of x (N,C,H,W), zeros outside of it."""
    around = [reach * dilation] * 4
    size = 2 * reach + 1
    windows: Tensor = functional.unfold(functional.pad(x, around), size, dilation=dilation)
    windows = windows.view(*x.shape[:2], size * size, *x.shape[2:])
    return windows


def local_attention_dot_core(a: Tensor, b: Tensor, reach: int, dilation: int) -> Tensor:
    """a[p] . b[p + d] for each offset d of the window: (N,K,H,W) of two (N,C,H,W)."""
    return torch.einsum("nchw,nckhw->nkhw", a, _unfolded(b, reach, dilation))


def local_attention_weigh_core(weights: Tensor, b: Tensor, reach: int, dilation: int) -> Tensor:
    """Return the sum over d of weights[d,p] b[p + d]: (N,C,H,W) of (N,K,H,W) and (N,C,H,W)."""
    return torch.einsum("nkhw,nckhw->nchw", weights, _unfolded(b, reach, dilation))


def local_attention_spread_core(weights: Tensor, a: Tensor, reach: int, dilation: int) -> Tensor:
    """Return the sum over d of weights[d,p - d] a[p - d]: (N,C,H,W) of (N,K,H,W) and (N,C,H,W)."""
    margin = reach * dilation
    padded = (a.shape[2] + 2 * margin, a.shape[3] + 2 * margin)
    products = (weights.unsqueeze(1) * a.unsqueeze(2)).flatten(1, 2).flatten(2)
    summed: Tensor = functional.fold(products, padded, 2 * reach + 1, dilation=dilation)
    return summed[..., margin : margin + a.shape[2], margin : margin + a.shape[3]]


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
    reach = radius // dilation
    scores = local_attention_dot_core(q * scale, k, reach, dilation).unflatten(0, (-1, heads))
    if relative_key is not None:
        by_head = q.unflatten(0, (-1, heads))
        scores = scores + torch.einsum("nmchw,mck->nmkhw", by_head, relative_key.to(dtype))
    if bias is not None:
        scores = scores + (bias[:, :, None, None] if bias.dim() == 2 else bias).to(dtype)
    inside = _unfolded(torch.ones_like(q[:1, :1]), reach, dilation)[0, 0] > 0
    weights = scores.masked_fill(~inside, -torch.inf).softmax(2)
    out = local_attention_weigh_core(weights.flatten(0, 1), v, reach, dilation).unflatten(0, (-1, heads))
    if relative_value is not None:
        out = out + torch.einsum("nmkhw,mck->nmchw", weights, relative_value.to(dtype))
    out = out.flatten(1, 2).to(value.dtype)
    return (out, weights) if return_weights else out
