"""Compiles every source against the headers of the oldest supported torch and of 2.11: types and syntax, no output.

python tools/check_headers.py                       what `make check-headers` does
python tools/check_headers.py --torch 2.12.0        another version
python tools/check_headers.py --all --cxx clang++   every instruction set, with another compiler

The headers come out of PyPI's wheel for macOS, the smallest that holds them, and are kept below $XDG_CACHE_HOME.
The CUDA sources need nvcc; where none is, they are left out by name.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEEL = ["--no-deps", "--only-binary=:all:", "--platform=macosx_11_0_arm64", "--python-version=3.12"]
HEADERS_IN_WHEEL = "torch/include/"
SECOND_VERSION = "2.11.0"  # 2.12 and 2.13 added the most
CUDA_ARCHITECTURE = "90a"  # has every instruction that csrc/cuda/intrinsics.cuh uses
DOWNLOAD_SECONDS, COMPILE_SECONDS = 1200, 600


def oldest_torch() -> str:
    """Return the oldest version of torch that pyproject.toml allows, such as 2.10.0."""
    found = re.search(r'^dependencies = \["torch>=(\d+\.\d+)"\]', (ROOT / "pyproject.toml").read_text(), re.M)
    if found is None:
        sys.exit("pyproject.toml names no oldest torch: dependencies must be torch>=MAJOR.MINOR")
    return f"{found[1]}.0"


def headers(version: str) -> Path:
    """Return the headers of a version of torch, downloaded unless they are there already."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vosops" / "headers"
    folder = cache / f"torch-{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        temporary = Path(name)
        command = [sys.executable, "-m", "pip", "download", "-q", *WHEEL, f"--dest={temporary}"]
        result = subprocess.run([*command, f"torch=={version}"], timeout=DOWNLOAD_SECONDS)
        wheels = list(temporary.glob("torch-*.whl"))
        if result.returncode or len(wheels) != 1:
            sys.exit(f"cannot download torch {version}, whose headers the sources are compiled against")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(temporary, [n for n in wheel.namelist() if n.startswith(HEADERS_IN_WHEEL)])
        if not (temporary / HEADERS_IN_WHEEL / "torch/csrc/stable/library.h").exists():
            sys.exit(f"the wheel of torch {version} has no headers of the stable ABI")
        try:
            (temporary / HEADERS_IN_WHEEL).rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


@dataclass(frozen=True)
class Check:
    """One source, compiled against one version of torch."""

    source: str
    title: str
    command: list[str]

    def run(self) -> str:
        """Return what the compiler complains of; empty if nothing."""
        command = [*self.command, self.source]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        if result.returncode == 0:
            return ""
        return f"{self.title}: {shlex.join(command)}\n{result.stdout}{result.stderr}"


def checks(versions: list[str], cxx: list[str], every_library: bool) -> Iterator[Check]:
    """Every source with the flags that setup.py gives it, against the headers of each version."""
    os.chdir(ROOT)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
    from distutils.core import run_setup

    import setuptools  # noqa: F401  # brings distutils
    from torch.utils import cpp_extension

    installed = os.path.join(os.path.dirname(os.path.abspath(cpp_extension.__file__)), "..", "include")
    installed = os.path.normpath(installed)
    extensions = {
        e.name.split("libvosops_")[-1]: e for e in run_setup("setup.py", stop_after="init").ext_modules
    }
    cpu = [name for name in extensions if name.startswith("cpu_")]
    for version in versions:
        include = str(headers(version))
        for name in cpu if every_library else cpu[-1:]:
            extension = extensions[name]
            flags = [flag.replace(installed, include) for flag in extension.extra_compile_args["cxx"]]
            flags += [f"-I{folder}" for folder in extension.include_dirs if not folder.startswith(installed)]
            for source in extension.sources:
                title = f"torch {version}, {name}, {source}"
                yield Check(source, title, [*cxx, "-fsyntax-only", *flags])
        if "cuda" in extensions:
            extension = extensions["cuda"]
            flags = [*extension.extra_compile_args["nvcc"], *cpp_extension.COMMON_NVCC_FLAGS]
            flags += [f"-I{folder}" for folder in extension.include_dirs if not folder.startswith(installed)]
            flags += ["-isystem", include]
            target = f"arch=compute_{CUDA_ARCHITECTURE},code=compute_{CUDA_ARCHITECTURE}"
            # The front end reads the code of both host and device; nothing is written to the output.
            mode = ["-fdevice-syntax-only", "--ptx", f"-gencode={target}", "-o", os.devnull]
            nvcc = str(Path(cpp_extension.CUDA_HOME) / "bin/nvcc")
            for source in extension.sources:
                yield Check(source, f"torch {version}, cuda, {source}", [nvcc, *mode, *flags])


def main() -> int:
    """Compile; 1 if anything does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", metavar="VERSION", help="versions instead of those two")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "c++"), help="the C++ compiler, a command")
    parser.add_argument("--all", action="store_true", help="every CPU library, not the last alone")
    arguments = parser.parse_args()
    versions = arguments.torch or sorted({oldest_torch(), SECOND_VERSION})
    todo = list(checks(versions, shlex.split(arguments.cxx), arguments.all))
    # Long ones first, so that no core waits at the end.
    todo.sort(key=lambda check: Path(ROOT / check.source).stat().st_size, reverse=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        failures = [message for message in pool.map(Check.run, todo) if message]
    print("\n".join(failures), end="")
    cuda = any(check.source.endswith(".cu") for check in todo)
    without = "" if cuda else "; without the CUDA sources, as setup.py found no nvcc"
    print(
        f"check-headers: {len(todo) - len(failures)} of {len(todo)} compiled, torch {', '.join(versions)}{without}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
