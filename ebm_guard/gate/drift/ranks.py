"""Where each new score ranks among all scores before it, with ties, one by one or in batches."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
# The pairs within a chunk are compared all at once.
_CHUNK = 512
_LEAST_RECENT = 512
_SHARE_RECENT = 16


class OnlineRanks:
    """All scores so far, sorted; each new one is ranked among them and then joins them.

    A large sorted array and a small sorted list of recent scores, which is merged into the array
    when it has grown to 1/16 of it: two binary searches a score, and a batch is ranked as a whole.

    Args:
        scores: (n,) finite, what is there before the first new score.

    Example:
        >>> ranks = OnlineRanks(np.array([1.0, 2.0, 2.0]))
        >>> [part.tolist() for part in ranks.add(np.array([2.0, 2.0]))]
        [[0, 0], [2, 3], [1, 1]]
    """

    def __init__(self, scores: Floats) -> None:
        self._old = np.sort(np.asarray(scores, dtype=np.float64))
        self._recent: list[float] = []

    def __len__(self) -> int:
        """Return the number of scores held."""
        return len(self._old) + len(self._recent)

    def values(self) -> Floats:
        """Return all scores, sorted."""
        return np.sort(np.concatenate([self._old, self._recent]))

    def add(self, scores: Floats) -> tuple[Counts, Counts, Counts]:
        """Rank scores in their order; each is compared with all before it, and joins them.

        Args:
            scores: (B,) finite.

        Returns:
            Three (B,) counts of earlier scores: above, equal, below.
        """
        if len(scores) == 1:
            return self._add_one(float(scores[0]))
        starts = range(0, len(scores), _CHUNK)
        parts = [self._add_chunk(scores[start : start + _CHUNK]) for start in starts]
        above, equal, below = zip(*parts, strict=True) if parts else ((), (), ())
        empty = np.empty(0, np.int64)
        return (
            np.concatenate([empty, *above]),
            np.concatenate([empty, *equal]),
            np.concatenate([empty, *below]),
        )

    def _add_one(self, score: float) -> tuple[Counts, Counts, Counts]:
        below = int(self._old.searchsorted(score)) + bisect_left(self._recent, score)
        right = int(self._old.searchsorted(score, "right")) + bisect_right(self._recent, score)
        above = len(self) - right
        insort(self._recent, score)
        self._tidy()
        return np.array([above]), np.array([right - below]), np.array([below])

    def _add_chunk(self, scores: Floats) -> tuple[Counts, Counts, Counts]:
        recent = np.asarray(self._recent, dtype=np.float64)
        # Row i against column j: only columns before i have come already.
        below = np.tril(scores[None, :] < scores[:, None], -1).sum(axis=1, dtype=np.int64)
        equal = np.tril(scores[None, :] == scores[:, None], -1).sum(axis=1, dtype=np.int64)
        for held in (self._old, recent):
            left = held.searchsorted(scores)
            below += left
            equal += held.searchsorted(scores, "right") - left
        above = len(self) + np.arange(len(scores)) - below - equal
        self._recent.extend(scores.tolist())
        self._recent.sort()
        self._tidy()
        return above, equal, below

    def _tidy(self) -> None:
        if len(self._recent) > max(_LEAST_RECENT, len(self._old) // _SHARE_RECENT):
            self._old = self.values()
            self._recent = []
