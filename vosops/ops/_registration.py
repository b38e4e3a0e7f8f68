"""Registers the pieces of an op with PyTorch: one helper serves the C++ and the Triton schema alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vosops import _library

_TRITON_OPS = torch.library.Library("vosops", "FRAGMENT")  # lives as long as the module
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def register_pieces(
    name: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """Give `vosops::name` its fake kernel, derivative and vmap rule (which folds the new dim into N)."""
    qualified = f"vosops::{name}"
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    register_vmap(name)


def register_vmap(name: str, call: Callable[..., Any] | None = None) -> None:
    """Give `vosops::name` its vmap rule, which folds the new dim into N; then comes `call` (the op)."""
    op = call or getattr(torch.ops.vosops, name)

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = [_fold(arg, dim, size) for arg, dim in zip(args, in_dims, strict=True)]
        outputs = op(*folded)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, -1)), 0
        return tuple(out.unflatten(0, (size, -1)) for out in outputs), (0,) * len(outputs)

    torch.library.register_vmap(f"vosops::{name}", vmap)


def register_looping_vmap(name: str, call: Callable[..., Any] | None = None) -> None:
    """Give `vosops::name` a vmap rule for weights that have no N to fold into: one `call` (the op) after the other."""
    op = call or getattr(torch.ops.vosops, name)

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        calls = []
        for i in range(info.batch_size):
            each = [
                arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)
            ]
            calls.append(op(*each))
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        outputs = tuple(torch.stack(out) for out in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    torch.library.register_vmap(f"vosops::{name}", vmap)


def _fold(arg: Any, dim: Any, size: int) -> Any:
    """Fold a batched tensor's vmap dim into its leading N; repeat one that is not batched; lists entry by entry."""
    if isinstance(arg, list):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(arg)
        return [_fold(each, each_dim, size) for each, each_dim in zip(arg, dims, strict=True)]
    if not isinstance(arg, Tensor):
        return arg
    batched = arg.unsqueeze(0).expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
    return batched.flatten(0, 1)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which products keep their dtypes on devices of this type."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def differentiate(
    formula: Callable[..., Sequence[Tensor | None]],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of `formula(*saved)`, in differentiable PyTorch, for cotangents: of the saved tensors in need.

    Inputs that the formula does not use get none: they are functions of the others.
    """
    differentiable = torch.is_grad_enabled()
    device = next(t for t in saved if t is not None).device.type
    with torch.enable_grad(), without_autocast(device):
        # Views of their own: one saved tensor may be computed from another, which must not count twice.
        values = [None if t is None else t.view_as(t) for t in saved]
        results = zip(formula(*values), cotangents, strict=True)
        pairs = [(f, c) for f, c in results if f is not None and f.requires_grad]
        wanted = [t for t, need in zip(values, needs, strict=True) if need and t is not None]
        if not pairs or not wanted:
            return [None] * len(values)
        first, given = zip(*pairs, strict=True)
        grads = iter(
            torch.autograd.grad(first, wanted, given, allow_unused=True, create_graph=differentiable)
        )
    return [next(grads) if need and t is not None else None for t, need in zip(values, needs, strict=True)]


def define_triton_op(name: str, schema: str, kernel: Callable[..., Any]) -> None:
    """Define `vosops::name_triton` with a Python kernel for GPUs (and for the CPU under the interpreter)."""
    _TRITON_OPS.define(f"{name}_triton{schema}")
    _TRITON_OPS.impl(f"{name}_triton", kernel, "CUDA")
    if TRITON_INTERPRETED:
        _TRITON_OPS.impl(f"{name}_triton", kernel, "CPU")


def has_kernel(name: str, key: str) -> bool:
    """Whether the compiled libraries have a kernel of `vosops::name` for a dispatch key."""
    return hasattr(torch.ops.vosops, name) and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"vosops::{name}", key)
    )


def cpp_reasons_not(tensor: Tensor) -> list[str]:
    """Why the compiled library cannot serve a call on this tensor's device."""
    if tensor.device.type == "cpu":
        return list(_library.CPU_REASONS)
    if tensor.device.type == "cuda":
        reasons = list(_library.CUDA_REASONS)
        if tensor.dtype == torch.float64:
            reasons.append("float64 is computed on the CPU and by the reference only")
        return reasons
    return [f"no compiled kernels for device {tensor.device.type}"]


def triton_reasons_not(tensor: Tensor) -> list[str]:
    """Why the Triton kernels cannot serve a call on this tensor's device."""
    reasons = []
    if tensor.device.type != "cuda" and not TRITON_INTERPRETED:
        reasons.append(f"Triton compiles for GPUs, the tensors are on {tensor.device.type}")
    if tensor.dtype == torch.float64:
        reasons.append("float64 is computed on the CPU and by the reference only")
    if not HAS_TRITON:
        reasons.append("triton is not installed")
    return reasons


def _has_triton() -> bool:
    from torch.utils._triton import has_triton_package

    return bool(has_triton_package())


HAS_TRITON = _has_triton()
HAS_CPP = _library.CPU_CAPABILITY is not None
