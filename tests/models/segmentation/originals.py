"""What the segmentation networks are held against: outputs of the originals, and the names of their parameters.

Cases and lists lie in the folder that VOSOPS_TEST_DATA names; where one is absent, what reads it skips.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import SHARED, golden_recipe
from vosops.models import create_model, find_model, load_weights

Case = dict[str, Any]

CPU_FACTOR = 10
"""How many times the original's own float32 error another CPU algorithm may differ by."""


def case(file: str, name: str) -> Case:
    """A case of golden/nets, or a skip."""
    path = SHARED / "golden/nets" / file
    if not path.exists():
        pytest.skip(f"golden case {path} is not here (set VOSOPS_TEST_DATA)")
    return torch.load(path, weights_only=True, mmap=True)["cases"][name]


def empty(model: str, **options: Any) -> nn.Module:
    """A model of the registry in eval mode, whose parameters have shapes alone."""
    with torch.device("meta"):
        return find_model(model).load()(**options).eval()


def with_weights_of(golden: Case, network: nn.Module) -> nn.Module:
    """The network with the weights that the case was made with."""
    network = network.to_empty(device="cpu") if next(network.parameters()).is_meta else network
    network.load_state_dict(weights_of(golden, network))
    return network


def weights_of(golden: Case, network: nn.Module) -> dict[str, Tensor]:
    """The weights that the case was made with, for a network with the original's names: its state_dict."""
    recipe_array = golden_recipe().recipe_array
    names = {name for name, _ in network.named_parameters()}
    weights = {}
    for name, own in network.state_dict().items():
        array = recipe_array(name, own.shape)
        x = torch.zeros(own.shape, dtype=own.dtype) if array is None else torch.from_numpy(array)
        if name in names and x.ndim == 1 and name.endswith(".weight"):
            x *= golden["gamma_scale"]
        if name in names and x.ndim > 1 and "kernel_scale" in golden:
            x *= golden["kernel_scale"]
        if name in golden.get("overrides", {}):
            x = torch.full_like(x, golden["overrides"][name])
        weights[name] = x
    return weights


def assert_equals(golden: Case, key: str, found: Tensor, *, quantile: float | None = None) -> None:
    """The tensor is the original's, within its rounding; of all but a share of the values, if a quantile is given."""
    tolerance = CPU_FACTOR * golden[f"err64/{key}"]
    assert list(found.shape) == list(golden[f"shape/{key}"])
    channels, rows, columns = _steps(golden[f"slice/{key}"])
    difference = (found.double()[:, ::channels, ::rows, ::columns] - golden[key].double()).abs()
    worst = difference.max() if quantile is None else difference.flatten().quantile(quantile)
    assert worst <= tolerance, f"{key}: {float(worst):.3g} > {tolerance:.3g}"
    means = (found.double().mean((2, 3)) - golden[f"chmean/{key}"].double()).abs().max()
    assert means <= tolerance, f"means of {key}: {float(means):.3g} > {tolerance:.3g}"


def _steps(stored: Any) -> tuple[int, int, int]:
    steps = [int(x) for x in (stored.tolist() if isinstance(stored, Tensor) else stored)]
    return (1, 1, 1) if len(steps) == 1 else (steps[0], steps[1], steps[2])


def assert_parameters(network: nn.Module, count: int, file: str) -> None:
    """The network has so many parameters, and the names and shapes of a list in params/; without it, a skip."""
    assert sum(x.numel() for x in network.parameters()) == count
    path = SHARED / "params" / file
    if not path.exists():
        pytest.skip(f"{path} is not here (set VOSOPS_TEST_DATA): names and shapes were not compared")
    lines = (line.split("\t") for line in path.read_text().splitlines() if line)
    listed = {name: ast.literal_eval(shape) for name, shape, _ in lines}
    assert {name: tuple(x.shape) for name, x in network.state_dict().items()} == listed


def assert_checkpoint_loads(
    path: Path, model: str, stored: Callable[[dict[str, Tensor]], Any], **options: Any
):
    """A checkpoint with the original's names, wrapped as its code stores them, gives the model those weights."""
    weights = {
        name: torch.full(x.shape, n % 89 / 89).to(x.dtype)
        for n, (name, x) in enumerate(empty(model, **options).state_dict().items())
    }
    torch.save(stored(weights), path)
    network = create_model(model, path, **options)
    assert not network.training
    for name, x in network.state_dict().items():
        assert torch.equal(x, weights[name]), name


