"""Runs the op tests on versions of PyTorch and Python, and records each in benchmarks/results/matrix.json.

    python benchmarks/matrix.py                                  the cells of CELLS
    python benchmarks/matrix.py 2.11.0@3.10 2.12.0@python3       these: torch @ Python
    python benchmarks/matrix.py newest@3.13 --source             built from source there, instead of from the wheel
    python benchmarks/matrix.py 2.11.0@3.10 --interpret          and Triton's kernels in its interpreter
    python benchmarks/matrix.py --environments FOLDER            keeps the environments, and takes those that are there

A cell has an environment of its own, thrown away at the end, in which vosops is installed from dist/*.whl (made where
there is none) and tests/ops and tests/test_package.py run in a folder without the sources. Python is a program, or a
version that pyenv or the PATH has. `python benchmarks/compatibility.py` writes what was recorded into
docs/compatibility.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks/results/matrix.json"
NEWEST = "newest"
CELLS = ("2.10.0@3.10", "2.11.0@3.10", "2.12.0@3.12", "2.13.0@3.12", "2.14.1@3.13", f"{NEWEST}@3.13")
TESTS = ("tests/ops", "tests/test_package.py")
TOOLS = ("pytest>=8", "pytest-xdist>=3.5", "pytest-timeout>=2.3", "hypothesis>=6.100")
BUILD_TOOLS = ("setuptools>=77", "wheel", "ninja", "pybind11>=2.12")
OLD_INTERPRETER = ("2.10", "2.11")
"""Releases of torch whose Triton interprets kernels with NumPy before 2.4 only."""

INSTALL_SECONDS, BUILD_SECONDS, TEST_SECONDS = 3600, 3600, 3600
VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in ("torch", "triton", "numpy"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
import torch
json.dump({**found, "torch": torch.__version__, "cuda": torch.version.cuda}, sys.stdout)
"""

Record = dict[str, Any]


def find_python(wanted: str) -> str:
    """Return the program of a version such as 3.10, or the program itself; ValueError if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    releases = [path for path in pyenv.glob("*/bin/python") if path.parts[-3].startswith(f"{wanted}.")]
    newest = max(releases, key=lambda path: _numbers(path.parts[-3]), default=None)
    found = newest or shutil.which(wanted) or shutil.which(f"python{wanted}")
    if found is None:
        raise ValueError(f"no Python {wanted}: neither {pyenv} nor the PATH has it")
    return str(found)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def requirements(torch: str) -> list[str]:
    """Return what a cell needs beside vosops."""
    old = torch.startswith(tuple(f"{release}." for release in OLD_INTERPRETER)) or torch in OLD_INTERPRETER
    return ["torch" if torch == NEWEST else f"torch=={torch}", "numpy<2.4" if old else "numpy", *TOOLS]


def counts(report: str) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, from pytest's JUnit report."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def processor() -> str:
    """Return the name of this machine's processor."""
    from vosops import info

    return str(info.collect()["cpu"]["processor"])


def run(command: list[str | Path], seconds: int, **options: Any) -> None:
    """Run a command; SystemExit with the end of what it said if it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, **options
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")


def wheel() -> Path:
    """Return the newest wheel in dist/, built if there is none."""
    if not list((ROOT / "dist").glob("vosops-*.whl")):
        run([sys.executable, "-m", "build", "--wheel", "--no-isolation", str(ROOT)], BUILD_SECONDS)
    return max((ROOT / "dist").glob("vosops-*.whl"), key=lambda path: path.stat().st_mtime)


def environment_of(torch: str, python: str, folder: Path) -> Path:
    """Return the Python of an environment with that torch in `folder`, made unless it is there."""
    program = folder / "bin/python"
    if not program.exists():
        run([find_python(python), "-m", "venv", str(folder)], INSTALL_SECONDS)
    run([program, "-m", "pip", "install", "-q", *requirements(torch)], INSTALL_SECONDS)
    return program


def install(program: Path, *, source: bool) -> None:
    """Install vosops, and nothing else, into an environment."""
    pip: list[str | Path] = [program, "-m", "pip", "install", "-q"]
    if source:
        run([*pip, *BUILD_TOOLS], INSTALL_SECONDS)
        options = ["--no-deps", "--no-build-isolation", "--force-reinstall"]
        with tempfile.TemporaryDirectory() as copy:  # a build leaves files behind
            shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=_not_sources)
            run([*pip, *options, copy], BUILD_SECONDS, env={**os.environ, "VOSOPS_CUDA": "0"})
    else:
        run([*pip, "--no-deps", "--force-reinstall", wheel()], INSTALL_SECONDS)


def _not_sources(folder: str, names: list[str]) -> list[str]:
    if Path(folder) == ROOT:
        kept = {"csrc", "vosops", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
        kept |= {name for name in names if name.endswith((".py", ".in"))}
        return [name for name in names if name not in kept]
    return [name for name in names if name == "__pycache__" or name.endswith(".so")]


def test(program: Path, *, interpret: bool) -> tuple[dict[str, int], str]:
    """Run the tests in an environment, away from the sources: the counts, and the end of what pytest said."""
    variables = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    variables.setdefault("VOSOPS_TEST_DATA", str(ROOT.parent / "shared"))
    variables |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "hubconf.py"):
            shutil.copy(ROOT / file, folder)
        command = [
            program,
            "-m",
            "pytest",
            "-n",
            "2",
            "--show-capture=no",
            f"--junitxml={folder / 'report.xml'}",
            *TESTS,
        ]
        done = subprocess.run(
            command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=TEST_SECONDS,
        )  # fmt: skip
        if not (folder / "report.xml").exists():
            raise SystemExit(f"pytest wrote no report:\n{done.stdout[-4000:]}")
        found = counts((folder / "report.xml").read_text())
    if done.returncode and not found["failed"]:
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return found, done.stdout[-4000:]


def merged(records: list[Record], new: Record) -> list[Record]:
    """Return the records with a new one in the place of an older one of the same cell, in order of versions."""

    def cell(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in ("torch", "python", "installed", "interpreted", "processor"))

    kept = [record for record in records if cell(record) != cell(new)]
    return sorted([*kept, new], key=lambda r: (_numbers(r["torch"].split("+")[0]), _numbers(r["python"])))


def load() -> list[Record]:
    """Return what was recorded so far."""
    return json.loads(RECORDS.read_text())["cells"] if RECORDS.exists() else []


def save(records: list[Record]) -> None:
    """Write the records, a line each."""
    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    RECORDS.write_text(f'{{\n "cells": [\n{lines}\n ]\n}}\n')


def main() -> None:
    """Run and record the cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="*", default=CELLS, metavar="TORCH@PYTHON")
    parser.add_argument("--source", action="store_true", help="build from source instead of taking the wheel")
    parser.add_argument(
        "--interpret", action="store_true", help="run Triton's kernels in its interpreter too"
    )
    parser.add_argument("--environments", type=Path, metavar="FOLDER", help="keep the environments here")
    arguments = parser.parse_args()
    cells = [cell.partition("@") for cell in arguments.cells]
    for torch, at, python in cells:
        if not (torch and at and python):
            parser.error(f"a cell is TORCH@PYTHON, got {torch + at + python!r}")
    failed = []
    for torch, _, python in cells:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (
                arguments.environments or Path(temporary)
            ).absolute() / f"torch{torch}-python{Path(python).name}"
            program = environment_of(torch, python, folder)
            install(program, source=arguments.source)
            versions = json.loads(subprocess.check_output([program, "-c", VERSIONS], text=True, timeout=120))
            found, said = test(program, interpret=arguments.interpret)
        record = versions | found
        record |= {"installed": "source" if arguments.source else "wheel", "interpreted": arguments.interpret}
        record |= {"date": datetime.date.today().isoformat(), "processor": processor()}
        save(merged(load(), record))
        print(json.dumps(record), flush=True)
        if found["failed"]:
            failed.append(f"torch {torch}, Python {python}:\n{said}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
