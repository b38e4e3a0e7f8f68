"""nn.MemoryRead: STM's read with its heads."""

from __future__ import annotations

import pytest
import torch

import vosops
from vosops.nn import MemoryRead


def small(**options) -> MemoryRead:
    return MemoryRead(6, key_channels=3, value_channels=4, **options)


def test_is_attention_over_all_memory_beside_the_frames_own_value():
    module = small().double()
    query, memory = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6, 3, 4, 5).double()
    keys, values = (
        torch.stack([head(frame) for frame in memory.unbind(2)], 2).flatten(2)
        for head in (module.memory_key, module.memory_value)
    )
    affinity = torch.softmax(keys.transpose(1, 2) @ module.query_key(query).flatten(2) / 3**0.5, 1)
    wanted = torch.cat([(values @ affinity).view(2, 4, 4, 5), module.query_value(query)], 1)
    torch.testing.assert_close(module(query, memory), wanted)


@pytest.mark.parametrize("options", [{"similarity": "l2"}, {"top_k": 4}])
def test_passes_its_options_on(options):
    module = small(**options)
    query, memory = torch.randn(1, 6, 4, 5), torch.randn(1, 6, 3, 4, 5)
    key, value = module.memorise(memory)
    read = vosops.memory_read(module.query_key(query), key, value, **options)
    torch.testing.assert_close(module(query, memory)[:, :4], read)


def test_every_parameter_learns():
    module = small()
    module(torch.randn(1, 6, 4, 5), torch.randn(1, 6, 2, 3, 4)).square().sum().backward()
    assert all(x.grad.any() for name, x in module.named_parameters() if name != "memory_key.bias")
    assert (
        module.memory_key.bias.grad.abs().max() < 1e-4
    )  # the same for all memory: the softmax does not see it


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kernel_size": 2}, "kernel_size must be odd"), ({"similarity": "cosine"}, "similarity must be")],
)
def test_refuses_other_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"memory must have shape \(N, 6, T, H, W\)"):
        small()(torch.randn(1, 6, 4, 5), torch.randn(1, 6, 4, 5))
