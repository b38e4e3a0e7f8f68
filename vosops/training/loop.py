"""The training loop: one file that says what happens in which order.

Lightning Fabric brings devices, precision and processes (`torchrun`); everything else is here or in
:mod:`vosops.training.task`, `optimizing` and `records`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vosops.inference.usage import peak_memory
from vosops.io.errors import InputError, InterruptedRunError, VosopsError
from vosops.io.outputs import OwnedFolder
from vosops.training.clips_task import is_batch_norm
from vosops.training.config import TrainConfig
from vosops.training.devices import create_fabric
from vosops.training.loading import seed_of
from vosops.training.optimizing import create_average, create_optimizer, rate_factor, set_rates
from vosops.training.progress import Progress, Result, Silent
from vosops.training.records import Records
from vosops.training.task import Shard, create_task

__all__ = ["Result", "train"]


class _Pass(nn.Module):
    """A network whose forward pass is what it receives, so that a loss may call any part of the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, compute: Callable[[], tuple[Tensor, dict[str, float]]]
    ) -> tuple[Tensor, dict[str, float]]:
        return compute()


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train a model.

    Args:
        config: The run; see :func:`vosops.training.config.load_config`.
        out: The folder for all that is written; empty or absent, unless a run in it is resumed.
        resume: Continue from the latest checkpoint; on the CPU the result is bit-identical to an uninterrupted run.
            Without a checkpoint the run starts from the beginning.
        progress: What receives the progress.
        should_stop: Asked after every step; True saves a checkpoint and ends.

    Returns:
        The result of the run. Under ``torchrun`` every process returns, and the first one writes.

    Raises:
        InputError, ResumeError: The configuration, a source or the folder cannot be used.
        InterruptedRunError: It was stopped; a checkpoint has been written.
        VosopsError: The loss is no number any more, or something cannot be written or is not installed.
    """
    run = _Run(config, Path(out), progress or Silent(), should_stop)
    return run.execute(resume)


class _Run:
    """A run while it lasts."""

    def __init__(
        self, config: TrainConfig, out: Path, progress: Progress, should_stop: Callable[[], bool]
    ) -> None:
        self.config = config
        self.out = out
        self.should_stop = should_stop
        self.fabric = create_fabric(config)
        self.progress = progress if self.fabric.global_rank == 0 else Silent()
        self.step = 0
        self.best: float | None = None
        self.score: float | None = None
        self.seconds = 0.0
        self.problems: list[str] = []

    def execute(self, resume: bool) -> Result:
        """Train from where the folder is to the end."""
        config, fabric = self.config, self.fabric
        self.records = Records(self.out, config, resume=resume) if fabric.global_rank == 0 else None
        fabric.barrier()
        torch.manual_seed(config.seed)
        self.task = create_task(config, Shard(fabric.global_rank, fabric.world_size))
        self.network = self.task.network.train()
        self._lay_out()
        self.average = create_average(self.network, config.ema) if config.ema else None
        self._say_what_differs()
        self.optimizer = create_optimizer(self.network, config.optimizer, config.precision)
        self.module, self.stepper = fabric.setup(_Pass(self.network), self.optimizer)
        if self.average is not None:
            self.average.to(fabric.device)
        if resume:
            self._restore()
        with ExitStack() as stack:
            if self.records is not None:
                stack.enter_context(OwnedFolder(self.out).locked())
                self.records.begin(self.step)
                stack.callback(self.records.close)
            batches = self.task.batches(self.step * config.accumulate)
            stack.callback(getattr(batches, "close", lambda: None))  # ends the workers at once
            self._train(batches)
        return self._result()

    def _train(self, batches: Iterator[Any]) -> None:
        config, every = self.config, self.config.every
        self.progress.begin(config.steps, self.step)
        began, figures = time.monotonic() - self.seconds, []
        while self.step < config.steps:
            figures.append(self._one_step(batches))
            self.step += 1
            self.seconds = time.monotonic() - began
            last = self.step == config.steps
            stopped = self._stopped()
            if self.step % every.log == 0 or last or stopped:
                self._log(figures)
                figures = []
            if self.step % every.pictures == 0 or last:
                self._draw()
            if self.step % every.score == 0 or last:
                self._evaluate()
            if self.step % every.save == 0 or last or stopped:
                self._save()
            if stopped and not last:
                raise InterruptedRunError(f"stopped after step {self.step}; --resume continues from there")

    def _one_step(self, batches: Iterator[Any]) -> dict[str, Tensor | float]:
        """Make one step of the optimizer; the figures of its loss are left on the device."""
        config, fabric = self.config, self.fabric
        self._set_training()
        rate = set_rates(self.optimizer, rate_factor(self.step, config.steps, config.schedule))
        total: dict[str, Any] = {}
        waited = 0.0
        for part in range(config.accumulate):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            batch = batch.to(fabric.device) if hasattr(batch, "to") else batch
            self._note_problems(batch)
            number = self.step * config.accumulate + part
            torch.manual_seed(seed_of(config.seed, number, fabric.global_rank))
            with fabric.no_backward_sync(self.module, enabled=part < config.accumulate - 1):
                loss, further = self.module(partial(self.task.loss, self.network, batch))
                fabric.backward(loss / config.accumulate)
            for name, value in {"loss": loss.detach(), **further}.items():
                total[name] = total.get(name, 0.0) + value / config.accumulate
        self.batch = batch
        if config.optimizer.clip_norm is not None:
            norm = fabric.clip_gradients(
                self.module, self.optimizer, max_norm=config.optimizer.clip_norm, error_if_nonfinite=False
            )
            total["norm"] = float(norm)
        if config.precision == "float16" or math.isfinite(
            total.get("norm", 0.0)
        ):  # float16's scaler sees to it
            self.stepper.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.network)
        return {**total, "rate": rate, "wait": waited}

    def _set_training(self) -> None:
        """Put the network into training mode, but for batch norm that keeps its statistics."""
        self.network.train()
        if self.config.freeze_batch_norm:
            for module in self.network.modules():
                if is_batch_norm(module):
                    module.eval()

    def _lay_out(self) -> None:
        """Bring the weights into the memory format of the run, which what scores may have changed."""
        form = torch.channels_last if self.config.channels_last else torch.contiguous_format
        self.network.to(memory_format=form)

    def _say_what_differs(self) -> None:
        """Say that several processes are not one with a larger batch where batch norm sees a part of it."""
        learns = not self.config.freeze_batch_norm and any(map(is_batch_norm, self.network.modules()))
        if learns and self.fabric.world_size > 1:
            self.progress.note(
                "batch norm sees the samples of its own process alone: the result differs from one process with a "
                "larger batch, unless freeze_batch_norm is set"
            )

    def _note_problems(self, batch: Any) -> None:
        for problem in getattr(batch, "problems", ()):
            if problem not in self.problems:
                self.problems.append(problem)
                self.progress.note(f"skipped ({len(self.problems)}): {problem}")

    def _stopped(self) -> bool:
        """Return whether any process is to stop, so that all do after the same step."""
        wanted = self.should_stop()
        if self.fabric.world_size == 1:
            return wanted
        return bool(self.fabric.all_reduce(torch.tensor(float(wanted)), reduce_op="sum") > 0)

    def _log(self, figures: list[dict[str, Any]]) -> None:
        names = dict.fromkeys(name for own in figures for name in own)
        found = {}
        for name in names:
            values = [float(own[name]) for own in figures if name in own]
            values = [value for value in values if math.isfinite(value)] or [math.nan]
            mean = torch.tensor(sum(values) / len(values), dtype=torch.float64)
            found[name] = float(self.fabric.all_reduce(mean, reduce_op="mean"))
        if not math.isfinite(found["loss"]):
            raise VosopsError(
                f"the loss is not a number in the steps up to {self.step}: lower optimizer.rate or set clip_norm"
            )
        if self.records is not None:
            self.records.log(self.step, {**found, "seconds": self.seconds})
            self.progress.advance(self.step, found)

    @property
    def _scored(self) -> nn.Module:
        """The network whose score counts: the average, if there is one."""
        return self.network if self.average is None else self.average.module

    def _draw(self) -> None:
        if self.records is not None:
            grid = self.task.pictures(self._scored.eval(), self.batch)
            self._lay_out()
            if grid is not None:
                self.records.pictures(self.step, grid.cpu())

    def _evaluate(self) -> None:
        if self.records is not None:
            began = time.monotonic()
            try:
                scores = self.task.evaluate(self._scored.eval(), self.out)
            except InputError as error:  # of a held-out file, which is no reason to end hours of training
                scores = {}
                self.progress.note(f"step {self.step}: no score, {error}")
            self._lay_out()
            if scores:
                self.score = scores["score"]
                self.records.score(self.step, {**scores, "seconds": self.seconds})
                self.progress.note(
                    f"step {self.step}: score {self.score:.4f} ({time.monotonic() - began:.0f} s)"
                )
                if self.best is None or self.score > self.best:
                    self.best = self.score
                    self.records.weights("best", self.task.weights(self._scored))
        self.fabric.barrier()

    def _save(self) -> None:
        if self.records is not None:
            average = None if self.average is None else self.average.state_dict()
            self.records.save(
                self.step,
                {
                    "network": self.network.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "average": average,
                    "precision": self.fabric.strategy.precision.state_dict(),
                    "task": self.task.state_dict(),
                    "best": self.best,
                    "score": self.score,
                    "seconds": self.seconds,
                    "problems": self.problems,
                },
            )
            self.records.weights("weights", self.task.weights(self._scored))
        self.fabric.barrier()

    def _restore(self) -> None:
        """Go back to the latest checkpoint, if there is one; all processes read the same."""
        state = Records(self.out, self.config, resume=True).load()
        if state is None:
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if state["precision"]:
            self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.task.load_state_dict(state["task"])
        self.step, self.best, self.score = state["step"], state["best"], state["score"]
        self.seconds, self.problems = state["seconds"], list(state["problems"])

    def _result(self) -> Result:
        peak = peak_memory(cuda=self.fabric.device.type == "cuda")
        weights = self.out / "weights.safetensors"
        return Result(self.step, weights, self.score, self.best, tuple(self.problems), self.seconds, peak)
