"""The twins of mma and ldmatrix: where CuTe has each element, and how Hopper's tensor cores add.

The layouts need the headers of the package nvidia-cutlass (`pip install --no-deps nvidia-cutlass`) and those of a CUDA
toolkit; nothing of either is linked or run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator import build, test_ops

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux and g++")

HOPPER = "VOSOPS_EMULATOR_SUMS"


def cutlass_headers() -> Path | None:
    """Where nvidia-cutlass keeps CuTe, if it is installed."""
    found = importlib.util.find_spec("cutlass_library")
    folder = Path(found.origin).parent / "source/include" if found and found.origin else None
    return folder if folder and (folder / "cute").is_dir() else None


def cuda_headers() -> list[Path]:
    """The folders of headers that the nvcc on the PATH uses, those of the C++ library last."""
    if not shutil.which("nvcc"):
        return []
    plan = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60
    )
    found = re.search(r'INCLUDES="-I(\S+?)"', plan.stderr)
    return [Path(found[1]), Path(found[1]) / "cccl"] if found else []


@pytest.fixture(scope="module")
def layouts() -> str:
    """CuTe's tables of fragments, as cute_layouts.cpp prints them."""
    cutlass, cuda = cutlass_headers(), cuda_headers()
    if not cutlass:
        pytest.skip("nvidia-cutlass, which brings CuTe's headers, is not installed")
    if not cuda:
        pytest.skip("no nvcc, which brings the CUDA headers that CuTe includes")
    source = build.HERE / "cute_layouts.cpp"
    # Its warnings are another project's.
    command = [
        build.compiler(),
        "-std=c++20",
        "-w",
        *(f"-I{folder}" for folder in (cutlass, *cuda)),
        str(source),
    ]
    program = build.make(command, [source], "", "cute_layouts")
    return subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout


def multiply_by(tables: str) -> str:
    """What the twins make of fragments that lie as `tables` has them."""
    result = subprocess.run(
        [build.build_cases("plain"), "fragments"], input=tables, capture_output=True, text=True, timeout=60
    )
    return result.stdout + result.stderr


def test_fragments_lie_as_cute_has_them(layouts: str) -> None:
    assert multiply_by(layouts) == "ok\n"


@pytest.mark.parametrize("line", [1, 2, 3, 11, 13, 14, 16, 17])
def test_a_table_with_two_elements_exchanged_is_noticed(layouts: str, line: int) -> None:
    """Lines 0, 4, 8, 12 and 15 name the instructions; 1 to 3 are bfloat16's, 11 TF32's C, the last ldmatrix's."""
    lines = layouts.splitlines()
    name, *entries = lines[line].split()
    entries[5], entries[18] = entries[18], entries[5]
    assert "wrong: " in multiply_by(
        "\n".join([*lines[:line], " ".join([name, *entries]), *lines[line + 1 :]])
    )


def small_terms(sums: str) -> tuple[int, str]:
    result = subprocess.run(
        [build.build_cases("plain"), "small_terms_lost"],
        capture_output=True,
        text=True,
        env={**os.environ, HOPPER: sums},
        timeout=60,
    )
    return result.returncode, result.stdout + result.stderr


def test_hopper_cuts_terms_off_25_bits_below_the_greatest() -> None:
    """1 + 16 * 2^-26 is 1 there; the usual twin adds exactly."""
    assert small_terms("hopper") == (0, "ok\n")
    assert small_terms("exact")[0] == 1
    assert "VOSOPS_EMULATOR_SUMS must be exact or hopper, not volta" in small_terms("volta")[1]


@pytest.mark.parametrize(
    ("check", "case"),
    [
        (test_ops.test_memory_read, "tensor: 16 bytes, channel-major"),
        (test_ops.test_memory_read, "tensor: 16 bytes, channel-last"),
        (test_ops.test_local_matching, "tensor: seven and eight steps"),
        (test_ops.test_local_matching, "tensor: split TF32 in two chunks"),
        (test_ops.test_global_matching, "tensor: seven steps"),
        (test_ops.test_global_matching, "tensor: split TF32"),
    ],
)
def test_results_are_right_with_the_sums_of_hopper(monkeypatch: pytest.MonkeyPatch, check, case: str) -> None:
    build.load_emulated_ops()
    monkeypatch.setenv(HOPPER, "hopper")
    check(case)
