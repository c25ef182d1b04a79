"""Confidence cells: a fixed-size table of the rows, from which draws cost nothing in N.

Rows are counted in fine cells of confidence, by right and wrong. Two tables of the same width add
up, so shards and streams merge; bootstrap and null draws are multinomial and binomial draws of
cells, so a thousand of them take the same time for a million rows and for a billion.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.errors import InvalidInputError

N_BINS = 15
DRAWS = 1000
_CELLS_PER_BIN = 64
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def bin_index(confidence: Floats, n_bins: int = N_BINS) -> Ints:
    """Put confidences into equal-width bins (lo, hi]; 0.0 goes to the first, 1.0 to the last.

    Args:
        confidence: (N,) in [0, 1].
        n_bins: number of bins.

    Returns:
        (N,) in 0..n_bins-1, by comparison with the edges i / n_bins.

    Example:
        >>> bin_index(np.array([0.0, 0.1, 0.5, 1.0]), n_bins=10)
        array([0, 0, 4, 9])
    """
    index = np.clip(np.ceil(confidence * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
    # confidence * n_bins may round across an edge; the edges themselves decide.
    index -= (confidence <= index / n_bins) & (index > 0)
    index += (confidence > (index + 1) / n_bins) & (index < n_bins - 1)
    return index


def mass_index(rows: RowStatistics, n_bins: int = N_BINS) -> Ints:
    """Put rows into bins of equal mass by rising confidence; equal confidences are never split.

    A group of ties goes to the bin in which it begins: floor(n_bins x the share of mass below it).

    Args:
        rows: row statistics.
        n_bins: number of bins; heavy ties leave some of them empty.

    Returns:
        (N,) in 0..n_bins-1.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> rows = row_statistics(np.array([[0.0, 3], [0, 1], [0, 2], [0, 2]]), np.zeros(4, int))
        >>> mass_index(rows, n_bins=2)
        array([1, 0, 0, 0])
    """
    ends = np.cumsum(rows.tied.weight)
    below = np.append(0.0, ends[:-1]) / ends[-1]
    # The tolerance keeps rounded sums from pulling a group into the bin before.
    index = np.minimum((below * n_bins + 1e-9).astype(np.int64), n_bins - 1)
    return np.asarray(index[rows.tied.group])


@dataclass(frozen=True)
class CellTable:
    """Counts and sums of rows in fine cells of confidence; axis 0 is wrong, right.

    Cells have equal width, (lo, hi], where values are compared, and equal mass where ranks are:
    on a saturated network most rows lie in one cell of equal width. With w = 1 without sample
    weights:

    Args:
        n_bins: bins; each has 64 cells, and the edges of bins are edges of cells.
        by_mass: whether cells have equal mass instead of equal width.
        weighted: whether rows have weights.
        count: (2, cells) rows.
        weight: (2, cells) sum of w.
        confidence: (2, cells) sum of w confidence.
        gap: (2, cells) sum of w (confidence - correct).
        null_variance: (2, cells) sum of w^2 confidence (1 - confidence).
        weight_squared: (2, cells) sum of w^2.
    """

    n_bins: int
    by_mass: bool
    weighted: bool
    count: Ints
    weight: Floats
    confidence: Floats
    gap: Floats
    null_variance: Floats
    weight_squared: Floats

    @classmethod
    def of(cls, rows: RowStatistics, n_bins: int = N_BINS, *, by_mass: bool = False) -> CellTable:
        """Count rows.

        Raises:
            InvalidInputError: fewer than one bin, no rows, or confidences outside [0, 1].
        """
        if n_bins < 1:
            raise InvalidInputError(f"got {n_bins} bins; needed at least 1")
        weights, c = rows.weight, rows.confidence
        outside = len(rows) - int(((c >= 0) & (c <= 1)).sum())
        if outside or not len(rows):
            found = f"{outside} rows with a confidence outside [0, 1]" if len(rows) else "no rows"
            raise InvalidInputError(f"got {found}; needed at least one row, all with 0 to 1")
        cells = n_bins * _CELLS_PER_BIN
        where = mass_index(rows, cells) if by_mass else bin_index(c, cells)
        where = where + cells * rows.correct
        gaps = rows.gaps if weights is None else weights * rows.gaps

        def total(values: Floats) -> Floats:
            sums = np.bincount(where, values, minlength=2 * cells)
            return sums.astype(np.float64).reshape(2, cells)

        count = np.bincount(where, minlength=2 * cells).reshape(2, cells)
        plain = count.astype(np.float64)
        squared = 1.0 if weights is None else np.square(weights)
        return cls(
            n_bins=n_bins,
            by_mass=by_mass,
            weighted=weights is not None,
            count=count,
            weight=plain if weights is None else total(weights),
            confidence=total(c if weights is None else weights * c),
            gap=total(gaps),
            null_variance=total(squared * c * (1 - c)),
            weight_squared=plain if weights is None else total(np.square(weights)),
        )

    def merge(self, other: CellTable) -> CellTable:
        """Add the rows of another table: counts exactly, sums up to rounding, in any order.

        Raises:
            InvalidInputError: another number of bins, weights in only one of them, or cells of
                equal mass, which differ from table to table.
        """
        if self.by_mass or other.by_mass:
            raise InvalidInputError("cells of equal mass cannot be merged; concatenate the rows")
        if (self.n_bins, self.weighted) != (other.n_bins, other.weighted):
            raise InvalidInputError(
                f"got tables of {self.n_bins} and {other.n_bins} bins, weighted "
                f"{self.weighted} and {other.weighted}; only tables of one kind can be merged"
            )
        sums = [getattr(self, item.name) + getattr(other, item.name) for item in fields(self)[3:]]
        return CellTable(self.n_bins, False, self.weighted, *sums)

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.count.sum())

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return float(self.weight.sum())

    @property
    def effective_n(self) -> float:
        """(sum w)^2 / sum w^2; N without weights."""
        return self.total**2 / float(self.weight_squared.sum())

    def by_bin(self, values: Floats) -> Floats:
        """Sum cells (..., cells) into bins (..., n_bins)."""
        shape = (*values.shape[:-1], self.n_bins, _CELLS_PER_BIN)
        return np.asarray(values.reshape(shape).sum(axis=-1))

    @cached_property
    def centres(self) -> Floats:
        """(cells,) mean confidence of each cell; a placeholder in empty ones."""
        cells = self.count.shape[1]
        middle = (np.arange(cells) + 0.5) / cells
        weight = self.weight.sum(axis=0)
        filled = weight > 0
        centres = np.divide(self.confidence.sum(axis=0), weight, out=middle, where=filled)
        return np.asarray(np.clip(centres, 0.0, 1.0))

    @cached_property
    def _kept(self) -> dict[tuple[str, int, int], Resamples]:
        return {}

    def bootstrap(self, draws: int = DRAWS, seed: int = 0) -> Resamples:
        """Resample the rows with replacement, as a multinomial draw of the cells.

        Exact but for the spread of confidence within a cell (1/960 wide with 15 bins). The weights
        of the rows drawn from one cell add up to a gamma variable with the right mean and variance.

        Args:
            draws: resamples R.
            seed: of the draw's own generator. The same draw is made once and kept, so that several
                metrics share it.
        """
        return self._once("bootstrap", draws, seed)

    def simulate(self, weight: Floats, accuracy: Floats, seed: int) -> Resamples:
        """Draw right ~ Bernoulli(accuracy) for the rows of given draws.

        Args:
            weight: (R, cells) weights drawn, such as those of :meth:`bootstrap`.
            accuracy: (cells,) in [0, 1].
            seed: of the draw's own generator.
        """
        total, squared = self.weight.sum(axis=0), self.weight_squared.sum(axis=0)
        # The weight of one effective row; 1 without sample weights.
        single = np.divide(squared, total, out=np.ones_like(total), where=total > 0)
        trials = np.maximum(np.rint(weight / single), weight > 0).astype(np.int64)
        share = np.random.default_rng(seed).binomial(trials, accuracy) / np.maximum(trials, 1)
        right = weight * share
        return Resamples(gap=weight * self.centres - right, wrong=weight - right, right=right)

    def null(self, draws: int = DRAWS, seed: int = 0) -> Resamples:
        """Simulate a perfectly calibrated model with these confidences: right ~ Bernoulli(conf).

        A cell with sample weights counts as its effective number of rows, (sum w)^2 / sum w^2.

        Args:
            draws: simulations R.
            seed: of the draw's own generator; the draw is kept, as in :meth:`bootstrap`.

        References:
            Bröcker and Smith, Increasing the Reliability of Reliability Diagrams, 2007 (consistency
            resampling).
        """
        return self._once("null", draws, seed)

    def _once(self, kind: str, draws: int, seed: int) -> Resamples:
        make = self._bootstrap if kind == "bootstrap" else self._null
        if (kind, draws, seed) not in self._kept:
            self._kept[kind, draws, seed] = make(draws, np.random.default_rng(seed))
        return self._kept[kind, draws, seed]

    def _bootstrap(self, draws: int, generator: np.random.Generator) -> Resamples:
        # Empty cells stay out: numpy gives the last one what rounding left over.
        filled = np.flatnonzero(self.count)
        chances = self.count.ravel()[filled] / self.n
        picks = generator.multinomial(self.n, chances, size=draws).astype(np.float64)
        drawn = np.zeros((draws, self.count.size))
        drawn[:, filled] = self._weights(picks, filled, generator) if self.weighted else picks
        wrong, right = drawn[:, : self.count.shape[1]], drawn[:, self.count.shape[1] :]
        # Every row of a cell has the cell's mean gap, but for the cell's width.
        mean = np.divide(self.gap, self.weight, out=np.zeros_like(self.gap), where=self.weight > 0)
        return Resamples(gap=wrong * mean[0] + right * mean[1], wrong=wrong, right=right)

    def _weights(self, picks: Floats, filled: Ints, generator: np.random.Generator) -> Floats:
        """Draw the summed weights of ``picks`` rows of each cell."""
        count = self.count.ravel()[filled]
        mean = self.weight.ravel()[filled] / count
        variance = self.weight_squared.ravel()[filled] / count - np.square(mean)
        varies = variance > 1e-12 * np.square(mean)
        weight = picks * mean
        shape, scale = mean[varies] ** 2 / variance[varies], variance[varies] / mean[varies]
        weight[:, varies] = generator.gamma(picks[:, varies] * shape, scale)
        return weight

    def _null(self, draws: int, generator: np.random.Generator) -> Resamples:
        weight = self.weight.sum(axis=0)
        filled = np.flatnonzero(weight)
        trials = self._trials(filled, draws, generator)
        share = generator.binomial(trials, self.centres[filled], (draws, len(filled))) / trials
        right = np.zeros((draws, len(weight)))
        right[:, filled] = weight[filled] * share
        return Resamples(gap=weight * self.centres - right, wrong=weight - right, right=right)

    def _trials(self, filled: Ints, draws: int, generator: np.random.Generator) -> Ints:
        """Return the rows of each cell, or (R, m) draws around their effective number."""
        if not self.weighted:
            return np.asarray(self.count.sum(axis=0)[filled])
        weight, squared = self.weight.sum(axis=0)[filled], self.weight_squared.sum(axis=0)[filled]
        effective = np.maximum(1.0, weight**2 / squared)
        below = np.floor(effective)
        # The chance that makes the mean of 1 / trials, and so the variance, that of the cell.
        chance = below * ((below + 1) / effective - 1)
        above = generator.random((draws, len(filled))) >= chance
        return np.asarray((below + above).astype(np.int64))


@dataclass(frozen=True)
class Resamples:
    """R draws of a cell table.

    Args:
        gap: (R, cells) sum of w (confidence - correct).
        wrong: (R, cells) weight of wrong rows.
        right: (R, cells) weight of right rows.
    """

    gap: Floats
    wrong: Floats
    right: Floats

    @cached_property
    def weight(self) -> Floats:
        """(R, cells) weight of all rows."""
        return self.wrong + self.right

    @cached_property
    def total(self) -> Floats:
        """(R,) sum of the weights of a draw."""
        return np.asarray(self.weight.sum(axis=1))
