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
    assert gpu.parse_steps(None) == list(gpu.SHARES)
    assert gpu.parse_steps("times, smoke") == ["smoke", "times"]


@pytest.mark.parametrize("text", ["", "smok", "smoke,timing"])
def test_an_unknown_step_is_refused_with_the_names_there_are(text):
    with pytest.raises(ValueError, match="--only takes libraries, smoke, .*ncu; got"):
        gpu.parse_steps(text)


def test_the_steps_share_nine_minutes():
    assert sum(gpu.SHARES.values()) == gpu.SECONDS == 540
    assert list(gpu.SHARES) == list(gpu.STEPS)
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
    gpu.execute(new_run(), ["smoke", "tests-cpp"], 480, silent)
    stub_steps.clear()
    said = []
    assert gpu.execute(new_run(), ["smoke", "tests-cpp", "ceilings"], 480, said.append)
    assert list(stub_steps) == ["ceilings"]
    assert said[:2] == ["smoke: passed before, at this commit", "tests-cpp: passed before, at this commit"]


def test_another_commit_is_another_run(new_run, stub_steps):
    first, second = new_run(), new_run(commit="d" * 40)
    gpu.execute(first, ["smoke"], 480, silent)
    gpu.execute(second, ["smoke"], 480, silent)
    assert first.file != second.file and first.file.exists() and second.file.exists()
    assert first.file.name == f"gpu_nvidia-h100-80gb-hbm3_{'c' * 12}.json"


def test_a_step_without_time_is_skipped_and_says_so(new_run, stub_steps):
    run = new_run()
    assert not gpu.execute(run, ["smoke", "tests-cpp"], 4, silent)
    assert run.report["steps"]["tests-cpp"]["status"] == SKIPPED
    assert run.report["steps"]["tests-cpp"]["reasons"] == ["no time was left"]
    assert not run.is_done("tests-cpp")


def test_what_needs_the_library_is_skipped_without_it_and_the_peers_are_timed(
    new_run, stub_steps, monkeypatch
):
    monkeypatch.setitem(gpu.STEPS, "libraries", lambda run, seconds: Outcome(FAILED, ["no nvcc"]))
    run = new_run()
    assert not gpu.execute(run, list(gpu.STEPS), 480, silent)
    assert list(stub_steps) == ["ceilings", "times"]
    assert run.report["steps"]["tests-cpp"]["reasons"] == ["the libraries cannot be used"]


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
    machine = Machine(setup=Done(0, "vosops: built cpu_avx2 and cuda (9.0)"))
    assert gpu.build(new_run(machine), 100).status == PASSED
    assert not stale.exists()
    wanted = {"TORCH_CUDA_ARCH_LIST": "9.0", "VOSOPS_CPU_ONLY": "avx2"}
    assert wanted.items() <= machine.environments[-1].items()


