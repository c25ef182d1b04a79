"""The gate section: what was promised, what was realised, and what foreign inputs get through."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ebm_guard.intervals import Metric, proportion
from ebm_guard.predictions import Predictions
from ebm_guard.report.crossfit import Fitted
from ebm_guard.report.ood_section import SHIFTED, ood_role
from ebm_guard.report.record import ATTENTION, BAD, GOOD, GateSection, NotRun, Verdict


def gate_section(
    evaluation: Predictions, ood: Mapping[str, Predictions], fitted: Fitted
) -> GateSection | NotRun:
    """Measure coverage on ID rows, accuracy on both sides, and acceptance of OOD rows.

    Returns:
        The section, or why there is none (too few rows, or no logits).
    """
    threshold, accept, accepts = fitted.threshold, fitted.accept, fitted.accepts
    if threshold is None or accept is None or accepts is None:
        return NotRun(fitted.no_gate)
    coverage = proportion(int(accept.sum()), len(accept))
    accepted_ood = {
        name: proportion(int(accepts(part).sum()), len(part)) for name, part in ood.items()
    }
    inside, outside = _accuracies(fitted.correct(evaluation), accept)
    rule = fitted.risk_rule
    return GateSection(
        verdict=_verdict(
            coverage,
            None if rule is not None else 1 - threshold.false_reject_rate,
            accepted_ood,
        ),
        score=fitted.score.name,
        method=threshold.method,
        threshold=fitted.cut,
        false_reject_rate=threshold.false_reject_rate,
        assurance=threshold.assurance,
        n=threshold.n,
        guarantee=f"{threshold.guarantee} {rule.guarantee}" if rule else threshold.guarantee,
        rule="" if rule is None else rule.words,
        protocol=" ".join(fitted.sentences),
        coverage=coverage,
        accuracy_accepted=inside,
        accuracy_rejected=outside,
        accepted_ood=accepted_ood,
        invalid=int(evaluation.invalid.sum()),
    )


def _accuracies(
    correct: NDArray[np.bool_] | None, accept: NDArray[np.bool_]
) -> tuple[Metric | None, Metric | None]:
    if correct is None:
        return None, None
    sides = []
    for side in (accept, ~accept):
        n = int(side.sum())
        sides.append(proportion(int(correct[side].sum()), n) if n else None)
    return sides[0], sides[1]


def _verdict(
    coverage: Metric, promise: float | None, accepted_ood: Mapping[str, Metric]
) -> Verdict:
    """Judge the gate; with a certified rule (``promise`` None) its coverage is not promised."""
    high = coverage.value if coverage.high is None else coverage.high
    wanted = 0.0 if promise is None else promise
    status = GOOD if coverage.value >= wanted else ATTENTION if high >= wanted else BAD
    headline = {
        GOOD: "The gate keeps its promise on familiar inputs",
        ATTENTION: "The gate's coverage is within noise of its promise",
        BAD: "The gate refuses more familiar inputs than promised",
    }[status]
    sentence = f"It accepted {coverage.value:.1%} of {coverage.n:,} familiar inputs"
    if promise is None:
        headline = "The gate accepts what its certified rule allows"
        sentence += " (its threshold and its certified rule together; this share is not promised)."
    else:
        sentence += f" (promised: at least {promise:.0%})."
    shifted = {name: item for name, item in accepted_ood.items() if ood_role(name) == SHIFTED}
    foreign = {name: item for name, item in accepted_ood.items() if name not in shifted}
    if foreign:
        sentence += f" Foreign inputs that still pass: {_shares(foreign)}."
        if max(item.value for item in foreign.values()) > 0.5 and status == GOOD:
            status = ATTENTION
            headline = "The gate keeps its promise, but lets many foreign inputs pass"
    if shifted:
        sentence += f" Familiar inputs under other conditions accepted: {_shares(shifted)}."
    return Verdict(status, headline, sentence)


def _shares(metrics: Mapping[str, Metric]) -> str:
    return ", ".join(f"{item.value:.1%} of {name}" for name, item in metrics.items())
