"""Folders of label maps: which files belong together, and threads to read them in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vosops.io.errors import InputError
from vosops.io.labels import read_labels
from vosops.io.listing import chosen_names, few, label_maps, subfolders

Labels = NDArray[np.uint8]
"""A label map (H, W)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class EvaluationError(InputError, ValueError):
    """What is wrong with the folders, in one line."""


def find_sequences(
    predictions: Path, ground_truth: Path, names: Sequence[str] | None
) -> list[tuple[str, Path, Path]]:
    """Name, folder of predictions and folder of truth of each sequence to score."""
    for folder in (predictions, ground_truth):
        if not folder.is_dir():
            raise EvaluationError(f"{folder}: no such folder")
    if pngs(ground_truth):
        name = ground_truth.resolve().name
        nested = predictions / name
        return [(name, nested if pngs(nested) else predictions, ground_truth)]
    root = sequence_root(ground_truth)
    found = [folder.name for folder in subfolders(root) if pngs(folder)]
    if not found:
        raise EvaluationError(f"{ground_truth}: holds neither PNG masks nor folders of them")
    if names is not None:
        chosen = chosen_names(names, found, "--sequences")
        absent = [name for name in chosen if name not in found]
        if absent:
            raise EvaluationError(f"{root}: no ground truth for {few(absent)}; there is {few(found)}")
        found = chosen
    if len(found) == 1 and pngs(predictions) and not pngs(predictions / found[0]):
        return [(found[0], predictions, root / found[0])]
    absent = [name for name in found if not pngs(predictions / name)]
    if absent:
        have = "" if len(absent) == len(found) else "; --sequences scores the others"
        raise EvaluationError(f"{predictions}: no predictions for {few(absent)}{have}")
    return [(name, predictions / name, root / name) for name in found]


def sequence_root(root: Path) -> Path:
    """The folder of the sequences: `root` itself, `root/Annotations`, or one resolution in that."""
    for folder in (root / "Annotations" / "480p", root / "Annotations", root):
        if folder.is_dir() and any(pngs(child) for child in subfolders(folder)):
            return folder
    annotations = root / "Annotations"
    resolutions = subfolders(annotations) if annotations.is_dir() else []
    return resolutions[0] if len(resolutions) == 1 else root


def pngs(folder: Path) -> dict[str, Path]:
    """The label maps in a folder by their stems, in natural order; empty where it is no folder."""
    return label_maps(folder) if folder.is_dir() else {}


def read(path: Path) -> Labels:
    """A label map (H, W)."""
    try:
        return read_labels(path)[0]
    except InputError as error:
        raise EvaluationError(str(error)) from None


def read_pair(prediction: Path, ground_truth: Path) -> tuple[Labels, Labels]:
    """The label maps (H, W) of one frame, which must be of one size."""
    predicted, true = read(prediction), read(ground_truth)
    if predicted.shape != true.shape:
        expected, got = (f"{width}x{height}" for height, width in (true.shape, predicted.shape))
        raise EvaluationError(f"{prediction}: expected {expected} pixels as in the ground truth; got {got}")
    return predicted, true


def check_complete(folder: Path, predictions: Mapping[str, Path], frames: Iterable[str]) -> None:
    """Refuses predictions that lack one of the frames."""
    absent = sorted(set(frames) - set(predictions))
    if absent:
        raise EvaluationError(f"{folder}: no prediction for frame {few(absent)}")


def in_threads(jobs: int | None, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What `work` makes of each item, in order; an error stops the rest. jobs: threads; None: one per core.

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
