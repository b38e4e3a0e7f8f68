"""Holds the wheel and the source distribution in dist/ to what people install.

python tools/check_packages.py                  contents; the wheel in a fresh environment
python tools/check_packages.py --build-sdist    the source distribution is built and installed in another one too

The fresh environments hold vosops alone, installed by pip; they see the PyTorch of the environment that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1800
FOR_EVERYONE = {"x86_64": "cpu_baseline", "aarch64": "cpu_neon"}
"""The library that every processor of a kind runs."""


def check(holds: bool, message: str) -> None:
    """End the script with the message unless it holds."""
    if not holds:
        sys.exit(f"check-packages: {message}")


def only(folder: Path, pattern: str) -> Path:
    """Return the one file in `folder` that matches."""
    found = sorted(folder.glob(pattern))
    check(len(found) == 1, f"expected one {pattern} in {folder}, found {[path.name for path in found]}")
    return found[0]


def python_files() -> set[str]:
    """Return every file of the package but its libraries, as both packages name it."""
    page = {file for file in (ROOT / "vosops/studio/static").rglob("*") if file.is_file()}
    found = {str(path.relative_to(ROOT)) for path in {*(ROOT / "vosops").rglob("*.py"), *page}}
    return found | {"vosops/py.typed"}


def check_wheel(path: Path) -> None:
    """One wheel for every Python, with what its build information says and nothing else."""
    tag = re.search(r"-py3-none-(?:many)?linux\w*_(x86_64|aarch64)\.whl$", path.name)
    check(tag is not None, f"{path.name} is not py3-none-linux for one of {', '.join(FOR_EVERYONE)}")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        check("vosops/build_info.json" in names, f"{path.name} has no build information")
        build = json.loads(wheel.read("vosops/build_info.json"))
    missing = python_files() - names
    check(not missing, f"{path.name} lacks {sorted(missing)}")
    libraries = {Path(name).stem.removeprefix("libvosops_") for name in names if name.endswith(".so")}
    said = set(re.findall(r"\bcpu_\w+", build["summary"]))
    said |= {"cuda"} if build["cuda_architectures"] else set()
    check(libraries == said, f"{path.name} holds {sorted(libraries)}; it says {build['summary']!r}")
    check("cpu_amx_twin" not in libraries, f"{path.name} holds the twin of AMX, which is for tests")
    needed = FOR_EVERYONE[tag[1]] if tag else ""
    check(needed in libraries, f"{path.name} lacks {needed}")
    strange = {
        name for name in names if not re.match(r"vosops/|_vosops_cli\.py|vosops-[^/]+\.dist-info/", name)
    }
    check(not strange, f"{path.name} also holds {sorted(strange)}")


def check_sdist(path: Path) -> None:
    """All sources, and nothing that was built."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    missing = (python_files() | sources | {"setup.py", "pyproject.toml", "LICENSE", "README.md"}) - names
    check(not missing, f"{path.name} lacks {sorted(missing)}")
    built = {name for name in names if name.endswith((".so", ".o", ".pyc", "build_info.json"))}
    check(not built, f"{path.name} holds {sorted(built)}, which were built")


def use(wheel: Path, folder: Path) -> None:
    """Install the wheel into a fresh environment in `folder`; call an op and the command there."""
    import torch

    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=SECONDS)
    packages = only(folder / "lib", "python3*/site-packages")
    (packages / "torch_of_another_environment.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VOSOPS_"))}
    subprocess.run(
        [python, ROOT / "tools/use_package.py"], check=True, cwd=folder, env=clean, timeout=SECONDS
    )
    subprocess.run([folder / "bin/vosops", "--version"], check=True, cwd=folder, env=clean, timeout=SECONDS)


def main() -> None:
    """Check both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="the folder that holds both")
    parser.add_argument("--build-sdist", action="store_true", help="build and use the source distribution")
    arguments = parser.parse_args()
    wheel, sdist = only(arguments.dist, "vosops-*.whl"), only(arguments.dist, "vosops-*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        use(wheel.resolve(), temporary / "wheel")
        if arguments.build_sdist:
            build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
            command = [*build, f"--wheel-dir={temporary}", str(sdist.resolve())]
            subprocess.run(command, check=True, timeout=SECONDS, cwd=temporary)
            built = only(temporary, "vosops-*.whl")
            check_wheel(built)
            use(built, temporary / "sdist")
    print(f"check-packages: {wheel.name} and {sdist.name} are what they say")


if __name__ == "__main__":
    main()
