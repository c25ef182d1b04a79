"""A ``.npy`` body to rows of the model's input; nothing is unpickled or evaluated."""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor

from ebm_guard.deploy.serve.refusal import RefusedError

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 4096
_DTYPE = re.compile(rb"""['"]descr['"]\s*:\s*['"]([<>=|]?[fiu][1248])['"]""")
_ORDER = re.compile(rb"""['"]fortran_order['"]\s*:\s*(True|False)""")
# One class of characters: a pattern with blanks that may belong to either neighbour takes a header
# of 200 bytes for minutes, and all threads of the process wait.
_SHAPE = re.compile(rb"""['"]shape['"]\s*:\s*\(([0-9, ]{0,120})\)""")
_NUMBER = re.compile(rb" {0,8}\d{1,10} {0,8}")
_MOST_DIMENSIONS = 8


def rows_of_npy(body: bytes, max_rows: int) -> Tensor:
    """Return the array (B, ...) of a ``.npy`` file, 1 <= B <= max_rows.

    The header is read with fixed patterns, so neither ``pickle`` nor Python's own literals are in
    play, and the size it claims is compared with the bytes that came before anything is allocated.

    Args:
        body: what ``numpy.save(file, rows, allow_pickle=False)`` writes: floating or whole numbers.
        max_rows: most rows.

    Raises:
        RefusedError: damaged, of another type, too long, or without rows.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> np.save(file, np.ones((2, 3), dtype=np.float32))
        >>> rows_of_npy(file.getvalue(), 8).shape
        torch.Size([2, 3])
    """
    header, data = _split(body)
    found = [pattern.findall(header) for pattern in (_DTYPE, _ORDER, _SHAPE)]
    twice = any(header.count(key) != 1 for key in (b"descr", b"fortran_order", b"shape"))
    # Nothing else may stand there: what numpy refuses is not guessed at.
    rest = header
    for pattern in (_DTYPE, _ORDER, _SHAPE):
        rest = pattern.sub(b"", rest)
    strange = rest.translate(None, b", \n") != b"{}"
    if twice or strange or any(len(hits) != 1 for hits in found):
        raise RefusedError(
            "unreadable",
            "the .npy header is not that of one array of floating or whole numbers; write it with "
            "numpy.save(file, rows.astype('float32'), allow_pickle=False)",
        )
    (code,), (fortran,), (numbers,) = found
    try:
        dtype = np.dtype(code.decode())
    except TypeError:
        raise RefusedError("unreadable", f"no dtype is called {code.decode()}") from None
    shape = _shape(numbers)
    if math.prod(shape) * dtype.itemsize != len(data):
        raise RefusedError(
            "unreadable",
            f"the .npy header says {dtype} {shape}, and {len(data):,} bytes follow: send it whole",
        )
    if len(shape) < 2 or not 1 <= shape[0] <= max_rows or 0 in shape:
        reason = "too_large" if shape and shape[0] > max_rows else "unreadable"
        raise RefusedError(
            reason, f"got an array of shape {shape}; needed (B, ...) with 1 <= B <= {max_rows}"
        )
    rows = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran == b"True" else "C")
    # A copy in the machine's byte order, which torch may write to.
    return torch.from_numpy(np.array(rows, dtype=dtype.newbyteorder("="), order="C"))


def as_expected(rows: Tensor, example: Tensor | None) -> Tensor:
    """Check rows against a row that the guard was fitted on, and cast floats to its dtype.

    Args:
        rows: (B, ...).
        example: (1, ...), or None where it is not known.

    Raises:
        RefusedError: another shape, or another kind of number.
    """
    if example is None:
        return rows
    if rows.shape[1:] != example.shape[1:]:
        raise RefusedError(
            "unreadable",
            f"got rows of shape {tuple(rows.shape[1:])}; the guard was fitted on "
            f"{tuple(example.shape[1:])}",
        )
    if rows.is_floating_point() != example.is_floating_point():
        raise RefusedError(
            "unreadable",
            f"got {rows.dtype}; the model takes {example.dtype}. Images go as files, or as "
            "floating numbers, prepared as the model takes them",
        )
    return rows.to(example.dtype)


def _shape(numbers: bytes) -> tuple[int, ...]:
    """Read what stands between the brackets: numbers with a comma between them, or nothing."""
    if not numbers.strip():
        return ()
    parts = numbers.split(b",")
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    plain = all(_NUMBER.fullmatch(part) for part in parts)
    if not plain or len(parts) > _MOST_DIMENSIONS:
        raise RefusedError(
            "unreadable",
            f"the .npy header has a shape that is not {_MOST_DIMENSIONS} numbers at most: write it "
            "with numpy.save",
        )
    return tuple(int(part) for part in parts)


def _split(body: bytes) -> tuple[bytes, memoryview]:
    wide = body[6:7] == b"\x02"
    start = 12 if wide else 10
    if not body.startswith(_MAGIC) or body[6:7] not in (b"\x01", b"\x02") or len(body) < start:
        raise RefusedError(
            "unreadable", "the body is no .npy file of version 1 or 2; write it with numpy.save"
        )
    length = int.from_bytes(body[8:start], "little")
    if length > _LONGEST_HEADER or start + length > len(body):
        raise RefusedError("unreadable", "the .npy header is cut off or too long: send it whole")
    return body[start : start + length], memoryview(body)[start + length :]