@pytest.mark.parametrize(
    ("ending", "status", "why"),
    [
        (
            Done(0, "vosops: built cpu_avx2; left out cuda"),
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


def lines(*tests):
    """What the plugin writes: (outcome, why) of each test."""
    return "".join(
        json.dumps({"name": f"tests/ops/a.py::t{i}", "outcome": outcome, "why": why}) + "\n"
        for i, (outcome, why) in enumerate(tests)
    )


MIXED = lines(("passed", ""), ("skipped", "no Triton kernel"), ("failed", "assert 1 == 2"))


def test_the_tests_are_counted_and_failures_named():
    counted = {
        "passed": 1,
        "skipped": {"no Triton kernel": 1},
        "failures": {"tests/ops/a.py::t2": "assert 1 == 2"},
    }
    assert gpu.read_lines(MIXED) == counted
    assert gpu.read_lines(MIXED + '{"name": "cut') == counted


class Pytest(Machine):
    """Writes the lines of tests."""

    def __init__(self, text: str, ending: Done = Done(1, "")) -> None:
        super().__init__()
        self.text, self.ending = text, ending

    def __call__(self, command, environment, seconds) -> Done:
        self.commands.append(list(command))
        Path(environment["VOSOPS_TEST_LINES"]).write_text(self.text)
        return self.ending


@pytest.mark.parametrize(
    ("text", "ending", "status", "reasons"),
    [
        (MIXED, Done(1, ""), FAILED, ["tests/ops/a.py::t2: assert 1 == 2"]),
        (lines(("skipped", "no GPU")), Done(0, ""), FAILED, ["no test of a GPU ran"]),
        ("", Done(4, "ImportError: x"), FAILED, ["pytest: ImportError: x"]),
        (lines(("passed", "")), Done(0, ""), PASSED, []),
        (
            lines(("passed", ""), ("passed", "")),
            Done(-9, "", timed_out=True),
            UNFINISHED,
            ["not finished after 100 s, 2 tests had ended"],
        ),
    ],
)
def test_what_the_tests_say_is_kept_also_when_they_are_cut_short(new_run, text, ending, status, reasons):
    run = new_run()
    run.command = Pytest(text, ending)
    outcome = gpu.STEPS["tests-cpp"](run, 100)
    assert (outcome.status, outcome.reasons) == (status, reasons)
    [command] = run.command.commands
    assert command[command.index("-k") + 1] == "cpp-cuda"
    assert "--ignore=tests/ops/test_large.py" in command


def test_the_plugin_writes_a_line_as_each_test_ends(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_one(): pass\n"
        "def test_two(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no card')\ndef test_three(): pass\n"
        "@pytest.fixture\ndef broken(): raise KeyError('x')\n"
        "def test_four(broken): pass\n"
    )
    target = tmp_path / "lines"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.pytest_lines",
        "--rootdir",
        str(tmp_path),
    ]
    environment = {**os.environ, "VOSOPS_TEST_LINES": str(target), "PYTHONPATH": str(gpu.ROOT)}
    subprocess.run(
        [*command, "-c", os.devnull, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        timeout=240,
    )
    found = gpu.read_lines(target.read_text())
    assert found["passed"] == 1
    assert sum(found["skipped"].values()) == 1
    assert {name.rpartition("::")[2] for name in found["failures"]} == {"test_two", "test_four"}


@pytest.fixture
def prebuilt(tmp_path, monkeypatch):
    """A checkout with libraries; returns its folder."""
    folder = tmp_path / "checkout"
    (folder / "vosops").mkdir(parents=True)
    (folder / "csrc").mkdir()
    (folder / "setup.py").write_text("a")
    for name in ("libvosops_cuda.so", "libvosops_cpu_avx2.so"):
        (folder / "vosops" / name).write_text("binary")
    (folder / "vosops/build_info.json").write_text(json.dumps({"sources": gpu.sources.digest(folder)}))
    monkeypatch.setattr(gpu, "ROOT", folder)
    return folder


def test_prebuilt_libraries_of_these_sources_need_no_build(new_run, prebuilt):
    machine = Machine(cpu_capability=Done(0, "avx2 13000\n"))
    outcome = gpu.libraries(new_run(machine), 15)
    assert (outcome.status, outcome.reasons) == (PASSED, [])
    assert outcome.data["loaded"] == "avx2 13000"
    assert not any("setup.py" in " ".join(command) for command in machine.commands)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: (f / "vosops/libvosops_cuda.so").unlink(), "libvosops_cuda.so is missing"),
        (lambda f: (f / "vosops/libvosops_cpu_avx2.so").unlink(), "no CPU library"),
        (lambda f: (f / "csrc/a.cu").write_text("new"), "the libraries were built from other sources"),
        (lambda f: (f / "vosops/build_info.json").write_text("{"), "build_info.json: "),
    ],
)
def test_libraries_that_cannot_be_trusted_are_refused(new_run, prebuilt, spoil, why):
    spoil(prebuilt)
    outcome = gpu.libraries(new_run(Machine(cpu_capability=Done(0, "avx2"))), 15)
    assert outcome.status == FAILED
    assert outcome.reasons[0].startswith(why)


def test_libraries_that_do_not_load_are_a_reason(new_run, prebuilt):
    outcome = gpu.libraries(new_run(Machine(cpu_capability=Done(1, "OSError: undefined symbol"))), 15)
    assert outcome.reasons == ["the libraries do not load: OSError: undefined symbol"]


def test_libraries_are_looked_at_on_every_machine(new_run):
    """A report that travelled says nothing of the files here."""
    run = new_run()
    run.keep("libraries", Outcome(PASSED), 1.0)
    assert not run.is_done("libraries")


