"""Fixtures shared by the tests of the Triton kernels."""

import pytest


@pytest.fixture
def chip(monkeypatch):
    """Pretend to run on another GPU, of so many multiprocessors.

    With one the largest tiles are taken even for small maps.
    """
    from vosops.triton import (
        _common,
        global_conv,
        global_matching,
        local_matching,
        memory_descriptors,
        memory_scores,
    )

    def pretend(capability: int, processors: int = 1) -> None:
        target = _common.Target(capability, processors)
        for module in (global_conv, global_matching, local_matching, memory_descriptors, memory_scores):
            monkeypatch.setattr(module, "target_of", lambda tensor: target)

    return pretend
