"""Folders of label maps: which files belong together, and threads to read them in."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vosops.io.errors import InputError
from vosops.io.labels import read_labels
from vosops.io.listing import chosen_names, few, label_maps, shown, subfolders

Labels = NDArray[np.uint8]
"""A label map (H, W)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class EvaluationError(InputError, ValueError):
    """An error in the folders, described in one line."""


@dataclass(frozen=True)
class SequenceFolders:
    """One sequence to score: its name, the folder of its predictions and that of its truth."""

    name: str
    predictions: Path
    ground_truth: Path


@dataclass(frozen=True)
class Problem:
    """A sequence that could not be scored, and why, in one line."""

    sequence: str
    reason: str


def find_sequences(
    predictions: Path, ground_truth: Path, names: Sequence[str] | None
) -> list[SequenceFolders]:
    """Return the sequences to score, each with the folder where its predictions should be.

    Raises:
        EvaluationError: There is no truth, a name is unknown, or there are no predictions at all.
    """
    for folder in (predictions, ground_truth):
        if not folder.is_dir():
            what = "is a file; give a folder of masks" if folder.exists() else "no such folder"
            raise EvaluationError(f"{shown(folder)}: {what}")
    if pngs(ground_truth):
        name = ground_truth.resolve().name
        _chosen(names, [name], ground_truth)
        nested = predictions / name
        return [SequenceFolders(name, nested if _holds_masks(nested) else predictions, ground_truth)]
    root = sequence_root(ground_truth)
    found = [folder.name for folder in subfolders(root) if _holds_masks(folder)]
    if not found:
        raise EvaluationError(
            f"{shown(ground_truth)}: holds neither PNG masks nor folders of them{_resolutions(ground_truth)}"
        )
    found = _chosen(names, found, root)
    flat = bool(pngs(predictions))
    if len(found) == 1 and flat and not _holds_masks(predictions / found[0]):
        return [SequenceFolders(found[0], predictions, root / found[0])]
    if not any(_holds_masks(predictions / name) for name in found):
        hint = ""
        if flat:
            hint = (
                f"; it holds masks itself, but the truth has {len(found)} sequences: --sequences says which"
            )
        elif sequence_root(predictions) != predictions:
            hint = "; it is the root of a data set: predictions come first, the truth second"
        raise EvaluationError(f"{shown(predictions)}: no predictions for {few(found)}{hint}")
    return [SequenceFolders(name, predictions / name, root / name) for name in found]


def _chosen(names: Sequence[str] | None, known: list[str], root: Path) -> list[str]:
    """Return the sequences that `names` choose of the known ones; all for None."""
    if names is None:
        return known
    try:
        chosen = chosen_names(names, known, "--sequences")
    except InputError as error:
        raise EvaluationError(str(error)) from None
    absent = [name for name in chosen if name not in known]
    if absent or not chosen:
        asked = few(absent) if absent else "no name"
        raise EvaluationError(f"{shown(root)}: no ground truth for {asked}; there is {few(known)}")
    return chosen


def sequence_root(root: Path) -> Path:
    """Return the folder of the sequences: `root` itself, `root/Annotations`, or one resolution in that."""
    for folder in (root / "Annotations" / "480p", root / "Annotations", root):
        if folder.is_dir() and any(_holds_masks(child) for child in subfolders(folder)):
            return folder
    annotations = root / "Annotations"
    resolutions = subfolders(annotations) if annotations.is_dir() else []
    return resolutions[0] if len(resolutions) == 1 else root


def _resolutions(root: Path) -> str:
    """Return a hint for a data set with several resolutions, none of which is 480p."""
    annotations = root / "Annotations"
    found = [folder.name for folder in subfolders(annotations)] if annotations.is_dir() else []
    return f"; give one of the folders in {shown(annotations)}: {few(found)}" if len(found) > 1 else ""


def _holds_masks(folder: Path) -> bool:
    """Return whether a folder is one of label maps, usable or not: the error comes when it is opened."""
    try:
        return bool(pngs(folder))
    except EvaluationError:
        return True


