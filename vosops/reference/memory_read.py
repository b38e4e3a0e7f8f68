"""The memory read in plain PyTorch: the whole affinity matrix, as STM, STCN and XMem write it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def memory_scores(
    query: Tensor,
    key: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the core's scores (N,M,P): shrinkage * (scale * key . query + query_bias) + key_bias.

    query (N,C,P), or (N,2C,P) to meet the key's channels followed by their squares; key (N,C,M); shrinkage and
    key_bias (N,M), query_bias (N,P). Accumulated in float32 (float64 for float64 keys).
    """
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    query, key = query.to(wide), key.to(wide)
    if query.shape[1] != key.shape[1]:
        key = torch.cat([key, key.square()], 1)
    scores = scale * (key.transpose(1, 2) @ query)
    if query_bias is not None:
        scores = scores + query_bias[:, None, :]
    if shrinkage is not None:
        scores = scores * shrinkage[:, :, None]
    return scores if key_bias is None else scores + key_bias[:, :, None]


def without_excluded(
    key: Tensor, shrinkage: Tensor | None, key_bias: Tensor | None, values: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """key, shrinkage and values (N,O,Cv,M) with zeros where key_bias is -inf: content there, even NaN, is not read."""
    if key_bias is None:
        return key, shrinkage, list(values)
    excluded = key_bias.detach().isneginf()
    shrinkage = None if shrinkage is None else shrinkage.masked_fill(excluded, 0)
    cleared = [value.masked_fill(excluded[:, None, None], 0) for value in values]
    return key.masked_fill(excluded[:, None], 0), shrinkage, cleared


def scores_at(
    index: Tensor,
    query: Tensor,
    key: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the core's scores (N,K,P) of the positions index (N,K,P) alone; -inf where the index is -1."""
    found, at = index >= 0, index.clamp(min=0).flatten(1)

    def chosen(rows: Tensor) -> Tensor:
        """Rows (N,C,M) at the positions (N,C,K,P)."""
        picked = rows.gather(2, at[:, None].expand(-1, rows.shape[1], -1)).unflatten(2, index.shape[1:])
        return torch.where(found[:, None], picked, 0)

    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    keys = chosen(key).to(wide)
    if query.shape[1] != key.shape[1]:
        keys = torch.cat([keys, keys.square()], 1)
    scores = scale * (keys * query.to(wide)[:, :, None]).sum(1)
    if query_bias is not None:
        scores = scores + query_bias[:, None, :]
    if shrinkage is not None:
        scores = torch.where(found, scores, 0) * chosen(shrinkage[:, None]).squeeze(1)
    if key_bias is not None:
        scores = scores + chosen(key_bias[:, None]).squeeze(1)
    return torch.where(found, scores, -torch.inf)


def greatest_first(scores: Tensor, top_k: int) -> Tensor:
    """Return the positions (N,k,P) of the top_k greatest scores (N,M,P), on a tie the first; NaN comes behind -inf."""
    return torch.sort(_comparable(scores), dim=1, descending=True, stable=True).indices[:, :top_k]


def _comparable(scores: Tensor) -> Tensor:
    """Return the scores with -inf for NaN, which PyTorch takes for the greatest number."""
    return scores.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def keep_greatest(scores: Tensor, top_k: int) -> Tensor:
    """scores (N,M,P) with -inf for all but the top_k greatest of each query; a NaN is never among those."""
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, greatest_first(scores, top_k), True)
    return scores.masked_fill(~kept | scores.detach().isnan(), -torch.inf)


def softmax_over_memory(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of scores (N,M,P) over M, and the log-sum-exp (N,P); where nothing has a score, 0 and -inf."""
    if scores.shape[1] == 0:
        return scores, scores.new_full((scores.shape[0], scores.shape[2]), -torch.inf)
    greatest = scores.detach().amax(1, keepdim=True)
    exponentials = torch.exp(scores - torch.where(greatest.isneginf(), 0, greatest))
    total = exponentials.sum(1, keepdim=True)
    some = total != 0
    total = torch.where(some, total, 1)
    lse = torch.where(some, greatest + total.log(), -torch.inf)
    return exponentials / total, lse.squeeze(1)


def memory_read_core(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """value (N,O,Cv,M) read with the softmax of the scores -> (N,O,Cv,P) in its dtype, and the lse (N,P).

    A position whose key_bias is -inf is not read: its key, shrinkage and value may be anything.
    """
    key, shrinkage, (value,) = without_excluded(key, shrinkage, key_bias, [value])
    weights, lse = softmax_over_memory(memory_scores(query, key, shrinkage, query_bias, key_bias, scale))
    out = value.to(weights.dtype) @ weights[:, None]
    return out.to(value.dtype), lse


def memory_usage_core(
    query: Tensor,
    key: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    lse: Tensor,
) -> Tensor:
    """Return the sum over the queries of each memory position's weight exp(score - lse) -> (N,M)."""
    key, shrinkage, _ = without_excluded(key, shrinkage, key_bias)
    scores = memory_scores(query, key, shrinkage, query_bias, key_bias, scale)
    lse = torch.where(lse.isneginf(), torch.inf, lse)
    return torch.exp(scores - lse[:, None, :]).sum(2)


def memory_select_core(
    query: Tensor,
    key: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Return the top_k greatest scores and their positions (N,K,P), greatest first, -inf and -1 where fewer exist.

    NaN is never chosen, and derivatives reach nothing but what was chosen.
    """
    with torch.no_grad():
        scores = memory_scores(query, key, shrinkage, query_bias, key_bias, scale)
        order = greatest_first(scores, top_k)
        index = torch.where(scores.gather(1, order) > -torch.inf, order, -1)
    chosen = scores_at(index, query, key, shrinkage, query_bias, key_bias, scale)
    missing = (0, 0, 0, top_k - index.shape[1])
    index = torch.nn.functional.pad(index, missing, value=-1)
    return torch.nn.functional.pad(chosen, missing, value=-torch.inf), index


def memory_gather_core(weight: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Return the sum over K of weight (N,K,P) times value (N,O,Cv,M) at index (N,K,P); -1 contributes nothing."""
    if value.shape[3] == 0:
        return value.new_zeros(*value.shape[:3], index.shape[2])
    positions = index.clamp(min=0).flatten(1)[:, None, None].expand(-1, *value.shape[1:3], -1)
    gathered = torch.unflatten(value.gather(3, positions), 3, index.shape[1:])
    found = index >= 0
    weight = torch.where(found, weight, 0)
    gathered = torch.where(found[:, None, None], gathered, 0)
    return (gathered.to(weight.dtype) * weight[:, None, None]).sum(3).to(value.dtype)


def memory_read_prior_core(
    query: Tensor,
    key: Tensor,
    shrinkage: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    values: Sequence[Tensor],
    size: Sequence[int],
    prior: float,
    top_k: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read with KMN's Gaussian: out (N,O,Cv,P) from values (N,.,Cv,M) of all objects, usage (N,M), lse (N,P)."""
    key, shrinkage, values = without_excluded(key, shrinkage, key_bias, values)
    scores = memory_scores(query, key, shrinkage, query_bias, key_bias, scale)
    scores = scores + gaussian_prior(scores, size, prior)
    if top_k is not None:
        scores = keep_greatest(scores, top_k)
    weights, lse = softmax_over_memory(scores)
    if top_k is not None:
        undefined = query.detach().isnan().any(1)
        weights, lse = (
            weights.masked_fill(undefined[:, None], torch.nan),
            lse.masked_fill(undefined, torch.nan),
        )
    out = torch.cat([value.to(weights.dtype) @ weights[:, None] for value in values], 1)
    return out, weights.nan_to_num(0).sum(2), lse


def similarity_scores(
    query_key: Tensor,
    memory_key: Tensor,
    *,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Tensor | None = None,
    selection: Tensor | None = None,
) -> Tensor:
    """Return the scores (N,M,P) of a read, without bias; arguments as those of `memory_read`, of one segment."""
    query, key = query_key.flatten(2), memory_key.flatten(2)
    wide = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    query, key = query.to(wide), key.to(wide)
    scale = 1 / math.sqrt(key.shape[1]) if scale is None else scale
    if similarity == "dot":
        scores = key.transpose(1, 2) @ query
    else:
        scores = 2 * key.transpose(1, 2) @ (query if selection is None else query * selection.flatten(2))
        if selection is None:
            scores = scores - key.square().sum(1)[:, :, None]
        else:
            chosen = selection.flatten(2).to(wide)
            scores = scores - key.square().transpose(1, 2) @ chosen
            scores = scores - (chosen * query.square()).sum(1)[:, None, :]
    scores = scores * scale
    return scores if shrinkage is None else scores * shrinkage.flatten(1).to(wide)[:, :, None]


def memory_affinity(
    query_key: Tensor,
    memory_key: Tensor,
    *,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Tensor | None = None,
    selection: Tensor | None = None,
    bias: Tensor | None = None,
    valid: Tensor | tuple[int, int] | None = None,
    memory_lengths: Tensor | Sequence[int] | None = None,
    top_k: int | None = None,
    prior: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the affinity (N,M,P) of a read and its log-sum-exp (N,P); arguments as those of `memory_read`.

    query_key (N,Ck,*Q), memory_key (N,Ck,*M) of one segment. With top_k all but the k greatest are 0.
    """
    excluded = _excluded(valid, memory_lengths, memory_key)
    undefined = torch.zeros_like(excluded[:, :1])  # queries
    if top_k is not None:
        for tensor in (memory_key, shrinkage, None if bias is None else bias[:, None]):
            excluded = excluded if tensor is None else excluded | _has_nan(tensor)
        for tensor in (query_key, selection):
            undefined = undefined if tensor is None else undefined | _has_nan(tensor)
    scores = similarity_scores(
        query_key if top_k is None else _cleared(query_key, undefined),
        _cleared(memory_key, excluded),
        similarity=similarity,
        scale=scale,
        shrinkage=None if shrinkage is None else _cleared(shrinkage, excluded),
        selection=selection if selection is None or top_k is None else _cleared(selection, undefined),
    )
    if bias is not None:
        scores = scores + bias.flatten(1).masked_fill(excluded, 0).to(scores.dtype)[:, :, None]
    scores = scores.masked_fill(excluded[:, :, None], -torch.inf).masked_fill(undefined[:, None], torch.nan)
    if prior is not None:
        scores = scores + gaussian_prior(scores, query_key.shape[-2:], prior)
    if top_k is not None:
        scores = keep_greatest(scores, top_k)
    weights, lse = softmax_over_memory(scores)
    return weights.masked_fill(undefined[:, None], torch.nan), lse.masked_fill(undefined, torch.nan)


def _excluded(
    valid: Tensor | tuple[int, int] | None, lengths: Tensor | Sequence[int] | None, memory_key: Tensor
) -> Tensor:
    """(N,M) or (1,M): the positions that `valid` leaves out, or that lie behind a memory's length."""
    positions = torch.arange(memory_key.shape[2:].numel(), device=memory_key.device)
    if valid is None:
        excluded = torch.zeros_like(positions, dtype=torch.bool)[None]
    elif isinstance(valid, Tensor):
        excluded = ~valid.flatten(1)
    else:
        excluded = ~((positions >= valid[0]) & (positions < valid[1]))[None]
    if lengths is None:
        return excluded
    return excluded | (positions >= torch.as_tensor(lengths, device=positions.device)[:, None])


def _has_nan(tensor: Tensor) -> Tensor:
    """Return which pixels (N,P) of a tensor (N,C,*P) have a NaN."""
    return tensor.detach().isnan().any(1).flatten(1)


def _cleared(tensor: Tensor, pixels: Tensor) -> Tensor:
    """Return a tensor (N,...,C,*P) flattened over *P, with zeros at pixels (N,P), so that these are not multiplied."""
    return tensor.flatten(2).masked_fill(pixels[:, None], 0)


def gaussian_prior(scores: Tensor, size: Sequence[int], sigma: float) -> Tensor:
    """Return the logarithm of KMN's Gaussian (N,M,P) around the query pixel that each memory position likes best.

    scores (N,M,P), P = H*W of `size`; sigma in pixels of the query. The best pixel is not differentiated; one whose
    score is NaN is not liked.
    """
    height, width = size
    if scores.shape[2] == 0:
        return scores
    best = _comparable(scores).argmax(2, keepdim=True)
    pixels = torch.arange(height * width, device=scores.device)[None, None]
    squared = (best // width - pixels // width).square() + (best % width - pixels % width).square()
    return -squared.to(scores.dtype) / (2 * sigma * sigma)


def memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor | Sequence[Tensor],
    *,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Tensor | None = None,
    selection: Tensor | None = None,
    bias: Tensor | None = None,
    valid: Tensor | tuple[int, int] | None = None,
    memory_lengths: Tensor | Sequence[int] | None = None,
    top_k: int | None = None,
    prior: float | None = None,
    return_usage: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`vosops.memory_read` of one segment and one group in plain PyTorch; see there.

    Memory: the affinity, N times M times P.
    """
    if not isinstance(memory_value, Tensor):
        memory_value = torch.stack(list(memory_value), 1)
    weights, lse = memory_affinity(
        query_key,
        memory_key,
        similarity=similarity,
        scale=scale,
        shrinkage=shrinkage,
        selection=selection,
        bias=bias,
        valid=valid,
        memory_lengths=memory_lengths,
        top_k=top_k,
        prior=prior,
    )
    per_object = memory_value.dim() == memory_key.dim() + 1
    value = memory_value.flatten(3) if per_object else memory_value.flatten(2)[:, None]
    if top_k is None:
        value = value.masked_fill(_excluded(valid, memory_lengths, memory_key)[:, None, None], 0)
        read = value.to(weights.dtype) @ weights[:, None]
    else:
        index = greatest_first(weights, top_k)
        chosen = weights.gather(1, index)
        batch = max(len(value), len(chosen)) if len(value) and len(chosen) else 0
        read = memory_gather_core(
            chosen.expand(batch, -1, -1),
            torch.where(chosen != 0, index, -1).expand(batch, -1, -1),
            value.expand(batch, *value.shape[1:]),
        )
    read = read if per_object else read.squeeze(1)
    results = [torch.unflatten(read.to(memory_value.dtype), -1, tuple(query_key.shape[2:]))]
    batch = results[0].shape[0]
    if return_usage:
        usage = torch.unflatten(weights.detach().nan_to_num(0).sum(2), 1, tuple(memory_key.shape[2:]))
        results.append(usage.expand(batch, *usage.shape[1:]))
    if return_lse:
        lse = torch.unflatten(lse, 1, tuple(query_key.shape[2:]))
        results.append(lse.expand(batch, *lse.shape[1:]))
    return results[0] if len(results) == 1 else tuple(results)
