"""Which files are pictures, in which order, and how lists of names are read."""

import os
import random

import pytest

from vosops.io.errors import InputError
from vosops.io.listing import (
    chosen_names,
    few,
    label_maps,
    natural_key,
    natural_order,
    pictures,
    read_names,
    shown,
    subfolders,
)


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


class TestPictures:
    def test_only_pictures_are_listed(self, tmp_path):
        folder = touch(
            tmp_path / "f", "b.PNG", "a.Jpg", "._a.jpg", ".DS_Store", ".png", "Thumbs.db", "x.txt", "png"
        )
        touch(folder, "contact_sheet.png", "c.jpeg", "d.tiff")
        for name in (".ipynb_checkpoints", "folder.png"):
            touch(folder / name, "0.png")
        assert [path.name for path in pictures(folder).values()] == ["a.Jpg", "b.PNG", "c.jpeg", "d.tiff"]
        assert label_maps(folder) == {"b": folder / "b.PNG"}

    def test_a_link_to_a_picture_is_one(self, tmp_path):
        folder = touch(tmp_path / "f", "0.png")
        (folder / "1.png").symlink_to(folder / "0.png")
        assert list(pictures(folder)) == ["0", "1"]

    def test_a_link_to_nothing_is_named(self, tmp_path):
        folder = touch(tmp_path / "f", "0.png")
        (folder / "1.png").symlink_to("/nowhere.png")
        with pytest.raises(
            InputError, match=r"1\.png is a link to /nowhere\.png, which cannot be opened: fix"
        ):
            pictures(folder)

    def test_a_link_to_itself_is_named(self, tmp_path):
        folder = touch(tmp_path / "f")
        (folder / "1.png").symlink_to(folder / "1.png")
        with pytest.raises(InputError, match="1.png is a link"):
            pictures(folder)

    def test_links_to_nothing_that_are_not_named_like_pictures_do_not_matter(self, tmp_path):
        folder = touch(tmp_path / "f", "0.png")
        (folder / "._1.png").symlink_to("/nowhere")
        (folder / "notes.txt").symlink_to("/nowhere")
        assert list(pictures(folder)) == ["0"]

    def test_what_would_block_when_opened_is_named(self, tmp_path):
        os.mkfifo(touch(tmp_path / "f") / "0.png")
        with pytest.raises(InputError, match="0.png is not a regular file"):
            pictures(tmp_path / "f")

    def test_two_pictures_of_one_name(self, tmp_path):
        folder = touch(tmp_path / "f", "0.png", "0.PNG")
        with pytest.raises(InputError, match=r"two pictures named 0, 0\.PNG and 0\.png: keep one"):
            label_maps(folder)

    def test_a_folder_that_is_none(self, tmp_path):
        for folder in (tmp_path / "absent", touch(tmp_path, "file") / "file"):
            with pytest.raises(InputError, match="cannot be listed"):
                pictures(folder)
            with pytest.raises(InputError, match="cannot be listed"):
                subfolders(folder)

    def test_names_that_are_not_utf8(self, tmp_path):
        name = os.fsdecode(b"caf\xe9_1.png")
        folder = touch(tmp_path / "f", name)
        assert [path.name for path in pictures(folder).values()] == [name]
        assert shown(name) == r"caf\xe9_1.png"
        assert shown("a\nb\x1b[31m é") == r"a\nb\x1b[31m é"


class TestOrder:
    @pytest.mark.parametrize(
        "names",
        [
            ["F1", "f9", "f10"],
            ["1", "2", "10", "a", "a1", "b"],
            ["2", "x²", "x³"],  # digits that are no numbers
            ["a", "a 2", "a 10", "a 10 b"],
            ["frame-1", "frame-2", "frame-10"],  # a separator, no sign
            ["-10", "-2", "0", "3"],
            ["t_-2", "t_-1", "t_4"],
            ["0.0", "0.25", "0.5", "1.0", "10.0"],
            ["t=0.125", "t=0.5", "t=2"],
            ["1305031102.160407", "1305031102.175304", "1305031103.000001"],
            ["0.10", "0.20", "1.00"],
            ["1.1", "1.2", "1.10"],
            ["1.2.9", "1.2.10"],
            ["a1.5", "b1.25"],
        ],
    )
    def test_as_a_person_counts(self, names):
        shuffled = names[:]
        for seed in range(5):
            random.Random(seed).shuffle(shuffled)
            assert natural_order(shuffled) == names

    def test_no_two_names_are_equal(self):
        for names in (["01", "1"], ["A", "a"], ["1.0", "1.00"]):
            assert natural_order(names) == natural_order(names[::-1])
            assert natural_key(names[0]) != natural_key(names[1])