def test_build_info_names_the_sources(monkeypatch):
    setup = (gpu.ROOT / "setup.py").read_text()
    assert 'runpy.run_path(str(ROOT / "vosops/_sources.py"))["digest"](ROOT)' in setup
    assert len(gpu.sources.digest(gpu.ROOT)) == 12


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
    monkeypatch.setattr(gpu, "find_tool", lambda name: name)
    machine = Machine(compute_sanitizer=Done(code, output))
    outcome = gpu.sanitizer(new_run(machine), 50)
    assert outcome.status == status
    assert set(outcome.data) == {"memcheck", "racecheck"}
    assert all("--backend cpp" in " ".join(c) for c in machine.commands if "small" in c), (
        "Triton compiles too long"
    )
    assert [c[1] for c in machine.commands if c[0] == "compute-sanitizer"] != []


def test_without_compute_sanitizer_the_step_is_skipped(new_run, monkeypatch):
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
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


# ---- The whole slot against a fake clock


class Slot:
    """A machine of sixteen cores whose commands take as long as they are known to, on a clock of its own.

    A command that is not finished in its time is ended, and what it had written by then is there.
    """

    TRITON_COMPILES, COMPILE_SECONDS, CORES = 1010, 0.74, 16
    START = 6.0  # of a process that imports torch on that machine

    def __init__(self, slower: float = 1.0) -> None:
        self.now, self.slower = 0.0, slower
        self.file: Path | None = None

    def monotonic(self) -> float:
        return self.now

    def spend(self, wanted: float, seconds: float) -> tuple[float, bool]:
        """Let a command run: the seconds that it had, and whether it was ended."""
        wanted *= self.slower
        had = min(wanted, seconds)
        self.now += had
        return had, wanted > seconds

    def __call__(self, command, environment, seconds) -> Done:
        text = " ".join(command)
        if "-m pytest" in text:
            return self.pytest(text, environment, seconds)
        if command[0] == "compute-sanitizer":  # fifty problems, instrumented
            had, ended = self.spend(self.START + 50 * 2.0, seconds)
            ran = max(0, int((had - self.START) / 2.0))
            return Done(0, "ran x\n" * ran + ("" if ended else "ERROR SUMMARY: 0 errors"), ended)
        if command[0] == "ncu":
            _, ended = self.spend(self.START + 4.0, seconds)
            return Done(0, "a table", ended)
        if "gpu_steps" in text:
            return self.step(command, seconds)
        if "cpu_capability" in text:
            self.spend(self.START, seconds)
            return Done(0, "avx2 13000")
        return Done(1, "unknown command")

    def pytest(self, text, environment, seconds) -> Done:
        if "triton-cuda" in text:
            processes = int(text.rpartition(" -n ")[2].split()[0])
            tests, each = 900, self.TRITON_COMPILES * self.COMPILE_SECONDS / 900
        elif " tests/ops/test_large.py" in text:
            processes, tests, each = 1, 12, 1.5
        else:
            processes, tests, each = int(text.rpartition(" -n ")[2].split()[0]), 900, 0.2
        had, ended = self.spend(self.START + 4 + tests * each / processes, seconds)
        count = min(tests, int(max(0.0, had / self.slower - self.START - 4) * processes / each))
        Path(environment["VOSOPS_TEST_LINES"]).write_text(lines(*[("passed", "")] * count))
        return Done(-9 if ended else 0, "", ended)

    def step(self, command, seconds) -> Done:
        step = command[command.index("vosops.benchmarking.gpu_steps") + 1]
        own = float(command[-1])
        cost, total = {
            "smoke": (0.9, 28),
            "profile": (1.2, 28),
            "ceilings": (2.0, 1),
            "times": (2.5, len(CELLS)),
            "runtime": (0.2, 84),
        }[step]
        cost *= self.slower
        began = self.now
        self.now += self.START * self.slower
        done = 0
        limit = seconds if step == "smoke" else own  # which keeps no time of its own
        while done < total and self.now - began + (cost if step == "smoke" else 0) <= limit:
            self.now += cost
            done += 1
        keys = [cell.key for cell in CELLS] if step == "times" else [str(i) for i in range(total)]
        found = {key: {"failed": "stub"} for key in keys[:done]}
        name = "cells" if step == "times" else "calls"
        data = LIMITS if step == "ceilings" else {name: found}
        status = PASSED if done == total else UNFINISHED
        outcome = Outcome(status, [] if done == total else ["no time was left"], data)
        self.file.with_name(f"{self.file.name}.{step}").write_text(json.dumps(outcome.to_dict()))
        ended = step == "smoke" and done < total
        return Done(-9 if ended else 0, "", ended)


