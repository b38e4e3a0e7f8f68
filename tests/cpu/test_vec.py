"""The operations that the CPU kernels are made of, against scalar twins (vec.cpp), on each instruction set."""

import platform
import shutil
from pathlib import Path

import pytest
import torch

from tests.cpu.programs import check, flags_of, this_compiler

ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ON_ARM = platform.machine() in ("aarch64", "arm64")
SOURCES = ("tests/cpu/vec.cpp",)


CAPABILITIES = [
    "avx512",
    pytest.param("avx2", marks=pytest.mark.exhaustive),
    "baseline",
    "neon",
]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_on_this_processor(capability, tmp_path, monkeypatch):
    processor = "neon" if ON_ARM else torch.backends.cpu.get_cpu_capability()
    runs = {"AVX512": "baseline avx2 avx512", "AVX2": "baseline avx2", "neon": "neon"}
    if capability not in runs.get(processor, "baseline").split():
        pytest.skip(f"the processor ({processor}) does not run {capability}")
    flags = ["-O2", *flags_of(capability, monkeypatch)]
    line = check(tmp_path / "vec", SOURCES, this_compiler(), flags, [])
    if capability == "avx512" and "avx512_bf16" in Path("/proc/cpuinfo").read_text():
        assert line.endswith("bfloat16 instructions: checked")


@pytest.mark.skipif(ON_ARM, reason="this processor runs it itself")
@pytest.mark.parametrize(
    ("processor", "bfloat16"), [("max", "checked"), ("cortex-a57", "not in this processor")]
)
def test_on_an_emulated_arm_processor(processor, bfloat16, tmp_path, monkeypatch):
    for tool in (ARM_COMPILER, ARM_EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian's g++-aarch64-linux-gnu and qemu-user)")
    monkeypatch.setenv("CXX", ARM_COMPILER)
    # Headers are all that is used of it, and these are the same for every processor.
    monkeypatch.setenv("VOSOPS_TARGET_TORCH", str(Path(torch.__file__).parent))
    flags = ["-O2", *flags_of("neon", monkeypatch), "-static"]
    line = check(tmp_path / "vec", SOURCES, [ARM_COMPILER], flags, [ARM_EMULATOR, "-cpu", processor])
    assert line.endswith(f"bfloat16 instructions: {bfloat16}")
