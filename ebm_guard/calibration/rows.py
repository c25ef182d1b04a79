"""Five numbers a row, instead of N x C probabilities: what the calibration metrics read.

One pass over the logits, in chunks that stay in the cache. Rows must be finite; callers count and
remove invalid rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import Array

# By elements and not by rows: small enough for a core's cache, large enough to hide numpy's calls.
_CHUNK = 200_000


@dataclass(frozen=True)
class TiedRows:
    """Rows grouped by distinct confidence, in rising order.

    Args:
        confidence: (G,) distinct values.
        weight: (G,) sum of the rows' weights.
        right: (G,) that of the right rows.
        group: (N,) group of each row.
    """

    confidence: NDArray[np.float64]
    weight: NDArray[np.float64]
    right: NDArray[np.float64]
    group: NDArray[np.int64]


@dataclass(frozen=True)
class RowStatistics:
    """What the calibration metrics need of each row, instead of N x C probabilities.

    Args:
        confidence: (N,) float64, probability of the predicted class.
        predicted: (N,) int64, argmax of the logits (first class on ties).
        correct: (N,) bool.
        nll: (N,) float64, -log p(y|x).
        brier: (N,) float64, sum_k (p_k - 1[y = k])^2.
        weight: (N,) float64 sample weights >= 0, or None for equal weights. Only their ratios
            matter, so shards that share one scale can be concatenated.
    """

    confidence: NDArray[np.float64]
    predicted: NDArray[np.int64]
    correct: NDArray[np.bool_]
    nll: NDArray[np.float64]
    brier: NDArray[np.float64]
    weight: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.confidence)

    @property
    def weights(self) -> NDArray[np.float64]:
        """(N,) weights, 1 where none were given."""
        return np.ones(len(self)) if self.weight is None else self.weight

    @property
    def effective_n(self) -> float:
        """(sum w)^2 / sum w^2, Kish's effective number of rows; N without weights."""
        if self.weight is None:
            return float(len(self))
        return float(self.weight.sum() ** 2 / np.square(self.weight).sum())

    @property
    def gaps(self) -> NDArray[np.float64]:
        """(N,) confidence - correct, positive where the model is surer than right."""
        return self.confidence - self.correct

    @cached_property
    def tied(self) -> TiedRows:
        """The rows by distinct confidence; sorted once, for all metrics that rank."""
        values, where = np.unique(self.confidence, return_inverse=True)
        right = self.correct if self.weight is None else self.weights * self.correct
        total = np.bincount(where, self.weight, minlength=len(values)).astype(np.float64)
        return TiedRows(values, total, group_sums(where, right, len(values)), where)

    def select(self, rows: NDArray[Any]) -> RowStatistics:
        """Return the statistics of some rows, by index or mask."""
        columns: dict[str, Any] = {
            name: None if part is None else part[rows] for name, part in self._columns()
        }
        return RowStatistics(**columns)

    def _columns(self) -> list[tuple[str, Any]]:
        return [(item.name, getattr(self, item.name)) for item in fields(self)]

    @staticmethod
    def concatenate(parts: list[RowStatistics]) -> RowStatistics:
        """Join the statistics of several sets of rows (exact, for folds and shards).

        Raises:
            InvalidInputError: no parts, or some with weights and some without.
        """
        if not parts:
            raise InvalidInputError("got no parts; needed the statistics of at least one set")
        if len({part.weight is None for part in parts}) > 1:
            raise InvalidInputError(
                "got parts with and without sample weights; needed weights in all of them or in "
                "none"
            )
        columns: dict[str, Any] = {
            name: None if first is None else np.concatenate([getattr(p, name) for p in parts])
            for name, first in parts[0]._columns()
        }
        return RowStatistics(**columns)


