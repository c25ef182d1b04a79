"""Image files: folders of classes, flat folders, and lists of files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ebm_guard.data.images import read_image
from ebm_guard.data.sources.arrays import checked_groups
from ebm_guard.data.sources.base import Array, ImageSource, Labels
from ebm_guard.data.sources.class_map import mapped_labels
from ebm_guard.data.specs import Spec
from ebm_guard.errors import DataError, EbmGuardWarning

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_INTEGER = re.compile(r"-?[0-9]+")
_ENDING = "|".join(re.escape(ending) for ending in EXTENSIONS)
_QUOTED = re.compile(r'"(?P<path>(?:[^"]|"")+)"(?:\s+(?P<label>-?[0-9]+)(?:\s+(?P<group>\S.*))?)?')
_THREE = re.compile(
    rf"(?P<path>.*(?:{_ENDING}))\s+(?P<label>-?[0-9]+)\s+(?P<group>\S.*)", re.IGNORECASE
)
_LIST_HELP = (
    "a line is `path[ label[ group]]`; put a path with blanks into double quotes, or separate the "
    "columns by tabs"
)


class FileSource(ImageSource):
    """Image files on disk."""

    def __init__(
        self,
        spec: str,
        files: Sequence[Path],
        root: Path,
        labels: Labels | None,
        classes: tuple[str, ...] | None,
        groups: Array | None = None,
    ) -> None:
        names = [
            str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
            for file in files
        ]
        super().__init__(spec, names, labels, classes, groups)
        self._files = tuple(files)

    def load(self, index: int) -> Image.Image:
        """Decode one file completely, so that a truncated one fails here; see ``read_image``."""
        return read_image(self._files[index])


def open_folder(spec: Spec, path: Path, class_map: str | None = None) -> ImageSource:
    """Open a folder of class folders, or a flat folder of images.

    Classes are numbered by their names sorted as text, as torchvision does; timm's own folder
    reader sorts naturally (class2 before class10, case ignored), see ``match_classes``. Links are
    followed, hidden files and folders are ignored, and a class folder is searched at any depth.

    Args:
        spec: what was asked for.
        path: the folder.
        class_map: text file that numbers the classes instead, see ``mapped_labels``.

    Raises:
        DataError: a file, a folder without images, a folder that cannot be read, or a class folder
            that the class map does not name.
    """
    if not path.is_dir():
        raise DataError(
            f"got spec {spec.text!r}, a file; a folder was needed. For arrays write npz:{path}, "
            f"for a list of files list:{path}"
        )
    try:
        folders = sorted(item for item in path.iterdir() if item.is_dir() and item.name[0] != ".")
        flat = images_in(path, deep=False)
        inside = [images_in(folder, deep=True) for folder in folders]
    except OSError as error:
        raise DataError(
            f"got spec {spec.text!r}; cannot read the folder {error.filename}: {error.strerror}. "
            "Check its permissions"
        ) from None
    files = [file for part in inside for file in part]
    if not files and flat:
        if class_map is not None:
            raise DataError(f"got {path}, a flat folder; a class map needs a folder for each class")
        return FileSource(spec.text, flat, path, None, None)
    if not folders:
        raise DataError(f"got {path}, a folder without images ({', '.join(EXTENSIONS)})")
    if not files:
        raise DataError(f"got {path}, whose {len(folders)} sub-folders hold no images")
    if flat:
        warnings.warn(
            f"{len(flat)} images lie directly in {path} and are not used, because its "
            f"{len(folders)} sub-folders are taken as classes",
            EbmGuardWarning,
            stacklevel=2,
        )
    names = tuple(folder.name for folder in folders)
    counts = [len(part) for part in inside]
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), counts)
    source = FileSource(spec.text, files, path, labels, names)
    source.sorted_classes = True
    if class_map is not None:
        # A folder without images needs no number.
        used = [name for name, count in zip(names, counts, strict=True) if count]
        numbers, source.classes, source.class_map = mapped_labels(class_map, used, path)
        place = dict(zip(used, numbers, strict=True))
        source.labels = np.array([place.get(name, -1) for name in names], dtype=np.int64)[labels]
    return source


def images_in(folder: Path, *, deep: bool) -> list[Path]:
    """Return the image files in a folder, sorted; links are followed, hidden names are not.

    Raises:
        OSError: a folder cannot be read.
    """
    found: list[Path] = []
    seen: set[str] = set()

    def stop(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            # A link to a folder above, or a second link to the same one.
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if deep and name[0] != ".")
        found += [
            Path(root, name)
            for name in names
            if name[0] != "." and name.lower().endswith(EXTENSIONS)
        ]
    return sorted(found)


@dataclass(frozen=True)
class _Line:
    path: str
    label: int | None = None
    group: str | None = None


def open_list(spec: Spec, path: Path) -> ImageSource:
    r"""Open a text file of paths.

    A line is ``path[ label[ group]]``: ``a.png``, ``a.png 3``, ``a.png 3 hospital B``. A path with
    blanks may stand in double quotes (a quote inside is doubled), or the columns are separated by
    tabs; then a label may be empty. Without quotes and tabs the last word is the label where it is
    an integer, and a group needs a path that ends like an image. Paths are relative to the list's
    folder.

    Raises:
        DataError: the list cannot be read, or its lines differ in their columns.
    """
    if not path.is_file():
        raise DataError(f"got spec {spec.text!r}; {path} is a folder, a text file was needed")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"got spec {spec.text!r}; cannot read {path}: {error}") from None
    lines: list[_Line] = []
    # Not splitlines(): it would cut names at characters such as U+2028.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        lines.append(_parsed(line, where))
        for what in ("label", "group"):
            if (getattr(lines[-1], what) is None) != (getattr(lines[0], what) is None):
                raise DataError(
                    f"{where}: some lines have a {what} and some have none; give every line one, "
                    f"or none. {_LIST_HELP}"
                )
    files = [Path(line.path) for line in lines]
    files = [file if file.is_absolute() else path.parent / file for file in files]
    known = [line.label for line in lines if line.label is not None]
    large = next((label for label in known if abs(label) >= 2**63), None)
    if large is not None:
        raise DataError(f"{spec.text}: got the label {large}; needed class numbers")
    labels = np.array(known, dtype=np.int64) if known else None
    groups = [line.group for line in lines if line.group is not None]
    return FileSource(spec.text, files, path.parent, labels, None, _grouped(groups, spec.text))


def _parsed(line: str, where: str) -> _Line:
    if "\t" in line:
        return _tabbed(line, where)
    line = line.strip()
    if line.startswith('"'):
        match = _QUOTED.fullmatch(line)
        if match is None:
            raise DataError(f"{where}: got {line!r}; {_LIST_HELP}")
        label = None if match["label"] is None else int(match["label"])
        return _Line(match["path"].replace('""', '"'), label, match["group"])
    name, _, last = line.rpartition(" ")
    labelled = bool(name) and _INTEGER.fullmatch(last) is not None
    match = _THREE.fullmatch(line)
    # `my 1.png 2 b.png 4` is a path with a label: the longest path that ends like an image.
    if match is not None and not (labelled and name.rstrip().lower().endswith(EXTENSIONS)):
        return _Line(match["path"], int(match["label"]), match["group"].strip())
    if labelled:
        return _Line(name.rstrip(), int(last))
    return _Line(line)


def _tabbed(line: str, where: str) -> _Line:
    columns = [column.strip() for column in line.split("\t")]
    name = columns[0]
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = name[1:-1].replace('""', '"')
    label = columns[1]
    if not name or len(columns) > 3 or (label and not _INTEGER.fullmatch(label)):
        raise DataError(
            f"{where}: got {columns}; needed a path, an integer label and a group, separated by "
            f"tabs. {_LIST_HELP}"
        )
    group = columns[2] if len(columns) == 3 and columns[2] else None
    return _Line(name, int(label) if label else None, group)


def _grouped(groups: list[str], source: str) -> Array | None:
    if not groups:
        return None
    whole = all(_INTEGER.fullmatch(group) and len(group) < 19 for group in groups)
    values = np.array([int(group) for group in groups]) if whole else np.array(groups)
    return checked_groups(values, len(groups), source)
