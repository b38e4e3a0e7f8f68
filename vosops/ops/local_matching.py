"""Local matching: the nearest embedding of each object within a window of another frame (FEELVOS, CFBI)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, overload

from torch import Tensor

from vosops import _checks
from vosops.ops._matching import (
    Matching,
    empty_matches,
    finish_distance,
    match,
    object_masks,
    register_matching,
    resolved,
)
from vosops.reference.local_matching import local_matching_core

SCHEMA = (
    "(Tensor query, Tensor key, Tensor mask, int[] radius, int dilation, Tensor? query_mask, str precision)"
    " -> (Tensor distance, Tensor index)"
)


if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        """The options that do not change what is returned."""

        radius: int | Sequence[int]
        dilation: int
        bias: Tensor | None
        normalize: bool
        num_objects: int | None
        query_mask: Tensor | None
        precision: str | None


@overload
def local_matching(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    *,
    return_indices: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def local_matching(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    *,
    return_indices: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def local_matching(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    *,
    return_indices: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...
def local_matching(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    *,
    radius: int | Sequence[int] = 15,
    dilation: int = 1,
    bias: Tensor | None = None,
    normalize: bool = True,
    num_objects: int | None = None,
    query_mask: Tensor | None = None,
    return_indices: bool = False,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the least squared L2 distance from each query pixel to the pixels of each object in a window of `key`.

    For pixel p of `query` and object o, the minimum of |query[p] - key[p + offset]|^2 over the offsets in x
    and y that are multiples of `dilation` up to `radius` and lead to a pixel of o inside the image.

    Args:
        query: (N,C,H,W) embeddings of the current frame; float32, float16, bfloat16, on the CPU also float64.
        key: (N,C,H,W) embeddings of the other (usually the previous) frame, of the same dtype.
        mask: the objects in `key`. bool or floating (> 0.5) (N,O,H,W), which may overlap; or an integer label map
            (N,H,W), where label v is object v, including 0, and 255 is ignored.
        radius: half side of the square window, in pixels of the feature map; or ascending nested radii, which share
            one pass.
        dilation: distance between the pixels of the window, in pixels.
        bias: (O,) added to the raw distance of each object (CFBI); may be learned.
        normalize: return tanh((d + bias) / 2), which equals FEELVOS' 1 - 2 / (1 + exp(d)); an object without a
            pixel in the window gives exactly 1. Without it the raw distance is returned, +inf for none.
        num_objects: number of objects O; needed with a label map.
        query_mask: bool (N,H,W); other query pixels are skipped and get the absent value.
        return_indices: also return the flat index y * W + x (int64) of the nearest pixel, -1 for none.
        precision: of float32 products, with the names of torch.set_float32_matmul_precision: "highest", "high" or
            "medium"; None uses PyTorch's setting. It has an effect on Intel processors with AMX and on GPUs. "ieee",
            "tf32x3" and "tf32" name the arithmetic of a GPU: "highest" is "ieee" there, the others are "tf32". See
            Concepts, "Precision of float32". The returned distance is always recomputed in float32 from the
            differences to the chosen pixel.

    Returns:
        (N,O,H,W) float32 (float64 for float64 input); with a sequence of R radii (N,O,R,H,W), never increasing
        with the radius. With `return_indices` a pair with the indices in the same shape.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        NotImplementedError: under forward-mode differentiation.

    Differentiable to any order in query, key and bias, deterministic, and of constant memory in the window:
    O(N C H W) beyond the output, while the time is O(N C H W (2 radius / dilation + 1)^2). On a tie the first
    pixel in row order wins. A query pixel with a NaN gives NaN; a NaN in `key` never wins.

    Source: Voigtlaender et al., FEELVOS, CVPR 2019, section 3.4; nested radii and bias: Yang et al., CFBI,
    ECCV 2020.

        >>> import torch, vosops
        >>> previous, current = torch.rand(2, 1, 100, 30, 54)
        >>> labels = torch.randint(0, 3, (1, 30, 54))
        >>> vosops.local_matching(current, previous, labels, radius=7, num_objects=3).shape
        torch.Size([1, 3, 30, 54])
    """
    _checks.refuse_forward_mode("local_matching")
    arguments = _resolve(
        query,
        key,
        mask,
        radius=radius,
        dilation=dilation,
        bias=bias,
        num_objects=num_objects,
        query_mask=query_mask,
        precision=precision,
    )
    distance, index = match("local_matching", arguments)
    if isinstance(radius, int):
        distance, index = distance.squeeze(2), index.squeeze(2)
    distance = finish_distance(distance, bias, normalize)
    return (distance, index) if return_indices else distance


def _resolve(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    *,
    radius: int | Sequence[int] = 15,
    dilation: int = 1,
    bias: Tensor | None = None,
    normalize: bool = True,
    num_objects: int | None = None,
    query_mask: Tensor | None = None,
    return_indices: bool = False,
    precision: str | None = None,
) -> Matching:
    """Check the public arguments and turn them into those of the core."""
    query, key = _checks.promote_under_autocast(query, key)
    _checks.check_embeddings(query, key, ("N", "C", "H", "W"))
    _checks.check_tensor("key", key, tuple(query.shape))
    radii = _radii(radius)
    dilation = _checks.check_positive_int("dilation", dilation)
    masks = object_masks(mask, num_objects, key)
    _checks.check_bias(bias, masks.shape[1], query)
    _checks.check_query_mask(query_mask, query)
    precision = _checks.resolve_precision(precision, query)
    return resolved(query, key, masks, radii, dilation, query_mask, precision)


def _radii(radius: int | Sequence[int]) -> list[int]:
    radii = list(radius) if isinstance(radius, Sequence) else [radius]
    radii = [_checks.check_positive_int("radius", r, least=0) for r in radii]
    if not radii or any(a >= b for a, b in itertools.pairwise(radii)):
        raise ValueError(f"radius must be an int or an ascending sequence of ints, got {radius!r}")
    return radii


def _fake(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    radius: Sequence[int],
    dilation: int,
    query_mask: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return empty_matches(query, mask, len(radius))


register_matching("local_matching", SCHEMA, resolve=_resolve, fake=_fake, reference=local_matching_core)
