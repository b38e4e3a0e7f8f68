"""Fleets on Ray: a function for Ray Data that segments videos, and a whole data set on a cluster.

Ray starts the workers, gives them GPUs and repeats what died; what a worker has done is kept by the run in the output
folder, from whose last checkpoint the next one continues. ``pip install 'vosops[ray]'``.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from vosops.io.datasets import find_sequences
from vosops.io.errors import IncompleteInputError, InputError, VosopsError, require
from vosops.io.streams import is_url
from vosops.runs.fleet import Fleet, Shard
from vosops.runs.job import Job, Settings
from vosops.runs.report import REPORT

_ADDRESS_LOCAL = "local"
_RETRIES = 5  # of a sequence whose worker died


class Segmenter:
    """Segments videos in a Ray actor that keeps its model: for ``Dataset.map_batches``.

    A row has ``video`` and ``mask``, paths or fsspec URLs, and ``name``, the folder of its masks in ``out``. It comes
    back with ``out``, ``frames``, ``seconds`` and ``problem`` (empty, or one line: a video that cannot be used is no
    reason to stop the others). A run that was begun is continued, one that is complete is left alone, so that Ray may
    repeat a task: under a folder that the workers share from the last checkpoint, under a URL from the video's start.

    Args:
        out: Folder that all workers see, or fsspec URL (``s3://bucket/masks``), to which finished masks are copied.
        settings: `vosops.runs.job.Settings` as keywords: ``model``, ``weights``, ``size``, ...

    Example:
        >>> import ray
        >>> from vosops.integrations.ray import Segmenter
        >>> rows = [{"video": "a.mp4", "mask": "a.png", "name": "a"}]
        >>> masks = ray.data.from_items(rows).map_batches(  # doctest: +SKIP
        ...     Segmenter, fn_constructor_kwargs={"out": "masks"}, batch_size=1, concurrency=4, num_gpus=1
        ... )
    """

    def __init__(self, out: str | Path, **settings: Any) -> None:
        self._remote = str(out).rstrip("/") if is_url(str(out)) else None
        self._out = Path(tempfile.mkdtemp(prefix="vosops-")) if self._remote else Path(out)
        if self._remote:
            _fsspec()
        self._job = Job(self._out, "resume", Settings(**settings))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Segment the rows of a batch, one after the other."""
        rows = [
            self._row(*map(str, row))
            for row in zip(batch["video"], batch["mask"], batch["name"], strict=True)
        ]
        return {key: [row[key] for row in rows] for key in rows[0]} if rows else {}

    def _row(self, video: str, mask: str, name: str) -> dict[str, Any]:
        if not name or Path(name).name != name:
            raise InputError(f"name must be the name of a folder, got {name!r}")
        where = f"{self._remote}/{name}" if self._remote else str(self._out / name)
        row = {"name": name, "video": video, "out": where, "frames": 0, "seconds": 0.0, "problem": ""}
        with tempfile.TemporaryDirectory(prefix="vosops-") as folder:
            try:
                if self._remote and _remote_exists(f"{where}/{REPORT}"):
                    return row
                sources = [_local(each, Path(folder) / str(i)) for i, each in enumerate((video, mask))]
                job = self._job.into(self._out / name)
                summary = job.video(sources[0], [sources[1]])
                row |= {"frames": summary.frames, "seconds": summary.seconds}
            except (InputError, IncompleteInputError) as error:
                row["problem"] = str(error)
            if self._remote:
                self._upload(self._out / name, where)
        return row

    def _upload(self, folder: Path, where: str) -> None:
        """Copy a finished run, its report last, and forget the local one."""
        if not folder.is_dir():
            return
        fsspec = _fsspec()
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = [path for path in files if ".vosops" not in path.relative_to(folder).parts]
        for path in sorted(files, key=lambda path: path.name == REPORT):
            with fsspec.open(f"{where}/{path.relative_to(folder).as_posix()}", "wb") as target:
                target.write(path.read_bytes())
        shutil.rmtree(folder)


def segment_dataset(
    job: Job,
    root: Path,
    names: Sequence[str] = (),
    resolution: str | None = None,
    address: str = _ADDRESS_LOCAL,
    workers: int = 2,
    *,
    gpus: float | None = None,
) -> list[str]:
    """Segment a data set on a Ray cluster, whose machines all see ``root`` and the job's ``out``; the sequences' names.

    Args:
        job: What to run; its progress and signals stay on this machine.
        root: The data set.
        names: Only these sequences.
        resolution: Of a DAVIS data set.
        address: Of the cluster, "auto", or "local" for a new one on this machine.
        workers: How many actors.
        gpus: Of each; None: one where the cluster has any.

    Raises:
        IncompleteInputError: A sequence cannot be used; the others are done.
        VosopsError: Ray is not installed, or gave up on a worker.
    """
    if workers < 1:
        raise InputError(f"--ray-workers must be at least 1, got {workers}")
    ray = _ray()
    sequences = [sequence.name for sequence in find_sequences(root, names, resolution)]
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    try:
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        job = replace(job, shard=Shard(), steal=False).for_workers()
        options = {"num_gpus": gpus, "max_restarts": -1, "max_task_retries": _RETRIES}
        actors = [
            ray.remote(_Worker).options(**options).remote(job, root.resolve(), sequences, resolution)
            for _ in range(min(workers, len(sequences)))
        ]
        pool = ray.util.ActorPool(actors)
        problems = pool.map_unordered(lambda actor, name: actor.segment.remote(name), sequences)
        found = [problem for problem in problems if problem]
    except ray.exceptions.RayError as error:
        raise VosopsError(f"Ray gave up: {' '.join(str(error).split())}") from error
    finally:
        if started:
            ray.shutdown()
    if found:
        raise IncompleteInputError(found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else ""))
    return sequences


class _Worker:
    """An actor that segments sequences of a data set, one a call."""

    def __init__(self, job: Job, root: Path, sequences: Sequence[str], resolution: str | None) -> None:
        self._job, self._root = job, root
        self._sequences, self._resolution = list(sequences), resolution

    def segment(self, name: str) -> str:
        """Segment a sequence, or continue what a worker left that died; what is wrong with it, in a line."""
        try:
            self._job.dataset(self._root, self._sequences, self._resolution, only=[name])
        except (InputError, IncompleteInputError) as error:
            return str(error)
        outcome = Fleet(self._job.out).outcome(name)
        return f"{name}: {outcome.problem}" if outcome is not None and outcome.problem else ""


def _local(name: str, copy: Path) -> str:
    """Return the path of an input, which is copied from a URL of fsspec."""
    if not is_url(name):
        return name
    suffix = Path(name.rpartition("/")[2]).suffix
    target = copy.with_suffix(suffix)
    try:
        with _fsspec().open(name, "rb") as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    except Exception as error:  # whatever file systems raise
        raise InputError(f"{name} cannot be read ({' '.join(str(error).split())})") from error
    return str(target)


def _remote_exists(url: str) -> bool:
    with suppress(Exception):
        file_system, path = _fsspec().core.url_to_fs(url)
        return bool(file_system.exists(path))
    return False


def _ray() -> ModuleType:
    ray = require("ray", "ray")
    require("ray.util", "ray")
    return ray


def _fsspec() -> ModuleType:
    return require("fsspec", "ray")
