"""The process that tests/sanitized.py makes finds accesses out of bounds, and survives C++ exceptions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sanitized import preloaded

COMPILER = os.environ.get("CXX") or shutil.which("g++")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C++ compiler"
)

PLANTED = """
struct Thrown { int value; };
int caught() { try { throw Thrown{7}; } catch (const Thrown& thrown) { return thrown.value; } }
static const int while_loaded = caught();
extern "C" int thrown_while_loaded() { return while_loaded; }
extern "C" int thrown_when_called() { return caught(); }
extern "C" int beyond_the_end(int n) { int* p = new int[n]{}; int v = p[n]; delete[] p; return v; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A sanitized library that throws while it is loaded, as Triton 3.8 does, and when it is called."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cpp").write_text(PLANTED)
    command = [COMPILER, "-std=c++20", "-shared", "-fPIC", "-fsanitize=address", "-O1", "planted.cpp"]
    subprocess.run([*command, "-o", "planted.so"], cwd=folder, check=True, timeout=120)
    return folder / "planted.so"


def run(code: str) -> subprocess.CompletedProcess:
    environment = preloaded(COMPILER)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_exceptions_of_libraries_are_caught(library):
    code = f"import ctypes; c = ctypes.CDLL({str(library)!r}); print(c.thrown_while_loaded(), c.thrown_when_called())"
    done = run(code)
    assert (done.returncode, done.stdout) == (0, "7 7\n"), done.stderr


def test_an_access_out_of_bounds_is_found(library):
    done = run(f"import ctypes; ctypes.CDLL({str(library)!r}).beyond_the_end(5)")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "beyond_the_end" in done.stderr


def test_triton_can_be_imported():
    pytest.importorskip("triton")
    done = run("import triton; print(triton.__version__)")
    assert done.returncode == 0, done.stderr


def test_a_compiler_without_a_sanitizer_is_named(tmp_path):
    compiler = tmp_path / "bare"
    compiler.write_text('#!/bin/sh\necho "${1#-print-file-name=}"\n')
    compiler.chmod(0o755)
    with pytest.raises(FileNotFoundError, match=r"bare has no libasan\.so or "):
        preloaded(str(compiler))
