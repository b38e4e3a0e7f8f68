"""A memory over several devices: exact reads and matching over the ranks of a `torch.distributed` group."""

from vosops.distributed.bank import ShardedMemoryBank
from vosops.distributed.exchange import Exchange, RankError, Traffic, count_traffic
from vosops.distributed.read import global_matching, memory_read

__all__ = [
    "Exchange",
    "RankError",
    "ShardedMemoryBank",
    "Traffic",
    "count_traffic",
    "global_matching",
    "memory_read",
]
