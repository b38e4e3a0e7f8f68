"""Contenders and cases of global_matching.

The formulations are reimplementations of code in use: CFBI's chunks of the full distance
matrix, the reference pixels of each object packed first, and exact nearest-neighbour packages. They take one
frame (N = 1).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import vosops
from vosops.benchmarking.cases import Benchmark, Case, Inputs, Variant, matching_work
from vosops.benchmarking.local_matching import FAR, MB, normalise, one_thread

CHUNKS = 20
"""CFBI's chunks of the query, as in its training code."""

QUERY_CHUNK = 512
KEY_CHUNK = 4096


def fused(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Return the op of this package."""
    result = vosops.global_matching(query, key, mask)
    assert isinstance(result, Tensor)
    return result


def fused_by_one_thread(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Return the op of this package on one thread, whatever the setting."""
    with one_thread():
        return fused(query, key, mask, radius)


def pixels(embedding: Tensor) -> Tensor:
    """(1,C,H,W) -> (H * W, C)."""
    return embedding[0].flatten(1).t()


def chunks(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """CFBI's global matching: the distances of a chunk of queries, repeated and masked for every object."""
    labelled = mask[0].any(0).flatten()
    reference, wrong = pixels(key)[labelled], ~mask[0].flatten(1)[:, labelled]
    padding = wrong.to(key.dtype)[None] * FAR
    norms = reference.pow(2).sum(1)
    parts = []
    for part in pixels(query).chunk(CHUNKS):
        distance = part.pow(2).sum(1, keepdim=True) + norms - 2 * part @ reference.t()
        parts.append((distance[:, None] + padding).min(2).values)
    return normalise(torch.cat(parts).t().reshape(mask.shape).float())


def packed(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Return the best PyTorch that we know: each object's reference pixels packed first, then tiles of the products."""
    q, reference = pixels(query).contiguous(), pixels(key)
    nearest = []
    for chosen in mask[0].flatten(1):
        k = reference[chosen]
        norms = k.pow(2).sum(1)
        rows = []
        for part in torch.split(q, QUERY_CHUNK):
            least = part.new_full((part.shape[0],), FAR)
            for keys, norm in zip(torch.split(k, KEY_CHUNK), torch.split(norms, KEY_CHUNK), strict=True):
                least = torch.minimum(least, torch.addmm(norm, part, keys.t(), alpha=-2).amin(1))
            rows.append(least)
        nearest.append(torch.cat(rows))
    return normalise((torch.stack(nearest) + q.pow(2).sum(1)).view(mask.shape).float())


def whole(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """CFBI's matrix in one expression, for torch.compile to fuse."""
    q, reference = pixels(query), pixels(key)
    distance = q.pow(2).sum(1, keepdim=True) + reference.pow(2).sum(1) - 2 * q @ reference.t()
    nearest = torch.stack([torch.where(row, distance, FAR).amin(1) for row in mask[0].flatten(1)])
    return normalise(nearest.view(mask.shape).float())


@functools.cache
def _compiled_whole() -> Any:
    return torch.compile(whole, dynamic=False)


def compiled(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """`whole`, compiled."""
    result: Tensor = _compiled_whole()(query, key, mask, radius)
    return result


def faiss_flat(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """faiss-cpu's exact index, one for each object."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    q, reference = pixels(query.float()).contiguous().numpy(), pixels(key.float())
    nearest = []
    for chosen in mask[0].flatten(1):
        index = faiss.IndexFlatL2(q.shape[1])
        index.add(reference[chosen].numpy())
        distance, _ = index.search(q, 1)
        nearest.append(torch.from_numpy(distance[:, 0]))
    return normalise(torch.stack(nearest).view(mask.shape))


def keops(query: Tensor, key: Tensor, mask: Tensor, radius: int) -> Tensor:
    """KeOps' lazy matrix of distances, reduced row by row."""
    from pykeops.torch import LazyTensor

    q, reference = pixels(query.float()).contiguous(), pixels(key.float())
    nearest = []
    for chosen in mask[0].flatten(1):
        k = reference[chosen].contiguous()
        distance = ((LazyTensor(q[:, None]) - LazyTensor(k[None])) ** 2).sum(-1)
        nearest.append(distance.min(dim=1)[:, 0])
    return normalise(torch.stack(nearest).view(mask.shape))


def flops(inputs: Inputs) -> float:
    """Operations that matter: two per channel for each query and each pixel of an object."""
    _, channels, height, width = inputs.query.shape
    return 2.0 * channels * height * width * float(inputs.mask.sum())


BENCHMARK = Benchmark(
    op="global_matching",
    variants=(
        Variant("vosops", fused),
        Variant("CFBI chunks", chunks),
        Variant("packed per object", packed),
        Variant("torch.compile", compiled, compiles=True),
        Variant("faiss flat", faiss_flat, differentiable=False, package="faiss", gpu=False),
        Variant("KeOps", keops, differentiable=False, package="pykeops"),
        Variant("vosops float32", fused, prepare=Inputs.in_float32, special=True),
        Variant("vosops, one thread", fused_by_one_thread, special=True),
    ),
    cases=(
        Case(
            "480p-half",
            60,
            107,
            objects=3,
            goals={"faiss flat": 1.3, "packed per object": 1.3},
            goal_memory=20 * MB,
            quick=True,
        ),
        Case(
            "480p",
            120,
            214,
            objects=3,
            goals={"faiss flat": 1.2, "packed per object": 1.2},
            goal_memory=40 * MB,
            left_out={
                "torch.compile": "needs 8 GB for the distance matrices",
                "KeOps": "takes a minute a call",
            },
        ),
        Case(
            "training",
            60,
            107,
            objects=3,
            backward=True,
            goals={"CFBI chunks": 5},
        ),
        Case(
            "480p-half-bfloat16",
            60,
            107,
            objects=3,
            dtype=torch.bfloat16,
            only=("vosops float32", "packed per object"),
        ),
        Case(
            "480p-bfloat16",
            120,
            214,
            objects=3,
            dtype=torch.bfloat16,
            only=("vosops float32", "packed per object"),
        ),
        Case(
            "480p-half-two-threads",
            60,
            107,
            objects=3,
            threads=2,
            goals={"vosops, one thread": 1.9},
            only=("vosops, one thread",),
        ),
    ),
    work=matching_work(flops),
)
