"""How much memory this process has used."""

from __future__ import annotations

import sys

_KIB = 1 << 10


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
