"""Twins have one schema: an op of the compiled library, Triton's, and that of PyTorch's own ops."""

import pytest
import torch

import vosops  # noqa: F401  (registers the ops)
from vosops.ops._registration import HAS_CPP

SUFFIXES = ("_triton", "_shifts")
TWINS = sorted(
    name.removeprefix("vosops::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("vosops::") and name.endswith(SUFFIXES)
)


def schema(name: str) -> str:
    return str(getattr(torch.ops.vosops, name).default._schema)


def test_every_op_of_the_kernels_has_a_triton_twin():
    assert len(TWINS) >= 17
    kernels = ("local_matching", "global_matching", "matching_backward", "memory_read", "memory_select")
    kernels += ("memory_gather", "conv_lstm_pointwise", "global_conv_split", "local_attention_dot")
    kernels += ("local_correlation", "local_correlation_query", "local_correlation_key")
    assert {f"{kernel}_triton" for kernel in kernels} <= set(TWINS)


@pytest.mark.skipif(not HAS_CPP, reason="the CPU library, which has the schemas, was not compiled")
@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_has_the_schema_of_the_compiled_op(twin):
    suffix = next(suffix for suffix in SUFFIXES if twin.endswith(suffix))
    compiled = twin.removesuffix(suffix)
    assert schema(twin).replace(f"{twin}(", f"{compiled}(", 1) == schema(compiled)