def row_statistics(
    logits: Array,
    labels: NDArray[np.int64],
    temperature: float = 1.0,
    *,
    transform: Callable[[Array], Array] | None = None,
    keeps_prediction: bool = True,
    sample_weight: Array | None = None,
) -> RowStatistics:
    """Compute the row statistics of p = softmax(f/T), in float64 and in chunks.

    With m = max_k f_k and Z = sum_k exp((f_k - m)/T): confidence 1/Z, which rounding can push
    neither above 1 nor below 1/C; NLL log Z - (f_y - m)/T, exact where the softmax saturates; Brier
    sum_k p_k^2 - 2 p_y + 1.

    Args:
        logits: (N, C), finite, C >= 2, of any real dtype; may be memory-mapped.
        labels: (N,) integers in 0..C-1.
        temperature: T > 0.
        transform: maps a block of logits (B, C) to (log-)probability scores (B, C) first, as a
            calibrator's ``transform`` does.
        keeps_prediction: the predicted class is the argmax of the raw logits, whatever
            ``transform`` does; False takes the argmax after it.
        sample_weight: (N,) >= 0, not all zero.

    Raises:
        InvalidInputError: non-finite logits, labels out of range, one class, a temperature that is
            not positive, or shapes that do not match.

    Example:
        >>> row_statistics(np.array([[2.0, 0.0]]), np.array([0])).correct
        array([ True])
    """
    check_rows(logits, labels, temperature)
    weight = None if sample_weight is None else checked_weights(sample_weight, len(labels))
    step = max(1, _CHUNK // logits.shape[1])
    bad, parts = 0, []
    for at in range(0, len(logits), step):
        values = np.array(logits[at : at + step], dtype=np.float64)
        finite = np.isfinite(values)
        bad += 0 if finite.all() else int((~finite.all(axis=1)).sum())
        if not bad:
            top = predicted = values.argmax(axis=1)
            if transform is not None:
                values = np.array(transform(values), dtype=np.float64)
                top = values.argmax(axis=1)
                predicted = predicted if keeps_prediction else top
            parts.append(_chunk(values, labels[at : at + step], predicted, top, temperature))
    if bad:
        raise InvalidInputError(
            f"got {bad} rows with NaN or infinite logits; remove them first (Predictions.invalid)"
        )
    return replace(RowStatistics.concatenate(parts), weight=weight)


def check_rows(logits: Array, labels: NDArray[Any], temperature: float = 1.0) -> None:
    """Check that logits (N, C) and labels (N,) belong together; the logits are not read.

    Raises:
        InvalidInputError: shapes that do not match, no rows, one class, labels that are not
            integers in 0..C-1, or a temperature that is not positive.

    Example:
        >>> check_rows(np.zeros((1, 2)), np.array([1]))
    """
    if logits.ndim != 2 or labels.shape != (len(logits),):
        raise InvalidInputError(
            f"got logits of shape {logits.shape} and labels of shape {labels.shape}; needed (N, C) "
            "and (N,)"
        )
    if not 0 < temperature < np.inf:
        raise InvalidInputError(f"got temperature {temperature}; needed a finite number > 0")
    classes = logits.shape[1]
    if classes < 2:
        raise InvalidInputError(
            f"got logits of {classes} class; needed at least 2 (one sigmoid output f is the two "
            "logits 0 and f)"
        )
    if not len(labels):
        raise InvalidInputError("got no rows; needed at least one row")
    if labels.dtype.kind not in "iu":
        raise InvalidInputError(f"got labels of type {labels.dtype}; needed integers")
    outside = int(((labels < 0) | (labels >= classes)).sum())
    if outside:
        raise InvalidInputError(
            f"got labels {labels.min()}..{labels.max()}, {outside} of {len(labels)} rows out of "
            f"range; needed labels in 0..{classes - 1}"
        )


def _chunk(
    values: NDArray[np.float64],
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    top: NDArray[np.int64],
    temperature: float,
) -> RowStatistics:
    """Compute one chunk's statistics; ``values`` is overwritten, ``top`` is its argmax."""
    rows = np.arange(len(values))
    # Beyond the range of float64 the probability is 0 and the NLL infinite, which is the answer.
    with np.errstate(over="ignore"):
        values -= values[rows, top][:, None]
        if temperature != 1.0:
            values /= temperature
    of_label = values[rows, labels]
    np.exp(values, out=values)
    total = values.sum(axis=1)
    # sum_k (p_k - y_k)^2 = sum_k p_k^2 - 2 p_y + 1
    squares = np.einsum("nc,nc->n", values, values) / total**2
    brier = squares - 2 * values[rows, labels] / total + 1
    return RowStatistics(
        confidence=values[rows, predicted] / total,
        predicted=predicted,
        correct=predicted == labels,
        nll=np.log(total) - of_label,
        brier=np.maximum(brier, 0.0),
    )


def checked_weights(sample_weight: Array, n: int) -> NDArray[np.float64]:
    """Return sample weights (n,) as float64, after a check.

    Raises:
        InvalidInputError: wrong shape, negative or non-finite weights, or all zero.

    Example:
        >>> checked_weights(np.array([1, 3]), 2)
        array([1., 3.])
    """
    weight = np.asarray(sample_weight, dtype=np.float64)
    if weight.shape != (n,):
        raise InvalidInputError(f"got sample weights of shape {weight.shape}; needed ({n},)")
    bad = int((~np.isfinite(weight) | (weight < 0)).sum())
    if bad or not weight.sum() > 0:
        found = f"{bad} negative or non-finite sample weights" if bad else "only weights of 0"
        raise InvalidInputError(f"got {found}; needed finite weights >= 0, not all 0")
    return weight


def group_sums(where: NDArray[Any], values: Array, groups: int) -> NDArray[np.float64]:
    """Sum values (N,) by group number (N,), in float64.

    Example:
        >>> group_sums(np.array([0, 1, 0]), np.array([1.0, 2.0, 3.0]), 2)
        array([4., 2.])
    """
    return np.bincount(where, values, minlength=groups).astype(np.float64)
