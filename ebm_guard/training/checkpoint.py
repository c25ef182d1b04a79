"""A run on disk: one file that holds everything, written whole, read without unpickling."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ebm_guard.errors import DataError, first_line
from ebm_guard.files import replace_file

CHECKPOINT_FILE = "checkpoint.pt"
SCHEMA = "ebm_guard.checkpoint/1"
_SHOWN = 5
# Keys that say what kind of thing the settings beside them belong to.
_NAMES = ("objective", "negatives", "sampler")
# What torch and json raise on a damaged file, besides pickle's own error.
_DAMAGED = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError)


def checkpoint_path(folder: Path, rank: int = 0) -> Path:
    """Return where a process keeps its checkpoint: buffers and queues are its own.

    Example:
        >>> checkpoint_path(Path("run"), 1).name
        'checkpoint.rank1.pt'
    """
    path = folder / CHECKPOINT_FILE
    return path if rank == 0 else path.with_suffix(f".rank{rank}.pt")


def check_no_checkpoint(folder: Path) -> None:
    """Refuse to start a run where another one left a checkpoint.

    Its history would be lost at once, and its checkpoint would stand beside the new history.

    Raises:
        DataError: there is one.
    """
    old = sorted(folder.glob(f"{Path(CHECKPOINT_FILE).stem}*{Path(CHECKPOINT_FILE).suffix}"))
    if old:
        raise DataError(
            f"{folder} holds {old[0].name} of an earlier run. Go on with it (resume=True, "
            "--resume), give another folder, or remove the file to start anew"
        )


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], settings: Mapping[str, Any], rank: int = 0
) -> Path:
    """Write a checkpoint: the old one stays until the new one is whole.

    Args:
        folder: made where it is missing.
        state: tensors, numbers, text, lists and dicts of them.
        settings: of the run and its data, as JSON types.
        rank: of this process.

    Raises:
        DataError: the place cannot be written.
    """
    path = checkpoint_path(folder, rank)
    whole = {"schema": SCHEMA, "settings": json.dumps(settings, allow_nan=False), **state}
    with replace_file(path) as new:
        torch.save(whole, new)
    return path


def load_checkpoint(folder: Path, settings: Mapping[str, Any], rank: int = 0) -> dict[str, Any]:
    """Read a checkpoint of the very same run; all tensors come on the CPU.

    Args:
        folder: where :func:`save_checkpoint` wrote.
        settings: of the run that is to go on.
        rank: of this process.

    Raises:
        DataError: missing, damaged, or of a run with other settings or data, with what differs.
    """
    from pickle import UnpicklingError

    path = checkpoint_path(folder, rank)
    if not path.is_file():
        raise DataError(f"{folder} holds no {path.name} to resume; start without resume")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        schema = state["schema"]
        stored = json.loads(state["settings"])
    except (*_DAMAGED, UnpicklingError) as error:
        raise DataError(
            f"cannot read checkpoint {path}: {first_line(error)}; start without resume"
        ) from None
    if schema != SCHEMA:
        raise DataError(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}")
    changed = list(differences(stored, json.loads(json.dumps(settings))))
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise DataError(
            f"{path} belongs to another run: {'; '.join(changed[:_SHOWN])}{more}. Resume with the "
            "same settings and data, or start a run in another folder"
        )
    return dict(state)


def differences(stored: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield where two JSON values differ, in words.

    Example:
        >>> list(differences({"seed": 0, "scope": "all"}, {"seed": 1, "scope": "all"}))
        ['seed was 0, now 1']
    """
    if isinstance(stored, dict) and isinstance(now, dict):
        named = [key for key in _NAMES if isinstance(stored.get(key), str)]
        if any(stored[key] != now.get(key) for key in named):
            # Another kind of thing: what its settings are says nothing more.
            stored, now = ({key: part.get(key) for key in named} for part in (stored, now))
        for key in sorted({*stored, *now}):
            inner = f"{path}.{key}" if path else key
            yield from differences(stored.get(key), now.get(key), inner)
    elif stored != now:
        yield f"{path} was {stored!r}, now {now!r}"
