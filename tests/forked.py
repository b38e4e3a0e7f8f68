"""Code in a process of its own that has imported PyTorch and nothing else: its import is most of what such tests cost.

One process imports it, and a copy of that one runs each test's code. Tests of what PyTorch's import brings, or of how
a process starts, start their own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 240

SERVER = f"""
import json, os, signal, sys, traceback
import torch
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm({SECONDS})  # ends it as a signal
        os.environ.update(asked["environment"])
        for name, stream in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(asked[name], os.O_WRONLY), stream)
        code = 0
        try:
            exec(compile(asked["code"], "<test>", "exec"), {{"__name__": "__main__"}})
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen:
    """The process that is copied; it ends when its standard input does, with this process."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def run_after_torch(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code as `python -c` would after `import torch`, with more environment variables; returns what it printed."""
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        files = {name: os.path.join(folder, name) for name in ("stdout", "stderr")}
        for file in files.values():
            Path(file).touch()
        server.stdin.write(json.dumps({"code": code, "environment": environment, **files}) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status, f"the process that is copied ended, with {server.wait()}"
        printed = {name: Path(file).read_text() for name, file in files.items()}
    return subprocess.CompletedProcess(["python", "-c", code], int(status), **printed)
