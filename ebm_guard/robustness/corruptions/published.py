"""Published corrupted sets: CIFAR-10-C's arrays and ImageNet-C's folders, as image sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebm_guard.data.sources import ArraySource, ImageSource, integer_labels
from ebm_guard.data.sources.files import FileSource, open_folder
from ebm_guard.data.specs import Spec
from ebm_guard.errors import DataError, InvalidInputError, suggest
from ebm_guard.files import DAMAGED_NPZ
from ebm_guard.robustness.corruptions.builtin import SEVERITIES, check_severity
from ebm_guard.robustness.corruptions.extra import IMAGENET_C

# Four more for choosing settings; both sets have them.
VALIDATION = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
_GROUPS = ("noise", "blur", "weather", "digital", "extra")
_ROWS, _SIDE = 10_000, 32


class CorruptedImages(NamedTuple):
    """The images of one corruption and severity.

    Args:
        name: of the corruption.
        severity: 1..5.
        source: the images.
    """

    name: str
    severity: int
    source: ImageSource


@dataclass(frozen=True)
class PublishedSet:
    """A published corrupted set; iterating opens one source after the other.

    Args:
        title: what reports call it.
        folder: where it lies.
        names: of the corruptions, in order.
        severities: in order.
        labels: (10,000,) of CIFAR-10-C's images; None where folders give them.
    """

    title: str
    folder: Path
    names: tuple[str, ...]
    severities: tuple[int, ...]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Return the number of (name, severity) pairs."""
        return len(self.names) * len(self.severities)

    def __iter__(self) -> Iterator[CorruptedImages]:
        """Yield the sources, severities of one corruption together.

        Raises:
            DataError: a file or folder is damaged, or holds other images than the first one.
        """
        first: CorruptedImages | None = None
        for name in self.names:
            for severity in self.severities:
                found = CorruptedImages(name, severity, self._open(name, severity))
                first = first or found
                _check_same(first, found)
                yield found

    def _open(self, name: str, severity: int) -> ImageSource:
        if self.labels is None:
            return _folder_source(_type_folder(self.folder, name) / str(severity))
        images = _opened(self.folder / f"{name}.npy")
        rows = slice((severity - 1) * _ROWS, severity * _ROWS)
        spec = f"{self.folder / name}.npy[{rows.start}:{rows.stop}]"
        numbers = np.arange(_ROWS, dtype=np.int64)
        return ArraySource(spec, images[rows], numbers, self.labels, None)


def open_cifar10_c(
    folder: str | Path,
    names: Sequence[str] = IMAGENET_C,
    severities: Sequence[int] = SEVERITIES,
) -> PublishedSet:
    """Open CIFAR-10-C: a folder of NAME.npy and labels.npy; CIFAR-100-C lies in the same way.

    Each NAME.npy is uint8 (50000, 32, 32, 3): the 10,000 test images five times, the lowest
    severity first. Files are memory-mapped and never unpickled. The ids of the images are their
    numbers in the test set, which is in the standard order.

    Args:
        folder: the unpacked archive.
        names: corruptions; default: the fifteen standard ones.
        severities: of 1..5.

    Raises:
        DataError: a file is missing, damaged, or of another shape or type.
        InvalidInputError: an unknown name or severity.

    References:
        Hendrycks and Dietterich, ICLR 2019, section 3; the files: zenodo.org/records/2535967.

    Example:
        >>> open_cifar10_c("CIFAR-10-C")  # doctest: +SKIP
        PublishedSet(title='CIFAR-10-C', ...)
    """
    folder, names, severities = _checked(folder, names, severities)
    missing = [name for name in names if not (folder / f"{name}.npy").is_file()]
    if missing:
        raise DataError(
            f"{folder} has no {missing[0]}.npy; a folder of CIFAR-10-C holds NAME.npy for each "
            "corruption, and labels.npy. Give the unpacked archive, or name the corruptions there"
        )
    for name in names:
        _opened(folder / f"{name}.npy")
    labels = _labels(folder / "labels.npy")
    title = "CIFAR-10-C" if labels.max() < 10 else "CIFAR-100-C"
    return PublishedSet(title, folder, names, severities, labels)


def open_imagenet_c(
    folder: str | Path,
    names: Sequence[str] = IMAGENET_C,
    severities: Sequence[int] = SEVERITIES,
) -> PublishedSet:
    """Open ImageNet-C: ROOT/TYPE/SEVERITY/CLASS/*.JPEG, or ROOT/GROUP/TYPE/... as it is unpacked.

    The images are cropped to 224 pixels already: a model of that input size gets them as they are,
    without a second crop. Classes are numbered by their WordNet ids in order.

    Args:
        folder: ROOT.
        names: corruptions; default: the fifteen standard ones.
        severities: of 1..5.

    Raises:
        DataError: a folder is missing or holds no images.
        InvalidInputError: an unknown name or severity.

    References:
        Hendrycks and Dietterich, ICLR 2019, section 3; the files: zenodo.org/records/2235448.

    Example:
        >>> open_imagenet_c("ImageNet-C", names=["fog"])  # doctest: +SKIP
        PublishedSet(title='ImageNet-C', ...)
    """
    folder, names, severities = _checked(folder, names, severities)
    for name in names:
        kind = _type_folder(folder, name)
        for severity in severities:
            if not (kind / str(severity)).is_dir():
                raise DataError(
                    f"{kind} has no folder {severity}; ImageNet-C is ROOT/TYPE/SEVERITY/CLASS/"
                    f"*.JPEG with severities 1 to 5. Unpack {name} again, or ask for the "
                    "severities that are there"
                )
    return PublishedSet("ImageNet-C", folder, names, severities)


