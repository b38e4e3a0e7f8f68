"""benchmarks/matrix.py: cells, what they need, and what is recorded of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.docs.test_compatibility import cell
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def matrix():
    return load_script(ROOT / "benchmarks/matrix.py")


def test_numpy_is_one_that_the_triton_of_that_torch_interprets_with(matrix):
    assert matrix.requirements("2.11.0")[:2] == ["torch==2.11.0", "numpy<2.4"]
    assert matrix.requirements("2.10")[:2] == ["torch==2.10", "numpy<2.4"]
    assert matrix.requirements("2.12.0")[:2] == ["torch==2.12.0", "numpy"]
    assert matrix.requirements("newest")[:2] == ["torch", "numpy"]


def test_counts_of_a_run(matrix):
    report = '<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"/></testsuites>'
    assert matrix.counts(report) == {"passed": 4, "failed": 3, "skipped": 3}


def test_a_cell_that_runs_again_replaces_its_record(matrix):
    old, other = cell(failed=3), cell("2.9.1", "3.12.1")
    records = matrix.merged([other, old], cell())
    assert records == [other, cell()]
    for difference in ({"installed": "source"}, {"interpreted": True}, {"processor": "Arm"}):
        assert len(matrix.merged(records, cell(**difference))) == 3


def test_records_are_in_the_order_of_versions(matrix):
    records = []
    for torch, python in (("2.14.1", "3.12.3"), ("2.9.0+cpu", "3.13.0"), ("2.14.1", "3.9.2")):
        records = matrix.merged(records, cell(torch, python))
    assert [(r["torch"], r["python"]) for r in records] == [
        ("2.9.0+cpu", "3.13.0"),
        ("2.14.1", "3.9.2"),
        ("2.14.1", "3.12.3"),
    ]


def test_records_are_read_as_they_were_written(matrix, monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "RECORDS", tmp_path / "matrix.json")
    assert matrix.load() == []
    records = [cell(), cell("2.12.0")]
    matrix.save(records)
    assert matrix.load() == records
    assert len([line for line in matrix.RECORDS.read_text().splitlines() if "torch" in line]) == 2


def test_a_python_is_found_by_its_version(matrix, monkeypatch, tmp_path):
    for version in ("3.10.4", "3.10.20", "3.1.9"):
        program = tmp_path / "versions" / version / "bin/python"
        program.parent.mkdir(parents=True)
        program.symlink_to(sys.executable)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.find_python("3.10") == str(tmp_path / "versions/3.10.20/bin/python")
    assert matrix.find_python("3.1") == str(tmp_path / "versions/3.1.9/bin/python")
    assert matrix.find_python(sys.executable) == sys.executable
    with pytest.raises(ValueError, match=r"no Python 2\.99"):
        matrix.find_python("2.99")
