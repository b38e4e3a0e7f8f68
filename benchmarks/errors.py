"""How far each op is from float64 at each precision of float32 products, beside plain PyTorch in float32.

    python benchmarks/errors.py             writes benchmarks/results/errors_cpu.json; then make_tables.py

Reads and gradients: root mean square of the error, relative to that of the result. Searches: share of the queries whose
nearest pixel, or set of the k best positions, is another one than in float64, and the error of the distance. Inputs are
normally distributed unless the case says more, the same on every machine. What is compared with is the reference's
result in float64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import vosops
from vosops import reference
from vosops.benchmarking import machine

FILE = Path(__file__).parent / "results" / "errors_cpu.json"
PLAIN = "PyTorch float32"
PRECISIONS = ("highest", "high", "medium")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = (PLAIN, *PRECISIONS, *HALF)
KEYS, VALUES, QUERIES = 128, 512, (18, 30)
"""Channels of keys and values as in STM, and the query's pixels."""

EMBEDDINGS, FRAME, WINDOW = 100, (60, 107), 12

Errors = dict[str, float]
Inputs = Sequence[Tensor]


@dataclass(frozen=True)
class Row:
    """An error of a case, by column."""

    case: str
    error: str
    errors: Errors


def normal(*shape: int, seed: int) -> Tensor:
    """Return random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact result, where that is finite."""
    there = exact.isfinite()
    error, size = (found.double() - exact)[there], exact[there]
    return float(error.square().mean().sqrt() / size.square().mean().sqrt())


def over_columns(
    inputs: Inputs, plain: Callable[..., Tensor], ours: Callable[..., Tensor], measure: Callable[..., float]
) -> Errors:
    """Return the error of every column: `ours` takes a precision; half precision starts from rounded inputs."""
    exact = plain(*(x.double() for x in inputs))
    errors = {PLAIN: measure(plain(*inputs), exact)}
    for precision in PRECISIONS:
        errors[precision] = measure(ours(*inputs, precision=precision), exact)
    for name, dtype in HALF.items():
        rounded = [x.to(dtype) for x in inputs]
        exact = plain(*(x.double() for x in rounded))
        errors[name] = measure(ours(*rounded, precision="highest"), exact)
    return errors


def reads() -> list[Row]:
    """memory_read: output and gradients, ordinary and large logits."""
    rows = []
    for frames, scale, what in ((5, 1.0, ""), (20, 1.0, ""), (5, 4.0, ", keys and queries 4 times as large")):
        query, key = (
            normal(1, KEYS, *QUERIES, seed=0) * scale,
            normal(1, KEYS, frames, *QUERIES, seed=1) * scale,
        )
        value = normal(1, 1, VALUES, frames, *QUERIES, seed=2)
        errors = over_columns((query, key, value), reference.memory_read, vosops.memory_read, relative)
        rows.append(Row(f"`memory_read`, {frames} frames{what}", "output", errors))
    query, key = normal(1, KEYS, *QUERIES, seed=0), normal(1, KEYS, 3, *QUERIES, seed=1)
    value, weight = normal(1, 1, VALUES, 3, *QUERIES, seed=2), normal(1, 1, VALUES, *QUERIES, seed=3)
    for i, name in enumerate(("query", "key", "value")):
        errors = over_columns(
            (query, key, value),
            partial(gradient, reference.memory_read, weight, i),
            partial(gradient, vosops.memory_read, weight, i),
            relative,
        )
        rows.append(Row("`memory_read`, 3 frames", f"gradient of the {name}", errors))
    return rows


def gradient(
    read: Callable[..., Tensor], weight: Tensor, which: int, *inputs: Tensor, **options: str
) -> Tensor:
    """Return a gradient of a read."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = read(*leaves, **options)
    return torch.autograd.grad(out, leaves[which], weight.to(out.dtype))[0]


def selections() -> list[Row]:
    """memory_select: are the k best the same?"""
    query, key = normal(1, 64, *QUERIES, seed=0), normal(1, 64, 20, *QUERIES, seed=1)
    top_k = 30

    def plain(query: Tensor, key: Tensor) -> Tensor:
        scores = key.flatten(2).transpose(1, 2) @ query.flatten(2)
        return scores.topk(top_k, 1).indices.sort(1).values

    def ours(query: Tensor, key: Tensor, precision: str) -> Tensor:
        selected = vosops.memory_select(query, key, top_k, precision=precision)
        return selected.indices.long().flatten(2).sort(1).values

    errors = over_columns((query, key), plain, ours, share_of_other_sets)
    return [Row(f"`memory_select`, 20 frames, top {top_k}", "share of queries with another set", errors)]


def share_of_other_sets(found: Tensor, exact: Tensor) -> float:
    """Share of the columns that differ anywhere."""
    return float((found != exact).any(1).double().mean())


def matchings() -> list[Row]:
    """Both matchings: which pixel, and its distance."""
    query, key = normal(1, EMBEDDINGS, *FRAME, seed=0), normal(1, EMBEDDINGS, *FRAME, seed=1)
    mask = torch.ones(1, 1, *FRAME, dtype=torch.bool)
    ops = {
        f"`local_matching`, radius {WINDOW}": partial(local, radius=WINDOW),
        "`global_matching`": everywhere,
    }
    rows = []
    for case, call in ops.items():
        for i, (error, measure) in enumerate(
            (("distance", relative), ("share of queries with another pixel", share_of_others))
        ):
            plain, ours = (partial(nth, call, of, mask, i) for of in (reference, vosops))
            rows.append(Row(case, error, over_columns((query, key), plain, ours, measure)))
    return rows


def nth(
    call: Callable[..., tuple[Tensor, Tensor]],
    of: object,
    mask: Tensor,
    i: int,
    *inputs: Tensor,
    **options: str,
) -> Tensor:
    """Return the distances (0) or the indices (1) of a matching."""
    return call(of, *inputs, mask, **options)[i]


def local(
    of: object, query: Tensor, key: Tensor, mask: Tensor, radius: int, **options: str
) -> tuple[Tensor, Tensor]:
    """Nearest in a window."""
    result: tuple[Tensor, Tensor] = of.local_matching(  # type: ignore[attr-defined]
        query, key, mask, radius=radius, normalize=False, return_indices=True, **options
    )
    return result


def everywhere(of: object, query: Tensor, key: Tensor, mask: Tensor, **options: str) -> tuple[Tensor, Tensor]:
    """Nearest in a frame."""
    result: tuple[Tensor, Tensor] = of.global_matching(  # type: ignore[attr-defined]
        query, key.unsqueeze(2), mask.unsqueeze(2), normalize=False, return_indices=True, **options
    )
    return result


def share_of_others(found: Tensor, exact: Tensor) -> float:
    """Share of the entries that differ."""
    return float((found != exact).double().mean())


def main() -> None:
    """Measure everything and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=FILE)
    arguments = parser.parse_args()
    with torch.random.fork_rng():
        rows = [*reads(), *selections(), *matchings()]
    for row in rows:
        print(f"{row.case}, {row.error}:", {name: f"{error:.2g}" for name, error in row.errors.items()})
    report = {"machine": machine(), "columns": COLUMNS, "rows": [row.__dict__ for row in rows]}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
