"""benchmarks/gpu_check.sh without a GPU: what it runs, how it goes on, what it writes, its timing on CPU tensors."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import gpu_check as gpu
from benchmarks.gpu_check import Done, Run
from vosops.benchmarking import gpu_cases, gpu_steps
from vosops.benchmarking.gpu_cases import CELLS, MODES, SMALL, Case, Cell, MemorySize
from vosops.benchmarking.gpu_steps import FAILED, PASSED, SKIPPED, UNFINISHED, Outcome
from vosops.benchmarking.measure import Clock
from vosops.ops import _registration

CPU = torch.device("cpu")
CARD = {
    "name": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "memory": "81559 MiB",
    "capability": "9.0",
    "count": 1,
}
LIMITS = {"flops_per_second": dict.fromkeys(MODES, 1e12), "bytes_per_second": 1e11}
SMI_ROW = "NVIDIA H100 80GB HBM3, 580.1, 81559 MiB, 9.0\n"


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """The garbage collector runs before each timing; it need not look through what the imports made."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Triton's kernels are for GPUs here, also where other tests interpret them."""
    monkeypatch.setattr(_registration, "TRITON_INTERPRETED", False)


class Machine:
    """Stands for the commands of a machine: the first part that a command contains says how it ends."""

    def __init__(self, **endings: Done) -> None:
        self.endings = {"nvidia_smi": Done(0, SMI_ROW), "nvcc": Done(0, "release 13.0, V13"), **endings}
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, command, environment, seconds) -> Done:
        self.commands.append(list(command))
        self.environments.append(dict(environment))
        text = " ".join(command).replace("-", "_")
        return next((done for part, done in self.endings.items() if part in text), Done(1, "unknown command"))


@pytest.fixture
def new_run(tmp_path):
    """Opens the run of a commit on the card, with the commands of a machine."""

    def open_run(machine: Machine | None = None, commit: str = "c" * 40) -> Run:
        run = Run.open(tmp_path, CARD, commit, machine or Machine())
        run.report.setdefault("command", ["gpu_check.sh"])
        return run

    return open_run


@pytest.fixture
def stub_steps(monkeypatch):
    """Every step passes at once and notes its name and how long it was allowed to take."""
    called: dict[str, float] = {}

    def stub(name):
        def step(run, seconds):
            called[name] = seconds
            cells = {cell.key: {"failed": "stub"} for cell in CELLS} if name == "times" else {}
            return Outcome(PASSED, [], {"cells": cells})

        return step

    monkeypatch.setattr(gpu, "STEPS", {name: stub(name) for name in gpu.STEPS})
    monkeypatch.setattr(
        gpu.Run, "is_done", lambda run, step: run.report["steps"].get(step, {}).get("status") == PASSED
    )
    return called


def silent(_: str) -> None: ...


# ---- Which steps


def test_only_names_steps_in_any_order_and_they_run_in_theirs():
    assert gpu.parse_steps(None) == ["build", "tests", "runtime", "sanitizer", "ceilings", "times"]
    assert gpu.parse_steps("times, build") == ["build", "times"]


@pytest.mark.parametrize("text", ["", "bild", "build,timing"])
def test_an_unknown_step_is_refused_with_the_names_there_are(text):
    with pytest.raises(ValueError, match="--only takes build, tests, .*times; got"):
        gpu.parse_steps(text)


def test_the_steps_share_eight_minutes():
    assert sum(gpu.SHARES.values()) == gpu.SECONDS == 480
    steps = list(gpu.STEPS)
    left = gpu.SECONDS
    for step in steps:
        allowed = gpu.allowance(step, steps, left)
        assert allowed == pytest.approx(gpu.SHARES[step])
        left -= allowed


def test_a_step_gets_what_earlier_ones_left_over_and_one_alone_gets_everything():
    assert gpu.allowance("times", ["ceilings", "times"], 400) == 400
    assert gpu.allowance("times", ["times"], 480) == 480


# ---- Going on


def test_all_steps_run_once_and_are_kept(new_run, stub_steps):
    run = new_run()
    assert gpu.execute(run, list(gpu.STEPS), 480, silent)
    assert list(stub_steps) == list(gpu.STEPS)
    report = json.loads(run.file.read_text())
    assert gpu.problems(report) == []
    assert {step["status"] for step in report["steps"].values()} == {PASSED}


