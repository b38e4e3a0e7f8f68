"""What `vosops check` found on this machine: implementations that are wrong, and the order of those that are right.

One JSON file a device in the user's cache folder (VOSOPS_CACHE, else XDG_CACHE_HOME/vosops, else ~/.cache/vosops),
named by the device and by everything that decides the outcome: driver, CPU library, vosops, torch and triton. A file
of other versions is left alone and not read. `vosops.backends` looks here before it chooses; where nothing was
checked, that is one look at a constant.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from vosops import _library

SCHEMA = 1
VARIANTS = ("triton descriptors",)
"""Kernels of an implementation that serve its calls only where they were found right: see `proved`."""

DESCRIPTORS = "VOSOPS_TRITON_DESCRIPTORS"
"""The environment variable by which the first of them serves wherever it can (1) or never (0)."""

BAD = ("wrong", "crashed", "hung", "failed")
"""Verdicts after which an implementation is not chosen."""

_MODES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_PRECISIONS = {"tf32": "tf32", "tf32x3": "tf32x3", "high": "tf32x3", "medium": "medium"}


def mode_of(dtype: torch.dtype, precision: str | None) -> str | None:
    """Return the arithmetic of a call as the file names it; None for one that is not checked (float64)."""
    if dtype == torch.float32:
        return _PRECISIONS.get(precision or "", "ieee")
    return _MODES.get(dtype)


def entry(mode: str, backward: bool) -> str:
    """Return the key of an arithmetic and direction."""
    return f"{mode} {'forward + backward' if backward else 'forward'}"


def folder() -> Path:
    """Return the folder of the files; it need not exist."""
    if os.environ.get("VOSOPS_CACHE"):
        return Path(os.environ["VOSOPS_CACHE"]) / "devices"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vosops" / "devices"


def versions() -> dict[str, str]:
    """Return the versions that a file belongs to, those of the driver and the library apart."""
    import vosops

    return {"vosops": vosops.__version__, "torch": torch.__version__, "triton": _triton_version()}


@lru_cache
def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def identity(device: torch.device) -> dict[str, str]:
    """Return what a device's file is named by: its name, driver or CPU library, and the versions."""
    if device.type == "cuda":
        driver = _library.driver_version()
        found = {"device": torch.cuda.get_device_name(device), "driver": str(driver)}
    else:
        found = {"device": processor(), "driver": f"library {_library.CPU_CAPABILITY}"}
    return {**found, **versions()}


@lru_cache
def processor() -> str:
    """Return the name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def path_of(known: Mapping[str, str]) -> Path:
    """Return the file of an identity."""
    name = re.sub(r"[^a-z0-9]+", "-", known["device"].lower()).strip("-") or "device"
    code = hashlib.sha256(json.dumps(dict(known), sort_keys=True).encode()).hexdigest()[:12]
    return folder() / f"{name}-{code}.json"


@dataclass(frozen=True)
class Verdicts:
    """A device's file."""

    identity: Mapping[str, str]
    date: str
    found: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
    """op -> implementation -> entry -> {"verdict", "reason", "error"}."""
    orders: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """op -> entry -> {"order": names, best first, "seconds": of each size}."""

    @property
    def digest(self) -> str:
        """Eight digits that change where a choice may; "" where every choice is as without a check."""
        bad = {
            (op, name, key)
            for op, names in self.found.items()
            for name, keys in names.items()
            for key, cell in keys.items()
            if cell["verdict"] in BAD
        }
        orders = {
            (op, key): tuple(cell["order"]) for op, keys in self.orders.items() for key, cell in keys.items()
        }
        proven = {
            (op, name, key)
            for op, names in self.found.items()
            for name in VARIANTS
            for key, cell in names.get(name, {}).items()
            if cell["verdict"] == "right"
        }
        if not bad and not orders and not proven:
            return ""
        text = repr((sorted(bad), sorted(orders.items()), *([sorted(proven)] if proven else [])))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def to_json(self) -> str:
        """Return the file's text."""
        fields = {
            "identity": dict(self.identity),
            "date": self.date,
            "found": self.found,
            "orders": self.orders,
        }
        return json.dumps({"schema": SCHEMA, **fields}, indent=1) + "\n"


def parse(text: str) -> Verdicts:
    """Return the contents of a file; ValueError if it is not one."""
    try:
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}")
        verdicts = Verdicts(dict(data["identity"]), str(data["date"]), data["found"], data["orders"])
        for names in verdicts.found.values():
            for cells in names.values():
                for cell in cells.values():
                    str(cell["verdict"]), str(cell["reason"])
        for keys in verdicts.orders.values():
            for cell in keys.values():
                if not all(isinstance(name, str) for name in cell["order"]):
                    raise ValueError("an order must be a list of names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a file of vosops check ({type(error).__name__}: {error})") from None
    return verdicts


