"""Which implementation serves a call, why, and how to choose.

Every op has up to three implementations: "cpp" (the compiled C++ or CUDA C++ library), "triton" and "reference"
(plain PyTorch). For each call the first one that can run serves it, in the op's order for the class of the
tensors' device ("cpu", "cuda"). `use_backend` (or the environment variable VOSOPS_BACKEND) forces one; `explain`
says what would serve a call and why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BACKENDS = ("cpp", "triton", "reference")


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op's core: `run(*core_args)`, and the reasons why it cannot take a call."""

    name: str
    run: Callable[..., Any]
    reasons_not: Callable[..., list[str]]


@dataclass(frozen=True)
class Order:
    """The order in which implementations are tried, best first, and the benchmark result that it comes from.

    `measured` is the result's path in the repository; None: nothing was measured, the order is an expectation.
    """

    names: tuple[str, ...] = BACKENDS
    measured: str | None = None

    def __str__(self) -> str:
        return self.measured or "not measured yet"


UNMEASURED = Order()


@dataclass(frozen=True)
class Op:
    """An op: how its public arguments become those of the core, its implementations, and their order.

    The core's first argument is a tensor; the type of its device ("cpu", "cuda") chooses among `orders`.
    """

    name: str
    prepare: Callable[..., tuple[Any, ...]]
    implementations: tuple[Implementation, ...]
    orders: Mapping[str, Order]

    def order(self, core_args: tuple[Any, ...]) -> Order:
        """The order for the class of device that the tensors are on."""
        return self.orders.get(core_args[0].device.type, UNMEASURED)

    def ordered(self, core_args: tuple[Any, ...]) -> list[Implementation]:
        """The implementations, those first that are to be preferred for these core arguments."""
        by_name = {implementation.name: implementation for implementation in self.implementations}
        return [by_name[name] for name in self.order(core_args).names if name in by_name]


_ops: dict[str, Op] = {}


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    return name


_forced = _checked(os.environ.get("VOSOPS_BACKEND") or None)  # a plain global, which torch.compile guards


def register_op(op: Op) -> None:
    """Make an op known to `choose`, `explain` and `list_ops`."""
    _ops[op.name] = op


def orders(op: str) -> Mapping[str, Order]:
    """Device class -> the order of an op's implementations there and the result that it was read off."""
    return _ops[op].orders


def list_ops() -> list[str]:
    """The names of all ops that have implementations to choose from."""
    return sorted(_ops)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one implementation within a `with` block: "cpp", "triton", "reference", or None for the choice.

    A call that the forced implementation cannot take raises RuntimeError with the reasons. The choice holds for
    all threads.

        >>> import torch, vosops
        >>> frame, mask = torch.rand(1, 8, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
        >>> with vosops.use_backend("reference"):
        ...     distance = vosops.local_matching(frame, frame, mask, radius=2)
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The implementation that `use_backend` or VOSOPS_BACKEND asks for; None: the choice is open."""
    return _forced


def choose(name: str, core_args: tuple[Any, ...]) -> Implementation:
    """The implementation of op `name` that serves these core arguments."""
    op = _ops[name]
    forced = _forced
    refusals: list[str] = []
    for implementation in op.ordered(core_args):
        if forced is not None and implementation.name != forced:
            continue
        reasons = implementation.reasons_not(*core_args)
        if not reasons:
            return implementation
        refusals.append(f"{implementation.name}: {'; '.join(reasons)}")
    asked = f"backend {forced!r}" if forced is not None else "any backend"
    raise RuntimeError(f"{name} cannot run on {asked}. {' | '.join(refusals) or 'It has no such backend.'}")


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which implementation would serve `op(*args, **kwargs)`, and why not the ones before it.

    >>> import torch, vosops
    >>> frame, mask = torch.rand(1, 8, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    >>> print(vosops.explain(vosops.local_matching, frame, frame, mask, radius=2))  # doctest: +SKIP
    local_matching: cpp (order on cpu: benchmarks/results/local_matching_cpu.json)
      cpp        serves this call
      triton     not preferred; Triton compiles for GPUs, the tensors are on cpu
      reference  not preferred
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _ops:
        raise ValueError(f"op must be one of {', '.join(list_ops())}, got {name!r}")
    entry = _ops[name]
    core_args = entry.prepare(*args, **kwargs)
    forced = _forced
    chosen: str | None = None
    lines = []
    for implementation in entry.ordered(core_args):
        reasons = implementation.reasons_not(*core_args)
        notes = []
        if forced is not None and implementation.name != forced:
            notes.append(f"backend {forced!r} is forced")
        elif chosen is not None:
            notes.append("not preferred")
        elif not reasons:
            chosen = implementation.name
            notes.append("serves this call")
        lines.append(f"  {implementation.name:<10} {'; '.join(notes + reasons)}")
    order = f"order on {core_args[0].device.type}: {entry.order(core_args)}"
    header = f"{name}: {chosen or 'nothing can serve this call'} ({order})"
    return "\n".join([header, *lines])
