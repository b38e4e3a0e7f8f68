"""Whole networks on whole frames: time and peak memory of a step, frugal against naive, and what fits in 4 GB.

Weights are random: neither time nor memory depends on them. Each measurement has a separate process, whose peak
resident memory is reported, interpreter, libraries and weights included. `naive` computes as the original code does
(`vosops.inference.NetworkTracker`). A measurement may be held to a limit: a process that needs more fails with a
message.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vosops.benchmarking.fresh import run_fresh
from vosops.benchmarking.measure import Clock

__all__ = [
    "CASES",
    "FITS",
    "HEADINGS",
    "LIMIT",
    "NETWORKS",
    "Case",
    "Measurement",
    "largest_that_fits",
    "measure",
    "rows",
    "table",
]

SEMANTIC = "lstm_icnet"  # segments without objects, from a window of frames
NETWORKS = ("stm", "rgmp", "feelvos", SEMANTIC)
SEMANTIC_SIZES = {"1024p": (1024, 2048)}  # of Cityscapes, which its authors work on
SIZES = {"480p": (480, 854), "1080p": (1080, 1920), "4K": (2160, 3840)}
LIMIT = 16 * 10**9
"""Bytes that a measurement may need; a naive one at 1080p needs more."""

HEADINGS = ("case", "frame", "objects", "frames in memory", "time a frame", "naive", "peak memory", "naive")
"""Of a table: what is before "naive" is measured both ways."""

GOAL = 4 * 10**9
_ASPECT, _MULTIPLE = 16 / 9, 16  # of the sizes that are tried for the largest that fits
_PROBES = (240, 480)  # heights that are measured first
_STRIDE = 1.6  # times the largest height that is known to fit: as far as a line is trusted
_NEAR = 0.95  # of the goal: near enough
_NO_MEMORY = ("not enough memory", "can't allocate memory", "bad_alloc", "failed to map segment")
"""What allocators say, and the loader of libraries that are imported late."""

_FIRST_FILLER = 10**6  # number of the first frame of a memory that is filled without being computed


@dataclass(frozen=True)
class Case:
    """A network on frames of a size: the number of objects, and of frames in the memory, if that grows.

    default: whether it is measured without being asked for by name.
    """

    network: str
    label: str
    size: tuple[int, int]
    objects: int
    frames: int
    default: bool = True

    @property
    def name(self) -> str:
        """How it is chosen."""
        return f"{self.network}-{self.label}"


@dataclass(frozen=True)
class Measurement:
    """One way of a case: seconds of a step, peak bytes of the process and bytes of the memory; or why not.

    One thread is timed in CPU time of the process, which other programs disturb least, more in wall time.
    """

    case: Case
    naive: bool
    seconds: float | None = None
    peak: int | None = None
    memory: int | None = None
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"name": self.case.name, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """Return what `to_dict` gave; other entries are left out."""
        case = Case(**{**data["case"], "size": tuple(data["case"]["size"])})
        names = ("naive", "seconds", "peak", "memory", "failure")
        return cls(case, **{name: data[name] for name in names})


def _cases() -> Iterator[Case]:
    for network in NETWORKS:
        sizes = {**SIZES, **SEMANTIC_SIZES} if network == SEMANTIC else SIZES
        for label, size in sizes.items():
            large = label == "4K"
            default = not (large and network == "feelvos")  # global matching of 4K takes minutes
            if network == SEMANTIC:
                yield Case(network, label, size, objects=0, frames=4)
            else:
                yield Case(network, label, size, 1 if large else 3, 2 if large else 20, default)


CASES = {case.name: case for case in _cases()}
FITS = {f"{case.network}-fits": case for case in CASES.values() if case.label == "1080p"}
"""Searches for the largest frame whose step stays under `GOAL`, with the objects and frames of these cases."""


def measure(case: Case, *, naive: bool, threads: int = 2, limit: int | None = LIMIT) -> Measurement:
    """Measure one way of a case in a fresh process. limit: bytes beyond which it fails; None: no limit."""
    try:
        found = run_fresh(__name__, "_measure", case, naive, threads, limit)
    except RuntimeError as error:
        return Measurement(case, naive, failure=str(error))
    return Measurement(case, naive, **found)


def largest_that_fits(
    case: Case, *, naive: bool, threads: int = 2, goal: int = GOAL, note: Callable[[str], None] = print
) -> Measurement:
    """Return a frame of 16:9 whose step stays under `goal` bytes and comes near it, or is almost the largest that does.

    Each measurement predicts where the goal is reached; that frame is measured next.
    """
    found: dict[int, Measurement] = {}
    height: int | None = _PROBES[0]
    while height is not None:
        tried = _of_height(case, height)
        found[height] = measure(tried, naive=naive, threads=threads, limit=2 * goal)
        note(f"{tried.size[1]} x {tried.size[0]}: {_peak(found[height])}")
        height = _next_height({h: m.peak for h, m in found.items()}, goal)
    fitting = [h for h, m in found.items() if m.peak is not None and m.peak <= goal]
    if fitting:
        return found[max(fitting)]
    smallest = found[min(found)]
    return replace(
        smallest,
        seconds=None,
        peak=None,
        memory=None,
        failure=f"more than {goal / 1e9:g} GB at {min(found)}p",
    )


def table(measurements: Sequence[Measurement]) -> str:
    """Return the measurements in Markdown: a row for each case, frugal before naive, also where their frames differ."""
    heading, *lines = (f"| {' | '.join(cells)} |" for cells in (HEADINGS, *rows(measurements)))
    return "\n".join([heading, "|---" * len(HEADINGS) + "|", *lines])


def rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    """Return the cells below `HEADINGS`: a row for each case, frugal beside naive."""
    result = []
    cases: dict[str, dict[bool, Measurement]] = {}
    for m in measurements:
        cases.setdefault(m.case.name, {})[m.naive] = m
    for name, ways in cases.items():
        case = next(iter(ways.values())).case
        frames = dict.fromkeys(f"{m.case.size[1]} x {m.case.size[0]}" for _, m in sorted(ways.items()))
        cells = [name, " / ".join(frames), str(case.objects), str(case.frames)]
        for field in (_seconds, _peak):
            cells += [field(ways[naive]) if naive in ways else "" for naive in (False, True)]
        result.append(cells)
    return result


def _seconds(m: Measurement) -> str:
    return "-" if m.seconds is None else f"{m.seconds:.1f} s"


def _peak(m: Measurement) -> str:
    return str(m.failure) if m.peak is None else f"{m.peak / 1e9:.2f} GB"


def _of_height(case: Case, height: int) -> Case:
    width = round(height * _ASPECT / _MULTIPLE) * _MULTIPLE
    return replace(case, label="fits", size=(height, width))


def _next_height(peaks: Mapping[int, int | None], goal: int) -> int | None:
    """Return the height to measure after these (None: needs far more than the goal), or None where that is enough.

    It is where a straight line over the number of pixels through the two nearest peaks reaches the goal.
    """
    fitting = sorted(h for h, peak in peaks.items() if peak is not None and peak <= goal)
    others = sorted(set(peaks) - set(fitting))
    if not fitting:
        return None
    untried = [h for h in _PROBES if h not in peaks]
    if untried and not others:
        return untried[0]
    low, high = fitting[-1], others[0] if others else None
    reached = peaks[low] or 0
    if reached >= _NEAR * goal or (high is not None and high - low <= _MULTIPLE):
        return None
    second = peaks[high] if high is not None else peaks[fitting[-2]]
    if second is None or second == reached:
        middle = (low + high) / 2 if high is not None else _STRIDE * low
    else:
        base = high if high is not None else fitting[-2]
        share = (goal - reached) / (second - reached)
        middle = max(low**2 + share * (base**2 - low**2), 0) ** 0.5
    at_most = high - _MULTIPLE if high is not None else int(_STRIDE * low) // _MULTIPLE * _MULTIPLE
    return min(max(int(middle) // _MULTIPLE * _MULTIPLE, low + _MULTIPLE), at_most)


# ---- In the fresh process.


def _measure(case: Case, naive: bool, threads: int, limit: int | None) -> dict[str, Any]:
    torch.set_num_threads(threads)
    _hold_to(limit)
    try:
        tracker = _started(case, naive)
        output = "probs" if naive else "labels"
        for number in range(1, case.frames if case.network == SEMANTIC else 2):
            tracker.step(_frame(case, number), output=output)
        last = _frame(case, case.frames)
        seconds = Clock(threads=threads).seconds(lambda: tracker.step(last, output=output))
    except (MemoryError, RuntimeError, ImportError) as error:
        if limit is None or not (isinstance(error, MemoryError) or any(x in str(error) for x in _NO_MEMORY)):
            raise
        return {"failure": f"more than {limit / 1e9:g} GB"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = None if case.network == SEMANTIC else tracker.memory_bytes()
    return {"seconds": seconds, "peak": peak, "memory": memory}


def _started(case: Case, naive: bool) -> Any:
    """Return a tracker after its first frame, its memory filled up to two frames less than the case has."""
    from vosops.inference import NetworkTracker, SemanticTracker
    from vosops.models import create_model

    if case.network == SEMANTIC:
        return SemanticTracker(create_model(case.network), naive=naive, channels_last=not naive)
    tracker = NetworkTracker(create_model(case.network), naive=naive)
    height, width = case.size
    labels = torch.zeros(case.size, dtype=torch.uint8)
    for i in range(case.objects):
        left = (2 * i + 1) * width // (2 * case.objects + 1)
        labels[height // 4 : height // 2, left : left + width // (2 * case.objects + 1)] = 1 + i
    tracker.initialize(_frame(case, 0), labels)
    with tracker._running():
        tracker._memorise()
        for memory in tracker._memories:
            if hasattr(memory, "store"):
                _fill(memory, case)
    return tracker


def _fill(memory: Any, case: Case) -> None:
    """Frames of random keys and values: what is in a memory changes neither time nor memory."""
    size = [-(-side // 16) for side in case.size]
    for frame in range(case.frames - 2):
        for o in memory.object_ids:
            key, value = torch.randn(1, 128, *size), torch.randn(1, 512, *size)
            memory.store(o, key, value, frame=_FIRST_FILLER + frame, permanent=False, keep=True)


def _frame(case: Case, number: int) -> Tensor:
    random = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, *case.size), generator=random, dtype=torch.uint8)


def _hold_to(limit: int | None) -> None:
    """Let allocations fail beyond this many bytes; bytes reserved at the start without being used do not count."""
    if limit is None or sys.platform != "linux":
        return
    with open("/proc/self/status") as file:
        kilobytes = {
            line.split(":")[0]: int(line.split()[1]) for line in file if line.rstrip().endswith("kB")
        }
    reserved = 1024 * (kilobytes["VmData"] - kilobytes["RssAnon"])
    resource.setrlimit(resource.RLIMIT_DATA, (limit + max(reserved, 0), resource.RLIM_INFINITY))
