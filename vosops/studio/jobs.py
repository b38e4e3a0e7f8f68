"""What takes longer than a request: one queue, one worker, and a file for each job that says how far it came."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vosops.io.errors import DiskError, InputError, VosopsError
from vosops.io.outputs import write_text
from vosops.runs.report import RESUME

from .project import JOBS, Project

__all__ = ["Control", "Job", "JobQueue", "Perform", "said"]

State = Literal["waiting", "running", "paused", "done", "failed", "stopped"]
_UNFINISHED = ("waiting", "running", "paused")
_WRITE_EVERY = 1.0  # seconds between two writes of a running job's file
_RATE_OVER = 5.0  # seconds over which frames a second are averaged


@dataclass
class Job:
    """A job and how far it came.

    Attributes:
        project: Id of its project.
        number: Its number there.
        kind: What it does: a key of the queue's table.
        request: What was asked for.
        state: Where it is; "paused" continues from where it was, "stopped" does not.
        done: Frames that are finished.
        total: Frames in all; None: not known.
        rate: Frames a second of late.
        message: The error, or what came of it; one line.
        memory: What the job must know to continue, such as the folder that it writes to.
    """

    project: str
    number: int
    kind: str
    request: dict[str, Any]
    state: State = "waiting"
    done: int = 0
    total: int | None = None
    rate: float = 0.0
    message: str = ""
    memory: dict[str, Any] = field(default_factory=dict)


class Control:
    """What a job in progress asks and tells."""

    def __init__(self, job: Job, changed: Callable[[Job, dict[str, Any], bool], None]) -> None:
        self.job = job
        self.wish: Literal["", "pause", "stop"] = ""
        self._changed = changed
        self._recent: deque[tuple[float, int]] = deque()

    def should_stop(self) -> bool:
        """Whether somebody wishes the job to pause or to stop; asked after each frame."""
        return bool(self.wish)

    def begin(self, total: int | None, done: int = 0) -> None:
        """Say how many frames there are, and how many were done before; what the job remembers is on the disk then."""
        self.job.total, self.job.done = total, done
        self._recent.clear()
        self._changed(self.job, {}, True)

    def advance(self, **news: Any) -> None:
        """Count a frame; ``news`` goes to the page with it."""
        self.job.done += 1
        now = time.monotonic()
        self._recent.append((now, self.job.done))
        while now - self._recent[0][0] > _RATE_OVER:
            self._recent.popleft()
        then, before = self._recent[0]
        self.job.rate = round((self.job.done - before) / (now - then), 2) if now > then else 0.0
        self._tell(news)

    def _tell(self, news: dict[str, Any]) -> None:
        self._changed(self.job, news, False)


class Perform:
    """Kinds of jobs: what does each of them, by name.

    Args:
        kinds: What does each kind.
        continuing: The kinds that continue from where they were; others begin again.
    """

    def __init__(
        self,
        kinds: Mapping[str, Callable[[Project, Job, Control], str]],
        continuing: Collection[str] = (),
    ) -> None:
        self.kinds = dict(kinds)
        self.continuing = frozenset(continuing)

    def __call__(self, project: Project, job: Job, control: Control) -> str:
        """Do the job; return what came of it, in one line."""
        return self.kinds[job.kind](project, job, control)


def said(error: VosopsError) -> str:
    """Return an error's line in the words of the page, which knows no commands."""
    return str(error).replace(RESUME, "continue").replace("run the same command again", "try again")