def test_folders_of_sequences(tmp_path):
    for name in ("b10", "b9", ".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        (tmp_path / name).mkdir()
    touch(tmp_path, "file")
    (tmp_path / "linked").symlink_to(tmp_path / "b9")
    (tmp_path / "readme.md").symlink_to("/nowhere")
    assert [folder.name for folder in subfolders(tmp_path)] == ["b9", "b10", "linked"]
    (tmp_path / "lost").symlink_to("/nowhere")
    assert subfolders(tmp_path)[-1].name == "lost", "whoever opens it says what is wrong"


class TestLists:
    @pytest.mark.parametrize(
        "content",
        [
            b"a\nmy clip\n",
            b"\xef\xbb\xbfa\r\nmy clip\r\n",
            b"a\rmy clip",
            b"\n  a \n\n# a comment\nmy clip\t\na\n",
            "a\r\nmy clip\n".encode("utf-16"),
            b"\xfe\xff" + "a\nmy clip\n".encode("utf-16-be"),
            "a\nmy clip\n".encode("utf-32"),
        ],
    )
    def test_a_line_is_a_name(self, tmp_path, content):
        (tmp_path / "l.txt").write_bytes(content)
        assert read_names(tmp_path / "l.txt") == ["a", "my clip"]

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"", "contains no names"),
            (b"\xef\xbb\xbf\n # none\n", "contains no names"),
            ("a\n".encode("utf-16-le"), "is not a text file"),
            (b"\xff\xfea", "is not a text file"),
            (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not a text file"),
        ],
    )
    def test_what_is_no_list(self, tmp_path, content, message):
        (tmp_path / "l.txt").write_bytes(content)
        with pytest.raises(InputError, match=rf"--sequence .*l\.txt {message}"):
            read_names(tmp_path / "l.txt")

    def test_paths_that_are_no_file(self, tmp_path):
        with pytest.raises(InputError, match=r"--names .*absent\.txt: no such file of names"):
            read_names(tmp_path / "absent.txt", option_name="--names")
        with pytest.raises(InputError, match="is not a file"):
            read_names(tmp_path)

    def test_the_lists_of_davis_2016(self, tmp_path):
        lines = [
            f"/JPEGImages/480p/{s}/{t:05d}.jpg /Annotations/480p/{s}/{t:05d}.png"
            for s in "ab"
            for t in (0, 1)
        ]
        (tmp_path / "l.txt").write_text("\n".join(lines))
        assert read_names(tmp_path / "l.txt") == ["a", "b"]

    def test_known_names_are_names_whatever_they_look_like(self, tmp_path):
        known = ["#1", " x", "café", os.fsdecode(b"caf\xe9")]
        (tmp_path / "l.txt").write_bytes(b"#1\n x\n#2\ncafe\xcc\x81\ncaf\xe9\n")
        assert chosen_names([str(tmp_path / "l.txt")], known) == known

    def test_a_name_of_the_data_set_wins_over_a_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(touch(tmp_path, "cow"))
        (tmp_path / "val").write_text("dog\n")
        (tmp_path / "bear.txt").write_text("dog\n")
        known = ["cow", "dog", "a,b", "bear.txt"]
        assert chosen_names(["cow"], known) == ["cow"]
        assert chosen_names(["a,b", "bear.txt"], known) == ["a,b", "bear.txt"]
        assert chosen_names(["val"], known) == ["dog"]
        assert chosen_names(["./bear.txt"], known) == ["dog"]
        assert chosen_names(["dog, cow,dog"], known) == ["dog", "cow"]
        assert chosen_names(["horse"], known) == ["horse"], "the caller says that it is unknown"

    def test_many_names_in_one_option(self):
        assert len(chosen_names([",".join(f"sequence{i}" for i in range(200))], [])) == 200

    @pytest.mark.parametrize("option", ["", ",", " "])
    def test_nothing_is_refused(self, option):
        with pytest.raises(InputError, match="contains no names"):
            chosen_names([option], ["a"])


def test_few_names():
    assert few(["a", "b"]) == "a, b"
    assert few([str(i) for i in range(8)]) == "0, 1, 2, 3, 4 and 3 more"
