"""Errors that a user can act on: one line that says what is wrong and what to do, and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # no quotas on Windows


class VosopsError(Exception):
    """An error during a run; the message is one line with the remedy."""

    exit_code = 1


class InputError(VosopsError):
    """An argument or an input file cannot be used."""

    exit_code = 2


class DiskError(VosopsError):
    """Something cannot be written: the disk is full, a permission is missing and the like."""


class FolderInUseError(InputError):
    """Another run is writing into the output folder."""


class IncompleteInputError(VosopsError):
    """The input ended early; what could be read was processed and written."""


class ResumeError(VosopsError):
    """The run in the output folder cannot be continued with these arguments."""

    exit_code = 2


class InterruptedRunError(VosopsError):
    """The user stopped the run; a checkpoint was saved."""

    exit_code = 130


@contextmanager
def disk_errors(what: str, then: str = "run the same command again") -> Iterator[None]:
    """Turn an ``OSError`` raised while writing ``what`` into a one-line :class:`DiskError`.

    ``then`` is what to do when the trouble is over.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            advice = f"the disk is full; free some space and {then}"
        elif error.errno == errno.EFBIG:
            advice = f"it is larger than a file may be here; raise the limit and {then}"
        elif error.errno == errno.EROFS:
            advice = "the file system is read-only; choose another place"
        elif error.errno in (errno.EACCES, errno.EPERM):
            advice = "no permission to write there; choose another place"
        else:
            reason = " ".join(str(error.strerror or error).split())
            advice = f"{reason}; mend that and {then}"
        raise DiskError(f"cannot write {what}: {advice}") from error


def require(module: str, extra: str = "video") -> ModuleType:
    """Import an optional dependency, or raise a one-line error that explains how to install it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise VosopsError(f"{module} is not installed: pip install 'vosops[{extra}]'") from error
