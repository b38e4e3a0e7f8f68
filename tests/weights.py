"""Weights for the many networks that the tests make, whose random numbers would cost more than what is tested."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import init

from tests.scripts import load_script

DRAWN = 1 << 22
"""How many numbers are drawn of each distribution, 16 MB of them."""

FEW = 1 << 12
"""Tensors of so many numbers are drawn as always."""

KEPT = 1024
"""How many tensors of the golden cases' weights a process remembers: those of some four networks."""


def hasten() -> None:
    """Take large weights of PyTorch's two initialisations from numbers drawn once, from a random place on.

    The place comes from the same generator, so that the weights differ between layers and follow the seed.
    """
    init.kaiming_uniform_ = _hastened(init.kaiming_uniform_, lambda x: x.uniform_(-1, 1), 3**0.5)
    init.kaiming_normal_ = _hastened(init.kaiming_normal_, lambda x: x.normal_(), 1.0)


def _hastened(original: Callable[..., Tensor], draw: Callable[[Tensor], Tensor], bound: float) -> Any:
    @functools.cache
    def drawn() -> Tensor:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return draw(torch.empty(DRAWN))

    @functools.wraps(original)
    def initialise(
        tensor: Tensor,
        a: float = 0,
        mode: str = "fan_in",
        nonlinearity: str = "leaky_relu",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        usual = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
        if not usual or generator is not None or tensor.numel() <= FEW:
            return original(tensor, a, mode, nonlinearity, generator)
        inputs, outputs = init._calculate_fan_in_and_fan_out(tensor)
        scale = (
            bound * init.calculate_gain(nonlinearity, a) / (inputs if mode == "fan_in" else outputs) ** 0.5
        )
        with torch.no_grad():
            for part in tensor.view(-1).split(DRAWN // 2):
                start = int(torch.randint(DRAWN // 2, (), device="cpu"))
                torch.mul(drawn()[start : start + len(part)], scale, out=part)
        return tensor

    return initialise


@functools.cache
def golden_recipe(path: Path) -> ModuleType:
    """The script that makes the golden cases' weights of their names and shapes; it makes recent ones once."""
    script = load_script(path)
    make = functools.lru_cache(KEPT)(script.recipe_array)

    def recipe_array(name: str, shape: Any) -> numpy.ndarray | None:
        array = make(name, tuple(shape))
        return None if array is None else array.copy()

    script.recipe_array = recipe_array
    return script
