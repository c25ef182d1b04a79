"""Decide on any number of rows in constant memory: whole files or nothing, or files to go on with.

:func:`write_once` leaves nothing behind when it fails. :func:`write_resumable` leaves ``FILE.part``
and a journal, from which the next run goes on: killed at any point, the files of the last run are
byte for byte those of a run that nobody killed. What depends on the model is made again from the
last batch that was written.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ebm_guard.deploy.batch_formats import (
    Row,
    parquet_of_lines,
    require_parquet,
    row_file,
    text_format,
)
from ebm_guard.deploy.batch_journal import (
    SCHEMA,
    Journal,
    Mark,
    bears_out,
    check_same,
    size_and_crc,
    write_all,
)
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.files import check_writable, replace_file

# From the number of rows that are done to batches of the rows behind them.
Read = Callable[[int], Iterable[Sequence[Row]]]
_REFUSED = ("REJECT", "INVALID")
UNREADABLE = "unreadable: "


@dataclass(frozen=True)
class Outputs:
    """Where rows go.

    Args:
        output: file of all rows.
        file_format: ``jsonl``, ``csv`` or ``parquet``.
        fields: of a row, in order.
        review: file of the refused rows as JSON lines, in the order of the data, or None.
    """

    output: Path
    file_format: str
    fields: tuple[str, ...]
    review: Path | None = None

    def check(self) -> None:
        """Fail before the work where the files could not be written.

        Raises:
            InvalidInputError: both are the same file, or pyarrow is missing.
            DataError: a place is not writable.
        """
        if self.review is not None and _same(self.review, self.output):
            raise InvalidInputError(
                f"got --review and --output with the same file {self.output}; give two"
            )
        if self.file_format == "parquet":
            require_parquet()
        for path in self.paths:
            if path.is_dir():
                raise DataError(f"cannot write {path}: it is a folder; give a file name")
            check_writable(path)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of rows."""
        return (self.output,) if self.review is None else (self.output, self.review)

    @property
    def journal(self) -> Path:
        """The journal of an interrupted run."""
        return _beside(self.output, ".part.journal")


@dataclass
class Tally:
    """What was decided so far.

    Args:
        counts: rows by status.
        broken: rows that are INVALID because the model gave NaN or infinite values.
        kept: rows that an interruption does not lose.
        taken_over: rows of an earlier run.
    """

    counts: Counter[str] = field(default_factory=Counter)
    broken: int = 0
    kept: int = 0
    taken_over: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.counts.total()

    @property
    def refused(self) -> int:
        """Number of rows of the review queue."""
        return sum(self.counts[status] for status in _REFUSED)

    def add(self, rows: Sequence[Row]) -> None:
        """Count some rows."""
        for row in rows:
            self.counts[row["status"]] += 1
            self.broken += row["status"] == "INVALID" and not row["reason"].startswith(UNREADABLE)


def write_once(outputs: Outputs, batches: Iterable[Sequence[Row]], tally: Tally) -> None:
    """Write all rows, or nothing.

    Args:
        outputs: where they go.
        batches: the rows, a batch at a time.
        tally: is filled.

    Raises:
        DataError: a place cannot be written.
    """
    with ExitStack() as stack:
        # Both files are closed before either gets its name.
        new = stack.enter_context(replace_file(outputs.output))
        queued = None
        if outputs.review is not None:
            queued = stack.enter_context(replace_file(outputs.review))
        write = stack.enter_context(row_file(new, outputs.file_format, outputs.fields))
        queue = None
        if queued is not None:
            queue = stack.enter_context(row_file(queued, "jsonl", outputs.fields))
        for rows in _read(batches):
            write(rows)
            if queue is not None:
                queue(refused(rows))
            tally.add(rows)


def write_resumable(
    outputs: Outputs,
    identity: Mapping[str, Any],
    read: Read,
    tally: Tally,
    *,
    keep_journal: bool = False,
) -> None:
    """Write all rows, going on where an earlier run of the same command was stopped.

    Args:
        outputs: where they go.
        identity: what the rows depend on, as JSON types.
        read: gives the batches behind a number of rows; always the same rows in the same batches.
        tally: is filled, also when this fails.
        keep_journal: also when all is done; the next run then finds nothing left to do.

    Raises:
        DataError: the earlier run was another one, another process writes the same file, or the
            place cannot be written; what is written is kept.
    """
    try:
        for path in outputs.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        _check_no_strangers(outputs)
        journal = Journal(outputs.journal)
        try:
            _resumed(outputs, journal, {"schema": SCHEMA, **identity}, read, tally)
            if not keep_journal:
                journal.remove()
        finally:
            journal.close()
    except OSError as error:
        raise DataError(
            f"cannot write {outputs.output}: {error.strerror or error}. Needed a writable folder "
            "with free space; make some, or choose another --output to start anew"
        ) from None


