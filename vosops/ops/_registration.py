"""Registers an op with PyTorch and with `vosops.backends`: one helper serves the C++ and the Triton library alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vosops import _library, backends
from vosops._checks import PRECISIONS, float32_precision, has_autocast, on_gpu

_OPS = torch.library.Library("vosops", "FRAGMENT")  # lives as long as the module
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CPP = _library.CPU_CAPABILITY is not None
NO_FLOAT64 = ("float64 is computed on the CPU and by the reference only",)
SUFFIXES = ("", "_triton")
"""Of the names of dispatcher ops, by library: the compiled one and Triton's."""


class Piece(NamedTuple):
    """Registration of a dispatcher op with PyTorch.

    `backward` and `vmap` make the derivative and the vmap rule for a library's suffix, whose other ops they may call;
    without `backward` there is no derivative, without `vmap` the new dim is folded into N. `schema` is that of the
    Triton twin (csrc/ops.cpp has the compiled op's), None where there is no twin.
    """

    fake: Callable[..., Any]
    backward: Callable[[str], Callable[..., Any]] | None = None
    setup_context: Callable[..., None] | None = None
    vmap: Callable[[str], Callable[..., Any]] | None = None
    schema: str | None = None


def register_pieces(
    pieces: Mapping[str, Piece], triton_module: str | None = None, suffixes: Sequence[str] = SUFFIXES
) -> None:
    """Register dispatcher ops `vosops::<name><suffix>` in every library that has them.

    Triton's twins are defined here; `triton_module` of vosops.triton has their kernels, under the ops' names.
    """
    for name, piece in pieces.items():
        if piece.schema is not None and triton_module is not None:
            _define_triton(name, piece.schema, triton_module)
    for suffix in suffixes:
        for name, piece in pieces.items():
            if hasattr(torch.ops.vosops, name + suffix):
                _register(name, suffix, piece)


def _register(name: str, suffix: str, piece: Piece) -> None:
    qualified = f"vosops::{name}{suffix}"
    torch.library.register_fake(qualified, piece.fake)
    if piece.backward is not None:
        torch.library.register_autograd(qualified, piece.backward(suffix), setup_context=piece.setup_context)
    vmap = folding_vmap(dispatched(name, suffix)) if piece.vmap is None else piece.vmap(suffix)
    torch.library.register_vmap(qualified, vmap)


def _define_triton(name: str, schema: str, module: str) -> None:
    """Define `vosops::name_triton` with a Python kernel for GPUs (and for the CPU under the interpreter)."""
    arguments = [each.split()[-1] for each in schema[1 : schema.index(")")].split(", ")]
    place = arguments.index("precision") if "precision" in arguments else None

    def kernel(*args: Any) -> Any:
        if place is not None:  # on the CPU, in the interpreter, PyTorch's names come this far
            args = (*args[:place], on_gpu(args[place]), *args[place + 1 :])
        return getattr(import_module(f"vosops.triton.{module}"), name)(*args)

    define(f"{name}_triton", schema, kernel, "CUDA", *(["CPU"] if TRITON_INTERPRETED else []))


def define(name: str, schema: str, kernel: Callable[..., Any], *keys: str) -> None:
    """Define `vosops::name` with one Python kernel for these dispatch keys."""
    _OPS.define(f"{name}{schema}")
    for key in keys:
        _OPS.impl(name, kernel, key)


# What the compiled CPU library asks where the precision is "default": the place of the name in PRECISIONS.
define(
    "float32_precision",
    "() -> int",
    lambda: PRECISIONS.index(float32_precision()),
    "CompositeExplicitAutograd",
)


def dispatched(name: str, suffix: str) -> Callable[..., Any]:
    """Return the dispatcher op of a library."""
    op: Callable[..., Any] = getattr(torch.ops.vosops, name + suffix)
    return op


