"""setup.py where the libraries cannot be built: one clear line, and a package that works or none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import platform, runpy, sys
import torch.utils.cpp_extension
for system in {systems!r}:
    platform.system = lambda: system
    sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", system]
    runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def tree(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "_vosops_cli.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "vosops").mkdir()
    (tmp_path / "vosops/__init__.py").touch()
    shutil.copy(ROOT / "vosops/_sources.py", tmp_path / "vosops")
    return tmp_path


def run(tree, code, **environment):
    environment = {**os.environ, "PYTHONPATH": "", "VOSOPS_CUDA": "0", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=240)


def test_elsewhere_than_on_linux_the_package_is_built_without_libraries_and_says_so(tree):
    systems = ("Darwin", "Windows")
    result = run(tree, BUILD.format(systems=systems))
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if line.startswith("vosops: ")]
    for system, line in zip(systems, said, strict=True):
        why = f"they are for Linux and this is {system}"
        expected = f"built no library, for {why}; the reference in plain PyTorch serves every op, slowly"
        assert line == f"vosops: {expected}"
        assert json.loads((tree / system / "vosops/build_info.json").read_text())["summary"] == expected
    assert not list(tree.rglob("*.so"))


def test_without_a_compiler_one_line_names_it(tree):
    code = BUILD.format(systems=("Linux",))
    result = run(tree, code, CXX="no-such-compiler -O2")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("vosops: no C++ compiler 'no-such-compiler' found")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("folder", [None, "no-torch-here"])
def test_a_compiler_for_another_processor_needs_a_torch_for_it(tree, folder):
    compiler = tree / "s390x-linux-gnu-g++"
    compiler.write_text("#!/bin/sh\necho s390x-linux-gnu\n")
    compiler.chmod(0o755)
    environment = {} if folder is None else {"VOSOPS_TARGET_TORCH": folder}
    result = run(tree, BUILD.format(systems=("Linux",)), CXX=str(compiler), **environment)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"vosops: {compiler} compiles for s390x; VOSOPS_TARGET_TORCH must be the folder")
    assert line.endswith(f"got {folder!r}")
    assert "Traceback" not in result.stderr


def test_without_torch_one_line_says_what_to_install(tree):
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext']; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    result = run(tree, code)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("vosops: the build needs torch: pip install torch")
    assert "Traceback" not in result.stderr
