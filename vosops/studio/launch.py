"""Running the server: an address with a random token, on this machine alone."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from vosops.io.errors import FolderInUseError, VosopsError, disk_errors, require
from vosops.io.outputs import OwnedFolder

if TYPE_CHECKING:
    from .assist import ClickTool
    from .follow import Engine

__all__ = ["INTERRUPTED", "leave", "serve"]

HOST = "127.0.0.1"
INTERRUPTED = 130  # exit code of a server that Ctrl-C ended
_SECONDS_OF_REQUESTS = 3  # that a request in progress has to answer when the server ends


def serve(
    work: Path,
    engine: Engine,
    *,
    video: Path | None = None,
    port: int = 0,
    click: ClickTool | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve the page until the process is interrupted; then pause what is in progress, and let go of the work folder.

    KeyboardInterrupt follows, as uvicorn raises each signal again, unless the process was told to ignore the signal.

    A second interruption ends the process at once, with what is on the disk, as if it was killed: a job that was in
    progress continues from its latest checkpoint. Threads that are in the middle of a frame or a picture may be left;
    end the process by :func:`leave`, which does not wait for them.

    Args:
        work: The work folder: everything that is written is in it.
        engine: Follows objects.
        video: What the page shows first; None: it asks.
        port: Where to listen; 0: any that is free.
        click: What a click selects with; None: no such tool.
        announce: Called once, with the URL, when the server listens.

    Raises:
        InputError: The video cannot be used, or another server uses the work folder.
        VosopsError: A package is not installed, or the port is taken.
    """
    uvicorn: Any = require("uvicorn", "studio")
    require("starlette", "studio")
    require("websockets", "studio")
    require("av")
    from .server import Studio, build_app

    with _only_one(work):
        studio = Studio(work, engine, click)
        try:
            project = None if video is None else studio.open_path(video)
            listener = _listener(port)
        except VosopsError:
            studio.close()
            raise
        port = listener.getsockname()[1]
        token = secrets.token_urlsafe(24)
        app = build_app(studio, token=token, hosts=[f"{HOST}:{port}", f"localhost:{port}"])
        address = f"http://{HOST}:{port}/?token={token}" + (f"#{project.id}" if project else "")

        class Server(uvicorn.Server):  # type: ignore[misc]
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                announce(address)

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                if self.should_exit and sig == signal.SIGINT:
                    leave(INTERRUPTED)
                super().handle_exit(sig, frame)

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                if studio.pause():
                    print("pausing after the frame in progress; Ctrl-C again ends at once", file=sys.stderr)
                # Requests that are still decoding are let go; uvicorn would print a traceback for each.
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
                await super().shutdown(sockets=sockets)

        limits = {"ws_max_size": 1 << 16, "timeout_graceful_shutdown": _SECONDS_OF_REQUESTS}
        config = uvicorn.Config(app, log_level="warning", access_log=False, **limits)
        with listener:
            Server(config).run(sockets=[listener])


def leave(code: int) -> NoReturn:
    """End the process without tidying it up: everything that a server keeps is on the disk.

    The interpreter would first wait for threads that decode, and look through all objects that PyTorch has made:
    seconds, and a minute on a busy machine, in which no Ctrl-C is heard.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Hold the work folder, whose jobs two servers would take from each other; it is not left behind empty."""
    with disk_errors(str(work), "choose another --work"):
        work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(OwnedFolder(work).locked())
        except FolderInUseError as error:
            raise FolderInUseError(
                f"another vosops studio uses {work}: open its page, or give another --work"
            ) from error
        stack.callback(_remove_if_empty, work)
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # there is something in it
        folder.rmdir()


def _listener(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise VosopsError(f"--port {port} cannot be used ({error.strerror}): choose another, or 0") from error
    return listener