def test_a_finished_step_of_the_same_commit_is_not_repeated(new_run, stub_steps):
    gpu.execute(new_run(), ["build", "tests"], 480, silent)
    stub_steps.clear()
    said = []
    assert gpu.execute(new_run(), ["build", "tests", "ceilings"], 480, said.append)
    assert list(stub_steps) == ["ceilings"]
    assert said[:2] == ["build: passed before, at this commit", "tests: passed before, at this commit"]


def test_another_commit_is_another_run(new_run, stub_steps):
    first, second = new_run(), new_run(commit="d" * 40)
    gpu.execute(first, ["build"], 480, silent)
    gpu.execute(second, ["build"], 480, silent)
    assert first.file != second.file and first.file.exists() and second.file.exists()
    assert first.file.name == f"gpu_nvidia-h100-80gb-hbm3_{'c' * 12}.json"


def test_a_step_without_time_is_skipped_and_says_so(new_run, stub_steps):
    run = new_run()
    assert not gpu.execute(run, ["build", "tests"], 4, silent)
    assert run.report["steps"]["tests"]["status"] == SKIPPED
    assert run.report["steps"]["tests"]["reasons"] == ["no time was left"]
    assert not run.is_done("tests")


def test_what_needs_the_library_is_skipped_without_it_and_the_peers_are_timed(
    new_run, stub_steps, monkeypatch
):
    monkeypatch.setitem(gpu.STEPS, "build", lambda run, seconds: Outcome(FAILED, ["no nvcc"]))
    run = new_run()
    assert not gpu.execute(run, list(gpu.STEPS), 480, silent)
    assert list(stub_steps) == ["ceilings", "times"]
    assert run.report["steps"]["tests"]["reasons"] == ["the build failed"]


def test_a_step_that_raises_fails_and_the_others_run(new_run, stub_steps, monkeypatch):
    def broken(run, seconds):
        raise KeyError("what")

    monkeypatch.setitem(gpu.STEPS, "ceilings", broken)
    run = new_run()
    gpu.execute(run, ["ceilings", "times"], 480, silent)
    assert run.report["steps"]["ceilings"]["reasons"] == ["KeyError: 'what'"]
    assert "times" in stub_steps
    assert gpu.problems(json.loads(run.file.read_text())) == []


def test_times_is_done_when_every_cell_is(new_run, monkeypatch):
    monkeypatch.setattr(gpu, "CELLS", SMALL)
    run = new_run()
    first, *others = SMALL
    run.keep("times", Outcome(FAILED, ["one is wrong"], {"cells": {first.key: {"failed": "x"}}}), 1.0)
    assert not run.is_done("times")
    assert run.unmeasured("times") == [cell.key for cell in others]
    run.keep("times", Outcome(PASSED, [], {"cells": {cell.key: {"failed": "x"} for cell in SMALL}}), 1.0)
    assert run.is_done("times")
    assert run.report["steps"]["times"]["seconds"] == 2.0


# ---- The machine


def test_the_card_is_read_from_nvidia_smi():
    assert gpu.find_device(Machine()) == CARD
    two = Machine(nvidia_smi=Done(0, SMI_ROW * 2))
    assert gpu.find_device(two)["count"] == 2


@pytest.mark.parametrize("ending", [Done(127, "no such file"), Done(0, ""), Done(9, "driver failed")])
def test_no_card_is_said_in_one_line(ending):
    with pytest.raises(RuntimeError, match="no NVIDIA GPU here"):
        gpu.find_device(Machine(nvidia_smi=ending))


def test_changed_sources_are_another_commit():
    clean = Machine(rev_parse=Done(0, "abc\n"), status=Done(0, ""))
    changed = Machine(rev_parse=Done(0, "abc\n"), status=Done(0, " M csrc/ops.cpp"))
    without_git = Machine(rev_parse=Done(128, "fatal: not a git repository"))
    assert gpu.find_commit(clean) == "abc"
    assert gpu.find_commit(changed) == f"abc-{gpu.digest(gpu.ROOT)}"
    assert gpu.find_commit(without_git) == f"tree-{gpu.digest(gpu.ROOT)}"


