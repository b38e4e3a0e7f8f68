"""Helpers shared by the commands: one-line errors and result files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer

from vosops.io.errors import VosopsError
from vosops.io.outputs import check_result, is_json_with, replace_result

BAD_INPUT = 2
"""The exit code where an argument or an input cannot be used."""


def refuse(command: str, message: str, exit_code: int = 1) -> NoReturn:
    """End a command with a one-line error."""
    typer.echo(f"vosops {command}: {message}", err=True)
    raise typer.Exit(exit_code)


def check_file(
    command: str, option: str, file: Path | None, is_ours: Callable[[bytes], bool] | None = None
) -> None:
    """Refuse a file that could not be written, before the work and not after it.

    is_ours: says of a file's content whether this command wrote it, so that it may be replaced.
    """
    if file is None:
        return
    folder = file.absolute().parent
    if not folder.is_dir():
        refuse(command, f"{option} {file}: folder {folder} does not exist", BAD_INPUT)
    if not os.access(file if file.exists() else folder, os.W_OK):
        refuse(command, f"{option} {file}: no write permission", BAD_INPUT)
    if is_ours is not None:
        with one_line(command):
            check_result(file, is_ours)


def write_json(command: str, file: Path, content: dict[str, Any], keys: set[str]) -> None:
    """Write the file of --json, in place of an earlier one, which is known by its keys."""
    text = json.dumps(content, indent=1) + "\n"
    with one_line(command):
        replace_result(file, text.encode(), lambda found: is_json_with(found, keys))


@contextmanager
def one_line(command: str) -> Iterator[None]:
    """End the command with one line where something cannot be read or written."""
    try:
        yield
    except VosopsError as error:
        refuse(command, str(error), error.exit_code)
    except OSError as error:
        refuse(command, str(error))
