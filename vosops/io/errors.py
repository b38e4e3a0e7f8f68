"""Errors that a user can act on: one line that says what is wrong and what to do, and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # no quotas on Windows


class VosopsError(Exception):
    """Something went wrong while running; the message is one line that says what to do."""

    exit_code = 1


class InputError(VosopsError):
    """An argument or an input file cannot be used."""

    exit_code = 2


class IncompleteInputError(VosopsError):
    """The input ended early; what could be read was processed and written."""


class ResumeError(VosopsError):
    """The run in the output folder cannot be continued with these arguments."""

    exit_code = 2


class InterruptedRunError(VosopsError):
    """The user stopped the run; a checkpoint was saved."""

    exit_code = 130


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an ``OSError`` raised while writing ``what`` into a one-line :class:`VosopsError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            advice = "the disk is full; free some space and run the same command with --resume"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "no permission to write there; choose another --out"
        else:
            advice = f"{error.strerror or error}; mend that and run the same command with --resume"
        raise VosopsError(f"cannot write {what}: {advice}") from error


def require(module: str, extra: str = "video") -> ModuleType:
    """Import an optional dependency, or say in one line how to install it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise VosopsError(f"{module} is not installed: pip install 'vosops[{extra}]'") from error
