"""Image sources: folders, lists of files, npz arrays and the demo, behind one small interface."""

from __future__ import annotations

import lzma
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ebm_guard.data.specs import IMAGE_KINDS, Spec, existing_path, parse_spec
from ebm_guard.errors import DataError, InvalidInputError, suggest

__all__ = ["ImageSource", "Spec", "open_source", "parse_spec"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_INTEGER = re.compile(r"-?[0-9]+")
# Whatever the zip module and its decompressors raise on damaged files.
_DAMAGED = (
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
# What a bare `demo:` means for each option.
_DEMO_ROLES = {"fit": "train", "validation": "calibration", "ood": "far_ood"}
Array = NDArray[Any]


class ImageSource(ABC):
    """Images with ids and, where known, labels.

    Args:
        spec: the spec as the user wrote it.
        ids: one name per image, unique within the source.
        labels: (N,) int64, or None.
        classes: class names in label order, or None.
    """

    is_array = False

    def __init__(
        self,
        spec: str,
        ids: Sequence[str],
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...] | None,
    ) -> None:
        if not ids:
            raise DataError(f"got no images from {spec!r}; needed at least one")
        self.spec = spec
        self.ids = tuple(ids)
        self.labels = labels
        self.classes = classes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Decode one image.

        Raises:
            DataError: the image cannot be read.
        """

    def subset(self, rows: NDArray[np.int64]) -> ImageSource:
        """Return the same source with some of its rows."""
        return _Subset(self, rows)


class _Subset(ImageSource):
    def __init__(self, base: ImageSource, rows: NDArray[np.int64]) -> None:
        labels = None if base.labels is None else base.labels[rows]
        super().__init__(base.spec, [base.ids[row] for row in rows], labels, base.classes)
        self.is_array = base.is_array
        self._base, self._rows = base, rows

    def load(self, index: int) -> Image.Image:
        return self._base.load(int(self._rows[index]))


class FileSource(ImageSource):
    """Image files on disk."""

    def __init__(
        self,
        spec: str,
        files: Sequence[Path],
        root: Path,
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...] | None,
    ) -> None:
        names = [
            str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
            for file in files
        ]
        super().__init__(spec, names, labels, classes)
        self._files = tuple(files)

    def load(self, index: int) -> Image.Image:
        """Decode one file completely, so that a truncated one fails here."""
        file = self._files[index]
        try:
            with Image.open(file) as image:
                image.load()
                return image.copy()
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read image {file}: {error}") from None


class ArraySource(ImageSource):
    """Images in memory, uint8 (N, H, W) or (N, H, W, C)."""

    is_array = True

    def __init__(
        self,
        spec: str,
        images: Array,
        rows: NDArray[np.int64],
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...] | None,
    ) -> None:
        """Args: ``images`` holds the kept rows; ``rows`` their numbers in the file."""
        super().__init__(spec, [str(row) for row in rows], labels, classes)
        self._images = images

    def load(self, index: int) -> Image.Image:
        """Return one row as an image."""
        image = self._images[index]
        return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def open_source(spec: Spec | str, role: str = "evaluation") -> ImageSource:
    """Open an image source.

    Args:
        spec: a spec, or its text.
        role: data role of the option that names it; ``demo:`` serves that role's own rows.

    Raises:
        InvalidInputError: the spec is malformed, or is of a kind without images.
        DataError: the data is missing, empty or malformed.

    Example:
        >>> len(open_source("demo:")) > 0
        True
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    if spec.kind not in IMAGE_KINDS:
        raise InvalidInputError(f"got spec {spec.text!r}, which holds no images; needed images")
    if spec.kind == "demo":
        return _open_demo(spec, role)
    path = existing_path(spec)
    if spec.kind == "npz":
        return _open_npz(spec, path)
    return _open_list(spec, path) if spec.kind == "list" else _open_folder(spec, path)


def _open_folder(spec: Spec, path: Path) -> ImageSource:
    if not path.is_dir():
        raise DataError(
            f"got spec {spec.text!r}, a file; a folder was needed. For arrays write npz:{path}, "
            f"for a list of files list:{path}"
        )
    folders = sorted(item for item in path.iterdir() if item.is_dir() and item.name[0] != ".")
    if not folders:
        files = _images_in(path, deep=False)
        if not files:
            raise DataError(f"got {path}, a folder without images ({', '.join(EXTENSIONS)})")
        return FileSource(spec.text, files, path, None, None)
    files, labels = [], []
    for label, folder in enumerate(folders):
        inside = _images_in(folder, deep=True)
        files.extend(inside)
        labels.extend([label] * len(inside))
    if not files:
        raise DataError(f"got {path}, whose {len(folders)} sub-folders hold no images")
    names = tuple(folder.name for folder in folders)
    return FileSource(spec.text, files, path, np.array(labels, dtype=np.int64), names)


def _images_in(folder: Path, *, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in found if file.suffix.lower() in EXTENSIONS and file.is_file())


def _open_list(spec: Spec, path: Path) -> ImageSource:
    if not path.is_file():
        raise DataError(f"got spec {spec.text!r}; {path} is a folder, a text file was needed")
    files: list[Path] = []
    labels: list[int | None] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"got spec {spec.text!r}; cannot read {path}: {error}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, _, last = line.strip().rpartition(" ")
        if name and _INTEGER.fullmatch(last):
            labels.append(int(last))
        else:
            name = line.strip()
            labels.append(None)
        file = Path(name)
        files.append(file if file.is_absolute() else path.parent / file)
        if (labels[-1] is None) != (labels[0] is None):
            raise DataError(
                f"{path}, line {number}: some lines have a label and some have none; give every "
                "line one (`path label`), or none"
            )
    known = [label for label in labels if label is not None]
    return FileSource(
        spec.text, files, path.parent, np.array(known, dtype=np.int64) if known else None, None
    )


def read_npz(spec: Spec, path: Path, names: Sequence[str]) -> dict[str, Array]:
    """Read some arrays of an npz file, without ever unpickling.

    Raises:
        DataError: not an npz file, damaged, or an array holds Python objects.
    """
    try:
        # Opened here: numpy leaves its own handle open when it fails half-way.
        with path.open("rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"got {path}, a single array; needed an .npz file (np.savez)")
            return {name: file[name] for name in names if name in file.files}
    except _DAMAGED as error:
        raise DataError(f"got spec {spec.text!r}; cannot read {path}: {error}") from None


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays in an npz file."""
    with path.open("rb") as handle, zipfile.ZipFile(handle) as file:
        return [name.removesuffix(".npy") for name in file.namelist()]


def integer_labels(labels: Array, n: int, source: str) -> NDArray[np.int64]:
    """Check that labels are one integer per row.

    Raises:
        DataError: another shape, or names or fractions instead of class numbers.
    """
    if labels.shape != (n,):
        raise DataError(
            f"got {source} with {n} rows of data and labels of shape {labels.shape}; needed one "
            "label a row"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"got {source} with {labels.dtype} labels; needed integer class numbers. Names of "
            "classes go into the array `classes`, in the order of the numbers"
        )
    return labels.astype(np.int64)


def _open_npz(spec: Spec, path: Path) -> ImageSource:
    prefix = f"{spec.split}_" if spec.split else ""
    wanted = (f"{prefix}images", f"{prefix}labels", "classes")
    arrays = read_npz(spec, path, wanted)
    if wanted[0] not in arrays:
        held = npz_names(path)
        raise DataError(
            f"got spec {spec.text!r}; {path.name} holds {', '.join(held)}, needed {wanted[0]!r}"
            f"{suggest(wanted[0], held)}. A split is named with #: npz:FILE#test; stored logits "
            "with logits:FILE"
        )
    images = _checked_images(spec, arrays[wanted[0]])
    labels = arrays.get(wanted[1])
    names = tuple(map(str, arrays["classes"])) if "classes" in arrays else None
    labels = None if labels is None else integer_labels(labels, len(images), spec.text)
    rows, labels, names = _selected(spec, len(images), labels, names)
    return ArraySource(spec.text, images[rows], rows, labels, names)


def _checked_images(spec: Spec, images: Array) -> Array:
    if images.dtype != np.uint8:
        looks = ""
        if np.issubdtype(images.dtype, np.floating) and images.size:
            looks = f" in [{images.min():.3g}, {images.max():.3g}]"
            looks += ", which look normalised already" if images.min() < 0 else ""
        raise DataError(
            f"got spec {spec.text!r} with {images.dtype} images{looks}; needed uint8 pixels 0..255"
        )
    if images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3)):
        return images
    raise DataError(
        f"got spec {spec.text!r} with images of shape {images.shape}; needed (N, H, W) or "
        "(N, H, W, C) with 1 or 3 channels"
    )


def _selected(
    spec: Spec, n: int, labels: NDArray[np.int64] | None, names: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, tuple[str, ...] | None]:
    rows = np.arange(n, dtype=np.int64)
    if spec.classes is not None:
        if labels is None:
            raise DataError(f"got spec {spec.text!r}; ?classes= needs labels, the file has none")
        missing = sorted(set(spec.classes) - set(labels.tolist()))
        if missing and len(labels):
            raise DataError(
                f"got spec {spec.text!r}; no row has label {', '.join(map(str, missing))}; the "
                f"labels are {int(labels.min())}..{int(labels.max())}"
            )
        rows = rows[np.isin(labels, spec.classes)]
    if spec.rows is not None:
        rows = rows[spec.rows]
    if not len(rows):
        raise DataError(f"got spec {spec.text!r}, which selects none of {n} rows")
    if labels is None:
        return rows, None, names
    kept = labels[rows]
    if spec.classes is not None:
        place = {old: new for new, old in enumerate(spec.classes)}
        kept = np.array([place[int(label)] for label in kept], dtype=np.int64)
        if names is not None and max(spec.classes) < len(names):
            names = tuple(names[old] for old in spec.classes)
    return rows, kept, names


def _open_demo(spec: Spec, role: str) -> ImageSource:
    from ebm_guard.data.demo import load_demo

    demo = load_demo(spec.path or _DEMO_ROLES.get(role, role))
    rows = np.arange(len(demo.images), dtype=np.int64)
    return ArraySource(spec.text, demo.images, rows, demo.labels, demo.classes)
