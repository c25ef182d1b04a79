"""Batches of model input from an image source; unreadable images are counted, not fatal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ebm_guard.data.images import to_input
from ebm_guard.data.sources import ImageSource
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.model.pixels import Preprocessing


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model.

    Args:
        inputs: (B, C, H, W), normalised.
        labels: (B,) int64, or None.
        ids: one name per row.
        hashes: (B,) uint64 of the decoded pixels, to tell whether two sets share images.
        skipped: (id, error) of the images that could not be read.
    """

    inputs: Tensor
    labels: Tensor | None
    ids: tuple[str, ...]
    hashes: NDArray[np.uint64]
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Item:
    index: int
    values: NDArray[np.float32] | None
    hash: int = 0
    error: str = ""


class _Items(Dataset[_Item]):
    """Decode on demand; also in worker processes, where errors travel as values."""

    def __init__(self, source: ImageSource, preprocessing: Preprocessing) -> None:
        self._source, self._preprocessing = source, preprocessing

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> _Item:
        try:
            image = self._source.load(index)
        except DataError as error:
            return _Item(index, None, error=str(error))
        values = to_input(image, self._preprocessing, is_array=self._source.is_array)
        content = hashlib.blake2b(
            f"{image.mode}{image.size}".encode() + image.tobytes(), digest_size=8
        )
        return _Item(index, values, int.from_bytes(content.digest(), "little"))


def batches(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 256,
    workers: int = 0,
    strict: bool = False,
) -> Iterator[Batch]:
    """Yield the images of a source in order, as batches of the model's input.

    Args:
        source: where the images come from.
        preprocessing: the model's settings.
        batch_size: rows per batch, >= 1.
        workers: processes that decode; 0 decodes in this one.
        strict: raise on the first unreadable image instead of skipping it.

    Raises:
        DataError: an image is unreadable and ``strict``, or images of a batch differ in size.
        InvalidInputError: image files without an input size.

    Example:
        >>> from ebm_guard.data import open_source
        >>> first = next(batches(open_source("demo:"), Preprocessing((0.5,), (0.5,))))
        >>> first.inputs.shape[1:]
        torch.Size([1, 8, 8])
    """
    if batch_size < 1 or workers < 0:
        raise InvalidInputError(
            f"got batch size {batch_size} and {workers} workers; needed >= 1 and >= 0"
        )
    if preprocessing.image_size is None and not source.is_array:
        raise InvalidInputError(
            "image files need an input size, and the model has no pretrained_cfg: give "
            "--img-size (image_size=)"
        )
    loader: DataLoader[Any] = DataLoader(
        _Items(source, preprocessing),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        # A fixed generator keeps the loader from drawing a seed out of torch's global state.
        generator=torch.Generator().manual_seed(0),
    )
    pending: tuple[tuple[str, str], ...] = ()
    for items in loader:
        batch = _collated(source, items)
        pending += batch.skipped
        if strict and pending:
            raise DataError(f"{pending[0][1]} (--strict; without it, such images are skipped)")
        if len(batch.ids):
            yield replace(batch, skipped=pending)
            pending = ()
    if pending:
        empty = torch.empty(0)
        yield Batch(empty, None, (), np.empty(0, np.uint64), pending)


def _collated(source: ImageSource, items: list[_Item]) -> Batch:
    good = [(item, item.values) for item in items if item.values is not None]
    skipped = tuple((source.ids[item.index], item.error) for item in items if item.values is None)
    shapes = {values.shape for _, values in good}
    if len(shapes) > 1:
        raise DataError(
            f"got images of different sizes {sorted(shapes)}; give --img-size (image_size=)"
        )
    rows = [item.index for item, _ in good]
    labels = None if source.labels is None else torch.from_numpy(source.labels[rows])
    inputs = torch.from_numpy(np.stack([values for _, values in good])) if good else torch.empty(0)
    hashes = np.array([item.hash for item, _ in good], dtype=np.uint64)
    return Batch(inputs, labels, tuple(source.ids[row] for row in rows), hashes, skipped)
