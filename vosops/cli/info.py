"""`vosops info`: what is installed, what was compiled, and what serves each op here."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="info")(show)


def show(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, what was compiled, CPU and GPUs, the models, and which implementation serves each op and why."""
    from vosops import info

    facts = info.collect()
    typer.echo(json.dumps(facts, indent=1) if as_json else info.describe(facts))
