"""Triton's interpreter without the work that it repeats at every call of a function."""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy


def hasten() -> None:
    """Do once what the interpreter repeats: for each launch, dtype and shape.

    The interpreter replaces some 150 functions of `triton.language` before a launch and restores them afterwards. It
    also replaces them, again, at each call of a function by a kernel: a third of the time of these tests. Another
    third were its checks of integers for overflow and the descriptions of shapes. The kernels compute the same, and
    overflow is still an error (tests/triton/test_interpreter.py). Versions of Triton whose interpreter is built
    otherwise stay as they are.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    semantic = type(getattr(interpreter, "interpreter_semantic", None))
    replaced = ("binary_op_sanitize_overflow_impl", "broadcast_impl_value")
    if not hasattr(interpreter, "_LangPatchScope") or not all(hasattr(semantic, name) for name in replaced):
        return
    prepare = interpreter._patch_lang
    prepared: set[int] = set()  # the modules of this launch
    scopes: list[Any] = []
    nothing = types.SimpleNamespace(restore=lambda: None)

    def restore() -> None:
        while scopes:
            scopes.pop().restore()
        prepared.clear()

    @functools.cache
    def modules_of(function: Any) -> set[int]:
        return {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}

    def prepare_once(function: Any) -> Any:
        modules = modules_of(function)
        if modules and modules <= prepared:
            return nothing
        first = not prepared
        scopes.append(prepare(function))
        prepared.update(modules)
        return types.SimpleNamespace(restore=restore) if first else nothing

    interpreter._patch_lang = prepare_once

    look_up = functools.cache(interpreter._get_np_dtype)

    def dtype_of(of: Any) -> Any:
        if isinstance(of, tl.block_type):
            of = of.element_ty
        return uint64 if isinstance(of, tl.pointer_type) else look_up(of)

    uint64 = interpreter._get_np_dtype(tl.pointer_type(tl.float32))
    interpreter._get_np_dtype = dtype_of
    _check_overflow_at_once(semantic)
    _remember_shapes(tl, semantic)


def _check_overflow_at_once(semantic: Any) -> None:
    """Compute a sum or product of integers once more in 64 bits by NumPy, not by a dozen of Triton's operations."""
    exactly = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}

    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        dtype = lhs.type.scalar
        if dtype.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        assert dtype == rhs.type.scalar, f"expected matching operand types, got {dtype} and {rhs.type.scalar}"
        name = operation.__name__
        exact = exactly[name](lhs.handle.data, rhs.handle.data, dtype=numpy.int64)
        fits = exact.min() >= dtype.get_int_min_value() and exact.max() <= dtype.get_int_max_value()
        assert fits, f"int{dtype.int_bitwidth} overflow detected for operation {name}"

    semantic.binary_op_sanitize_overflow_impl = check


def _remember_shapes(tl: Any, semantic: Any) -> None:
    """Make what a type or tensor says of its shape once for each shape; blocks of one shape need no broadcasting."""
    wanted = {"handle", "shape", "numel", "type", "dtype"}
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    broadcast = semantic.broadcast_impl_value
    types_made: dict[Any, dict[str, Any]] = {}
    tensors_made: dict[Any, tuple[Any, Any]] = {}
    shapes: dict[tuple[Any, ...], Any] = {}
    sizes_of: dict[int, tuple[Any, ...]] = {}  # of each of these shapes, by its identity

    def sizes(shape: Any) -> tuple[Any, ...]:
        known = sizes_of.get(id(shape))
        if known is not None:
            return known
        values = getattr(shape, "values", shape)
        return tuple([value.value if isinstance(value, tl.constexpr) else value for value in values])

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not tl.dtype:  # pointers are told apart by more than their names
            make_type(self, element_ty, shape)
            return
        key = element_ty.name, sizes(shape)
        made = types_made.get(key)
        if made is None:
            make_type(self, element_ty, shape)
            self.shape = shapes.setdefault(key[1], self.shape)
            sizes_of[id(self.shape)] = key[1]
            made = types_made[key] = dict(vars(self))
        vars(self).update(made)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = sizes(type.shape) if type.is_block() else ()
        made = tensors_made.get(key)
        if made is None:
            make_tensor(self, handle, type)
            if set(vars(self)) == wanted:
                tensors_made[key] = self.shape, self.numel
            return
        self.shape, self.numel = made
        self.handle, self.type, self.dtype = handle, type, type.scalar

    def broadcast_blocks(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor
    semantic.broadcast_impl_value = broadcast_blocks
