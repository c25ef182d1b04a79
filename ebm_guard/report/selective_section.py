"""The selective section: what is gained by answering only where the model is sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebm_guard.calibration.certificates import Certificate, Order, certify
from ebm_guard.calibration.conformal import (
    APS,
    LAC,
    ConformalReport,
    ConformalSets,
    conformal_report,
)
from ebm_guard.calibration.metrics import RowStatistics
from ebm_guard.calibration.selective import COVERAGES, AccuracyAt, RiskCoverage, risk_coverage
from ebm_guard.data.splits import two_folds
from ebm_guard.errors import TooFewRowsError
from ebm_guard.intervals import Metric, proportion
from ebm_guard.report.held_out import HeldOutPart
from ebm_guard.report.record import ATTENTION, BAD, GOOD, UNCLEAR, NotRun, Record, Verdict

# Risks 0.01 and 0.05 are always shown, the others where a certificate exists.
RISKS = (0.01, 0.02, 0.05, 0.1, 0.2)
_ALWAYS = (0.01, 0.05)
_HEADLINE_RISK, _HEADLINE_COVERAGE = 0.05, "90"
_USEFUL = 0.8
CONFIDENCE_EDGES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_ENERGY_BINS = 12
_BLOCK = 1_000_000


@dataclass(frozen=True)
class AccuracyRow(Record):
    """Accuracy of the most trusted share, by each ranking.

    Args:
        coverage: the share that was asked for.
        confidence: answered where confidence >= cut.
        energy: answered where energy <= cut, None without energies.
    """

    coverage: float
    confidence: AccuracyAt
    energy: AccuracyAt | None


@dataclass(frozen=True)
class Certified(Record):
    """One promise, checked on each held-out part.

    Args:
        risk: P(wrong | answered) that is not exceeded.
        by: ``confidence`` or ``confidence_and_energy``.
        coverage: the smallest coverage over the parts, None where one part certifies nothing.
        parts: the certificate of each part.
    """

    risk: float
    by: str
    coverage: float | None
    parts: list[Certificate]


@dataclass(frozen=True)
class JointMap(Record):
    """Rows by confidence (down) and energy (across), right and wrong ones apart."""

    confidence_edges: list[float]
    energy_edges: list[float]
    right: NDArray[np.int64]
    wrong: NDArray[np.int64]


@dataclass(frozen=True)
class SelectiveSection(Record):
    """What is gained by answering only where the model is sure, and what can be promised.

    Args:
        verdict: in plain words.
        protocol: which rows stand behind which figure.
        n: rows.
        accuracy: where every row is answered.
        curves: risk against coverage by ``confidence``, ``energy`` and ``oracle`` (all wrong rows
            last: no ranking can be better).
        accuracy_at: accuracy at ``80``, ``90`` and ``95`` % coverage.
        certificates: the promises.
        joint: confidence and energy together, None without energies.
        conformal: prediction sets ``lac`` and ``aps``, or why there are none.
    """

    verdict: Verdict
    protocol: str
    n: int
    accuracy: Metric
    curves: dict[str, RiskCoverage | None]
    accuracy_at: dict[str, AccuracyRow]
    certificates: list[Certified]
    joint: JointMap | None
    conformal: dict[str, ConformalReport] | NotRun


def selective_section(
    rows: RowStatistics | None,
    labels: NDArray[np.int64] | None,
    energy: NDArray[np.float64] | None,
    parts: Sequence[HeldOutPart],
    *,
    assurance: float = 0.95,
    miscoverage: float = 0.1,
    seed: int = 0,
) -> SelectiveSection | NotRun:
    """Measure selective prediction on the evaluation rows.

    Curves join all rows. A promise needs rows that are exchangeable with new inputs *as they are
    ranked*: after cross-fitting that holds within a part (one calibrator, which saw none of its
    rows), not across both. So every certificate belongs to one part and its calibrator, and the
    parts share 1 - assurance, so that all parts' certificates hold together. Prediction sets are
    fitted on one half of a part and measured on the other, both ways.

    Args:
        rows: statistics after calibration, each row by a calibrator that has not seen it.
        labels: (N,), or None.
        energy: (N,), higher = more OOD, or None where there are no logits.
        parts: one part (calibration data or a fitted guard was given), or the two folds.
        assurance: of the certificates.
        miscoverage: of the prediction sets.
        seed: of the halves.

    Returns:
        The section, or why there is none (no labels).
    """
    if rows is None or labels is None or not parts:
        return NotRun("selective prediction needs labels: they tell which answers are wrong")
    wrong = ~rows.correct
    orders = {"confidence": -rows.confidence, "energy": energy, "oracle": _oracle(wrong)}
    curves = {
        name: None if order is None else risk_coverage(order, wrong)
        for name, order in orders.items()
    }
    certificates = _certificates(rows, energy, parts, assurance)
    table = {f"{100 * share:.0f}": _accuracy_row(curves, share) for share in COVERAGES}
    accuracy = proportion(int(rows.correct.sum()), len(rows))
    return SelectiveSection(
        verdict=_verdict(accuracy, table, certificates),
        protocol=_protocol(len(rows), parts, assurance),
        n=len(rows),
        accuracy=accuracy,
        curves=curves,
        accuracy_at=table,
        certificates=certificates,
        joint=None if energy is None else _joint(rows, energy),
        conformal=_conformal(labels, parts, miscoverage, seed),
    )


def _oracle(wrong: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Rank all right rows first, and the wrong ones one by one after them."""
    order = np.zeros(len(wrong))
    order[wrong] = np.arange(1, wrong.sum() + 1)
    return order


