"""The command line: ``vosops segment | semantic | studio | eval | train | demo | info | check | bench``."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

_COMMANDS = ("segment", "semantic", "studio", "eval", "train", "demo", "info", "check", "bench")
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
        """Segment objects through videos, score the masks, train the networks, and benchmark the operators."""

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
    """Run the command line; errors that a user can fix are one line with an exit code."""
    from vosops.io.errors import InputError, VosopsError

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    # The interpreter's last collection would walk PyTorch's 300,000 objects, most of a second, to free nothing.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    try:
        with _short_warnings():
            build_app()()
    except VosopsError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped", _INTERRUPTED)
    except OSError as error:  # of a file that was named, such as one that may not be read
        if error.filename is None:
            raise
        _fail(f"{os.fsdecode(error.filename)}: {error.strerror}", InputError.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("numpy", "rich", "typer"):
            raise
        _fail(f"{package} is not installed: pip install 'vosops[video]'", 1)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print warnings about inputs as one line each, without their source location."""
    from vosops.io.notes import InputWarning

    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, InputWarning):
            print(f"warning: {_one_line(str(message))}", file=sys.stderr)
        else:
            before(message, category, *place, **options)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _one_line(text: str) -> str:
    """Return the text with line ends, control characters and bytes that are not UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _fail(message: str, code: int) -> None:
    print(f"vosops: {_one_line(message)}", file=sys.stderr)
    sys.exit(code)
