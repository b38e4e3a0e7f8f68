"""tools/test_arm.py (`make test-arm`), without what takes minutes: what it refuses, and what it records."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return load_script(ROOT / "tools/test_arm.py")


def called(script, monkeypatch, *arguments):
    """The message that the script ends with."""
    monkeypatch.setattr("sys.argv", ["test_arm.py", *arguments])
    with pytest.raises(SystemExit) as end:
        script.main()
    return str(end.value)


def test_a_tool_that_is_not_there_is_named_with_its_package(script, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "qemu-aarch64" else name)
    said = called(script, monkeypatch)
    assert said == "test-arm: needs qemu-aarch64; apt-get install g++-aarch64-linux-gnu qemu-user"


def test_an_unknown_processor_is_refused_before_anything_is_compiled(script, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    listed = subprocess.CompletedProcess([], 1, stdout="Available CPUs:\n  cortex-a76\n  max\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: listed)
    said = called(script, monkeypatch, "--processors", "max", "pentium")
    assert said.startswith("test-arm: --processors must be of those") and said.endswith("got 'pentium'")


def test_a_record_takes_the_place_of_an_older_one_of_its_processor(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "RECORDS", tmp_path / "arm.json")
    for processor, passed in (("max", 1), ("cortex-a76", 2), ("max", 3)):
        script.keep({"processor": processor, "passed": passed})
    runs = json.loads(script.RECORDS.read_text())["runs"]
    assert runs == [{"processor": "cortex-a76", "passed": 2}, {"processor": "max", "passed": 3}]
