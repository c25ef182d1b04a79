"""Rows that known densities are fitted on: labelled ones, some of every class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.training.context import TrainingBatch
from ebm_guard.training.images import TrainingImages

# Rows in all, about, and the fewest of a class that has as many.
MOST_ROWS = 4096
LEAST_OF_CLASS = 4
_CHUNK = 128


@dataclass(frozen=True)
class FirstBatch(TrainingBatch):
    """A first batch that knows more rows than it holds.

    Args:
        images: the training set.
        chosen: (M,) numbers of labelled rows, some of every class.
        counts: (C,) labelled rows of each class in the whole set.
    """

    images: TrainingImages = field(repr=False)
    chosen: NDArray[np.int64] = field(repr=False)
    counts: Tensor = field(repr=False)


def first_batch(
    plain: TrainingBatch, images: TrainingImages, num_classes: int, seed: int
) -> FirstBatch:
    """Choose the rows that known densities are fitted on.

    Args:
        plain: the batch as every objective gets it.
        images: the training set.
        num_classes: C.
        seed: of the choice.
    """
    labelled = images.labelled
    if images.labels is None:
        raise TypeError("training images are labelled by now")
    labels = images.labels[torch.from_numpy(labelled)].numpy()
    counts = np.bincount(labels, minlength=num_classes)
    order = np.random.default_rng([seed, 67]).permutation(len(labelled))
    picked = by_class(labels[order], counts)
    return FirstBatch(
        plain.pixels,
        plain.labels,
        plain.augmented,
        plain.rows,
        images,
        np.sort(labelled[order[picked]]),
        torch.from_numpy(counts),
    )


def by_class(labels: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return places among the labels: each class by its share, but some of each.

    Example:
        >>> labels = np.array([0] * 9000 + [1])
        >>> picked = by_class(labels, np.bincount(labels))
        >>> len(picked), int(labels[picked].sum())
        (4097, 1)
    """
    wanted = np.ceil(MOST_ROWS * counts / max(1, counts.sum()))
    wanted = np.minimum(np.maximum(wanted, LEAST_OF_CLASS), counts).astype(np.int64)
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    places = np.arange(len(labels)) - starts[labels[order]]
    picked: NDArray[np.int64] = order[places < wanted[labels[order]]]
    return picked


def fitting_rows(batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pixels and labels that densities are fitted on, a few at a time.

    A batch that knows no more rows gives its own.
    """
    if isinstance(batch, FirstBatch):
        labels = batch.images.labels
        if labels is None:
            raise TypeError("training images are labelled by now")
        for at in range(0, len(batch.chosen), _CHUNK):
            rows = batch.chosen[at : at + _CHUNK]
            pixels = batch.images.pixels(rows).to(batch.pixels.device)
            yield pixels, labels[torch.from_numpy(rows)].to(pixels.device)
        return
    yield from zip(
        torch.split(batch.pixels, _CHUNK), torch.split(batch.labels, _CHUNK), strict=True
    )


def class_counts(batch: TrainingBatch) -> Tensor | None:
    """Return how often each class occurs, (C,), or None where the batch's own rows tell it."""
    return batch.counts if isinstance(batch, FirstBatch) else None