def test_the_digest_is_that_of_the_sources(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("a")
    (tmp_path / "csrc/a.cu").write_text("b")
    before = gpu.digest(tmp_path)
    (tmp_path / "csrc/a.so").write_text("not a source")
    assert gpu.digest(tmp_path) == before
    (tmp_path / "csrc/a.cu").write_text("c")
    assert gpu.digest(tmp_path) != before


def test_a_command_that_takes_too_long_is_ended_with_its_children():
    started = time.monotonic()
    done = gpu.run_command(["sh", "-c", "echo begun; sleep 30 & wait"], {}, 0.5)
    assert done.timed_out and done.output == "begun\n"
    assert time.monotonic() - started < 10


def test_a_command_that_is_not_there_is_no_crash():
    assert gpu.run_command(["no-such-program-anywhere"], {}, 5).code == 127


# ---- The steps that run commands


def test_build_is_for_this_card_alone(new_run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    (tmp_path / "vosops").mkdir()
    stale = tmp_path / "vosops/libvosops_cpu_avx512.so"
    stale.write_text("of another commit")
    machine = Machine(setup=Done(0, "vosops: built cpu_baseline and cuda (9.0)"))
    assert gpu.build(new_run(machine), 100).status == PASSED
    assert not stale.exists()
    wanted = {"TORCH_CUDA_ARCH_LIST": "9.0", "VOSOPS_CPU_ONLY": "baseline"}
    assert wanted.items() <= machine.environments[-1].items()


@pytest.mark.parametrize(
    ("ending", "status", "why"),
    [
        (
            Done(0, "vosops: built cpu_baseline; left out cuda"),
            FAILED,
            "built without the CUDA library: is nvcc there?",
        ),
        (Done(1, "x.cu\nerror: it is wrong"), FAILED, "setup.py: error: it is wrong"),
        (Done(-9, "[1/9]", timed_out=True), UNFINISHED, "not built after 100 s"),
    ],
)
def test_a_build_that_failed_says_why(new_run, tmp_path, monkeypatch, ending, status, why):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    outcome = gpu.build(new_run(Machine(setup=ending)), 100)
    assert (outcome.status, outcome.reasons) == (status, [why])


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.A" name="t[cpp-cuda]"/>
<testcase classname="tests.ops.A" name="t[triton-cuda]"><skipped message="no Triton kernel"/></testcase>
<testcase classname="tests.ops.A" name="u[cpp-cuda]"><failure message="assert 1 == 2&#10;more"/></testcase>
</testsuite></testsuites>"""


def test_the_tests_are_counted_and_failures_named():
    assert gpu.read_junit(JUNIT) == {
        "passed": 1,
        "skipped": {"no Triton kernel": 1},
        "failures": {"tests.ops.A::u[cpp-cuda]": "assert 1 == 2"},
    }


class Pytest(Machine):
    """Writes a JUnit file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __call__(self, command, environment, seconds) -> Done:
        target = next(word for word in command if word.startswith("--junitxml="))
        Path(target.removeprefix("--junitxml=")).write_text(self.text)
        return Done(1, "")


def test_a_failing_test_is_named(new_run):
    run = new_run()
    run.command = Pytest(JUNIT)
    outcome = gpu.tests(run, 100)
    assert (outcome.status, outcome.reasons) == (FAILED, ["tests.ops.A::u[cpp-cuda]: assert 1 == 2"])


def test_tests_that_all_were_skipped_prove_nothing(new_run):
    run = new_run()
    run.command = Pytest("<testsuite><testcase name='t'><skipped message='no GPU'/></testcase></testsuite>")
    outcome = gpu.tests(run, 100)
    assert (outcome.status, outcome.reasons) == (FAILED, ["no test of a GPU ran"])


@pytest.mark.parametrize(
    ("output", "code", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, PASSED),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, PASSED),
        ("========= ERROR SUMMARY: 2 errors", 9, FAILED),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 9, FAILED),
        ("Device not supported", 1, FAILED),
    ],
)
def test_findings_of_the_sanitizer_are_counted(new_run, monkeypatch, output, code, status):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "compute-sanitizer")
    machine = Machine(compute_sanitizer=Done(code, output))
    outcome = gpu.sanitizer(new_run(machine), 50)
    assert outcome.status == status
    assert set(outcome.data) == {"memcheck", "racecheck", "initcheck"}
    assert [c[1] for c in machine.commands if c[0] == "compute-sanitizer"] != []


