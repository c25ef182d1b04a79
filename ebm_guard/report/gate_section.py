"""The gate section: what was promised, what was realised, and what foreign inputs get through."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ebm_guard.calibration import row_statistics
from ebm_guard.intervals import Metric, proportion
from ebm_guard.predictions import Predictions
from ebm_guard.report.crossfit import Fitted
from ebm_guard.report.record import ATTENTION, BAD, GOOD, GateSection, NotRun, Verdict


def gate_section(
    evaluation: Predictions, ood: Mapping[str, Predictions], fitted: Fitted
) -> GateSection | NotRun:
    """Measure coverage on ID rows, accuracy on both sides, and acceptance of OOD rows.

    Returns:
        The section, or why there is none (too few rows, or no logits).
    """
    threshold, accept = fitted.threshold, fitted.accept
    if threshold is None or accept is None:
        return NotRun(fitted.no_gate)
    cut = float(threshold.cut)
    coverage = proportion(int(accept.sum()), len(accept))
    accepted_ood = {
        name: proportion(int((fitted.score.of(part) <= cut).sum()), len(part))
        for name, part in ood.items()
    }
    inside, outside = _accuracies(evaluation, accept)
    return GateSection(
        verdict=_verdict(coverage, 1 - threshold.false_reject_rate, accepted_ood),
        score=fitted.score.name,
        method=threshold.method,
        threshold=cut,
        false_reject_rate=threshold.false_reject_rate,
        assurance=threshold.assurance,
        n=threshold.n,
        guarantee=threshold.guarantee,
        protocol=" ".join(fitted.sentences),
        coverage=coverage,
        accuracy_accepted=inside,
        accuracy_rejected=outside,
        accepted_ood=accepted_ood,
        invalid=int(evaluation.invalid.sum()),
    )


def _accuracies(
    evaluation: Predictions, accept: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> tuple[Metric | None, Metric | None]:
    if evaluation.labels is None:
        return None, None
    correct = row_statistics(evaluation.logits, evaluation.labels).correct
    sides = []
    for side in (accept, ~accept):
        n = int(side.sum())
        sides.append(proportion(int(correct[side].sum()), n) if n else None)
    return sides[0], sides[1]


def _verdict(coverage: Metric, promise: float, accepted_ood: Mapping[str, Metric]) -> Verdict:
    high = coverage.value if coverage.high is None else coverage.high
    status = GOOD if coverage.value >= promise else ATTENTION if high >= promise else BAD
    headline = {
        GOOD: "The gate keeps its promise on familiar inputs",
        ATTENTION: "The gate's coverage is within noise of its promise",
        BAD: "The gate refuses more familiar inputs than promised",
    }[status]
    sentence = (
        f"It accepted {coverage.value:.1%} of {coverage.n:,} familiar inputs (promised: at least "
        f"{promise:.0%})."
    )
    if accepted_ood:
        worst = max(accepted_ood, key=lambda name: accepted_ood[name].value)
        parts = ", ".join(f"{item.value:.1%} of {name}" for name, item in accepted_ood.items())
        sentence += f" Foreign inputs that still pass: {parts}."
        if accepted_ood[worst].value > 0.5 and status == GOOD:
            status = ATTENTION
            headline = "The gate keeps its promise, but lets many foreign inputs pass"
    return Verdict(status, headline, sentence)
