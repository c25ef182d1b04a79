"""Fit temperature and threshold without measuring them on the rows they were fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration import Calibrator, RowStatistics, row_statistics
from ebm_guard.data.splits import two_folds
from ebm_guard.errors import EbmGuardWarning, TooFewRowsError
from ebm_guard.gate import Guard, RiskRule, Threshold
from ebm_guard.gate.class_conditional import AnyThreshold
from ebm_guard.ood import Score, make_score
from ebm_guard.predictions import Predictions
from ebm_guard.report.held_out import (
    HeldOutPart,
    Split,
    fit_calibrator,
    held_out_parts,
    joined,
    statistics_after,
)
from ebm_guard.report.record import Warned
from ebm_guard.report.score_table import Calibration, ScoreColumn


class Choices(Protocol):
    """The settings that the protocol reads."""

    @property
    def score(self) -> str: ...  # noqa: D102
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
        accepts: maps other rows to the decisions of the deployed gate, None without one.
        splits: (rows to fit on, evaluation rows to judge) pairs that cover the evaluation rows;
            empty for a given guard, which is not refitted.
        parts: evaluation rows with the calibrator that has not seen them; empty without labels.
        fitted_on: where calibrator and threshold come from, in words.
        sentences: the protocol, in words.
        warnings: what went wrong on the way.
        risk_rule: the certified rule of a given guard, which lowers its coverage.
    """

    score: Score
    id_scores: NDArray[np.float64] | None
    calibrator: Calibrator | None
    threshold: AnyThreshold | None
    no_gate: str
    after: RowStatistics | None
    accept: NDArray[np.bool_] | None
    accepts: Callable[[Predictions], NDArray[np.bool_]] | None
    splits: list[Split]
    parts: list[HeldOutPart]
    fitted_on: str
    sentences: list[str]
    warnings: list[Warned]
    risk_rule: RiskRule | None = None

    @property
    def cut_on_energy(self) -> float | None:
        """The threshold, where the gate's score is the energy that the histogram shows."""
        shown = self.score.name == "energy" and self.score.settings() == {"energy_temperature": 1.0}
        return self.cut if shown else None

    def correct(self, evaluation: Predictions) -> NDArray[np.bool_] | None:
        """Return which rows the deployed prediction gets right; None without labels.

        A calibrator such as ``vector`` may change the predicted class, so these are its rows.
        """
        if self.after is not None:
            return self.after.correct
        if evaluation.labels is None:
            return None
        return row_statistics(evaluation.logits, evaluation.labels).correct

    @property
    def cut(self) -> float | None:
        """The threshold's one cut; None without a gate, or with a cut for each class."""
        return float(self.threshold.cut) if isinstance(self.threshold, Threshold) else None


