"""What the AMX kernels are made of (csrc/cpu/amx.h), by the processor's matrix engine and by its twin, against scalar
models (amx.cpp), bit for bit.
"""

import functools
import platform
from pathlib import Path

import pytest
import torch

from tests.cpu.programs import check, flags_of, this_compiler

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="for x86-64")
SOURCES = ("tests/cpu/amx.cpp", "csrc/cpu/amx.cpp")


def processor_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.fixture(scope="module")
def run_amx(tmp_path_factory):
    """Return a function that compiles and runs amx.cpp for a library, once each, and returns its last line."""

    @functools.cache
    def run(library: str) -> str:
        folder = tmp_path_factory.mktemp(library)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("VOSOPS_AMX_TWIN", "1")
            flags = ["-O1", *flags_of(library, monkeypatch)]  # -O2 compiles for twice as long
        return check(folder / "amx", SOURCES, this_compiler(), flags, [])

    return run


def test_the_twin_agrees_with_the_scalar_models(run_amx):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor does not run AVX2")
    assert "all bits" in run_amx("amx_twin")


def test_the_engine_agrees_with_the_scalar_models_and_the_twin(run_amx):
    if "avx512_bf16" not in processor_flags():
        pytest.skip("the processor has no AVX-512 instructions for bfloat16")
    line = run_amx("amx")  # the instructions that pack are compared in any case
    if "no tiles" in line:
        pytest.skip(f"AMX cannot be used here: {line}")
    bits = line.partition("all bits ")[2]
    assert len(bits) == 16
    assert run_amx("amx_twin").endswith(bits)
