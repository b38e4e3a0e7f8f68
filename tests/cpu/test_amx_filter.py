"""The strict bound and the lists of exact searches on the matrix engine (csrc/cpu/amx_filter.h, amx_filter.cpp)."""

import platform

import pytest
import torch

from tests.cpu.programs import check, flags_of, this_compiler
from vosops import _library

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="for x86-64")
SOURCES = ("tests/cpu/amx_filter.cpp", "csrc/cpu/amx.cpp")


@pytest.mark.parametrize("library", ["amx", "amx_twin"])
def test_the_bound_holds_and_half_of_it_does_not(library, tmp_path, monkeypatch):
    if library == "amx" and not _library._has_amx():
        pytest.skip("the processor has no AMX for bfloat16")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor does not run AVX2")
    if library == "amx" and (refusal := torch.ops.vosops.amx_refusal()).startswith("the system"):
        pytest.skip(refusal)
    monkeypatch.setenv("VOSOPS_AMX_TWIN", "1")
    flags = ["-O1", *flags_of(library, monkeypatch)]
    check(tmp_path / "amx_filter", SOURCES, this_compiler(), flags, [])
