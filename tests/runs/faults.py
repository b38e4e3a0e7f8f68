"""Runs that die or fail at a chosen operation on files, and disks of a few kilobytes."""

import errno
import gc
import os
import signal
import subprocess
import sys
import traceback
from contextlib import contextmanager

import pytest

from vosops.io import outputs

EXHAUSTIVE = os.environ.get("VOSOPS_EXHAUSTIVE") == "1"
"""Whether every operation is tried (make test-all), or a sample."""

_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def sample(count, size):
    """Numbers from 1 to ``count``: all of them, or about ``size`` that include the first and the last."""
    if EXHAUSTIVE or count <= size:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (size - 1)) for i in range(size)})


def run_and_die(work, folder, at=None):
    """Run ``work`` in a forked child, which gets SIGKILL at its ``at``-th operation on files below ``folder``.

    Operations are opening for writing, writing (half of it is written), renaming, deleting, making a folder, cutting
    and ``fsync``. Returns whether it was killed, and how many operations there were where it was not.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        gc.freeze()  # garbage of this process may wait for its threads, which the child has not, when it is freed
        code = 1
        try:
            count = _count_operations(str(folder), at)
            work()
            os.write(writer, str(count()).encode())
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read().decode()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True, 0
    assert os.WEXITSTATUS(status) == 0, told
    return False, int(told)


def _count_operations(folder, at):
    done = [0]

    def count(before_death=lambda: None):
        done[0] += 1
        if done[0] == at:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(folder) and flags & _WRITING:
                count()
        elif event in _EVENTS and os.fsdecode(arguments[0]).startswith(folder):
            count()

    write, fsync = outputs._Raw.write, os.fsync

    def dying_write(self, data):
        data = memoryview(data).cast("B")
        count(lambda: write(self, data[: len(data) // 2]))
        return write(self, data)

    def dying_fsync(descriptor):
        count()
        fsync(descriptor)

    outputs._Raw.write, os.fsync = dying_write, dying_fsync
    sys.addaudithook(hook)
    return lambda: done[0]


@contextmanager
def mounted(folder, options):
    """A file system in memory on ``folder``; skips the test where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def nearly_full(disk, kilobytes):
    """Leave so much space on a disk for a while."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(max(0, file.tell() - kilobytes * 1024))
    try:
        yield
    finally:
        filler.unlink()
