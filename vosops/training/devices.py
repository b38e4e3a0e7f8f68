"""The device and the processes of a training run, by Lightning Fabric."""

from __future__ import annotations

from os import environ
from typing import Any

import torch

from vosops.io.errors import VosopsError, require
from vosops.training.config import TrainConfig

__all__ = ["create_fabric"]

_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def create_fabric(config: TrainConfig) -> Any:
    """Return Fabric for the device and the processes, which are those that torchrun began, if it did."""
    require("lightning_fabric", "train")
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    cuda = torch.cuda.is_available() if config.device is None else config.device.startswith("cuda")
    if config.precision == "float16" and not cuda:
        raise VosopsError("precision must be float32 or bfloat16 on a CPU, got float16")
    world = int(environ.get("WORLD_SIZE", "1"))
    local = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    strategy: Any = (
        "auto" if world == 1 else DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    )
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=local,
        num_nodes=max(1, world // local),
        strategy=strategy,
        precision=_PRECISIONS[config.precision],  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric
