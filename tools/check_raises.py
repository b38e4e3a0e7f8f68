"""Removes each `raise` of the package, one at a time, and says which of them no test notices.

Two steps, because running every test for every `raise` would take days:
1. The tests run once under coverage, which notes the tests that reach each line.
2. Each `raise` in turn becomes `pass` in a copy of the sources, and the tests that reached it run until one fails.

    python tools/check_raises.py [--rooms io runs ...] [--tests tests/io ...] [--out raises.json]

Needs coverage and pytest-cov. A `raise` without an argument, which passes an error on, stays. Those that no test
reaches are counted apart: some need a GPU, another processor or a package that is missing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_TESTS = 12
"""Of the tests that reach a line so many are tried, spread over the files they lie in."""


FIRST_TESTS = 2
"""So many are tried before the others are as much as collected."""

TEST_SECONDS = 60
"""A test that takes longer without the statement, because threads wait for each other, has noticed."""

PRELOADED = (
    "torch",
    "pytest",
    "hypothesis",
    "numpy",
    "scipy.ndimage",
    "PIL.Image",
    "av",
    "torchvision",
    "typer",
    "rich.table",
)
"""What tests import besides the package; every fork then has it."""


@dataclass
class Raise:
    """One statement and what came of its removal."""

    path: str
    line: int
    last_line: int
    text: str
    tests: int = 0
    verdict: str = "not reached"  # or "noticed", "unnoticed"
    test: str = ""  # that noticed


def find_raises(rooms: list[str]) -> Iterator[Raise]:
    """Yield every `raise` with an argument in the package, or in some of its rooms."""
    for path in sorted((ROOT / "vosops").rglob("*.py")):
        name = path.relative_to(ROOT)
        if rooms and not any(str(name).startswith(f"vosops/{room}") for room in rooms):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                text = ast.unparse(node.exc)
                yield Raise(str(name), node.lineno, node.end_lineno or node.lineno, text[:100])


def measure(copy: Path, tests: list[str], data: Path) -> None:
    """Run the tests under coverage, each test a context of its own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--cov=vosops",
        "--cov-context=test",
    ]
    command += ["--cov-report=", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "COVERAGE_FILE": str(data), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=copy, env=environment)


def reaching(data: Path, copy: Path, found: Raise) -> list[str]:
    """Return the tests that reached a line: of every test file some, the ones with the shortest names first."""
    from coverage.numbits import numbits_to_nums

    with sqlite3.connect(data) as database:
        rows = database.execute(
            "select context.context, line_bits.numbits from line_bits join file on file.id = line_bits.file_id "
            "join context on context.id = line_bits.context_id where file.path = ?",
            (str(copy / found.path),),
        )
        names = {
            context.partition("|")[0]
            for context, bits in rows
            if context and found.line in numbits_to_nums(bits)
        }
    found.tests = len(names)
    by_file: dict[str, list[str]] = {}
    for name in sorted(names, key=len):
        by_file.setdefault(name.partition("::")[0], []).append(name)
    turns = [name for turn in zip_longest(*by_file.values()) for name in turn if name]
    return turns[:MOST_TESTS]


def without(source: str, found: Raise) -> str:
    """Return the source with `pass` in place of the statement, every other line where it was."""
    lines = source.splitlines(keepends=True)
    first = lines[found.line - 1]
    indent = first[: len(first) - len(first.lstrip())]
    lines[found.line - 1] = f"{indent}pass\n"
    for i in range(found.line, found.last_line):
        lines[i] = "\n"
    return "".join(lines)


def try_without(copy: Path, found: Raise, tests: list[str]) -> None:
    """Run the tests without the statement until one notices."""
    target = copy / found.path
    source = target.read_text()
    target.write_text(without(source, found))
    for part in (tests[:FIRST_TESTS], tests[FIRST_TESTS:]):
        found.test = first_failure(copy, part) if part else ""
        if found.test:
            break
    target.write_text(source)
    found.verdict = "noticed" if found.test else "unnoticed"


def first_failure(copy: Path, tests: list[str]) -> str:
    """Return the first test that fails in a fork of this process, which has not imported the package, or ""."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        failed: list[str] = []
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            import pytest

            class Note:
                def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                    if report.failed:
                        failed.append(report.nodeid)

            code = pytest.main(
                [
                    "-q",
                    "-x",
                    "-p",
                    "no:cacheprovider",
                    "-p",
                    "no:xdist",
                    "-o",
                    f"timeout={TEST_SECONDS}",
                    *tests,
                ],
                plugins=[Note()],
            )
            if code not in (0, 1) and not failed:
                failed.append(f"pytest ended with {code}")
        except BaseException as error:
            failed.append(f"{type(error).__name__}: {error}"[:200])
        os.write(writer, "\n".join(failed).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return text.partition("\n")[0] or (f"a test took over {TEST_SECONDS} s" if status else "")


def main() -> int:
    """Return 1 if a `raise` that some test reaches can go unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rooms", nargs="*", default=[], help="parts of vosops/ to look at; all by default")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="tests that may notice")
    parser.add_argument("--data", type=Path, help="a coverage file of an earlier run, kept where it is new")
    parser.add_argument(
        "--after",
        nargs="*",
        default=[],
        type=Path,
        help="JSON of earlier runs; what they noticed is not tried again",
    )
    parser.add_argument("--out", type=Path, help="write every verdict to this JSON file")
    given = parser.parse_args()
    known = {
        (row["path"], row["text"]): Raise(**row)
        for path in given.after
        for row in json.loads(path.read_text())
        if row["verdict"] == "noticed"
    }
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "vosops"
        ignored = shutil.ignore_patterns(
            ".git", ".venv*", "build", "__pycache__", "*.egg-info", "demo-output"
        )
        shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        if (ROOT.parent / "shared").exists():
            (Path(scratch) / "shared").symlink_to(ROOT.parent / "shared")
        data = (given.data or Path(scratch) / "coverage").resolve()
        if not data.exists():
            measure(copy, given.tests, data)
            with sqlite3.connect(data) as database:  # paths of this copy become those of the next one
                database.execute("update file set path = replace(path, ?, '')", (f"{copy}/",))
        with sqlite3.connect(data) as database:
            database.execute("update file set path = ? || path where path not like '/%'", (f"{copy}/",))
        sys.dont_write_bytecode = True
        os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
        for module in PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        results = []
        for found in find_raises(given.rooms):
            if (found.path, found.text) in known:
                results.append(known[found.path, found.text])
                continue
            tests = reaching(data, copy, found)
            if tests:
                try_without(copy, found, tests)
            results.append(found)
            if found.verdict != "noticed":
                print(f"{found.path}:{found.line}: {found.verdict}: {found.text}", flush=True)
        with sqlite3.connect(data) as database:
            database.execute("update file set path = replace(path, ?, '')", (f"{copy}/",))
    counts = {
        verdict: sum(r.verdict == verdict for r in results)
        for verdict in ("noticed", "unnoticed", "not reached")
    }
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if given.out:
        given.out.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return 1 if counts["unnoticed"] else 0


if __name__ == "__main__":
    sys.exit(main())
