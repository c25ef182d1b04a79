"""How far a long run has come: marks in a file, each of which the rows on disk must bear out.

A line is a CRC-32, a blank, and JSON. The first line says what the rows depend on. Each other line
is a mark: the rows counted so far, and for each file of rows its length and the CRC-32 of all its
bytes. A mark counts where all files still begin with those very bytes; so neither a torn line nor
a file that lost its end with the power is believed, and nothing has to be forced to disk between
batches.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ebm_guard.errors import DataError

SCHEMA = "ebm_guard.batch/2"
_BLOCK = 1 << 20
_SMALL_BLOCK = 1 << 16
_SHOWN = 5


@dataclass(frozen=True)
class Mark:
    """A point to go on from.

    Args:
        counts: rows so far, by status.
        broken: rows that are INVALID because of the model.
        files: (bytes, CRC-32) of each file of rows.
        complete: no row is missing.
        finals: (bytes, CRC-32) of each finished file, once they are made.
    """

    counts: Mapping[str, int]
    broken: int
    files: tuple[tuple[int, int], ...]
    complete: bool = False
    finals: tuple[tuple[int, int], ...] = ()


class Journal:
    """The marks of one run, appended to a file that only this process may write.

    Args:
        path: the file; made where it is missing.

    Raises:
        DataError: another process has it open.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            _lock(self._file.fileno(), path)
        except BaseException:
            self._file.close()
            raise

    def identity(self) -> dict[str, Any] | None:
        """Return what the rows of the earlier run depend on, or None where there was none.

        Raises:
            DataError: the first line is damaged.
        """
        for line, _ in self._lines():
            return line
        with self.path.open("rb") as file:
            # A line that is not whole is that of a run which was killed before it had rows.
            whole = b"\n" in file.read(_BLOCK)
        if whole:
            raise DataError(
                f"cannot read {self.path}: it is damaged, or no journal. Remove it and the .part "
                "files beside it to start anew"
            )
        return None

    def last(self, parts: Sequence[Path]) -> Mark | None:
        """Return the last mark that all files bear out, and forget the marks behind it.

        Args:
            parts: the files of rows, in the order of ``Mark.files``; one that is missing bears out
                nothing.
        """
        checks = [_Prefix(path) for path in parts]
        found, end = None, 0
        try:
            for line, stop in self._lines():
                if not end:
                    end = stop
                    continue
                mark = _mark(line, self.path)
                if len(mark.files) != len(checks) or not all(
                    check.holds(*pair) for check, pair in zip(checks, mark.files, strict=True)
                ):
                    break
                found, end = mark, stop
        finally:
            for check in checks:
                check.close()
        self._file.truncate(end)
        return found

    def end(self) -> Mark | None:
        """Return the last mark as it was written, whether files bear it out or not.

        A torn line behind it is cut off, so that the next mark is a line of its own.
        """
        last, end = None, 0
        for number, (line, stop) in enumerate(self._lines()):
            last, end = line if number else None, stop
        self._file.truncate(end)
        return None if last is None else _mark(last, self.path)

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Forget everything, and write what the rows of this run depend on."""
        self._file.truncate(0)
        self._append(identity)

    def add(self, mark: Mark) -> None:
        """Append a mark; its rows must have been written before."""
        self._append(asdict(mark))

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes have the file."""
        self._file.close()

    def _append(self, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, allow_nan=False).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        self._file.seek(0, os.SEEK_END)
        write_all(self._file, line)

    def _lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the lines that are whole, each with the place of its end."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                end += len(line)
                value = _parsed(line)
                if value is None:
                    return
                yield value, end


class _Prefix:
    """Compare the beginning of a file with a CRC-32, for ever longer beginnings."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb") if path.is_file() else None
        self._size, self._crc = 0, 0

    def holds(self, size: int, crc: int) -> bool:
        """Tell whether the first ``size`` bytes have this CRC-32."""
        while self._file is not None and self._size < size:
            block = self._file.read(min(_BLOCK, size - self._size))
            if not block:
                return False
            self._size += len(block)
            self._crc = zlib.crc32(block, self._crc)
        return self._file is not None and (self._size, self._crc) == (size, crc)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def bears_out(path: Path, size: int, crc: int) -> bool:
    """Tell whether a file has this length and CRC-32.

    Example:
        >>> bears_out(Path("no such file"), 0, 0)
        False
    """
    if not path.is_file() or path.stat().st_size != size:
        return False
    check = _Prefix(path)
    try:
        return check.holds(size, crc)
    finally:
        check.close()


def size_and_crc(path: Path) -> tuple[int, int]:
    """Return the length and the CRC-32 of a file."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(_SMALL_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def write_all(file: Any, data: bytes) -> None:
    """Write bytes into an unbuffered file, which may take fewer at a time.

    Raises:
        OSError: the disk is full.
    """
    view = memoryview(data)
    while view.nbytes:
        view = view[file.write(view) :]


def check_same(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with the rows of another run.

    Args:
        path: the journal.
        stored: what its rows depend on.
        now: what the rows of this run depend on.

    Raises:
        DataError: with what differs.
    """
    from ebm_guard.training.checkpoint import differences

    changed = list(differences(dict(stored), json.loads(json.dumps(now))))
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise DataError(
            f"{path} belongs to another run: {'; '.join(changed[:_SHOWN])}{more}. Go on with the "
            "same data, guard, model and options, or remove it and the .part files beside it to "
            "start anew"
        )


def _parsed(line: bytes) -> dict[str, Any] | None:
    code, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or code != b"%08x" % zlib.crc32(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _mark(line: Mapping[str, Any], path: Path) -> Mark:
    try:
        files, finals = (
            tuple((int(size), int(crc)) for size, crc in line[name]) for name in ("files", "finals")
        )
        counts = {str(word): int(count) for word, count in line["counts"].items()}
        return Mark(counts, int(line["broken"]), files, bool(line["complete"]), finals)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        raise DataError(
            f"cannot read {path}: a mark is damaged. Remove it and the .part files beside it to "
            "start anew"
        ) from None


def _lock(handle: int, path: Path) -> None:
    """Keep other processes out until this one closes the file or dies, however it dies."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            f"another process writes {path.name.removesuffix('.part.journal')} at this moment; "
            "wait until it has ended, or choose another --output"
        ) from None
