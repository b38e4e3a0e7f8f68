"""The operators: one room each, with its public function and its registered pieces."""

from vosops.ops.global_matching import global_matching
from vosops.ops.local_matching import local_matching

__all__ = ["global_matching", "local_matching"]
