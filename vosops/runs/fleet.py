"""Several workers on one data set: who takes which sequence, what happens when one dies, and the report of all.

Workers share nothing but the output folder. In ``<out>/.vosops/fleet`` are

- ``job.json``: the arguments of the first worker, which those of the others must equal;
- ``SEQUENCE.lease.N``: the N-th taking of a sequence. A file is made by one worker alone (``O_EXCL``), which renews its
  modification time while it works; when that stands still, whoever makes number N + 1 first takes over. It says who
  took the sequence, and which checkpoint there was;
- ``SEQUENCE.done``: what a sequence came to.

Ages are differences of modification times that the file system of the folder made itself, so that the clocks of the
workers do not matter.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vosops.io.errors import InputError, InterruptedRunError, VosopsError, disk_errors
from vosops.io.outputs import STATE_FOLDER, write_text

from .checkpoint import CHECKPOINT, differences
from .progress import never

LEASE_SECONDS = 60.0
FLEET_FOLDER = "fleet"
_JOB = "job.json"
_REPORT_LEASE = "report"  # with a slash before it no sequence has this name
_RENEWALS = 4  # of a lease before it would expire
_MOST_DEATHS = 3  # of workers at a sequence, one after the other without a checkpoint between
_LONGEST_POLL = 5.0
_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
_FIRST_TASK, _LAST_TASK, _STEP = "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP"
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True)
class Shard:
    """One of ``count`` workers, ``index`` from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Shard:
        """Return the shard of ``i/n``, i from 0, or for ``auto`` that of torchrun, Open MPI or Slurm.

        ``auto`` reads RANK and WORLD_SIZE, OMPI_COMM_WORLD_RANK and _SIZE, SLURM_ARRAY_TASK_ID and _COUNT (whose ids
        may start anywhere and have any step, but no gaps), SLURM_PROCID and SLURM_NTASKS: the first pair that is set.
        """
        if text == "auto":
            return cls._of_environment(environment)
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise InputError(f"--shard must be auto or i/n with i from 0 to n - 1, got {text}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def _of_environment(cls, environment: Mapping[str, str]) -> Shard:
        for index, count in _VARIABLES:
            if index not in environment or count not in environment:
                continue
            try:
                found = cls(int(environment[index]), int(environment[count]))
                if index == "SLURM_ARRAY_TASK_ID":
                    found = cls(_place_in_array(found, environment), found.count)
            except ValueError as error:
                raise InputError(f"--shard auto: {index} and {count} must be numbers: {error}") from error
            if not 0 <= found.index < found.count:
                raise InputError(
                    f"--shard auto: {index}={environment[index]} must be one of {count}={environment[count]}"
                )
            return found
        names = ", ".join("/".join(pair) for pair in _VARIABLES)
        raise InputError(f"--shard auto finds none of {names}: give --shard i/n")


def _place_in_array(task: Shard, environment: Mapping[str, str]) -> int:
    """Return how many tasks of a job array are before this one."""
    first, step = int(environment.get(_FIRST_TASK, "0")), int(environment.get(_STEP, "1"))
    last = int(environment.get(_LAST_TASK, str(first + (task.count - 1) * step)))
    if step < 1 or last - first != (task.count - 1) * step or (task.index - first) % step:
        raise InputError(
            f"--shard auto: the ids of a job array must be a range such as 0-9 or 1-9:2, got {task.count} tasks "
            f"from {first} to {last} in steps of {step}: give --shard i/n"
        )
    return (task.index - first) // step


def divide(frames: Mapping[str, int], count: int) -> list[list[str]]:
    """Divide sequences among ``count`` workers by their frames: the longest first, each to who has the least.

    No worker has more frames than another by more than its last sequence. The same on every worker.
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(frames, key=lambda name: (-frames[name], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += frames[name]
    return shares


def device_of_worker(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the GPU of this worker where a launcher numbers those of a machine; None where there is not a choice."""
    import torch

    count = torch.cuda.device_count()
    for name in _LOCAL_RANKS:
        if count > 1 and environment.get(name, "").isdigit():
            return f"cuda:{int(environment[name]) % count}"
    return None


@dataclass(frozen=True)
class Outcome:
    """What a sequence came to: its part of the report of the data set."""

    frames: int
    seconds: float
    events: list[str]
    problem: str | None
    worker: str
    takeovers: int


class LeaseLostError(VosopsError):
    """Another worker has taken over the sequence, because this one did not renew its lease in time."""


class Lease:
    """A sequence that this worker has; renewed by a thread until it is released or lost.

    Attributes:
        number: How many workers had it before, from 0.
    """

    def __init__(self, fleet: Fleet, name: str, number: int) -> None:
        self.number = number
        self._fleet, self._name = fleet, name
        self._path = fleet.lease_path(name, number)
        self._next = fleet.lease_path(name, number + 1)
        self._renewed = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease of {name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another worker has it, or may have: this one was not able to renew it in time."""
        late = time.monotonic() - self._renewed > self._fleet.lease_seconds
        return late or self._next.exists()

    def check(self) -> None:
        """Raise :class:`LeaseLostError` if it is lost."""
        if self.lost:
            raise LeaseLostError(
                f"{self._name} was taken over by another worker, because this one had not renewed its lease for "
                f"{self._fleet.lease_seconds:g} s"
            )

    def release(self) -> None:
        """Let another worker take it at once; where one has taken it, say that this worker is alive."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            os.utime(self._path, (0, 0))

    def _renew(self) -> None:
        while not self._ended.wait(self._fleet.lease_seconds / _RENEWALS):
            began = time.monotonic()
            with suppress(OSError):
                os.utime(self._path)
                self._renewed = began


class Fleet:
    """The folder in which the workers of a job agree.

    Args:
        out: The output folder of the data set.
        lease_seconds: How long a worker may make no progress before others take what it has.
        worker: What this one is called in the report; None: its host and process.
    """

    def __init__(self, out: Path, lease_seconds: float = LEASE_SECONDS, worker: str | None = None) -> None:
        if not lease_seconds > 0:
            raise InputError(f"--lease must be above 0 seconds, got {lease_seconds}")
        self.out = out
        self.folder = out / STATE_FOLDER / FLEET_FOLDER
        self.lease_seconds = lease_seconds
        self.worker = worker or f"{socket.gethostname()}:{os.getpid()}"

    @property
    def exists(self) -> bool:
        """Whether a worker was here."""
        return (self.folder / _JOB).exists()

    def join(self, arguments: dict[str, Any]) -> None:
        """Begin a job, or become a worker of the one that is here.

        Raises:
            InputError: The job here has other arguments.
        """
        text = json.dumps(arguments, indent=1)
        path = self.folder / _JOB
        with disk_errors(str(path)):
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f".{uuid.uuid4().hex}"
            part.write_text(text, encoding="utf-8")
            try:
                with suppress(FileExistsError):
                    os.link(part, path)  # whole, or not there
            finally:
                part.unlink()
            before = json.loads(path.read_text(encoding="utf-8"))
        found = differences(before, json.loads(text))
        if found:
            raise InputError(
                f"{self.out} holds the results of workers with other arguments: {'; '.join(found)}. "
                "Give the same to all of them, or choose another --out"
            )

    # ---- Leases.

    def lease_path(self, name: str, number: int) -> Path:
        """Return the file of the N-th taking of a sequence."""
        return self.folder / f"{name}.lease.{number}"

    def take(self, name: str) -> Lease | None:
        """Return the lease of a sequence that nobody has, or whose worker stood still; None for any other."""
        number = self._latest(name)
        if number is not None and self._age(self.lease_path(name, number)) <= self.lease_seconds:
            return None
        number = 0 if number is None else number + 1
        with disk_errors(str(self.folder)):
            try:
                descriptor = os.open(
                    self.lease_path(name, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666
                )
            except FileExistsError:
                return None
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{self.worker}\n{self._checkpoint(name)}\n")
        return Lease(self, name, number)

    def trouble(self, name: str, number: int) -> str | None:
        """Return what is wrong with a sequence at which workers die, one after the other; None if it may be tried.

        It is said to whoever takes it for the N-th time, before a model has seen it. A worker that released its lease
        did not die, and a checkpoint made since is progress.
        """
        dead: list[str] = []
        now = self._checkpoint(name)
        for before in range(number - 1, -1, -1):
            path = self.lease_path(name, before)
            with disk_errors(str(path)):
                worker, checkpoint = [*path.read_text(encoding="utf-8").splitlines(), "", ""][:2]
                if path.stat().st_mtime == 0 or checkpoint != now:
                    break
            dead.append(worker)
        if len(dead) < _MOST_DEATHS:
            return None
        return (
            f"{len(dead)} workers died at it without a checkpoint between: {', '.join(reversed(dead))}; "
            "--resume tries it again"
        )

    def _checkpoint(self, name: str) -> str:
        """Return a text that differs once a sequence has another checkpoint."""
        with suppress(FileNotFoundError):
            return str((self.out / name / STATE_FOLDER / CHECKPOINT).stat().st_mtime_ns)
        return "none"

    def _latest(self, name: str) -> int | None:
        prefix = f"{name}.lease."
        numbers = [
            int(found.removeprefix(prefix))
            for found in os.listdir(self.folder)
            if found.startswith(prefix) and found.removeprefix(prefix).isdigit()
        ]
        return max(numbers, default=None)

    def _age(self, path: Path) -> float:
        """Return the seconds since a file was touched, by the clock of its file system."""
        probe = self.folder / f".{uuid.uuid4().hex}"
        with disk_errors(str(self.folder)):
            try:
                probe.touch()
                return probe.stat().st_mtime - path.stat().st_mtime
            finally:
                probe.unlink(missing_ok=True)

    # ---- Results.

    def finish(self, name: str, outcome: Outcome) -> None:
        """Say what a sequence came to; nobody takes it any more."""
        write_text(self._done_path(name), json.dumps(asdict(outcome)), sync=True)

    def outcome(self, name: str) -> Outcome | None:
        """Return what a sequence came to; None if it is not finished."""
        with suppress(FileNotFoundError):
            return Outcome(**json.loads(self._done_path(name).read_text(encoding="utf-8")))
        return None

    def reopen(self, name: str) -> None:
        """Let a sequence be tried again that had a problem."""
        outcome = self.outcome(name)
        if outcome is not None and outcome.problem:
            self._done_path(name).unlink(missing_ok=True)

    def is_done(self, name: str) -> bool:
        """Return whether a sequence is finished."""
        return self._done_path(name).exists()

    def _done_path(self, name: str) -> Path:
        return self.folder / f"{name}.done"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the other workers waiting, for what one of them must do at a time: the report."""
        name = f".{_REPORT_LEASE}"
        while (lease := self.take(name)) is None:
            time.sleep(self.poll_seconds)
        try:
            yield
        finally:
            lease.release()

    @property
    def poll_seconds(self) -> float:
        """How long to wait before looking again."""
        return min(self.lease_seconds / _RENEWALS, _LONGEST_POLL)

    # ---- Work.

    def each(
        self,
        own: Sequence[str],
        others: Sequence[str] = (),
        unusable: Collection[str] = (),
        should_stop: Callable[[], bool] = never,
        note: Callable[[str], None] = lambda text: None,
    ) -> Iterator[tuple[str, Lease]]:
        """Yield the sequences that this worker does, one after the other, until all of these are finished.

        Its own first, then those of the others. A sequence that another worker has is waited for, and taken if that
        worker dies. The caller releases the lease, and adds to `unusable` what this worker cannot do.

        Raises:
            InterruptedRunError: ``should_stop`` said so while it waited.
        """
        waited = False
        while True:
            left = [name for name in [*own, *others] if name not in unusable and not self.is_done(name)]
            if not left:
                return
            for name in left:
                lease = self.take(name)
                if lease is None:
                    continue
                waited = False
                if self.is_done(name):  # by the worker that had it until now
                    lease.release()
                else:
                    yield name, lease
                break
            else:
                if should_stop():
                    raise InterruptedRunError("stopped; run the same command again to continue")
                if not waited:
                    note(f"waiting for {len(left)} sequences that other workers have, first {left[0]}")
                    waited = True
                time.sleep(self.poll_seconds)
