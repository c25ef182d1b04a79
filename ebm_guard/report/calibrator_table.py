"""All calibrators on the user's data, by the report's own protocol: is a richer one worth it?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebm_guard import registry
from ebm_guard.calibration import RowStatistics
from ebm_guard.calibration.metrics import ece, nll
from ebm_guard.calibration.metrics.proper import weighted_mean
from ebm_guard.errors import EbmGuardError, EbmGuardWarning
from ebm_guard.intervals import Metric
from ebm_guard.predictions import Predictions
from ebm_guard.report.crossfit import Fitted
from ebm_guard.report.held_out import cross_fitted
from ebm_guard.report.record import NotRun, Record

REFERENCE = "temperature"
# A candidate with a weight for each class is fitted by dozens of passes; beyond this many logits
# a report would take minutes longer for a table.
_LOGITS = 1_000_000


@dataclass(frozen=True)
class CalibratorRow(Record):
    """One calibrator on the evaluation rows, fitted on other rows.

    Args:
        name: the calibrator.
        nll: mean negative log-likelihood, None where it was not run.
        ece: of the top label.
        difference: NLL minus that of temperature, on the same rows; None for temperature itself.
        better: True, False, or None where the interval of the difference holds 0.
        note: why it was not run, or ''.
    """

    name: str
    nll: Metric | None = None
    ece: Metric | None = None
    difference: Metric | None = None
    better: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class CalibratorTable(Record):
    """The candidates, and in words whether one beats temperature scaling."""

    deployed: str
    sentence: str
    rows: list[CalibratorRow]


def calibrator_table(
    evaluation: Predictions, fitted: Fitted, seed: int
) -> CalibratorTable | NotRun:
    """Measure every registered calibrator by the report's protocol.

    Returns:
        The table, or why there is none: a given guard is evaluated as it is.
    """
    if not fitted.splits or fitted.after is None or fitted.calibrator is None:
        return NotRun("calibrators are compared where the report fits them itself")
    deployed = fitted.calibrator.name
    names = [row.name for row in registry.methods("calibrator") if row.name != "auto"]
    size = max(len(split.fit) for split in fitted.splits) * evaluation.num_classes
    reference = _try(REFERENCE, evaluation, fitted, deployed)
    rows = []
    for name in names:
        wide = name not in (REFERENCE, "isotonic", deployed) and size > _LOGITS
        if wide:
            note = (
                f"not run: {size:,} logits to fit on take minutes; ask for it with "
                f"`--calibrator {name}`"
            )
            rows.append(CalibratorRow(name, note=note))
            continue
        found = reference if name == REFERENCE else _try(name, evaluation, fitted, deployed)
        rows.append(_row(name, found, reference, seed))
    return CalibratorTable(deployed, _sentence(rows), rows)


def _try(name: str, evaluation: Predictions, fitted: Fitted, deployed: str) -> RowStatistics | str:
    """Cross-fit a calibrator, or say why it refuses."""
    if name == deployed and fitted.after is not None:
        return fitted.after
    try:
        with warnings.catch_warnings():
            # Its status is in the table; only the deployed calibrator's warnings concern the user.
            warnings.simplefilter("ignore", EbmGuardWarning)
            found = cross_fitted(name, evaluation, fitted.splits)
    except EbmGuardError as error:
        return f"not run: {error}"
    return "not run: no labels" if found is None else found


def _row(
    name: str, found: RowStatistics | str, reference: RowStatistics | str, seed: int
) -> CalibratorRow:
    if isinstance(found, str):
        return CalibratorRow(name, note=found)
    difference: Metric | None = None
    better: bool | None = None
    if name != REFERENCE and not isinstance(reference, str):
        difference = weighted_mean(found.nll - reference.nll, found.weight)
        better = _better(difference)
    return CalibratorRow(name, nll(found), ece(found, seed=seed), difference, better)


def _better(difference: Metric) -> bool | None:
    if difference.low is None or difference.high is None:
        return None
    if difference.high < 0:
        return True
    return False if difference.low > 0 else None


def _sentence(rows: list[CalibratorRow]) -> str:
    better = [row for row in rows if row.better and row.difference is not None]
    if not better:
        return (
            "No calibrator is clearly better than temperature scaling on these rows (NLL, paired, "
            "95 %)."
        )
    best = min(better, key=_gain)
    change: Any = best.difference
    low, high = np.round([change.low, change.high], 4)
    return (
        f"{best.name} is better than temperature scaling on these rows: its NLL is lower by "
        f"{-change.value:.4f} (paired difference {change.value:.4f} [{low:g}, {high:g}], 95 % for "
        "each candidate)."
    )


def _gain(row: CalibratorRow) -> float:
    return 0.0 if row.difference is None else row.difference.value
