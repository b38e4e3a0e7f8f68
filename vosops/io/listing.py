"""Which files of a folder are pictures, which folders hold sequences, and lists of names.

The one answer for the whole package. Hidden files (``._00003.png``, ``.DS_Store``), folders of tools
(``.ipynb_checkpoints``, ``__MACOSX``), sub-folders, files of other kinds (``Thumbs.db``) and the contact sheets that
vosops writes are not pictures. The case of a suffix does not matter, and order is natural: ``frame2`` comes before
``frame10``.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from .errors import InputError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".apng", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif")
    + (".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm")
)
"""Suffixes of frames, in lower case."""

LABEL_SUFFIXES = frozenset({".png"})
"""Suffixes of label maps, in lower case."""

CONTACT_SHEET = "contact_sheet.png"
"""The overview that a run writes beside its masks; never a frame or a mask."""

LIST_SUFFIX = ".txt"
NAMES_SHOWN = 5
"""How many names an error gives before it only counts them."""

_TOOL_FOLDERS = frozenset({"__MACOSX", "__pycache__", "@eaDir"})
_LONGEST_LIST = 1 << 24  # bytes; whoever gives a video for a list shall not wait
_COMMENT = "#"
_NUMBERED = re.compile(
    r"(\D*?)((?:(?<![^\W_])-)?\d+(?:\.\d+)?)"
)  # "-" after a letter or digit is a separator
_DAVIS_2016_LINE = re.compile(r"/?JPEGImages/[^/\s]+/([^/]+)/\S+(\s+/?Annotations/.*)?")
_BOMS = (  # that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def natural_key(name: str) -> tuple[Any, ...]:
    """Return a sort key that counts: frame2 comes before frame10, and no two names are equal."""
    parts = re.split(r"(\d+)", name)
    return tuple(int(part) if place % 2 else part.casefold() for place, part in enumerate(parts)), name


def natural_order(stems: Iterable[str]) -> list[str]:
    """Return the stems in the order in which a person counts them.

    Where all stems are one prefix and a number, and a number has a sign or a fraction, their values decide: -2, -1,
    0, 0.25, 0.5. Unless a fraction of several lengths ends in 0, which no value is written with: 1.1, 1.2, 1.10 are
    parts of a number each.
    """
    found = list(stems)
    values = _values(found)
    return sorted(found, key=natural_key if values is None else lambda stem: (values[stem], stem))


def _values(stems: Sequence[str]) -> dict[str, Decimal] | None:
    """Return the number in each stem where they shall be compared by it, else None."""
    matches = [_NUMBERED.fullmatch(stem) for stem in stems]
    numbers = [match[2] for match in matches if match is not None]
    if len(numbers) < len(stems) or len({match[1] for match in matches if match is not None}) != 1:
        return None
    fractions = [number.partition(".")[2] for number in numbers]
    if not any(fractions) and not any(number.startswith("-") for number in numbers):
        return None
    padded = any(len(fraction) > 1 and fraction.endswith("0") for fraction in fractions)
    if padded and len({len(fraction) for fraction in fractions}) > 1:
        return None
    return {stem: Decimal(number) for stem, number in zip(stems, numbers, strict=True)}


def pictures(folder: Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Return the picture files in a folder by their stems, in natural order.

    Raises:
        InputError: The folder cannot be listed, two pictures differ in nothing but the suffix, or an entry that is
            named like a picture is a broken link or a device.
    """
    found: dict[str, Path] = {}
    for path, mode in _entries(folder):
        if path.suffix.lower() not in suffixes or path.name == CONTACT_SHEET or stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            what = (
                f"a link to {shown(os.readlink(path))}, which cannot be opened"
                if not mode
                else "not a regular file"
            )
            raise InputError(f"{shown(path)} is {what}: fix or remove it")
        if path.stem in found:
            raise InputError(
                f"{shown(folder)} has two pictures named {shown(path.stem)}, {shown(found[path.stem].name)} and "
                f"{shown(path.name)}: keep one"
            )
        found[path.stem] = path
    return {stem: found[stem] for stem in natural_order(found)}


