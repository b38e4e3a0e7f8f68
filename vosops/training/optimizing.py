"""The optimizer of a configuration, and its learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vosops.io.errors import InputError
from vosops.training.config import Optimizer, Schedule

__all__ = ["create_average", "create_optimizer", "rate_factor", "set_rates"]


def create_optimizer(
    network: nn.Module, settings: Optimizer, precision: str = "float32"
) -> torch.optim.Optimizer:
    """Create the optimizer of a network's parameters that require gradients.

    Parameters of one dimension, biases and those of norms, do not decay. Each group has its own `base_rate`.
    precision: of the run. But for float16, whose scaled gradients could not be clipped then, a step is PyTorch's fused
    one, which reads and writes everything once.

    Raises:
        InputError: Nothing is to be trained, or a pattern of `factors` matches nothing.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    unused = set(settings.factors)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        pattern = next((p for p in settings.factors if fnmatchcase(name, p)), None)
        unused.discard(pattern or "")
        factor = 1.0 if pattern is None else settings.factors[pattern]
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((settings.rate * factor, decay), []).append(parameter)
    if not groups:
        raise InputError("freeze must leave at least one parameter to train, got none")
    if unused:
        raise InputError(f"optimizer.factors must match a trained parameter, got {sorted(unused)[0]!r}")
    parameters = [
        {"params": own, "lr": rate, "base_rate": rate, "weight_decay": decay}
        for (rate, decay), own in groups.items()
    ]
    fused = precision != "float16"
    if settings.kind == "sgd":
        return torch.optim.SGD(parameters, settings.rate, momentum=settings.momentum, fused=fused)
    kind = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
    return kind(parameters, settings.rate, betas=settings.betas, fused=fused)


def rate_factor(step: int, steps: int, schedule: Schedule) -> float:
    """Return what the learning rate is multiplied by at a step of all.

    >>> from vosops.training.config import Schedule
    >>> [round(rate_factor(step, 10, Schedule(kind="cosine", warm_up=2)), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    if step < schedule.warm_up:
        return (step + 1) / schedule.warm_up
    done = (step - schedule.warm_up) / max(1, steps - schedule.warm_up)
    left: dict[str, float] = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "poly": (1 - done) ** schedule.power,
    }
    return schedule.least + (1 - schedule.least) * left[schedule.kind]


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set the learning rate of every group to its base times a factor; return the largest."""
    rates: list[float] = [group["base_rate"] * factor for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return max(rates)


def create_average(network: nn.Module, decay: float) -> AveragedModel:
    """Create an exponential moving average of parameters and buffers, which begins with its first update.

    Update n keeps the share (1 + n) / (10 + n), at most `decay`: with 0.998 from the first step on, 37 % of the average
    after 500 steps would be the weights before training. Source: TensorFlow's ExponentialMovingAverage.
    """

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        count = float(updates)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averaged, current, updates)

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)
