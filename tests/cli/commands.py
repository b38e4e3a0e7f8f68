"""Running the command in this process, and reading what it says."""

import sys

import pytest

from vosops import cli


def run_command(monkeypatch, capsys, *arguments):
    """Runs `vosops` with these arguments; returns (exit code, what it printed)."""
    monkeypatch.setattr(sys, "argv", ["vosops", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    return exit.value.code or 0, captured.out + captured.err


def error_line(printed):
    """The error, which must be one line and no traceback."""
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("vosops: ")]
    assert len(lines) == 1
    return lines[0]


def stop_after(patch, frames):
    """Makes the command ask to stop after so many frames, as Ctrl-C does."""

    class Stopping:
        def __init__(self, note, unit="frame"):
            self.asked = 0

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        @property
        def requested(self):
            self.asked += 1
            return self.asked == frames

    patch.setattr("vosops.cli.segment.StopSignals", Stopping)
