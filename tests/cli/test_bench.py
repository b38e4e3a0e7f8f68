"""`vosops bench` on the command line, on a case of a few pixels."""

import dataclasses
import json

import pytest
import typer
from typer.testing import CliRunner

import vosops.benchmarking.runner as runner
from vosops.benchmarking import BENCHMARKS, Case, Ceilings, systems, systems_suite
from vosops.benchmarking.systems import FITS, LIMIT, Measurement
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
    assert {"processor", "flags", "amx", "float32_precision"} <= set(report["machine"])
    (result,) = report["results"]
    assert result["case"] == "tiny-training" and result["clock"] == "process CPU time"
    ours, *others = result["variants"]
    assert ours["name"] == "vosops" and ours["speedup"] == 1.0 and len(ours["runs"]) == 9
    assert {v["name"] for v in others} == {"CFBI loop", "running minimum", "tiled GEMM"}
    assert result["goals"]["x tiled GEMM"]["met"]
    ratio = result["ratios"]["tiled GEMM"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]


def at_once(benchmark, case, **options):
    """What measuring a case comes to."""
    ours = runner.VariantResult("vosops", 1.0, 1.0, (1.0,), 1.0, None, speedup=1.0, share=0.5)
    return runner.Result(
        benchmark.op, case, (ours,), {}, 1e6, 1e6, Ceilings(1e9, 1e9, "a loop"), "wall time", 1, 0.5
    )


