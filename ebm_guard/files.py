"""Write files and folders whole or not at all."""

from __future__ import annotations

import lzma
import os
import secrets
import shutil
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ebm_guard.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    # Headers of arrays: numpy reads them as Python's literals, in its way of an older Python too.
    SyntaxError,
    tokenize.TokenError,
    ArithmeticError,
    MemoryError,
)
# Deflate makes a thousand out of one at most; photographs and features come nowhere near this.
_MOST_INFLATION = 200
_LARGE = 1 << 30


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


def read_arrays(file: BinaryIO, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays of an open ``.npz`` file; nothing is unpickled.

    Args:
        file: opened for reading bytes.
        names: those to read, where they are there; None for all.

    Returns:
        The arrays by name.

    Raises:
        ValueError: a single array, a member that is no array or of Python objects, a name that is
            there twice, or a member that would grow beyond 1 GiB and 200 times its size.
        Exception: one of ``DAMAGED_NPZ``.

    Example:
        >>> import io
        >>> import numpy as np
        >>> file = io.BytesIO()
        >>> np.savez(file, a=np.arange(3))
        >>> _ = file.seek(0)
        >>> read_arrays(file)
        {'a': array([0, 1, 2])}
    """
    import numpy as np

    loaded = np.load(file, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array, needed an .npz file (np.savez)")
    members = [] if loaded.zip is None else loaded.zip.infolist()
    if len({info.filename for info in members}) < len(members):
        raise ValueError("it holds two arrays of one name")
    wanted = [name for name in names or loaded.files if name in loaded.files]
    for info in members:
        grown = info.file_size > max(_LARGE, _MOST_INFLATION * info.compress_size)
        if grown and info.filename.removesuffix(".npy") in wanted:
            raise ValueError(
                f"{info.filename} would grow from {info.compress_size:,} to {info.file_size:,} "
                "bytes; save it uncompressed (np.savez) if that is meant"
            )
    arrays = {name: loaded[name] for name in wanted}
    strange = [name for name, array in arrays.items() if not _is_sound(array)]
    if strange:
        raise ValueError(f"{', '.join(strange)} is no array, or holds no text")
    return arrays


def map_array(path: Path) -> NDArray[Any]:
    """Open a ``.npy`` file, memory-mapped; nothing is unpickled.

    Args:
        path: the file.

    Raises:
        ValueError: Python objects, or elements without a size or a side below 0: numpy divides by
            zero there, in native code, which ends the process.
        Exception: one of ``DAMAGED_NPZ``.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> place = Path(tempfile.mkdtemp()) / "a.npy"
        >>> np.save(place, np.arange(3))
        >>> map_array(place).tolist()
        [0, 1, 2]
    """
    import numpy as np

    layout = np.lib.format
    readers = {(1, 0): layout.read_array_header_1_0, (2, 0): layout.read_array_header_2_0}
    with path.open("rb") as file:
        version = layout.read_magic(file)
        if version not in readers:
            raise ValueError(f"{path.name} is of version {version} of the .npy format")
        shape, _, dtype = readers[version](file)
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"{path.name} claims an array of shape {shape} and dtype {dtype}")
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


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


def _is_sound(array: Any) -> bool:
    """Tell whether this is an array whose text, if any, Python can hold."""
    import numpy as np

    if not isinstance(array, np.ndarray):
        return False
    if array.dtype.kind != "U" or not array.nbytes:
        return True
    letters = array.astype(array.dtype.newbyteorder("="), order="C").reshape(-1).view(np.uint32)
    return int(letters.max()) <= sys.maxunicode


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
