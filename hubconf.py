"""Entry points for ``torch.hub``: ``torch.hub.load("CHECKOUT", "stm", source="local", weights="STM.pth")``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vosops import models as _models  # torch.hub.list shows every callable whose name has no underscore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

dependencies = ["torch"]


def _entry_point(name: str) -> Callable[..., Any]:
    def create(weights: str | Path | None = None, **options: Any) -> Any:
        return _models.create_model(name, weights, **options)

    create.__name__ = name
    create.__doc__ = f"{_models.find_model(name).summary}. Options: see vosops.models.create_model."
    return create


globals().update({name: _entry_point(name) for name in _models.list_models()})
