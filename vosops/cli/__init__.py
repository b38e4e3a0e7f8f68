"""The command line: ``vosops segment | semantic | eval | demo | info | bench``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

_COMMANDS = ("segment", "semantic", "eval", "demo", "info", "bench")
_INTERRUPTED = 130


def build_app() -> typer.Typer:
    """Return the typer app with every sub-command; each module of this package registers its own."""
    import typer

    app = typer.Typer(
        name="vosops",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    def show_version(asked: bool) -> None:
        if asked:
            from vosops import __version__

            typer.echo(f"vosops {__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=show_version, help="Show the version and exit."
        ),
    ) -> None:
        """Video object segmentation: masks through videos, and what it takes to measure them."""

    for command in _COMMANDS:
        try:
            module = import_module(f"vosops.cli.{command}")
        except ModuleNotFoundError as error:
            if error.name != f"vosops.cli.{command}":
                raise
            continue
        module.register(app)
    return app


def _root() -> None:
    """Video object segmentation: masks through videos, and what it takes to measure them."""


def main() -> None:
    """Run the command line; errors that a user can mend are one line, with an exit code."""
    from vosops.io.errors import VosopsError

    try:
        build_app()()
    except VosopsError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped", _INTERRUPTED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("numpy", "rich", "typer"):
            raise
        _fail(f"{package} is not installed: pip install 'vosops[video]'", 1)


def _fail(message: str, code: int) -> None:
    print(f"vosops: {message}", file=sys.stderr)
    sys.exit(code)
