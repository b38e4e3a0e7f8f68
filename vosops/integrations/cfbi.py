"""CFBI and CFBI+: the distances of `networks/layers/matching.py` by vosops' matchings, in place.

The replacements have the originals' arguments, layouts and channel order, and no matrix of distances. Written from the
definition of the matching (Yang et al., CFBI, ECCV 2020).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vosops.integrations.recipes import Function, Probe, Recipe, random_tensors
from vosops.ops import global_matching, local_matching

_LOCAL_SIZE, _OBJECTS, _CHANNELS = (6, 7), 3, 4
"""Of the problems on which the replacements are compared with the originals."""


def _maps(*maps: Tensor) -> list[Tensor]:
    """(1,C,H,W) of each (H,W,C)."""
    return [each.permute(2, 0, 1)[None] for each in maps]


def _bias(dis_bias: Any, like: Tensor, objects: int) -> Tensor:
    return torch.as_tensor(dis_bias, dtype=torch.float32, device=like.device).flatten().expand(objects)


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return functional.interpolate(maps, size, mode="bilinear", align_corners=True)


def _local(original: Function) -> Function:
    def replacement(
        prev_frame_embedding: Tensor,
        query_embedding: Tensor,
        prev_frame_labels: Tensor,
        dis_bias: Any = 0.0,
        multi_local_distance: Sequence[int] = (15,),
        ori_size: Sequence[int] | None = None,
        atrous_rate: int = 1,
        use_float16: bool = True,
        allow_downsample: bool = True,
        allow_parallel: bool = True,
    ) -> Tensor:
        """Match (H,W,C), (H,W,C), (H,W,n) -> (1,H,W,n,windows), the largest window first."""
        key, query, labels = _maps(prev_frame_embedding, query_embedding, prev_frame_labels)
        size = ori_size or prev_frame_embedding.shape[:2]
        if use_float16:
            query, key = query.half(), key.half()
        if allow_downsample:
            half = (query.shape[2] // 2 + 1, query.shape[3] // 2 + 1)
            query, key = _resize(query, half), _resize(key, half)
        if labels.shape[2:] != query.shape[2:]:
            labels = functional.interpolate(labels, query.shape[2:], mode="nearest")
        distance = local_matching(
            query,
            key,
            labels > 0.9,
            radius=tuple(multi_local_distance),
            dilation=atrous_rate,
            bias=_bias(dis_bias, query, labels.shape[1]),
        )
        distance = torch.cat([distance[:, :, -1:], distance[:, :, :-1]], 2)[0]
        return _resize(distance, size).permute(2, 3, 0, 1)[None]

    return replacement


def _problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two embeddings, labels of one object a pixel or none, and biases of the objects."""
    height, width = _LOCAL_SIZE
    shape = (height, width, _CHANNELS)
    key, query, which, bias = random_tensors(shape, shape, (height, width), (_OBJECTS, 1, 1, 1))
    labels = functional.one_hot((which * (_OBJECTS + 1)).long(), _OBJECTS + 1)[..., :_OBJECTS].float()
    return key, query, labels, bias


def _local_probes(original: Function) -> Iterator[Probe]:
    *tensors, bias = _problem()
    for atrous, downsample in ((1, True), (1, False), (2, False)):
        options = {
            "dis_bias": bias,
            "multi_local_distance": [2, 4],
            "atrous_rate": atrous,
            "use_float16": False,
            "allow_downsample": downsample,
        }
        yield tuple(tensors), options


def _for_eval(original: Function) -> Function:
    def replacement(
        all_reference_embeddings: Sequence[Tensor],
        query_embeddings: Tensor,
        all_reference_labels: Sequence[Tensor],
        n_chunks: int = 20,
        dis_bias: Any = 0.0,
        ori_size: Sequence[int] | None = None,
        atrous_rate: int = 1,
        use_float16: bool = True,
        atrous_obj_pixel_num: int = 0,
    ) -> Tensor:
        """Match lists of (H,W,C) and (H,W,n), (H,W,C) -> (1,H,W,n,1)."""
        masks = []
        for labels in all_reference_labels:
            if atrous_rate > 1:  # of large objects every atrous_rate-th pixel in x and y is a reference
                grid = torch.zeros_like(labels[..., :1])
                grid[::atrous_rate, ::atrous_rate] = 1
                large = labels.sum((0, 1)) > atrous_obj_pixel_num * atrous_rate**2
                labels = torch.where(large, labels * grid, labels)
            masks += _maps((labels >= 0.1) & (labels.sum(2, keepdim=True) > 0.9))
        query, *keys = _maps(query_embeddings, *all_reference_embeddings)
        if use_float16:
            query, keys = query.half(), [key.half() for key in keys]
        distance = global_matching(query, keys, masks, bias=_bias(dis_bias, query, masks[0].shape[1]))
        return _resize(distance, ori_size or distance.shape[2:])[0].permute(1, 2, 0)[None, ..., None]

    return replacement


def _global(original: Function) -> Function:
    matching = _for_eval(original)

    def replacement(
        reference_embeddings: Tensor,
        query_embeddings: Tensor,
        reference_labels: Tensor,
        n_chunks: int = 100,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Match (H,W,C), (H,W,C), (H,W,n) -> (1,H,W,n,1)."""
        return matching(
            [reference_embeddings], query_embeddings, [reference_labels], n_chunks, *args, **kwargs
        )

    return replacement


def _global_probes(original: Function, *, frames: int) -> Iterator[Probe]:
    for atrous in (1, 2):
        key, query, labels, bias = _problem()  # the originals change the labels
        options = {"dis_bias": bias, "atrous_rate": atrous, "use_float16": False}
        if frames == 1:
            yield (key, query, labels, 2), options
        else:
            yield ([key, query * 2], query, [labels, labels.flip(0)], 1), options


REFERENCE = ("reference_embeddings", "query_embeddings", "reference_labels", "n_chunks")
CFBI_RECIPES = (
    Recipe(
        "local_matching",
        ("prev_frame_embedding", "query_embedding", "prev_frame_labels", "dis_bias"),
        _local,
        _local_probes,
    ),
    Recipe("global_matching", REFERENCE, _global, functools.partial(_global_probes, frames=1)),
    Recipe(
        "global_matching_for_eval",
        ("all_reference_embeddings", "query_embeddings", "all_reference_labels", "n_chunks"),
        _for_eval,
        functools.partial(_global_probes, frames=2),
    ),
)
