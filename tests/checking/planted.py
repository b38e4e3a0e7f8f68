"""Implementations with a fault, as modules that a check's processes import: see the files beside this one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vosops import backends

FIRST = "forward"


def replace_kernel(op: str, kernel: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let the compiled implementation of an op have another kernel, made of its own."""
    entry = backends._ops[op]
    implementation = entry.implementations["cpp"]
    kernels = {**implementation.kernels, kernel: make(implementation.kernels[kernel])}
    implementations = {**entry.implementations, "cpp": replace(implementation, kernels=kernels)}
    backends.register_op(replace(entry, implementations=implementations))
