"""Fit temperature and threshold without measuring them on the rows they were fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration import Calibrator, RowStatistics, make_calibrator, row_statistics
from ebm_guard.calibration.metrics import ClassSums
from ebm_guard.data.splits import two_folds
from ebm_guard.errors import EbmGuardWarning, TooFewRowsError
from ebm_guard.gate import Guard, Threshold
from ebm_guard.intervals import Array, Metric
from ebm_guard.ood import Score
from ebm_guard.predictions import Predictions
from ebm_guard.report.record import Warned


class Choices(Protocol):
    """The settings that the protocol reads."""

    @property
    def calibrator(self) -> str: ...  # noqa: D102
    @property
    def threshold(self) -> str: ...  # noqa: D102
    @property
    def false_reject_rate(self) -> float: ...  # noqa: D102
    @property
    def assurance(self) -> float: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


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


@dataclass(frozen=True)
class Fitted:
    """What was fitted for a report, and what it says about the evaluation rows.

    Args:
        score: the gate's score.
        id_scores: (N,) the gate's score of the evaluation rows, None where it needs logits.
        calibrator: the deployed calibrator, None without labels.
        threshold: the deployed threshold, None where it could not be fitted.
        no_gate: why there is no threshold.
        after: row statistics under a calibrator that did not see the row, None without labels.
        accept: (N,) decisions by a threshold that did not see the row, None without a gate.
        splits: (rows to fit on, evaluation rows to judge) pairs that cover the evaluation rows;
            empty for a given guard, which is not refitted.
        parts: evaluation rows with the calibrator that has not seen them; empty without labels.
        fitted_on: where calibrator and threshold come from, in words.
        sentences: the protocol, in words.
        warnings: what went wrong on the way.
    """

    score: Score
    id_scores: NDArray[np.float64] | None
    calibrator: Calibrator | None
    threshold: Threshold | None
    no_gate: str
    after: RowStatistics | None
    accept: NDArray[np.bool_] | None
    splits: list[Split]
    parts: list[HeldOutPart]
    fitted_on: str
    sentences: list[str]
    warnings: list[Warned]

    @property
    def cut_on_energy(self) -> float | None:
        """The threshold, where the gate's score is the energy that the histogram shows."""
        shown = self.score.name == "energy" and self.score.settings() == {"energy_temperature": 1.0}
        return float(self.threshold.cut) if shown and self.threshold is not None else None


