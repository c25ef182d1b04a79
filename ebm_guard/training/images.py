"""Images for training: pixels in [0, 1] by row number, in memory or decoded when asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.data.sources import ImageSource, StreamSource
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.model import EnergyClassifier, Preprocessing
from ebm_guard.predictions import as_batch, check_labels, hash_inputs
from ebm_guard.training.class_losses import UNLABELLED
from ebm_guard.training.image_stores import (
    Decoded,
    InMemory,
    Joined,
    Rows,
    Store,
    as_bytes,
    stored,
)

_CHUNK = 256


class TrainingImages:
    """Images with their labels, asked for by row number.

    Args:
        images: (N, C, H, W), uint8 or floating in [0, 1], in memory.
        labels: (N,) integers, or None.
        source: where they come from, in words.

    Raises:
        InvalidInputError: no images, values outside [0, 1], or labels that do not fit.

    Example:
        >>> images = TrainingImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
        >>> images.pixels(np.array([0, 3])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None = None, *, source: str = "arrays"
    ) -> None:
        self._store: Store = InMemory(stored(images, source))
        self._hashes: NDArray[np.uint64] | None = None
        self.labels = _checked_labels(labels, len(images), source)
        self.source = source

    @classmethod
    def of_source(cls, source: ImageSource, preprocessing: Preprocessing) -> TrainingImages:
        """Decode the images of a source when they are asked for, prepared as the model takes them.

        Args:
            source: images whose rows can be asked for alone.
            preprocessing: the model's settings.

        Raises:
            InvalidInputError: a stream, or image files without an input size.
        """
        if isinstance(source, StreamSource):
            raise InvalidInputError(
                f"got {source.spec}, a stream; training draws its images at random. Give a "
                "folder, a list or an npz file"
            )
        if preprocessing.image_size is None and not source.is_array:
            raise InvalidInputError(
                "image files need an input size, and the model has no pretrained_cfg: give "
                "--img-size (image_size=)"
            )
        made = cls.__new__(cls)
        made._store, made._hashes = Decoded(source, preprocessing), None
        labels = None if source.labels is None else torch.from_numpy(source.labels)
        made.labels = _checked_labels(labels, len(source), source.spec)
        made.source = source.spec
        return made

    @classmethod
    def of_arrays(
        cls, images: NDArray[Any], labels: NDArray[Any] | None = None, *, source: str = "arrays"
    ) -> TrainingImages:
        """Take numpy images as npz files hold them: (N, H, W) or (N, H, W, C).

        Example:
            >>> TrainingImages.of_arrays(np.zeros((2, 8, 8), np.uint8)).shape
            (1, 8, 8)
        """
        if images.ndim not in (3, 4):
            raise InvalidInputError(
                f"got {source} of shape {images.shape}; needed (N, H, W) or (N, H, W, C)"
            )
        whole = images[..., None] if images.ndim == 3 else images
        tensor = torch.from_numpy(np.ascontiguousarray(whole.transpose(0, 3, 1, 2)))
        return cls(tensor, None if labels is None else torch.from_numpy(labels), source=source)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._store)

    @property
    def in_memory(self) -> bool:
        """Whether looking at all of them costs no decoding."""
        return self._store.in_memory

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.pixels(np.zeros(1, dtype=np.int64)).shape[1:]
        return channels, height, width

    def pixels(self, rows: Rows) -> Tensor:
        """Return some images, (B, C, H, W) float32 in [0, 1].

        Raises:
            DataError: an image cannot be read, or they differ in size.
        """
        return self._store.pixels(rows)

    def all_pixels(self) -> Tensor:
        """Return all images, (N, C, H, W) float32."""
        return self.pixels(np.arange(len(self), dtype=np.int64))

    def select(self, rows: Rows) -> TrainingImages:
        """Return some of the images, in the given order."""
        made = type(self).__new__(type(self))
        made._store, made._hashes = self._store.select(rows), None
        made.labels = None if self.labels is None else self.labels[torch.from_numpy(rows)]
        made.source = self.source
        return made

    def require_labels(self, num_classes: int, what: str, *, some: bool = False) -> Tensor:
        """Return the labels (N,) int64.

        Args:
            num_classes: C of the model.
            what: the role, for messages.
            some: allow images without label (-1), as long as there are two with one.

        Raises:
            DataError: there are none, or some are no class of the model.
        """
        if self.labels is None:
            raise DataError(
                f"{what} ({self.source}) has no labels; fine-tuning needs them"
                + (", of some images at least" if some else "")
            )
        labelled = self.labelled
        if not some and len(labelled) < len(self):
            raise DataError(
                f"{what} ({self.source}): {len(self) - len(labelled):,} of {len(self):,} labels "
                "are -1, which means unlabelled. Only training images may be; leave these out"
            )
        if len(labelled) < 2:
            raise DataError(
                f"{what} ({self.source}): {len(labelled)} of {len(self):,} images have a label; "
                "needed at least two, and some of every class for a useful result"
            )
        known = self.labels[torch.from_numpy(labelled)].numpy()
        check_labels(known, num_classes, f"{what} ({self.source})")
        return self.labels

    @property
    def labelled(self) -> Rows:
        """Row numbers of the images with a label, in order."""
        if self.labels is None:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.labels.numpy() != UNLABELLED).astype(np.int64)

    def joined(self, unlabelled: TrainingImages) -> TrainingImages:
        """Return these images and others behind them, whose labels are not looked at.

        Raises:
            InvalidInputError: the images differ in shape.

        Example:
            >>> few = TrainingImages(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
            >>> few.joined(TrainingImages(torch.ones(1, 1, 4, 4))).labels
            tensor([ 0,  1, -1])
        """
        if self.shape != unlabelled.shape:
            raise InvalidInputError(
                f"got training images {self.shape} and unlabelled ones {unlabelled.shape} (C, H, "
                "W); bring both to one size (image files: --img-size, image_size=)"
            )
        made = type(self).__new__(type(self))
        made._store, made._hashes = Joined(self._store, unlabelled._store), None
        own = torch.full((len(self),), UNLABELLED) if self.labels is None else self.labels
        made.labels = torch.cat([own, torch.full((len(unlabelled),), UNLABELLED)])
        made.source = f"{self.source}, and unlabelled {unlabelled.source}"
        return made

    def hashes(self, rows: Rows | None = None) -> NDArray[np.uint64]:
        """Hash the 8-bit pixels of some or all images: equal however the images were given."""
        if rows is None:
            if self._hashes is None:
                self._hashes = self.hashes(np.arange(len(self), dtype=np.int64))
            return self._hashes
        parts = [
            hash_inputs((self.pixels(rows[at : at + _CHUNK]) * 255).round().to(torch.uint8))
            for at in range(0, len(rows), _CHUNK)
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)


