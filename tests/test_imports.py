"""Imports run one way, as CONTRIBUTING.md says: no room of the package imports one above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    ["_checks", "_deprecation", "_library", "_sources", "_verdicts", "reference", "triton"],
    ["backends", "ops"],
    ["nn", "memory", "compat"],
    ["models", "distributed"],
    ["io", "metrics", "data"],
    ["inference", "training"],
    ["runs", "integrations"],
    ["benchmarking", "info"],
    ["checking"],
    ["studio"],
    ["cli"],
]
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "vosops").with_suffix("").parts[0]


def imports_of(source: str, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that the source imports, inside functions too; not those for types alone."""
    tree = ast.parse(source)
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{name}.{alias.name}" for alias in node.names] if name == "vosops" else [name]
            yield from ((node.lineno, one) for one in names)


def upward(path: Path, source: str) -> list[str]:
    """What a file of the package imports from a room above its own."""
    package = list(path.relative_to(ROOT).parent.parts)
    own = RANK.get(room_of(path), len(LAYERS))
    found = []
    for line, name in imports_of(source, package):
        parts = name.split(".")
        if parts[0] == "vosops" and len(parts) > 1 and RANK.get(parts[1], -1) > own:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


def test_no_room_imports_one_above_it():
    files = sorted((ROOT / "vosops").rglob("*.py"))
    assert len(files) > 100
    assert not [problem for path in files for problem in upward(path, path.read_text())]


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in (ROOT / "vosops").rglob("*.py")} - {"__init__"}
    assert rooms == set(RANK)


def test_contributing_states_the_chain():
    [stated] = re.findall(
        r"Imports run one way: `(.*?)`", " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    )
    public = [[room for room in layer if not room.startswith("_")] for layer in LAYERS]
    assert stated == " -> ".join(", ".join(layer) for layer in public)


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("models/some.py", "from vosops.runs.job import Job", True),
        ("models/some.py", "def f():\n    import vosops.cli.segment", True),
        ("models/some.py", "from vosops import inference", True),
        ("metrics/some.py", "from ..inference import job", True),
        ("models/some.py", "if TYPE_CHECKING:\n    from vosops.inference import Job", False),
        ("models/some.py", "from vosops import ops, memory_read\nfrom . import other\nimport torch", False),
        ("inference/some.py", "from vosops.runs.job import Job", True),
        ("inference/some.py", "from .loop import TrackingLoop\nfrom vosops.models import Network", False),
    ],
)
def test_the_check_itself(file, source, found):
    assert bool(upward(ROOT / "vosops" / file, source)) == found


def test_the_page_and_its_web_server_are_brought_by_its_command_alone():
    """vosops[studio] is for nobody else; its command imports the page when it runs, not when it is listed."""
    wanted = re.compile(r"(starlette|uvicorn|websockets|vosops\.studio)\b")
    found = set()
    for path in (ROOT / "vosops").rglob("*.py"):
        source, package = path.read_text(), list(path.relative_to(ROOT).parent.parts)
        if room_of(path) == "studio" or not re.search("starlette|uvicorn|websockets|studio", source):
            continue
        if any(wanted.match(name) for _, name in imports_of(source, package)):
            found.add(str(path.relative_to(ROOT)))
    assert found == {"vosops/cli/studio.py"}
    command = ast.parse((ROOT / "vosops/cli/studio.py").read_text())
    at_once = ast.Module(
        [node for node in command.body if isinstance(node, (ast.Import, ast.ImportFrom))], []
    )
    assert "vosops.studio" not in ast.unparse(at_once)
