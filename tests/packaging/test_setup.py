"""setup.py where the libraries cannot be built: one clear line, and a package that works or none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = """
import platform, runpy, sys
import torch.utils.cpp_extension
platform.system = lambda: {system!r}
sys.argv = ["setup.py", "-q", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def tree(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "_vosops_cli.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "vosops").mkdir()
    (tmp_path / "vosops/__init__.py").touch()
    return tmp_path


def run(tree, code, **environment):
    environment = {**os.environ, "PYTHONPATH": "", "VOSOPS_CUDA": "0", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_elsewhere_than_on_linux_the_package_is_built_without_libraries_and_says_so(system, tree):
    result = run(tree, ELSEWHERE.format(system=system))
    assert result.returncode == 0, result.stderr
    line = f"built no library, for they are for Linux and this is {system}; "
    line += "the reference in plain PyTorch serves every op, slowly"
    assert f"vosops: {line}" in result.stdout.splitlines()
    (written,) = tree.glob("build/lib*/vosops/build_info.json")
    assert json.loads(written.read_text())["summary"] == line
    assert not list(tree.rglob("*.so"))


def test_without_a_compiler_one_line_names_it(tree):
    code = ELSEWHERE.format(system="Linux")
    result = run(tree, code, CXX="no-such-compiler -O2")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("vosops: no C++ compiler 'no-such-compiler' found")
    assert "Traceback" not in result.stderr


def test_without_torch_one_line_says_what_to_install(tree):
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext']; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    result = run(tree, code)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("vosops: the build needs torch: pip install torch")
    assert "Traceback" not in result.stderr
