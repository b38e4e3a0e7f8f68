"""Compiles the NEON library for 64-bit Arm and runs the op tests on emulated processors.

python tools/test_arm.py                            what `make test-arm` does
python tools/test_arm.py --processors cortex-a76    one of qemu's processors: this one has no bfloat16 instructions
python tools/test_arm.py --select local_matching    other tests of tests/ops than those of the cores

It needs Debian's g++-aarch64-linux-gnu, qemu-user and apt-get. Python for Arm comes from Debian, torch and what the
tests import from the package index; they are kept below $XDG_CACHE_HOME/vosops/arm and not installed. The oldest
supported torch is taken: its wheel for Arm is a CPU build, those of later ones need gigabytes of CUDA libraries.
What was run is recorded in benchmarks/results/arm.json, and by `python benchmarks/compatibility.py` in the docs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from check_headers import oldest_torch

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks/results/arm.json"
BUILD = ROOT / "build" / "arm"
LIBRARY = BUILD / "lib"
COMPILER, EMULATOR, DISASSEMBLER = "aarch64-linux-gnu-g++", "qemu-aarch64", "aarch64-linux-gnu-objdump"
PROCESSORS = ("max", "cortex-a76")
"""With bfloat16 instructions, and without; PyTorch itself does not start on older ones than the second."""

DEBIAN_PACKAGES = ("python3", "libgomp1", "libstdc++6", "libgcc-s1")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64", "any")
OF_TORCH = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec")
OF_TESTS = ("numpy", "pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100")
DOWNLOAD_SECONDS, BUILD_SECONDS, TEST_SECONDS = 1800, 3600, 4 * 3600

# The folder of the tests is on the path too; the package must be the one that was compiled for Arm.
RUN_TESTS = f"""
import sys
sys.path.insert(0, {str(LIBRARY)!r})
import pytest, torch, vosops
assert vosops.__file__.startswith({str(LIBRARY)!r}), vosops.__file__
assert torch.ops.vosops.cpu_capability() == "neon"
print("torch", torch.__version__, "python", sys.version.split()[0], flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


def check(holds: bool, message: str) -> None:
    """End the script with the message unless it holds."""
    if not holds:
        sys.exit(f"test-arm: {message}")


def debian_system(folder: Path) -> None:
    """Unpack Debian's Python for Arm with all that it needs into `folder`; apt's own state is not touched."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M))
    check(release.get("ID") == "debian", f"needs Debian, this is {release.get('ID')}")
    state = folder.with_name("apt")
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    source = f"deb [signed-by={key}] http://deb.debian.org/debian {release['VERSION_CODENAME']} main\n"
    (state / "sources.list").write_text(source)
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::State": str(state),
        "Dir::State::lists": str(state / "lists"),
        "Dir::State::status": str(state / "status"),
        "Dir::Cache": str(state),
        "Dir::Etc::sourcelist": str(state / "sources.list"),
        "Dir::Etc::sourceparts": "/dev/null",
    }
    configuration = state / "apt.conf"
    configuration.write_text("".join(f'{name} "{value}";\n' for name, value in options.items()))
    environment = {**os.environ, "APT_CONFIG": str(configuration)}
    install = ["install", "--yes", "--no-install-recommends", "--download-only", *DEBIAN_PACKAGES]
    for arguments in (["update"], install):
        command = ["apt-get", "-qq", *arguments]
        subprocess.run(command, check=True, env=environment, timeout=DOWNLOAD_SECONDS, stdout=sys.stderr)
    unpacked = folder.with_name("root.partial")
    shutil.rmtree(unpacked, ignore_errors=True)
    for package in sorted((state / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True, timeout=DOWNLOAD_SECONDS)
    unpacked.rename(folder)


def python_of(system: Path) -> Path:
    """Return the Python of an unpacked system, such as .../usr/bin/python3.11."""
    found = sorted(path for path in (system / "usr/bin").glob("python3.*") if path.name[8:].isdigit())
    check(len(found) == 1, f"expected one Python in {system}, found {found}")
    return found[0]


def packages(folder: Path, python: str) -> None:
    """Unpack torch for Arm and what it and the tests import into `folder`, for a version of Python."""
    partial = folder.with_name("packages.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(partial), "--only-binary=:all:"]
    pip += [
        "--implementation=cp",
        f"--python-version={python}",
        *(f"--platform={name}" for name in PLATFORMS),
    ]
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}  # those are for this machine
    for what in (["--no-deps", f"torch=={oldest_torch()}"], [*OF_TORCH, *OF_TESTS]):
        subprocess.run([*pip, *what], check=True, env=environment, timeout=DOWNLOAD_SECONDS)
    partial.rename(folder)


def build(torch: Path) -> str:
    """Compile the package for Arm below build/; return what it says of itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VOSOPS_")}
    environment |= {"CXX": COMPILER, "VOSOPS_TARGET_TORCH": str(torch)}
    # By force: setuptools looks at the sources alone, ninja at the headers too.
    command = [sys.executable, "setup.py", "-q", "build", "--force"]
    command += ["--build-base", str(BUILD), "--build-lib", str(LIBRARY)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=BUILD_SECONDS, capture_output=True, text=True
    )
    check(result.returncode == 0, f"the build failed:\n{result.stdout}\n{result.stderr}")
    listing = [DISASSEMBLER, "-d", "--no-show-raw-insn", LIBRARY / "vosops/libvosops_cpu_neon.so"]
    code = subprocess.run(listing, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS).stdout
    counts = {name: len(re.findall(rf"\t{name}\t", code)) for name in ("bfmmla", "bfdot", "fmla")}
    check(all(counts.values()), f"the library lacks instructions: {counts}")
    print(f"test-arm: compiled; instructions: {counts}", flush=True)
    return str(json.loads((LIBRARY / "vosops/build_info.json").read_text())["compiler"])


def run(processor: str, select: str, system: Path, site: Path) -> dict[str, str | int]:
    """Run the tests on an emulated processor and return the record."""
    report = BUILD / f"{processor}.xml"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}
    emulated = [EMULATOR, "-cpu", processor, "-L", str(system), str(python_of(system)), "-c", RUN_TESTS]
    tests = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--timeout=3000",
        f"--junitxml={report}",
        "tests/ops",
        "-k",
        select,
    ]
    with subprocess.Popen(
        [*emulated, *tests], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        process.wait(TEST_SECONDS)
    finished = process.returncode in (0, 1) and report.exists()
    check(finished, f"the tests on {processor} ended with {process.returncode}")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    versions = re.search(r"^torch (\S+) python (\S+)$", "".join(lines), re.M)
    assert versions is not None
    return {
        "processor": processor,
        "tests": f"tests/ops -k {select}",
        "torch": versions[1],
        "python": versions[2],
        "passed": total - skipped - failed,
        "failed": failed,
        "skipped": skipped,
    }


def keep(record: dict[str, str | int]) -> None:
    """Put a record in the place of an older one of that processor."""
    runs = json.loads(RECORDS.read_text())["runs"] if RECORDS.exists() else []
    runs = [run for run in runs if run["processor"] != record["processor"]] + [record]
    lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)
    RECORDS.write_text('{\n "runs": [\n' + lines + "\n ]\n}\n")


