"""The cases of test_ops.py under AddressSanitizer, in a process that preloads it; a step of its own of .ci/run.

Compiling the kernels once more for it takes a minute.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.build import compiler
from tests.emulator.test_ops import ALL_CASES
from tests.sanitized import WITHOUT_TRITON, preloaded

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux and g++"),
    pytest.mark.exhaustive,
]


def test_no_access_out_of_bounds() -> None:
    code = f"{WITHOUT_TRITON}; import runpy; runpy.run_module('tests.emulator.test_ops', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**preloaded(compiler()), "VOSOPS_EMULATOR_MODE": "address"},
        cwd=Path(__file__).parents[2],
        timeout=580,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == f"{ALL_CASES} cases\n"
