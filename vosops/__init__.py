"""vosops: fused, memory-efficient, differentiable operators for video object segmentation."""

from typing import TYPE_CHECKING, Any

from vosops.backends import explain, list_ops, use_backend
from vosops.ops import (
    MemoryWeights,
    conv_lstm,
    global_conv,
    global_conv_prepare,
    global_matching,
    local_attention,
    local_matching,
    memory_gather,
    memory_read,
    memory_select,
    merge_reads,
    soft_aggregate,
)

if TYPE_CHECKING:
    from vosops.inference import segment

__version__ = "0.1.0"
__all__ = [
    "MemoryWeights",
    "conv_lstm",
    "explain",
    "global_conv",
    "global_conv_prepare",
    "global_matching",
    "list_ops",
    "local_attention",
    "local_matching",
    "memory_gather",
    "memory_read",
    "memory_select",
    "merge_reads",
    "segment",
    "soft_aggregate",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Import `segment` on first use: it needs optional packages that the ops do not."""
    if name == "segment":
        from vosops.inference import segment

        return segment
    raise AttributeError(f"module 'vosops' has no attribute {name!r}")
