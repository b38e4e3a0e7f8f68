"""Mean intersection over union of classes, as Cityscapes defines it, and VSPW's consistency over time.

One confusion matrix is summed over all frames of all sequences (Cordts et al., CVPR 2016); a class's intersection
over union is taken of that, so large objects and frames with many pixels of a class count for more. Video
consistency (Miao et al., CVPR 2021) needs no optical flow, but the truth of consecutive frames.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vosops.io.cityscapes import CITYSCAPES, LAST_LABEL_ID
from vosops.io.listing import few, shown
from vosops.metrics.davis import IGNORED, Mask
from vosops.metrics.files import (
    EvaluationError,
    Labels,
    Problem,
    SequenceFolders,
    by_sequence,
    check_any_scored,
    check_complete,
    find_sequences,
    pngs,
    read_pair,
)

Ids = Literal["train", "label"]
"""How the truth numbers its classes: 0 to K-1, or as Cityscapes' `*_labelIds.png`."""

Matrix = NDArray[np.int64]

FRAMES_PER_TASK = 8
"""Frames that a thread counts at a time: few enough to share one sequence among all cores."""

_VALUES = IGNORED + 1
_ENDINGS: dict[Ids, str] = {"train": "_labelTrainIds", "label": "_labelIds"}
_ANNOTATIONS = ("_gtFine", "_gtCoarse")
_FRAME_ENDING = "_leftImg8bit"


