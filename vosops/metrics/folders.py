"""Scores folders of predicted masks against folders of true ones, on every core."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from vosops.io.annotations import annotation_style, values_of
from vosops.io.listing import few, shown
from vosops.metrics.davis import IGNORED, ObjectScore, compare_masks, scored_frames
from vosops.metrics.files import (
    EvaluationError,
    Problem,
    SequenceFolders,
    by_sequence,
    check_any_scored,
    check_complete,
    checked,
    find_sequences,
    pngs,
    read,
    read_pair,
)

MERGED_OBJECT = 1
"""The id that stands for all objects merged into one."""


@dataclass(frozen=True)
class Report:
    """The scores of all objects of all sequences that could be scored, and why the others could not.

    All means cover only the scored sequences: check `problems` before comparing them with others.
    """

    objects: tuple[ObjectScore, ...]
    protocol: dict[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def sequences(self) -> tuple[str, ...]:
        """The names of the sequences that were scored, in order."""
        return tuple(dict.fromkeys(score.sequence for score in self.objects))

    def objects_of(self, sequence: str) -> list[ObjectScore]:
        """Return the scores of the objects of one sequence."""
        chosen = [score for score in self.objects if score.sequence == sequence]
        if not chosen:
            raise ValueError(f"sequence: expected one of {', '.join(self.sequences)}; got {sequence!r}")
        return chosen

    def summary(self, sequence: str | None = None) -> dict[str, float]:
        """Return the means over objects, of one sequence or of all, by the names of `ObjectScore.row`."""
        rows = [score.row() for score in (self.objects if sequence is None else self.objects_of(sequence))]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def table(self) -> list[dict[str, str | int | float]]:
        """Return one row per object: sequence, object, and the columns of `summary`."""
        return [{"sequence": s.sequence, "object": s.object_id, **s.row()} for s in self.objects]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, values frame by frame included, as plain data for JSON."""
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
        return {
            "protocol": self.protocol,
            "global": self.summary(),
            "sequences": sequences,
            "problems": {problem.sequence: problem.reason for problem in self.problems},
        }


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
    """Return J and F of every object, by the semi-supervised protocol of DAVIS 2017.

    What labels mean is decided over a whole sequence: where the truth holds only 0 and 255, each of its values, and
    of the predictions', is the one object. Scoring starts with the first frame whose truth shows an object. A
    sequence that cannot be scored (too short, predictions missing, of another size, unreadable, or with an object
    that the truth does not have) is in the report's `problems`; the means are over the others.

    Args:
        predictions: folder with a folder of PNG label maps per sequence; a folder of PNGs where ground_truth
            is one sequence.
        ground_truth: the same, or the root of a dataset (`Annotations/480p/<sequence>` of DAVIS,
            `Annotations/<sequence>` of YouTube-VOS), or the folder of one sequence. Its files say which
            frames count.
        sequences: names to score, or text files of names (`vosops.io.listing.chosen_names`); default all of
            ground_truth.
        merge_objects: score all objects as one (DAVIS 2016). Always so where the truth holds only 0 and 255.
        keep_ends: score the first frame that shows an object and the last frame of a sequence as well.
        ignore_void: leave pixels labelled 255 in the truth out of the comparison. By default they count as
            background, as DAVIS' code does.
        jobs: threads; default one per core.

    Raises:
        EvaluationError: a folder is invalid, or no sequence can be scored.
    """
    found = find_sequences(Path(predictions), Path(ground_truth), sequences)
    planned = by_sequence(
        jobs, lambda folders: _plan(folders, merge_objects, keep_ends), [[f] for f in found]
    )
    plans = [plan if isinstance(plan, EvaluationError) else plan[0] for plan in planned]
    tasks = [
        [] if isinstance(plan, EvaluationError) else [(plan, frame) for frame in plan.frames]
        for plan in plans
    ]
    scored = by_sequence(jobs, lambda task: _score_frame(*task, ignore_void), tasks)
    objects: list[ObjectScore] = []
    problems: list[Problem] = []
    for folders, plan, frames in zip(found, plans, scored, strict=True):
        try:
            objects += _collect(checked(plan), checked(frames))
        except EvaluationError as error:
            problems.append(Problem(folders.name, str(error)))
    check_any_scored(problems, len(objects))
    protocol = {"merge_objects": merge_objects, "keep_ends": keep_ends, "ignore_void": ignore_void}
    return Report(tuple(objects), protocol, tuple(problems))


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
    folder: Path
    frames: dict[str, tuple[Path, Path]]
    """Prediction and truth of each frame to score, by its name."""
    ids: frozenset[int]
    labels: _Labels