def register_op(
    name: str,
    *,
    resolve: Mapping[str, Callable[..., backends.Resolved]],
    reference: Mapping[str, Callable[..., Any]],
    kernels: Callable[[str], Mapping[str, Callable[..., Any]]] | None = None,
    needs: Sequence[str] = (),
    orders: Mapping[str, backends.Order] | None = None,
) -> None:
    """List the three implementations of an op in `vosops.backends`.

    Args:
        name: of the op.
        resolve: see `backends.Op`.
        reference: its kernels in plain PyTorch, which autocast does not reach.
        kernels: makes those of the same names for a library's suffix; None: they are the dispatcher ops of `needs`.
        needs: dispatcher ops without which a library cannot serve the op; by default those of the kernels' names.
        orders: of preference by type of device; None: compiled, Triton, reference, measured on the CPU by the op's
            own benchmark.
    """
    needs = needs or list(reference)
    lacking = {device: _lacking(name, needs, device.upper()) for device in ("cpu", "cuda")}

    def compiled_reasons_not(call: backends.Call) -> tuple[str, ...]:
        return cpp_reasons_not(call) or lacking[call.device.type]

    def of_library(suffix: str) -> Mapping[str, Callable[..., Any]]:
        if not all(hasattr(torch.ops.vosops, need + suffix) for need in needs):
            return {}  # the reasons not to run it are never empty
        return kernels(suffix) if kernels else {each: dispatched(each, suffix) for each in needs}

    plain = {each: _without_autocast(core) for each, core in reference.items()}
    implementations = (
        backends.Implementation("cpp", of_library(""), compiled_reasons_not),
        backends.Implementation("triton", of_library("_triton"), triton_reasons_not),
        backends.Implementation("reference", plain, lambda _: ()),
    )
    measured = f"benchmarks/results/{name}_cpu.json"
    backends.register_op(
        backends.Op(
            name=name,
            resolve=resolve,
            implementations={each.name: each for each in implementations},
            orders=orders
            or {"cpu": backends.Order(backends.BACKENDS, measured), "cuda": backends.UNMEASURED},
        )
    )


def without_argument(position: int, core: Callable[..., Any]) -> Callable[..., Any]:
    """`core` as a kernel that gets one argument more, at `position`: the precision, which plain PyTorch has not."""

    def kernel(*args: Any) -> Any:
        kept = list(args)
        del kept[position]
        return core(*kept)

    return kernel


def _without_autocast(core: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        with without_autocast(args[0].device.type):
            return core(*args)

    return kernel


def _lacking(name: str, needs: Sequence[str], key: str) -> tuple[str, ...]:
    """Why the compiled library of a device cannot serve an op although it was loaded."""
    if all(has_kernel(need, key) for need in needs):
        return ()
    return (f"the compiled library has no {name} for {key}",)


def folding_vmap(op: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Return a vmap rule that folds the new dim into N and calls `op` once."""

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = [_fold(arg, dim, size) for arg, dim in zip(args, in_dims, strict=True)]
        outputs = op(*folded)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, -1)), 0
        return tuple(out.unflatten(0, (size, -1)) for out in outputs), (0,) * len(outputs)

    return vmap


def looping_vmap(op: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Return a vmap rule for weights that have no N to fold into: one call of `op` after the other."""

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

    return vmap


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
    """Return a context in which products keep their dtypes on devices of this type."""
    if not has_autocast(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def differentiate(
    formula: Callable[..., Sequence[Tensor | None]],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the gradients of `formula(*saved)` for cotangents, in differentiable PyTorch, where they are needed.

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


def setup_saving_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save an op's tensors for `derivative_of`, and its other arguments as `ctx.options`."""
    ctx.options = [value for value in inputs if not isinstance(value, Tensor) and value is not None]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor) or value is None))


def derivative_of(formula: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """Return the derivative of an op by that of `formula`, the same in differentiable PyTorch.

    The op's tensors come in order, `tensors` of them before its other options; the rest after those.
    """

    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        options, needs = ctx.options, ctx.needs_input_grad
        grads = differentiate(
            lambda *saved: formula(*saved[:tensors], *options, *saved[tensors:]),
            ctx.saved_tensors,
            (*needs[:tensors], *needs[tensors + len(options) :]),
            cotangents,
        )
        return *grads[:tensors], *(None for _ in options), *grads[tensors:]

    return backward


def has_kernel(name: str, key: str) -> bool:
    """Whether the compiled libraries have a kernel of `vosops::name` for a dispatch key."""
    return hasattr(torch.ops.vosops, name) and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"vosops::{name}", key)
    )


def cpp_reasons_not(call: backends.Call) -> tuple[str, ...]:
    """Why the compiled library cannot serve a call of any op."""
    device = call.device.type
    if device == "cpu":
        return _library.CPU_REASONS
    if device == "cuda":
        return _library.CUDA_REASONS + (NO_FLOAT64 if call.dtype == torch.float64 else ())
    return (f"no compiled kernels for device {device}",)


def triton_reasons_not(call: backends.Call) -> tuple[str, ...]:
    """Why the Triton kernels cannot serve a call of any op."""
    reasons: tuple[str, ...] = ()
    if call.device.type not in (("cuda", "cpu") if TRITON_INTERPRETED else ("cuda",)):
        reasons += (f"Triton compiles for GPUs, the tensors are on {call.device.type}",)
    if call.dtype == torch.float64:
        reasons += NO_FLOAT64
    if not HAS_TRITON:
        reasons += ("triton is not installed",)
    return reasons


def _has_triton() -> bool:
    from torch.utils._triton import has_triton_package

    return bool(has_triton_package())


HAS_TRITON = _has_triton()