def confusion_matrix(prediction: Mask, ground_truth: Mask, num_classes: int = len(CITYSCAPES)) -> Matrix:
    """Return how many pixels of each true class were predicted as each class.

    Cost: linear in the pixels; half a megabyte in addition to a copy of the maps in 64 bits.

    Args:
        prediction: (H, W) integers, the class of each pixel, 0 to `num_classes` - 1; 255 is none of them.
        ground_truth: (H, W) integers, likewise; pixels of 255 are ignored.
        num_classes: K, from 2 to 255.

    Returns:
        (K, K+1) int64, true classes in rows and predicted ones in columns; the last column counts predictions of
        255, which are wrong everywhere. Matrices of several frames may be added.

    Raises:
        ValueError: the shapes differ or are not (H, W), or a label is neither a class nor 255.

    Example:
        >>> import numpy as np
        >>> truth = np.array([[0, 0, 1, 255]])
        >>> matrix = confusion_matrix(np.array([[0, 1, 1, 1]]), truth, num_classes=3)
        >>> matrix.tolist()
        [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
        >>> class_iou(matrix)
        array([0.5, 0.5, nan])
    """
    if not 1 < num_classes < _VALUES:
        raise ValueError(f"num_classes: expected 2 to {IGNORED}; got {num_classes}")
    predicted, true = np.asarray(prediction), np.asarray(ground_truth)
    if true.ndim != 2:
        raise ValueError(f"ground_truth: expected a label map (H, W); got shape {true.shape}")
    if predicted.shape != true.shape:
        raise ValueError(f"prediction: expected shape {true.shape} as ground_truth; got {predicted.shape}")
    for name, labels in (("prediction", predicted), ("ground_truth", true)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{name}: expected integers; got {labels.dtype}")
        if labels.size and not 0 <= labels.min() <= labels.max() <= IGNORED:
            raise ValueError(_expected(name, num_classes, f"{labels.min()} to {labels.max()}"))
    counts = _count(predicted, true)
    for name, axis in (("prediction", 0), ("ground_truth", 1)):
        used = np.flatnonzero(counts.sum(axis)[:IGNORED]).tolist()
        strange = [str(label) for label in used if label >= num_classes]
        if strange:
            raise ValueError(_expected(name, num_classes, few(strange)))
    return np.concatenate([counts[:num_classes, :num_classes], counts[:num_classes, IGNORED:]], axis=1)


def class_iou(matrix: Matrix) -> NDArray[np.float64]:
    """Return the intersection over union of each class, of a `confusion_matrix` or a sum of them.

    Args:
        matrix: (K, K+1), or (K, K) where every pixel was predicted as some class.

    Returns:
        (K,) float64 in [0, 1]; NaN for a class that neither occurs nor was predicted.
    """
    hits = np.diagonal(matrix)
    union = matrix.sum(1) + matrix[:, : len(matrix)].sum(0) - hits
    iou = np.full(len(matrix), math.nan)
    np.divide(hits, union, out=iou, where=union > 0)
    return iou


class Consistency:
    """Video consistency VC of VSPW over windows of consecutive frames, updated one frame at a time.

    Of the pixels whose true class stays the same throughout a window, the share whose predicted class, right or
    wrong, stays the same too. Differs from VSPW's public code in two points: the last window counts, as in the
    paper, and ignored pixels do not.

    Memory: four bytes per pixel. Time: linear in the pixels, for any window.

    Args:
        window: frames, at least 2; VSPW reports 8 and 16.
    """

    def __init__(self, window: int) -> None:
        if window < 2:
            raise ValueError(f"window: expected 2 frames or more; got {window}")
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Start over: the next frame has no predecessor."""
        self._labels: tuple[Mask, Mask] | None = None
        self._runs: list[NDArray[np.uint16]] = []
        self._frames = 0

    def add(self, prediction: Mask, ground_truth: Mask) -> float | None:
        """Add the next frame, (H, W) integers, 255 in the truth ignored.

        Returns the share of the window that ends here; None where there is no full window yet, or no pixel in it
        whose true class stays the same.
        """
        labels = (prediction, ground_truth)
        if self._labels is None or self._labels[1].shape != ground_truth.shape:
            self.reset()
            self._runs = [np.zeros(ground_truth.shape, np.uint16) for _ in labels]
        else:
            for run, now, before in zip(self._runs, labels, self._labels, strict=True):
                np.minimum(run + 1, self.window, out=run)
                run[now != before] = 0
        self._labels = labels
        self._frames += 1
        if self._frames < self.window:
            return None
        steps = self.window - 1
        steady_prediction, steady_truth = (run >= steps for run in self._runs)
        steady_truth &= ground_truth != IGNORED
        pixels = np.count_nonzero(steady_truth)
        return np.count_nonzero(steady_truth & steady_prediction) / pixels if pixels else None


@dataclass(frozen=True)
class SequenceCounts:
    """The counts of one sequence."""

    name: str
    frames: int
    """Frames with a truth."""
    matrix: Matrix
    """(K, K+1), see `confusion_matrix`."""
    consistency: tuple[float, ...] = ()
    """One value per window of consecutive frames, if asked for."""


@dataclass(frozen=True)
class SemanticReport:
    """The scores of all classes over all sequences that could be scored, and why the others could not.

    All values are of what was scored: see `problems` before comparing them with others.
    """

    sequences: tuple[SequenceCounts, ...]
    class_names: tuple[str, ...]
    protocol: dict[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def matrix(self) -> Matrix:
        """The confusion matrix over all sequences, (K, K+1)."""
        return _sum(self.sequences)

    def iou(self) -> dict[str, float]:
        """Return the intersection over union of each class that occurs in the truth or the predictions, by its name."""
        return _present(self.class_names, class_iou(self.matrix))

    def summary(self, sequence: str | None = None) -> dict[str, float]:
        """mIoU, Pixel-Accuracy and, if asked for, VC, of one sequence or of all."""
        chosen = [counts for counts in self.sequences if sequence in (None, counts.name)]
        if not chosen:
            names = ", ".join(counts.name for counts in self.sequences)
            raise ValueError(f"sequence: expected one of {names}; got {sequence!r}")
        matrix = _sum(chosen)
        pixels = int(matrix.sum())
        result = {
            "mIoU": float(np.nanmean(class_iou(matrix))) if pixels else math.nan,
            "Pixel-Accuracy": float(np.trace(matrix) / pixels) if pixels else math.nan,
        }
        window = self.protocol.get("consistency")
        if window is not None:
            values = [value for counts in chosen for value in counts.consistency]
            result[f"VC{window}"] = float(np.mean(values)) if values else math.nan
        return result

    def table(self) -> list[dict[str, str | int | float]]:
        """Return one row per class that occurs: its number, name and IoU, and how many true pixels it has."""
        iou, pixels = self.iou(), self.matrix.sum(1)
        return [
            {"class": i, "name": name, "IoU": iou[name], "pixels": int(pixels[i])}
            for i, name in enumerate(self.class_names)
            if name in iou
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, confusion matrices included, as plain data for JSON."""
        return {
            "protocol": self.protocol,
            "global": _without_nan(self.summary()),
            "classes": {row["name"]: row for row in self.table()},
            "confusion_matrix": self.matrix.tolist(),
            "sequences": {
                counts.name: {
                    "frames": counts.frames,
                    **_without_nan(self.summary(counts.name)),
                    "IoU": _present(self.class_names, class_iou(counts.matrix)),
                }
                for counts in self.sequences
            },
            "problems": {problem.sequence: problem.reason for problem in self.problems},
        }


def evaluate_semantic(
    predictions: str | os.PathLike[str],
    ground_truth: str | os.PathLike[str],
    *,
    sequences: Sequence[str] | None = None,
    num_classes: int = len(CITYSCAPES),
    ids: Ids | None = None,
    consistency: int | None = None,
    jobs: int | None = None,
) -> SemanticReport:
    """Score IoU of every class, mIoU and pixel accuracy over folders of label maps, as defined by Cityscapes.

    The truth may be given for some frames only, such as one of 30: it says which frames count, the first and the
    last among them. Pixels of 255 in it count nowhere, and a class that occurs neither in it nor in the
    predictions is left out of the mean. A sequence that cannot be scored (predictions missing or of another size, an
    unreadable file, a label outside the classes) is in the report's `problems`, and counts for nothing.

    Args:
        predictions: folder with a folder of PNGs per sequence, or the PNGs of one: classes from 0 to
            `num_classes` - 1, named like the truth, as `vosops semantic` writes them; 255 is always wrong.
        ground_truth: the same, or a split of Cityscapes (`gtFine/val`), whose cities are the sequences:
            `X_gtFine_labelTrainIds.png`, else `X_gtFine_labelIds.png`, is the truth of `X_leftImg8bit.png` or `X.png`.
        sequences: names to score, or text files of names (`vosops.io.listing.chosen_names`); default all of
            ground_truth.
        num_classes: K, from 2 to 255.
        ids: "train" where the truth holds classes as the predictions do, "label" where it holds Cityscapes' label
            ids (0 to 33, of which 19 are classes and the others ignored). Default: what the files' names say, else
            "train".
        consistency: also VSPW's video consistency VC over windows of this many frames; see `Consistency`. Frames are
            consecutive where both have a truth and no predicted frame lies between them.
        jobs: threads; default one per core.

    Raises:
        EvaluationError: a folder is invalid, no sequence can be scored, or no window of consecutive frames has a
            truth.
        ValueError: `num_classes`, `ids` or `consistency` is out of range.
    """
    if not 1 < num_classes < _VALUES:
        raise ValueError(f"num_classes: expected 2 to {IGNORED}; got {num_classes}")
    if ids not in (None, *_ENDINGS):
        raise ValueError(f"ids: expected {' or '.join(_ENDINGS)}; got {ids!r}")
    if ids == "label" and num_classes != len(CITYSCAPES):
        raise ValueError(f"ids: label ids are Cityscapes', of {len(CITYSCAPES)} classes; got {num_classes}")
    if consistency is not None and consistency < 2:
        raise ValueError(f"consistency: expected 2 frames or more; got {consistency}")
    found = find_sequences(Path(predictions), Path(ground_truth), sequences)
    planned = by_sequence(jobs, lambda folders: _plan(folders, num_classes, ids), [[f] for f in found])
    plans = [plan if isinstance(plan, EvaluationError) else plan[0] for plan in planned]
    tasks = [
        []
        if isinstance(plan, EvaluationError)
        else [(plan, run) for run in (plan.runs() if consistency else plan.chunks())]
        for plan in plans
    ]
    counted = by_sequence(jobs, lambda task: _score(*task, consistency), tasks)
    results: list[SequenceCounts] = []
    problems: list[Problem] = []
    for folders, plan, parts in zip(found, plans, counted, strict=True):
        if isinstance(plan, EvaluationError) or isinstance(parts, EvaluationError):
            error = plan if isinstance(plan, EvaluationError) else parts
            problems.append(Problem(folders.name, str(error)))
            continue
        matrix = np.sum([matrix for matrix, _ in parts], axis=0)
        shares = tuple(share for _, windows in parts for share in windows)
        results.append(SequenceCounts(plan.name, len(plan.frames), matrix, shares))
    check_any_scored(problems, len(results))
    if consistency is not None and not any(counts.consistency for counts in results):
        raise EvaluationError(
            f"{shown(ground_truth)}: no {consistency} consecutive frames have a ground truth"
        )
    names = tuple(CITYSCAPES) if num_classes == len(CITYSCAPES) else tuple(map(str, range(num_classes)))
    protocol = {
        "task": "semantic",
        "classes": num_classes,
        "ids": sorted({plan.ids for plan in plans if not isinstance(plan, EvaluationError)}),
        "consistency": consistency,
    }
    return SemanticReport(tuple(results), names, protocol, tuple(problems))


@dataclass(frozen=True)
class _Frame:
    """One frame to score."""

    place: int
    """Which of the predicted frames it is."""
    prediction: Path
    ground_truth: Path


@dataclass(frozen=True)
class _Plan:
    """One sequence: the frames to score, and how."""

    name: str
    frames: tuple[_Frame, ...]
    num_classes: int
    ids: Ids

    def chunks(self) -> list[tuple[_Frame, ...]]:
        """Return the frames, a few at a time."""
        return [self.frames[i : i + FRAMES_PER_TASK] for i in range(0, len(self.frames), FRAMES_PER_TASK)]

    def runs(self) -> list[tuple[_Frame, ...]]:
        """Return the frames, those together that follow each other."""
        breaks = [i for i, f in enumerate(self.frames) if not i or f.place != self.frames[i - 1].place + 1]
        return [self.frames[i:j] for i, j in zip(breaks, [*breaks[1:], len(self.frames)], strict=True)]


def _plan(folders: SequenceFolders, num_classes: int, ids: Ids | None) -> _Plan:
    true, ids = _truth(pngs(folders.ground_truth), ids, num_classes)
    predictions = pngs(folders.predictions)
    predicted = {stem.removesuffix(_FRAME_ENDING): file for stem, file in predictions.items()}
    check_complete(folders.predictions, predicted, true)
    places = {stem: place for place, stem in enumerate(predicted)}
    frames = tuple(_Frame(places[stem], predicted[stem], file) for stem, file in true.items())
    return _Plan(folders.name, frames, num_classes, ids)


def _truth(files: dict[str, Path], ids: Ids | None, num_classes: int) -> tuple[dict[str, Path], Ids]:
    """Return the label maps among the files by the names of their frames, and how they number the classes."""
    if num_classes == len(CITYSCAPES):
        for kind in _ENDINGS if ids is None else (ids,):
            chosen = {
                s.removesuffix(_ENDINGS[kind]): f for s, f in files.items() if s.endswith(_ENDINGS[kind])
            }
            if chosen:
                return {_frame_name(stem): file for stem, file in chosen.items()}, kind
    return files, ids or "train"


def _frame_name(stem: str) -> str:
    for annotation in _ANNOTATIONS:
        stem = stem.removesuffix(annotation)
    return stem


def _score(plan: _Plan, frames: Sequence[_Frame], window: int | None) -> tuple[Matrix, list[float]]:
    """Return the confusion matrix of some frames, and the consistency of each window in them."""
    matrix = np.zeros((plan.num_classes, plan.num_classes + 1), dtype=np.int64)
    consistency = Consistency(window) if window is not None else None
    shares = []
    for frame in frames:
        predicted, true = read_pair(frame.prediction, frame.ground_truth)
        true = _train_ids(true, frame.ground_truth) if plan.ids == "label" else true
        try:
            matrix += confusion_matrix(predicted, true, plan.num_classes)
        except ValueError as error:
            name, _, reason = str(error).partition(": ")
            file = frame.prediction if name == "prediction" else frame.ground_truth
            raise EvaluationError(f"{shown(file)}: {reason}{_hint(name, true, plan)}") from None
        share = consistency.add(predicted, true) if consistency is not None else None
        if share is not None:
            shares.append(share)
    return matrix, shares


def _hint(name: str, true: Labels, plan: _Plan) -> str:
    """Return a likely reason for a label outside the classes."""
    if name == "ground_truth" and plan.num_classes == len(CITYSCAPES):
        if int(np.where(true == IGNORED, 0, true).max()) <= LAST_LABEL_ID:
            return "; --ids label reads Cityscapes' label ids"
    return "; --classes says how many there are"


def _train_ids(labels: Labels, file: Path) -> Labels:
    """Classes for Cityscapes' label ids; those that are not scored become 255."""
    strange = sorted(set(np.unique(labels).tolist()) - set(range(LAST_LABEL_ID + 1)) - {IGNORED})
    if strange:
        found = few([str(label) for label in strange])
        raise EvaluationError(
            f"{shown(file)}: expected label ids from 0 to {LAST_LABEL_ID} or {IGNORED}; got {found}"
        )
    table = np.full(_VALUES, IGNORED, dtype=np.uint8)
    for number, kind in enumerate(CITYSCAPES.values()):
        table[kind.label_id] = number
    return table[labels]


def _count(predicted: Mask, true: Mask) -> Matrix:
    """Return how often each pair of a true (rows) and a predicted value (columns) occurs, (256, 256)."""
    pairs = true.astype(np.int64) * _VALUES + predicted
    return np.bincount(pairs.ravel(), minlength=_VALUES**2).reshape(_VALUES, _VALUES)


def _expected(name: str, num_classes: int, got: str) -> str:
    return f"{name}: expected labels from 0 to {num_classes - 1} or {IGNORED}; got {got}"


def _sum(sequences: Sequence[SequenceCounts]) -> Matrix:
    total = np.zeros_like(sequences[0].matrix)
    for counts in sequences:
        total += counts.matrix
    return total


def _present(names: Sequence[str], iou: NDArray[np.float64]) -> dict[str, float]:
    """Return the classes that have a value, by their names."""
    return {name: float(value) for name, value in zip(names, iou, strict=True) if not math.isnan(value)}


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}