Images = (
    TrainingImages
    | ImageSource
    | Tensor
    | tuple[Tensor, Tensor]
    | tuple[NDArray[Any], NDArray[Any]]
    | Iterable[Any]
)


def as_training_images(given: Images, classifier: EnergyClassifier, what: str) -> TrainingImages:
    """Read images as a user gives them.

    Args:
        given: :class:`TrainingImages`; an image source; pixels (N, C, H, W) in [0, 1] or uint8;
            (pixels, labels), numpy's as (N, H, W[, C]); or a loader of the model's own inputs,
            normalised, whose normalisation is undone.
        classifier: whose preprocessing is used.
        what: the role, for messages.

    Raises:
        InvalidInputError: malformed, or of another number of channels than the model takes.
    """
    preprocessing = classifier.preprocessing
    if preprocessing is None:
        raise InvalidInputError(
            "this model has no pretrained_cfg, so its normalisation is not known, and fine-tuning "
            "works on [0, 1] pixels; wrap it with mean=(...), std=(...)"
        )
    images = _read(given, preprocessing, what)
    if images.shape[0] != preprocessing.channels:
        raise InvalidInputError(
            f"got {what} with {images.shape[0]} channels; this model takes {preprocessing.channels}"
        )
    return images


def _read(given: Images, preprocessing: Preprocessing, what: str) -> TrainingImages:
    if isinstance(given, TrainingImages):
        return given
    if isinstance(given, ImageSource):
        return TrainingImages.of_source(given, preprocessing)
    pair = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    first, second = pair
    if isinstance(first, Tensor):
        labels = None if second is None else torch.as_tensor(second)
        return TrainingImages(first, labels, source=what)
    if isinstance(first, np.ndarray):
        known = None if second is None else np.asarray(second)
        return TrainingImages.of_arrays(first, known, source=what)
    return _of_loader(given, preprocessing, what)


def _of_loader(given: Iterable[Any], preprocessing: Preprocessing, what: str) -> TrainingImages:
    if not isinstance(given, Iterable):
        raise InvalidInputError(
            f"got {what} as {type(given).__name__}; needed TrainingImages, (pixels, labels), a "
            "tensor of pixels, or a loader of the model's inputs"
        )
    pixels, labels = [], []
    for item in given:
        batch = as_batch(item)
        if not len(batch.inputs):
            continue
        try:
            part = preprocessing.denormalize(batch.inputs.cpu())
        except InvalidInputError as error:
            raise InvalidInputError(
                f"{what}: {error}. Give pixels in [0, 1] instead: (pixels, labels)"
            ) from None
        pixels.append(as_bytes(part))
        if batch.labels is not None:
            labels.append(batch.labels.cpu())
    if not pixels:
        raise DataError(f"{what} is a loader that gave no images")
    if labels and len(labels) < len(pixels):
        raise DataError(f"{what}: some batches have labels and some have none")
    if len({(part.dtype, part.shape[1:]) for part in pixels}) > 1:
        pixels = [part.float() / 255 if part.dtype == torch.uint8 else part for part in pixels]
    if len({part.shape[1:] for part in pixels}) > 1:
        raise DataError(f"{what}: got images of different sizes; needed one size")
    return TrainingImages(
        torch.cat(pixels), torch.cat(labels) if labels else None, source=f"{what}, a loader"
    )


def _checked_labels(labels: Tensor | None, n: int, source: str) -> Tensor | None:
    if labels is None:
        return None
    if labels.is_floating_point() or labels.shape != (n,):
        raise InvalidInputError(
            f"got labels of shape {tuple(labels.shape)} and dtype {labels.dtype} for {n} images "
            f"of {source}; needed one integer class per image"
        )
    return labels.detach().cpu().to(torch.int64)
