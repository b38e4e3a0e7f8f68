"""Batches of clips, read by workers in an order that depends on the seed alone."""

from __future__ import annotations

import ctypes
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vosops.training.samples import Clip, ClipSamples
from vosops.training.task import Shard

__all__ = ["Batch", "batches", "seed_of"]

_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends
_AHEAD = 4  # batches that each worker reads before they are asked for


@dataclass(frozen=True)
class Batch:
    """Clips of one size: frames (N,T,3,h,w) uint8, labels (N,T,h,w) uint8, how many objects each has.

    number: of the batch. problems: what could not be read, a line each.
    """

    frames: Tensor
    labels: Tensor
    objects: tuple[int, ...]
    number: int = 0
    problems: tuple[str, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Return it on a device."""
        frames, labels = (x.to(device, non_blocking=non_blocking) for x in (self.frames, self.labels))
        return replace(self, frames=frames, labels=labels)

    def pin_memory(self) -> Batch:
        """Return it in memory from which a GPU copies."""
        return replace(self, frames=self.frames.pin_memory(), labels=self.labels.pin_memory())


class _Numbers:
    """The numbers of the clips of each batch of one process, without end."""

    def __init__(self, first: int, batch: int, shard: Shard) -> None:
        self.first = first
        self.batch = batch
        self.shard = shard

    def __iter__(self) -> Iterator[list[int]]:
        number = self.first
        while True:
            begin = (number * self.shard.world + self.shard.rank) * self.batch
            yield list(range(begin, begin + self.batch))
            number += 1


def batches(
    samples: ClipSamples, first: int, *, batch: int, shard: Shard, workers: int, pinned: bool = False
) -> Iterator[Batch]:
    """Yield batches without end, from number `first` on.

    Batch n of all processes together holds the clips from n * world * batch on: several processes see what one with a
    larger batch does. workers: processes that read, 0 for none. pinned: into pinned memory, for a GPU.
    """
    loader = DataLoader(
        samples,
        batch_sampler=_Numbers(first, batch, shard),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_stacked,
        pin_memory=pinned,
        persistent_workers=workers > 0,
        prefetch_factor=_AHEAD if workers else None,
        worker_init_fn=_begin_worker,
    )
    for number, found in enumerate(loader, first):
        yield replace(found, number=number)


def _stacked(clips: list[Clip]) -> Batch:
    return Batch(
        torch.stack([clip.frames for clip in clips]),
        torch.stack([clip.labels for clip in clips]),
        tuple(clip.objects for clip in clips),
        problems=tuple(problem for clip in clips for problem in clip.problems),
    )


def _begin_worker(number: int) -> None:
    """Leave Ctrl-C to the training process, and end when that asks for it or is killed.

    A worker that outlived it would hold the lock of the run's folder.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def seed_of(*numbers: int) -> int:
    """Return a seed of some numbers, for what is drawn within a step."""
    return random.Random("/".join(map(str, numbers))).getrandbits(63)
