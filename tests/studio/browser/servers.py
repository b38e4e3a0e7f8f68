"""`vosops studio` in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from vosops.studio.launch import INTERRUPTED


def started(path, work, *options):
    """The server's process on a video or a folder of frames, and the URL that it prints on its one line."""
    command = [sys.executable, "-m", "vosops.cli", "studio", str(path), "--no-browser", "--work", str(work)]
    server = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    line = server.stdout.readline()
    found = re.fullmatch(r"vosops studio: (http://127\.0\.0\.1:\d+/\?token=\S+)\n", line)
    if not found:
        server.kill()
    assert found, f"expected the URL on one line, got {line!r}"
    return server, found[1]


def ended(server):
    """Ends a server as Ctrl-C does; it leaves within seconds, on a busy machine too."""
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == INTERRUPTED
