"""Arrays of images: npz files and the embedded demo."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ebm_guard.data.sources.base import Array, ImageSource, Labels
from ebm_guard.data.specs import Spec
from ebm_guard.errors import DataError, EbmGuardWarning, suggest
from ebm_guard.files import DAMAGED_NPZ, read_arrays

# What a bare `demo:` means for each option.
_DEMO_ROLES = {"fit": "train", "validation": "calibration", "ood": "far_ood"}


class ArraySource(ImageSource):
    """Images in memory, uint8 (N, H, W) or (N, H, W, C)."""

    is_array = True

    def __init__(
        self,
        spec: str,
        images: Array,
        rows: Labels,
        labels: Labels | None,
        classes: tuple[str, ...] | None,
        groups: Array | None = None,
    ) -> None:
        """Args: ``images`` holds the kept rows; ``rows`` their numbers in the file."""
        super().__init__(spec, [str(row) for row in rows], labels, classes, groups)
        self._images = images

    def load(self, index: int) -> Image.Image:
        """Return one row as an image."""
        image = self._images[index]
        return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def read_npz(spec: Spec, path: Path, names: Sequence[str]) -> dict[str, Array]:
    """Read some arrays of an npz file, without ever unpickling.

    Raises:
        DataError: not an npz file, damaged, or an array holds Python objects.
    """
    try:
        # Opened here: numpy leaves its own handle open when it fails half-way.
        with path.open("rb") as handle:
            return read_arrays(handle, names)
    except DAMAGED_NPZ as error:
        raise DataError(f"got spec {spec.text!r}; cannot read {path}: {error}") from None


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays in an npz file."""
    with path.open("rb") as handle, zipfile.ZipFile(handle) as file:
        return [name.removesuffix(".npy") for name in file.namelist()]


def names_in(arrays: Mapping[str, Array], name: str, source: str) -> tuple[str, ...] | None:
    """Return an array of names as text, or None where it is not there.

    Raises:
        DataError: not one text or number each.
    """
    values = arrays.get(name)
    if values is None:
        return None
    if values.ndim != 1 or values.dtype.kind not in "USbiuf":
        raise DataError(
            f"got {source} with `{name}` of shape {values.shape} and dtype {values.dtype}; needed "
            "one name each, (N,) text"
        )
    return tuple(map(str, values))


def integer_labels(labels: Array, n: int, source: str) -> Labels:
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


def checked_groups(groups: Array, n: int, source: str) -> Array:
    """Check that groups are one integer or text per row; return int64 or numpy's unicode.

    Raises:
        DataError: another shape or type.
    """
    if groups.shape != (n,):
        raise DataError(
            f"got {source} with {n} rows of data and groups of shape {groups.shape}; needed one "
            "group a row"
        )
    if groups.dtype.kind in "biu":
        return groups.astype(np.int64)
    if groups.dtype.kind == "U":
        return groups
    if groups.dtype.kind == "S":
        try:
            return np.char.decode(groups, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"got {source} with groups that are not UTF-8: {error}") from None
    raise DataError(f"got {source} with {groups.dtype} groups; needed integers or text")


def open_npz(spec: Spec, path: Path) -> ImageSource:
    """Open ``npz:FILE``: ``images``, and optional ``labels``, ``groups`` and ``classes``.

    Raises:
        DataError: missing, damaged or malformed arrays, or a selection without rows.
    """
    prefix = f"{spec.split}_" if spec.split else ""
    wanted = (f"{prefix}images", f"{prefix}labels", f"{prefix}groups", "classes")
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
    names = names_in(arrays, "classes", spec.text)
    labels = None if labels is None else integer_labels(labels, len(images), spec.text)
    groups = arrays.get(wanted[2])
    groups = None if groups is None else checked_groups(groups, len(images), spec.text)
    rows, labels, names = _selected(spec, len(images), labels, names)
    groups = None if groups is None else groups[rows]
    return ArraySource(spec.text, images[rows], rows, labels, names, groups)


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
    spec: Spec, n: int, labels: Labels | None, names: tuple[str, ...] | None
) -> tuple[Labels, Labels | None, tuple[str, ...] | None]:
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
    # As the spec reads: the slice is of the file's rows, the classes are picked from it.
    if spec.rows is not None:
        rows = rows[spec.rows]
    if spec.classes is not None and labels is not None:
        without = int((labels[rows] == -1).sum())
        if without:
            warnings.warn(
                f"{spec.text}: {without:,} rows without label (-1) are left out by ?classes=; to "
                "train on them give them in a set of their own, as unlabelled",
                EbmGuardWarning,
                stacklevel=2,
            )
        rows = rows[np.isin(labels[rows], spec.classes)]
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


def open_demo(spec: Spec, role: str) -> ImageSource:
    """Open the embedded demo: the role's own rows, or those of the role that the spec names."""
    from ebm_guard.data.demo import load_demo

    demo = load_demo(spec.path or _DEMO_ROLES.get(role, role))
    rows = np.arange(len(demo.images), dtype=np.int64)
    return ArraySource(spec.text, demo.images, rows, demo.labels, demo.classes)
