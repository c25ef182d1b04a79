"""Class maps, with timm's meaning: a text file that numbers the classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ebm_guard.data.sources.base import Labels
from ebm_guard.errors import DataError, suggest
from ebm_guard.files import expanded

_NUMBERED = re.compile(r"(?P<name>\S.*?)\s+(?P<number>[0-9]{1,9})")


def mapped_labels(
    file: str, classes: Sequence[str], root: Path | None = None
) -> tuple[Labels, tuple[str, ...] | None, str]:
    """Number classes by a class map.

    The file holds one class name a line, and the line's number from 0 is the label (timm's
    ``--class-map``); or ``name number`` lines, where two names may have one number. The file is
    looked for as given, then in the data's folder, as timm does. timm drops the images of folders
    that the map does not name; here they are an error, because the figures would be of fewer images
    than one thinks.

    Args:
        file: the text file.
        classes: names of the data's classes.
        root: the data's folder.

    Returns:
        The number of each class, the names in the order of the numbers (None where the numbers have
        gaps or a number has several names), and a sentence on what was done.

    Raises:
        DataError: the file is missing, unreadable or names a class twice, or does not name a class
            of the data.
    """
    path = expanded(file)
    if not path.is_file() and root is not None:
        path = root / path
    lines = _lines(path, file)
    table = _table(path, [(line, number) for number, line in enumerate(lines) if line])
    if not set(classes) <= set(table):
        numbered = [_NUMBERED.fullmatch(line) for line in lines if line]
        pairs = [(match["name"], int(match["number"])) for match in numbered if match is not None]
        if pairs and len(pairs) == len(numbered):
            table = _table(path, pairs)
    unknown = [name for name in classes if name not in table]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"class map {path.name} does not name {shown} ({len(unknown)} of {len(classes)} "
            f"classes of the data){suggest(unknown[0], table)}; add a line for each, or "
            "move the folders away"
        )
    names: dict[int, str] = {number: name for name, number in table.items()}
    complete = len(names) == len(table) == max(names) + 1
    ordered = tuple(names[number] for number in range(len(names))) if complete else None
    numbers = np.array([table[name] for name in classes], dtype=np.int64)
    return numbers, ordered, f"the class map {path.name} numbered {len(classes)} classes"


def _lines(path: Path, file: str) -> list[str]:
    if path.suffix.lower() == ".pkl":
        raise DataError(
            f"got class map {file}; a pickle is not read, needed a text file with one class name a "
            "line"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        near = ""
        if path.parent.is_dir():
            near = suggest(path.name, (item.name for item in path.parent.iterdir()))
        raise DataError(f"cannot read class map {file}: {error}{near}") from None
    lines = [line.strip() for line in text.split("\n")]
    if not any(lines):
        raise DataError(f"got class map {file}, which is empty; needed one class name a line")
    return lines


def _table(path: Path, pairs: list[tuple[str, int]]) -> dict[str, int]:
    table: dict[str, int] = {}
    for name, number in pairs:
        if table.setdefault(name, number) != number:
            raise DataError(f"class map {path.name} names {name!r} twice; each class once")
    return table
