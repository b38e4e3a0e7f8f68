"""The oracle shares no code with what it judges: the reference stands alone, and the ops take only its cores."""

import ast
from pathlib import Path

import pytest

import vosops

FOLDER = Path(vosops.__file__).parent


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of the package's own."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == "vosops"]


@pytest.mark.parametrize("path", sorted((FOLDER / "reference").glob("*.py")), ids=lambda path: path.name)
def test_the_reference_imports_nothing_but_the_reference(path):
    assert [(m, n) for m, n in imports(path) if not m.startswith("vosops.reference")] == []


@pytest.mark.parametrize("path", sorted((FOLDER / "ops").glob("*.py")), ids=lambda path: path.name)
def test_an_op_takes_from_the_reference_only_what_serves_as_its_plain_implementation(path):
    taken = [name for module, name in imports(path) if module.startswith("vosops.reference")]
    assert [name for name in taken if not name.endswith("_core")] == []