def main() -> int:
    """Compile, test and record; 1 if a test fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processors", nargs="+", default=PROCESSORS, metavar="NAME", help="qemu's names")
    parser.add_argument("--select", default="core", help="pytest's -k; other runs are not recorded")
    arguments = parser.parse_args()
    for tool in (COMPILER, EMULATOR, DISASSEMBLER, "apt-get", "dpkg-deb"):
        check(
            shutil.which(tool) is not None, f"needs {tool}; apt-get install g++-aarch64-linux-gnu qemu-user"
        )
    listed = subprocess.run([EMULATOR, "-cpu", "help"], capture_output=True, text=True)  # it ends with 1
    known = listed.stdout.split()
    for name in arguments.processors:
        check(name in known, f"--processors must be of those that `{EMULATOR} -cpu help` lists, got {name!r}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vosops" / "arm"
    cache.mkdir(parents=True, exist_ok=True)
    system = cache / "root"
    if not system.exists():
        debian_system(system)
    site = cache / f"torch-{oldest_torch()}"
    if not site.exists():
        packages(site, python_of(system).name.removeprefix("python"))
    compiler = build(site / "torch")
    check_vec = [sys.executable, "-m", "pytest", "-q", "tests/cpu", "-k", "emulated"]
    subprocess.run(check_vec, cwd=ROOT, check=True, timeout=BUILD_SECONDS)
    emulator = subprocess.run([EMULATOR, "--version"], capture_output=True, text=True, check=True).stdout
    common = {
        "compiler": compiler,
        "emulator": emulator.partition("\n")[0],
        "date": datetime.date.today().isoformat(),
    }
    failed = 0
    for processor in arguments.processors:
        record = {**run(processor, arguments.select, system, site), **common}
        print(json.dumps(record, indent=1), flush=True)
        failed += int(record["failed"])
        if arguments.select == "core":
            keep(record)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