def read(device: torch.device) -> Verdicts | None:
    """Return what was found on a device with these versions; None if nothing was. A broken file is said once."""
    known = identity(device)
    path = path_of(known)
    try:
        verdicts = parse(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _warn_once(f"{path} was ignored: {error}; vosops check writes it anew")
        return None
    if dict(verdicts.identity) != known:
        _warn_once(
            f"{path} was ignored: it belongs to {dict(verdicts.identity)}; vosops check writes it anew"
        )
        return None
    return verdicts


def _any_file() -> bool:
    try:
        return any(name.endswith(".json") for name in os.listdir(folder()))
    except OSError:
        return False


Function = TypeVar("Function", bound=Callable[..., Any])


def _constant(function: Function) -> Function:
    """Let torch.compile call it once, while it compiles, and keep the result.

    As torch.compiler.assume_constant_result does, which imports torch._dynamo: two seconds of every process, also of
    those that never compile. Where a version of torch ignores the attribute, the call breaks the graph, which a test
    notices.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_exist = _any_file()  # a plain global, which torch.compile guards
_read: dict[str, Verdicts | None] = {}
_warned: set[str] = set()


def reload() -> None:
    """Forget what was read, after the files changed."""
    global _exist
    _read.clear()
    _exist = _any_file()


def of(device: torch.device) -> Verdicts | None:
    """Return `read` of a device, read once."""
    if not _exist or device.type not in ("cpu", "cuda"):
        return None
    place = str(torch.device("cuda", torch.cuda.current_device())) if str(device) == "cuda" else str(device)
    if place not in _read:
        try:
            _read[place] = read(torch.device(place))
        except (RuntimeError, AssertionError):  # a device that is not there: a fake tensor's
            _read[place] = None
    return _read[place]


def arguments(device: torch.device) -> dict[str, str]:
    """Return what a run on disk must remember of the check, because the masks may depend on it; mostly nothing."""
    verdicts = of(device)
    return {"vosops check": verdicts.digest} if verdicts is not None and verdicts.digest else {}


def refusal(
    device: torch.device,
    op: str,
    implementation: str,
    dtype: torch.dtype,
    precision: str | None,
    backward: bool,
) -> str:
    """Return why an implementation must not serve a call here, "" if nothing speaks against it."""
    if not _exist:
        return ""
    mode = mode_of(dtype, precision)
    return "" if mode is None else _refusal(str(device), op, implementation, mode, backward)


def order(device: torch.device, op: str, dtype: torch.dtype, precision: str | None, backward: bool) -> str:
    """Return the names of an op's implementations, best first, with commas between; "" if they were not timed."""
    if not _exist:
        return ""
    mode = mode_of(dtype, precision)
    return "" if mode is None else _order(str(device), op, mode, backward)


def proved(device: torch.device, op: str, variant: str, dtype: torch.dtype) -> bool:
    """Whether `vosops check` found a variant of an implementation right here: one that is used only then."""
    mode = mode_of(dtype, None)
    verdicts = of(device)
    if mode is None or verdicts is None:
        return False
    cell = verdicts.found.get(op, {}).get(variant, {}).get(entry(mode, False))
    return cell is not None and cell["verdict"] == "right"


@_constant
def _refusal(device: str, op: str, implementation: str, mode: str, backward: bool) -> str:
    verdicts = of(torch.device(device))
    if verdicts is None:
        return ""
    cells = verdicts.found.get(op, {}).get(implementation, {})
    # Gradients need the forward pass, too.
    for key in [entry(mode, False), *([entry(mode, True)] if backward else [])]:
        cell = cells.get(key)
        if cell is not None and cell["verdict"] in BAD:
            reason = f"vosops check found it {cell['verdict']} here ({key}: {cell['reason']})"
            _warn_once(f"{op}: {implementation} is not used on {verdicts.identity['device']}: {reason}")
            return reason
    return ""


@_constant
def _order(device: str, op: str, mode: str, backward: bool) -> str:
    verdicts = of(torch.device(device))
    cell = None if verdicts is None else verdicts.orders.get(op, {}).get(entry(mode, backward))
    return "" if cell is None else ",".join(cell["order"])


@_constant
def source(device: str) -> str:
    """Return where an order comes from, for people."""
    verdicts = of(torch.device(device))
    return (
        ""
        if verdicts is None
        else f"vosops check --tune on {verdicts.identity['device']}, {verdicts.date[:10]}"
    )


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
