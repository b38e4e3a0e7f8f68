"""What `import vosops` needs, what the build contains, and that the libraries keep to the stable ABI."""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vosops
from tests.effort import leave_out
from tests.forked import run_after_torch
from vosops import _library, cli
from vosops.models import list_models

FOLDER = Path(vosops.__file__).parent
LIBRARIES = sorted(FOLDER.glob("libvosops_*.so"))
ON_ARM = platform.machine() in ("aarch64", "arm64")


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=240,
    )


def test_import_needs_torch_alone():
    blocked = "typer rich PIL av torchvision timm safetensors scipy matplotlib skimage hypothesis triton"
    code = f"""
import sys
for name in {blocked.split()!r}:
    sys.modules[name] = None
import vosops, torch
frame, mask = torch.rand(1, 4, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
assert vosops.local_matching(frame, frame, mask, radius=2).abs().max() == 0
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_import_brings_neither_models_nor_commands_nor_the_compiler():
    code = "import sys, torch; known = set(sys.modules); import vosops; print(*set(sys.modules) - known)"
    modules = run_after_torch(code).stdout.split()
    assert "vosops" in modules
    assert not [m for m in modules if re.match(r"vosops\.(models|inference|cli|metrics|data)", m)]
    # Two seconds of every process and every command.
    assert not [m for m in modules if re.match(r"torch\._(dynamo|inductor)|sympy|torch\.distributed", m)]


SUBMODULES = [
    "compat",
    "data",
    "distributed",
    "inference",
    "integrations",
    "io",
    "memory",
    "metrics",
    "models",
    "nn",
    "runs",
    "training",
]


def test_submodules_come_with_the_package_on_first_use():
    code = f"""
import vosops
for name in {SUBMODULES!r}:
    assert getattr(vosops, name).__name__ == f"vosops.{{name}}"
vosops.nn.ConvLSTM, vosops.models.create_model, vosops.memory.MemoryBank
"""
    result = run_after_torch(code)
    assert result.returncode == 0, result.stderr


def test_the_namespace_holds_the_public_names_and_no_other():
    assert set(dir(vosops)) == {*vosops.__all__, *SUBMODULES, "__version__"}
    for name in vosops.__all__:
        assert getattr(vosops, name).__name__ == name
    files = {path.stem for path in FOLDER.iterdir()}  # submodules that someone imported
    stray = {name for name in vars(vosops) if not name.startswith("_")} - {*dir(vosops), *files}
    assert not stray
    with pytest.raises(AttributeError, match="module 'vosops' has no attribute 'nothing'"):
        vosops.nothing  # noqa: B018


def test_the_command_answers_without_torch_what_needs_none():
    pytest.importorskip("typer")
    # A torch that cannot be imported, instead of a time: --help and --version take 0.1 to 0.2 CPU-seconds.
    arguments = [["--version"], ["--help"], *([name, "--help"] for name in cli._COMMANDS)]
    code = f"""
import sys
sys.modules["torch"] = None
from _vosops_cli import main
for arguments in {arguments!r}:
    sys.argv = ["vosops", *arguments]
    try:
        main()
    except SystemExit as exit:
        assert not exit.code, arguments
"""
    result = run(code, COLUMNS="120")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"vosops {vosops.__version__}\n")
    assert result.stdout.count("Usage: ") == len(arguments) - 1


def test_the_command_brings_the_ops_when_a_name_is_first_asked_for():
    code = """
