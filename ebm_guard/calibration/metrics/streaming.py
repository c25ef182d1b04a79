"""Calibration metrics of a stream, from a state of fixed size that merges exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ebm_guard.calibration.cells import N_BINS, CellTable
from ebm_guard.calibration.metrics.binned import ece
from ebm_guard.calibration.metrics.curve import ReliabilityCurve, reliability_curve
from ebm_guard.calibration.rows import RowStatistics
from ebm_guard.errors import InvalidInputError, NotFittedError
from ebm_guard.intervals import LEVEL, Metric, normal_quantile, proportion


@dataclass(frozen=True)
class _Sums:
    """Count, mean and sum of squared deviations of a column; merges by Chan et al.'s update."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def merge(self, other: _Sums) -> _Sums:
        n = self.n + other.n
        if not n:
            return self
        step = other.mean - self.mean
        return _Sums(
            n,
            self.mean + step * other.n / n,
            self.squares + other.squares + step * step * self.n * other.n / n,
        )

    @classmethod
    def of(cls, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> _Sums:
        mean = float(values.mean())
        if not math.isfinite(mean):
            return cls(len(values), mean, math.nan)
        return cls(len(values), mean, float(np.square(values - mean).sum()))

    def metric(self) -> Metric:
        from scipy import stats

        if self.n < 2 or not math.isfinite(self.mean):
            reason = "none: one row" if self.n < 2 else "none: the mean is not finite"
            return Metric(self.mean, None, None, self.n, reason)
        spread = math.sqrt(self.squares / (self.n - 1) / self.n)
        half = float(stats.t.ppf(0.5 + LEVEL / 2, self.n - 1)) * spread
        return Metric(self.mean, self.mean - half, self.mean + half, self.n, "Student t")


class CalibrationStream:
    """Count rows as they come; the state has a fixed size and two of them add up.

    Accuracy and the bins' counts are exact in any order of merging; ECE, the reliability diagram,
    NLL, Brier and overconfidence up to rounding. Adaptive and smooth ECE, AURC and the parts of the
    Brier score need the rows: keep :class:`~ebm_guard.calibration.RowStatistics` and concatenate
    those.

    Args:
        n_bins: equal-width bins.

    Example:
        >>> from ebm_guard.calibration import row_statistics
        >>> one = CalibrationStream().update(row_statistics(np.zeros((3, 2)), np.array([0, 0, 1])))
        >>> two = CalibrationStream().update(row_statistics(np.zeros((1, 2)), np.array([0])))
        >>> one.merge(two).ece().value
        0.25
    """

    def __init__(self, n_bins: int = N_BINS) -> None:
        self.n_bins = n_bins
        self._table: CellTable | None = None
        self._sums = {name: _Sums() for name in ("nll", "brier", "gaps")}

    def update(self, rows: RowStatistics) -> CalibrationStream:
        """Add rows, and return itself.

        Raises:
            InvalidInputError: rows with sample weights.
        """
        if rows.weight is not None:
            raise InvalidInputError(
                "a stream counts rows without sample weights; keep RowStatistics for weighted ones"
            )
        table = CellTable.of(rows, self.n_bins)
        self._table = table if self._table is None else self._table.merge(table)
        self._sums = {
            name: sums.merge(_Sums.of(getattr(rows, name))) for name, sums in self._sums.items()
        }
        return self

    def merge(self, other: CalibrationStream) -> CalibrationStream:
        """Return a new state with the rows of both.

        Raises:
            InvalidInputError: another number of bins.
        """
        if self.n_bins != other.n_bins:
            raise InvalidInputError(f"got {self.n_bins} and {other.n_bins} bins; needed the same")
        merged = CalibrationStream(self.n_bins)
        tables = [state._table for state in (self, other) if state._table is not None]
        if tables:
            merged._table = tables[0] if len(tables) == 1 else tables[0].merge(tables[1])
        merged._sums = {name: sums.merge(other._sums[name]) for name, sums in self._sums.items()}
        return merged

    def __len__(self) -> int:
        """Return the number of rows."""
        return 0 if self._table is None else self._table.n

    def accuracy(self) -> Metric:
        """Return the accuracy so far, with Wilson's interval."""
        table = self._require()
        return proportion(int(table.count[1].sum()), table.n)

    def nll(self) -> Metric:
        """Return the mean negative log-likelihood so far."""
        return self._column("nll")

    def brier(self) -> Metric:
        """Return the multiclass Brier score so far."""
        return self._column("brier")

    def overconfidence(self) -> Metric:
        """Return mean confidence - accuracy so far."""
        table, found = self._require(), self._column("gaps")
        noise = math.sqrt(float(table.null_variance.sum()))
        return replace(found, null95=normal_quantile(0.975) * noise / table.n)

    def ece(self) -> Metric:
        """Return the ECE so far, with interval and null level."""
        return ece(self._require())

    def curve(self) -> ReliabilityCurve:
        """Return the reliability diagram so far."""
        return reliability_curve(self._require())

    def _column(self, name: str) -> Metric:
        self._require()
        return self._sums[name].metric()

    def _require(self) -> CellTable:
        if self._table is None:
            raise NotFittedError("no rows were counted yet; call update(rows) first")
        return self._table
