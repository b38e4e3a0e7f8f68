"""Runs a function in a fresh process, so that nothing that ran before has left memory behind."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_fresh(module: str, function: str, *args: Any) -> Any:
    """`module.function(*args)` in a new Python; arguments and result are pickled.

    Raises:
        RuntimeError: the process failed; the message ends with the last line that it wrote, or with the signal that
            ended it.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, result = Path(folder) / "call", Path(folder) / "result"
        call.write_bytes(pickle.dumps((module, function, args)))
        done = subprocess.run(
            [sys.executable, "-m", "vosops.benchmarking.fresh", str(call), str(result)],
            env={**os.environ, "PYTHONPATH": python_path()},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not result.exists():
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            if done.returncode < 0:  # its words, if any, are not about that
                last = signal.Signals(-done.returncode).name
            raise RuntimeError(f"{module}.{function} failed in a separate process: {last}")
        return pickle.loads(result.read_bytes())


def python_path() -> str:
    """Return the PYTHONPATH with which another process finds the modules that this one does."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def main(call: Path, result: Path) -> None:
    """Run the other side of `run_fresh`."""
    module, function, args = pickle.loads(call.read_bytes())
    found = getattr(importlib.import_module(module), function)(*args)
    result.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