def test_without_compute_sanitizer_the_step_is_skipped(new_run, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    assert gpu.sanitizer(new_run(), 50).status == SKIPPED


# ---- A process that a kernel takes down


class Crashing(Machine):
    """The process of `times` measures one more cell each time and dies, until all are measured."""

    def __init__(self, run_file: Path) -> None:
        super().__init__()
        self.target = run_file.with_name(run_file.name + ".times")
        self.starts = 0

    def __call__(self, command, environment, seconds) -> Done:
        self.starts += 1
        cells = {cell.key: {"failed": "stub"} for cell in SMALL[: self.starts]}
        finished = len(cells) == len(SMALL)
        status = PASSED if finished else UNFINISHED
        self.target.write_text(json.dumps(Outcome(status, [], {"cells": cells}).to_dict()))
        return Done(0, "") if finished else Done(-6, "CUDA error: an illegal memory access")


def test_a_process_that_died_is_started_again_while_it_gets_further(new_run):
    run = new_run()
    run.command = Crashing(run.file)
    outcome = gpu.in_process("times")(run, 100)
    assert run.command.starts == len(SMALL)
    assert len(outcome.data["cells"]) == len(SMALL)
    assert outcome.reasons == ["the process of times: CUDA error: an illegal memory access"] * (
        len(SMALL) - 1
    )


def test_a_process_that_dies_at_once_is_not_started_forever(new_run):
    run = new_run(Machine(gpu_steps=Done(1, "ImportError: no torch")))
    outcome = gpu.in_process("ceilings")(run, 100)
    assert (outcome.status, outcome.reasons) == (FAILED, ["the process of ceilings: ImportError: no torch"])


# ---- The report's form


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r.pop("commit"), "commit must be str, got None"),
        (lambda r: r["device"].pop("driver"), "device must have driver"),
        (lambda r: r["steps"]["build"].update(status="fine"), "build: unknown status 'fine'"),
        (lambda r: r["steps"]["build"].update(status=FAILED), "build: failed without a reason"),
        (lambda r: r["steps"].update(other=r["steps"]["build"]), "there is no step other"),
    ],
)
def test_a_report_that_others_cannot_read_is_found(new_run, stub_steps, change, complaint):
    run = new_run()
    gpu.execute(run, ["build"], 480, silent)
    report = json.loads(run.file.read_text())
    assert gpu.problems(report) == []
    change(report)
    assert complaint in gpu.problems(report)


def test_the_committed_runs_can_be_read():
    for file in gpu.RESULTS.glob("gpu_*.json"):
        assert gpu.problems(json.loads(file.read_text())) == [], file.name


# ---- The command