def _accuracy_row(curves: dict[str, RiskCoverage | None], coverage: float) -> AccuracyRow:
    confidence, energy = curves["confidence"], curves["energy"]
    if confidence is None:
        raise ValueError("there is no confidence curve")
    at = confidence.accuracy_at(coverage)
    return AccuracyRow(
        coverage,
        # The curve ranks by -confidence; the cut is shown as a confidence.
        replace(at, cut=0 - at.cut),
        None if energy is None else energy.accuracy_at(coverage),
    )


def _certificates(
    rows: RowStatistics,
    energy: NDArray[np.float64] | None,
    parts: Sequence[HeldOutPart],
    assurance: float,
) -> list[Certified]:
    each = 1 - (1 - assurance) / len(parts)
    found = []
    for by in ("confidence", "confidence_and_energy"):
        if by == "confidence_and_energy" and energy is None:
            continue
        for risk in RISKS:
            made = []
            for part in parts:
                orders = [Order("confidence", rows.confidence[part.index], "high")]
                if by == "confidence_and_energy" and energy is not None:
                    orders.append(Order("energy", energy[part.index]))
                wrong = ~rows.correct[part.index]
                made.append(certify(orders, wrong, risk=risk, assurance=each))
            shares = [item.coverage.value for item in made if item.coverage is not None]
            coverage = min(shares) if len(shares) == len(made) else None
            if coverage is not None or risk in _ALWAYS:
                found.append(Certified(risk, by, coverage, made))
            if coverage == 1 and risk >= max(_ALWAYS):
                break
    return found


def _joint(rows: RowStatistics, energy: NDArray[np.float64]) -> JointMap:
    low, high = np.quantile(energy, [0.005, 0.995])
    if not low < high:
        low, high = low - 0.5, high + 0.5
    inner = np.linspace(low, high, _ENERGY_BINS + 1)
    across = np.searchsorted(inner[1:-1], energy, side="left")
    down = np.searchsorted(np.array(CONFIDENCE_EDGES[1:-1]), rows.confidence, side="left")
    shape = (len(CONFIDENCE_EDGES) - 1, _ENERGY_BINS)
    cell = down * _ENERGY_BINS + across
    total = shape[0] * shape[1]
    right, wrong = (
        np.bincount(cell[side], minlength=total).reshape(shape)
        for side in (rows.correct, ~rows.correct)
    )
    return JointMap(list(CONFIDENCE_EDGES), inner.tolist(), right, wrong)


def _conformal(
    labels: NDArray[np.int64], parts: Sequence[HeldOutPart], miscoverage: float, seed: int
) -> dict[str, ConformalReport] | NotRun:
    reports = {}
    for kind in (LAC, APS):
        covered, sizes, made = [], [], None
        for part in parts:
            if len(part.index) < 2:
                return NotRun(f"{len(part.index)} held-out rows cannot be halved")
            first, second = two_folds(len(part.index), labels[part.index], seed)
            for fit, test in ((first, second), (second, first)):
                try:
                    made = _fitted(kind(), part, part.index[fit], labels, miscoverage)
                except TooFewRowsError as error:
                    return NotRun(f"each half of the held-out rows must do alone: {error}")
                inside, size = _measured(made, part, part.index[test], labels)
                covered.append(inside)
                sizes.append(size)
        if made is not None:
            reports[kind.name] = conformal_report(
                made, np.concatenate(covered), np.concatenate(sizes)
            )
    return reports