import _vosops_cli, sys, vosops
assert "torch" not in sys.modules
assert "local_matching" in vosops.list_ops()
import torch
assert torch.ops.vosops.cpu_capability()
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_one_cpu_library_is_loaded():
    assert torch.ops.vosops.cpu_capability().removesuffix("_twin") == _library.CPU_CAPABILITY
    for_everyone = "neon" if ON_ARM else "baseline"
    assert f"libvosops_cpu_{for_everyone}.so" in {path.name for path in LIBRARIES}


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512", "amx", "neon"])
def test_capability_can_be_chosen(capability):
    if not (FOLDER / f"libvosops_cpu_{capability}.so").exists():
        pytest.skip(f"this build has no {capability} library")
    supported = "neon" if ON_ARM else torch.backends.cpu.get_cpu_capability()
    runs = {"AVX512": "baseline avx2 avx512", "AVX2": "baseline avx2", "neon": "neon"}
    if capability not in runs.get(supported, "baseline").split() + ["amx"] * _library._has_amx():
        pytest.skip(f"the processor ({supported}) does not run {capability}")
    leave_out(capability in ("avx2", "avx512"), ".ci/run tests every one of them")
    code = "import vosops, torch; print(torch.ops.vosops.cpu_capability())"
    assert run_after_torch(code, VOSOPS_CPU_CAPABILITY=capability).stdout.strip() == capability


def test_unknown_capability_is_refused():
    result = run_after_torch("import vosops", VOSOPS_CPU_CAPABILITY="sse9")
    assert (
        "VOSOPS_CPU_CAPABILITY must be one of amx, avx512, avx2, neon, baseline, got 'sse9'" in result.stderr
    )


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_on_arm_neon_serves(machine, monkeypatch):
    monkeypatch.delenv("VOSOPS_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert _library._usable_capabilities() == ("neon", "baseline")


def test_a_capability_that_was_not_built_leaves_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setenv("VOSOPS_CPU_CAPABILITY", "neon")
    capability, reasons = _library._load_cpu()
    assert capability is None
    assert "no compiled CPU library next to the package" in reasons[0]


def test_cuda_library_loads_where_torch_has_cuda():
    if not (FOLDER / "libvosops_cuda.so").exists():
        pytest.skip("this build left the CUDA library out")
    if torch.version.cuda is None:
        assert _library.CUDA_REASONS == ("this build of torch has no CUDA",)
    else:
        assert _library.CUDA_LOADED
        assert torch.ops.vosops.cuda_version() >= 12000


def undefined_symbols(library: Path) -> set[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return {line.split()[-1] for line in listing.stdout.splitlines()}


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("g++") is None, reason="needs nm and g++")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_use_no_symbol_newer_than_torch_2_10(library, tmp_path):
    # What the headers declare for target 2.10 is what torch 2.10 offers.
    source = tmp_path / "shims.cpp"
    source.write_text("#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/ops.h>\n")
    include = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-E", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-DUSE_CUDA", f"-I{include}", f"-I{include}/torch/csrc/api/include", str(source)]
    declared = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    offered = set(re.findall(r"\b(?:aoti_torch|torch)_\w+", declared))
    symbols = {name.split("@")[0] for name in undefined_symbols(library)}
    shims = {name for name in symbols if re.match(r"(aoti_)?torch_", name)}
    assert shims <= offered, f"not in torch 2.10: {sorted(shims - offered)}"
    torch_cpp = {name for name in symbols if re.search(r"^_Z.*(2at|3c10|5torch)", name)}
    assert not torch_cpp, f"C++ symbols of torch are not ABI stable: {sorted(torch_cpp)}"


def test_the_build_information_is_a_data_file_and_the_module_says_the_same():
    path = FOLDER / "build_info.json"
    if not path.exists():
        pytest.skip("vosops was not built here")
    info = json.loads(path.read_text())
    assert info["summary"].startswith("built cpu_") and info["compiler"] and info["torch"]
    module = pytest.importorskip("vosops._C", reason="vosops._C comes with builds in the source tree only")
    assert info.pop("sources"), "the digest by which prebuilt libraries are known is for the file alone"
    assert module.build_info().keys() == info.keys()


def test_torch_hub_finds_the_models_and_nothing_else():
    names = runpy.run_path(str(Path(__file__).parents[1] / "hubconf.py"))
    offered = [name for name, x in names.items() if callable(x) and not name.startswith("_")]
    assert sorted(offered) == list_models()
