"""Everything that a machine with an NVIDIA GPU can tell, within minutes: see benchmarks/gpu_check.sh.

The steps come in the order of what they tell a second: the libraries (prebuilt, or built with --build), one tiny call
of each op, the C++ tests, a profile of every kernel, ceilings and times (bfloat16 of every op first), CUDA graphs and
streams, compute-sanitizer over the C++ kernels, the Triton tests, tests of large tensors, Nsight Compute. Each has a
time limit of its own and writes what it has as it goes. A run is one JSON file, named by card and commit; what is
finished there is not done again. Nothing is fetched from a network.

The file: `schema`, `commit`, `date` (UTC), `command`, `seconds` (spent in all), `device` (name, capability, driver,
memory), `versions`, `steps`: for each step `status` (passed, failed, unfinished, skipped), `reasons`, `seconds` and
`data`, what it found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vosops import _sources as sources
from vosops.benchmarking.gpu_cases import CELLS
from vosops.benchmarking.gpu_steps import FAILED, PASSED, SKIPPED, UNFINISHED, Outcome

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1
SECONDS = 540.0
LEAST_SECONDS = 5.0
"""A step is not begun with less time than this."""

GRACE_SECONDS = 10.0
"""A step that keeps its own time is ended only this much later."""

LAST_CELL_SECONDS = 20.0
"""The last thing that a step begins may take this long."""

SHARES = {
    "libraries": 15,
    "smoke": 30,
    "tests-cpp": 45,
    "profile": 60,
    "ceilings": 10,
    "times": 150,
    "runtime": 20,
    "sanitizer": 80,
    "tests-triton": 80,
    "tests-large": 20,
    "ncu": 30,
}
"""The steps in their order, and how they share the time; what one leaves over goes to the later ones."""

BUILD_SECONDS = 150
"""What --build adds to the step of the libraries, and to the time of all."""

TOOLS = ("memcheck", "racecheck")
NCU_CELLS = (
    "local_matching/480p/bf16/forward",
    "global_matching/480p/bf16/forward",
    "memory_read/480p-5-frames/bf16/forward",
    "memory_read/480p-20-frames-top-30/bf16/forward",
    "global_conv/4096x15x27/bf16/forward",
    "conv_lstm/128x30x54/bf16/forward",
)
TEST_PROCESSES = {"cpp": 8, "triton": 64}
"""At most; Triton compiles its kernels in them, so there are as many as cores."""

FINDINGS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
TAIL = 3000
SOURCES = ("csrc", "vosops", "setup.py", "tests/ops")
"""What decides the outcome: a change there makes another run."""


@dataclass(frozen=True)
class Done:
    """A command that ended, or was ended."""

    code: int
    output: str
    timed_out: bool = False

    @property
    def last_line(self) -> str:
        """The last line that says something."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self.code}"


Command = Callable[[Sequence[str], Mapping[str, str], float], Done]
"""(command, additional environment, seconds) -> Done."""


