"""A small checkout with XMem's interface, seeded networks, and how runs are compared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vosops.integrations.recipes import original_of, replace_small_ones

CHECKOUT = Path(__file__).parent / "checkout"
TOLERANCE = 1e-5
SHARE_OF_TIES = 1e-3  # of the positions, where two scores are equal to rounding at the k-th place


@pytest.fixture(autouse=True)
def serial(one_thread):
    """Every test here runs in one thread."""


@pytest.fixture(autouse=True)
def small_ones_are_replaced():
    """The problems here are small; none of them is left to the original for that."""
    with replace_small_ones():
        yield


@pytest.fixture(autouse=True)
def no_replacement_is_left():
    """Every test leaves the originals in place."""
    yield
    left = [
        f"{module.__name__}.{name}"
        for module in list(sys.modules.values())
        for name, value in list(getattr(module, "__dict__", {}).items())
        if original_of(value) is not None
    ]
    assert not left


@pytest.fixture
def checkout(monkeypatch):
    """The folder of the checkout, whose modules can be imported; they are forgotten at the end."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(CHECKOUT)
    yield CHECKOUT
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("model", "inference"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def cutie_weights(tmp_path_factory):
    """A file with seeded weights of Cutie's small model."""
    pytest.importorskip("cutie", reason="the package rf-cutie is not installed")
    from cutie.model.cutie import CUTIE
    from cutie.model.utils import resnet

    from vosops.integrations.checkouts import without_pretraining
    from vosops.integrations.cutie import _configuration

    path = tmp_path_factory.mktemp("cutie") / "cutie-small.pth"
    torch.manual_seed(0)
    with without_pretraining(resnet):
        network = CUTIE(_configuration({"pix_feat_proj.weight": torch.empty(256, 256, 1, 1)}, None))
    torch.save(network.state_dict(), path)
    return path


def assert_agree(expected, got):
    """Equal within 1e-5, except at 0.1 % of the positions."""
    assert len(expected) == len(got)
    differing = sum((a - b).abs().gt(TOLERANCE).sum().item() for a, b in zip(expected, got))
    assert differing <= SHARE_OF_TIES * sum(a.numel() for a in expected)