def refused(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that are for a person to look at: REJECT and INVALID.

    Example:
        >>> refused([{"status": "ACCEPT"}, {"status": "INVALID"}])
        [{'status': 'INVALID'}]
    """
    return [row for row in rows if row["status"] in _REFUSED]


def _resumed(
    outputs: Outputs, journal: Journal, identity: Mapping[str, Any], read: Read, tally: Tally
) -> None:
    parts = [_Part(outputs.output, outputs.file_format, outputs.fields)]
    if outputs.review is not None:
        parts.append(_Part(outputs.review, "jsonl", outputs.fields, refused))
    stored = journal.identity()
    if stored is not None:
        check_same(journal.path, stored, identity)
    mark = _last_mark(journal, parts)
    if mark is None:
        journal.begin(identity)
        mark = Mark({}, 0, tuple(part.start() for part in parts))
        journal.add(mark)
    tally.counts.update(mark.counts)
    tally.broken = mark.broken
    tally.kept = tally.taken_over = tally.rows
    if not mark.complete:
        mark = _append(parts, mark, journal, read(tally.rows), tally)
    if not mark.finals:
        journal.add(replace(mark, finals=tuple(part.prepare() for part in parts)))
    for part in parts:
        part.place()


def _last_mark(journal: Journal, parts: Sequence[_Part]) -> Mark | None:
    end = journal.end()
    if end is not None and end.complete and len(end.files) == len(parts):
        # Stopped while the files got their names: some may have theirs already.
        finals = end.finals or (None,) * len(end.files)
        pairs = zip(parts, end.files, finals, strict=True)
        if all(part.whole(rows, final) for part, rows, final in pairs):
            return end
    return journal.last([part.path for part in parts])


def _append(
    parts: Sequence[_Part],
    mark: Mark,
    journal: Journal,
    batches: Iterable[Sequence[Row]],
    tally: Tally,
) -> Mark:
    with ExitStack() as stack:
        for part, pair in zip(parts, mark.files, strict=True):
            stack.enter_context(part.opened(*pair))
        for rows in _read(batches):
            files = tuple(part.append(rows) for part in parts)
            tally.add(rows)
            journal.add(Mark(dict(tally.counts), tally.broken, files))
            tally.kept = tally.rows
        files = tuple((part.size, part.crc) for part in parts)
        end = Mark(dict(tally.counts), tally.broken, files, complete=True)
        journal.add(end)
    return end


def _read(batches: Iterable[Sequence[Row]]) -> Iterator[Sequence[Row]]:
    """Tell errors of reading from those of writing."""
    try:
        yield from batches
    except OSError as error:
        raise DataError(
            f"cannot read the data: {type(error).__name__}: {error}. Needed data that can be read "
            "to its end"
        ) from error


class _Part:
    """A file of rows that is not finished, beside the place of the finished one.

    Parquet cannot be gone on with, so its rows wait as JSON lines and are turned at the end.
    """

    def __init__(
        self,
        final: Path,
        file_format: str,
        fields: Sequence[str],
        chosen: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows,
    ) -> None:
        self.path = _beside(final, ".part")
        self.size, self.crc = 0, 0
        self._final, self._fields, self._chosen = final, fields, chosen
        self._is_parquet = file_format == "parquet"
        self._text = text_format("jsonl" if self._is_parquet else file_format, fields)
        self._file: Any = None

    def start(self) -> tuple[int, int]:
        """Make the file anew; return its length and CRC-32."""
        self.path.write_bytes(self._text.header)
        return len(self._text.header), zlib.crc32(self._text.header)

    @contextmanager
    def opened(self, size: int, crc: int) -> Iterator[None]:
        """Cut the file to its known beginning, and take rows behind it."""
        with self.path.open("r+b", buffering=0) as self._file:
            self._file.truncate(size)
            self._file.seek(size)
            self.size, self.crc = size, crc
            yield

    def append(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Write some rows; return the length and CRC-32 of the whole file."""
        data = self._text.encode(self._chosen(rows))
        write_all(self._file, data)
        self.size, self.crc = self.size + len(data), zlib.crc32(data, self.crc)
        return self.size, self.crc

    def whole(self, rows: tuple[int, int], final: tuple[int, int] | None) -> bool:
        """Tell whether all rows are there, in this file or under their own name.

        Args:
            rows: length and CRC-32 of the rows as they wait.
            final: those of the finished file, or None where it was not made.
        """
        if self.path.exists():
            return bears_out(self.path, *rows)
        return final is not None and bears_out(self._final, *final)

    def prepare(self) -> tuple[int, int]:
        """Make what will be the finished file; return its length and CRC-32."""
        if self._is_parquet:
            parquet_of_lines(self.path, self._made, self._fields)
        # Before the name: after a power cut a name must not stand for an empty file.
        with self._made.open("rb+") as file:
            os.fsync(file.fileno())
        return size_and_crc(self._made)

    def place(self) -> None:
        """Give the finished file its name, unless it has it already."""
        if not self.path.exists():
            return
        if not self._made.exists():  # this run did not make it, and the last one did not name it
            self.prepare()
        self._made.replace(self._final)
        self.path.unlink(missing_ok=True)

    @property
    def _made(self) -> Path:
        return _beside(self._final, ".part.parquet") if self._is_parquet else self.path


def _check_no_strangers(outputs: Outputs) -> None:
    for path in outputs.paths:
        part = _beside(path, ".part")
        if part.exists() and not outputs.journal.exists():
            raise DataError(
                f"got --resume, and {part} stands there without its journal "
                f"{outputs.journal.name}, so it is not known what it holds; move it away"
            )


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _same(one: Path, two: Path) -> bool:
    return one.resolve() == two.resolve()
