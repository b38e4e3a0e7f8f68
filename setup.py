"""Chooses what to compile: CPU libraries always, the CUDA library where nvcc is, and for work in the source tree the
pybind11 module. What was compiled is written to vosops/build_info.json.

Environment: VOSOPS_CUDA=0 leaves the CUDA library out, VOSOPS_CPU_ONLY=avx2 builds that one CPU library only,
VOSOPS_AMX_TWIN=1 adds the one that runs AMX's sources in plain C++, VOSOPS_SANITIZE=1 adds AddressSanitizer and UBSan
to the CPU libraries, VOSOPS_LINE_INFO=1 adds source lines to the CUDA library, TORCH_CUDA_ARCH_LIST and MAX_JOBS as in
PyTorch. A compiler for another processor (CXX=aarch64-linux-gnu-g++) builds for that one: VOSOPS_TARGET_TORCH is then
the folder of a torch package for it, with include/ and lib/.
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"vosops: the build needs {error.name}: pip install torch pybind11 ninja, or build with isolation"
    )

ROOT = Path(__file__).parent
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-Wno-ignored-attributes"]
# A 64-bit size or index must not become a 32-bit one unsaid, except in PyTorch's headers.
WARNINGS += ["-Werror=conversion", "-Wno-sign-conversion", "-Wno-float-conversion"]
WARNINGS += ["-Wno-implicit-float-conversion"]  # clang's name
COMMON = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", *WARNINGS]
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1"]
# Compiling costs more than running, but for the twin of AMX, whose tiles are loops.
SANITIZED_LEVEL = {"amx_twin": "-O1"}
X86_CAPABILITIES = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
# The same and Intel's matrix engine, whose instructions csrc/cpu/amx.h writes itself.
AMX = ["-DVOSOPS_AMX"]
AMX_TWIN = [*X86_CAPABILITIES["avx2"], *AMX, "-DVOSOPS_AMX_TWIN"]  # in plain C++, for any such processor
# Any 64-bit Arm: what needs bfloat16 instructions asks the processor for them.
ARM_CAPABILITIES = {"neon": ["-march=armv8-a"]}
ARM_BF16 = "-march=armv8-a+bf16"
# g++ on Arm moves all loads of a tile to its start, where they do not fit the registers. clang ignores the option.
ARM_SCHEDULE = ["-fno-schedule-insns", "-Wno-ignored-optimization-argument"]
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}  # other names of the same
DEFAULT_CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def sources(*patterns: str) -> list[str]:
    """Return the project's source files that match, relative to this file, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_cuda() -> str | None:
    """Return the CUDA toolkit's directory, from the environment, nvcc on the PATH, or the nvidia-cuda-nvcc package."""
    if os.environ.get("VOSOPS_CUDA") == "0":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parents[1]))
    candidates.append("/usr/local/cuda")
    candidates += [str(Path(entry) / "nvidia" / name) for entry in sys.path for name in ("cu13", "cuda_nvcc")]
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin/nvcc").exists():
            if (Path(candidate) / "include/cuda_runtime.h").exists():
                return candidate
    return None


def compiler() -> list[str]:
    """Return the C++ compiler, as PyTorch chooses it."""
    return shlex.split(os.environ.get("CXX") or "c++")


def supports(flag: str) -> bool:
    """Whether the C++ compiler accepts a flag."""
    command = [*compiler(), flag, "-x", "c++", "-fsyntax-only", "-"]
    try:
        return subprocess.run(command, input=b"int main() {}", capture_output=True).returncode == 0
    except OSError:
        return False


def target_machine() -> str:
    """Return the processor that the C++ compiler compiles for: x86_64, aarch64 ..."""
    try:
        result = subprocess.run([*compiler(), "-dumpmachine"], capture_output=True, text=True)
        machine = result.stdout.partition("-")[0] if result.returncode == 0 else ""
    except OSError:
        machine = ""
    machine = machine or platform.machine()
    return MACHINES.get(machine, machine)


