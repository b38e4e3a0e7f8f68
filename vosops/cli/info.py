"""`vosops info`: installed versions, compiled libraries, and the implementation of each op."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="info")(show)


def show(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, compiled libraries, CPU, GPUs, models, and which implementation serves each op and why."""
    from vosops import info

    facts = info.collect()
    typer.echo(json.dumps(facts, indent=1) if as_json else info.describe(facts))
