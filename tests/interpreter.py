"""Triton's interpreter without the work that it repeats at every call of a function."""

from __future__ import annotations

import functools
import types
from typing import Any


def hasten() -> None:
    """Prepare `triton.language` once a launch, and look each NumPy dtype up once.

    The interpreter replaces some 150 functions of `triton.language` before a launch and restores them afterwards. It
    also replaces them, again, at each call of a function by a kernel: a third of the time of these tests. The kernels
    compute the same. Versions of Triton whose interpreter is built otherwise stay as they are.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    prepare = interpreter._patch_lang
    prepared: set[int] = set()  # the modules of this launch
    scopes: list[Any] = []
    nothing = types.SimpleNamespace(restore=lambda: None)

    def restore() -> None:
        while scopes:
            scopes.pop().restore()
        prepared.clear()

    def prepare_once(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
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
