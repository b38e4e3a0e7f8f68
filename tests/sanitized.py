"""Builds the CPU libraries with AddressSanitizer and UBSan and runs the core op tests on each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitized"


def main() -> None:
    environment = {**os.environ, "VOSOPS_SANITIZE": "1", "VOSOPS_CUDA": "0"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(BUILD),
        "--build-lib",
        str(BUILD / "lib"),
    ]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    library = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    supported = {"AVX512": ("baseline", "avx2", "avx512"), "AVX2": ("baseline", "avx2")}
    for capability in supported.get(torch.backends.cpu.get_cpu_capability(), ("baseline",)):
        print(f"sanitized {capability}", flush=True)
        sanitizer = {
            "LD_PRELOAD": library,
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "PYTHONPATH": str(BUILD / "lib"),
            "VOSOPS_CPU_CAPABILITY": capability,
        }
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops", "-k", "core and not compiles"]
        subprocess.run([sys.executable, *tests], cwd=ROOT, env={**os.environ, **sanitizer}, check=True)


if __name__ == "__main__":
    main()