def test_a_dry_run_needs_no_gpu_and_says_what_would_be_done():
    command = [str(gpu.ROOT / "benchmarks/gpu_check.sh"), "--dry-run", "--only", "ceilings,times"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert "ceilings   up to" in done.stdout and "build" not in done.stdout.splitlines()[1]
    assert all(cell.key in done.stdout for cell in CELLS)


def test_a_dry_run_leaves_out_what_is_done(new_run, stub_steps):
    run = new_run()
    gpu.execute(run, ["build"], 480, silent)
    assert gpu.plan(run, ["build", "ceilings"], 480).splitlines()[0] == "build      done before"


def test_without_a_gpu_the_command_ends_with_code_2(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "find_device", lambda: (_ for _ in ()).throw(RuntimeError("no NVIDIA GPU here")))
    with pytest.raises(SystemExit) as exit_:
        gpu.main(["--commit", "abc"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "no NVIDIA GPU here\n"


def test_a_full_run_writes_one_file(tmp_path, stub_steps, monkeypatch):
    monkeypatch.setattr(gpu, "find_device", lambda: CARD)
    with pytest.raises(SystemExit) as exit_:
        gpu.main(["--results", str(tmp_path), "--commit", "abc"])
    assert exit_.value.code == 0
    (file,) = tmp_path.iterdir()
    report = json.loads(file.read_text())
    assert gpu.problems(report) == []
    assert report["command"] == ["--results", str(tmp_path), "--commit", "abc"]


# ---- What is timed, on the CPU


def test_every_op_is_timed_in_every_arithmetic_forward_and_backward():
    for op in ("local_matching", "global_matching", "memory_read", "global_conv", "conv_lstm"):
        assert {c.mode for c in CELLS if c.op == op and not c.backward} == set(MODES)
        assert {c.mode for c in CELLS if c.op == op and c.backward} == set(MODES)
        assert any(c.compiled for c in CELLS if c.op == op)
    for backward in (False, True):  # which computes in float32 whatever is allowed
        cells = [c for c in CELLS if c.op == "local_attention" and c.backward == backward]
        assert {c.mode for c in cells} == {"ieee", "bf16", "f16"}
    assert any(c.compiled for c in CELLS if c.op == "local_attention")
    assert len({cell.key for cell in CELLS}) == len(CELLS)


DIFFERENTIATED = {
    "local_matching": 2,
    "global_matching": 2,
    "memory_read": 3,
    "global_conv": 5,
    "conv_lstm": 4,
    "local_attention": 3,
}
ATTENTION = Cell("memory_read", MemorySize("attention", 20, 3, 2, 8, 16, batch=2), "ieee")


@pytest.mark.parametrize("cell", [*SMALL, ATTENTION], ids=lambda cell: cell.key)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_contenders_agree_with_the_oracle_and_are_timed(cell, backward):
    result = gpu_steps.measure(replace(cell, backward=backward), Clock(), LIMITS, rounds=2)
    names = [v["name"] for v in result["variants"]]
    assert names[0] == "vosops cpp" and len(names) > 1
    for v in result["variants"]:
        assert v["right"], (v["name"], v["errors"])
        assert len(v["errors"]) == (1 + DIFFERENTIATED[cell.op] if backward else 1)
        assert len(v["runs"]) == 2 and v["median"] > 0
        assert v["share"] == pytest.approx(result["floor"] / v["median"])


def test_an_implementation_that_is_missing_is_a_reason():
    result = gpu_steps.measure(SMALL[0], Clock(), LIMITS, rounds=1)
    assert "Triton compiles for GPUs" in result["left_out"]["vosops triton"]


def test_all_attention_kernels_are_asked():
    problem = gpu_cases.problem(ATTENTION, CPU)
    names = [f"SDPA {name}{split}" for name in gpu_cases.SDPA for split in ("", ", values split")]
    names.remove("SDPA math, values split")
    assert set(names) <= set(problem.contenders)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "values split"])
def test_attention_computes_the_read(split):
    inputs = gpu_cases.MemoryInputs.of(ATTENTION.size, torch.float32, CPU)
    read = gpu_cases.attention_read(SDPBackend.MATH, split)
    torch.testing.assert_close(read(inputs.position_major()), gpu_cases.naive_read(inputs))


def test_the_arithmetic_that_a_read_needs_is_counted():
    """Two products; with top_k the second one of k values, of which each must be read once."""
    size = MemorySize("size", 10, 4, 3, key_channels=8, value_channels=16)
    problem = gpu_cases.problem(Cell("memory_read", size, "f16"), CPU)
    assert problem.flops == 2 * 10 * 40 * (8 + 3 * 16)
    assert problem.moved == 2 * (10 * 8 + 40 * 8 + 3 * 16 * 40 + 3 * 16 * 10)
    top = gpu_cases.problem(Cell("memory_read", replace(size, top_k=2), "f16"), CPU)
    assert top.flops == 2 * 10 * (40 * 8 + 2 * 3 * 16)
    assert problem.moved - top.moved == 2 * (3 * 16 * 40) / 2


def test_a_wrong_result_is_not_right():
    good, bad = torch.ones(4), torch.tensor([1, 1, 1, 1.1])
    assert gpu_steps.is_right(gpu_steps.distance([good], [good]), "ieee")
    assert not gpu_steps.is_right(gpu_steps.distance([bad], [good]), "tf32")
    assert gpu_steps.distance([torch.tensor([math.nan])], [torch.ones(1)]) == [math.inf]
    assert gpu_steps.distance([torch.ones(2)], [torch.ones(1)]) == [math.inf]


def test_a_wrong_implementation_fails_the_step(monkeypatch):
    def wrong(cell, device, real=gpu_cases.problem):
        problem = real(cell, device)
        problem.contenders["vosops cpp"] = lambda: [t + 1 for t in problem.oracle()]
        return problem

    monkeypatch.setattr(gpu_cases, "problem", wrong)
    outcome = gpu_steps.times(Clock(), {}, 60, lambda _: None, SMALL[:1], rounds=1)
    assert outcome.status == FAILED
    assert "vosops cpp is wrong" in outcome.reasons[0]


def test_ceilings_are_measured_in_every_arithmetic():
    outcome = gpu_steps.ceilings(Clock(), 64)
    assert outcome.status == PASSED
    assert set(outcome.data["flops_per_second"]) == set(MODES)
    assert outcome.data["bytes_per_second"] > 1e8


def test_times_goes_on_where_it_was_and_keeps_what_it_has():
    saved: list[Outcome] = []
    limits = {"steps": {"ceilings": {"data": LIMITS}}}
    first = gpu_steps.times(Clock(), limits, 60, saved.append, SMALL[:1], rounds=1)
    assert first.status == PASSED
    run = {"steps": {**limits["steps"], "times": {"data": first.data}}}
    second = gpu_steps.times(Clock(), run, 60, saved.append, SMALL[:2], rounds=1)
    assert second.data["cells"][SMALL[0].key] is first.data["cells"][SMALL[0].key]
    assert set(second.data["cells"]) == {SMALL[0].key, SMALL[1].key}
    begun = saved[-2].data["cells"][SMALL[1].key]
    assert begun == {"failed": "the process ended while this ran"}


def test_times_stops_when_its_time_is_over():
    outcome = gpu_steps.times(Clock(), {}, -1, lambda _: None, SMALL, rounds=1)
    assert (outcome.status, outcome.reasons) == (
        UNFINISHED,
        [f"{len(SMALL)} of {len(SMALL)} not measured yet"],
    )


def test_a_broken_device_ends_the_process_and_is_kept(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_steps, "measure", broken)
    saved: list[Outcome] = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_steps.times(Clock(), {}, 60, saved.append, SMALL, rounds=1)
    assert set(saved[-1].data["cells"]) == {SMALL[0].key}


def test_every_small_problem_is_right_in_every_arithmetic():
    outcome = gpu_steps.small(CPU)
    assert outcome.status == PASSED, outcome.reasons
    assert len(outcome.data["ran"]) == len(SMALL) * len(MODES)
    assert all("triton" in label for label in outcome.data["left_out"])


def test_checks_that_need_a_gpu_say_so():
    outcome = gpu_steps.runtime(CPU, 60, SMALL[:1])
    assert (outcome.status, outcome.reasons) == (FAILED, ["no check could run here"])
    by_check = {c["check"]: c["outcome"] for c in outcome.data["checks"] if c["implementation"] == "cpp"}
    assert by_check["graph"] == "cannot: CUDA graphs need a CUDA device"
    assert by_check["device"] == "cannot: needs two CUDA devices, there are 0"


def test_checks_without_time_are_left_for_another_run():
    outcome = gpu_steps.runtime(CPU, -1, SMALL[:1])
    assert (outcome.status, outcome.reasons) == (UNFINISHED, ["no time was left for 12 of 12 checks"])


def test_a_step_s_process_reads_the_run_and_writes_its_outcome(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"steps": {"ceilings": {"data": LIMITS}}}))
    monkeypatch.setattr(gpu_steps, "CELLS", SMALL[:1])
    monkeypatch.setattr(gpu_steps.times, "__defaults__", (SMALL[:1], 1))
    gpu_steps.main(["times", str(file), "--seconds", "60", "--device", "cpu"])
    written = json.loads((tmp_path / "run.json.times").read_text())
    assert written["status"] == PASSED
    assert written["data"]["cells"][SMALL[0].key]["floor"] is not None


def test_matching_and_reading_sizes_name_themselves():
    assert (
        Cell("local_matching", Case("s", 9, 9, objects=1, radius=2), "tf32").key
        == "local_matching/s/tf32/forward"
    )
    assert "top 7" in SMALL[-1].title and "ieee, forward" in SMALL[-1].title
