"""Builds the CPU libraries with AddressSanitizer and UBSan and runs the op tests on each instruction set.

python tests/sanitized.py                              everything that this processor runs
python tests/sanitized.py --only amx_twin --quick      one library, the core tests alone
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitized"
LIBRARY = BUILD / "lib"
CAPABILITIES = {
    "AMX": ("baseline", "avx2", "avx512", "amx", "amx_twin"),
    "AVX512": ("baseline", "avx2", "avx512", "amx_twin"),
    "AVX2": ("baseline", "avx2", "amx_twin"),
    "aarch64": ("neon",),
}
"""What PyTorch calls the processor -> the libraries that it runs. amx_twin is the sources of amx, its instructions in
plain C++ that the sanitizers see, compiled for AVX2."""

SLOW_ELSEWHERE = "not compile and not export and not opcheck and not second"
"""Tests that trace, or call a kernel thousands of times with one size; they run no code that others do not."""

QUICK = f"({SLOW_ELSEWHERE}) and (core or gather or select or amx)"
BUILD_SECONDS, TEST_SECONDS = 1800, 7200
"""At most; the twin's tests, the slowest, take 21 minutes of an idle core."""

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None"
"""Python that keeps Triton, a large compiler that no sanitized test needs, out of its process."""

# The tests' folder is on the path too; the package must come from the sanitized build.
RUN_TESTS = f"""
{WITHOUT_TRITON}
sys.path.insert(0, {str(LIBRARY)!r})
import pytest, vosops
assert vosops.__file__.startswith({str(LIBRARY)!r}), vosops.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


def preloaded(compiler: str) -> dict[str, str]:
    """The environment of a process that loads libraries built with AddressSanitizer by `compiler`.

    The sanitizer's runtime comes first, and right behind it the C++ library: the runtime looks for the function that
    throws exceptions while it starts, finds none in a Python that is written in C, and would end the process at the
    first exception of any library, even one that is caught.
    """
    libraries = [
        _library_of(
            compiler, "libasan.so", f"libclang_rt.asan-{platform.machine()}.so", "libclang_rt.asan.so"
        ),
        _library_of(compiler, "libstdc++.so.6"),
    ]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), **options}


def _library_of(compiler: str, *names: str) -> str:
    """The path of the first of these libraries that a compiler has."""
    for name in names:
        command = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        if Path(found).is_absolute():
            return found
    raise FileNotFoundError(f"{compiler} has no {' or '.join(names)}")


def build(only: str | None) -> None:
    """The sanitized libraries, below build/; `only` one of them."""
    environment = {**os.environ, "VOSOPS_SANITIZE": "1", "VOSOPS_CUDA": "0", "VOSOPS_AMX_TWIN": "1"}
    if only is not None:
        environment["VOSOPS_CPU_ONLY"] = only
    # By force: libraries that were built in place are copied along, and would pass for finished.
    command = [sys.executable, "setup.py", "-q", "build", "--force"]
    command += ["--build-base", str(BUILD), "--build-lib", str(LIBRARY)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=BUILD_SECONDS)


def run(capability: str, selection: str) -> None:
    """The selected op tests on one instruction set; the first finding of a sanitizer ends the process."""
    tested = LIBRARY / "vosops" / f"libvosops_cpu_{capability}.so"
    if b"__asan_init" not in tested.read_bytes():
        sys.exit(f"{tested} was built without AddressSanitizer")
    environment = preloaded(os.environ.get("CXX", "g++"))
    loaded = capability.removesuffix("_twin")
    environment |= {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "VOSOPS_CPU_CAPABILITY": loaded}
    environment["VOSOPS_AMX_TWIN"] = "0" if loaded == capability else "1"
    tests = ["-q", "-n", "0", "-p", "no:cacheprovider", "tests/ops", "-k", selection]
    command = [sys.executable, "-c", RUN_TESTS, *tests]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=TEST_SECONDS)


def main() -> None:
    """Build, then test."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(set().union(*CAPABILITIES.values()))
    parser.add_argument("--only", choices=names, help="one library")
    parser.add_argument("--quick", action="store_true", help="the tests of the core ops alone")
    arguments = parser.parse_args()
    start = time.monotonic()
    build(arguments.only)
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    import torch

    processor = torch.backends.cpu.get_cpu_capability()
    if processor == "AVX512" and torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported():
        processor = "AMX"
    usable = CAPABILITIES.get(platform.machine(), CAPABILITIES.get(processor, ("baseline",)))
    for capability in usable if arguments.only is None else (arguments.only,):
        if capability not in usable:
            sys.exit(f"this processor does not run {capability}, only {', '.join(usable)}")
        start = time.monotonic()
        run(capability, QUICK if arguments.quick else SLOW_ELSEWHERE)
        print(f"sanitized {capability}: nothing found in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
