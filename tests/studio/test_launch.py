"""Beginning to serve: one server for a work folder, and nothing left behind where it cannot begin."""

import pytest

from vosops.io.errors import FolderInUseError, InputError, VosopsError
from vosops.runs.job import Settings
from vosops.studio.follow import Engine
from vosops.studio.launch import _only_one, serve

pytest.importorskip("uvicorn", reason="vosops[studio] is not installed")


def test_a_second_server_on_a_work_folder_is_refused(tmp_path):
    work = tmp_path / "work"
    with _only_one(work):
        with pytest.raises(FolderInUseError, match="another vosops studio uses .*work: open its page"):
            serve(work, Engine(Settings(device="cpu")))
        (work / "something").write_text("kept")
    with _only_one(work):
        assert (work / "something").read_text() == "kept"


def test_a_video_that_cannot_be_used_leaves_no_work_folder(tmp_path):
    letter = tmp_path / "letter.mp4"
    letter.write_text("dear reader")
    with pytest.raises(InputError, match=r"letter\.mp4"):
        serve(tmp_path / "work", Engine(Settings(device="cpu")), video=letter)
    assert not (tmp_path / "work").exists()


def test_a_work_folder_that_is_a_file_is_said(tmp_path):
    (tmp_path / "work").write_text("a file")
    with pytest.raises(VosopsError, match="choose another --work"):
        serve(tmp_path / "work", Engine(Settings(device="cpu")))