def _plan(folders: SequenceFolders, merge: bool, keep_ends: bool) -> _Plan:
    predicted, true = pngs(folders.predictions), pngs(folders.ground_truth)
    style = annotation_style((frame, values_of(read(file))) for frame, file in true.items())
    if style.first is None:
        raise EvaluationError(f"{shown(folders.ground_truth)}: no frame holds an object")
    shows_object = list(true)[list(true).index(style.first) :]
    try:
        names = scored_frames(shows_object, keep_ends)
    except ValueError as error:
        raise EvaluationError(f"{shown(folders.ground_truth)}: {error}") from None
    check_complete(folders.predictions, predicted, names)
    frames = {name: (predicted[name], true[name]) for name in names}
    labels = _Labels.BINARY if style.binary else _Labels.MERGED if merge else _Labels.OBJECTS
    if labels is _Labels.OBJECTS:
        unscored = [true[name] for name in (shows_object[0], shows_object[-1])]
        ids = set().union(*(values_of(read(file)) for file in unscored)) - {IGNORED}
    else:
        ids = {MERGED_OBJECT}
    return _Plan(folders.name, folders.predictions, frames, frozenset(ids), labels)


# --- the work ---


@dataclass(frozen=True)
class _Frame:
    """One frame: the objects of the truth, and (J, F) of every object of the truth or the prediction."""

    true_ids: set[int]
    scores: dict[int, tuple[float, float]]


def _score_frame(plan: _Plan, frame: str, ignore_void: bool) -> _Frame:
    """Return J and F of each object of one frame; errors name the file."""
    predicted, true = read_pair(*plan.frames[frame])
    true_ids = values_of(true)
    void = None
    if plan.labels is not _Labels.BINARY and IGNORED in true_ids:
        void = true == IGNORED
        true = np.where(void, 0, true)
        true_ids.remove(IGNORED)
    excluded = void if ignore_void else None
    if plan.labels is not _Labels.OBJECTS:
        return _Frame({MERGED_OBJECT}, {MERGED_OBJECT: compare_masks(predicted, true, excluded)})
    ids = true_ids | values_of(predicted)
    return _Frame(true_ids, {i: compare_masks(predicted == i, true == i, excluded) for i in ids})


def _collect(plan: _Plan, frames: Sequence[_Frame]) -> list[ObjectScore]:
    """Return the scores of the objects of a sequence; where an object is neither true nor predicted it scores 1."""
    ids = plan.ids.union(*(frame.true_ids for frame in frames))
    strays = sorted(set().union(*(frame.scores for frame in frames)) - ids)
    if strays:
        hint = "; --merge-objects scores 0/255 masks" if strays == [IGNORED] else ""
        raise EvaluationError(
            f"{shown(plan.folder)}: labels {few([str(i) for i in strays])} are not in the ground truth, "
            f"which has {few([str(i) for i in sorted(ids)])}{hint}"
        )
    scores = []
    for i in sorted(ids):
        pairs = [frame.scores.get(i, (1.0, 1.0)) for frame in frames]
        j_values, f_values = zip(*pairs, strict=True)
        scores.append(ObjectScore(plan.name, i, tuple(plan.frames), j_values, f_values))
    return scores
