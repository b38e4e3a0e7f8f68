"""What type checkers are told of the public functions. Never run: mypy reads it (`make lint`)."""

from torch import Tensor
from typing_extensions import assert_type

import vosops
from vosops import MemoryWeights


def check(t: Tensor, masks: Tensor, flag: bool) -> None:
    assert_type(vosops.local_matching(t, t, masks, radius=3), Tensor)
    assert_type(vosops.local_matching(t, t, masks, radius=[1, 2], return_indices=True), tuple[Tensor, Tensor])
    assert_type(vosops.local_matching(t, t, masks, return_indices=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(vosops.global_matching(t, [t, t], [masks, masks], neighbors=2), Tensor)
    assert_type(vosops.global_matching(t, t, masks, return_indices=True), tuple[Tensor, Tensor])
    assert_type(vosops.local_attention(t, t, t, heads=2), Tensor)
    assert_type(vosops.local_correlation(t, t, patch_size=(3, 5)), Tensor)
    assert_type(vosops.local_attention(t, t, t, return_weights=True), tuple[Tensor, Tensor])

    assert_type(vosops.memory_read(t, t, t, similarity="l2", top_k=3), Tensor)
    assert_type(vosops.memory_read(t, [t, t], [[t], [t]]), Tensor)
    assert_type(vosops.memory_read(t, t, t, return_lse=True), tuple[Tensor, Tensor])
    assert_type(vosops.memory_read(t, t, t, return_usage=True), tuple[Tensor, Tensor])
    assert_type(vosops.memory_read(t, [t], [t], return_usage=True), tuple[Tensor, list[Tensor]])
    assert_type(
        vosops.memory_read(t, t, t, return_usage=True, return_lse=True), tuple[Tensor, Tensor, Tensor]
    )
    assert_type(
        vosops.memory_read(t, [t], [t], return_usage=True, return_lse=True),
        tuple[Tensor, list[Tensor], Tensor],
    )
    assert_type(vosops.memory_read(t, t, [t, t], groups=[None, (2, 9)]), list[Tensor])
    assert_type(
        vosops.memory_read(t, [t], [[t], [t]], groups=[None, t], return_usage=True),
        list[tuple[Tensor, list[Tensor]]],
    )
    assert_type(vosops.memory_read(t, t, t, return_usage=flag), Tensor | tuple[Tensor | list[Tensor], ...])
    assert_type(vosops.memory_select(t, t, 3), MemoryWeights)
    assert_type(vosops.memory_select(t, t, 3, return_usage=True), tuple[MemoryWeights, Tensor])
    assert_type(vosops.memory_select(t, [t], 3, return_usage=True), tuple[MemoryWeights, list[Tensor]])
    assert_type(vosops.memory_select(t, t, 3, groups=[None]), list[MemoryWeights])
    assert_type(vosops.memory_gather(vosops.memory_select(t, t, 3), t), Tensor)
    assert_type(vosops.merge_reads([t], [t]), tuple[Tensor, Tensor])
    assert_type(vosops.conv_lstm(t, t), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(vosops.global_conv(t, t, t, t, t), Tensor)
    assert_type(vosops.soft_aggregate(t), Tensor)
    vosops.memory_read(t, t, t, similarty="l2")  # type: ignore[call-overload]
