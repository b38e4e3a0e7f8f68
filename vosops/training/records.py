"""The output of a training run: logs, pictures, checkpoints, weights."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vosops.io.errors import InputError, ResumeError, VosopsError, disk_errors, require
from vosops.io.outputs import complete_or_absent, write_text
from vosops.training.config import TrainConfig

__all__ = ["Records", "Table"]

CONFIG = "config.json"
_FORMAT = 1  # of checkpoints
_KEPT = 2  # checkpoints
_CHANGEABLE = ("every", "tensorboard", "device")  # what a resumed run may change


class Table:
    """A CSV file whose rows begin with a step; its columns are those of its first row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []

    def keep_until(self, step: int) -> None:
        """Drop the rows of later steps, which a resumed run writes again."""
        if not self.path.exists():
            return
        whole, end, _ = self.path.read_text().rpartition("\n")  # a killed process may leave half a line
        rows = list(csv.DictReader(io.StringIO(whole + end)))
        kept = [row for row in rows if int(row["step"]) <= step]
        self._columns = list(rows[0]) if rows else []
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_text(self.path, text.getvalue() if self._columns else "")

    def add(self, row: Mapping[str, float | int]) -> None:
        """Append a row; figures that have no column are left out."""
        begin = not self._columns
        self._columns = self._columns or list(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n", extrasaction="ignore")
        if begin:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        with disk_errors(str(self.path)), self.path.open("a") as file:
            file.write(text.getvalue())


class Records:
    """The folder of a run.

    A new run needs a folder that is empty or absent, so that nothing of anybody's is replaced; a resumed one needs the
    folder of a run with the same configuration, but for how often what is written, and where it computes.
    """

    def __init__(self, out: Path, config: TrainConfig, *, resume: bool) -> None:
        self.out = out
        self.config = config
        self.steps = Table(out / "log.csv")
        self.scores = Table(out / "scores.csv")
        self._board: Any = None
        if resume:
            self._check_same()
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is not empty: give another --out, or --resume to continue a run")
        with disk_errors(str(out)):
            out.mkdir(parents=True, exist_ok=True)

    def begin(self, step: int) -> None:
        """Begin to write, after this many steps."""
        write_text(self.out / CONFIG, json.dumps(self.config.model_dump(mode="json"), indent=1) + "\n")
        self.steps.keep_until(step)
        self.scores.keep_until(step)
        if self.config.tensorboard:
            require("tensorboard", "train")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of some steps."""
        self.steps.add({"step": step, **figures})
        self._plot("train", step, figures)

    def score(self, step: int, scores: Mapping[str, float]) -> None:
        """Write the scores at a step."""
        self.scores.add({"step": step, **scores})
        self._plot("score", step, scores)

    def _plot(self, what: str, step: int, figures: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{what}/{name}", value, step)

    def pictures(self, step: int, grid: Tensor) -> None:
        """Write a picture (3,H,W) uint8."""
        from PIL import Image

        with complete_or_absent(self.out / "pictures" / f"step_{step:07}.png") as file:
            Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
        if self._board is not None:
            self._board.add_image("pictures", grid, step)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all, and drop all but the latest two."""
        with complete_or_absent(self._checkpoint(step), sync=True) as file:
            torch.save({"format": _FORMAT, "step": step, **state}, file)
        for old in self._checkpoints()[:-_KEPT]:
            self._checkpoint(old).unlink()

    def load(self) -> dict[str, Any] | None:
        """Return the latest checkpoint that can be read; None if there is none."""
        for step in reversed(self._checkpoints()):
            try:
                state = torch.load(self._checkpoint(step), map_location="cpu", weights_only=True)
            except Exception:
                continue  # it was damaged after it was written; the one before is as good
            if state.get("format") == _FORMAT:
                found: dict[str, Any] = state
                return found
        return None

    def weights(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write weights as NAME.safetensors, whole or not at all; return the file."""
        safetensors = require("safetensors.torch", "train")
        path = self.out / f"{name}.safetensors"
        own = {key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()}
        with complete_or_absent(path) as file:
            file.write(safetensors.save(own, metadata={"model": self.config.model}))
        return path

    def close(self) -> None:
        """End what is being written."""
        if self._board is not None:
            self._board.close()

    def _checkpoint(self, step: int) -> Path:
        return self.out / "checkpoints" / f"step_{step:07}.pt"

    def _checkpoints(self) -> list[int]:
        folder = self.out / "checkpoints"
        names = [path.stem.removeprefix("step_") for path in folder.glob("step_*.pt")]
        return sorted(int(name) for name in names if name.isdigit())

    def _check_same(self) -> None:
        """Raise unless the folder is that of a run with this configuration."""
        path = self.out / CONFIG
        try:
            before = json.loads(path.read_text())
        except OSError as error:
            raise ResumeError(f"{self.out} holds no run to resume: {path.name} cannot be read") from error
        except ValueError as error:
            raise VosopsError(f"{path} is damaged: restore it, or begin again in another folder") from error
        now = self.config.model_dump(mode="json")
        changed = [
            key for key in now if key not in _CHANGEABLE and _comparable(now, key) != _comparable(before, key)
        ]
        if changed:
            raise ResumeError(
                f"{self.out} is of a run with another {', '.join(changed)}: resume it with the same configuration, "
                "or give another --out"
            )


def _comparable(config: Mapping[str, Any], key: str) -> Any:
    """Return what decides the result: not how many workers read, and how much they keep."""
    value = config.get(key)
    if key == "data" and isinstance(value, dict):
        return {k: v for k, v in value.items() if k not in ("workers", "cache")}
    return value
