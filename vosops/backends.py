"""Which implementation serves a call, why, and how to choose.

Every op has up to three implementations: "cpp" (the compiled C++ or CUDA C++ library), "triton" and "reference"
(plain PyTorch). For each call the first one that can run serves it, in the op's order for the class of the tensors'
device ("cpu", "cuda"). `use_backend` (or the environment variable VOSOPS_BACKEND) forces one; `explain` reports which
one would serve a call and why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from vosops import _verdicts

BACKENDS = ("cpp", "triton", "reference")


class Call(NamedTuple):
    """What decides who can serve a call: where its kernels compute, and in which dtype.

    `refusals` are pairs (backend, reason) that the op adds for these arguments. `plain` is the reason why only plain
    PyTorch computes this call, whichever backend is forced; None: any may. `precision` is the core's, where it has one;
    `backward`: gradients will be asked for.
    """

    device: torch.device
    dtype: torch.dtype
    refusals: tuple[tuple[str, str], ...] = ()
    plain: str | None = None
    precision: str | None = None
    backward: bool = False


class CannotRunError(RuntimeError):
    """No implementation that may serve a call can."""


class Resolved(Protocol):
    """Checked arguments of a public function."""

    @property
    def call(self) -> Call:
        """What the choice among implementations depends on."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op: its kernels by name, and the general reasons why it cannot take a call.

    All implementations of an op have kernels of the same names, arguments and results.
    """

    name: str
    kernels: Mapping[str, Callable[..., Any]]
    reasons_not: Callable[[Call], tuple[str, ...]]

    def run(self, kernel: str, *args: Any) -> Any:
        """Call a kernel."""
        return self.kernels[kernel](*args)

    def refuses(self, call: Call) -> tuple[str, ...]:
        """All reasons why it cannot take this call; none if it can."""
        reasons = self.reasons_not(call)
        if call.refusals:
            reasons += tuple(reason for name, reason in call.refusals if name == self.name)
        if call.plain is not None and self.name != "reference":
            reasons += (call.plain,)
        return reasons


@dataclass(frozen=True)
class Order:
    """The order in which implementations are tried, best first, and the benchmark result that it comes from.

    `measured` is the result's path in the repository; None: nothing was measured, the order is an expectation.
    """

    names: tuple[str, ...]
    measured: str | None

    def __str__(self) -> str:
        return self.measured or "not measured yet"


UNMEASURED = Order(BACKENDS, None)


@dataclass(frozen=True)
class Op:
    """An op: how its public functions resolve their arguments, its implementations by name, and their order.

    `resolve`: public function -> what checks its arguments and says what the choice depends on. The function itself
    calls it too, so that `explain` judges what `choose` judges. `orders`: type of device ("cpu", "cuda") -> order.
    """

    name: str
    resolve: Mapping[str, Callable[..., Resolved]]
    implementations: Mapping[str, Implementation]
    orders: Mapping[str, Order]

    def order(self, call: Call) -> Order:
        """Return the order for the device that the call computes on: `vosops check --tune`'s, else its class's."""
        expected = self.orders.get(call.device.type, UNMEASURED)
        tuned = _verdicts.order(call.device, self.name, call.dtype, call.precision, call.backward)
        if not tuned:
            return expected
        names = tuple(tuned.split(","))
        names += tuple(name for name in expected.names if name not in names)
        return Order(names, _verdicts.source(str(call.device)))

    def found_bad(self, implementation: str, call: Call) -> str:
        """Return why `vosops check` rules an implementation out on this device, "" if it does not."""
        if implementation == "reference":
            return ""
        return _verdicts.refusal(
            call.device, self.name, implementation, call.dtype, call.precision, call.backward
        )

    def ordered(self, call: Call) -> list[Implementation]:
        """Return the implementations, those first that are to be preferred for this call."""
        return [self.implementations[name] for name in self.order(call).names if name in self.implementations]


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
    """Return the names of all ops that have several implementations."""
    return sorted(_ops)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one implementation within a `with` block: "cpp", "triton", "reference", or None for the choice.

    A call that the forced implementation does not support raises RuntimeError with the reasons. The choice applies to
    all threads. Features without a kernel (the prior of `memory_read`) always use plain PyTorch.

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
    """Return the implementation that `use_backend` or VOSOPS_BACKEND asks for; None: the choice is open."""
    return _forced


def choose(name: str, call: Call) -> Implementation:
    """Return the implementation of op `name` that serves this call."""
    op = _ops[name]
    forced = _forced if call.plain is None else None
    refusals: list[str] = []
    for backend in op.order(call).names:
        implementation = op.implementations.get(backend)
        if implementation is None or (forced is not None and backend != forced):
            continue
        reasons = implementation.refuses(call)
        if not reasons and forced is None:
            found = op.found_bad(backend, call)
            reasons = (found,) if found else ()
        if not reasons:
            return implementation
        refusals.append(f"{backend}: {'; '.join(reasons)}")
    asked = f"backend {forced!r}" if forced is not None else "any backend"
    raise CannotRunError(f"{name} cannot run on {asked}. {' | '.join(refusals) or 'It has no such backend.'}")


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return which implementation would serve `op(*args, **kwargs)`, and why not the ones before it.

    >>> import torch, vosops
    >>> frame, mask = torch.rand(1, 8, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    >>> print(vosops.explain(vosops.local_matching, frame, frame, mask, radius=2))  # doctest: +SKIP
    local_matching: cpp (order on cpu: benchmarks/results/local_matching_cpu.json)
      cpp        serves this call
      triton     not preferred; Triton compiles for GPUs, the tensors are on cpu
      reference  not preferred
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", op)
    entries = {function: entry for entry in _ops.values() for function in entry.resolve}
    if name not in entries:
        raise ValueError(f"op must be one of {', '.join(sorted(entries))}, got {name!r}")
    entry = entries[name]
    call = entry.resolve[name](*args, **kwargs).call
    forced = _forced if call.plain is None else None
    chosen: str | None = None
    lines = []
    for implementation in entry.ordered(call):
        reasons = implementation.refuses(call)
        found = entry.found_bad(implementation.name, call)
        if found and forced is None:
            reasons += (found,)
        notes = []
        if forced is not None and implementation.name != forced:
            notes.append(f"backend {forced!r} is forced")
        elif chosen is not None:
            notes.append("not preferred")
        elif not reasons:
            chosen = implementation.name
            notes.append("serves this call")
        lines.append(f"  {implementation.name:<10} {'; '.join([*notes, *reasons])}")
    order = f"order on {call.device.type}: {entry.order(call)}"
    if call.precision is not None and call.dtype == torch.float32:
        order += f"; precision of float32 products: {call.precision}"
    header = f"{name}: {chosen or 'nothing can serve this call'} ({order})"
    return "\n".join([header, *lines])