def run_command(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> Done:
    """Run a command in the repository; it and its children are killed when the time is over."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Done(127, str(error))
        timed_out = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return Done(process.returncode, log.read(), timed_out)


@dataclass
class Run:
    """A run and its file.

    Attributes:
        file: where it is kept.
        report: what the file holds.
        command: runs a command.
        build: whether the libraries are compiled first.
    """

    file: Path
    report: dict[str, Any]
    command: Command = field(default=run_command, repr=False)
    build: bool = False

    @staticmethod
    def open(folder: Path, device: Mapping[str, Any], commit: str, command: Command = run_command) -> Run:
        """Return the run of a card and commit: that of its file, or a new one."""
        slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
        file = folder / f"gpu_{slug}_{commit[:12]}.json"
        report: dict[str, Any] = {}
        if file.exists():
            report = json.loads(file.read_text())
        if report.get("schema") != SCHEMA or report.get("commit") != commit:
            report = {"schema": SCHEMA, "commit": commit, "seconds": 0.0, "steps": {}}
        report |= {"device": dict(device), "versions": versions(command)}
        return Run(file, report, command)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.report["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(self.file.name + ".part")
        partial.write_text(json.dumps(self.report, indent=1) + "\n")
        partial.replace(self.file)

    def is_done(self, step: str) -> bool:
        """Return whether a step needs no repeating: it ended, well or badly. Files are looked at on every machine."""
        if step == "libraries":
            return False
        return self.report["steps"].get(step, {}).get("status") in (PASSED, FAILED) and not self.unmeasured(
            step
        )

    def unmeasured(self, step: str) -> list[str]:
        """Return the cells that `times` has not measured yet."""
        if step != "times":
            return []
        found = self.report["steps"].get("times", {}).get("data", {}).get("cells", {})
        return [cell.key for cell in CELLS if cell.key not in found]

    def flush(self, step: str, outcome: Outcome) -> None:
        """Write what a step that still runs has found so far."""
        before = self.report["steps"].get(step, {}).get("seconds", 0.0)
        self.report["steps"][step] = {**outcome.to_dict(), "seconds": before}
        self.save()

    def keep(self, step: str, outcome: Outcome, seconds: float) -> None:
        """Note how a step ended."""
        earlier = self.report["steps"].get(step, {}).get("seconds", 0.0)
        spent = round(earlier + seconds, 1)
        self.report["steps"][step] = {**outcome.to_dict(), "seconds": spent}
        self.report["seconds"] = round(self.report["seconds"] + seconds, 1)
        self.save()


def problems(report: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a report's form; nothing if other programs can read it."""
    wanted = {"schema": int, "commit": str, "date": str, "seconds": float, "device": dict, "versions": dict}
    wanted |= {"steps": dict, "command": list}
    found = [
        f"{key} must be {kind.__name__}, got {report.get(key)!r}"
        for key, kind in wanted.items()
        if not isinstance(report.get(key), kind)
    ]
    if found:
        return found
    found += [
        f"device must have {key}" for key in ("name", "capability", "driver") if key not in report["device"]
    ]
    found += [f"versions must have {key}" for key in ("torch", "python") if key not in report["versions"]]
    for name, step in report["steps"].items():
        if name not in SHARES:
            found.append(f"there is no step {name}")
        if step.get("status") not in (PASSED, FAILED, UNFINISHED, SKIPPED):
            found.append(f"{name}: unknown status {step.get('status')!r}")
        if step.get("status") != PASSED and not step.get("reasons"):
            found.append(f"{name}: {step.get('status')} without a reason")
        if not isinstance(step.get("data"), dict) or not isinstance(step.get("seconds"), float):
            found.append(f"{name}: data must be dict and seconds float")
    for key, cell in report["steps"].get("times", {}).get("data", {}).get("cells", {}).items():
        if "failed" not in cell and not {"op", "mode", "title", "variants", "left_out"} <= cell.keys():
            found.append(f"{key}: incomplete")
    return found


# ---- The machine


def find_device(command: Command = run_command) -> dict[str, Any]:
    """Return the first GPU as nvidia-smi describes it; RuntimeError where there is none."""
    fields = {
        "name": "name",
        "driver": "driver_version",
        "memory": "memory.total",
        "capability": "compute_cap",
    }
    query = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    done = command(query, {}, 60)
    rows = [line.split(", ") for line in done.output.strip().splitlines()]
    if done.code != 0 or not rows or len(rows[0]) != len(fields):
        raise RuntimeError(f"no NVIDIA GPU here: nvidia-smi says {done.last_line!r}")
    return {**dict(zip(fields, rows[0], strict=True)), "count": len(rows)}


def versions(command: Command = run_command) -> dict[str, str]:
    """Of what was measured and of what compiled it."""
    import torch

    import vosops

    def installed(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    nvcc = re.search(r"release ([\d.]+)", command(["nvcc", "--version"], {}, 60).output)
    return {
        "vosops": vosops.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": installed("triton"),
        "faiss": installed("faiss-gpu"),
        "nvcc": nvcc[1] if nvcc else "none",
    }


def find_commit(command: Command = run_command) -> str:
    """Git's commit, with a digest where the sources differ from it; without git a digest of the sources."""
    head = command(["git", "rev-parse", "HEAD"], {}, 60)
    if head.code != 0:
        return f"tree-{digest(ROOT)}"
    status = command(["git", "status", "--porcelain", "--", *SOURCES], {}, 60)
    return head.last_line + (f"-{digest(ROOT)}" if status.output.strip() else "")


def digest(root: Path) -> str:
    """Of the sources that decide the outcome."""
    found = hashlib.sha256()
    for source in SOURCES:
        files = [root / source] if (root / source).is_file() else sorted((root / source).rglob("*"))
        for path in files:
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


# ---- The steps


def libraries(run: Run, seconds: float) -> Outcome:
    """Check that the prebuilt libraries are those of these sources and load; with --build compile them before."""
    if run.build:
        outcome = build(run, seconds)
        if outcome.status != PASSED:
            return outcome
    folder = ROOT / "vosops"
    found = sorted(path.name for path in folder.glob("libvosops_*.so"))
    data: dict[str, Any] = {"libraries": found}
    reasons = []
    if "libvosops_cuda.so" not in found:
        reasons.append("libvosops_cuda.so is missing: bring it (benchmarks/gpu_pack.sh) or give --build")
    if not any(name.startswith("libvosops_cpu") for name in found):
        reasons.append("no CPU library: it has the schemas and is the oracle")
    try:
        built = json.loads((folder / "build_info.json").read_text())
    except (OSError, ValueError) as error:
        return Outcome(FAILED, [*reasons, f"build_info.json: {error}"], data)
    data["build"] = built
    wanted = sources.digest(ROOT)
    if built.get("sources") != wanted:
        reasons.append(f"the libraries were built from other sources ({built.get('sources')}, here {wanted})")
    if reasons:
        return Outcome(FAILED, reasons, data)
    script = "import torch, vosops; print(torch.ops.vosops.cpu_capability(), torch.ops.vosops.cuda_version())"
    done = run.command([sys.executable, "-c", script], {}, seconds)
    if done.code != 0:
        return Outcome(FAILED, [f"the libraries do not load: {done.last_line}"], data)
    return Outcome(PASSED, [], {**data, "loaded": done.last_line})


def build(run: Run, seconds: float) -> Outcome:
    """Compile the CUDA library for this card alone and one CPU library (the schemas, the oracle), in place."""
    for library in (ROOT / "vosops").glob("libvosops_*.so"):
        library.unlink()  # a running process keeps its copy
    capability = run.report["device"]["capability"]
    environment = {
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", capability),
        "VOSOPS_CPU_ONLY": "avx2",
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    done = run.command([sys.executable, "setup.py", "build_ext", "--inplace"], environment, seconds)
    data = {"architectures": environment["TORCH_CUDA_ARCH_LIST"], "end_of_log": done.output[-TAIL:]}
    if done.timed_out:
        return Outcome(UNFINISHED, [f"not built after {seconds:.0f} s"], data)
    if done.code != 0:
        return Outcome(FAILED, [f"setup.py: {done.last_line}"], data)
    if "and cuda" not in done.output:
        return Outcome(FAILED, ["built without the CUDA library: is nvcc there?"], data)
    return Outcome(PASSED, [], data)


def tests(which: str, processes: int, *files: str) -> Callable[[Run, float], Outcome]:
    """Run the specification of the ops on one kind of kernels; a run that is cut short keeps the tests that ended."""

    def execute(run: Run, seconds: float) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "lines.jsonl"
            command = [sys.executable, "-m", "pytest", "-q", *files, "-k", which]
            command += ["-p", "benchmarks.pytest_lines", "-p", "no:cacheprovider"]
            if processes > 1 and importlib.util.find_spec("xdist"):
                command += ["-n", str(min(processes, os.cpu_count() or 1))]
            environment = {"TRITON_INTERPRET": "0", "VOSOPS_TEST_LINES": str(lines)}
            done = run.command(command, environment, seconds)
            data = read_lines(lines.read_text() if lines.exists() else "")
        ended = data["passed"] + len(data["failures"])
        reasons = [f"{name}: {why}" for name, why in data["failures"].items()]
        if done.timed_out:
            reasons.append(f"not finished after {seconds:.0f} s, {ended} tests had ended")
            return Outcome(FAILED if data["failures"] else UNFINISHED, reasons, data)
        if not ended:
            data["end_of_log"] = done.output[-TAIL:]
            reasons.append("no test of a GPU ran" if done.code in (0, 5) else f"pytest: {done.last_line}")
        return Outcome(FAILED if reasons else PASSED, reasons, data)

    return execute


def read_lines(text: str) -> dict[str, Any]:
    """Return how many tests passed, why others were skipped, and the failures with the first line of each."""
    passed, skipped, failures = 0, dict[str, int](), {}
    for line in text.splitlines():
        try:
            test = json.loads(line)
        except ValueError:  # cut while it was written
            continue
        if test["outcome"] == "failed":
            failures[test["name"]] = test["why"] or "?"
        elif test["outcome"] == "skipped":
            skipped[test["why"]] = skipped.get(test["why"], 0) + 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failures": failures}


def sanitizer(run: Run, seconds: float) -> Outcome:
    """Run compute-sanitizer's tools side by side, each over every small problem by the C++ kernels, a line for each."""
    program = find_tool("compute-sanitizer")
    if program is None:
        return Outcome(SKIPPED, ["compute-sanitizer was not found (CUDA_HOME/bin, PATH)"])
    small = [sys.executable, "-m", "vosops.benchmarking.gpu_steps", "small", "--backend", "cpp"]
    # Each tensor its own allocation: an access past its end is then one past an allocation.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def check(tool: str) -> tuple[dict[str, Any], str | None]:
        started = time.monotonic()
        command = [program, f"--tool={tool}", "--error-exitcode=9", *small]
        done = run.command(command, environment, seconds)
        findings = sum(int(count) for count in FINDINGS.findall(done.output))
        data: dict[str, Any] = {"findings": findings, "seconds": round(time.monotonic() - started, 1)}
        data["problems"] = sum(line.startswith("ran ") for line in done.output.splitlines())
        data["end_of_log"] = done.output[-TAIL:]
        if done.timed_out:
            return data, f"{tool}: not finished after {seconds:.0f} s, {data['problems']} problems had ended"
        if not FINDINGS.search(done.output):
            return data, f"{tool}: {done.last_line}"
        if findings or done.code != 0:
            return data, f"{tool}: {findings} findings, exit code {done.code}"
        return data, None

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        found = dict(zip(TOOLS, pool.map(check, TOOLS), strict=True))
    reasons = [why for _, why in found.values() if why is not None]
    slow = reasons and all("not finished" in why for why in reasons)
    status = UNFINISHED if slow else FAILED if reasons else PASSED
    return Outcome(status, reasons, {tool: data for tool, (data, _) in found.items()})


def find_tool(name: str) -> str | None:
    """Return a program of the CUDA toolkit, or of the PATH."""
    for home in ("CUDA_HOME", "CUDA_PATH"):
        program = Path(os.environ.get(home, "/usr/local/cuda")) / "bin" / name
        if program.exists():
            return str(program)
    return shutil.which(name)


def ncu(run: Run, seconds: float) -> Outcome:
    """Run Nsight Compute's basic set over the kernels of six calls, kept one by one."""
    program = find_tool("ncu")
    if program is None:
        return Outcome(SKIPPED, ["ncu was not found (CUDA_HOME/bin, PATH)"])
    end = time.monotonic() + seconds
    found: dict[str, str] = {}
    reasons = []
    for key in NCU_CELLS:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            reasons.append(f"no time was left for {len(NCU_CELLS) - len(found)} of {len(NCU_CELLS)}")
            break
        one = [
            sys.executable,
            "-m",
            "vosops.benchmarking.gpu_steps",
            "one",
            "--cell",
            key,
            "--backend",
            "cpp",
        ]
        command = [program, "--set", "basic", "--launch-count", "6", "--target-processes", "all", *one]
        done = run.command(command, {}, left)
        found[key] = done.output[-2 * TAIL :]
        if done.code != 0 or done.timed_out:
            reasons.append(f"{key}: {'ended when its time was over' if done.timed_out else done.last_line}")
        run.flush("ncu", Outcome(UNFINISHED, [*reasons, "still running"], {"reports": dict(found)}))
    return Outcome(UNFINISHED if reasons else PASSED, reasons, {"reports": found})


def _progress(data: Mapping[str, Any]) -> int:
    """Return how much a step has that continues where it was."""
    return len(data.get("cells", data.get("calls", {})))


def in_process(step: str) -> Callable[[Run, float], Outcome]:
    """Run a step of `gpu_steps` in its own process; a step that a kernel brings down continues where it was."""

    def execute(run: Run, seconds: float) -> Outcome:
        end = time.monotonic() + seconds
        target = run.file.with_name(f"{run.file.name}.{step}")
        crashes: list[str] = []
        while True:
            left = end - time.monotonic()
            run.save()
            target.unlink(missing_ok=True)
            command = [sys.executable, "-m", "vosops.benchmarking.gpu_steps", step, str(run.file)]
            own = max(left - LAST_CELL_SECONDS, left / 2)
            done = run.command([*command, "--seconds", f"{own:.0f}"], {}, left + GRACE_SECONDS)
            outcome = Outcome(FAILED)
            if target.exists():
                outcome = Outcome(**json.loads(target.read_text()))
                target.unlink()
            if done.code == 0 and not done.timed_out:
                outcome.reasons = crashes + outcome.reasons
                return outcome
            why = "ended when its time was over" if done.timed_out else f"{done.last_line}"
            crashes.append(f"the process of {step}: {why}")
            measured = _progress(outcome.data)
            before = _progress(run.report["steps"].get(step, {}).get("data", {}))
            if end - time.monotonic() < LEAST_SECONDS or measured <= before:
                return Outcome(FAILED, crashes + outcome.reasons, outcome.data)
            run.report["steps"][step] = {**outcome.to_dict(), "seconds": 0.0}

    return execute


STEPS: dict[str, Callable[[Run, float], Outcome]] = {
    "libraries": libraries,
    "smoke": in_process("smoke"),
    "tests-cpp": tests("cpp-cuda", TEST_PROCESSES["cpp"], "tests/ops", "--ignore=tests/ops/test_large.py"),
    "profile": in_process("profile"),
    "ceilings": in_process("ceilings"),
    "times": in_process("times"),
    "runtime": in_process("runtime"),
    "sanitizer": sanitizer,
    "tests-triton": tests(
        "triton-cuda", TEST_PROCESSES["triton"], "tests/ops", "--ignore=tests/ops/test_large.py"
    ),
    "tests-large": tests("cuda", 1, "tests/ops/test_large.py"),
    "ncu": ncu,
}

NEEDS_LIBRARIES = (
    "smoke",
    "tests-cpp",
    "profile",
    "runtime",
    "sanitizer",
    "tests-triton",
    "tests-large",
    "ncu",
)
"""Without the compiled library nothing is left to check; ceilings and times still say what the peers do."""


def parse_steps(text: str | None) -> list[str]:
    """Return the steps that `--only` names, in their order; ValueError for an unknown one."""
    if text is None:
        return list(STEPS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STEPS]
    if unknown or not names:
        raise ValueError(f"--only takes {', '.join(STEPS)}; got {text!r}")
    return [name for name in STEPS if name in names]


def allowance(step: str, steps: Sequence[str], seconds_left: float, building: bool = False) -> float:
    """Return the seconds that a step may take: its share of what is left for it and the steps that follow."""
    shares = {**SHARES, "libraries": SHARES["libraries"] + (BUILD_SECONDS if building else 0)}
    later = steps[steps.index(step) :]
    return seconds_left * shares[step] / sum(shares[name] for name in later)


def execute(run: Run, steps: Sequence[str], seconds: float, say: Callable[[str], None] = print) -> bool:
    """Run the steps that are not done yet; whether all of them passed."""
    end = time.monotonic() + seconds
    todo = [step for step in steps if not run.is_done(step)]
    for step in steps:
        if step not in todo:
            say(f"{step}: {run.report['steps'][step]['status']} before, at this commit")
            continue
        allowed = allowance(step, todo, end - time.monotonic(), run.build)
        if allowed < LEAST_SECONDS:
            outcome, spent = Outcome(SKIPPED, ["no time was left"]), 0.0
            if run.report["steps"].get(step, {}).get("status") == UNFINISHED:
                say(f"{step}: no time was left to go on")
                continue
        elif step in NEEDS_LIBRARIES and run.report["steps"].get("libraries", {}).get("status") == FAILED:
            outcome, spent = Outcome(SKIPPED, ["the libraries cannot be used"]), 0.0
        else:
            say(f"{step}: up to {allowed:.0f} s")
            started = time.monotonic()
            try:
                outcome = STEPS[step](run, allowed)
            except Exception as error:  # a step must not end the run: the others still tell something
                outcome = Outcome(FAILED, [f"{type(error).__name__}: {error}"])
            spent = time.monotonic() - started
        run.keep(step, outcome, spent)
        say(
            "\n".join(
                [f"{step}: {outcome.status} in {spent:.0f} s", *(f"  {r}" for r in outcome.reasons[:20])]
            )
        )
    return all(run.report["steps"][step]["status"] == PASSED for step in steps)


def plan(run: Run | None, steps: Sequence[str], seconds: float) -> str:
    """Return what a run would do, in words."""
    todo = [step for step in steps if run is None or not run.is_done(step)]
    left, lines = seconds, []
    for step in steps:
        if step not in todo:
            lines.append(f"{step:<12} done before")
            continue
        allowed = allowance(step, todo, left)
        left -= allowed
        lines.append(f"{step:<12} up to {allowed:.0f} s, more where earlier steps need less")
    if "times" in todo:
        names = [cell.key for cell in CELLS] if run is None else run.unmeasured("times")
        lines += [f"             {name}" for name in names]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps; exit code 0 if all passed, 1 if not, 2 if nothing could run."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description="Checks and measures vosops on this GPU."
    )
    parser.add_argument("--only", metavar="STEP[,STEP]", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all steps ({SECONDS:.0f})")
    parser.add_argument(
        "--build", action="store_true", help=f"compile the libraries first, in {BUILD_SECONDS} seconds more"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the run's JSON")
    parser.add_argument("--commit", default=os.environ.get("VOSOPS_COMMIT"), help="where there is no git")
    parser.add_argument("--again", action="store_true", help="also repeat what is finished")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; needs no GPU")
    options = parser.parse_args(arguments)
    try:
        steps = parse_steps(options.only)
    except ValueError as error:
        parser.error(str(error))
    commit = options.commit or find_commit()
    try:
        run = Run.open(options.results, find_device(), commit)
    except RuntimeError as error:
        if not options.dry_run:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        print(f"{error}; a run of commit {commit} would be")
        print(plan(None, steps, options.seconds))
        return
    if options.again:
        for step in steps:
            run.report["steps"].pop(step, None)
    if options.dry_run:
        print(f"{run.file}")
        print(plan(run, steps, options.seconds))
        return
    run.build = options.build
    run.report["command"] = list(sys.argv if arguments is None else arguments)
    passed = execute(run, steps, options.seconds + (BUILD_SECONDS if options.build else 0))
    print(f"{run.file}: {'all passed' if passed else 'not all passed'}, {run.report['seconds']:.0f} s")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