@pytest.mark.parametrize("slower", [1.0, 1.5])
def test_every_step_of_the_slot_leaves_data_within_its_time(new_run, prebuilt, monkeypatch, slower):
    slot = Slot(slower)
    run = new_run(slot)
    slot.file = run.file
    monkeypatch.setattr(gpu.time, "monotonic", slot.monotonic)
    monkeypatch.setattr(gpu, "find_tool", lambda name: name)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: slot.CORES)
    monkeypatch.setattr(gpu, "ThreadPoolExecutor", SideBySide(slot))
    gpu.execute(run, list(gpu.STEPS), gpu.SECONDS, silent)
    assert slot.now <= 540 + gpu.GRACE_SECONDS
    steps = run.report["steps"]
    assert list(steps) == list(gpu.STEPS)
    assert all(step["status"] != SKIPPED for step in steps.values()), {
        n: s["status"] for n, s in steps.items()
    }
    assert steps["tests-cpp"]["data"]["passed"] > 500
    assert steps["tests-triton"]["data"]["passed"] > 500
    assert steps["tests-large"]["data"]["passed"] > 0
    assert len(steps["smoke"]["data"]["calls"]) >= 14, "those of C++ at least"
    assert len(steps["profile"]["data"]["calls"]) > 14
    assert all(found["problems"] > 10 for found in steps["sanitizer"]["data"].values())
    assert len(steps["ncu"]["data"]["reports"]) > 1
    timed = list(steps["times"]["data"]["cells"])
    ops = {cell.op for cell in CELLS}
    assert {key.split("/")[0] for key in timed[: len(ops) + 1]} == ops, "each op first"
    assert all("/bf16/forward" in key for key in timed[: len(ops) + 1]), "in bfloat16"
    assert any("/forward+backward" in key for key in timed)