def test_a_case_that_is_measured_again_leaves_the_others_of_this_machine(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vosops.benchmarking.run_case", at_once)
    file = tmp_path / "r.json"
    assert run("local_matching", "--quick", "--json", file).exit_code == 0
    [quick] = json.loads(file.read_text())["results"]
    for _ in range(2):
        assert run("local_matching", "--case", "tiny-training", "--json", file).exit_code == 0
        report = json.loads(file.read_text())
        assert [r["case"] for r in report["results"]] == ["tiny", "tiny-training"]
        assert report["results"][0] == quick
    report["machine"]["processor"] = "Another Processor"
    file.write_text(json.dumps(report))
    assert run("local_matching", "--case", "tiny-training", "--json", file).exit_code == 0
    assert [r["case"] for r in json.loads(file.read_text())["results"]] == ["tiny-training"]


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
            f"OP: expected one of {', '.join(BENCHMARKS)}, all, systems; got 'convolution'",
        ),
        (("local_matching", "--case", "huge"), "--case: expected one of tiny, tiny-training; got 'huge'"),
        (("local_matching", "--dtype", "int8"), "--dtype: expected one of"),
        (("local_matching", "--device", "tpu"), "--device: expected cpu or cuda"),
        (("local_matching", "--json", "absent/r.json"), "--json absent/r.json: folder"),
        (("local_matching", "--plot", "p.xyz"), "--plot: p.xyz: expected a name that ends with"),
        (("local_matching", "--network", "stm"), "--network cannot be combined with local_matching"),
        (("systems", "--quick"), "--quick cannot be combined with systems"),
        (("systems", "--assert-fastest"), "--assert-fastest cannot be combined with systems"),
        (("systems", "--device", "cuda"), "--device cannot be combined with systems"),
        (
            ("systems", "--network", "alexnet"),
            "--network: expected one of stm, rgmp, feelvos, lstm_icnet; got 'alexnet'",
        ),
        (("systems", "--case", "stm-1p"), "--case: expected one of stm-480p"),
        (("systems", "--way", "thrifty"), "--way: expected one of frugal, naive; got 'thrifty'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_the_help_names_every_op(run):
    shown = run("--help").stdout
    assert [op for op in (*BENCHMARKS, "all", "systems") if op not in shown] == []


def test_what_was_measured_is_kept_when_a_later_case_fails(run, monkeypatch, tmp_path):
    """The second case disagrees; the first one's result is in the file by then."""

    def fail_the_second(benchmark, case, **options):
        if case is TRAINING:
            raise runner.DisagreementError("they disagree")
        return at_once(benchmark, case)

    monkeypatch.setattr("vosops.benchmarking.run_case", fail_the_second)
    result = run("local_matching", "--json", tmp_path / "r.json")
    assert result.exit_code == 1 and "they disagree" in result.stderr
    assert [r["case"] for r in json.loads((tmp_path / "r.json").read_text())["results"]] == ["tiny"]


@pytest.mark.parametrize(
    ("peer", "threads", "load", "lost"),
    [
        ([0.9] * 9, 1, 5.0, True),
        ([0.9] * 2 + [0.99] * 7, 1, 5.0, False),
        ([0.9] * 7 + [0.99] * 2, 1, 5.0, False),
        ([0.9] * 8 + [0.99], 1, 5.0, True),
        ([1.5] * 9, 1, 5.0, False),
        ([0.9] * 5, 1, 5.0, False),
        ([0.9] * 9, 2, 5.0, False),
        ([0.9] * 9, 2, 0.1, True),
    ],
)
def test_a_verdict_fails_where_a_peer_is_faster_beyond_doubt(run, monkeypatch, peer, threads, load, lost):
    """Of 9 rounds the eighth largest ratio decides; variants of vosops are no peers."""
    efforts = []

    def measured(benchmark, case, *, effort, **options):
        efforts.append(effort)
        runs = {"vosops": [1.0] * 9, "vosops float32": [0.1] * 9, "tiled GEMM": peer}
        variants = tuple(
            runner.VariantResult(name, times[0], min(times), tuple(times), 1.0, None, times[0], 0.5)
            for name, times in runs.items()
        )
        ceilings = Ceilings(1e9, 1e9, "a loop")
        return runner.Result(benchmark.op, case, variants, {}, 1e6, 1e6, ceilings, "a clock", threads, load)

    monkeypatch.setattr("vosops.benchmarking.run_case", measured)
    result = run("local_matching", "--quick", "--assert-fastest")
    assert (result.exit_code == 1) == lost, result.output
    assert (
        "local_matching tiny: tiled GEMM takes 0.90 times as long (0.90 to 0.90)" in result.stderr
    ) == lost
    assert ("not judged, the load average was 5.0" in result.stdout) == (threads == 2 and load > 1)
    (effort,) = efforts
    assert effort.rounds == effort.least == 9


class TestSystems:
    """Whole networks; what a measurement is made of is in tests/benchmarking/test_systems.py."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """What was measured, with figures that tell the ways apart."""
        asked = []

        def measure(case, *, naive, threads, limit):
            asked.append((case.name, naive, threads, limit))
            return Measurement(case, naive, 1.5 + naive, 10**9 * (1 + naive), 10**6)

        def search(case, *, naive, threads, note):
            note("searching")
            return measure(FITS["stm-fits"], naive=naive, threads=threads, limit=None)

        monkeypatch.setattr(systems_suite, "measure", measure)
        monkeypatch.setattr(systems_suite, "largest_that_fits", search)
        return asked

    def test_the_cases_of_a_network_both_ways(self, run, asked):
        result = run("systems", "--network", "rgmp", "--threads", 2, "--limit", 3)
        assert result.exit_code == 0, result.output
        assert asked[:6] == [
            (f"rgmp-{size}", naive, 2, 3 * 10**9)
            for size in ("480p", "1080p", "4K")
            for naive in (False, True)
        ]
        assert len(asked) == 8 and "searching" in result.stdout
        row = next(line for line in result.stdout.splitlines() if line.lstrip().startswith("rgmp-480p  "))
        assert row.split("  ")[-1].strip() == "2.00 GB" and "1.5 s" in row and "2.5 s" in row

    def test_what_takes_minutes_is_measured_by_name_alone(self, run, asked):
        assert run("systems", "--network", "feelvos", "--way", "frugal").exit_code == 0
        assert "feelvos-4K" not in {name for name, *_ in asked}
        assert run("systems", "--case", "feelvos-4K", "--way", "frugal").exit_code == 0
        assert asked[-1] == ("feelvos-4K", False, 1, LIMIT)

    def test_json_replaces_what_was_measured_again_and_keeps_the_rest(self, run, asked, tmp_path):
        file = tmp_path / "r.json"
        assert run("systems", "--case", "stm-1080p", "--json", file).exit_code == 0
        assert run("systems", "--case", "stm-480p", "--way", "naive", "--json", file).exit_code == 0
        assert run("systems", "--case", "stm-1080p", "--threads", 2, "--json", file).exit_code == 0
        report = json.loads(file.read_text())
        assert report["machine"]["device"] == "cpu"
        assert [(r["name"], r["naive"], r["threads"]) for r in report["results"]] == [
            ("stm-480p", True, 1),
            ("stm-1080p", False, 2),
            ("stm-1080p", True, 2),
        ]
        assert all(r["load"] >= 0 for r in report["results"])

    def test_a_file_of_something_else_is_left_alone(self, run, asked, tmp_path):
        (tmp_path / "r.json").write_text('{"results": [{"case": "tiny"}]}')
        result = run("systems", "--case", "stm-480p", "--json", tmp_path / "r.json")
        assert result.exit_code == 2 and asked == []
        assert "r.json: is not a results file of bench systems" in result.stderr

    def test_a_small_network_is_measured_for_real(self, run, monkeypatch):
        small = systems.Case("rgmp", "480p", (32, 48), objects=1, frames=2)
        monkeypatch.setitem(systems_suite.CASES, "rgmp-480p", small)
        monkeypatch.setattr(systems, "run_fresh", lambda module, name, *args: getattr(systems, name)(*args))
        monkeypatch.setattr(systems, "_hold_to", lambda limit: None)
        result = run("systems", "--case", "rgmp-480p", "--way", "frugal")
        assert result.exit_code == 0, result.output
        assert "48 x 32" in result.stdout and " GB" in result.stdout
