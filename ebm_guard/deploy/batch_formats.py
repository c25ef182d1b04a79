"""Rows of decisions as JSON lines, CSV or Parquet: the same rows give the same bytes."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebm_guard.errors import InvalidInputError

FORMATS = ("jsonl", "csv", "parquet")
FIELDS = (
    "id",
    "status",
    "accept",
    "label",
    "class",
    "confidence",
    "energy",
    "score",
    "p_value",
    "reason",
)
TOP = "top"
# Rows of a Parquet row group, which wait in memory: about 30 MB.
ROW_GROUP = 65_536
Row = dict[str, Any]
Write = Callable[[Sequence[Row]], object]


def fields_of(*, top: bool) -> tuple[str, ...]:
    """Return the fields of a row, in order.

    Args:
        top: with the labels of the lowest joint energy.

    Example:
        >>> fields_of(top=True)[-2:]
        ('reason', 'top')
    """
    return (*FIELDS, TOP) if top else FIELDS


@dataclass(frozen=True)
class TextFormat:
    """A format that grows at its end, so that it can be cut and gone on with.

    Args:
        header: the first bytes of a file.
        encode: rows to bytes.
    """

    header: bytes
    encode: Callable[[Sequence[Row]], bytes]


def text_format(name: str, fields: Sequence[str]) -> TextFormat:
    r"""Return ``jsonl`` or ``csv``.

    JSON keeps every float (shortest text that reads back as the same number) and writes no NaN.
    In CSV None is an empty cell, and a list is JSON in a cell. Names are written as they are: a
    spreadsheet takes one that begins with = for a formula.

    Args:
        name: of the format.
        fields: of a row, in order.

    Example:
        >>> text_format("csv", ["id", "energy"]).encode([{"id": "a", "energy": None}])
        b'a,\r\n'
    """
    if name == "jsonl":
        return TextFormat(b"", lambda rows: b"".join(_json_line(row, fields) for row in rows))
    return TextFormat(_csv([fields]), lambda rows: _csv([_cells(row, fields) for row in rows]))


def require_parquet() -> None:
    """Fail now where Parquet cannot be written.

    Raises:
        InvalidInputError: pyarrow is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InvalidInputError(
            "got --format parquet, which needs pyarrow: pip install 'ebm-guard[parquet]'"
        ) from None


@contextmanager
def row_file(path: Path, name: str, fields: Sequence[str]) -> Iterator[Write]:
    """Open a new file of rows, and give what writes rows into it.

    Args:
        path: the file.
        name: of the format.
        fields: of a row, in order.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
        >>> with row_file(path, "csv", ["id"]) as write:
        ...     _ = write([{"id": "a"}])
        >>> path.read_text().split()
        ['id', 'a']
    """
    if name == "parquet":
        with path.open("wb") as file, _parquet_writer(file, fields) as write:
            yield write
        return
    text = text_format(name, fields)
    with path.open("wb") as file:
        file.write(text.header)
        yield lambda rows: file.write(text.encode(rows))


def parquet_of_lines(lines: Path, path: Path, fields: Sequence[str], rows: int = 250) -> None:
    """Turn a file of JSON lines into Parquet, some rows at a time.

    Args:
        lines: what :func:`text_format` wrote as ``jsonl``.
        path: the Parquet file.
        fields: of a row, in order.
        rows: how many are read at once.

    Raises:
        OSError: a file cannot be read or written.
    """
    with lines.open("rb") as file, row_file(path, "parquet", fields) as write:
        block: list[Row] = []
        for line in file:
            block.append(json.loads(line))
            if len(block) == rows:
                write(block)
                block = []
        write(block)


def _json_line(row: Row, fields: Sequence[str]) -> bytes:
    return json.dumps({name: row[name] for name in fields}, allow_nan=False).encode() + b"\n"


def _csv(lines: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    return _plain(text.getvalue()).encode()


def _cells(row: Row, fields: Sequence[str]) -> list[Any]:
    return [json.dumps(row[name]) if name == TOP else row[name] for name in fields]


def _plain(text: str) -> str:
    r"""Write bytes of a file name that are no UTF-8 as ``\udcff``, as JSON does."""
    return text.encode("utf-8", "backslashreplace").decode()


def _plain_row(value: Any) -> Any:
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, dict):
        return {name: _plain_row(each) for name, each in value.items()}
    return [_plain_row(each) for each in value] if isinstance(value, list) else value


def _pyarrow() -> tuple[Any, Any]:
    return importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")


@contextmanager
def _parquet_writer(file: Any, fields: Sequence[str]) -> Iterator[Write]:
    """Write full row groups of ``ROW_GROUP`` rows, so that batches leave no trace in the file."""
    parquet, arrow = _pyarrow()
    schema = _schema(arrow, fields)
    writer = parquet.ParquetWriter(file, schema)
    waiting: list[Row] = []

    def write(rows: Sequence[Row]) -> None:
        waiting.extend(rows)
        while len(waiting) >= ROW_GROUP:
            flush()

    def flush() -> None:
        values = [_plain_row(row) for row in waiting[:ROW_GROUP]]
        writer.write_table(arrow.Table.from_pylist(values, schema=schema), ROW_GROUP)
        del waiting[:ROW_GROUP]

    try:
        yield write
        if waiting:
            flush()
        writer.close()
    except BaseException:
        # A writer that is left open closes itself later, into a file that is closed by then.
        with suppress(OSError, arrow.lib.ArrowException):
            writer.close()
        raise


def _schema(arrow: Any, fields: Sequence[str]) -> Any:
    number, text, whole = arrow.float64(), arrow.string(), arrow.int64()
    place = arrow.struct([("label", whole), ("class", text), ("energy", number)])
    types = {
        "accept": arrow.bool_(),
        "label": whole,
        "confidence": number,
        "energy": number,
        "score": number,
        "p_value": number,
        TOP: arrow.list_(place),
    }
    return arrow.schema([(name, types.get(name, text)) for name in fields])