class SideBySide:
    """Runs what would run at the same time one after the other, from the same moment on."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(self, workers: int) -> SideBySide:
        return self

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, function, items):
        began, latest, results = self.slot.now, self.slot.now, []
        for item in items:
            self.slot.now = began
            results.append(function(item))
            latest = max(latest, self.slot.now)
        self.slot.now = latest
        return results


def test_a_step_that_is_killed_leaves_what_it_had(new_run, monkeypatch):
    """The report on disk always holds what ended before."""
    run = new_run(Machine(ncu=Done(0, "a table")))
    monkeypatch.setattr(gpu, "find_tool", lambda name: name)
    seen = []
    original = run.command

    def command(*args):
        if run.file.exists():
            seen.append(json.loads(run.file.read_text())["steps"].get("ncu", {}).get("data", {}))
        return original(*args)

    run.command = command
    gpu.ncu(run, 100)
    assert len(seen[-1]["reports"]) == len(gpu.NCU_CELLS) - 1


# ---- The report's form


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r.pop("commit"), "commit must be str, got None"),
        (lambda r: r["device"].pop("driver"), "device must have driver"),
        (lambda r: r["steps"]["smoke"].update(status="fine"), "smoke: unknown status 'fine'"),
        (lambda r: r["steps"]["smoke"].update(status=FAILED), "smoke: failed without a reason"),
        (lambda r: r["steps"].update(other=r["steps"]["smoke"]), "there is no step other"),
    ],
)
def test_a_report_that_others_cannot_read_is_found(new_run, stub_steps, change, complaint):
    run = new_run()
    gpu.execute(run, ["smoke"], 480, silent)
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
    assert "ceilings     up to" in done.stdout and "libraries" not in done.stdout.splitlines()[1]
    assert all(cell.key in done.stdout for cell in CELLS)


def test_a_dry_run_leaves_out_what_is_done(new_run, stub_steps):
    run = new_run()
    gpu.execute(run, ["smoke"], 480, silent)
    assert gpu.plan(run, ["smoke", "ceilings"], 480).splitlines()[0] == "smoke        done before"


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
    for op in ("local_attention", "local_correlation"):  # which compute in float32 whatever is allowed
        for backward in (False, True):
            cells = [c for c in CELLS if c.op == op and c.backward == backward]
            assert {c.mode for c in cells} == {"ieee", "bf16", "f16"}
        assert any(c.compiled for c in CELLS if c.op == op)
    assert len({cell.key for cell in CELLS}) == len(CELLS)


DIFFERENTIATED = {
    "local_matching": 2,
    "global_matching": 2,
    "memory_read": 3,
    "global_conv": 5,
    "conv_lstm": 4,
    "local_attention": 3,
    "local_correlation": 2,
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


def test_a_tiny_call_of_each_op_is_kept_as_it_comes():
    saved: list[Outcome] = []
    outcome = gpu_steps.smoke(CPU, {}, saved.append)
    calls = outcome.data["calls"]
    ours = {label: call for label, call in calls.items() if label.endswith("/cpp")}
    assert len(ours) == 2 * len(SMALL) and all(call["right"] for call in ours.values())
    assert all(
        "Triton compiles for GPUs" in call["failed"] for label, call in calls.items() if "triton" in label
    )
    assert len(saved) == len(calls) + 1
    done = {
        "steps": {"smoke": {"data": {"calls": {label: {"right": True, "errors": []} for label in calls}}}}
    }
    assert gpu_steps.smoke(CPU, done, saved.append).status == PASSED, "nothing is left to run"


def test_the_kernels_of_a_call_are_listed():
    outcome = gpu_steps.profile(CPU, {}, 60, lambda _: None, SMALL[:1])
    [found, left_out] = outcome.data["calls"].values()
    assert any("local_matching" in kernel["name"] for kernel in found["kernels"])
    assert all(kernel["us"] >= 0 for kernel in found["kernels"])
    assert "Triton compiles for GPUs" in left_out["failed"]
    late = gpu_steps.profile(CPU, {}, -1, lambda _: None, SMALL[:1])
    assert (late.status, late.reasons) == (UNFINISHED, ["no time was left for 2 calls"])


def test_the_profile_has_every_op_in_bfloat16_and_float32():
    for op in (
        "local_matching",
        "global_matching",
        "memory_read",
        "global_conv",
        "conv_lstm",
        "local_attention",
        "local_correlation",
    ):
        assert {cell.mode for cell in gpu_cases.PROFILED if cell.op == op} == {"bf16", "ieee"}


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


# ---- The folder that travels


@pytest.fixture
def checkout(tmp_path):
    """A small repository with the script and what it packs."""
    root = tmp_path / "checkout"
    names = (
        "vosops/a.py",
        "csrc/a.cu",
        "setup.py",
        "pyproject.toml",
        "benchmarks/b.py",
        "tests/ops/test_a.py",
    )
    names += ("tests/__init__.py", "tests/conftest.py", "tests/effort.py", "tests/fuzz.py")
    for name in (*names, "benchmarks/results/golden.json", "tests/golden/big.bin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    script = root / "benchmarks/gpu_pack.sh"
    script.write_text((gpu.ROOT / "benchmarks/gpu_pack.sh").read_text())
    script.chmod(0o755)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    for name in ("libvosops_cuda.so", "libvosops_cpu_avx2.so", "build_info.json"):
        (root / "vosops" / name).write_text("built")
    return root


def pack(checkout, folder):
    script = str(checkout / "benchmarks/gpu_pack.sh")
    return subprocess.run([script, str(folder)], capture_output=True, text=True, timeout=60)


def test_sources_and_libraries_travel_without_golden_data(checkout, tmp_path):
    done = pack(checkout, tmp_path / "packed")
    assert done.returncode == 0, done.stderr
    found = {str(p.relative_to(tmp_path / "packed")) for p in (tmp_path / "packed").rglob("*") if p.is_file()}
    assert {"vosops/libvosops_cuda.so", "vosops/build_info.json", "csrc/a.cu", "COMMIT"} <= found
    assert not any("golden" in name for name in found)
    assert (tmp_path / "packed/COMMIT").read_text().strip() in done.stdout


def test_what_does_not_fit_or_is_missing_makes_no_folder(checkout, tmp_path):
    (tmp_path / "mine").mkdir()
    assert pack(checkout, tmp_path / "mine").returncode == 2
    library = checkout / "vosops/libvosops_cuda.so"
    with library.open("wb") as file:
        file.truncate(65 << 20)
    done = pack(checkout, tmp_path / "packed")
    assert done.returncode == 1 and "may travel" in done.stderr
    library.unlink()
    done = pack(checkout, tmp_path / "packed")
    assert done.returncode == 2 and "libvosops_cuda.so is missing" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkout", "mine"]
