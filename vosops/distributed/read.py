"""`memory_read` and `global_matching` where the memory is divided over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vosops import _checks
from vosops.distributed.exchange import Exchange
from vosops.distributed.matching import nearest_of_all
from vosops.distributed.placements import local_arguments
from vosops.distributed.ranks import Ranks, broadcast, check_served, shared
from vosops.ops._matching import finish_distance
from vosops.ops._memory_scores import GroupsValid, Segments, Valid, ValueSegments
from vosops.ops.global_matching import nearest_pixels
from vosops.ops.memory_read import read_part, resolve_read


def memory_read(
    query_key: Tensor | None,
    memory_key: Segments,
    memory_value: ValueSegments,
    *,
    group: dist.ProcessGroup | None = None,
    query_from: int | None = None,
    timeout: float | None = None,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Segments | None = None,
    selection: Tensor | None = None,
    bias: Segments | None = None,
    valid: Valid | None = None,
    groups: GroupsValid | None = None,
    top_k: int | None = None,
    return_usage: bool = False,
    return_lse: bool = False,
    precision: str | None = None,
) -> Any:
    """Read a memory whose frames are on several ranks, as `vosops.memory_read` reads it on one: exactly.

    Every rank of the group calls it with its own part of the memory and receives the whole result. The parts count in
    the order of the ranks: with top_k equal scores go to the lowest rank, and there to the first position. Keys and
    values never move.

    Args:
        query_key: (N,Ck,*Q), identical on all ranks; or given on the rank `query_from`, and None on the others.
        memory_key: this rank's part, (N,Ck,*M) or segments of it; a rank without any frame passes sizes of 0.
        memory_value: its values, (N,[O,]Cv,*M), as many objects and channels as on the other ranks.
        group: the process group, with gloo or NCCL; None: the default one.
        query_from: the rank of the group whose query_key and selection are broadcast; None: every rank has them.
        timeout: seconds to wait for a rank; None: the timeout of the group.
        similarity: "dot" or "l2", as all options as of `vosops.memory_read`, and alike on all ranks.
        scale: factor of the similarity.
        shrinkage: (N,1,*M) of this rank's part.
        selection: (N,Ck,*Q), alike on all ranks or of `query_from`.
        bias: (N,*M) of this rank's part.
        valid: the valid positions of this rank's part; a range counts only these.
        groups: a `valid` for each of several groups of objects; as many on all ranks.
        top_k: use only the k greatest scores of each query, of all ranks together.
        return_usage: also this part's usage, (N,*M) float32, under the softmax over all parts.
        return_lse: also the lse (N,*Q) over all parts.
        precision: of float32 products.

    A DTensor is accepted for each tensor: query_key and selection replicated, those of the memory sharded in the first
    dimension of *M, all on one mesh of one dimension, whose group is used. The result is then a replicated DTensor.

    Returns:
        What `vosops.memory_read` returns for all parts together, alike on all ranks to the bit; usage is of this part.

    Raises:
        TypeError, ValueError: as `vosops.memory_read`; an argument that must be alike is not, on every rank.
        RankError: a rank died, hangs or failed; with gloo its number is in `ranks`.
        RuntimeError: torch.distributed is not initialized.
        NotImplementedError: under forward-mode differentiation.

    Differentiable once. Every rank is to compute the same loss from the result and to call backward: the gradients are
    then those of one process, of query_key and selection on every rank (with query_from: on that rank), of the memory
    where it is. The float32 result agrees with one rank's to 1e-6 of its size, and is the same to the bit in every run
    with as many ranks and the same parts. In half precision each part is rounded before they are merged.

    Each of W ranks sends (W - 1) / W times: 2 (O Cv + 1) P numbers for the read, with top_k (k + 1) P more, and 2 Ck P
    for the gradient of the query; for P query pixels, whatever the memory's length. Time is that of the part's own
    read. Not for `torch.compile`.

    Source: exact merging of softmax attention over parts: Milakov and Gimelshein, arXiv 1805.02867; across devices:
    Liu et al., Ring Attention, ICLR 2024.

        >>> import torch, vosops.distributed
        >>> import torch.distributed as dist
        >>> if not dist.is_initialized():
        ...     dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> query, keys, values = torch.randn(1, 8, 6, 6), torch.randn(1, 8, 2, 6, 6), torch.randn(1, 4, 2, 6, 6)
        >>> vosops.distributed.memory_read(query, keys, values, top_k=5).shape
        torch.Size([1, 4, 6, 6])
        >>> dist.destroy_process_group()
    """
    tensors = {
        "query_key": query_key,
        "memory_key": memory_key,
        "memory_value": memory_value,
        "shrinkage": shrinkage,
        "selection": selection,
        "bias": bias,
        "valid": valid,
    }
    local, mesh_group, wrap = local_arguments(tensors)
    if wrap is not None and (group is not None or groups is not None or query_from is not None):
        raise ValueError("group, groups and query_from must be None with DTensors, whose mesh has the group")
    exchange = Exchange(mesh_group if wrap is not None else group, timeout)
    keys = local["memory_key"]
    first = keys if isinstance(keys, Tensor) else next(iter(keys), None)
    if isinstance(first, Tensor):
        check_served(exchange, "memory_key must be on", first.device)
    query, selected = _query(
        exchange, local["query_key"], local["selection"], query_from, local["memory_key"]
    )
    options: dict[str, Any] = {
        "similarity": similarity,
        "scale": scale,
        "shrinkage": local["shrinkage"],
        "selection": selected,
        "bias": local["bias"],
        "valid": local["valid"],
        "groups": groups,
        "top_k": top_k,
        "precision": precision,
    }
    memory = (local["memory_key"], local["memory_value"])
    failure, values = None, None
    try:
        values = resolve_read(query, *memory, **options).values_alike
    except (TypeError, ValueError) as error:
        failure = error
    alike = {
        "query_key": (tuple(query.shape), query.dtype, query.requires_grad and torch.is_grad_enabled()),
        "memory_value": values,
        "similarity": similarity,
        "scale": scale,
        "selection": None if selected is None else (tuple(selected.shape), selected.dtype),
        "groups": None if groups is None else len(groups),
        "top_k": top_k,
    }
    exchange.agree(alike, query.device, failure)
    result = read_part(
        Ranks(exchange), query, *memory, return_usage=return_usage, return_lse=return_lse, **options
    )
    return result if wrap is None else wrap(result, return_usage)


def global_matching(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    timeout: float | None = None,
    neighbors: int = 1,
    bias: Tensor | None = None,
    normalize: bool = True,
    num_objects: int | None = None,
    query_mask: Tensor | None = None,
    return_indices: bool = False,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Match a frame with reference frames that are on several ranks, as `vosops.global_matching` does on one.

    Args:
        query: (N,C,H,W), alike on all ranks, as is all but key and mask.
        key: this rank's reference frames, (N,C,T,H2,W2); T may differ, and be 0.
        mask: the objects in them, bool (N,O,T,H2,W2) or labels (N,T,H2,W2).
        group: the process group; None: the default one.
        timeout: seconds to wait for a rank; None: the timeout of the group.
        neighbors: k; the mean of the k nearest distances, over all ranks.
        bias: (O,) added to the distance of each object.
        normalize: tanh((d + bias) / 2); without it the raw distance.
        num_objects: number of objects O; needed with labels.
        query_mask: bool (N,H,W), of the pixels that are matched.
        return_indices: also the flat indices, counted over the frames of all ranks in their order.
        precision: of float32 products.

    Returns:
        (N,O,H,W), with return_indices a pair, as `vosops.global_matching` for all frames; alike on all ranks.

    Raises:
        TypeError, ValueError: as `vosops.global_matching`, or an argument that must be alike is not.
        RankError: a rank died, hangs or failed.

    The k least distances of each rank are sent to the rank that has the slice of pixels, (W - 1) / W times k N O P of
    12 bytes, and the results come back. Differentiable once, as `memory_read`.

        >>> import torch, vosops.distributed
        >>> import torch.distributed as dist
        >>> if not dist.is_initialized():
        ...     dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> first, current = torch.rand(2, 1, 8, 6, 6)
        >>> labels = torch.randint(0, 3, (1, 6, 6))
        >>> vosops.distributed.global_matching(current, first, labels, num_objects=3).shape
        torch.Size([1, 3, 6, 6])
        >>> dist.destroy_process_group()
    """
    _checks.refuse_forward_mode("global_matching")
    exchange = Exchange(group, timeout)
    _checks.check_tensor("query", query, ("N", "C", "H", "W"))
    check_served(exchange, "query must be on", query.device)
    query = shared(exchange, query)
    failure, nearest_here = None, None
    try:
        nearest_here = nearest_pixels(
            query,
            key,
            mask,
            neighbors=neighbors,
            bias=bias,
            num_objects=num_objects,
            query_mask=query_mask,
            precision=precision,
        )
    except (TypeError, ValueError) as error:
        failure = error
    alike = {
        "query": (tuple(query.shape), query.dtype, query.requires_grad and torch.is_grad_enabled()),
        "mask": None if nearest_here is None else nearest_here[0].shape[1],
        "neighbors": neighbors,
    }
    exchange.agree(alike, query.device, failure)
    assert nearest_here is not None
    distance, index, positions = nearest_here
    nearest, indices = nearest_of_all(exchange, distance, index, positions)
    nearest = finish_distance(nearest, bias, normalize)
    return (nearest, indices if neighbors > 1 else indices.squeeze(2)) if return_indices else nearest


def _query(
    exchange: Exchange,
    query_key: Tensor | None,
    selection: Tensor | None,
    query_from: int | None,
    memory_key: Segments,
) -> tuple[Tensor, Tensor | None]:
    """Return the query and its selection, broadcast where one rank has them."""
    if query_from is None:
        if not isinstance(query_key, Tensor):
            raise TypeError(
                f"query_key must be a tensor unless query_from is given, got {type(query_key).__name__}"
            )
        return shared(exchange, query_key), None if selection is None else shared(exchange, selection)
    if isinstance(query_from, bool) or not isinstance(query_from, int):
        raise TypeError(f"query_from must be a rank of the group or None, got {type(query_from).__name__}")
    if not 0 <= query_from < exchange.size:
        raise ValueError(f"query_from must be a rank of the group, below {exchange.size}, got {query_from}")
    first = memory_key if isinstance(memory_key, Tensor) else memory_key[0]
    device = first.device
    flags = exchange.numbers([int(selection is not None)], device)
    query = broadcast(exchange, query_key, query_from, device)
    if not flags[query_from][0]:
        return query, None
    return query, broadcast(exchange, selection, query_from, device)