def open_corrupted(folder: str | Path, severities: Sequence[int] = SEVERITIES) -> PublishedSet:
    """Open CIFAR-10-C or ImageNet-C, whichever layout the folder has.

    Args:
        folder: with NAME.npy files, or with folders of the corruptions.
        severities: of 1..5.

    Raises:
        DataError: neither layout, or see the two functions.

    Example:
        >>> open_corrupted("CIFAR-10-C")  # doctest: +SKIP
        PublishedSet(title='CIFAR-10-C', ...)
    """
    folder = Path(folder)
    arrays = any(folder.glob("*.npy"))
    opened = open_cifar10_c if arrays else open_imagenet_c
    # A part of the set will do; mCE is then left out, and says why.
    there = [name for name in IMAGENET_C if _is_there(folder, name, arrays=arrays)]
    return opened(folder, there or IMAGENET_C, severities)


def _is_there(folder: Path, name: str, *, arrays: bool) -> bool:
    if arrays:
        return (folder / f"{name}.npy").is_file()
    return any((folder / group / name).is_dir() for group in ("", *_GROUPS))


def _checked(
    folder: str | Path, names: Sequence[str], severities: Sequence[int]
) -> tuple[Path, tuple[str, ...], tuple[int, ...]]:
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"got {folder}, which is not a folder; needed the unpacked archive")
    known = (*IMAGENET_C, *VALIDATION)
    for name in names:
        if name not in known:
            raise InvalidInputError(
                f"got corruption {name!r}{suggest(name, known)}; known are {', '.join(known)}"
            )
    for severity in severities:
        check_severity(severity)
    if not names or not severities:
        raise InvalidInputError("got no corruptions or no severities; needed at least one of each")
    return folder, tuple(dict.fromkeys(names)), tuple(sorted(set(severities)))


def _opened(path: Path) -> NDArray[np.uint8]:
    images = _load(path)
    wanted = (5 * _ROWS, _SIDE, _SIDE, 3)
    if images.dtype != np.uint8 or images.shape != wanted:
        raise DataError(
            f"{path} is {images.dtype} {images.shape}; needed uint8 {wanted}: the 10,000 test "
            "images at severity 1, then at 2, and so on. Unpack the archive again; sets of your "
            "own go in as npz:FILE"
        )
    return images


def _labels(path: Path) -> NDArray[np.int64]:
    if not path.is_file():
        raise DataError(f"{path.parent} has no labels.npy; it is in CIFAR-10-C's archive")
    labels = integer_labels(_load(path), 5 * _ROWS, str(path)).reshape(5, _ROWS)
    if (labels != labels[0]).any():
        raise DataError(
            f"{path} does not repeat the same 10,000 labels five times, so its rows are not in "
            "CIFAR-10-C's order; unpack the archive again"
        )
    first: NDArray[np.int64] = labels[0]
    return first


def _load(path: Path) -> NDArray[Any]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGED_NPZ as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(found, np.ndarray):
        found.close()
        raise DataError(f"{path} is an archive of arrays; needed one array (np.save)")
    return found


def _type_folder(folder: Path, name: str) -> Path:
    places = [folder / name, *(folder / group / name for group in _GROUPS)]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise DataError(
            f"{folder} has no folder {name}; ImageNet-C is ROOT/TYPE/SEVERITY/CLASS/*.JPEG (or "
            "ROOT/GROUP/TYPE/...). Give its root, or name the corruptions that are there"
        )
    return found


def _folder_source(path: Path) -> FileSource:
    source = open_folder(Spec(str(path), "folder", str(path)), path)
    if not isinstance(source, FileSource) or source.labels is None:
        raise DataError(
            f"{path} has no folders of classes; ImageNet-C is ROOT/TYPE/SEVERITY/CLASS/*.JPEG"
        )
    # Cropped by its makers: resizing and cropping again would be another data set.
    source.is_array = True
    return source


def _check_same(first: CorruptedImages, other: CorruptedImages) -> None:
    if first.source.ids == other.source.ids:
        return
    raise DataError(
        f"{other.source.spec} ({len(other.source)} images) does not hold the same images as "
        f"{first.source.spec} ({len(first.source)}); figures of one table must be of the same "
        "images. Unpack the archive again, or take the same images out everywhere"
    )
