"""Rows with the calibrator that has not seen them: what every figure after calibration rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration import Calibrator, RowStatistics, make_calibrator, row_statistics
from ebm_guard.calibration.metrics import ClassSums
from ebm_guard.intervals import Array, Metric
from ebm_guard.predictions import Predictions


@dataclass(frozen=True)
class Split:
    """Rows to fit on, and the evaluation rows that may be judged by that fit.

    Args:
        fit: predictions that share no row with the test rows.
        test: numbers of the evaluation rows.
    """

    fit: Predictions
    test: NDArray[np.int64]


@dataclass(frozen=True)
class HeldOutPart:
    """Evaluation rows that one calibrator has not seen.

    Given that calibrator they are exchangeable with inputs to come, which rows that were
    calibrated by two different calibrators are not.

    Args:
        index: (M,) positions among the evaluation rows.
        log_probabilities: maps positions (B,) to log p(y|x) (B, C) under that calibrator.
        fitted_on: where the calibrator comes from, in words.
    """

    index: NDArray[np.int64]
    log_probabilities: Callable[[NDArray[np.int64]], Array]
    fitted_on: str


def cross_fitted(name: str, evaluation: Predictions, splits: list[Split]) -> RowStatistics | None:
    """Return statistics of the evaluation rows under a calibrator that did not see them.

    Args:
        name: a registered calibrator.
        evaluation: the rows.
        splits: who judges whom.

    Returns:
        In the order of the evaluation rows; None without labels or splits.
    """
    return joined([fit_calibrator(split.fit, name) for split in splits], evaluation, splits)


def joined(
    fits: Sequence[Calibrator | None], evaluation: Predictions, splits: list[Split]
) -> RowStatistics | None:
    """Return the statistics of all splits, in the order of the evaluation rows."""
    parts = []
    for fit, split in zip(fits, splits, strict=True):
        part = statistics_after(fit, evaluation.select(split.test))
        if part is None:
            return None
        parts.append(part)
    if not parts:
        return None
    order = np.argsort(np.concatenate([split.test for split in splits]))
    return RowStatistics.concatenate(parts).select(order)


def held_out_parts(
    evaluation: Predictions,
    fits: Sequence[tuple[Calibrator | None, NDArray[np.int64]]],
    fitted_on: str,
) -> list[HeldOutPart]:
    """Pair evaluation rows with the calibrator that has not seen them."""
    parts = []
    for calibrator, test in fits:
        if calibrator is None or evaluation.labels is None:
            return []
        parts.append(HeldOutPart(test, _Transformed(evaluation, calibrator), fitted_on))
    return parts


@dataclass(frozen=True)
class _Transformed:
    """Calibrated log-probabilities of rows, computed when they are asked for."""

    evaluation: Predictions
    calibrator: Calibrator

    def __call__(self, rows: NDArray[np.int64]) -> Array:
        return self.calibrator.transform(self.evaluation.logits[rows])


def cross_fitted_classwise(
    name: str, evaluation: Predictions, splits: list[Split], seed: int
) -> Metric:
    """Compute the classwise ECE of the cross-fitted calibrator, which needs all probabilities."""
    labels = evaluation.require_labels("classwise ECE")
    sums = ClassSums()
    for split in splits:
        calibrator = fit_calibrator(split.fit, name)
        transform = None if calibrator is None else calibrator.transform
        sums = sums.add(evaluation.logits[split.test], labels[split.test], transform=transform)
    return sums.metric(seed=seed)


def fit_calibrator(part: Predictions, name: str) -> Calibrator | None:
    """Fit a registered calibrator on rows; None without labels."""
    if part.labels is None:
        return None
    return make_calibrator(name).fit(part.logits, part.labels, part.sample_weight)


def statistics_after(calibrator: Calibrator | None, part: Predictions) -> RowStatistics | None:
    """Return the rows' statistics after calibration; None without calibrator or labels."""
    if calibrator is None or part.labels is None:
        return None
    return row_statistics(
        part.logits,
        part.labels,
        transform=calibrator.transform,
        keeps_prediction=calibrator.keeps_prediction,
        sample_weight=part.sample_weight,
    )