def _fitted(
    sets: ConformalSets,
    part: HeldOutPart,
    index: NDArray[np.int64],
    labels: NDArray[np.int64],
    miscoverage: float,
) -> ConformalSets:
    scores = [sets.label_scores(block, labels[at]) for at, block in _blocks(part, index)]
    return sets.fit_scores(np.concatenate(scores), miscoverage)


def _measured(
    sets: ConformalSets, part: HeldOutPart, index: NDArray[np.int64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    covered, sizes = [], []
    for at, block in _blocks(part, index):
        mask = sets.sets(torch.from_numpy(np.array(block))).numpy()
        covered.append(mask[np.arange(len(at)), labels[at]])
        sizes.append(mask.sum(axis=1))
    return np.concatenate(covered), np.concatenate(sizes)


def _blocks(part: HeldOutPart, index: NDArray[np.int64]) -> Any:
    """Give positions and log-probabilities in blocks, never all of N x C at once."""
    classes = part.log_probabilities(index[:1]).shape[1]
    step = max(1, _BLOCK // classes)
    for at in range(0, len(index), step):
        yield index[at : at + step], part.log_probabilities(index[at : at + step])


def _protocol(n: int, parts: Sequence[HeldOutPart], assurance: float) -> str:
    text = f"Curves and accuracies use all {n:,} rows, each ranked by a calibrator that has not "
    text += "seen it; their intervals are 95 % each. "
    if len(parts) == 1:
        text += (
            f"The certificates use the same rows and the calibrator of {parts[0].fitted_on}. Each "
            f"holds with probability {assurance:g} by itself. "
        )
    else:
        sizes = " and ".join(f"{len(part.index):,}" for part in parts)
        text += (
            "Rows ranked by two calibrators are not exchangeable as one ranking, so each "
            f"certificate uses one half ({sizes} rows) with the calibrator of the other half, and "
            "belongs to that calibrator: the one fitted on all rows has no unseen rows left. The "
            f"certificates of both halves hold together with probability {assurance:g}; the "
            "smaller coverage is quoted. For a certificate on what is deployed, give calibration "
            "data. "
        )
    return text + (
        "Confidence alone is certified by SGR, which supposes that a lower confidence never means "
        "fewer errors; confidence and energy together by Learn-then-Test (Bonferroni over 100 "
        "declared pairs of ranks), which supposes nothing of the kind. Prediction sets are fitted "
        "on one half of each held-out part and measured on the other, both ways. They use the "
        "calibrator's temperature; a temperature is a separate setting for sets, and one that is "
        "fitted for calibration can make APS sets larger. All of this is for inputs like these "
        "rows, not for foreign ones."
    )


def _verdict(
    accuracy: Metric, table: dict[str, AccuracyRow], certificates: list[Certified]
) -> Verdict:
    at = table[_HEADLINE_COVERAGE].confidence
    sentence = (
        f"If the model answers only its surest {at.realised:.0%}, it is right in "
        f"{at.accuracy.value:.1%} of its answers, instead of {accuracy.value:.1%} when it answers "
        "everything."
    )
    promises = [
        item for item in certificates if item.by == "confidence" and item.coverage is not None
    ]
    shown = next((item for item in promises if item.risk == _HEADLINE_RISK), None)
    shown = shown or next(iter(promises), None)
    if shown is not None and shown.coverage is not None:
        sentence += (
            f" Certified: on its surest {shown.coverage:.1%}, at most {shown.risk:.0%} of the "
            "answers are wrong."
        )
    else:
        sentence += f" Nothing can be certified on {accuracy.n:,} rows."
    if shown is not None and shown.risk == _HEADLINE_RISK and (shown.coverage or 0) >= _USEFUL:
        return Verdict(GOOD, "The surest answers can be relied on", sentence)
    if at.accuracy.value <= accuracy.value and at.realised < 1:
        return Verdict(BAD, "Refusing the unsure inputs does not help", sentence)
    if shown is None:
        return Verdict(UNCLEAR, "Too few right answers to promise anything", sentence)
    return Verdict(ATTENTION, "Reliable only where many inputs are refused", sentence)
