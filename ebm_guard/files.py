"""Write files and folders whole or not at all."""

from __future__ import annotations

import lzma
import os
import secrets
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ebm_guard.errors import DataError

# Whatever numpy, the zip module and its decompressors raise on a damaged .npz file.
DAMAGED_NPZ = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``, and move it there when the block succeeds.

    Args:
        path: the file to write; its folder is made.

    Raises:
        DataError: the folder is missing, full or read-only; nothing is left behind.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with replace_file(target) as new:
        ...     _ = new.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    new: Path | None = None
    made = _missing_parents(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: it makes private files, and a result is as readable as any other file.
        new = _beside(path)
        new.touch(exist_ok=False)
        yield new
        new.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if new is not None:
            new.unlink(missing_ok=True)
        _remove_empty(made)


@contextmanager
def replace_folder(folder: str | Path, marker: str) -> Iterator[Path]:
    """Give a temporary folder beside ``folder``, and swap it in when the block succeeds.

    Args:
        folder: the folder to write; an old result is replaced, anything else is refused.
        marker: file name that tells an old result from a folder of something else.

    Raises:
        DataError: the place cannot be written, or holds something else; nothing is left behind.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "out"
        >>> with replace_folder(target, marker="done.txt") as new:
        ...     _ = (new / "done.txt").write_text("")
        >>> target.is_dir()
        True
    """
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder, marker):
        raise DataError(
            f"{folder} exists and holds other files; nothing was written. Choose a new folder"
        )
    new: Path | None = None
    made = _missing_parents(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = _beside(folder)
        new.mkdir()
        yield new
        _swap(new, folder)
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        _remove_empty(made)


def expanded(text: str | Path) -> Path:
    """Return a path with environment variables and ``~`` filled in.

    A variable or a home that does not exist stays in the path, which is then not found.

    Example:
        >>> expanded("plain/path").name
        'path'
    """
    path = Path(os.path.expandvars(text))
    # A null byte is no home either; who opens the path says what is wrong with it.
    with suppress(RuntimeError, ValueError):
        path = path.expanduser()
    return path


def check_writable(path: str | Path) -> None:
    """Fail now, and not after minutes of work, where a result could not be written.

    Args:
        path: file or folder that will be written; it need not exist yet.

    Raises:
        DataError: its nearest existing folder is not writable.

    Example:
        >>> check_writable("result.json")
    """
    path = Path(path)
    place = path if path.is_dir() else path.parent
    try:
        while not place.exists():
            place = place.parent
        probe = _beside(place / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> DataError:
    """Return the error for a place that cannot be written."""
    reason = error.strerror or str(error)
    return DataError(
        f"cannot write {path}: {reason}; nothing was written. Needed a writable folder with free "
        "space: choose another --output"
    )


def _replaceable(folder: Path, marker: str) -> bool:
    return folder.is_dir() and ((folder / marker).exists() or not any(folder.iterdir()))


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.replace(folder)
        return
    old = _beside(folder)
    folder.replace(old)
    try:
        new.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _missing_parents(path: Path) -> list[Path]:
    """Return the folders that will have to be made, the innermost first."""
    return [parent for parent in path.parents if not parent.exists()]


def _remove_empty(made: list[Path]) -> None:
    """Take back folders that were made for a result that did not come."""
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(6)}"