def label_maps(folder: Path) -> dict[str, Path]:
    """Return the PNG label maps in a folder by their stems, in natural order; see :func:`pictures`."""
    return pictures(folder, LABEL_SUFFIXES)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, in natural order; InputError if it cannot be listed.

    Links to folders are folders, and one to nothing too, so that opening it says what is wrong.
    """
    found = [
        path
        for path, mode in _entries(folder)
        if path.name not in _TOOL_FOLDERS and (stat.S_ISDIR(mode) or not (mode or path.suffix))
    ]
    return sorted(found, key=lambda path: natural_key(path.name))


def _entries(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the entries of a folder that are not hidden, each with the mode of its target (0 for a broken link)."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"{shown(folder)} cannot be listed: {error.strerror or error}") from error
    for name in names:
        path = folder / name
        try:
            yield path, path.stat().st_mode
        except OSError as error:
            if path.is_symlink():
                yield path, 0
            elif not isinstance(error, FileNotFoundError):  # which was deleted since
                raise InputError(f"{shown(path)} cannot be opened: {error.strerror or error}") from error


def chosen_names(
    options: Sequence[str], known: Collection[str], option_name: str = "--sequence"
) -> list[str]:
    """Return the names that options stand for, each once: of ``known``, or to be refused as unknown.

    An option that is a known name is that name, whatever file is called so too. Else one with a separator or of
    suffix ``.txt`` is the path of a list (:func:`read_names`), and so is any other file; the rest are names
    separated by commas.

    Raises:
        InputError: An option is empty, or a list cannot be read or names nothing.
    """
    found: list[str] = []
    for option in options:
        path = Path(option)
        if option in known:
            found.append(option)
        elif _has_separator(option) or path.suffix.lower() == LIST_SUFFIX or os.path.isfile(path):
            found += read_names(path, known, option_name)
        else:
            parts = [part.strip() for part in option.split(",") if part.strip()]
            if not parts:
                raise InputError(
                    f"{option_name} {option!r} contains no names: give a name or a text file of names"
                )
            found += parts
    return list(dict.fromkeys(_match(name, known) for name in found))


def read_names(path: Path, known: Collection[str] = (), option_name: str = "--sequence") -> list[str]:
    """Read a list of names, a line each.

    Spaces within a line belong to the name. Blank lines and lines that begin with ``#`` are left out, unless
    ``known`` has a name like that. A line of DAVIS-2016's own lists (the paths of a frame and its mask) stands for
    its sequence. The text is UTF-8, or UTF-16 or UTF-32 with a byte order mark; lines end as on any system.

    Raises:
        InputError: The file cannot be read, is no text or names nothing.
    """
    shown_as = f"{option_name} {shown(path)}"
    if not os.path.exists(path):
        raise InputError(f"{shown_as}: no such file of names")
    if not os.path.isfile(path):
        raise InputError(f"{shown_as} is not a file: give a text file with a name on each line")
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_LIST + 1)
    except OSError as error:
        raise InputError(f"{shown_as} cannot be read: {error.strerror or error}") from error
    text = _decode(content)
    if text is None:
        raise InputError(f"{shown_as} is not a text file: give one with a name on each line, in UTF-8")
    names = []
    for line in re.split(r"\r\n|\r|\n", text):
        name = line.strip()
        davis = _DAVIS_2016_LINE.fullmatch(name)
        if line in known:
            names.append(line)
        elif davis:
            names.append(davis[1])
        elif name and (name in known or not name.startswith(_COMMENT)):
            names.append(name)
    if not names:
        raise InputError(f"{shown_as} contains no names: write one name per line")
    return list(dict.fromkeys(names))


def _decode(content: bytes) -> str | None:
    """Return the text of a list, None if it is not one; bytes that are not UTF-8 stay, as in file names."""
    if len(content) > _LONGEST_LIST:
        return None
    mark, encoding = next((bom for bom in _BOMS if content.startswith(bom[0])), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _match(name: str, known: Collection[str]) -> str:
    """Return the known name equal to this one, however its accents are composed; else the name itself."""
    if name in known or name.isascii():
        return name
    form = unicodedata.normalize("NFC", name)
    return next((other for other in known if unicodedata.normalize("NFC", other) == form), name)


def _has_separator(option: str) -> bool:
    return os.sep in option or (os.altsep is not None and os.altsep in option)


def shown(name: str | os.PathLike[str]) -> str:
    """Return a name that can be printed: bytes that are not UTF-8 and control characters become escapes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def few(names: Sequence[str]) -> str:
    """Return names separated by commas, at most `NAMES_SHOWN` of them, then how many more there are."""
    listed = ", ".join(shown(name) for name in names[:NAMES_SHOWN])
    return listed if len(names) <= NAMES_SHOWN else f"{listed} and {len(names) - NAMES_SHOWN} more"
