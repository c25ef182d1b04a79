"""What happened, line by line: kept, written as JSON lines, and shown as it happens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ebm_guard.errors import DataError
from ebm_guard.files import cannot_write, replace_file

HISTORY_FILE = "history.jsonl"
Line = dict[str, Any]


class History:
    """Lines of the kinds ``update``, ``evaluation`` and ``event``.

    Args:
        folder: where ``history.jsonl`` is written as it goes; None writes nothing.
        on_event: called with each line.
        lines: of an interrupted run that goes on.

    Example:
        >>> history = History()
        >>> history.add("event", 0, text="begins")
        >>> history.lines
        [{'kind': 'event', 'update': 0, 'text': 'begins'}]
    """

    def __init__(
        self,
        folder: Path | None = None,
        on_event: Callable[[Line], None] | None = None,
        lines: Iterable[Line] = (),
    ) -> None:
        self.lines: list[Line] = list(lines)
        self._on_event = on_event
        self._path = None if folder is None else folder / HISTORY_FILE
        if self._path is not None:
            write_history(self._path, self.lines)

    def add(self, kind: str, update: int, **facts: Any) -> None:
        """Add a line; numbers that are not finite become None.

        Raises:
            DataError: the file cannot be written.
        """
        line: Line = plain({"kind": kind, "update": update, **facts})
        self.lines.append(line)
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, allow_nan=False) + "\n")
            except OSError as error:
                raise cannot_write(self._path, error) from None
        if self._on_event is not None:
            self._on_event(line)

    def of_kind(self, kind: str) -> list[Line]:
        """Return the lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]


def write_history(path: Path, lines: Iterable[Line]) -> None:
    """Write all lines, whole or not at all.

    Raises:
        DataError: the place cannot be written.
    """
    with replace_file(path) as new:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        new.write_text(text, encoding="utf-8")


def read_history(path: Path) -> list[Line]:
    """Read what :func:`write_history` wrote.

    Raises:
        DataError: missing or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the history {path}: {error}") from None


def plain(value: Any) -> Any:
    """Return JSON types; NaN and infinity become None.

    Example:
        >>> plain({"a": float("nan"), "b": (1, 2.0)})
        {'a': None, 'b': [1, 2.0]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
