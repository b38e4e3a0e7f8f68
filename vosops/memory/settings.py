"""Settings of a memory bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vosops import _checks
from vosops.memory.budget import parse_bytes

POLICIES = ("every", "window", "long_term")
STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
_NOT_OF_THE_STATE = ("budget", "host_budget")  # a state may be loaded into a bank with other budgets


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """Settings of a `MemoryBank`, with the names used by XMem and Cutie.

    policy:
        "every": keeps all frames (STM, STCN), with a budget the latest ones.
        "window": keeps permanent frames and the latest max_mem_frames - 1 others (Cutie).
        "long_term": keeps the latest frames unchanged, older ones condensed to prototypes (XMem; Cutie's
        use_long_term).
    mem_every: `MemoryBank.due` is true this many frames after the last added frame.
    max_mem_frames: of "window"; includes the first frame, as in Cutie.
    max_mid_term_frames, min_mid_term_frames: of "long_term". When this many frames have accumulated, all but the
        permanent ones and the last min_mid_term_frames - 1 are condensed. The first frame counts as one of them.
    num_prototypes: number of positions with the highest usage (weight in reads, divided by the number of
        reads since the position was stored) that are kept when frames are condensed; their values are
        averages over these frames, weighted by similarity.
    max_long_term_elements: maximum number of prototypes; the least used ones are evicted first.
    buffer_tokens: number of additional prototypes evicted each time (Cutie).
    evict_ties: all prototypes of equal usage are evicted together (XMem); False: exactly as many as needed (Cutie).
    enable_long_term_count_usage: whether the usage of prototypes is counted; otherwise the oldest are
        evicted first.
    top_k: of the reads; None: softmax over everything.
    similarity, scale: of `vosops.memory_read`.
    budget: bytes, or a text such as "2GB", the maximum that the bank allocates on its device; None: as
        much as the policy needs. On the CPU all of it is reserved at the first `add`; pages cost nothing
        before they are used.
    host_budget: bytes for frames that no longer fit, in pinned host memory (plain if there is no GPU), with
        "every" and "window"; None: such frames are dropped.
    dtype: of the stored values, float32, float16, bfloat16 or int8 (with a scale for each position and object).
    key_dtype: of stored keys and selections; None: as dtype, float16 for int8.
    """

    policy: str = "every"
    mem_every: int = 5
    max_mem_frames: int = 5
    max_mid_term_frames: int = 10
    min_mid_term_frames: int = 5
    num_prototypes: int = 128
    max_long_term_elements: int = 10000
    buffer_tokens: int = 0
    evict_ties: bool = True
    enable_long_term_count_usage: bool = True
    top_k: int | None = None
    similarity: str = "l2"
    scale: float | None = None
    budget: int | str | None = None
    host_budget: int | str | None = None
    dtype: torch.dtype = torch.float32
    key_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.similarity not in ("dot", "l2"):
            raise ValueError(f"similarity must be 'dot' or 'l2', got {self.similarity!r}")
        for name in ("mem_every", "max_mem_frames", "num_prototypes", "max_long_term_elements"):
            _checks.check_positive_int(name, getattr(self, name))
        _checks.check_positive_int("min_mid_term_frames", self.min_mid_term_frames)
        _checks.check_positive_int("max_mid_term_frames", self.max_mid_term_frames, 2)
        _checks.check_positive_int("buffer_tokens", self.buffer_tokens, 0)
        if self.top_k is not None:
            _checks.check_positive_int("top_k", self.top_k)
        if self.min_mid_term_frames >= self.max_mid_term_frames:
            raise ValueError(
                f"min_mid_term_frames must be less than max_mid_term_frames ({self.max_mid_term_frames}), "
                f"got {self.min_mid_term_frames}"
            )
        if self.num_prototypes > self.max_long_term_elements:
            raise ValueError(
                f"num_prototypes must be at most max_long_term_elements ({self.max_long_term_elements}), "
                f"got {self.num_prototypes}"
            )
        if self.dtype not in STORAGE_DTYPES:
            raise TypeError(f"dtype must be float32, float16, bfloat16 or int8, got {self.dtype}")
        if self.key_dtype not in (None, *STORAGE_DTYPES[:3]):
            raise TypeError(f"key_dtype must be float32, float16 or bfloat16, got {self.key_dtype}")
        if self.policy == "long_term" and self.host_budget is not None:
            raise ValueError("host_budget must be None with policy 'long_term', which condenses old frames")
        for name in ("budget", "host_budget"):
            if getattr(self, name) is not None:
                parse_bytes(getattr(self, name))

    @property
    def stored_key_dtype(self) -> torch.dtype:
        """The dtype of stored keys."""
        if self.key_dtype is not None:
            return self.key_dtype
        return torch.float16 if self.dtype == torch.int8 else self.dtype

    @property
    def budget_bytes(self) -> int | None:
        """The budget as a number."""
        return None if self.budget is None else parse_bytes(self.budget)

    @property
    def host_budget_bytes(self) -> int | None:
        """The host budget as a number."""
        return None if self.host_budget is None else parse_bytes(self.host_budget)

    @property
    def most_frames(self) -> int | None:
        """How many frames beside the permanent ones are kept; None: no limit."""
        limits = {"every": None, "window": self.max_mem_frames - 1, "long_term": self.max_mid_term_frames - 1}
        return limits[self.policy]

    @classmethod
    def xmem(cls, config: Mapping[str, Any] | None = None, **options: Any) -> MemorySettings:
        """Return XMem's settings from its configuration, where a name that is missing has XMem's default.

        Without `enable_long_term` every frame is kept. options: this class' own fields, such as budget.
        """
        config = dict(config or {})
        names = (
            "mem_every",
            "max_mid_term_frames",
            "min_mid_term_frames",
            "num_prototypes",
            "max_long_term_elements",
            "enable_long_term_count_usage",
            "top_k",
        )
        taken = {name: config[name] for name in names if name in config}
        policy = "long_term" if config.get("enable_long_term", True) else "every"
        return cls(**{"policy": policy, "top_k": 30, **taken, **options})

    @classmethod
    def cutie(cls, config: Mapping[str, Any] | None = None, **options: Any) -> MemorySettings:
        """Return Cutie's settings from its configuration (`eval_config.yaml`), with defaults for missing names.

        With `use_long_term` the names under `long_term` count. options: this class' own fields, such as budget.
        """
        config = dict(config or {})
        long_term = dict(config.get("long_term", {}))
        names = {
            "max_mem_frames": "max_mid_term_frames",
            "min_mem_frames": "min_mid_term_frames",
            "num_prototypes": "num_prototypes",
            "max_num_tokens": "max_long_term_elements",
            "buffer_tokens": "buffer_tokens",
            "count_usage": "enable_long_term_count_usage",
        }
        taken = {ours: long_term[theirs] for theirs, ours in names.items() if theirs in long_term}
        taken |= {name: config[name] for name in ("mem_every", "max_mem_frames", "top_k") if name in config}
        policy = "long_term" if config.get("use_long_term", False) else "window"
        defaults = {"policy": policy, "top_k": 30, "buffer_tokens": 2000, "evict_ties": False}
        return cls(**{**defaults, **taken, **options})

    def state_dict(self) -> dict[str, Any]:
        """Return what a saved bank must agree with, as numbers and texts."""
        fields = {name: value for name, value in asdict(self).items() if name not in _NOT_OF_THE_STATE}
        return {name: str(v) if isinstance(v, torch.dtype) else v for name, v in fields.items()}
