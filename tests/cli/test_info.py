"""`vosops info` on the command line, and `python -m vosops.info` without optional packages."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

import vosops
from vosops import info
from vosops.cli import info as info_command
from vosops.ops._registration import TRITON_INTERPRETED


@pytest.fixture
def run():
    app = typer.Typer()
    app.callback()(lambda: None)
    info_command.register(app)
    return lambda *args: CliRunner().invoke(app, ["info", *args])


def test_it_names_the_versions_and_the_loaded_library(run):
    result = run()
    assert result.exit_code == 0
    shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if " " in line)
    assert shown["vosops"] == vosops.__version__
    assert shown["torch"] == torch.__version__


def test_it_says_what_serves_each_op_on_cpu_and_gpu_and_why_not_the_others():
    ops = info.collect()["ops"]
    assert list(ops) == vosops.list_ops()
    for op, devices in ops.items():
        for explanation in devices.values():
            first, *rest = explanation.splitlines()
            assert first.startswith(f"{op}: ")
            names = [line.split()[0] for line in rest]
            assert names in (["cpp", "triton", "reference"], ["cpp", "reference"])
            assert all(len(line.split()) > 1 for line in rest), "every implementation has a reason"
        has_triton = "triton" in devices["cpu"].split()
        assert TRITON_INTERPRETED or not has_triton or "Triton compiles for GPUs" in devices["cpu"]


def test_json_is_the_same_facts(run):
    facts = json.loads(run("--json").stdout)
    assert facts == json.loads(json.dumps(info.collect()))


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    facts = info.collect()
    facts["optional"]["av"] = None
    assert "av (pip install 'vosops[video]')" in info.describe(facts)


def test_a_missing_build_is_said():
    facts = info.collect()
    facts["build"] = {"libraries": "none"}
    facts["cpu"] |= {"library": None, "library_missing": ["it was not built"]}
    text = info.describe(facts)
    assert "vosops/build_info.json does not exist" in text
    assert "none: it was not built" in text


@pytest.mark.parametrize("content", [None, "not json"])
def test_without_build_information_the_module_is_asked(content, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "build_info.json").write_text(content)
    module = SimpleNamespace(build_info=lambda: {"summary": "of the module"})
    monkeypatch.setitem(sys.modules, "vosops._C", module)
    assert info._build_info(tmp_path) == {"summary": "of the module"}
    monkeypatch.setitem(sys.modules, "vosops._C", None)
    assert info._build_info(tmp_path) == {}
    (tmp_path / "build_info.json").write_text('{"summary": "of the file"}')
    assert info._build_info(tmp_path) == {"summary": "of the file"}


def test_the_module_needs_no_optional_package():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'av', 'PIL', 'torchvision']));"
    code = f"{blocked} import runpy; runpy.run_module('vosops.info', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("vosops ")
