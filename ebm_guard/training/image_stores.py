"""Where the pixels of training images lie: in memory, in files, or in two places."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.data.images import to_input
from ebm_guard.data.sources import ImageSource
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.model import Preprocessing

Rows = NDArray[np.int64]
# Values this near to whole 256ths came from bytes, and are kept as bytes.
_GRID_TOLERANCE = 0.01


class Store(ABC):
    """Pixels by row number.

    Attributes:
        in_memory: whether looking at all of them costs no decoding.
    """

    in_memory: bool

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def pixels(self, rows: Rows) -> Tensor:
        """Return some images, (B, C, H, W) float32 in [0, 1]."""

    @abstractmethod
    def select(self, rows: Rows) -> Store:
        """Return a store of some of the images, in the given order."""


class InMemory(Store):
    """A tensor of images.

    Args:
        images: (N, C, H, W), uint8 or float32 in [0, 1].
    """

    in_memory = True

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def pixels(self, rows: Rows) -> Tensor:
        """Return some images."""
        part = self._images[torch.from_numpy(rows)]
        return part.float() / 255 if part.dtype == torch.uint8 else part.float()

    def select(self, rows: Rows) -> InMemory:
        """Return a store of some of them."""
        return InMemory(self._images[torch.from_numpy(rows)])


class Decoded(Store):
    """Images that are decoded when they are asked for.

    Args:
        source: whose rows can be asked for alone.
        preprocessing: of the model.
    """

    in_memory = False

    def __init__(self, source: ImageSource, preprocessing: Preprocessing) -> None:
        self._source, self._preprocessing = source, preprocessing

    def __len__(self) -> int:
        return len(self._source)

    def pixels(self, rows: Rows) -> Tensor:
        """Decode some images.

        Raises:
            DataError: an image cannot be read, or they differ in size.
        """
        made = [
            to_input(
                self._source.load(int(row)), self._preprocessing, is_array=self._source.is_array
            )
            for row in rows
        ]
        if len({image.shape for image in made}) > 1:
            raise DataError(
                f"{self._source.spec}: got images of different sizes; give --img-size (image_size=)"
            )
        if not made:
            return torch.empty(0, self._preprocessing.channels, 0, 0)
        return self._preprocessing.denormalize(torch.from_numpy(np.stack(made)))

    def select(self, rows: Rows) -> Decoded:
        """Return a store of some of them."""
        return Decoded(self._source.subset(rows), self._preprocessing)


class Joined(Store):
    """Two stores of one image shape, one behind the other.

    Args:
        first: rows 0 to len(first) - 1.
        second: the rows behind.
        rows: (N,) the rows that belong to this store; default: all.
    """

    def __init__(self, first: Store, second: Store, rows: Rows | None = None) -> None:
        self._first, self._second = first, second
        self._rows = np.arange(len(first) + len(second)) if rows is None else rows
        self.in_memory = first.in_memory and second.in_memory

    def __len__(self) -> int:
        return len(self._rows)

    def pixels(self, rows: Rows) -> Tensor:
        """Return some images of either."""
        wanted = self._rows[rows]
        behind = wanted >= len(self._first)
        order = np.argsort(np.argsort(behind, kind="stable"), kind="stable")
        # A part without rows may not know the size of its images.
        parts = [
            store.pixels(own)
            for store, own in (
                (self._first, wanted[~behind]),
                (self._second, wanted[behind] - len(self._first)),
            )
            if len(own)
        ]
        return torch.cat(parts)[torch.from_numpy(order)] if parts else self._first.pixels(rows)

    def select(self, rows: Rows) -> Joined:
        """Return a store of some of them."""
        return Joined(self._first, self._second, self._rows[rows])


def stored(images: Tensor, source: str) -> Tensor:
    """Check a tensor of images and keep it small.

    Args:
        images: (N, C, H, W), uint8 or floating in [0, 1].
        source: for messages.

    Raises:
        InvalidInputError: no images, another shape or dtype, or values outside [0, 1].

    Example:
        >>> stored(torch.ones(1, 1, 2, 2), "ones").dtype
        torch.uint8
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.numel():
        shape = tuple(getattr(images, "shape", ()))
        raise InvalidInputError(
            f"got {source} as {type(images).__name__} of shape {shape}; needed images "
            "(N, C, H, W), N >= 1"
        )
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise InvalidInputError(f"got {source} of dtype {images.dtype}; needed uint8 or floats")
    Preprocessing((0.0,) * images.shape[1], (1.0,) * images.shape[1]).check_pixels(images)
    return as_bytes(images)


def as_bytes(pixels: Tensor) -> Tensor:
    """Keep pixels that came from bytes as bytes, a quarter of the memory.

    Args:
        pixels: (N, C, H, W) in [0, 1].
    """
    scaled = pixels * 255
    whole = scaled.round()
    near = bool(((scaled - whole).abs() <= _GRID_TOLERANCE).all())
    return whole.to(torch.uint8) if near else pixels.float()
