"""What every image source offers: ids, labels, groups, and one image at a time."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ebm_guard.errors import DataError

Array = NDArray[Any]
Labels = NDArray[np.int64]


class ImageSource(ABC):
    """Images with ids and, where known, labels and groups.

    Args:
        spec: the spec as the user wrote it.
        ids: one name per image, unique within the source.
        labels: (N,) int64, or None.
        classes: class names in label order, or None.
        groups: (N,) int64 or text, for figures per group, or None.
    """

    is_array = False
    # The classes are numbered by their sorted names, so other sorting would give other numbers.
    sorted_classes = False
    # A sentence, where a class map gave the numbers.
    class_map = ""

    def __init__(
        self,
        spec: str,
        ids: Sequence[str],
        labels: Labels | None,
        classes: tuple[str, ...] | None,
        groups: Array | None = None,
    ) -> None:
        if not ids:
            raise DataError(f"got no images from {spec!r}; needed at least one")
        self.spec = spec
        self.ids = tuple(ids)
        self.labels = labels
        self.classes = classes
        self.groups = groups

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    @property
    def total(self) -> int | None:
        """Number of images, or None where only reading them would tell."""
        return len(self)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Decode one image.

        Raises:
            DataError: the image cannot be read.
        """

    def subset(self, rows: Labels) -> ImageSource:
        """Return the same source with some of its rows."""
        return _Subset(self, rows)

    def without_labels(self) -> ImageSource:
        """Return the same source without labels, as for OOD sets, whose classes are others."""
        new = copy.copy(self)
        new.labels = None
        return new


class _Subset(ImageSource):
    def __init__(self, base: ImageSource, rows: Labels) -> None:
        labels = None if base.labels is None else base.labels[rows]
        groups = None if base.groups is None else base.groups[rows]
        ids = [base.ids[row] for row in rows]
        super().__init__(base.spec, ids, labels, base.classes, groups)
        self.is_array = base.is_array
        self.sorted_classes, self.class_map = base.sorted_classes, base.class_map
        self._base, self._rows = base, rows

    def load(self, index: int) -> Image.Image:
        return self._base.load(int(self._rows[index]))


class StreamSource(ImageSource):
    """Images that come one after the other, in one order; ids are their numbers.

    There are no ids, labels or groups before the images have been read, and no image can be asked
    for again. ``total`` is what the data set says about itself, or None.

    Args:
        spec: the spec as the user wrote it.
        classes: class names in label order, or None.
        total: number of images as the data set declares it, or None.
    """

    def __init__(self, spec: str, classes: tuple[str, ...] | None, total: int | None) -> None:
        self.spec = spec
        self.ids = ()
        self.labels = None
        self.classes = classes
        self.groups = None
        self.labelled = True
        self._total = total
        self._chosen: frozenset[int] | None = None

    def __len__(self) -> int:
        """Return the declared number of images.

        Raises:
            TypeError: it is not known.
        """
        if self.total is None:
            raise TypeError(f"{self.spec} is a stream of unknown length")
        return self.total

    @property
    def total(self) -> int | None:
        """Number of images that will come, as far as the data set declares it."""
        return self._total if self._chosen is None else len(self._chosen)

    @abstractmethod
    def read(self) -> Iterator[tuple[Image.Image, int | None]]:
        """Yield (image, label) from the beginning.

        Raises:
            DataError: the stream cannot be read.
        """

    def rows(self) -> Iterator[tuple[str, Image.Image, int | None]]:
        """Yield (id, image, label) of the chosen rows."""
        for number, (image, label) in enumerate(self.read()):
            if self._chosen is None or number in self._chosen:
                yield str(number), image, label if self.labelled else None

    def load(self, index: int) -> Image.Image:
        """Refuse.

        Raises:
            DataError: always; a stream has no random access.
        """
        raise DataError(f"{self.spec} is a stream; row {index} cannot be asked for alone")

    def subset(self, rows: Labels) -> StreamSource:
        """Return the same stream, of which only some rows are given; all are still read."""
        new = copy.copy(self)
        kept = rows if self._chosen is None else np.array(sorted(self._chosen))[rows]
        new._chosen = frozenset(kept.tolist())
        return new

    def behind(self, done: int) -> StreamSource:
        """Return the same stream without its first rows; the others keep their numbers."""
        return _Behind(self, done)

    def without_labels(self) -> StreamSource:
        """Return the same stream without its labels."""
        new = copy.copy(self)
        new.labelled = False
        return new


class _Behind(StreamSource):
    """A stream without its first rows; the others keep their numbers."""

    def __init__(self, base: StreamSource, done: int) -> None:
        total = None if base.total is None else max(0, base.total - done)
        super().__init__(base.spec, base.classes, total)
        self._base, self._done = base, done

    def read(self) -> Iterator[tuple[Image.Image, int | None]]:
        yield from itertools.islice(self._base.read(), self._done, None)

    def rows(self) -> Iterator[tuple[str, Image.Image, int | None]]:
        yield from itertools.islice(self._base.rows(), self._done, None)
