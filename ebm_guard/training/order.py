"""Which training images make up an update."""

from __future__ import annotations

import numpy as np

from ebm_guard.errors import InvalidInputError
from ebm_guard.training.image_stores import Rows


class Order:
    """The rows of every update: each image once before any comes twice.

    Where some images have no label, those with one and those without are two streams of their own,
    and every batch takes a fixed share of either: with 100 labels among 20,000 images, a batch
    drawn from all of them would hold none. The two are spread evenly over the batch, so that every
    process has as many of either: means over them, averaged over the processes, are those of one.

    Args:
        n: number of images.
        labelled: (L,) row numbers of the images with a label.
        batch_size: images of an update, over all processes.
        labelled_share: of a batch, in (0, 1]; it has no effect where all images have a label.
        seed: of the order.
        processes: that share a batch in equal parts, one behind the other.

    Raises:
        InvalidInputError: a batch too small to hold both for every process.

    Example:
        >>> Order(4, np.array([0, 2]), 4, 0.5, seed=0).rows(update=0).tolist()
        [0, 3, 2, 1]
    """

    def __init__(
        self,
        n: int,
        labelled: Rows,
        batch_size: int,
        labelled_share: float,
        seed: int,
        processes: int = 1,
    ) -> None:
        self._seed, self._size = seed, batch_size
        everything = np.arange(n, dtype=np.int64)
        if len(labelled) == n:
            self._streams = [_Stream(everything, batch_size, 0)]
            return
        own, others = shares(batch_size, labelled_share, processes)
        rest = np.setdiff1d(everything, labelled)
        self._streams = [_Stream(labelled.astype(np.int64), own, 0), _Stream(rest, others, 1)]

    def rows(self, update: int, attempt: int = 0) -> Rows:
        """Return the rows (batch_size,) of an update, of all processes."""
        parts = [stream.rows(update, attempt, self._seed) for stream in self._streams]
        if len(parts) == 1:
            return parts[0]
        first, second = parts
        batch = np.empty(self._size, dtype=np.int64)
        places = np.floor(np.arange(len(first)) * self._size / len(first)).astype(np.int64)
        taken = np.zeros(self._size, dtype=bool)
        taken[places] = True
        batch[taken], batch[~taken] = first, second
        return batch


class _Stream:
    def __init__(self, rows: Rows, per_update: int, key: int) -> None:
        self._rows, self._size, self._key = rows, per_update, key
        self._known: tuple[tuple[int, int], Rows] = ((-1, -1), np.empty(0, dtype=np.int64))

    def rows(self, update: int, attempt: int, seed: int) -> Rows:
        size, n = self._size, len(self._rows)
        first = update * size
        parts = []
        for epoch in range(first // n, (first + size - 1) // n + 1):
            begin, end = max(first - epoch * n, 0), min(first + size - epoch * n, n)
            parts.append(self._permuted(epoch, attempt, seed)[begin:end])
        return np.concatenate(parts)

    def _permuted(self, epoch: int, attempt: int, seed: int) -> Rows:
        key = (attempt, epoch)
        if self._known[0] != key:
            # The first stream is keyed as the only one is: the same run without unlabelled images.
            of_stream = [self._key] if self._key else []
            generator = np.random.default_rng([seed, 41, *key, *of_stream])
            self._known = key, self._rows[generator.permutation(len(self._rows))]
        return self._known[1]


def shares(batch_size: int, labelled_share: float, processes: int = 1) -> tuple[int, int]:
    """Return how many images with and without a label a batch takes.

    Every process has as many of either as every other, and at least one.

    Raises:
        InvalidInputError: a batch of one image for a process.

    Example:
        >>> shares(64, 0.25)
        (16, 48)
        >>> shares(8, 0.4, processes=2)
        (4, 4)
    """
    each = batch_size // processes
    if each < 2:
        raise InvalidInputError(
            f"got batch_size={batch_size} for {processes} process{'es' if processes > 1 else ''}, "
            f"and training images without label; needed at least {2 * processes}, one image of "
            "either for each"
        )
    own = min(each - 1, max(1, round(labelled_share * each)))
    return own * processes, (each - own) * processes
