"""Argument checks shared by every op: each error names the argument, what it must be and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
PRECISIONS = ("highest", "high", "medium", "ieee", "tf32x3", "tf32")
"""Of float32 products: PyTorch's names, and those of the arithmetic of tensor cores."""

GPU_PRECISIONS = ("ieee", "tf32x3", "tf32")
_ON_GPU = {"highest": "ieee", "high": "tf32", "medium": "tf32", "default": "ieee"}
_OF_BACKEND = {"ieee": "highest", "none": "highest", "tf32": "high", "bf16": "medium"}
"""What PyTorch's setting for the CPU's matrix products says -> the name that sets it."""


def check_tensor(name: str, value: object, shape: Sequence[str | int]) -> None:
    """Raise TypeError unless `value` is a tensor, ValueError unless it has the named `shape`.

    An int in `shape` is a required size; a string names a free size.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    sizes = value.shape
    matches = len(sizes) == len(shape)
    for have, want in zip(sizes, shape, strict=False):
        if not isinstance(want, str) and have != want:
            matches = False
    if not matches:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(sizes)}")


def check_floating(name: str, value: Tensor) -> None:
    """Raise TypeError unless `value` has a floating dtype that the ops compute in."""
    if value.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")


def check_same_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """Raise ValueError unless both tensors live on one device."""
    if value.device != reference.device:
        raise ValueError(
            f"{name} must be on the device of {reference_name} ({reference.device}), got {value.device}"
        )


def check_positive_int(name: str, value: object, least: int = 1) -> int:
    """Return `value` as an int of at least `least`; raise TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_number(name: str, value: object) -> float:
    """Return `value` as a float; raise TypeError where it is no number."""
    if isinstance(value, (bool, str, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_embeddings(query: Tensor, key: Tensor, key_shape: Sequence[str | int]) -> None:
    """Check the pair (query, key) of a matching op: floating, one dtype, one device."""
    check_tensor("query", query, ("N", "C", "H", "W"))
    check_tensor("key", key, key_shape)
    for name, value in (("query", query), ("key", key)):
        check_floating(name, value)
    if query.dtype != key.dtype:
        raise TypeError(f"key must have the dtype of query ({query.dtype}), got {key.dtype}")
    check_same_device("key", key, "query", query)
    if query.shape[1] == 0:
        raise ValueError("query and key must have at least one channel, got C = 0")


def check_query_mask(query_mask: Tensor | None, query: Tensor) -> None:
    """Check the optional mask of the query pixels that are wanted: bool (N,H,W)."""
    if query_mask is None:
        return
    check_tensor("query_mask", query_mask, (query.shape[0], query.shape[2], query.shape[3]))
    if query_mask.dtype != torch.bool:
        raise TypeError(f"query_mask must be bool, got {query_mask.dtype}")
    check_same_device("query_mask", query_mask, "query", query)


def check_bias(bias: Tensor | None, num_objects: int, query: Tensor) -> None:
    """Check the optional learnable bias of a matching op: floating (O,)."""
    if bias is None:
        return
    check_tensor("bias", bias, (num_objects,))
    check_floating("bias", bias)
    check_same_device("bias", bias, "query", query)


def resolve_precision(precision: str | None, reference: Tensor) -> str:
    """Return the core's precision of float32 products; None follows PyTorch's own settings.

    On the CPU the name is passed on, and the library that serves knows them all. "default", which only traced code
    gets, is resolved by the library at each run: a traced program follows later changes of the setting.
    """
    if precision is not None and precision not in PRECISIONS:
        names = ", ".join(repr(name) for name in PRECISIONS[:-1])
        raise ValueError(f"precision must be None, {names} or {PRECISIONS[-1]!r}, got {precision!r}")
    if reference.device.type == "cpu":
        if precision is not None:
            return precision
        return "default" if torch.compiler.is_compiling() else float32_precision()
    if precision is None:
        return "tf32" if reference.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return on_gpu(precision)


def float32_precision() -> str:
    """Return "highest", "high" or "medium", as torch.set_float32_matmul_precision left it for the CPU.

    torch.get_float32_matmul_precision raises where the newer settings of single backends were used.
    """
    name: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return _OF_BACKEND.get(name, "highest")


def on_gpu(precision: str) -> str:
    """Return the arithmetic of tensor cores that a name of a precision stands for, as PyTorch chooses it."""
    return _ON_GPU.get(precision, precision)


def wants_gradients(*values: object) -> bool:
    """Return whether autograd follows one of these values, where they are tensors."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def refuse_forward_mode(op: str) -> None:
    """Raise NotImplementedError under forward-mode AD, where a registered op would silently give zero."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{op} has no forward-mode derivative; use reverse mode (torch.autograd.grad), which is "
            "differentiable to any order"
        )


def has_autocast(device_type: str) -> bool:
    """Return whether a type of device has autocast; Dynamo before torch 2.12 cannot ask PyTorch."""
    return device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)


def under_autocast(device_type: str) -> bool:
    """Return whether autocast is on for devices of this type, some of which have none."""
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def promote_under_autocast(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a query and key of two dtypes to float32 where autocast is on; the ops accumulate in float32 anyway."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor)) or query.dtype == key.dtype:
        return query, key
    if not under_autocast(query.device.type):
        return query, key
    return query.float(), key.float()
