"""vosops.compat: programs that import other packages run on vosops, with the originals' arguments and results."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

import vosops
from vosops import compat
from vosops.compat import spatial_correlation_sampler as drop_in

NAME = "spatial_correlation_sampler"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Leaves no drop-in behind."""
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield sys.modules
    sys.modules.pop(NAME, None)


def test_an_unmodified_program_runs():
    """As FlowNetC's correlation layer is written."""
    compat.install()
    program: dict = {}
    exec(
        "from spatial_correlation_sampler import SpatialCorrelationSampler, spatial_correlation_sample\n"
        "def correlate(a, b):\n"
        "    out = spatial_correlation_sample(a, b, kernel_size=1, patch_size=21, stride=1, padding=0,\n"
        "                                     dilation_patch=2)\n"
        "    n, ph, pw, h, w = out.size()\n"
        "    return out.view(n, ph * pw, h, w) / a.size(1)\n"
        "sampler = SpatialCorrelationSampler(3, (3, 5), 2, 1, 1, 2)\n",
        program,
    )
    a, b = torch.randn(2, 2, 4, 9, 10)
    want = vosops.local_correlation(a, b, patch_size=21, dilation_patch=2)
    torch.testing.assert_close(program["correlate"](a, b), want.flatten(1, 2) / 4)
    want = vosops.local_correlation(
        a, b, kernel_size=3, patch_size=(3, 5), stride=2, padding=1, dilation=1, dilation_patch=2
    )
    assert torch.equal(program["sampler"](a, b), want)


def test_positions_are_the_original_s():
    """kernel_size, patch_size, stride, padding, dilation, dilation_patch: each changes the result."""
    a, b = torch.randn(2, 1, 2, 9, 9)
    options = dict(kernel_size=3, patch_size=5, stride=2, padding=1, dilation=2, dilation_patch=3)
    want = vosops.local_correlation(a, b, **options)
    for function in (
        drop_in.spatial_correlation_sample,
        drop_in.SpatialCorrelationSamplerFunction.apply,
        lambda a, b, *rest: drop_in.SpatialCorrelationSampler(*rest)(a, b),
    ):
        assert torch.equal(function(a, b, *options.values()), want)


def test_an_imported_original_is_kept_unless_asked(modules):
    original = modules[NAME] = types.ModuleType(NAME)
    with pytest.raises(RuntimeError, match=f"{NAME} must not be imported before"):
        compat.install()
    assert modules[NAME] is original
    compat.install(NAME, replace=True)
    assert importlib.import_module(NAME) is drop_in
    compat.install(NAME)  # it is there already


def test_other_names_are_refused(modules):
    with pytest.raises(ValueError, match="names must be among spatial_correlation_sampler, got 'numpy'"):
        compat.install(NAME, "numpy")
    assert NAME not in modules