def target_torch() -> Path:
    """Return the folder of the torch package for the processor that is compiled for, which is not this one."""
    folder = Path(os.environ.get("VOSOPS_TARGET_TORCH", ""))
    if not (folder / "lib/libtorch_cpu.so").exists():
        sys.exit(
            f"vosops: {compiler()[0]} compiles for {TARGET}; VOSOPS_TARGET_TORCH must be the folder of a torch "
            f"package for it, with include/ and lib/, got {os.environ.get('VOSOPS_TARGET_TORCH')!r}"
        )
    return folder.resolve()


def target_torch_version() -> str:
    """Return the version of the torch that the libraries are compiled against."""
    if not CROSS:
        return torch.__version__
    found = re.search(r"""__version__ = ['"]([^'"]+)""", (target_torch() / "version.py").read_text())
    return found[1] if found else "unknown"


def torch_headers() -> list[str]:
    """Return the options that find PyTorch's headers, without warnings from them."""
    folders = [str(target_torch() / "include")] if CROSS else cpp_extension.include_paths()
    return [f"-isystem{folder}" for folder in folders]


class Build(BuildExtension):
    """Plain libraries beside the package, each with its own objects (the same sources are compiled again)."""

    def finalize_options(self) -> None:
        elsewhere = self.build_temp is not None
        super().finalize_options()
        if not elsewhere:  # pip gives each build a folder that it throws away; ninja knows what is still good
            base = self.get_finalized_command("build").build_base
            self.build_temp = str((ROOT / base / "objects").absolute())
        if not self.inplace:  # a wheel serves every Python
            self.extensions = [extension for extension in self.extensions if extension.name != "vosops._C"]

    def get_ext_filename(self, name: str) -> str:
        if "libvosops" in name:
            return name.replace(".", "/") + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, extension: Extension) -> None:
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
        try:
            super().build_extension(extension)
        finally:
            self.build_temp = shared

    def run(self) -> None:
        if self.extensions and shutil.which(compiler()[0]) is None:
            sys.exit(
                f"vosops: no C++ compiler {compiler()[0]!r} found; install one that knows C++20, or set CXX"
            )
        built = Path(self.build_lib) / "vosops"
        for library in built.glob("*.so"):  # of an earlier build with other choices
            library.unlink()
        super().run()
        folder = ROOT / "vosops" if self.inplace else built
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build_info.json").write_text(json.dumps(build_info(), indent=1) + "\n")
        print("vosops:", SUMMARY)


