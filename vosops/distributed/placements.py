"""DTensors as arguments: what of them is this rank's, and the results as DTensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

_OF_THE_MEMORY = ("memory_key", "memory_value", "shrinkage", "bias", "valid")


def local_arguments(
    tensors: Mapping[str, Any],
) -> tuple[dict[str, Any], dist.ProcessGroup | None, Callable[[Any, bool], Any] | None]:
    """Return this rank's tensors, the group of the DTensors' mesh, and a function that turns results into DTensors.

    Without a DTensor among them the arguments are returned as they are, with None twice.
    """
    # There is no DTensor before its module is imported, which takes two seconds.
    if not dist.is_available() or "torch.distributed.tensor" not in sys.modules:
        return dict(tensors), None, None
    from torch.distributed.tensor import DTensor, Replicate, Shard

    given = {name: value for name, value in tensors.items() if isinstance(value, DTensor)}
    if not given:
        return dict(tensors), None, None
    plain = [name for name, v in tensors.items() if v is not None and name not in given]
    if plain:
        raise TypeError(
            f"{plain[0]} must be a DTensor where {next(iter(given))} is one, got {type(tensors[plain[0]]).__name__}"
        )
    if "query_key" not in given or "memory_key" not in given:
        raise TypeError("query_key and memory_key must both be DTensors, got one")
    mesh = given["query_key"].device_mesh
    trailing = given["memory_key"].dim() - 2
    local: dict[str, Tensor | None] = dict.fromkeys(tensors)
    for name, value in given.items():
        if value.device_mesh != mesh or mesh.ndim != 1:
            raise ValueError(
                f"{name} must be on the mesh of query_key, which has one dimension, got {value.device_mesh}"
            )
        wanted = Shard(value.dim() - trailing) if name in _OF_THE_MEMORY else Replicate()
        if tuple(value.placements) != (wanted,):
            raise ValueError(f"{name} must be placed as {wanted}, got {value.placements}")
        local[name] = value.to_local(grad_placements=[wanted])

    def wrap(result: Any, has_usage: bool) -> Any:
        results = result if isinstance(result, tuple) else (result,)
        placements = [Shard(1) if has_usage and i == 1 else Replicate() for i in range(len(results))]
        wrapped = [
            _usage_of(each, given["memory_key"])
            if isinstance(placement, Shard)
            else DTensor.from_local(each, mesh, [placement], run_check=False)
            for each, placement in zip(results, placements, strict=True)
        ]
        return wrapped[0] if len(wrapped) == 1 else tuple(wrapped)

    return local, mesh.get_group(), wrap


def _usage_of(usage: Tensor, memory_key: Any) -> Any:
    """Return a part's usage (N,*M) as a DTensor that is sharded as the keys are."""
    from torch.distributed.tensor import DTensor, Shard

    shape = (usage.shape[0], *memory_key.shape[2:])
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return DTensor.from_local(
        usage.contiguous(),
        memory_key.device_mesh,
        [Shard(1)],
        run_check=False,
        shape=memory_key.new_empty(0).shape.__class__(shape),
        stride=tuple(strides),
    )
