"""Scores folders of predicted masks against folders of true ones, on every core."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vosops.inference.errors import InputError
from vosops.inference.masks import read_labels
from vosops.metrics.davis import IGNORED, ObjectScore, compare_masks, scored_frames

FRAMES_PER_TASK = 8
"""Frames that a thread scores at a time: few enough to share one sequence among all cores."""

MERGED_OBJECT = 1
"""The id that stands for all objects merged into one."""

LISTED = 5
"""How many missing files or sequences an error names before it only counts them."""


class EvaluationError(ValueError):
    """What is wrong with the folders, in one line."""


@dataclass(frozen=True)
class Report:
    """The scores of all objects of all sequences."""

    objects: tuple[ObjectScore, ...]
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> tuple[str, ...]:
        """The names of the sequences, in order."""
        return tuple(dict.fromkeys(score.sequence for score in self.objects))

    def objects_of(self, sequence: str) -> list[ObjectScore]:
        """The scores of the objects of one sequence."""
        chosen = [score for score in self.objects if score.sequence == sequence]
        if not chosen:
            raise ValueError(f"sequence: expected one of {', '.join(self.sequences)}; got {sequence!r}")
        return chosen

    def summary(self, sequence: str | None = None) -> dict[str, float]:
        """The means over objects, of one sequence or of all, by the names of `ObjectScore.row`."""
        rows = [score.row() for score in (self.objects if sequence is None else self.objects_of(sequence))]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def table(self) -> list[dict[str, str | int | float]]:
        """One row per object: sequence, object, and the columns of `summary`."""
        return [{"sequence": s.sequence, "object": s.object_id, **s.row()} for s in self.objects]

    def to_dict(self) -> dict[str, Any]:
        """Everything, values frame by frame included, as plain data for JSON."""
        sequences = {
            name: {
                **self.summary(name),
                "objects": {
                    str(s.object_id): {
                        **s.row(),
                        "frames": {
                            k: [j, f] for k, j, f in zip(s.frames, s.j_values, s.f_values, strict=True)
                        },
                    }
                    for s in self.objects_of(name)
                },
            }
            for name in self.sequences
        }
        return {"protocol": self.protocol, "global": self.summary(), "sequences": sequences}


def evaluate(
    predictions: str | os.PathLike[str],
    ground_truth: str | os.PathLike[str],
    *,
    sequences: Sequence[str] | None = None,
    merge_objects: bool = False,
    keep_ends: bool = False,
    ignore_void: bool = False,
    jobs: int | None = None,
) -> Report:
    """J and F of every object, by the semi-supervised protocol of DAVIS 2017.

    Args:
        predictions: folder with a folder of PNG label maps per sequence; a folder of PNGs where ground_truth
            is one sequence.
        ground_truth: the same, or the root of a dataset (`Annotations/480p/<sequence>` of DAVIS,
            `Annotations/<sequence>` of YouTube-VOS), or the folder of one sequence. Its files say which
            frames count.
        sequences: names to score; default all of ground_truth.
        merge_objects: score all objects as one (DAVIS 2016). Always so where the truth holds only 0 and 255.
        keep_ends: score the first and the last frame of a sequence as well.
        ignore_void: leave pixels labelled 255 in the truth out of the comparison. By default they count as
            background, as DAVIS' code does.
        jobs: threads; default one per core.

    Raises:
        EvaluationError: a folder is not what it must be, or predictions are missing, of the wrong size, or
            hold an object that the truth does not.
    """
    pairs = _find_sequences(Path(predictions), Path(ground_truth), sequences)
    plans = [_plan(name, predicted, true, merge_objects, keep_ends) for name, predicted, true in pairs]
    with _pool(jobs) as pool:
        tasks = [_submit(pool, plan, ignore_void) for plan in plans]
        objects = [score for plan, parts in zip(plans, tasks, strict=True) for score in _collect(plan, parts)]
    protocol = {"merge_objects": merge_objects, "keep_ends": keep_ends, "ignore_void": ignore_void}
    return Report(tuple(objects), protocol)


# --- which files ---


class _Labels(Enum):
    """What the labels of a sequence mean."""

    OBJECTS = "one object per value, 255 is void"
    MERGED = "every value but 255 is the one object"
    BINARY = "every value, 255 too, is the one object"


@dataclass(frozen=True)
class _Plan:
    """One sequence: the frames to score, and how."""

    name: str
    predictions: Path
    ground_truth: Path
    frames: tuple[str, ...]
    ids: frozenset[int]
    labels: _Labels


def _find_sequences(
    predictions: Path, ground_truth: Path, names: Sequence[str] | None
) -> list[tuple[str, Path, Path]]:
    """Name, folder of predictions and folder of truth of each sequence to score."""
    for folder in (predictions, ground_truth):
        if not folder.is_dir():
            raise EvaluationError(f"{folder}: no such folder")
    if _pngs(ground_truth):
        name = ground_truth.resolve().name
        nested = predictions / name
        return [(name, nested if _pngs(nested) else predictions, ground_truth)]
    root = _annotations(ground_truth)
    found = sorted(folder.name for folder in root.iterdir() if _pngs(folder))
    if not found:
        raise EvaluationError(f"{ground_truth}: holds neither PNG masks nor folders of them")
    if names is not None:
        absent = [name for name in names if name not in found]
        if absent:
            raise EvaluationError(
                f"{root}: no ground truth for {_listing(absent)}; there is {_listing(found)}"
            )
        found = list(dict.fromkeys(names))
    if len(found) == 1 and _pngs(predictions) and not _pngs(predictions / found[0]):
        return [(found[0], predictions, root / found[0])]
    absent = [name for name in found if not _pngs(predictions / name)]
    if absent:
        have = "" if len(absent) == len(found) else "; --sequences scores the others"
        raise EvaluationError(f"{predictions}: no predictions for {_listing(absent)}{have}")
    return [(name, predictions / name, root / name) for name in found]


def _annotations(root: Path) -> Path:
    """The folder of the sequences: `root` itself, `root/Annotations`, or one resolution in that."""
    for folder in (root / "Annotations" / "480p", root / "Annotations", root):
        if folder.is_dir() and any(_pngs(child) for child in folder.iterdir()):
            return folder
    resolutions = sorted(f for f in (root / "Annotations").glob("*") if f.is_dir())
    return resolutions[0] if len(resolutions) == 1 else root


def _pngs(folder: Path) -> list[str]:
    """The stems of the PNG files in a folder, sorted; empty where it is none."""
    if not folder.is_dir():
        return []
    return sorted(entry.name[:-4] for entry in os.scandir(folder) if entry.name.lower().endswith(".png"))


def _plan(name: str, predictions: Path, ground_truth: Path, merge: bool, keep_ends: bool) -> _Plan:
    stems = _pngs(ground_truth)
    try:
        frames = tuple(scored_frames(stems, keep_ends))
    except ValueError as error:
        raise EvaluationError(f"{ground_truth}: {error}") from None
    absent = sorted(set(frames) - set(_pngs(predictions)))
    if absent:
        raise EvaluationError(f"{predictions}: no prediction for frame {_listing(absent)}")
    for stem in stems:
        ids = _values(_read(ground_truth / f"{stem}.png"))
        if ids:
            labels = _Labels.BINARY if ids == {IGNORED} else _Labels.MERGED if merge else _Labels.OBJECTS
            ids = ids - {IGNORED} if labels is _Labels.OBJECTS else {MERGED_OBJECT}
            return _Plan(name, predictions, ground_truth, frames, frozenset(ids), labels)
    raise EvaluationError(f"{ground_truth}: no frame holds an object")


def _read(path: Path) -> NDArray[np.uint8]:
    """A label map (H, W)."""
    try:
        return read_labels(path)[0]
    except InputError as error:
        raise EvaluationError(str(error)) from None


def _values(labels: NDArray[np.uint8]) -> set[int]:
    """The non-zero values of a label map."""
    return set(np.flatnonzero(np.bincount(labels.ravel(), minlength=IGNORED + 1)).tolist()) - {0}


def _listing(names: Sequence[str]) -> str:
    """Names separated by commas, at most `LISTED` of them."""
    shown = ", ".join(names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"


# --- the work ---


@dataclass(frozen=True)
class _Frame:
    """One frame: the objects of the truth, and (J, F) of every object of the truth or the prediction."""

    true_ids: set[int]
    scores: dict[int, tuple[float, float]]


_Task = list[_Frame] | Future[list[_Frame]]


@contextmanager
def _pool(jobs: int | None) -> Iterator[Executor | None]:
    """Threads to work in, or None for this one alone.

    Decoding PNG files and counting pixels in numpy both leave the interpreter's lock. Processes would have to be
    forked beside the threads of torch, which may hang, or import torch anew each.
    """
    workers = jobs or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if workers == 1:
        yield None
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vosops-eval")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: Executor | None, plan: _Plan, ignore_void: bool) -> list[_Task]:
    """The frames of a sequence, some at a time: scored, or on their way."""
    chunks = [plan.frames[i : i + FRAMES_PER_TASK] for i in range(0, len(plan.frames), FRAMES_PER_TASK)]
    if pool is None:
        return [_score_frames(plan, chunk, ignore_void) for chunk in chunks]
    return [pool.submit(_score_frames, plan, chunk, ignore_void) for chunk in chunks]


def _score_frames(plan: _Plan, frames: Sequence[str], ignore_void: bool) -> list[_Frame]:
    return [_score_frame(plan, frame, ignore_void) for frame in frames]


def _score_frame(plan: _Plan, frame: str, ignore_void: bool) -> _Frame:
    """J and F of each object of one frame; errors name the file."""
    file = plan.predictions / f"{frame}.png"
    predicted, true = _read(file), _read(plan.ground_truth / f"{frame}.png")
    if predicted.shape != true.shape:
        expected, got = (f"{width}x{height}" for height, width in (true.shape, predicted.shape))
        raise EvaluationError(f"{file}: expected {expected} pixels as in the ground truth; got {got}")
    true_ids = _values(true)
    void = None
    if plan.labels is not _Labels.BINARY and IGNORED in true_ids:
        void = true == IGNORED
        true = np.where(void, 0, true)
        true_ids.remove(IGNORED)
    excluded = void if ignore_void else None
    if plan.labels is not _Labels.OBJECTS:
        return _Frame({MERGED_OBJECT}, {MERGED_OBJECT: compare_masks(predicted, true, excluded)})
    ids = true_ids | _values(predicted)
    return _Frame(true_ids, {i: compare_masks(predicted == i, true == i, excluded) for i in ids})


def _collect(plan: _Plan, parts: Sequence[_Task]) -> list[ObjectScore]:
    """The scores of the objects of a sequence; where an object is neither true nor predicted it scores 1."""
    frames = [frame for part in parts for frame in (part.result() if isinstance(part, Future) else part)]
    ids = plan.ids.union(*(frame.true_ids for frame in frames))
    strays = sorted(set().union(*(frame.scores for frame in frames)) - ids)
    if strays:
        hint = "; --merge-objects scores 0/255 masks" if strays == [IGNORED] else ""
        raise EvaluationError(
            f"{plan.predictions}: labels {_listing([str(i) for i in strays])} are not in the ground truth, "
            f"which has {_listing([str(i) for i in sorted(ids)])}{hint}"
        )
    scores = []
    for i in sorted(ids):
        pairs = [frame.scores.get(i, (1.0, 1.0)) for frame in frames]
        scores.append(
            ObjectScore(plan.name, i, plan.frames, tuple(j for j, _ in pairs), tuple(f for _, f in pairs))
        )
    return scores
