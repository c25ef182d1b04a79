"""The one parser of data specs: ``npz:FILE#test[:5000]?classes=0-7`` and its kin."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ebm_guard.errors import DataError, InvalidInputError, suggest
from ebm_guard.files import expanded

STORED_KINDS = ("logits", "predictions")
# The words before a colon; timm's readers are told by their prefix, and are of the kind `timm`.
KINDS = ("folder", "list", "npz", "demo", *STORED_KINDS)
IMAGE_KINDS = ("folder", "list", "npz", "demo", "timm")
READERS = ("torch", "hfds", "hfids", "wds")
_SLICE = re.compile(
    r"^(?P<rest>.*)\[(?P<start>(?:-?\d{1,12})?):(?P<stop>(?:-?\d{1,12})?)(?::(?P<step>(?:-?\d{1,12})?))?\]$"
)
_MOST_CLASSES = 1_000_000
_HELP = (
    "a spec is [folder:]PATH, list:FILE, npz:FILE[#split][SLICE][?classes=0-7], "
    "logits:FILE[SLICE], predictions:DIR[SLICE], demo:[ROLE], or one of timm's readers: "
    "torch/NAME[#split][SLICE], hfds/NAME[#split], hfids/NAME[#split], wds/[NAME][#split]"
)


@dataclass(frozen=True)
class Spec:
    """A parsed data spec.

    Args:
        text: the spec as the user wrote it.
        kind: one of ``KINDS``, or ``timm`` for timm's readers.
        path: file or folder; for ``demo`` the role, or '' for the option's own role; for ``timm``
            the reader with its prefix, such as ``torch/cifar10``.
        split: array prefix inside an npz file (``test`` reads ``test_images``), split of a timm
            reader, or ''.
        rows: Python slice over the rows of the file, or None for all.
        classes: original labels to keep of these rows, in the order of their new labels, or None
            for all.
        input_key: image column of a timm reader, or '' for its default.
        target_key: label column of a timm reader, or '' for its default.
    """

    text: str
    kind: str
    path: str
    split: str = ""
    rows: slice | None = None
    classes: tuple[int, ...] | None = None
    input_key: str = ""
    target_key: str = ""


def parse_spec(text: str) -> Spec:
    """Parse a data spec; nothing is opened.

    Raises:
        InvalidInputError: unknown kind, or a suffix that this kind does not take.

    Example:
        >>> spec = parse_spec("npz:mnist.npz#test[:100]?classes=0-7")
        >>> spec.kind, spec.path, spec.split, spec.rows, spec.classes
        ('npz', 'mnist.npz', 'test', slice(None, 100, None), (0, 1, 2, 3, 4, 5, 6, 7))
    """
    if not text or text.startswith("tfds/"):
        raise InvalidInputError(
            f"got spec {text!r}; {_HELP}; of timm's readers tfds/ is not read (TensorFlow)"
        )
    if text.startswith(tuple(f"{reader}/" for reader in READERS)):
        return _parse_reader(text)
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


def _parse_reader(text: str) -> Spec:
    reader = text.partition("/")[0]
    rest, _, query = text.partition("?")
    rows: slice | None = None
    keys = {"input_key": "", "target_key": ""}
    if reader == "torch":
        rest, rows = _split_slice(text, rest)
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in keys or not value or reader == "torch":
            raise InvalidInputError(
                f"got {part!r} in spec {text!r}; needed ?input_key=COLUMN&target_key=COLUMN, "
                "behind hfds/, hfids/ or wds/"
            )
        keys[key] = value
    # A local path of hfds/ may not hold a '#', as no other spec's may.
    name, _, split = rest.partition("#")
    if reader != "wds" and not name.partition("/")[2]:
        raise InvalidInputError(f"got spec {text!r} without the name of a data set; {_HELP}")
    return Spec(text, "timm", name, split, rows, None, keys["input_key"], keys["target_key"])


def existing_path(spec: Spec) -> Path:
    """Return the path of a spec, with ``~`` and environment variables filled in.

    The spec's text, which reports record, keeps the variable's name.

    Raises:
        DataError: nothing is there; near names in the same folder are suggested.
    """
    path = expanded(spec.path)
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
        # Long ranges over and over would fill the memory before they are refused.
        if len(labels) > _MOST_CLASSES:
            break
    if len(set(labels)) != len(labels) or not labels:
        raise InvalidInputError(f"got classes {value!r} in spec {text!r}; each label at most once")
    return tuple(labels)
