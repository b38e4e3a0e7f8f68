"""Loads the compiled libraries next to this file, and reports why one is missing.

Exactly one CPU library is loaded: the best that the processor runs, or the one that the environment variable
VOSOPS_CPU_CAPABILITY names (baseline, avx2, avx512, amx or, on 64-bit Arm, neon). Under VOSOPS_AMX_TWIN=1, for tests,
amx is the library that runs AMX's sources in plain C++ on any x86-64 processor with AVX2, where the build made it.
The CUDA library is loaded under a CUDA build of torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
CPU_CAPABILITIES = ("amx", "avx512", "avx2", "neon", "baseline")  # best first


def _usable_capabilities() -> tuple[str, ...]:
    """Return the CPU capabilities to try, best first."""
    asked = os.environ.get("VOSOPS_CPU_CAPABILITY")
    if asked is not None:
        if asked not in CPU_CAPABILITIES:
            raise ValueError(
                f"VOSOPS_CPU_CAPABILITY must be one of {', '.join(CPU_CAPABILITIES)}, got {asked!r}"
            )
        if asked == "amx" and not _loads_twin() and not _has_amx():
            raise ValueError(
                "VOSOPS_CPU_CAPABILITY=amx must come with a processor that has AMX and AVX-512 for bfloat16, got "
                f"{torch.backends.cpu.get_cpu_capability()} (VOSOPS_AMX_TWIN=1 loads its twin in plain C++)"
            )
        return (asked,)
    return _processor_capabilities()


def _processor_capabilities() -> tuple[str, ...]:
    """Return the CPU capabilities that this processor runs, best first."""
    if platform.machine() in ("aarch64", "arm64"):
        return ("neon", "baseline")
    processor = torch.backends.cpu.get_cpu_capability()
    if processor.startswith("AVX512"):
        # What the amx library does without the system's permission is what avx512 does; it asks at its first use.
        return (*(("amx",) if _has_amx() else ()), "avx512", "avx2", "baseline")
    return ("avx2", "baseline") if processor == "AVX2" else ("baseline",)


def _has_amx() -> bool:
    """Whether the processor has what the amx library is compiled for; asks the system for nothing."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported())


def _loads_twin() -> bool:
    return os.environ.get("VOSOPS_AMX_TWIN") == "1"


def _load_cpu() -> tuple[str | None, tuple[str, ...]]:
    """Return the loaded CPU capability, or None and the reasons why there is none."""
    for capability in _usable_capabilities():
        twin = "_twin" if capability == "amx" and _loads_twin() else ""
        path = FOLDER / f"libvosops_cpu_{capability}{twin}.so"
        if path.exists():
            torch.ops.load_library(str(path))
            return capability, ()
    return None, ("there is no compiled CPU library next to the package (was it built?)",)


def _load_cuda() -> tuple[str, ...]:
    """Return the reasons why the CUDA library cannot serve; none if it was loaded."""
    if torch.version.cuda is None:
        return ("this build of torch has no CUDA",)
    path = FOLDER / "libvosops_cuda.so"
    if not path.exists():
        return ("the CUDA library was not compiled (no CUDA compiler at build time)",)
    if CPU_CAPABILITY is None:
        return ("the CUDA library needs the schemas of the CPU library, which is missing",)
    torch.ops.load_library(str(path))
    return ()


def driver_version() -> int | None:
    """Return the newest CUDA that the driver supports, 1000 * major + 10 * minor; None without a driver."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value if status == 0 else None


def _driver_reasons() -> tuple[str, ...]:
    """Return why this machine's driver cannot run the loaded CUDA library; none if it can."""
    compiled: int = torch.ops.vosops.cuda_version()
    driver = driver_version()
    if driver is None:
        return ("no CUDA driver on this machine",)
    if driver // 1000 < compiled // 1000:
        return (
            f"the driver supports CUDA {driver // 1000}, the library was compiled with {compiled // 1000}",
        )
    return ()


CPU_CAPABILITY, CPU_REASONS = _load_cpu()
_UNLOADED = _load_cuda()
CUDA_LOADED = not _UNLOADED
CUDA_REASONS = _UNLOADED or _driver_reasons()  # why the CUDA library cannot serve


def runnable_capabilities() -> list[str]:
    """Return the CPU capabilities that were built and that this processor runs, best first."""
    return [name for name in _processor_capabilities() if (FOLDER / f"libvosops_cpu_{name}.so").exists()]