def assert_gradients(network: nn.Module, outputs: Sequence[Tensor], unused: tuple[str, ...]) -> None:
    """Gradients of the outputs reach every parameter but those whose names begin as `unused` say."""
    sum(x.square().mean() for x in outputs).backward()
    for name, parameter in network.named_parameters():
        if name.startswith(unused):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def assert_trains(network: nn.Module, size: tuple[int, int], unused: tuple[str, ...] = ()) -> None:
    """Gradients reach every parameter but those whose names begin as `unused` say, from all that training returns."""
    found = network.train()(torch.rand(2, 3, *size))
    outputs = found if isinstance(found, (list, tuple)) else [found]
    assert all(x.shape == (2, network.num_classes, *size) for x in outputs)
    assert_gradients(network, outputs, unused)


def assert_sees_its_input(network: nn.Module, size: tuple[int, int]) -> None:
    """Each image of a batch gives its own logits, whatever it comes with, and another image gives others."""
    images = torch.rand(2, 3, *size) * torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    with torch.no_grad():
        both = network.eval()(images)
        alone = network(images[1:])
    assert both.shape == (2, network.num_classes, *size)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
    assert (both[0] - both[1]).abs().max() > 1e-3 * both.abs().max()


def assert_sizes(network: nn.Module, wrong: tuple[int, int], *messages: str) -> None:
    """A size that the original does not take is refused with the nearest ones; `predict` takes it all the same."""
    with pytest.raises(ValueError, match="images must have sides of") as error:
        network(torch.rand(1, 3, *wrong))
    for message in messages:
        assert message in str(error.value)
    if not next(network.parameters()).is_meta:
        assert network.predict(torch.rand(3, *wrong)).shape == wrong


def with_auxiliary_heads(network: nn.Module) -> nn.Module:
    """The network in training mode with batch norms and dropouts in eval mode, as the originals' heads were run."""
    for module in network.train().modules():
        if isinstance(module, nn.BatchNorm2d | nn.modules.dropout._DropoutNd):
            module.eval()
    return network


def assert_loads(network: nn.Module, path: Path, *, layout: Callable[[dict[str, Tensor]], Any]) -> None:
    """A file of the network's tensors, laid out as the original's, loads; one with a wrong name or shape says which."""
    names = {name: x.shape for name, x in network.state_dict().items()}
    counter = torch.ones((), dtype=torch.int64)
    stored = {
        name: counter
        if name.endswith("num_batches_tracked")
        else torch.full((), 0.5).expand(shape)  # a small file
        for name, shape in names.items()
    }
    torch.save(layout(dict(stored)), path)
    network.to_empty(device="cpu")
    load_weights(network, path)
    assert all((x == (1 if x.ndim == 0 else 0.5)).all() for x in network.state_dict().values())
    first, *_, last = names
    torch.save(layout({**stored, last + "s": stored[last], first: torch.ones(7)}), path)
    with pytest.raises(ValueError) as error:
        load_weights(network, path)
    assert f"1 unexpected ({last}s)" in str(error.value)
    assert f"1 misshapen ({first} is (7,) and must be {tuple(names[first])})" in str(error.value)


def assert_learns(network: nn.Module, images: Tensor, unused: tuple[str, ...] = ()) -> None:
    """Every kernel of the network in training mode gets a gradient from its outputs, but the unused ones."""
    outputs = network.train()(images)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    assert_gradients(network, outputs, unused)
    for name, parameter in network.named_parameters():
        assert name.startswith(unused) or parameter.ndim == 1 or parameter.grad.any(), name


def draw(network: nn.Module) -> nn.Module:
    """The network with random weights that keep a gradient's size: kernels by He et al., norms that do nothing yet."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            elif not isinstance(module, nn.BatchNorm2d):
                nn.init.zeros_(parameter)
    return network


def assert_module(module: nn.Module, given: list[Tensor], golden: Case, key: str, *names: str) -> None:
    """A part of an original gives the same output within rounding, and in float64 the same gradients."""
    with torch.no_grad():
        difference = (module(*given).double() - golden[f"{key}64"]).abs().max()
    assert difference <= CPU_FACTOR * golden["err64"]
    module, inputs = module.double(), [x.double().requires_grad_() for x in given]
    module(*inputs).backward(golden["grad_out"].double())
    wanted = {name: golden[f"grad_{name}"] for name in names}
    found = dict(zip(names, (x.grad for x in inputs), strict=True))
    wanted |= golden["grad_params"]
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        same = found[name].to(gradient.dtype)
        torch.testing.assert_close(same, gradient, rtol=2 * torch.finfo(same.dtype).eps, atol=1e-9, msg=name)
