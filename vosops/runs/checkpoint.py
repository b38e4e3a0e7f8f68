"""The state folder of a run: its arguments, its record and its checkpoint, from which --resume goes on."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vosops.io.errors import ResumeError, disk_errors
from vosops.io.outputs import OwnedFolder, complete_or_absent, sync_file, sync_folder, write_text

from .report import RESUME, Record

CHECKPOINT_EVERY = 50
CHECKPOINT = "checkpoint.pt"
_VERSION = 1


class RunState:
    """Files under ``<out>/.vosops`` while a run is unfinished or its arguments must be remembered."""

    def __init__(self, out: OwnedFolder) -> None:
        self.out = out
        self.folder = out.state
        self.record = Record(self.folder / "frames.jsonl")
        self._arguments = self.folder / "arguments.json"
        self._checkpoint = self.folder / CHECKPOINT
        self._complete = self.folder / "complete.json"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self._arguments.exists()

    @property
    def is_of_old_version(self) -> bool:
        """Whether a version of vosops started the run that kept no list of its files."""
        return self.exists and not self.out.has_ledger

    def start(self, arguments: dict[str, Any]) -> None:
        """Begin a new run; of an earlier one here only the list of its files is kept."""
        with disk_errors(str(self.folder), RESUME):
            self.folder.mkdir(parents=True, exist_ok=True)
            # In this order: what a killed process leaves is the earlier run at its start, or the new one.
            for path in (self._checkpoint, self._complete, self.record.path):
                path.unlink(missing_ok=True)
        self.out.forget()
        write_text(self._arguments, json.dumps(arguments, indent=1), sync=True, advice=RESUME)

    def forget_if_alone(self) -> None:
        """Undo :meth:`start` where nothing but this state was written, so that the folder can be used at once."""
        with suppress(OSError):
            if all(path == self.folder for path in self.out.root.iterdir()):
                for path in (self._arguments, self._checkpoint, self._complete, self.record.path):
                    path.unlink(missing_ok=True)
                self.out.drop_ledger()
                self.folder.rmdir()

    def check(self, arguments: dict[str, Any]) -> None:
        """Raise a ``ResumeError`` that lists how ``arguments`` differ from those of the run here."""
        before = self.arguments()
        found = differences(before, json.loads(json.dumps(arguments)))
        if found:
            raise ResumeError(
                f"cannot resume {self.folder.parent}: {'; '.join(found)}. "
                "Give the same arguments, or --overwrite"
            )

    def arguments(self) -> dict[str, Any]:
        """Return what :meth:`start` or :meth:`amend` kept."""
        return _read_json(self._arguments)

    def amend(self, arguments: dict[str, Any]) -> None:
        """Replace the arguments of a run with others that would have led to where its checkpoint is."""
        write_text(self._arguments, json.dumps(arguments, indent=1), sync=True, advice=RESUME)

    def save(self, propagation: dict[str, Any], done: int, seconds: float, masks: Iterable[Path]) -> None:
        """Write a checkpoint: the loop's state, how much of the record belongs to it, the time spent.

        ``masks`` were written since the last one; they are safely on the disk before the checkpoint is.
        """
        state = {
            "version": _VERSION,
            "propagation": propagation,
            "record_bytes": self.record.size,
            "done": done,
            "seconds": seconds,
        }
        self._sync(masks)
        with complete_or_absent(self._checkpoint, sync=True, advice=RESUME) as file:
            torch.save(state, file)

    def _sync(self, masks: Iterable[Path]) -> None:
        with disk_errors(str(self.out.root), RESUME):
            for path in masks:
                sync_file(path)
            sync_folder(self.out.root)
            sync_file(self.record.path)

    def load(self) -> dict[str, Any] | None:
        """Return the last checkpoint and cut the record back to it; None if there is none yet."""
        state = self._read_checkpoint()
        with disk_errors(str(self.record.path), RESUME):
            self.record.cut(state["record_bytes"] if state else 0)
        return state

    def _read_checkpoint(self) -> dict[str, Any] | None:
        if not self._checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
            version = state["version"]
            if version == _VERSION and not {"propagation", "record_bytes", "done", "seconds"} <= set(state):
                raise ValueError("parts of it are missing")
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ResumeError(
                f"{self._checkpoint} cannot be read ({reason}): start again with --overwrite"
            ) from error
        if version != _VERSION:
            raise ResumeError(
                f"{self._checkpoint} was written by another version of vosops: start again with --overwrite"
            )
        if self.record.size < state["record_bytes"]:
            raise ResumeError(f"{self.record.path} is damaged: start again with --overwrite")
        return state

    @property
    def is_complete(self) -> bool:
        """Whether every frame of this run has its mask."""
        return self._complete.exists()

    def finish(self, facts: dict[str, Any], masks: Iterable[Path]) -> None:
        """Mark every mask as written, keep ``facts`` for the report, and drop the checkpoint."""
        self._sync(masks)
        write_text(self._complete, json.dumps(facts), sync=True, advice=RESUME)
        self.drop_checkpoint()

    def drop_checkpoint(self) -> None:
        """Delete the checkpoint, which a complete run does not need."""
        with disk_errors(str(self._checkpoint), RESUME):
            self._checkpoint.unlink(missing_ok=True)

    def done(self) -> list[str]:
        """Return the names of the frames that a resumed run would not make again; changes nothing."""
        if self.is_complete:
            names = [frame.name for frame in self.record]
            if len(names) != self.facts()["frames_done"]:
                raise ResumeError(f"{self.record.path} is damaged: start again with --overwrite")
            return names
        size = state["record_bytes"] if (state := self._read_checkpoint()) else 0
        return [frame.name for frame in self.record.up_to(size)]

    def facts(self) -> dict[str, Any]:
        """Return what :meth:`finish` kept."""
        return _read_json(self._complete, {"problem", "frames_done", "seconds"})


def _read_json(path: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON object of a file, which must have these keys; a ``ResumeError`` if it is another thing."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(keys) <= set(found):
        raise ResumeError(f"{path} is damaged: start again with --overwrite")
    return found


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
        elif key == "vosops check":
            found.append("what vosops check stored for this device changed, which may change the masks")
        elif key.endswith("content"):
            if isinstance(old, str) and str(new).startswith(f"{old}+"):  # an older version looked at less
                continue
            found.append(f"the {key} changed")
        else:
            found.append(f"--{key} was {old}, is {new}")
    return found
