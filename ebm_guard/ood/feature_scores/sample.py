"""Seeded samples of rows that do not depend on order, blocks or shards, and merge exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Rows held beyond the limit before some are dropped.
_SLACK = 1.25
_GOLDEN = 0x9E3779B97F4A7C15


def sample_keys(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Give every row a random number that depends on its content and the seed alone.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over hash + seed.

    Example:
        >>> hashes = np.array([1, 2], dtype=np.uint64)
        >>> bool((sample_keys(hashes, 0) == sample_keys(hashes, 0)).all())
        True
    """
    offset = np.uint64((seed + 1) * _GOLDEN % 2**64)
    keys = hashes.astype(np.uint64) + offset
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


@dataclass
class BalancedSample:
    """At most ``limit`` rows, as equal a number of each class as there are rows for.

    Of each class the q rows with the smallest keys are kept, where q is the largest quota with
    sum_c min(n_c, q) <= limit. The quota only falls while rows come in, so that a row once dropped
    is never missed: the sample of all rows is the same in any order, any blocks, any shards.

    Args:
        limit: most rows kept.
        seed: of the keys.

    Example:
        >>> sample = BalancedSample(limit=4, seed=0)
        >>> classes = torch.tensor([0, 0, 0, 0, 1])
        >>> sample.add(torch.randn(5, 2), classes, np.arange(5, dtype=np.uint64))
        >>> [int(c) for c in sample.rows()[1]]
        [0, 0, 0, 1]
    """

    limit: int
    seed: int
    _counts: dict[int, int] = field(default_factory=dict)
    _values: list[Tensor] = field(default_factory=list)
    _classes: list[Tensor] = field(default_factory=list)
    _keys: list[NDArray[np.uint64]] = field(default_factory=list)

    def add(self, values: Tensor, classes: Tensor, hashes: NDArray[np.uint64]) -> None:
        """Add rows (B, D) with their classes (B,) and hashes (B,)."""
        for name, count in zip(*np.unique(classes.numpy(), return_counts=True), strict=True):
            self._counts[int(name)] = self._counts.get(int(name), 0) + int(count)
        self._extend([values], [classes], [sample_keys(hashes, self.seed)])

    def join(self, other: BalancedSample) -> None:
        """Add the rows of another sample with the same limit and seed."""
        for name, count in other._counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        self._extend(other._values, other._classes, other._keys)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the sampled rows (M, D) and their classes (M,), in an order of their own."""
        order = self._chosen()
        if len(order) > self.limit:  # more classes than rows: the smallest keys of them
            smallest = np.argsort(np.concatenate(self._keys)[order])[: self.limit]
            order = order[np.sort(smallest)]
        kept = torch.from_numpy(order)
        return torch.cat(self._values)[kept], torch.cat(self._classes)[kept]

    @property
    def quota(self) -> int:
        """Rows kept of each class, at least 1."""
        counts = sorted(self._counts.values())
        left = self.limit
        for place, count in enumerate(counts):
            if count * (len(counts) - place) > left:
                return max(1, left // (len(counts) - place))
            left -= count
        return max(1, counts[-1] if counts else 1)

    def _extend(
        self, values: list[Tensor], classes: list[Tensor], keys: list[NDArray[np.uint64]]
    ) -> None:
        self._values += values
        self._classes += classes
        self._keys += keys
        if sum(map(len, self._keys)) > _SLACK * self.limit:
            self._prune()

    def _chosen(self) -> NDArray[np.int64]:
        """Places of the rows to keep, by class and key."""
        keys, names = np.concatenate(self._keys), torch.cat(self._classes).numpy()
        order = np.lexsort((keys, names))
        starts = np.searchsorted(names[order], names[order])
        return order[np.arange(len(order)) - starts < self.quota]

    def _prune(self) -> None:
        kept = np.zeros(sum(map(len, self._keys)), dtype=np.bool_)
        kept[self._chosen()] = True
        # Part by part, so that the rows are never held twice.
        parts = np.split(kept, np.cumsum([len(keys) for keys in self._keys])[:-1])
        for place, part in enumerate(parts):
            self._keys[place] = self._keys[place][part]
            self._classes[place] = self._classes[place][torch.from_numpy(part)]
            self._values[place] = self._values[place][torch.from_numpy(part)]
