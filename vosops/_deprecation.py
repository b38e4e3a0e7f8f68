"""Names that changed: they work for one more release, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

__all__ = ["moved", "warn"]


def warn(old: str, new: str) -> None:
    """Warn about an old name of a module, and name its replacement; call it in ``__getattr__``."""
    warnings.warn(f"{old} is deprecated, use {new}", DeprecationWarning, stacklevel=3)


def moved(old: str, new: str, modules: Iterable[str]) -> None:
    """Let ``modules`` of the package ``old``, now in ``new``, be imported from there as before."""
    for name in modules:
        module = _Moved(f"{old}.{name}", f"{new}.{name}")
        sys.modules[module.__name__] = module
        setattr(sys.modules[old], name, module)


class _Moved(ModuleType):
    """A module under its old name: has the public names of the module under its new one."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Deprecated name of :mod:`{new}`.")
        self._new = new

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):  # what looks at every module of a process does not ask for a public name
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value: object = getattr(import_module(self._new), name)
        warn(f"{self.__name__}.{name}", f"{self._new}.{name}")
        return value