class Wheel(bdist_wheel):
    """One wheel for every Python: nothing in it was compiled against one."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", f"linux_{TARGET}" if CROSS else super().get_tag()[2]


class PlatformDistribution(Distribution):
    """What is built belongs to the platform, even where that is nothing."""

    def has_ext_modules(self) -> bool:
        return True


def build_info() -> dict[str, str]:
    """Return what `vosops info` shows of the build."""
    with_compiler = (
        subprocess.run([*compiler(), "--version"], capture_output=True, text=True) if names else None
    )
    return {
        "summary": SUMMARY,
        "compiler": with_compiler.stdout.partition("\n")[0] if with_compiler else "",
        "torch": target_torch_version(),
        "cuda_architectures": architectures,
        "sources": runpy.run_path(str(ROOT / "vosops/_sources.py"))["digest"](ROOT),
    }


def cpu_libraries() -> list[Extension]:
    """One library per instruction set; exactly one is loaded, see vosops/_library.py."""
    capabilities: dict[str, list[str]] = {"baseline": []}
    if TARGET == "x86_64":
        capabilities = {name: list(flags) for name, flags in X86_CAPABILITIES.items()}
        if supports("-mavx512bf16"):
            capabilities["avx512"].append("-mavx512bf16")
        if supports("-mamx-bf16"):
            capabilities["amx"] = [*capabilities["avx512"], *AMX]
        if os.environ.get("VOSOPS_AMX_TWIN") == "1":
            capabilities["amx_twin"] = list(AMX_TWIN)
    elif TARGET == "aarch64":
        capabilities = {name: list(flags) for name, flags in ARM_CAPABILITIES.items()}
        if supports(ARM_BF16):
            capabilities["neon"] = [ARM_BF16]
        capabilities["neon"] += ARM_SCHEDULE
    only = os.environ.get("VOSOPS_CPU_ONLY")
    if only:
        if only not in capabilities:
            sys.exit(f"VOSOPS_CPU_ONLY must be one of {', '.join(capabilities)}, got {only!r}")
        capabilities = {only: capabilities[only]}
    sanitized = os.environ.get("VOSOPS_SANITIZE") == "1"
    libraries = [
        CppExtension(
            f"vosops.libvosops_cpu_{name}",
            sources("csrc/ops.cpp", "csrc/cpu/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={
                "cxx": [
                    *COMMON,
                    *torch_headers(),
                    *STABLE_ABI,
                    *flags,
                    *([*SANITIZE, SANITIZED_LEVEL.get(name, "-O0")] if sanitized else []),
                    f'-DVOSOPS_CAPABILITY="{name}"',
                ]
            },
            extra_link_args=SANITIZE if sanitized else [],
            py_limited_api=True,
        )
        for name, flags in capabilities.items()
    ]
    if CROSS:  # CppExtension adds the torch of this machine
        for library in libraries:
            library.include_dirs = [str(ROOT / "csrc")]
            library.library_dirs = [str(target_torch() / "lib")]
    return libraries


def cuda_library(cuda: str) -> Extension:
    """libvosops_cuda: static cudart and the stable ABI, so neither torch's CUDA version nor a GPU matters."""
    cpp_extension.CUDA_HOME = cuda
    cpp_extension._check_cuda_version = lambda *args, **kwargs: None
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    host = ["-fvisibility=hidden", "-Wall"]
    nvcc = [
        "-O3",
        "-std=c++20",
        "-DUSE_CUDA",
        *STABLE_ABI,
        "--Werror",
        "all-warnings",
        "--expt-relaxed-constexpr",
    ]
    if os.environ.get("VOSOPS_LINE_INFO") == "1":  # which changes no instruction
        nvcc.append("-lineinfo")
    return CppExtension(
        "vosops.libvosops_cuda",
        sources("csrc/cuda/*.cu"),
        include_dirs=[str(ROOT / "csrc"), f"{cuda}/include"],
        library_dirs=[f"{cuda}/lib64", f"{cuda}/lib"],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={
            "cxx": [*COMMON, *torch_headers(), *STABLE_ABI, "-DUSE_CUDA"],
            "nvcc": [*nvcc, *(f"-Xcompiler={flag}" for flag in host)],
        },
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"],
        py_limited_api=True,
    )


def python_module(summary: str, architectures: str) -> Extension:
    """vosops._C: build information, without tensors."""
    return Extension(
        "vosops._C",
        sources("csrc/python/*.cpp"),
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        define_macros=[
            ("VOSOPS_BUILD_SUMMARY", f'"{summary}"'),
            ("VOSOPS_CUDA_ARCHITECTURES", f'"{architectures}"'),
            ("VOSOPS_BUILD_TORCH", f'"{torch.__version__}"'),
        ],
        extra_compile_args=["-std=c++20", "-O2", "-fvisibility=hidden", "-g0"],
        language="c++",
    )


TARGET = target_machine()
CROSS = MACHINES.get(platform.machine(), platform.machine()) != TARGET
extensions: list[Extension] = []
names: list[str] = []
architectures = ""
if platform.system() == "Linux":
    extensions = cpu_libraries()
    names = [extension.name.removeprefix("vosops.libvosops_") for extension in extensions]
    CUDA = None if CROSS else find_cuda()
    if CUDA:
        extensions.append(cuda_library(CUDA))
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        SUMMARY = f"built {', '.join(names)} and cuda ({architectures})"
    else:
        reason = "VOSOPS_CUDA=0" if os.environ.get("VOSOPS_CUDA") == "0" else "no CUDA compiler found"
        reason = f"compiled for {TARGET}" if CROSS else reason
        SUMMARY = f"built {', '.join(names)}; left out cuda ({reason}; Triton serves the GPU)"
    if not CROSS:  # there is no Python of the other processor to compile against
        extensions.append(python_module(SUMMARY, architectures))
else:
    SUMMARY = (
        f"built no library, for they are for Linux and this is {platform.system()}; "
        "the reference in plain PyTorch serves every op, slowly"
    )

setup(
    ext_modules=extensions,
    distclass=PlatformDistribution,
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