class JobQueue:
    """Jobs of all projects, done one after the other in a thread of their own.

    Args:
        perform: Does them. It returns when ``control.should_stop()`` says so, with everything written that it needs to
            continue.
        publish: Called with each event for the page, in any thread: {"type": "job", "job": ..., and news}.
    """

    def __init__(self, perform: Perform, publish: Callable[[dict[str, Any]], None]) -> None:
        self._perform = perform
        self._publish = publish
        self._lock = threading.Condition()
        self._waiting: deque[tuple[Project, Job]] = deque()
        self._jobs: dict[str, dict[int, Job]] = {}
        self._folders: dict[str, Path] = {}
        self._control: Control | None = None
        self._written = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    def adopt(self, project: Project) -> None:
        """Learn of a project's jobs; those that a process left unfinished are paused now."""
        with self._lock:
            if project.id in self._jobs:
                return
            folder = project.folder / JOBS
            found = {}
            for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
                try:
                    job = Job(**json.loads(path.read_bytes()))
                except (OSError, ValueError, TypeError):
                    continue
                if job.state not in get_args(State):
                    continue
                if job.state in ("waiting", "running"):
                    job.state, job.message = "paused", "the server ended"
                found[job.number] = job
            self._jobs[project.id], self._folders[project.id] = found, folder

    def submit(self, project: Project, kind: str, request: dict[str, Any]) -> Job:
        """Add a job at the end of the queue.

        Raises:
            InputError: There is no such kind of job.
        """
        if kind not in self._perform.kinds:
            raise InputError(f"kind must be one of {', '.join(self._perform.kinds)}, got {kind!r}")
        self.adopt(project)
        with self._lock:
            jobs = self._jobs[project.id]
            job = Job(project.id, max(jobs, default=0) + 1, kind, request)
            jobs[job.number] = job
            self._enqueue(project, job)
            return job

    def resume(self, project: Project, number: int) -> Job:
        """Continue a paused job.

        Raises:
            InputError: There is no such job, or it is not paused.
        """
        with self._lock:
            job = self.paused(project, number)
            job.state, job.message = "waiting", ""
            self._enqueue(project, job)
            return job

    def paused(self, project: Project, number: int) -> Job:
        """Return a paused job.

        Raises:
            InputError: There is no such job, or it is not paused.
        """
        with self._lock:
            job = self._find(project.id, number)
            if job.state != "paused":
                raise InputError(f"job {number} is {job.state}: only a paused one continues")
            return job

    def pause(self, project: Project, number: int) -> Job:
        """Let a job come to rest after its current frame."""
        return self._halt(project, number, "pause")

    def stop(self, project: Project, number: int) -> Job:
        """End a job permanently; what it has written stays."""
        return self._halt(project, number, "stop")

    def jobs(self, project: Project) -> list[dict[str, Any]]:
        """Return the jobs of a project, the latest first."""
        self.adopt(project)
        with self._lock:
            return [asdict(job) for job in sorted(self._jobs[project.id].values(), key=lambda j: -j.number)]

    def unfinished(self, project: Project, kind: str) -> list[Job]:
        """Return the jobs of a kind that are not at their end."""
        self.adopt(project)
        with self._lock:
            return [j for j in self._jobs[project.id].values() if j.kind == kind and j.state in _UNFINISHED]

    def close(self) -> None:
        """Pause what is in progress and end the thread."""
        self.pause_all()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def pause_all(self) -> bool:
        """Take no more jobs, and let the one in progress come to rest; return whether there is one."""
        with self._lock:
            self._closed = True
            if self._control is not None:
                self._control.wish = "pause"
            for _, job in self._waiting:
                job.state, job.message = "paused", "the server ended"
                self._write(job)
            self._waiting.clear()
            self._lock.notify_all()
            return self._control is not None

    def _find(self, project: str, number: int) -> Job:
        job = self._jobs.get(project, {}).get(number)
        if job is None:
            raise InputError(f"there is no job {number}")
        return job

    def _enqueue(self, project: Project, job: Job) -> None:
        self._waiting.append((project, job))
        self._write(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="vosops-studio-jobs", daemon=True)
            self._thread.start()
        self._lock.notify_all()
        self._tell(job, {})

    def _halt(self, project: Project, number: int, wish: Literal["pause", "stop"]) -> Job:
        with self._lock:
            job = self._find(project.id, number)
            if self._control is not None and self._control.job is job:
                self._control.wish = wish
            elif job.state in _UNFINISHED:
                self._waiting = deque(entry for entry in self._waiting if entry[1] is not job)
                job.state = "paused" if wish == "pause" else "stopped"
                self._write(job)
                self._tell(job, {})
            return job

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closed:
                    self._lock.wait()
                if self._closed:
                    return
                project, job = self._waiting.popleft()
                control = self._control = Control(job, self._changed)
                job.state, job.message = "running", ""
                self._write(job)
            self._tell(job, {})
            state: State = "done"
            try:
                job.message = self._perform(project, job, control)
                if control.wish == "pause":
                    state, job.message = "paused", ""
                elif control.wish:
                    state = "stopped"
            except DiskError as error:
                state = "paused" if job.kind in self._perform.continuing else "failed"
                job.message = said(error)
            except VosopsError as error:
                state, job.message = "failed", said(error)
            except Exception as error:  # the queue goes on whatever a job does
                traceback.print_exc()
                state, job.message = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
            with self._lock:
                job.state, job.rate = state, 0.0
                self._control = None
                self._write(job)
            self._tell(job, {})

    def _changed(self, job: Job, news: dict[str, Any], at_once: bool) -> None:
        now = time.monotonic()
        if at_once or now - self._written > _WRITE_EVERY:
            self._written = now
            self._write(job)
        self._tell(job, news)

    def _write(self, job: Job) -> None:
        """Write a job's file. Where the disk is full it keeps an earlier state, from which the job goes on too."""
        path = self._folders[job.project] / f"{job.number:04d}.json"
        with suppress(VosopsError):
            write_text(path, json.dumps(asdict(job), indent=1))

    def _tell(self, job: Job, news: dict[str, Any]) -> None:
        self._publish({"type": "job", "project": job.project, "job": asdict(job), **news})
