"""Compile CUDA kernels for the emulator: `python tests/emulator/build.py [--mode checked|address|plain]`.

A mode is a set of compiler flags: `checked` finds races, unwritten reads and misaligned accesses of shared memory,
`address` finds accesses out of bounds (AddressSanitizer), `plain` is the fastest.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA_SOURCES = ROOT / "csrc/cuda"
HOST_ONLY = {"version.cu"}  # asks the CUDA runtime for its version
MAX_JOBS = 2

COMMON = ["-std=c++20", "-g1", "-fPIC", "-ftls-model=initial-exec", "-fvisibility=hidden", "-Wall"]
COMMON += ["-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# A 64-bit size or index must not become a 32-bit one unsaid; nvcc has no such warning.
COMMON += ["-Wconversion", "-Wno-sign-conversion", "-Wno-float-conversion"]
KERNEL_FLAGS = {
    # The calls of __tsan_* and __ubsan_* go to emulator.cpp: the sanitizers' own libraries are not linked.
    # -O1: compiling costs more than running, and every access of shared memory is a call at any level.
    "checked": ["-O1", "-fsanitize=thread,alignment", "-Wno-tsan"],
    # Checks by calls instead of inline: half the time to compile, which is most of what the mode costs.
    "address": ["-fsanitize=address", "-Og", "--param", "asan-instrumentation-with-call-threshold=0"],
    "plain": ["-O2"],
}
EMULATOR_FLAGS = {"checked": ["-O2"], "address": ["-O1", "-fsanitize=address"], "plain": ["-O2"]}
LINK_FLAGS = {"checked": [], "address": ["-fsanitize=address"], "plain": []}
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def compiler() -> str:
    """The C++ compiler: $CXX, or g++."""
    return os.environ.get("CXX") or shutil.which("g++") or "c++"


def torch_flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags for the stable ABI of the installed torch."""
    import torch

    root = Path(torch.__file__).parent
    include = [f"-isystem{root / 'include'}"]
    # As needed: a CUDA build's libtorch brings the CUDA libraries, which take a second to load.
    link = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]
    return include, link


def cache_directory() -> Path:
    """Where objects and libraries are kept between runs."""
    folder = os.environ.get("VOSOPS_EMULATOR_CACHE")
    path = Path(folder) if folder else ROOT / "build/emulator"
    path.mkdir(parents=True, exist_ok=True)
    return path


def run(command: list[str]) -> None:
    """Run a compiler; its messages become the exception's."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def make(command: list[str], inputs: list[Path], suffix: str, stem: str) -> Path:
    """Run `command OUTPUT` unless an output of the same command and inputs already exists."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    output = cache_directory() / f"{stem}-{digest.hexdigest()[:16]}{suffix}"
    with _alone(output):
        if not output.exists():
            handle, partial = tempfile.mkstemp(dir=output.parent, suffix=suffix)
            os.close(handle)
            try:
                run([*command, "-o", partial])
                os.replace(partial, output)
            finally:
                Path(partial).unlink(missing_ok=True)
    return output


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Lets one process at a time make a file, so that workers that start together share what is compiled."""
    import fcntl  # Linux only, as the emulator is

    with open(output.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_and_link(sources: list[Path], mode: str, stem: str, flags: list[str], link: list[str]) -> Path:
    """Compile `sources` and the emulator for `mode` and link them."""
    headers = sorted([*CUDA_SOURCES.glob("*.cuh"), *(ROOT / "csrc/common").glob("*.h"), *HERE.glob("*.h")])
    include, torch_link = torch_flags()
    base = [compiler(), *COMMON, *STABLE_ABI, *include, f"-I{ROOT / 'csrc'}", f"-I{HERE}", *flags]

    def compile_one(source: Path) -> Path:
        kernels = EMULATOR_FLAGS[mode] if source.name == "emulator.cpp" else KERNEL_FLAGS[mode]
        command = [*base, *kernels, "-x", "c++", "-c", str(source)]
        return make(command, [source, *headers], ".o", f"{source.stem}-{mode}")

    with ThreadPoolExecutor(MAX_JOBS) as pool:
        objects = list(pool.map(compile_one, [*sources, HERE / "emulator.cpp"]))
    suffix = ".so" if "-shared" in link else ""
    command = [compiler(), *LINK_FLAGS[mode], *map(str, objects), *link, *torch_link, "-ldl", "-pthread"]
    return make(command, objects, suffix, f"{stem}-{mode}")


@functools.cache  # finding that nothing has changed means reading everything, and every test asks
def build_library(mode: str = "checked") -> Path:
    """The ops of csrc/cuda as `torch.ops.vosops_emulated`, on CPU tensors: a library for torch.ops.load_library."""
    sources = [path for path in sorted(CUDA_SOURCES.glob("*.cu")) if path.name not in HOST_ONLY]
    flags = ["-Dvosops=vosops_emulated", '-DVOSOPS_CAPABILITY="emulated"']
    return compile_and_link([*sources, ROOT / "csrc/ops.cpp"], mode, "libvosops_emulated", flags, ["-shared"])


def load_emulated_ops() -> None:
    """Make `torch.ops.vosops_emulated` available; the environment variable VOSOPS_EMULATOR_MODE chooses the build."""
    import torch

    torch.ops.load_library(str(build_library(os.environ.get("VOSOPS_EMULATOR_MODE", "checked"))))


@functools.cache
def build_cases(mode: str = "checked") -> Path:
    """The program of the emulator's own tests."""
    return compile_and_link([HERE / "cases.cu"], mode, "cases", [], [])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=sorted(KERNEL_FLAGS), default="checked")
    print(build_library(parser.parse_args().mode))
