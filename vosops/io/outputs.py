"""Files that are complete or absent, and folders that remember which of their files are ours.

Everything that vosops writes goes through here. A file is written under a temporary name in its own folder and
moved into place, so that it is complete or absent whenever the process dies. An :class:`OwnedFolder` notes the name,
size and SHA-256 of each file *before* it is moved into place; only a file that still has a noted content is ever
replaced or deleted. What a user put there, or saved over one of our files, is not touched.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from .errors import FolderInUseError, InputError, disk_errors

STATE_FOLDER = ".vosops"
PART_PREFIX = ".vosops-part-"
_LEDGER = "files.jsonl"
_HASH_CHUNK = 1 << 20
_LISTED = 3


def sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class OwnedFile:
    """A file of an :class:`OwnedFolder`, to be given to a writer in place of a path."""

    folder: OwnedFolder
    name: str
    """Relative to the folder, with slashes."""

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder.root / self.name

    def exists(self) -> bool:
        """Return whether it exists, or anything else in its place."""
        return os.path.lexists(self.path)


@contextmanager
def complete_or_absent(
    target: Path | OwnedFile, *, sync: bool = False, advice: str = "run the same command again"
) -> Iterator[BinaryIO]:
    """Yield a file to write; it becomes ``target`` at the end, or nothing is left of it after any error.

    It can be read and sought too. It is ``.vosops-part-<hash>`` in the folder of ``target`` until it is whole; one
    that a killed process left is taken over by the next one that writes the same file.

    Args:
        target: A path, whose file is replaced whatever it is; or a file of an :class:`OwnedFolder`, which is
            replaced only where the folder owns it.
        sync: Return only when the file is safely on the disk, for what must survive a power failure.
        advice: What a user does when the trouble is over.

    Raises:
        VosopsError: One line for a full disk, a missing permission and the like.
        InputError: What is in the place of ``target`` belongs to somebody else.
    """
    owned = target if isinstance(target, OwnedFile) else None
    path = target.path if isinstance(target, OwnedFile) else target
    advice = owned.folder.advice if owned else advice
    part = _part(path)
    with disk_errors(str(path), advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _create(part)
        try:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            file.close()
            if owned:
                owned.folder.note(owned.name, part)
                owned.folder.check_free([owned.name])
            os.replace(part, path)
            if sync:
                sync_folder(path.parent)
        except BaseException as error:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                part.unlink()
            # A library that writes through the file may raise an error of its own for ours.
            if file.error is not None and isinstance(error, Exception) and not isinstance(error, OSError):
                raise file.error from error
            raise


def write_text(
    target: Path | OwnedFile, text: str, *, sync: bool = False, advice: str = "run the same command again"
) -> None:
    """Write a text file in UTF-8 that is complete or absent."""
    with complete_or_absent(target, sync=sync, advice=advice) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def text_of(file: BinaryIO) -> Iterator[IO[str]]:
    """Yield a text file in UTF-8 that writes into a binary one, which stays open."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="\n", write_through=False)
    try:
        yield text
        text.flush()
    finally:
        with suppress(OSError, ValueError):
            text.detach()


def replace_result(path: Path, content: bytes, is_ours: Callable[[bytes], bool]) -> None:
    """Write a file of results that a user named: a new one, or in place of one that is ours by its content.

    A link is followed; what is no regular file, such as a pipe or a terminal, is written to as it is.

    Raises:
        InputError: There is another file of that name.
        VosopsError: It cannot be written.
    """
    with disk_errors(str(path)):
        if not _is_stream(path):
            check_result(path, is_ours)
            with complete_or_absent(Path(os.path.realpath(path))) as file:
                file.write(content)
            return
        with path.open("wb") as stream:
            stream.write(content)


