"""`vosops studio`: what it prints, and what it refuses before it listens."""

import re
import socket
import sys

import pytest

from tests import clips
from tests.cli.commands import error_line, run_command

pytest.importorskip("uvicorn", reason="vosops[studio] is not installed")
INTERRUPTED = 130


@pytest.fixture
def folder(tmp_path):
    return clips.write_folder(tmp_path / "clip", [clips.picture(boxes) for boxes in clips.moving(3)])


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command with a server that ends as soon as it listens."""
    import uvicorn

    def once(self, sockets=None):
        import asyncio

        async def begin():
            self.should_exit = True
            await self.serve(sockets=sockets)

        asyncio.run(begin())

    monkeypatch.setattr(uvicorn.Server, "run", once)
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url))
    monkeypatch.setattr("vosops.studio.launch.leave", sys.exit)  # which would end the tests
    opened = []
    work = tmp_path / "work"

    def command(*arguments):
        code, printed = run_command(monkeypatch, capsys, "studio", "--work", work, *arguments)
        return code, printed, opened

    return command


def test_one_line_with_the_address_and_its_token(run, folder):
    code, printed, opened = run(folder, "--no-browser")
    assert code == INTERRUPTED
    line, end = printed.splitlines()
    assert end == "vosops: stopped"
    assert re.fullmatch(r"vosops studio: http://127\.0\.0\.1:\d+/\?token=[\w-]{32}#clip-[0-9a-f]{8}", line)
    assert not opened


def test_each_start_has_a_token_of_its_own(run, folder):
    tokens = {run(folder, "--no-browser")[1].partition("token=")[2] for _ in range(2)}
    assert len(tokens) == 2


def test_the_browser_is_opened(run, folder):
    _, printed, opened = run(folder)
    assert opened == [printed.splitlines()[0].removeprefix("vosops studio: ")]


def test_without_a_video_the_page_asks(run, tmp_path):
    code, printed, _ = run("--no-browser")
    assert code == INTERRUPTED
    assert "#" not in printed
    assert not (tmp_path / "work").exists()


def test_a_path_that_does_not_exist_is_one_line(run, tmp_path):
    code, printed, _ = run(tmp_path / "none.mp4")
    assert code == 2
    assert "does not exist" in error_line(printed)


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "websockets"])
def test_a_package_that_is_not_installed_is_one_line(run, folder, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, printed, _ = run(folder)
    assert code == 1
    assert "pip install 'vosops[studio]'" in error_line(printed)
    assert not (tmp_path / "work").exists()


def test_a_port_that_is_taken_is_one_line(run, folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, printed, _ = run(folder, "--port", other.getsockname()[1])
    assert code == 1
    assert "cannot be used" in error_line(printed)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--click-weights", "a.pth"), "--click-weights requires --click"),
        (("--click", "unet", "--sam2", "folder"), "mutually exclusive"),
        (("--size", "7"), "--size"),
        (("--model", "none"), "--model none is unknown"),
        (("--model", "stm"), "needs --weights"),
    ],
)
def test_settings_that_cannot_be_are_said_at_once(run, folder, options, what):
    code, printed, _ = run(folder, *options)
    assert code == 2
    assert what in error_line(printed)
