"""vosops: fused, memory-efficient, differentiable operators for video object segmentation."""

import importlib as _importlib
import sys as _sys
import typing as _typing

if "_vosops_cli" not in _sys.modules:
    # The `vosops` command (see _vosops_cli.py) answers --help and --version without PyTorch; it gets these names,
    # and `torch.ops.vosops`, when it first asks for one.
    from vosops.backends import explain, list_ops, use_backend
    from vosops.ops import (
        MemoryWeights,
        conv_lstm,
        global_conv,
        global_conv_prepare,
        global_matching,
        local_attention,
        local_correlation,
        local_matching,
        memory_gather,
        memory_read,
        memory_select,
        merge_reads,
        soft_aggregate,
    )

if _typing.TYPE_CHECKING:
    from vosops.inference import Session, segment

__version__ = "0.1.0"
__all__ = [
    "MemoryWeights",
    "Session",
    "conv_lstm",
    "explain",
    "global_conv",
    "global_conv_prepare",
    "global_matching",
    "list_ops",
    "local_attention",
    "local_correlation",
    "local_matching",
    "memory_gather",
    "memory_read",
    "memory_select",
    "merge_reads",
    "segment",
    "soft_aggregate",
    "use_backend",
]

_SUBMODULES = (
    "compat",
    "data",
    "distributed",
    "inference",
    "integrations",
    "io",
    "memory",
    "metrics",
    "models",
    "nn",
    "runs",
    "training",
)


def __dir__() -> list[str]:
    """List the public names, those that are imported on first use included."""
    return sorted([*__all__, *_SUBMODULES, "__version__"])


if not _typing.TYPE_CHECKING:  # so that type checkers still report names that do not exist

    def __getattr__(name: str) -> object:
        """Import on first use what `import vosops` does not bring: the submodules, `segment` and `Session`."""
        if name in _SUBMODULES:
            return _importlib.import_module(f"vosops.{name}")
        if name in __all__:
            for module in ("vosops.ops", "vosops.backends", "vosops.inference"):
                value = getattr(_importlib.import_module(module), name, None)
                if value is not None:
                    return value
        raise AttributeError(f"module 'vosops' has no attribute {name!r}")
