"""What a long run reads: how to tell whether it is still the same, and the rows behind a place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ebm_guard.data import ImageSource, Spec
from ebm_guard.data.sources import StreamSource
from ebm_guard.data.specs import existing_path
from ebm_guard.gate import Guard
from ebm_guard.predictions import Predictions
from ebm_guard.predictions.record import Array, chunks

# What computes a row, to its last digit.
_LIBRARIES = ("ebm-guard", "torch", "timm", "numpy", "pillow")


def rows_behind(source: ImageSource, done: int) -> ImageSource | None:
    """Return a source without its first rows, or None where none is left.

    A stream has no random access: its first images are read again, and dropped.

    Args:
        source: any source.
        done: rows to leave out.

    Example:
        >>> from ebm_guard.data import open_source
        >>> rows_behind(open_source("demo:"), 440).ids[0]
        '440'
    """
    if not done:
        return source
    if isinstance(source, StreamSource):
        return source.behind(done)
    if done >= len(source):
        return None
    return source.subset(np.arange(done, len(source), dtype=np.int64))


def images_identity(spec: Spec, source: ImageSource) -> dict[str, Any]:
    """Return what tells whether images are those of an earlier run.

    The spec, the number of rows, and a hash of: for ``npz:`` the whole file; for folders and lists
    each file's name, size and time of change; for timm's readers the names of the rows. A stream
    says no more than its spec and its number of rows.

    Args:
        spec: the parsed spec.
        source: what it opened.
    """
    names = None if isinstance(source, StreamSource) else _names_hash(spec, source.ids)
    content = file_hash(existing_path(spec)) if spec.kind == "npz" else None
    return {"spec": spec.text, "rows": source.total, "names": names, "content": content}


def stored_identity(spec: Spec, part: Predictions) -> dict[str, Any]:
    """Return what tells whether stored rows are those of an earlier run: what the model said.

    Not the fingerprint, which is that of the images and the same for every model.

    Args:
        spec: the parsed spec.
        part: what it opened.
    """
    names = None if part.ids is None else _hash(part.ids)
    return {
        "spec": spec.text,
        "rows": len(part),
        "names": names,
        "content": {
            name: _array_hash(column)
            for name in ("logits", "features")
            if (column := getattr(part, name)) is not None
        },
        "kind": part.kind,
    }


def guard_identity(guard: Guard, path: str | Path) -> dict[str, Any]:
    """Return what tells whether the same guard and the same model decide in the same way.

    Args:
        guard: as loaded.
        path: its artefact.
    """
    classifier = guard.classifier
    device = None if classifier is None else classifier.device
    preprocessing = None if classifier is None else classifier.preprocessing
    return {
        "guard": file_hash(path),
        "weights": None if classifier is None else classifier.weights_hash(),
        "device": None if device is None else device.type,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def file_hash(path: str | Path) -> str:
    """Hash the bytes of a file.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _version(name: str) -> str | None:
    """Return the installed version; timm may be missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _array_hash(array: Array) -> str:
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    for block in chunks(array):
        digest.update(np.ascontiguousarray(block).tobytes())
    return f"sha256:{digest.hexdigest()}"


def _names_hash(spec: Spec, ids: Sequence[str]) -> str:
    if spec.kind not in ("folder", "list"):
        return _hash(ids)
    path = existing_path(spec)
    root = path if spec.kind == "folder" else path.parent
    return _hash(f"{name}|{_stamp(root / name)}" for name in ids)


def _stamp(path: Path) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116, a Path of each of millions of files would be slow
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_size}|{status.st_mtime_ns}"


def _hash(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        # JSON, so that no two lists of names make the same text.
        digest.update(json.dumps(name).encode())
    return f"sha256:{digest.hexdigest()}"
