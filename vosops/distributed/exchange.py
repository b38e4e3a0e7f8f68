"""Communication between the ranks of a group: collectives in rank order that count bytes and notice dead ranks."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_PROBE_SECONDS = 5.0  # how long a rank has to answer when somebody asks whether it is alive
_LOOK_SECONDS = 1.0  # after which a rank that waits looks whether somebody asks
_STORE_SECONDS = 0.1  # between two looks for a late answer
_LEAST_SECONDS = 0.001
_POLL_SECONDS = (1e-5, 1e-2)  # the first and the longest pause between two looks at a collective on a GPU
_PROBE_TAG = 18_018  # of the messages that ask
_HASH_BYTES = 7  # of a digest, so that it fits a positive int64
_HEADER = 16  # int64 that announce a tensor: dtype, gradients, dimensions and sizes
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Result = TypeVar("Result")


class RankError(RuntimeError):
    """A rank of the group died, hangs or failed.

    Attributes:
        ranks: The global ranks that did not answer; empty if the backend cannot identify them (NCCL).
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass
class Traffic:
    """Bytes that this rank exchanged with others.

    Attributes:
        sent: Bytes that left this rank, each receiver counted.
        received: Bytes that came from other ranks.
        calls: Collectives.
    """

    sent: int = 0
    received: int = 0
    calls: int = 0


