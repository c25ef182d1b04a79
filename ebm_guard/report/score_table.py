"""All scores of all rows, each row by a detector that has not seen it, or why there are none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebm_guard import registry
from ebm_guard.data.splits import two_folds
from ebm_guard.errors import EbmGuardError
from ebm_guard.ood import SCORE_FAMILIES, Score, make_score
from ebm_guard.predictions import Predictions

Values = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreColumn:
    """One score on every set.

    Args:
        score: as it would be deployed; None where it did not run.
        values: by set, ``evaluation`` included, (N,) higher = more OOD; empty where it did not run.
        reason: why it did not run, or ''.
        folds: the detector of each fold with the evaluation rows that it may judge; empty where
            one detector judges all.
    """

    score: Score | None
    values: Mapping[str, Values]
    reason: str = ""
    folds: tuple[tuple[Score, NDArray[np.int64]], ...] = ()


@dataclass(frozen=True)
class ScoreTable:
    """All registered scores, the gate's among them, by name.

    Args:
        columns: by score.
        sentences: where the detectors were fitted, in words; empty without feature scores.
    """

    columns: Mapping[str, ScoreColumn]
    sentences: list[str]

    def ran(self) -> dict[str, ScoreColumn]:
        """Return the scores that have values."""
        return {name: column for name, column in self.columns.items() if column.values}


@dataclass(frozen=True)
class Calibration:
    """Rows that calibrator and threshold may be fitted on.

    Args:
        rows: for the calibrator.
        threshold_rows: for the threshold: all of them, or those that no detector was fitted on.
    """

    rows: Predictions
    threshold_rows: Predictions


def detector_rows(
    gate: Score, calibration: Predictions | None, fit: Predictions | None, seed: int
) -> tuple[Predictions | None, Calibration | None]:
    """Say which rows the detectors are fitted on, and which are left for the threshold.

    Without fit rows, half of the calibration rows go to the detectors. The gate's score is fitted
    here, where it needs that and there are rows.

    Args:
        gate: the gate's score.
        calibration: ID rows for calibrator and threshold, or None.
        fit: ID rows for the detectors, or None.
        seed: of the halves.

    Returns:
        The detectors' rows, None for cross-fitting, and the calibration rows, None without any.
    """
    if calibration is None:
        detector, held = fit, None
    elif fit is not None:
        detector, held = fit, Calibration(calibration, calibration)
    else:
        first, second = two_folds(len(calibration), calibration.labels, seed)
        detector = calibration.select(first)
        rest = calibration.select(second) if gate.needs_fit else calibration
        held = Calibration(calibration, rest)
    unfitted = gate.needs_fit and not is_ready(gate)
    if unfitted and detector is not None and gate.why_not_fit(detector) is None:
        gate.fit(detector)
    return detector, held


def score_table(
    evaluation: Predictions,
    ood: Mapping[str, Predictions],
    fit: Predictions | None,
    gate: Score,
    seed: int,
    role: str = "fit",
) -> ScoreTable:
    """Score every set by every registered score.

    A score that is fitted takes the ``fit`` rows. Without them it is cross-fitted: each half of the
    evaluation rows is judged by a detector fitted on the other half, and the OOD rows are dealt to
    the two detectors, so that every row is judged once, by a detector that has not seen it.

    Args:
        evaluation: ID rows.
        ood: OOD sets by name.
        fit: ID rows for the detectors' statistics, or None.
        gate: the gate's score, fitted already where it needs that.
        seed: of the folds and of the deal.
        role: of the ``fit`` rows: ``calibration`` where half of those rows stand in.

    Returns:
        The table; a score that cannot run has its reason.
    """
    sets = {"evaluation": evaluation, **ood}
    columns = {}
    for method in (row for family in SCORE_FAMILIES for row in registry.methods(family)):
        if method.name == "combine":
            continue  # a recipe for several scores, not a score of its own
        if method.name == gate.name and is_ready(gate):
            columns[method.name] = _direct(gate, sets)
            continue
        columns[method.name] = _column(method.name, sets, fit, seed)
    if gate.name not in columns:
        columns[gate.name] = _direct(gate, sets)
    fitted = any(item.score is not None and item.score.needs_fit for item in columns.values())
    return ScoreTable(columns, [_where(fit, seed, role)] if fitted else [])


def is_ready(score: Score) -> bool:
    """Whether a score can score rows: nothing to fit, or fitted."""
    return not score.needs_fit or score.settings().get("fit") is not None


def _where(fit: Predictions | None, seed: int, role: str) -> str:
    if fit is not None:
        return (
            f"The statistics of the feature scores are fitted on {len(fit):,} rows of the role "
            f"{role}."
        )
    return (
        "No fit data was given, so feature scores are cross-fitted as well: their statistics come "
        "from one half of the evaluation rows and judge the other half, both ways; the OOD rows "
        f"are dealt to the two detectors at random (seed {seed})."
    )


def _column(
    name: str, sets: Mapping[str, Predictions], fit: Predictions | None, seed: int
) -> ScoreColumn:
    score, evaluation = make_score(name), sets["evaluation"]
    if not score.needs_fit:
        return _direct(score, sets)
    reason = score.why_not_fit(evaluation if fit is None else fit)
    if reason is not None:
        return ScoreColumn(None, {}, reason)
    try:
        if fit is not None:
            return _direct(score.fit(fit), sets)
        return _cross_fitted(lambda: make_score(name), sets, seed)
    except EbmGuardError as error:
        return ScoreColumn(None, {}, str(error))


def _direct(score: Score, sets: Mapping[str, Predictions]) -> ScoreColumn:
    for part in sets.values():
        reason = score.why_not(part)
        if reason is not None:
            return ScoreColumn(None, {}, reason)
    return ScoreColumn(score, {name: score.of(part) for name, part in sets.items()})


def _cross_fitted(
    make: Callable[[], Score], sets: Mapping[str, Predictions], seed: int
) -> ScoreColumn:
    evaluation = sets["evaluation"]
    first, second = two_folds(len(evaluation), evaluation.labels, seed)
    folds = tuple(
        (make().fit(evaluation.select(fit)), test)
        for fit, test in ((first, second), (second, first))
    )
    values = {}
    for name, part in sets.items():
        found = np.empty(len(part))
        turns = [test for _, test in folds]
        if name != "evaluation":
            dealt = np.random.default_rng([seed, len(part)]).permutation(len(part))
            turns = [dealt[: len(part) // 2], dealt[len(part) // 2 :]]
        for (score, _), rows in zip(folds, turns, strict=True):
            if len(rows):
                found[rows] = score.of(part.select(rows))
        values[name] = found
    return ScoreColumn(folds[0][0], values, folds=folds)