def fit_protocol(
    evaluation: Predictions,
    calibration: Predictions | None,
    guard: Guard | None,
    score: Score,
    choices: Choices,
) -> Fitted:
    """Fit on calibration rows, by cross-fitting, or not at all (a given guard)."""
    scores = _scores(score, evaluation)
    if guard is not None:
        return _given(evaluation, guard, score, scores)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EbmGuardWarning)
        if calibration is not None:
            fitted = _held_out(evaluation, calibration, score, scores, choices)
        else:
            fitted = _two_fold(evaluation, score, scores, choices)
    for warning in caught:
        if not issubclass(warning.category, EbmGuardWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    messages = {str(item.message) for item in caught if item.category is EbmGuardWarning}
    fitted.warnings.extend(Warned("calibration_fit", message) for message in sorted(messages))
    return fitted


def _scores(score: Score, part: Predictions) -> NDArray[np.float64] | None:
    if part.kind == "probs" and not score.from_probabilities:
        return None
    return score.of(part)


def _given(
    evaluation: Predictions,
    guard: Guard,
    score: Score,
    scores: NDArray[np.float64] | None,
) -> Fitted:
    threshold = guard.state().threshold
    every = np.arange(len(evaluation), dtype=np.int64)
    reason = "" if scores is not None else _needs_logits(score)
    return Fitted(
        score=score,
        id_scores=scores,
        calibrator=guard.calibrator,
        threshold=threshold if scores is not None else None,
        no_gate=reason,
        after=_after(guard.calibrator, evaluation),
        accept=None if scores is None else scores <= float(threshold.cut),
        splits=[],
        parts=_parts(evaluation, [(guard.calibrator, every)], "the given guard"),
        fitted_on=f"the given guard ({guard.facts.get('n', 0):,} rows of "
        f"{guard.facts.get('source', 'unknown')})",
        sentences=[
            (
                "The given guard is evaluated as it is: neither temperature nor threshold is "
                "refitted, and all evaluation rows count. That these rows are new to it is checked "
                "only for the whole set."
            ),
        ],
        warnings=[],
    )


def _held_out(
    evaluation: Predictions,
    calibration: Predictions,
    score: Score,
    scores: NDArray[np.float64] | None,
    choices: Choices,
) -> Fitted:
    calibrator = _calibrator(calibration, choices.calibrator)
    threshold, reason = _threshold(_scores(score, calibration), score, choices)
    where = f"{len(calibration):,} calibration rows"
    every = np.arange(len(evaluation), dtype=np.int64)
    return Fitted(
        score=score,
        id_scores=scores,
        calibrator=calibrator,
        threshold=threshold,
        no_gate=reason,
        after=_after(calibrator, evaluation),
        accept=None if threshold is None or scores is None else scores <= float(threshold.cut),
        splits=[Split(calibration, every)],
        parts=_parts(evaluation, [(calibrator, every)], where),
        fitted_on=where,
        sentences=[
            (
                f"Temperature and threshold are fitted on {where} and measured on "
                f"{len(evaluation):,} evaluation rows that share none with them."
            ),
        ],
        warnings=[],
    )


def _two_fold(
    evaluation: Predictions,
    score: Score,
    scores: NDArray[np.float64] | None,
    choices: Choices,
) -> Fitted:
    n = len(evaluation)
    first, second = two_folds(n, evaluation.labels, choices.seed)
    pairs = ((first, second), (second, first))
    splits = [Split(evaluation.select(fit), test) for fit, test in pairs]
    splits = splits if min(len(first), len(second)) >= 2 else []
    fits = [_calibrator(split.fit, choices.calibrator) for split in splits]
    halves = [(fit, split.test) for fit, split in zip(fits, splits, strict=True)]
    accept: NDArray[np.bool_] | None = np.zeros(n, dtype=bool)
    reason = ""
    for fit, test in pairs:
        fold, reason = _threshold(None if scores is None else scores[fit], score, choices)
        if fold is None or scores is None or accept is None:
            accept = None
            break
        accept[test] = scores[test] <= float(fold.cut)
    threshold = _threshold(scores, score, choices)[0] if accept is not None else None
    return Fitted(
        score=score,
        id_scores=scores,
        calibrator=_calibrator(evaluation, choices.calibrator),
        threshold=threshold,
        no_gate=f"each half of the evaluation rows must do alone: {reason}" if reason else "",
        after=_joined(fits, evaluation, splits),
        accept=accept,
        splits=splits,
        parts=_parts(evaluation, halves, "the other half"),
        fitted_on=f"all {n:,} evaluation rows, as deployed",
        sentences=[
            (
                "No calibration data was given, so two-fold cross-fitting is used (stratified "
                f"by label, seed {choices.seed}): temperature and threshold are fitted on one half "
                "and measured on the other, both ways; the figures `after` and the coverage join "
                "both halves."
            ),
            (
                f"The temperature and the threshold shown are those fitted on all {n:,} rows, as "
                "`ebm-guard fit` would deploy them; OOD rows are judged by that threshold."
            ),
        ],
        warnings=[],
    )


def cross_fitted(name: str, evaluation: Predictions, splits: list[Split]) -> RowStatistics | None:
    """Return statistics of the evaluation rows under a calibrator that did not see them.

    Args:
        name: a registered calibrator.
        evaluation: the rows.
        splits: who judges whom.

    Returns:
        In the order of the evaluation rows; None without labels or splits.
    """
    return _joined([_calibrator(split.fit, name) for split in splits], evaluation, splits)


def _joined(
    fits: Sequence[Calibrator | None], evaluation: Predictions, splits: list[Split]
) -> RowStatistics | None:
    """Return the statistics of all splits, in the order of the evaluation rows."""
    parts = []
    for fit, split in zip(fits, splits, strict=True):
        part = _after(fit, evaluation.select(split.test))
        if part is None:
            return None
        parts.append(part)
    if not parts:
        return None
    order = np.argsort(np.concatenate([split.test for split in splits]))
    return RowStatistics.concatenate(parts).select(order)


def _parts(
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


def cross_fitted_classwise(fitted: Fitted, evaluation: Predictions, seed: int) -> Metric:
    """Compute the classwise ECE of the cross-fitted calibrator, which needs all probabilities."""
    labels = evaluation.require_labels("classwise ECE")
    name = "temperature" if fitted.calibrator is None else fitted.calibrator.name
    sums = ClassSums()
    for split in fitted.splits:
        calibrator = _calibrator(split.fit, name)
        transform = None if calibrator is None else calibrator.transform
        sums = sums.add(evaluation.logits[split.test], labels[split.test], transform=transform)
    return sums.metric(seed=seed)


def _calibrator(part: Predictions, name: str) -> Calibrator | None:
    if part.labels is None:
        return None
    return make_calibrator(name).fit(part.logits, part.labels, part.sample_weight)


def _after(calibrator: Calibrator | None, part: Predictions) -> RowStatistics | None:
    if calibrator is None or part.labels is None:
        return None
    return row_statistics(
        part.logits,
        part.labels,
        transform=calibrator.transform,
        keeps_prediction=calibrator.keeps_prediction,
        sample_weight=part.sample_weight,
    )


def _threshold(
    scores: NDArray[np.float64] | None, score: Score, choices: Choices
) -> tuple[Threshold | None, str]:
    if scores is None:
        return None, _needs_logits(score)
    try:
        threshold = Threshold.fit(
            scores, choices.threshold, choices.false_reject_rate, choices.assurance
        )
    except TooFewRowsError as error:
        return None, str(error)
    return threshold, ""


def _needs_logits(score: Score) -> str:
    return f"a gate on {score.name} is not available: needs logits, got probabilities"


def calibrator_facts(fitted: Fitted) -> dict[str, Any] | None:
    """Return what the report says about the deployed calibrator."""
    if fitted.calibrator is None:
        return None
    empty = {"temperature": None, "standard_error": None, "chosen": None, "note": ""}
    return empty | fitted.calibrator.facts() | {"fitted_on": fitted.fitted_on}
