"""Keeping outputs away from inputs: what is read must not lie where something is written.

Folders are compared by device and inode, so that links, bind mounts, ``..`` and names that differ in case alone
are seen through.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .errors import InputError

Id = tuple[int, int]


def protect_inputs(inputs: Iterable[Path], folders: Sequence[Path]) -> None:
    """Raise an ``InputError`` if an input is in a folder that is written to.

    Args:
        inputs: Files that are read, and folders of such files.
        folders: The output folder, then the folders within that files are written to. An input may lie nowhere
            below any of them; nor may it be, by a hard link, one of the files in them.
    """
    written = {found: folder for folder in reversed(folders) if (found := _id(folder)) is not None}
    if not written:
        return
    linked = {found for folder in written.values() for found in _linked_files(folder)}
    seen: set[str] = set()

    def check(path: Path) -> None:
        for place in _folders_of(path):
            if place in seen:
                return
            hit = written.get(_id(place) or (-1, -1))
            if hit is not None:
                raise InputError(
                    f"{path} is an input and could be overwritten in {hit}, which is written to: choose another --out"
                )
            seen.add(place)

    for path in inputs:
        check(path)
        for link in _links(path):
            check(Path(os.path.realpath(link)))
        if linked:
            for file in (path, *_entries(path)):
                if _id(file) in linked:
                    raise InputError(
                        f"{file} is an input at risk: a file in {folders[0]}, which is written to, is a "
                        "hard link to it; choose another --out"
                    )


def _folders_of(path: Path) -> Iterator[str]:
    """Yield the folders that contain a path, from the path itself, if it is one, up to the root."""
    place = (
        os.path.realpath(path)
        if os.path.isdir(path)
        else os.path.realpath(os.path.dirname(os.path.abspath(path)))
    )
    while True:
        yield place
        above = os.path.dirname(place)
        if above == place:
            return
        place = above


def _links(path: Path) -> list[str]:
    """Return which of a path and its direct entries are links."""
    found = [str(path)] if os.path.islink(path) else []
    try:
        with os.scandir(path) as entries:
            return found + [entry.path for entry in entries if entry.is_symlink()]
    except OSError:
        return found


def _entries(path: Path) -> list[Path]:
    """Return the direct entries of a folder; none for a file."""
    try:
        with os.scandir(path) as entries:
            return [Path(entry.path) for entry in entries]
    except OSError:
        return []


def _linked_files(folder: Path) -> Iterator[Id]:
    """Yield the files of a folder that have other names too."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    status = os.stat(entry.path, follow_symlinks=False)
                    if status.st_nlink > 1:
                        yield status.st_dev, status.st_ino
    except OSError:
        return


def _id(path: str | Path) -> Id | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
