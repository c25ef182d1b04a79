"""The calibration section: before and after, and what it means in plain words."""

from __future__ import annotations

from ebm_guard.calibration import calibration_metrics, row_statistics
from ebm_guard.calibration.metrics import CalibrationMetrics
from ebm_guard.predictions import Predictions
from ebm_guard.report.crossfit import Fitted, calibrator_facts
from ebm_guard.report.record import (
    ATTENTION,
    BAD,
    GOOD,
    CalibrationSection,
    CalibrationSide,
    NotRun,
    Verdict,
)

# Customs, not theorems: a gap of 3 points is small beside most decisions, 10 points is not.
_SMALL_GAP, _LARGE_GAP = 0.03, 0.10


def calibration_section(
    evaluation: Predictions, fitted: Fitted, seed: int
) -> CalibrationSection | NotRun:
    """Measure calibration before and after the calibrator.

    Returns:
        The section, or why there is none (no labels).
    """
    if evaluation.labels is None:
        return NotRun(f"{evaluation.source} has no labels, so nothing can be said about accuracy")
    before = calibration_metrics(row_statistics(evaluation.logits, evaluation.labels), seed)
    if fitted.after is None:
        after: CalibrationSide | NotRun = NotRun("no labelled rows to fit a temperature on")
        measured = before
    else:
        measured = calibration_metrics(fitted.after, seed)
        after = CalibrationSide(measured, calibrator_facts(fitted))
    return CalibrationSection(
        verdict=_verdict(before, measured, fitted),
        before=CalibrationSide(before),
        after=after,
        protocol=fitted.sentences[0],
    )


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
        sentence += f" Temperature scaling found no optimum ({facts['status']}); T = 1 is kept."
    else:
        sentence += (
            f" With temperature T = {facts['temperature']:.2f} the ECE is {after.ece.value:.1%}; "
            "the predicted classes do not change."
        )
    value = after.ece.value
    status = GOOD if value <= _SMALL_GAP else ATTENTION if value <= _LARGE_GAP else BAD
    headline = {
        GOOD: "Confidence can be trusted after calibration",
        ATTENTION: "Confidence is roughly right after calibration",
        BAD: "Confidence is misleading even after calibration",
    }[status]
    if fitted.after is None:
        headline = headline.replace(" after calibration", "").replace(" even", "")
    return Verdict(status, headline, sentence)
