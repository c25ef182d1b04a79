"""The one parser of data specs: ``npz:FILE#test[:5000]?classes=0-7`` and its kin."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ebm_guard.errors import DataError, InvalidInputError, suggest

IMAGE_KINDS = ("folder", "list", "npz", "demo")
STORED_KINDS = ("logits", "predictions")
KINDS = IMAGE_KINDS + STORED_KINDS
_TIMM_READERS = ("torch/", "hfds/", "hfids/", "wds/", "tfds/")
_SLICE = re.compile(
    r"^(?P<rest>.*)\[(?P<start>(?:-?\d{1,12})?):(?P<stop>(?:-?\d{1,12})?)(?::(?P<step>(?:-?\d{1,12})?))?\]$"
)
_HELP = (
    "a spec is [folder:]PATH, list:FILE, npz:FILE[#split][SLICE][?classes=0-7], "
    "logits:FILE[SLICE], predictions:DIR[SLICE], or demo:[ROLE]"
)


@dataclass(frozen=True)
class Spec:
    """A parsed data spec.

    Args:
        text: the spec as the user wrote it.
        kind: one of ``KINDS``.
        path: file or folder; for ``demo`` the role, or '' for the option's own role.
        split: array prefix inside an npz file (``test`` reads ``test_images``), or ''.
        rows: Python slice over the rows, or None for all.
        classes: original labels to keep, in the order of their new labels, or None for all.
    """

    text: str
    kind: str
    path: str
    split: str = ""
    rows: slice | None = None
    classes: tuple[int, ...] | None = None


def parse_spec(text: str) -> Spec:
    """Parse a data spec; nothing is opened.

    Raises:
        InvalidInputError: unknown kind, or a suffix that this kind does not take.

    Example:
        >>> spec = parse_spec("npz:mnist.npz#test[:100]?classes=0-7")
        >>> spec.kind, spec.path, spec.split, spec.rows, spec.classes
        ('npz', 'mnist.npz', 'test', slice(None, 100, None), (0, 1, 2, 3, 4, 5, 6, 7))
    """
    if not text or text.startswith(_TIMM_READERS):
        raise InvalidInputError(
            f"got spec {text!r}; {_HELP}; timm's readers (torch/, hfds/, ...) are not read by this "
            "version"
        )
    kind, rest = _split_kind(text)
    classes: tuple[int, ...] | None = None
    rows: slice | None = None
    split = ""
    if kind == "npz":
        rest, _, query = rest.partition("?")
        classes = _parse_query(text, query) if query else None
    if kind in ("npz", *STORED_KINDS):
        rest, rows = _split_slice(text, rest)
    if kind == "npz":
        rest, _, split = rest.partition("#")
    if not rest and kind != "demo":
        raise InvalidInputError(f"got spec {text!r} with an empty path; {_HELP}")
    return Spec(text, kind, rest, split, rows, classes)


def existing_path(spec: Spec) -> Path:
    """Return the path of a spec, with ``~`` and environment variables filled in.

    The spec's text, which reports record, keeps the variable's name.

    Raises:
        DataError: nothing is there; near names in the same folder are suggested.
    """
    path = Path(os.path.expandvars(spec.path)).expanduser()
    if _exists(path):
        return path
    parent = path.parent
    while not _exists(parent):
        path, parent = parent, parent.parent
    near = suggest(path.name, (item.name for item in parent.iterdir())) if parent.is_dir() else ""
    raise DataError(f"got spec {spec.text!r}; {path.name!r} does not exist in {parent}{near}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # A name that is too long, or that holds a zero byte, is no file's name.
        return False


def _split_kind(text: str) -> tuple[str, str]:
    head, colon, rest = text.partition(":")
    if colon and head in KINDS:
        return head, rest
    if colon and head.isalpha() and len(head) > 1 and not _exists(Path(text)):
        raise InvalidInputError(
            f"got kind {head!r} in spec {text!r}{suggest(head, KINDS)}; {_HELP}"
        )
    return "folder", text


def _split_slice(text: str, rest: str) -> tuple[str, slice | None]:
    match = _SLICE.match(rest)
    if match is None:
        if rest.endswith("]"):
            raise InvalidInputError(
                f"got spec {text!r}; a slice is [START:STOP] or [START:STOP:STEP]"
            )
        return rest, None
    start, stop, step = (
        int(match[name]) if match[name] else None for name in ("start", "stop", "step")
    )
    if step == 0:
        raise InvalidInputError(f"got spec {text!r}; the step of a slice cannot be 0")
    return match["rest"], slice(start, stop, step)


def _parse_query(text: str, query: str) -> tuple[int, ...]:
    key, _, value = query.partition("=")
    labels: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if key != "classes" or match is None:
            raise InvalidInputError(
                f"got {query!r} in spec {text!r}; needed ?classes= with labels and ranges, such as "
                "?classes=0-7 or ?classes=0,3,5"
            )
        first = int(match[1])
        labels.extend(range(first, int(match[2] or first) + 1))
    if len(set(labels)) != len(labels) or not labels:
        raise InvalidInputError(f"got classes {value!r} in spec {text!r}; each label at most once")
    return tuple(labels)
