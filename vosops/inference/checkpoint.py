"""The state folder of a run: its arguments, its record and its checkpoint, from which --resume goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vosops.io.errors import ResumeError, disk_errors

from .files import complete_or_absent, write_text
from .report import Record

STATE_FOLDER = ".vosops"
CHECKPOINT_EVERY = 50
_VERSION = 1


class RunState:
    """Files under ``<out>/.vosops`` while a run is unfinished or its arguments must be remembered."""

    def __init__(self, out: Path) -> None:
        self.folder = out / STATE_FOLDER
        self.record = Record(self.folder / "frames.jsonl")
        self._arguments = self.folder / "arguments.json"
        self._checkpoint = self.folder / "checkpoint.pt"
        self._complete = self.folder / "complete.json"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self._arguments.exists()

    def start(self, arguments: dict[str, Any]) -> None:
        """Begin a new run."""
        with disk_errors(str(self.folder)):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        write_text(self._arguments, json.dumps(arguments, indent=1))

    def forget_if_alone(self) -> None:
        """Undo :meth:`start` where nothing but this state was written, so that the folder can be used at once."""
        if all(path == self.folder for path in self.folder.parent.iterdir()):
            shutil.rmtree(self.folder, ignore_errors=True)

    def check(self, arguments: dict[str, Any]) -> None:
        """Raise a ``ResumeError`` that lists how ``arguments`` differ from those of the run here."""
        before = json.loads(self._arguments.read_text(encoding="utf-8"))
        found = differences(before, json.loads(json.dumps(arguments)))
        if found:
            raise ResumeError(
                f"cannot resume {self.folder.parent}: {'; '.join(found)}. "
                "Give the same arguments, or --overwrite"
            )

    def save(self, propagation: dict[str, Any], done: int, seconds: float) -> None:
        """Write a checkpoint: the loop's state, how much of the record belongs to it, the time spent."""
        state = {
            "version": _VERSION,
            "propagation": propagation,
            "record_bytes": self.record.size,
            "done": done,
            "seconds": seconds,
        }
        with complete_or_absent(self._checkpoint) as part:
            torch.save(state, part)

    def load(self) -> dict[str, Any] | None:
        """Return the last checkpoint and cut the record back to it; None if there is none yet."""
        if not self._checkpoint.exists():
            self.record.cut(0)
            return None
        try:
            state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ResumeError(
                f"{self._checkpoint} cannot be read ({error}): start again with --overwrite"
            ) from error
        if state.get("version") != _VERSION:
            raise ResumeError(
                f"{self._checkpoint} is of another version of vosops: start again with --overwrite"
            )
        self.record.cut(state["record_bytes"])
        return state

    @property
    def is_complete(self) -> bool:
        """Whether every frame of this run has its mask."""
        return self._complete.exists()

    def finish(self, facts: dict[str, Any]) -> None:
        """Mark every mask as written, keep ``facts`` for the report, and drop the checkpoint."""
        write_text(self._complete, json.dumps(facts))
        self._checkpoint.unlink(missing_ok=True)

    def facts(self) -> dict[str, Any]:
        """Return what :meth:`finish` kept."""
        loaded: dict[str, Any] = json.loads(self._complete.read_text(encoding="utf-8"))
        return loaded


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one short text for each argument that differs; hashes are only said to have changed."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "masks" and isinstance(old, dict) and isinstance(new, dict):
            changed = sorted({k for k in {*old, *new} if old.get(k) != new.get(k)}, key=int)
            found.append(f"the mask of frame {', '.join(changed)} changed")
        elif key.endswith("content"):
            found.append(f"the {key} changed")
        else:
            found.append(f"--{key} was {old}, is {new}")
    return found
