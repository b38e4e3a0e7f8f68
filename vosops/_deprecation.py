"""Names that changed: they work for one more release, with a DeprecationWarning."""

from __future__ import annotations

import warnings

__all__ = ["warn"]


def warn(old: str, new: str) -> None:
    """Tell whoever asks a module for an old name what to write in its place; call it in ``__getattr__``."""
    warnings.warn(f"{old} is deprecated, use {new}", DeprecationWarning, stacklevel=3)