_counters: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this process exchanges through `vosops.distributed` within the block, gradients included.

    >>> from vosops.distributed import count_traffic
    >>> with count_traffic() as traffic:
    ...     pass
    >>> traffic.received
    0
    """
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters[:] = [counter for counter in _counters if counter is not traffic]


class Exchange:
    """Collectives of a group.

    Sums and merges are made in the order of the ranks, each slice by one rank, so that every rank has the same bits,
    and a second run too. A tensor's last dimension is what is sliced. Every rank of the group must make the same calls.

    Args:
        group: The process group; None: the default one.
        timeout: Seconds that a collective may take before the ranks are checked; None: the timeout of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed must be initialized: call torch.distributed.init_process_group first"
            )
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds or None, got {timeout}")
        chosen = dist.group.WORLD if group is None else group
        assert chosen is not None  # it is initialized
        self.group: dist.ProcessGroup = chosen
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError("group must contain this process, got a group that does not")
        self.size = dist.get_world_size(self.group)
        self.timeout = timeout
        self._store_hangs = False

    # ---- Slices: each rank works on its part of the pixels.

    def scatter(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Give each rank its slice of the last dimension of these tensors -> for each rank its tensors' own slice.

        Tensors (...,P) of any dtypes become (...,ceil(P / ranks)), the last ones padded with zeros.
        """
        length = self._slice_length(tensors)
        parts = [self._padded(t, length).unflatten(-1, (self.size, length)) for t in tensors]
        mine = [_packed([part.select(-2, r) for part in parts]) for r in range(self.size)]
        like = [part.select(-2, 0) for part in parts]
        return [_unpacked(buffer, like) for buffer in self._all_to_all(mine)]

    def gather(self, slices: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Put the slices of all ranks together -> each (...,P) for its P of `lengths`, on every rank."""
        buffer = _packed(slices)
        received = self._all_gather(buffer)
        parts = [_unpacked(part, slices) for part in received]
        return [torch.cat([part[i] for part in parts], -1)[..., :length] for i, length in enumerate(lengths)]

    def answer(self, slices: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> list[Tensor]:
        """Send each rank what was found for it on this slice -> this rank's (...,P), put together.

        slices: for each rank the same number of tensors (...,p).
        """
        received = self._all_to_all([_packed(each) for each in slices])
        parts = [_unpacked(buffer, slices[0]) for buffer in received]
        return [torch.cat([part[i] for part in parts], -1)[..., :length] for i, length in enumerate(lengths)]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, float32 or wider within, in the order of the ranks."""
        if self.size == 1:
            return tensor
        flat = tensor.reshape(-1)
        total: Tensor | None = None
        for (part,) in self.scatter([flat]):
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            total = wide if total is None else total + wide
        assert total is not None
        (summed,) = self.gather([total.to(tensor.dtype)], [flat.shape[0]])
        return summed.view_as(tensor)

    # ---- Numbers and tensors of one rank.

    def numbers(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """Return the integers of every rank, in their order; as many on each."""
        mine = torch.tensor(list(values), dtype=torch.int64, device=self._device(device))
        received = self._all_gather(mine.view(torch.uint8))
        return [part.clone().view(torch.int64).tolist() for part in received]

    def agree(self, what: dict[str, Any], device: torch.device, failure: Exception | None = None) -> None:
        """Raise on every rank unless all have the same `what`, by their texts, and none has a failure.

        A rank's own failure is raised there, and a ValueError that names the rank on the others.
        """
        if self.size > 1:
            digests = [
                int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:_HASH_BYTES], "big")
                for value in what.values()
            ]
            every = self.numbers([int(failure is not None), *digests], device)
        if failure is not None:
            raise failure
        if self.size == 1:
            return
        for rank, (failed, *_) in enumerate(every):
            if failed:
                name = self.global_rank(rank)
                raise ValueError(
                    f"arguments must be valid on all ranks, got invalid ones on rank {name}, see its error"
                )
        for rank, (_, *theirs) in enumerate(every):
            pairs = zip(what, theirs, every[0][1:], strict=True)
            named = [name for name, digest, first in pairs if digest != first]
            if named:
                raise ValueError(
                    f"{', '.join(named)} must be equal on all ranks, got other ones on rank "
                    f"{self.global_rank(rank)} than on rank {self.global_rank(0)}"
                )

    def broadcast(self, tensor: Tensor | None, source: int, device: torch.device) -> tuple[Tensor, bool]:
        """Return a tensor that the rank `source` of the group has, and whether it needs gradients there."""
        header = torch.zeros(_HEADER, dtype=torch.int64)
        if self.rank == source:
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"the rank that the query comes from must have a tensor, got {type(tensor).__name__}"
                )
            known = [_DTYPES.index(tensor.dtype), int(tensor.requires_grad), tensor.dim(), *tensor.shape]
            header[: len(known)] = torch.tensor(known)
        header = header.to(self._device(device))
        self._broadcast(header, source)
        dtype, gradients, dimensions, *sizes = header.tolist()
        if self.rank == source:
            assert tensor is not None
            content = tensor.detach().contiguous()
        else:
            content = torch.empty(sizes[:dimensions], dtype=_DTYPES[dtype], device=device)
        self._broadcast(content, source)
        return content, bool(gradients)

    # ---- Who is alive.

    def check(self, timeout: float | None = None) -> None:
        """Return when every rank is here; raise `RankError` with those that are not after `timeout` seconds."""
        self._run(
            "a check of the ranks",
            lambda: dist.barrier(group=self.group, async_op=True),
            timeout or self.timeout,
            on_gpu=torch.cuda.is_available(),
        )

    def global_rank(self, rank: int) -> int:
        """Return what a rank of the group is called in the default group."""
        return dist.get_global_rank(self.group, rank)

    def _missing(self) -> list[int] | None:
        """Return the ranks of the group that answer no message; None where the backend sends none from the CPU.

        gloo closes all connections of a rank that waited in vain for one other, so that a living rank's answer may
        be lost: one that says so in the store is alive too.
        """
        if not self._speaks("cpu"):
            return None
        self._answer()
        token = torch.zeros(1, dtype=torch.uint8)
        pending: list[tuple[int, Any]] = []
        came = []  # what is received into must live as long as the work
        missing = set()
        for rank in range(self.size):
            if rank == self.rank:
                continue
            peer = self.global_rank(rank)
            came.append(torch.zeros_like(token))
            try:
                pending.append((rank, dist.isend(token, peer, group=self.group, tag=_PROBE_TAG)))
                pending.append((rank, dist.irecv(came[-1], peer, group=self.group, tag=_PROBE_TAG)))
            except RuntimeError:
                missing.add(rank)
        until = time.monotonic() + _PROBE_SECONDS
        for rank, work in pending:  # a message that is not awaited would be lost with its work
            try:
                work.wait(timedelta(seconds=max(until - time.monotonic(), _LEAST_SECONDS)))
            except RuntimeError:
                missing.add(rank)
        while True:
            missing = {rank for rank in missing if not self._has_answered(rank)}
            if not missing or self._store_hangs or time.monotonic() > until:
                return sorted(missing)
            time.sleep(_STORE_SECONDS)

    # ---- How it is done.

    def _run(
        self, what: str, start: Callable[[], Any], timeout: float | None = None, on_gpu: bool = False
    ) -> None:
        """Start a collective and wait for it; a `RankError` names who is to blame."""
        try:
            self._wait(start(), self.timeout if timeout is None else timeout, on_gpu)
        except RuntimeError as error:
            self._ask()
            missing = self._missing()
            reason = " ".join(str(error).split())
            if missing:
                ranks = [self.global_rank(rank) for rank in missing]
                verb = "does" if len(ranks) == 1 else "do"
                raise RankError(
                    f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} {verb} not answer, noticed by rank "
                    f"{self.global_rank(self.rank)} in {what}: {reason}",
                    ranks,
                ) from error
            who = "one of them" if missing is not None else "a rank, the backend cannot tell which,"
            now = "" if missing is None else "all ranks answer now, but "
            raise RankError(f"{now}{who} did not take part in {what} in time: {reason}") from error

    def _wait(self, work: Any, seconds: float | None, on_gpu: bool) -> None:
        """Wait for a collective; RuntimeError if it fails, takes too long, or another rank asks who is alive.

        NCCL gives up its communicator when a wait with a timeout runs out, so that it is looked at instead.
        """
        if not self._speaks("cpu"):
            work.wait() if seconds is None else work.wait(timedelta(seconds=seconds))
            return
        until = math.inf if seconds is None else time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            try:
                (_look if on_gpu else _wait_for)(work, max(min(left, _LOOK_SECONDS), _LEAST_SECONDS))
                return
            except RuntimeError:
                if work.is_completed() or left <= _LOOK_SECONDS:
                    raise
            if self._is_asked():
                raise RuntimeError("another rank noticed it")

    def _ask(self) -> None:
        """Make the ranks that wait in a collective answer `_missing` too."""
        self._in_store(lambda store: store.set(self._question, b"1"))

    def _is_asked(self) -> bool:
        return bool(self._in_store(lambda store: store.check([self._question])))

    def _answer(self) -> None:
        """Tell the ranks whose messages are lost that this one is alive."""
        self._in_store(lambda store: store.set(f"{self._question}/{self.rank}", b"1"))

    def _has_answered(self, rank: int) -> bool:
        return bool(self._in_store(lambda store: store.check([f"{self._question}/{rank}"])))

    @property
    def _question(self) -> str:
        return f"vosops/{self.group.group_name}/who is alive"

    def _in_store(self, call: Callable[[Any], Any]) -> Any:
        """Return what a call of the group's store returns; None if its host died, and from when it hangs on."""
        if self._store_hangs:
            return None
        answers: list[Any] = []

        def work() -> None:
            with suppress(Exception):  # the store may have been on the rank that died
                answers.append(call(dist.distributed_c10d._get_default_store()))

        asker = threading.Thread(target=work, daemon=True)  # a stopped host lets a call wait for minutes
        asker.start()
        asker.join(_PROBE_SECONDS)
        self._store_hangs = asker.is_alive()
        return answers[0] if answers else None

    def _all_to_all(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Send buffer i, uint8, to rank i -> what came from each rank; all are of equal size."""
        size = buffers[0].numel()
        if self.size == 1 or size == 0:
            return list(buffers)
        _count(sent=size * (self.size - 1), received=size * (self.size - 1))
        given = torch.cat(list(buffers))
        taken = torch.empty_like(given)
        self._run(
            "an exchange of slices",
            lambda: dist.all_to_all_single(taken, given, group=self.group, async_op=True),
            on_gpu=given.device.type != "cpu",
        )
        return list(taken.split(size))

    def _all_gather(self, buffer: Tensor) -> list[Tensor]:
        """Return the buffer of each rank, uint8; all are of equal size."""
        size = buffer.numel()
        if self.size == 1 or size == 0:
            return [buffer] * self.size
        _count(sent=size * (self.size - 1), received=size * (self.size - 1))
        taken = [torch.empty_like(buffer) for _ in range(self.size)]
        self._run(
            "a gathering of slices",
            lambda: dist.all_gather(taken, buffer, group=self.group, async_op=True),
            on_gpu=buffer.device.type != "cpu",
        )
        return taken

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        if self.size == 1 or tensor.numel() == 0:
            return
        size = tensor.numel() * tensor.element_size()
        if self.rank == source:
            _count(sent=size * (self.size - 1))
        else:
            _count(received=size)
        self._run(
            "a broadcast",
            lambda: dist.broadcast(tensor, self.global_rank(source), group=self.group, async_op=True),
            on_gpu=tensor.device.type != "cpu",
        )

    def _slice_length(self, tensors: Sequence[Tensor]) -> int:
        return -(-tensors[0].shape[-1] // self.size)

    def _padded(self, tensor: Tensor, length: int) -> Tensor:
        missing = length * self.size - tensor.shape[-1]
        return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor

    def _device(self, device: torch.device) -> torch.device:
        """Return where the backend takes small tensors from, for data on `device`."""
        return device if self._speaks(device.type) else torch.device("cuda", torch.cuda.current_device())

    def _speaks(self, device_type: str) -> bool:
        """Return whether the group has a backend for tensors of this kind of device."""
        with suppress(RuntimeError, AttributeError):
            return any(device.type == device_type for device in self.group._device_types)
        return True


def _wait_for(work: Any, seconds: float) -> None:
    work.wait(timedelta(seconds=seconds))


def _look(work: Any, seconds: float) -> None:
    """Return when a collective is done; RuntimeError after this many seconds, or if it failed."""
    until = time.monotonic() + seconds
    pause, longest = _POLL_SECONDS
    while not work.is_completed():
        if time.monotonic() > until:
            raise RuntimeError(f"it took longer than {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, longest)
    work.wait()


def _count(sent: int = 0, received: int = 0) -> None:
    for counter in _counters:
        counter.sent += sent
        counter.received += received
        counter.calls += 1


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """Return the bytes of tensors one after the other, a copy."""
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(flat)


def _unpacked(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of these shapes and dtypes from their bytes."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in like]
    parts = buffer.split(sizes)
    return [
        part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, like, strict=True)
    ]
