"""Compiles the programs of this folder as setup.py compiles the libraries, and runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {"-O3", "-fvisibility=hidden"}
"""Options of the libraries that only cost time here."""


def flags_of(capability: str, monkeypatch) -> list[str]:
    """The options that setup.py compiles a library with, but for the optimization."""
    from distutils.core import run_setup

    import setuptools  # noqa: F401  # brings distutils

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("VOSOPS_CUDA", "0")
    monkeypatch.setenv("VOSOPS_CPU_ONLY", capability)
    library, *_ = run_setup("setup.py", stop_after="init").ext_modules
    flags = [flag for flag in library.extra_compile_args["cxx"] if flag not in LEFT_OUT]
    return [*flags, f"-I{ROOT / 'csrc'}"]


def this_compiler() -> list[str]:
    """The compiler of this processor's programs; skips the test where there is none."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++ compiler, {compiler[0]} was not found")
    return compiler


def check(
    program: Path, sources: Sequence[str], compiler: list[str], flags: list[str], run: list[str]
) -> str:
    """Compile sources of the project to `program`, run it, and return the line that it ends with."""
    command = [*compiler, *flags, *(str(ROOT / source) for source in sources), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([*run, str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    line = result.stdout.splitlines()[-1]
    counted = re.match(r"(\d+) comparisons, 0 failed", line)
    assert counted, line
    assert int(counted[1]) > 300_000
    return line
