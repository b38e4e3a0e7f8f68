"""Every op in plain PyTorch, as people write it today: the tests' oracle and the benchmarks' baseline."""

from vosops.reference.conv_lstm import conv_lstm
from vosops.reference.global_conv import global_conv
from vosops.reference.global_matching import global_matching, global_matching_core
from vosops.reference.local_attention import local_attention
from vosops.reference.local_correlation import local_correlation
from vosops.reference.local_matching import local_matching, local_matching_core
from vosops.reference.memory_read import memory_read
from vosops.reference.soft_aggregate import soft_aggregate

__all__ = [
    "conv_lstm",
    "global_conv",
    "global_matching",
    "global_matching_core",
    "local_attention",
    "local_correlation",
    "local_matching",
    "local_matching_core",
    "memory_read",
    "soft_aggregate",
]
