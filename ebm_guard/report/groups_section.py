"""Per-group figures, the worst groups first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebm_guard.calibration.metrics import ece, overconfidence
from ebm_guard.intervals import LEVEL, Metric, proportion, wilson
from ebm_guard.predictions import Predictions
from ebm_guard.report.crossfit import Fitted
from ebm_guard.report.record import ATTENTION, GOOD, NotRun, Record, Verdict

# Below this, fifteen bins hold a row or two each and ECE says nothing.
_ECE_ROWS = 100


@dataclass(frozen=True)
class Group(Record):
    """The figures of one group.

    Args:
        name: the group.
        n: its rows.
        accuracy: share of right predictions, None without labels.
        ece: after calibration, None without labels or below 100 rows.
        overconfidence: mean confidence - accuracy after calibration, None without labels.
        coverage: share accepted by the gate, None without a gate.
        flagged: ``accuracy`` or ``coverage``, where it is lower than over all rows beyond chance
            (Bonferroni over the groups); '' otherwise.
    """

    name: str
    n: int
    accuracy: Metric | None
    ece: Metric | None
    overconfidence: Metric | None
    coverage: Metric | None
    flagged: str


@dataclass(frozen=True)
class GroupsSection(Record):
    """All groups, the worst first."""

    verdict: Verdict
    note: str
    groups: list[Group]


def groups_section(evaluation: Predictions, fitted: Fitted, seed: int) -> GroupsSection | NotRun:
    """Measure every group of the evaluation rows.

    Returns:
        The section, or why there is none.
    """
    if evaluation.groups is None:
        return NotRun(
            "the evaluation data names no groups (an array `groups` in npz: and logits: files)"
        )
    values = np.asarray(evaluation.groups)
    names, where = np.unique(values, return_inverse=True)
    correct = fitted.correct(evaluation)
    found = [
        _group(str(name), where == index, len(names), correct, fitted, seed)
        for index, name in enumerate(names)
    ]
    found.sort(key=_badness)
    flagged = [group for group in found if group.flagged]
    note = (
        "Intervals are 95 % each. A group is flagged when its accuracy or coverage is lower than "
        f"that of all rows beyond chance, corrected for looking at {len(names)} groups. ECE is "
        f"left out below {_ECE_ROWS} rows."
    )
    return GroupsSection(_verdict(found, flagged), note, found)


def _group(
    name: str,
    rows: NDArray[np.bool_],
    groups: int,
    correct: NDArray[np.bool_] | None,
    fitted: Fitted,
    seed: int,
) -> Group:
    n = int(rows.sum())
    after = None if fitted.after is None else fitted.after.select(rows)
    accuracy = None if correct is None else proportion(int(correct[rows].sum()), n)
    coverage = None if fitted.accept is None else proportion(int(fitted.accept[rows].sum()), n)
    flags = [
        word
        for word, metric, overall in (
            ("accuracy", accuracy, None if correct is None else float(correct.mean())),
            ("coverage", coverage, None if fitted.accept is None else float(fitted.accept.mean())),
        )
        if metric is not None and overall is not None and _below(metric, overall, groups)
    ]
    return Group(
        name=name,
        n=n,
        accuracy=accuracy,
        ece=None if after is None or n < _ECE_ROWS else ece(after, seed=seed),
        overconfidence=None if after is None else overconfidence(after),
        coverage=coverage,
        flagged=" and ".join(flags),
    )


def _below(metric: Metric, overall: float, groups: int) -> bool:
    level = 1 - (1 - LEVEL) / groups
    return wilson(round(metric.value * metric.n), metric.n, level)[1] < overall


def _badness(group: Group) -> tuple[float, str]:
    metric = group.accuracy or group.coverage
    return (metric.value if metric is not None else 0.0, group.name)


def _verdict(found: list[Group], flagged: list[Group]) -> Verdict:
    worst = found[0]
    metric = worst.accuracy or worst.coverage
    share = "" if metric is None else f" ({metric.value:.1%} of {metric.n:,} rows)"
    what = "right" if worst.accuracy is not None else "accepted"
    sentence = f"{len(found)} groups; lowest: {worst.name}{share}, by the share of rows {what}. "
    if not flagged:
        return Verdict(GOOD, "No group stands out", sentence + "No group is low beyond chance.")
    named = ", ".join(f"{group.name} ({group.flagged})" for group in flagged[:5])
    return Verdict(
        ATTENTION, f"{len(flagged)} of {len(found)} groups fall behind", sentence + f"Low: {named}."
    )
