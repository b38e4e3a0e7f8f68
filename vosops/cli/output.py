"""What commands share: errors of one line, and files of results that are asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import typer

BAD_INPUT = 2
"""The exit code where an argument or an input cannot be used."""


def refuse(command: str, message: str, exit_code: int = 1) -> NoReturn:
    """End a command with an error of one line."""
    typer.echo(f"vosops {command}: {message}", err=True)
    raise typer.Exit(exit_code)


def check_file(command: str, option: str, file: Path | None) -> None:
    """Refuses a file that could not be written, before the work and not after it."""
    if file is None:
        return
    folder = file.absolute().parent
    if not folder.is_dir():
        refuse(command, f"{option} {file}: there is no folder {folder}", BAD_INPUT)
    if not os.access(file if file.exists() else folder, os.W_OK):
        refuse(command, f"{option} {file}: no permission to write there", BAD_INPUT)


def write_json(command: str, file: Path, content: dict[str, Any]) -> None:
    """Write the file of --json."""
    try:
        file.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        refuse(command, str(error))
