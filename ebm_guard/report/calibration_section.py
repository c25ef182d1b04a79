"""The calibration section: before and after, class by class, under shift, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration import Calibrator, RowStatistics, calibration_metrics, row_statistics
from ebm_guard.calibration.metrics import (
    CalibrationMetrics,
    class_table,
    ece,
    ece_classwise,
    ece_l2_debiased,
    mce,
    overconfidence,
)
from ebm_guard.calibration.metrics.proper import accuracy, weighted_mean
from ebm_guard.intervals import Metric
from ebm_guard.predictions import Predictions
from ebm_guard.report.calibrator_table import calibrator_table
from ebm_guard.report.crossfit import Fitted, calibrator_facts
from ebm_guard.report.held_out import cross_fitted_classwise
from ebm_guard.report.record import (
    ATTENTION,
    BAD,
    GOOD,
    CalibrationSection,
    CalibrationSide,
    NotRun,
    Record,
    Verdict,
)

# Customs, not theorems: a gap of 3 points is small beside most decisions, 10 points is not.
_SMALL_GAP, _LARGE_GAP = 0.03, 0.10
_WORST_CLASSES = 10
# Below this, fifteen bins hold a row or two each and ECE says nothing.
ECE_ROWS = 100


@dataclass(frozen=True)
class ClassRow(Record):
    """Calibration of the rows predicted to be of one class; see ``class_table``."""

    name: str
    index: int
    n: int
    accuracy: Metric | None
    overconfidence: Metric | None
    p_value: float | None
    flagged: bool


@dataclass(frozen=True)
class ClassTable(Record):
    """The predicted classes, the clearest miscalibration first.

    Args:
        of: number of classes.
        flagged: how many are flagged.
        side: ``before`` or ``after``: whose confidence is looked at.
        rows: the worst ten, or all on request.
    """

    of: int
    flagged: int
    side: str
    rows: list[ClassRow]


@dataclass(frozen=True)
class PartCalibration(Record):
    """Calibration, after the calibrator, of the rows on one side of the gate."""

    n: int
    accuracy: Metric
    overconfidence: Metric
    ece: Metric | None


@dataclass(frozen=True)
class ShiftedConfidence(Record):
    """Mean confidence on an OOD set, where no confidence is deserved."""

    before: Metric
    after: Metric | None


def calibration_section(
    evaluation: Predictions,
    ood: Mapping[str, Predictions],
    fitted: Fitted,
    seed: int,
    metrics: str = "default",
) -> CalibrationSection | NotRun:
    """Measure calibration before and after the calibrator.

    Args:
        evaluation: ID rows.
        ood: OOD sets, for the confidence on them.
        fitted: the protocol's fits.
        seed: of the draws.
        metrics: ``default``, or ``all`` for the metrics on request and the whole table of classes.

    Returns:
        The section, or why there is none (no labels).
    """
    if evaluation.labels is None:
        return NotRun(f"{evaluation.source} has no labels, so nothing can be said about accuracy")
    before = row_statistics(
        evaluation.logits, evaluation.labels, sample_weight=evaluation.sample_weight
    )
    first = calibration_metrics(before, seed)
    everything = metrics == "all"
    after: CalibrationSide | NotRun = NotRun("no labelled rows to fit a calibrator on")
    measured = first
    if fitted.after is not None:
        measured = calibration_metrics(fitted.after, seed)
        extra = _on_request(evaluation, fitted.after, fitted, seed) if everything else {}
        after = CalibrationSide(measured, extra, calibrator_facts(fitted))
    extra = _on_request(evaluation, before, None, seed) if everything else {}
    inside, outside = _by_gate(fitted, seed)
    return CalibrationSection(
        verdict=_verdict(first, measured, fitted),
        before=CalibrationSide(first, extra),
        after=after,
        calibrators=calibrator_table(evaluation, fitted, seed),
        classes=_classes(evaluation, before, fitted.after, everything=everything),
        accepted=inside,
        rejected=outside,
        ood_confidence={name: _confidence(part, fitted.calibrator) for name, part in ood.items()},
        protocol=fitted.sentences[0],
    )


def _on_request(
    evaluation: Predictions, rows: RowStatistics, fitted: Fitted | None, seed: int
) -> dict[str, Metric]:
    """Compute the metrics that are not shown by default; ``fitted`` None means before."""
    logits, labels = evaluation.logits, evaluation.require_labels("classwise ECE")
    if fitted is not None and fitted.splits:
        name = "temperature" if fitted.calibrator is None else fitted.calibrator.name
        classwise = cross_fitted_classwise(name, evaluation, fitted.splits, seed)
    else:
        calibrator = None if fitted is None else fitted.calibrator
        transform = None if calibrator is None else calibrator.transform
        classwise = ece_classwise(logits, labels, transform=transform, seed=seed)
    extra = {"ece_classwise": classwise, "mce": mce(rows, seed=seed)}
    if rows.weight is None:
        extra["ece_l2_debiased"] = ece_l2_debiased(rows, seed=seed)
    return extra


def _classes(
    evaluation: Predictions, before: RowStatistics, after: RowStatistics | None, *, everything: bool
) -> ClassTable | NotRun:
    if before.weight is not None:
        return NotRun("the table of classes has no form for sample weights")
    rows = before if after is None else after
    table = class_table(rows, evaluation.num_classes)
    names = evaluation.classes
    found = [
        ClassRow(
            name=f"class {row.index}" if names is None else names[row.index],
            index=row.index,
            n=row.n,
            accuracy=row.accuracy,
            overconfidence=row.overconfidence,
            p_value=row.p_value,
            flagged=row.flagged,
        )
        for row in table
    ]
    return ClassTable(
        of=len(found),
        flagged=sum(row.flagged for row in found),
        side="before" if after is None else "after",
        rows=found if everything else found[:_WORST_CLASSES],
    )


def _by_gate(fitted: Fitted, seed: int) -> tuple[PartCalibration | None, PartCalibration | None]:
    if fitted.after is None or fitted.accept is None:
        return None, None
    accepted = _part(fitted.after, fitted.accept, seed)
    return accepted, _part(fitted.after, ~fitted.accept, seed)


def _part(rows: RowStatistics, keep: NDArray[np.bool_], seed: int) -> PartCalibration | None:
    part = rows.select(keep)
    n = len(part)
    if not n or not part.weights.any():
        return None
    return PartCalibration(
        n=n,
        accuracy=accuracy(part),
        overconfidence=overconfidence(part),
        ece=None if n < ECE_ROWS else ece(part, seed=seed),
    )


def _confidence(part: Predictions, calibrator: Calibrator | None) -> ShiftedConfidence:
    """Average the confidence on rows whose labels mean nothing."""
    labels = np.zeros(len(part), dtype=np.int64)
    before = row_statistics(part.logits, labels).confidence
    after: Any = None
    if calibrator is not None:
        rows = row_statistics(
            part.logits,
            labels,
            transform=calibrator.transform,
            keeps_prediction=calibrator.keeps_prediction,
        )
        after = weighted_mean(rows.confidence, None)
    return ShiftedConfidence(weighted_mean(before, None), after)


def _verdict(before: CalibrationMetrics, after: CalibrationMetrics, fitted: Fitted) -> Verdict:
    confidence = before.accuracy.value + before.overconfidence.value
    gap = before.overconfidence
    if gap.low is not None and gap.low > 0:
        kind = "overconfident"
    elif gap.high is not None and gap.high < 0:
        kind = "underconfident"
    else:
        kind = "neither over- nor underconfident on average"
    sentence = (
        f"The model is {kind}: it claims {confidence:.1%} on average and is right in "
        f"{before.accuracy.value:.1%} (ECE {before.ece.value:.1%})."
    )
    facts = calibrator_facts(fitted)
    if facts is None:
        sentence += " No calibrator was fitted."
    elif facts["status"] != "converged":
        sentence += (
            f" The calibrator {facts['name']} found no optimum ({facts['status']}), and the "
            "confidence is left as it is."
        )
    else:
        sentence += f" With {_how(facts)} the ECE is {after.ece.value:.1%}."
    value, null = after.ece.value, after.ece.null95
    indistinct = null is not None and value <= null
    if null is not None:
        sentence += (
            f" A perfect model of this size would show up to {null:.1%}"
            f"{', so no error is left to see' if indistinct else ''}."
        )
    status = GOOD if value <= _SMALL_GAP else ATTENTION if value <= _LARGE_GAP else BAD
    headline = {
        GOOD: "Confidence can be trusted after calibration",
        ATTENTION: "Confidence is roughly right after calibration",
        BAD: "Confidence is misleading even after calibration",
    }[status]
    if fitted.after is None:
        headline = headline.replace(" after calibration", "").replace(" even", "")
    return Verdict(status, headline, sentence)


def _how(facts: Mapping[str, Any]) -> str:
    if facts["name"] == "temperature":
        return f"temperature T = {facts['temperature']:.2f}"
    chosen = facts.get("chosen")
    return f"the calibrator {facts['name']}{f' ({chosen})' if chosen else ''}"