def check_result(path: Path, is_ours: Callable[[bytes], bool]) -> None:
    """Raise an ``InputError`` where :func:`replace_result` would; for before the work."""
    if _is_stream(path):
        return
    if path.is_symlink() and not path.exists():
        target = Path(os.path.realpath(path))
        if target.is_symlink() or not target.parent.is_dir():
            raise InputError(f"{path} is a broken link: give another name, or remove it")
    if not path.is_file():
        return
    if path.stat().st_size and not is_ours(path.read_bytes()):
        raise InputError(
            f"{path} already exists and was not written by this command: give another name, or remove it"
        )


def is_json_with(content: bytes, keys: set[str]) -> bool:
    """Return whether this is a JSON object that has these keys, by which files of results are known."""
    try:
        found = json.loads(content)
    except ValueError:
        return False
    return isinstance(found, dict) and keys <= set(found)


def _is_stream(path: Path) -> bool:
    """Return whether a path is no regular file but there, or stands for an open file of this process."""
    opened = str(path.absolute()).startswith(("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/"))
    return opened or (path.exists() and not path.is_file())


def sync_file(path: Path) -> None:
    """Return when a file's content is on the disk; an absent one is none."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Return when a folder's names are on the disk, where the system can say so."""
    if os.name == "posix":
        with suppress(OSError):
            sync_file(folder)


class OwnedFolder:
    """An output folder that knows the files that runs of ours wrote into it.

    What it knows is in ``.vosops/files.jsonl``: a line for each file, written before the file gets its name. A process
    that dies between the two leaves a line too many, which does no harm.

    Args:
        root: The folder; it need not exist.
        advice: What a user does when a trouble with the disk is over.
    """

    def __init__(self, root: Path, advice: str = "run the same command again") -> None:
        self.root = root
        self.state = root / STATE_FOLDER
        self.advice = advice
        self._ledger = self.state / _LEDGER
        self._known: dict[str, set[tuple[int, str]]] | None = None

    def file(self, name: str) -> OwnedFile:
        """Return the file of a name, which may have slashes."""
        return OwnedFile(self, name)

    @property
    def has_ledger(self) -> bool:
        """Whether it is known here what is ours."""
        return self._ledger.exists()

    def names(self) -> list[str]:
        """Return the names of all files that were ever written here."""
        return list(self._files())

    def owns(self, name: str) -> bool:
        """Return whether a file has a content that was noted under its name; reads it where its size agrees."""
        path, known = self.root / name, self._files().get(name)
        if not known or path.is_symlink() or not path.is_file():
            return False
        size = path.stat().st_size
        if all(size != noted for noted, _ in known):
            return False
        return (size, sha256(path)) in known

    def strangers(self, names: Iterable[str]) -> list[str]:
        """Return which of these are there and not ours."""
        return [name for name in names if os.path.lexists(self.root / name) and not self.owns(name)]

    def check_free(self, names: Iterable[str]) -> None:
        """Raise an ``InputError`` where writing these files would destroy somebody else's."""
        found = self.strangers(names)
        if found:
            self._known = None  # another process may have written them
            found = self.strangers(found)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            changed = found[0] in self._files()
            what = "was changed after a run wrote it" if changed else "was not written by a run"
            raise InputError(
                f"{self.root / found[0]} {what} and would be replaced{more}: "
                "move it elsewhere, or choose another --out"
            )

    def note(self, name: str, content: Path) -> None:
        """Note that a file of this name and content is ours."""
        entry = (content.stat().st_size, sha256(content))
        if entry in self._files().get(name, ()):
            return
        self.state.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"name": name, "size": entry[0], "sha256": entry[1]})
        append_line(self._ledger, line)
        self._files().setdefault(name, set()).add(entry)

    def remove(self, names: Iterable[str]) -> None:
        """Delete those of these files that are ours, and folders within that this leaves empty."""
        with disk_errors(str(self.root), self.advice):
            folders = set()
            for name in names:
                if self.owns(name):
                    (self.root / name).unlink()
                    folders.add((self.root / name).parent)
            for folder in folders - {self.root}:
                with suppress(OSError):  # somebody else's file is in it
                    folder.rmdir()

    def forget(self) -> None:
        """Drop the notes on files that are not ours any more."""
        with disk_errors(str(self._ledger), self.advice):
            lines = [
                json.dumps({"name": name, "size": size, "sha256": digest}) + "\n"
                for name, entries in self._files().items()
                if self.owns(name)
                for size, digest in entries
            ]
        write_text(self._ledger, "".join(lines), advice=self.advice)
        self._known = None

    def drop_ledger(self) -> None:
        """Forget everything."""
        self._ledger.unlink(missing_ok=True)
        self._known = None

    def remove_parts(self, folders: Iterable[str] = ("", STATE_FOLDER)) -> None:
        """Delete the temporary files that a killed process left in these folders within."""
        with disk_errors(str(self.root), self.advice):
            for folder in folders:
                if (self.root / folder).is_dir():
                    for part in list((self.root / folder).glob(f"{PART_PREFIX}*")):
                        part.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, which must exist; the lock ends with the process, however it ends.

        Raises:
            FolderInUseError: Another run is writing here.
        """
        try:
            import fcntl
        except ImportError:  # Windows cannot lock a folder
            yield
            return
        with disk_errors(str(self.root), self.advice):
            descriptor = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderInUseError(
                    f"another run is writing into {self.root}: wait for it, or choose another --out"
                ) from None
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(descriptor)

    def _files(self) -> dict[str, set[tuple[int, str]]]:
        if self._known is None:
            self._known = {}
            for line in read_lines(self._ledger):
                with suppress(KeyError, TypeError):
                    if _is_inside(line["name"]):
                        self._known.setdefault(line["name"], set()).add((line["size"], line["sha256"]))
        return self._known


def _is_inside(name: str) -> bool:
    """Whether a relative name leads to no other folder: a list of files may come from anywhere."""
    return not os.path.isabs(name) and os.pardir not in Path(name).parts


def append_line(path: Path, line: str) -> None:
    """Add a line to a file in one write; nothing of it is left where the disk is full.

    A line that a killed process left half written stays by itself, for :func:`read_lines` to pass over.
    """
    with _Raw(path, "ab+") as file:
        before = file.seek(0, os.SEEK_END)
        data = line.encode("utf-8") + b"\n"
        if before:
            file.seek(before - 1)
            data = data if file.read(1) == b"\n" else b"\n" + data
        try:
            written = file.write(data)
            while written < len(data):
                written += file.write(data[written:])
        except BaseException:
            with suppress(OSError):
                file.truncate(before)
            raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file of lines, without those that are not whole; none where there is no such file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


class _Raw(io.FileIO):
    """A file that remembers the error of a failed write."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


