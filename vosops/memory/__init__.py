"""A memory of past frames that is preallocated, bounded in bytes, optionally quantised or off-loaded."""

from vosops.memory.bank import MemoryBank
from vosops.memory.budget import MemoryBudgetError, parse_bytes
from vosops.memory.frames import StoredFrame
from vosops.memory.settings import MemorySettings

__all__ = ["MemoryBank", "MemoryBudgetError", "MemorySettings", "StoredFrame", "parse_bytes"]
