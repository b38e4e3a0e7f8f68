"""The operators: one room each, with its public function and its registered pieces."""

from vosops.ops.conv_lstm import conv_lstm
from vosops.ops.global_conv import global_conv, global_conv_prepare
from vosops.ops.global_matching import global_matching
from vosops.ops.local_attention import local_attention
from vosops.ops.local_correlation import local_correlation
from vosops.ops.local_matching import local_matching
from vosops.ops.memory_read import MemoryWeights, memory_gather, memory_read, memory_select, merge_reads
from vosops.ops.soft_aggregate import soft_aggregate

__all__ = [
    "MemoryWeights",
    "conv_lstm",
    "global_conv",
    "global_conv_prepare",
    "global_matching",
    "local_attention",
    "local_correlation",
    "local_matching",
    "memory_gather",
    "memory_read",
    "memory_select",
    "merge_reads",
    "soft_aggregate",
]
