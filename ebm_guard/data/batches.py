"""Batches of model input from an image source; unreadable images are counted, not fatal."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ebm_guard.data.images import plain, to_input
from ebm_guard.data.sources import ImageSource, StreamSource
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
        groups: (B,) int64 or text, or None.
    """

    inputs: Tensor
    labels: Tensor | None
    ids: tuple[str, ...]
    hashes: NDArray[np.uint64]
    skipped: tuple[tuple[str, str], ...] = ()
    groups: NDArray[Any] | None = None


@dataclass(frozen=True)
class _Item:
    id: str
    values: NDArray[np.float32] | None
    hash: int = 0
    error: str = ""
    label: int | None = None
    index: int = 0


def _item(name: str, image: Image.Image, preprocessing: Preprocessing, *, is_array: bool) -> _Item:
    """Prepare one image; what it cannot be prepared for is an error as a value."""
    try:
        image = plain(image)
        values = to_input(image, preprocessing, is_array=is_array)
    except DataError as error:
        return _Item(name, None, error=f"cannot read image {name}: {error}")
    content = hashlib.blake2b(f"{image.mode}{image.size}".encode() + image.tobytes(), digest_size=8)
    if image.mode == "P":
        content.update(bytes(image.getpalette() or ()))
    return _Item(name, values, int.from_bytes(content.digest(), "little"))


class _Items(Dataset[_Item]):
    """Decode on demand; also in worker processes, where errors travel as values."""

    def __init__(self, source: ImageSource, preprocessing: Preprocessing) -> None:
        self._source, self._preprocessing = source, preprocessing

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> _Item:
        source = self._source
        try:
            image = source.load(index)
        except DataError as error:
            return _Item(source.ids[index], None, error=str(error))
        item = _item(source.ids[index], image, self._preprocessing, is_array=source.is_array)
        label = None if source.labels is None else int(source.labels[index])
        return replace(item, label=label, index=index)


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
        workers: processes that decode; 0 decodes in this one, as a stream always does.
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
    if isinstance(source, StreamSource):
        lists = _streamed(source, preprocessing, batch_size)
    else:
        lists = _loaded(source, preprocessing, batch_size, workers)
    pending: tuple[tuple[str, str], ...] = ()
    for items in lists:
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


def _loaded(
    source: ImageSource, preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[list[_Item]]:
    loader: DataLoader[Any] = DataLoader(
        _Items(source, preprocessing),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        # A fixed generator keeps the loader from drawing a seed out of torch's global state.
        generator=torch.Generator().manual_seed(0),
    )
    yield from loader


def _streamed(
    source: StreamSource, preprocessing: Preprocessing, batch_size: int
) -> Iterator[list[_Item]]:
    rows = source.rows()
    while chunk := list(itertools.islice(rows, batch_size)):
        yield [
            replace(_item(name, image, preprocessing, is_array=False), label=label)
            for name, image, label in chunk
        ]


def _collated(source: ImageSource, items: list[_Item]) -> Batch:
    good = [(item, item.values) for item in items if item.values is not None]
    skipped = tuple((item.id, item.error) for item in items if item.values is None)
    shapes = {values.shape for _, values in good}
    if len(shapes) > 1:
        raise DataError(
            f"got images of different sizes {sorted(shapes)}; give --img-size (image_size=)"
        )
    known = [item.label for item, _ in good if item.label is not None]
    if known and len(known) < len(good):
        raise DataError(f"{source.spec}: some images have a label and some have none")
    labels = torch.tensor(known, dtype=torch.int64) if known else None
    inputs = torch.from_numpy(np.stack([values for _, values in good])) if good else torch.empty(0)
    hashes = np.array([item.hash for item, _ in good], dtype=np.uint64)
    groups = None if source.groups is None else source.groups[[item.index for item, _ in good]]
    return Batch(inputs, labels, tuple(item.id for item, _ in good), hashes, skipped, groups)
