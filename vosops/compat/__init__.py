"""Drop-ins under the names of other packages, with their arguments and results."""

from __future__ import annotations

import importlib
import sys

__all__ = ["NAMES", "install"]

NAMES = ("spatial_correlation_sampler",)
"""The packages that have a drop-in, a module of this one each."""


def install(*names: str, replace: bool = False) -> None:
    """Put drop-ins into `sys.modules`, so that unmodified programs import them in place of the originals.

    Args:
        names: of packages among `NAMES`; all of them if none is given.
        replace: also where the original was imported already. Programs that took names from it keep those.

    Raises:
        ValueError: a name has no drop-in.
        RuntimeError: the original was imported already, and `replace` is false.

    An original that is installed but not yet imported is hidden, not changed. Repeated calls do nothing.

        >>> import vosops.compat
        >>> vosops.compat.install("spatial_correlation_sampler")
        >>> from spatial_correlation_sampler import SpatialCorrelationSampler
        >>> SpatialCorrelationSampler.__module__
        'vosops.compat.spatial_correlation_sampler'
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"names must be among {', '.join(NAMES)}, got {name!r}")
    chosen = names or NAMES
    drop_ins = {name: importlib.import_module(f"{__name__}.{name}") for name in chosen}
    for name, module in drop_ins.items():
        if sys.modules.get(name, module) is not module and not replace:
            raise RuntimeError(
                f"{name} must not be imported before vosops.compat.install(), got the one of "
                f"{getattr(sys.modules[name], '__file__', None)}; replace=True replaces it"
            )
    sys.modules.update(drop_ins)