class _File(io.BufferedRandom):
    """A buffered file on a :class:`_Raw`."""

    @property
    def error(self) -> OSError | None:
        """The first error of a write."""
        return self.raw.error if isinstance(self.raw, _Raw) else None


def _part(path: Path) -> Path:
    """Return the temporary name of a file: short, so that it fits where the file's own does."""
    return path.with_name(PART_PREFIX + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16])


def _create(part: Path) -> _File:
    """Open a temporary file, in place of one that a killed process left; never through a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)

    def opener(name: str, _: int) -> int:
        return os.open(name, flags, 0o666)

    if os.path.lexists(part):
        part.unlink()
    return _File(_Raw(part, "w+", opener=opener))


def nearest_folder(path: Path) -> Path:
    """Return the deepest part of a path that exists; raise an ``InputError`` where that is no folder."""
    for ancestor in (path, *path.absolute().parents):
        if os.path.lexists(ancestor):
            if not os.path.isdir(ancestor):
                what = "is a file" if os.path.exists(ancestor) else "is a broken link"
                raise InputError(f"--out {path}: {ancestor} {what}, give a folder")
            return ancestor
    return path


__all__ = [
    "PART_PREFIX",
    "STATE_FOLDER",
    "OwnedFile",
    "OwnedFolder",
    "append_line",
    "check_result",
    "complete_or_absent",
    "is_json_with",
    "nearest_folder",
    "read_lines",
    "replace_result",
    "sha256",
    "sync_file",
    "sync_folder",
    "text_of",
    "write_text",
]