def pngs(folder: Path) -> dict[str, Path]:
    """Return the label maps in a folder by their stems, in natural order; empty where it is no folder."""
    if not (folder.is_dir() or folder.is_symlink()):
        return {}
    try:
        return label_maps(folder)
    except InputError as error:
        raise EvaluationError(str(error)) from None


def read(path: Path) -> Labels:
    """Return a label map (H, W)."""
    try:
        return read_labels(path)[0]
    except InputError as error:
        raise EvaluationError(str(error)) from None


def read_pair(prediction: Path, ground_truth: Path) -> tuple[Labels, Labels]:
    """Return the label maps (H, W) of one frame, which must be of one size."""
    predicted, true = read(prediction), read(ground_truth)
    if predicted.shape != true.shape:
        expected, got = (f"{width}x{height}" for height, width in (true.shape, predicted.shape))
        raise EvaluationError(
            f"{shown(prediction)}: expected {expected} pixels as in the ground truth; got {got}"
        )
    return predicted, true


def check_complete(folder: Path, predictions: Mapping[str, Path], frames: Iterable[str]) -> None:
    """Reject predictions that lack one of the frames."""
    wanted = list(frames)
    absent = [name for name in wanted if name not in predictions]
    if not predictions:
        raise EvaluationError(f"{shown(folder)}: no predictions")
    if absent:
        hint = _naming_hint(absent, wanted, predictions)
        raise EvaluationError(f"{shown(folder)}: no prediction for frame {few(absent)}{hint}")


def _naming_hint(absent: Sequence[str], wanted: Sequence[str], predictions: Collection[str]) -> str:
    """Return a hint for predictions that exist under other names."""
    if len(absent) < len(wanted):
        return ""
    theirs, ours = next(iter(predictions)), absent[0]
    hint = f"; predictions are named like {shown(theirs)}.png, the truth like {shown(ours)}.png"
    numbers = {int(name) for name in predictions if name.isdecimal()}
    if all(name.isdecimal() and int(name) in numbers for name in absent):
        hint += ": rename them, only the number of digits differs"
    return hint


def by_sequence(
    jobs: int | None, work: Callable[[Item], Result], sequences: Sequence[Sequence[Item]]
) -> list[list[Result] | EvaluationError]:
    """Return the results of `work` for the items of each sequence, in order; for one that fails, its first error.

    An error stops the rest of its sequence alone. jobs: threads; None: one per core.
    """
    failed: dict[int, int] = {}
    lock = Lock()

    def attempt(task: tuple[int, int, Item]) -> Result | EvaluationError | None:
        sequence, place, item = task
        if failed.get(sequence, place) < place:
            return None
        try:
            return work(item)
        except EvaluationError as error:
            with lock:
                failed[sequence] = min(place, failed.get(sequence, place))
            return error

    tasks = [(i, place, item) for i, items in enumerate(sequences) for place, item in enumerate(items)]
    results: list[list[Result] | EvaluationError] = [[] for _ in sequences]
    for (sequence, _, _), result in zip(tasks, in_threads(jobs, attempt, tasks), strict=True):
        so_far = results[sequence]
        if isinstance(so_far, EvaluationError):
            continue
        if isinstance(result, EvaluationError):
            results[sequence] = result
        elif result is not None:
            so_far.append(result)
    return results


def checked(result: Result | EvaluationError) -> Result:
    """Return a result, or raise it if it is an error."""
    if isinstance(result, EvaluationError):
        raise result
    return result


def check_any_scored(problems: Sequence[Problem], scored: int) -> None:
    """Raise the first problem where nothing could be scored."""
    if not scored:
        more = f" (and {len(problems) - 1} more sequences)" if len(problems) > 1 else ""
        raise EvaluationError(problems[0].reason + more)


def in_threads(jobs: int | None, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return the result of `work` for each item, in order; an error stops the rest. jobs: threads; None: one per core.

    Decoding PNG files and counting pixels in numpy both leave the interpreter's lock. Processes would have to be
    forked beside the threads of torch, which may hang, or import torch anew each.
    """
    workers = jobs or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if workers == 1:
        return [work(item) for item in items]
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vosops-eval")
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)
