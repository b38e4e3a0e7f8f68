"""What local and global matching share: objects in, normalised distances out, and the registration of their cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vosops import _checks, backends
from vosops.ops._registration import Piece, register_op, register_pieces, without_argument
from vosops.ops.matching_backward import matching_backward

IGNORED_LABEL = 255


class Matching(NamedTuple):
    """The checked arguments of a matching: the core's, query first and precision last."""

    call: backends.Call
    core: tuple[Any, ...]


def resolved(query: Tensor, *rest: Any) -> Matching:
    """Return the arguments of a core, which computes in the query's dtype."""
    backward = _checks.wants_gradients(query, rest[0])
    return Matching(backends.Call(query.device, query.dtype, (), None, rest[-1], backward), (query, *rest))


def match(name: str, arguments: Matching) -> tuple[Tensor, Tensor]:
    """Return the core's raw distance and index (N,O,slots,H,W)."""
    result: tuple[Tensor, Tensor] = backends.choose(name, arguments.call).run(name, *arguments.core)
    return result


def object_masks(mask: Tensor, num_objects: int | None, key: Tensor) -> Tensor:
    """Return the boolean masks (N,O,*key.shape[2:]) that `mask` stands for.

    A boolean or floating `mask` (N,O,...) holds one map per object (floating: > 0.5), which may overlap.
    An integer `mask` (N,...) is a label map: value v belongs to object v for v < num_objects, 0 included;
    255 and any other value belong to no object.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    _checks.check_same_device("mask", mask, "query", key)
    batch, pixels = key.shape[0], tuple(key.shape[2:])
    if mask.dtype in _checks.INTEGER_DTYPES:
        if num_objects is None:
            raise ValueError(f"num_objects must be given with a label map of {mask.dtype}, got None")
        count = _checks.check_positive_int("num_objects", num_objects, least=0)
        _checks.check_tensor("mask", mask, (batch, *pixels))
        if count > IGNORED_LABEL:
            raise ValueError(f"num_objects must be at most {IGNORED_LABEL} with a label map, got {count}")
        labels = torch.arange(count, device=mask.device).view(1, count, *(1,) * len(pixels))
        return mask.long().unsqueeze(1) == labels
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool, floating or an integer label map, got {mask.dtype}")
    _checks.check_tensor("mask", mask, (batch, "O", *pixels))
    if num_objects is not None and mask.shape[1] != num_objects:
        raise ValueError(f"num_objects must be mask.shape[1] ({mask.shape[1]}) or None, got {num_objects}")
    return mask if mask.dtype == torch.bool else mask > 0.5


def finish_distance(distance: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """Add the object's bias to a raw distance (N,O,...) and map it to [-1, 1] by tanh(d / 2).

    tanh(d / 2) equals FEELVOS' 1 - 2 / (1 + exp(d)), but its derivatives stay finite where exp overflows;
    an infinite distance (no such pixel) gives exactly 1.
    """
    if bias is None:
        return torch.tanh(distance / 2) if normalize else distance
    undefined = distance.isnan()  # gives the bias no gradient: 0 times NaN would be NaN
    distance = distance.masked_fill(undefined, 0) + bias.to(distance.dtype).view(
        -1, *(1,) * (distance.dim() - 2)
    )
    return (torch.tanh(distance / 2) if normalize else distance).masked_fill(undefined, torch.nan)


def nearest_mean(distance: Tensor, index: Tensor) -> Tensor:
    """Mean over dim 2 of the K nearest distances (N,O,K,H,W), of those that there are (index >= 0)."""
    found = index >= 0
    count = found.sum(2)
    mean = torch.where(found, distance, 0).sum(2) / count.clamp(min=1)
    return torch.where(count > 0, mean, distance.select(2, 0))


def empty_matches(query: Tensor, mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Return a core's outputs without values: distance and int64 index (N,O,slots,H,W)."""
    shape = (query.shape[0], mask.shape[1], slots, query.shape[2], query.shape[3])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int64)


def register_matching(
    name: str,
    schema: str,
    *,
    resolve: Callable[..., Matching],
    fake: Callable[..., tuple[Tensor, Tensor]],
    reference: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Register the op `name` (query, key, ..., precision) -> (distance, index) in all its implementations.

    `resolve` turns the public arguments into those of the core, `fake` gives the core's empty outputs, and
    `reference` is the core in plain PyTorch, without the precision.
    """
    register_pieces({name: Piece(fake, _backward_by, _setup_context, schema=schema)}, name)
    register_op(name, resolve={name: resolve}, reference={name: without_argument(-1, reference)})


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key = inputs[:2]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, output[1])
    ctx.others = len(inputs) - 2


def _backward_by(suffix: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, key, index = ctx.saved_tensors
        return *matching_backward(suffix, grad, query, key, index), *(None,) * ctx.others

    return backward
