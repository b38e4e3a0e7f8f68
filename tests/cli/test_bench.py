"""`vosops bench` on the command line, on a case of a few pixels."""

import dataclasses
import json

import pytest
import typer
from typer.testing import CliRunner

import vosops.benchmarking.runner as runner
from vosops.benchmarking import BENCHMARKS, Case
from vosops.cli import bench as bench_command

QUICK = Case(
    "tiny",
    12,
    14,
    objects=2,
    radius=2,
    quick=True,
    goals={"tiled GEMM": 1e-9},
    goal_share=1e9,
    left_out={"unfold": "for the test", "torch.compile": "takes long to compile"},
)
TRAINING = dataclasses.replace(QUICK, name="tiny-training", backward=True, quick=False)


@pytest.fixture
def run(monkeypatch):
    tiny = dataclasses.replace(BENCHMARKS["local_matching"], cases=(QUICK, TRAINING))
    monkeypatch.setitem(BENCHMARKS, "local_matching", tiny)
    monkeypatch.setattr(runner, "bandwidth", lambda clock: 1e10)
    monkeypatch.setattr(runner, "_peak", lambda *_: 1_000_000)
    app = typer.Typer()
    app.callback()(lambda: None)
    bench_command.register(app)
    return lambda *args: CliRunner().invoke(app, ["bench", *map(str, args)], env={"COLUMNS": "120"})


def test_a_quick_run_shows_every_contender_and_the_goals(run):
    result = run("local_matching", "--quick")
    assert result.exit_code == 0, result.output
    for text in ("vosops", "CFBI loop", "running minimum", "tiled GEMM", "unfold left out: for the test"):
        assert text in result.stdout
    assert "of 1e-09 met" in result.stdout and "of 1e+09 MISSED" in result.stdout
    assert "tiny-training" not in result.stdout


def test_json_holds_every_run_and_the_machine(run, tmp_path):
    assert run("local_matching", "--case", "tiny-training", "--json", tmp_path / "r.json").exit_code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["machine"]["device"] == "cpu"
    (result,) = report["results"]
    assert result["case"] == "tiny-training" and result["clock"] == "process CPU time"
    ours, *others = result["variants"]
    assert ours["name"] == "vosops" and ours["speedup"] == 1.0 and len(ours["runs"]) == 9
    assert {v["name"] for v in others} == {"CFBI loop", "running minimum", "tiled GEMM"}
    assert result["goals"]["x tiled GEMM"]["met"]


def test_the_plot_is_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert run("local_matching", "--quick", "--plot", tmp_path / "p.png").exit_code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_contender_that_computes_something_else_stops_the_run(run, monkeypatch):
    benchmark = BENCHMARKS["local_matching"]
    wrong = dataclasses.replace(benchmark.variants[1], formulation=lambda q, k, m, r: m.float())
    monkeypatch.setitem(
        BENCHMARKS, "local_matching", dataclasses.replace(benchmark, variants=(benchmark.variants[0], wrong))
    )
    result = run("local_matching", "--quick")
    assert result.exit_code == 1
    assert "local_matching tiny: CFBI loop and vosops disagree in" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("convolution",),
            "OP: expected one of local_matching, global_matching, memory_read, global_conv, conv_lstm, all; "
            "got 'convolution'",
        ),
        (("local_matching", "--case", "huge"), "--case: expected one of tiny, tiny-training; got 'huge'"),
        (("local_matching", "--dtype", "int8"), "--dtype: expected one of"),
        (("local_matching", "--device", "tpu"), "--device: expected cpu or cuda"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.count("\n") == 1