def fit_protocol(
    evaluation: Predictions,
    calibration: Calibration | None,
    guard: Guard | None,
    gate: ScoreColumn,
    choices: Choices,
) -> Fitted:
    """Fit on calibration rows, by cross-fitting, or not at all (a given guard).

    Args:
        evaluation: ID rows to judge.
        calibration: rows to fit on, or None.
        guard: a fitted guard, or None.
        gate: the gate's score of the rows.
        choices: what is fitted.
    """
    if guard is not None:
        return _given(evaluation, guard, gate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EbmGuardWarning)
        if calibration is not None:
            fitted = _held_out(evaluation, calibration, gate, choices)
        else:
            fitted = _two_fold(evaluation, gate, choices)
    for warning in caught:
        if not issubclass(warning.category, EbmGuardWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    messages = {str(item.message) for item in caught if item.category is EbmGuardWarning}
    fitted.warnings.extend(Warned("calibration_fit", message) for message in sorted(messages))
    return fitted


def _given(evaluation: Predictions, guard: Guard, gate: ScoreColumn) -> Fitted:
    every = np.arange(len(evaluation), dtype=np.int64)
    usable = bool(gate.values)
    return Fitted(
        score=guard.score,
        id_scores=gate.values.get("evaluation"),
        calibrator=guard.calibrator,
        threshold=guard.state().threshold if usable else None,
        no_gate="" if usable else _no_scores(gate, guard.score.name),
        after=statistics_after(guard.calibrator, evaluation),
        accept=guard.decide_stored(evaluation).accept.numpy() if usable else None,
        accepts=(lambda part: guard.decide_stored(part).accept.numpy()) if usable else None,
        splits=[],
        parts=held_out_parts(evaluation, [(guard.calibrator, every)], "the given guard"),
        fitted_on=f"the given guard ({guard.facts.get('n', 0):,} rows of "
        f"{guard.facts.get('source', 'unknown')})",
        sentences=[
            (
                "The given guard is evaluated as it is: neither calibrator nor threshold is "
                "refitted, and all evaluation rows count. That these rows are new to it is checked "
                "only for the whole set."
            ),
        ],
        warnings=[],
        risk_rule=guard.rule,
    )


def _held_out(
    evaluation: Predictions, calibration: Calibration, gate: ScoreColumn, choices: Choices
) -> Fitted:
    calibrator = fit_calibrator(calibration.rows, choices.calibrator)
    scores = gate.values.get("evaluation")
    threshold, reason = _threshold(_of(gate, calibration.threshold_rows), gate, choices)
    where = f"{len(calibration.rows):,} calibration rows"
    every = np.arange(len(evaluation), dtype=np.int64)
    return Fitted(
        score=_score(gate, choices),
        id_scores=scores,
        calibrator=calibrator,
        threshold=threshold,
        no_gate=reason,
        after=statistics_after(calibrator, evaluation),
        accept=None if threshold is None or scores is None else scores <= float(threshold.cut),
        accepts=_by(gate, threshold),
        splits=[Split(calibration.rows, every)],
        parts=held_out_parts(evaluation, [(calibrator, every)], where),
        fitted_on=where,
        sentences=[
            (
                f"Calibrator and threshold are fitted on {where} and measured on "
                f"{len(evaluation):,} evaluation rows that share none with them."
            ),
        ],
        warnings=[],
    )


def _two_fold(evaluation: Predictions, gate: ScoreColumn, choices: Choices) -> Fitted:
    n = len(evaluation)
    first, second = two_folds(n, evaluation.labels, choices.seed)
    pairs = [(first, second), (second, first)]
    splits = [Split(evaluation.select(fit), test) for fit, test in pairs]
    splits = splits if min(len(first), len(second)) >= 2 else []
    fits = [fit_calibrator(split.fit, choices.calibrator) for split in splits]
    halves = [(fit, split.test) for fit, split in zip(fits, splits, strict=True)]
    scores = gate.values.get("evaluation")
    turns = _turns(evaluation, gate, choices.seed) if gate.folds else pairs
    accept, reason = _accepted(scores, turns, gate, choices)
    # A detector of its own keeps half of the rows to itself; the other half gives the cut.
    deployed = scores if scores is None or not gate.folds else scores[gate.folds[0][1]]
    threshold = _threshold(deployed, gate, choices)[0] if accept is not None else None
    share = "half" if len(turns) == 2 else "quarter"
    return Fitted(
        score=_score(gate, choices),
        id_scores=scores,
        calibrator=fit_calibrator(evaluation, choices.calibrator),
        threshold=threshold,
        no_gate=f"each {share} of the evaluation rows must do alone: {reason}" if reason else "",
        after=joined(fits, evaluation, splits),
        accept=accept,
        accepts=_by(gate, threshold),
        splits=splits,
        parts=held_out_parts(evaluation, halves, "the other half"),
        fitted_on=f"all {n:,} evaluation rows, as deployed",
        sentences=_two_fold_sentences(n, choices.seed, own_detector=bool(gate.folds)),
        warnings=[],
    )


def _turns(
    evaluation: Predictions, gate: ScoreColumn, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Split the rows of each detector into halves: one gives the cut, the other is judged."""
    turns = []
    for _, rows in gate.folds:
        labels = None if evaluation.labels is None else evaluation.labels[rows]
        first, second = (rows[half] for half in two_folds(len(rows), labels, seed + 1))
        turns += [(first, second), (second, first)]
    return turns


def _accepted(
    scores: NDArray[np.float64] | None,
    turns: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    gate: ScoreColumn,
    choices: Choices,
) -> tuple[NDArray[np.bool_] | None, str]:
    """Judge every row by a threshold that did not see it, or say why that is not possible."""
    if scores is None:
        return None, _no_scores(gate, choices.score)
    accept = np.zeros(len(scores), dtype=bool)
    for fit, test in turns:
        fold, reason = _threshold(scores[fit], gate, choices)
        if fold is None:
            return None, reason
        accept[test] = scores[test] <= float(fold.cut)
    return accept, ""


def _two_fold_sentences(n: int, seed: int, *, own_detector: bool) -> list[str]:
    first = (
        "No calibration data was given, so two-fold cross-fitting is used (stratified by label, "
        f"seed {seed}): calibrator and threshold are fitted on one half and measured on the "
        "other, both ways; the figures `after` and the coverage join both halves."
    )
    if own_detector:
        return [
            first,
            (
                "The gate's score has statistics of its own: each detector is fitted on one half, "
                "its threshold on a quarter, and measured on the last quarter, all ways. The "
                "threshold shown belongs to the detector of the first half and the scores of the "
                "second; OOD rows are judged by it."
            ),
        ]
    return [
        first,
        (
            f"The calibrator and the threshold shown are those fitted on all {n:,} rows, as "
            "`ebm-guard fit` would deploy them; OOD rows are judged by that threshold."
        ),
    ]


def _score(gate: ScoreColumn, choices: Choices) -> Score:
    return make_score(choices.score) if gate.score is None else gate.score


def _by(
    gate: ScoreColumn, threshold: Threshold | None
) -> Callable[[Predictions], NDArray[np.bool_]] | None:
    score = gate.score
    if threshold is None or score is None:
        return None
    cut = float(threshold.cut)
    return lambda part: score.of(part) <= cut


def _of(gate: ScoreColumn, part: Predictions) -> NDArray[np.float64] | None:
    return None if gate.score is None or not gate.values else gate.score.of(part)


def _threshold(
    scores: NDArray[np.float64] | None, gate: ScoreColumn, choices: Choices
) -> tuple[Threshold | None, str]:
    if scores is None:
        return None, _no_scores(gate, choices.score)
    try:
        threshold = Threshold.fit(
            scores, choices.threshold, choices.false_reject_rate, choices.assurance
        )
    except TooFewRowsError as error:
        return None, str(error)
    return threshold, ""


def _no_scores(gate: ScoreColumn, name: str) -> str:
    return f"a gate on {name} is not available: {gate.reason}"


def calibrator_facts(fitted: Fitted) -> dict[str, Any] | None:
    """Return what the report says about the deployed calibrator."""
    if fitted.calibrator is None:
        return None
    empty = {"temperature": None, "standard_error": None, "chosen": None, "note": ""}
    return empty | fitted.calibrator.facts() | {"fitted_on": fitted.fitted_on}
