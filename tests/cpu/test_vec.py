"""The operations that the CPU kernels are made of, against scalar twins (vec.cpp), on each instruction set."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ON_ARM = platform.machine() in ("aarch64", "arm64")
LEFT_OUT = {"-O3", "-fvisibility=hidden"}
"""Options of the libraries that only cost time here."""


def flags_of(capability: str, monkeypatch) -> list[str]:
    """The options that setup.py compiles a library with."""
    from distutils.core import run_setup

    import setuptools  # noqa: F401  # brings distutils

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("VOSOPS_CUDA", "0")
    monkeypatch.setenv("VOSOPS_CPU_ONLY", capability)
    library, *_ = run_setup("setup.py", stop_after="init").ext_modules
    flags = [flag for flag in library.extra_compile_args["cxx"] if flag not in LEFT_OUT]
    return [*flags, "-O2", f"-I{ROOT / 'csrc'}"]


def check(program: Path, compiler: list[str], flags: list[str], run: list[str]) -> str:
    """Compile, run, and return the line that the program ends with."""
    command = [*compiler, *flags, str(ROOT / "tests/cpu/vec.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([*run, str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    line = result.stdout.splitlines()[-1]
    counted = re.match(r"(\d+) comparisons, 0 failed", line)
    assert counted, line
    assert int(counted[1]) > 300_000
    return line


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
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++ compiler, {compiler[0]} was not found")
    line = check(tmp_path / "vec", compiler, flags_of(capability, monkeypatch), [])
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
    flags = [*flags_of("neon", monkeypatch), "-static"]
    line = check(tmp_path / "vec", [ARM_COMPILER], flags, [ARM_EMULATOR, "-cpu", processor])
    assert line.endswith(f"bfloat16 instructions: {bfloat16}")
