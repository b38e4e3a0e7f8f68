"""Global matching: the nearest embeddings of each object anywhere in the reference frames (FEELVOS, CFBI)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from vosops import _checks
from vosops.ops._matching import (
    Matching,
    empty_matches,
    finish_distance,
    match,
    nearest_mean,
    object_masks,
    register_matching,
    resolved,
)
from vosops.reference.global_matching import global_matching_core

SCHEMA = (
    "(Tensor query, Tensor key, Tensor mask, int neighbors, Tensor? query_mask, str precision)"
    " -> (Tensor distance, Tensor index)"
)


if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        """The options that do not change what is returned."""

        neighbors: int
        bias: Tensor | None
        normalize: bool
        num_objects: int | None
        query_mask: Tensor | None
        precision: str | None


@overload
def global_matching(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    *,
    return_indices: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def global_matching(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    *,
    return_indices: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def global_matching(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    *,
    return_indices: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...
def global_matching(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    *,
    neighbors: int = 1,
    bias: Tensor | None = None,
    normalize: bool = True,
    num_objects: int | None = None,
    query_mask: Tensor | None = None,
    return_indices: bool = False,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the squared L2 distance from each query pixel to the nearest pixels of each object in reference frames.

    Args:
        query: (N,C,H,W) embeddings of the current frame; float32, float16, bfloat16, on the CPU also float64.
        key: (N,C,T,H2,W2) embeddings of T reference frames, or (N,C,H2,W2) of one, of the same dtype; or a
            sequence of frames (N,C,H2,W2), which are copied into one tensor.
        mask: the objects in `key`. bool or floating (> 0.5) (N,O,[T,]H2,W2), which may overlap; or an integer label
            map (N,[T,]H2,W2), where label v is object v, including 0, and 255 is ignored. A sequence if `key` is one.
        neighbors: k; return the mean of the k nearest distances, or of all if there are fewer.
        bias: (O,) added to the distance of each object (CFBI); may be learned.
        normalize: return tanh((d + bias) / 2), which equals FEELVOS' 1 - 2 / (1 + exp(d)); an object without a
            pixel gives exactly 1. Without it the raw distance is returned, +inf for an absent object.
        num_objects: number of objects O; needed with a label map.
        query_mask: bool (N,H,W); other query pixels are skipped and get the absent value.
        return_indices: also return the flat indices t * H2 * W2 + y * W2 + x (int64), -1 for none.
        precision: of float32 products, with the names of torch.set_float32_matmul_precision: "highest", "high" or
            "medium"; None uses PyTorch's setting. It has an effect on Intel processors with AMX and on GPUs. "ieee",
            "tf32x3" and "tf32" name the arithmetic of a GPU: "highest" is "ieee" there, the others are "tf32". See
            Concepts, "Precision of float32". The returned distances are always recomputed in float32 from the
            differences to the chosen pixels.

    Returns:
        (N,O,H,W) float32 (float64 for float64 input). With `return_indices` a pair with the indices:
        (N,O,H,W), or (N,O,k,H,W) nearest first where neighbors > 1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        NotImplementedError: under forward-mode differentiation.

    Differentiable to any order in query, key and bias, and deterministic. Time O(N C HW M) for the M reference
    pixels that belong to an object, memory O(N C M) for their packed copy: no distance matrix. On a tie the
    first pixel wins. A query pixel with a NaN gives NaN; a NaN in `key` never wins.

    Source: Voigtlaender et al., FEELVOS, CVPR 2019, section 3.3; several reference frames and bias: Yang et
    al., CFBI, ECCV 2020. FEELVOS' own k-nearest mode gives 0 for an absent object; here it is 1.

        >>> import torch, vosops
        >>> first, current = torch.rand(2, 1, 100, 30, 54)
        >>> labels = torch.randint(0, 3, (1, 30, 54))
        >>> vosops.global_matching(current, first, labels, num_objects=3).shape
        torch.Size([1, 3, 30, 54])
    """
    _checks.refuse_forward_mode("global_matching")
    distance, index, _ = nearest_pixels(
        query,
        key,
        mask,
        neighbors=neighbors,
        bias=bias,
        num_objects=num_objects,
        query_mask=query_mask,
        precision=precision,
    )
    nearest = nearest_mean(distance, index) if neighbors > 1 else distance.squeeze(2)
    nearest = finish_distance(nearest, bias, normalize)
    return (nearest, index if neighbors > 1 else index.squeeze(2)) if return_indices else nearest


def nearest_pixels(
    query: Tensor, key: Tensor | Sequence[Tensor], mask: Tensor | Sequence[Tensor], **options: Any
) -> tuple[Tensor, Tensor, int]:
    """Return the raw distances and indices (N,O,k,H,W) of the nearest pixels, and how many pixels `key` has.

    Arguments as those of `global_matching`, of which bias is only checked.
    """
    arguments = _resolve(query, key, mask, **options)
    distance, index = match("global_matching", arguments)
    return distance, index, math.prod(arguments.core[1].shape[2:])


def _resolve(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    *,
    neighbors: int = 1,
    bias: Tensor | None = None,
    normalize: bool = True,
    num_objects: int | None = None,
    query_mask: Tensor | None = None,
    return_indices: bool = False,
    precision: str | None = None,
) -> Matching:
    """Check the public arguments and turn them into those of the core."""
    key, mask = _stack_frames(key, mask)
    query, key = _checks.promote_under_autocast(query, key)
    _checks.check_embeddings(query, key, ("N", "C", "T", "H2", "W2"))
    _checks.check_tensor("key", key, (query.shape[0], query.shape[1], "T", "H2", "W2"))
    masks = object_masks(mask, num_objects, key)
    neighbors = _checks.check_positive_int("neighbors", neighbors)
    _checks.check_bias(bias, masks.shape[1], query)
    _checks.check_query_mask(query_mask, query)
    precision = _checks.resolve_precision(precision, query)
    return resolved(query, key, masks, neighbors, query_mask, precision)


def _stack_frames(key: Tensor | Sequence[Tensor], mask: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One key (N,C,T,H,W) and its mask from a single frame (a view), or from a sequence (a copy)."""
    if isinstance(key, Tensor):
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor where key is one, got {type(mask).__name__}")
        return (key.unsqueeze(2), mask.unsqueeze(-3)) if key.dim() == 4 else (key, mask)
    if not isinstance(key, Sequence):
        raise TypeError(f"key must be a tensor or a sequence of frames, got {type(key).__name__}")
    if not isinstance(mask, Sequence) or len(mask) != len(key) or len(key) == 0:
        came = f"{len(mask)} for {len(key)}" if isinstance(mask, Sequence) else type(mask).__name__
        raise ValueError(
            f"mask must be a sequence with one mask for each of the frames in key, at least one, got {came}"
        )
    for name, frames in (("key", key), ("mask", mask)):
        for i, frame in enumerate(frames):
            if not isinstance(frame, Tensor):
                raise TypeError(f"{name}[{i}] must be a tensor, got {type(frame).__name__}")
            if frame.shape != frames[0].shape:
                raise ValueError(
                    f"{name}[{i}] must have the shape of {name}[0] {tuple(frames[0].shape)}, got {tuple(frame.shape)}"
                )
            _checks.check_same_device(f"{name}[{i}]", frame, f"{name}[0]", frames[0])
    return torch.stack(tuple(key), 2), torch.stack(tuple(mask), -3)


def _fake(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    neighbors: int,
    query_mask: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return empty_matches(query, mask, neighbors)


register_matching("global_matching", SCHEMA, resolve=_resolve, fake=_fake, reference=global_matching_core)
