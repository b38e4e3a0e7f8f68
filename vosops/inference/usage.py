"""The memory that this process has used, and how it reuses freed memory."""

from __future__ import annotations

import ctypes
import sys

_KIB = 1 << 10
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT_BYTES = 1 << 30


def peak_memory(cuda: bool) -> int:
    """Return the peak in bytes, of the GPU's allocations or of the resident set; 0 if unknown."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIB


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GB of freed memory for this process instead of handing it back.

    A tracker frees and asks for the same buffers in every frame; without this each frame pays about 25,000 page
    faults. It concerns the whole process, so only the commands call it. Nothing happens where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
