"""Run a new guard in the shadow of the old one: the same traffic, and what would change.

No labels are needed. The rows are paired, so the difference of the two reject rates is known far
better than each rate by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.gate.decision import STATUS_NAMES, Decision
from ebm_guard.gate.drift.distances import clopper_pearson
from ebm_guard.gate.guard import Guard
from ebm_guard.intervals import LEVEL, Metric, mean, normal_quantile
from ebm_guard.predictions import Predictions, as_batch

SHOWN = 10


@dataclass(frozen=True)
class ChangedRow:
    """One input that the two guards treat differently.

    Args:
        id: of the row.
        old: status by the old guard.
        new: status by the new guard.
        old_label: predicted by the old guard; -1 where INVALID.
        new_label: predicted by the new guard.
        reason: of the guard that refuses.
    """

    id: str
    old: str
    new: str
    old_label: int
    new_label: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {name: getattr(self, name) for name in ChangedRow.__dataclass_fields__}


@dataclass(frozen=True)
class ShadowComparison:
    """What a new guard would change.

    Args:
        n: rows of the traffic.
        table: rows by old and new status, ``table[old][new]``.
        reject_rate_old: share not accepted by the old guard, with its exact interval.
        reject_rate_new: share not accepted by the new one.
        difference: new - old, with a paired interval.
        p_value: McNemar's exact test that both refuse as often; two-sided.
        changed: the first rows that only one of them accepts.
        labels_differ: share of the rows valid to both with another label.
        confidence_difference: mean of new - old over the rows valid to both; None without any.
        accuracy_old: share of right ones among those that the old guard accepts; None without
            labels, or where it accepts nothing.
        accuracy_new: the same for the new one.
    """

    n: int
    table: dict[str, dict[str, int]]
    reject_rate_old: Metric
    reject_rate_new: Metric
    difference: Metric
    p_value: float
    changed: tuple[ChangedRow, ...]
    labels_differ: Metric | None
    confidence_difference: Metric | None
    accuracy_old: Metric | None
    accuracy_new: Metric | None

    @property
    def only_old(self) -> int:
        """Rows that only the old guard accepts."""
        return sum(count for new, count in self.table["ACCEPT"].items() if new != "ACCEPT")

    @property
    def only_new(self) -> int:
        """Rows that only the new guard accepts."""
        return sum(row["ACCEPT"] for old, row in self.table.items() if old != "ACCEPT")

    @property
    def sentence(self) -> str:
        """What changes, in plain words."""
        text = (
            f"On {self.n:,} inputs the old guard refuses {self.reject_rate_old.value:.2%} and the "
            f"new one {self.reject_rate_new.value:.2%}: {self.only_old:,} inputs would be refused "
            f"that are accepted today, {self.only_new:,} the other way (p = {self.p_value:.3g} for "
            "no change of the rate)."
        )
        if self.labels_differ is not None and self.labels_differ.value:
            text += f" {self.labels_differ.value:.2%} of the labels differ."
        if self.accuracy_old is not None and self.accuracy_new is not None:
            text += (
                f" Of what each accepts, {self.accuracy_old.value:.2%} and "
                f"{self.accuracy_new.value:.2%} is right."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types, with its sentence."""
        names = (
            "reject_rate_old",
            "reject_rate_new",
            "difference",
            "labels_differ",
            "confidence_difference",
            "accuracy_old",
            "accuracy_new",
        )
        metrics = {name: getattr(self, name) for name in names}
        return {
            "n": self.n,
            "table": {old: dict(row) for old, row in self.table.items()},
            **{name: None if item is None else item.to_dict() for name, item in metrics.items()},
            "p_value": self.p_value,
            "only_old": self.only_old,
            "only_new": self.only_new,
            "changed": [row.to_dict() for row in self.changed],
            "sentence": self.sentence,
        }


def compare(
    old: Guard,
    new: Guard,
    traffic: Predictions | Tensor | Iterable[Any],
    *,
    shown: int = SHOWN,
) -> ShadowComparison:
    """Compare two guards on the same traffic.

    Args:
        old: the guard in service.
        new: the one that might replace it; its model may be another, of the same classes.
        traffic: inputs of both models (a tensor, or a loader of inputs or of pairs with labels),
            or :class:`~ebm_guard.predictions.Predictions` on which both decide.
        shown: rows of the first changes to keep.

    Returns:
        The record; with labels, the accuracy of what each accepts too.

    Raises:
        InvalidInputError: no rows.

    References:
        McNemar, Psychometrika 1947 (exact: Binomial(b + c, 1/2)); the interval: Agresti and Min,
        Simple Improved Confidence Intervals for Comparing Matched Proportions, 2005 (half a row
        added to each cell).

    Example:
        >>> rows = Predictions(np.random.default_rng(0).normal(0, 4, size=(300, 3)))
        >>> guards = [Guard().fit(rows, false_reject_rate=rate) for rate in (0.05, 0.2)]
        >>> found = compare(*guards, rows)
        >>> found.only_new, found.only_old > 0
        (0, True)
    """
    if isinstance(traffic, Predictions):
        decisions = [guard.decide_stored(traffic) for guard in (old, new)]
        labels, ids = traffic.labels, traffic.names(range(len(traffic)))
        return _compared(decisions[0], decisions[1], labels, ids, shown)
    parts: tuple[list[Decision], list[Decision]] = ([], [])
    found: list[NDArray[np.int64]] = []
    names: list[str] = []
    for item in [traffic] if isinstance(traffic, Tensor) else traffic:
        batch = as_batch(item)
        if not len(batch.inputs):
            continue
        for guard, kept in zip((old, new), parts, strict=True):
            kept.append(guard(batch.inputs))
        if batch.labels is not None:
            found.append(batch.labels.cpu().numpy().astype(np.int64))
        names.extend(batch.ids or map(str, range(len(names), len(names) + len(batch.inputs))))
    if not names:
        raise InvalidInputError("got no traffic to compare the guards on; needed at least one row")
    labels = np.concatenate(found) if sum(map(len, found)) == len(names) else None
    joined = [Decision.concatenate(kept) for kept in parts]
    return _compared(joined[0], joined[1], labels, names, shown)


def _compared(
    old: Decision,
    new: Decision,
    labels: NDArray[np.int64] | None,
    ids: Sequence[str],
    shown: int,
) -> ShadowComparison:
    n = len(old)
    statuses = [decision.status.cpu().numpy() for decision in (old, new)]
    table = {
        STATUS_NAMES[one]: {
            STATUS_NAMES[other]: int(((statuses[0] == one) & (statuses[1] == other)).sum())
            for other in STATUS_NAMES
        }
        for one in STATUS_NAMES
    }
    accepts = [decision.accept.cpu().numpy() for decision in (old, new)]
    only_old, only_new = (int((accepts[side] & ~accepts[1 - side]).sum()) for side in (0, 1))
    valid = np.logical_and.reduce([decision.label.cpu().numpy() >= 0 for decision in (old, new)])
    return ShadowComparison(
        n=n,
        table=table,
        reject_rate_old=clopper_pearson(int((~accepts[0]).sum()), n),
        reject_rate_new=clopper_pearson(int((~accepts[1]).sum()), n),
        difference=paired_difference(only_old, only_new, n),
        p_value=mcnemar(only_old, only_new),
        changed=_changed(old, new, accepts[0] != accepts[1], ids, shown),
        labels_differ=_labels_differ(old, new, valid),
        confidence_difference=_confidence_difference(old, new, valid),
        accuracy_old=_accuracy(old, labels),
        accuracy_new=_accuracy(new, labels),
    )


def mcnemar(only_old: int, only_new: int) -> float:
    """Compute the exact two-sided p-value of equal rates from the rows that disagree.

    p = min(1, 2 P(Binomial(b + c, 1/2) <= min(b, c))).

    Example:
        >>> mcnemar(0, 10)
        0.001953125
    """
    from scipy.stats import binom

    total = only_old + only_new
    return 1.0 if not total else min(1.0, 2 * float(binom.cdf(min(only_old, only_new), total, 0.5)))


def paired_difference(only_old: int, only_new: int, n: int) -> Metric:
    """Compute the change of the reject rate, (b - c) / n, with Agresti and Min's interval.

    Args:
        only_old: b, rows that only the old guard accepts.
        only_new: c, rows that only the new guard accepts.
        n: all rows.

    Example:
        >>> round(paired_difference(10, 0, 100).value, 3)
        0.1
    """
    first, second, total = only_old + 0.5, only_new + 0.5, n + 2
    centre = (first - second) / total
    spread = math.sqrt((first + second) - (first - second) ** 2 / total) / total
    half = normal_quantile(0.5 + LEVEL / 2) * spread
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Metric((only_old - only_new) / n, low, high, n, "Agresti-Min, paired")


def _changed(
    old: Decision, new: Decision, differ: NDArray[np.bool_], ids: Sequence[str], shown: int
) -> tuple[ChangedRow, ...]:
    rows = []
    for row in np.flatnonzero(differ)[:shown].tolist():
        refuser = new if bool(old.accept[row]) else old
        rows.append(
            ChangedRow(
                id=ids[row],
                old=STATUS_NAMES[int(old.status[row])],
                new=STATUS_NAMES[int(new.status[row])],
                old_label=int(old.label[row]),
                new_label=int(new.label[row]),
                reason=refuser.reason_of(row),
            )
        )
    return tuple(rows)


def _labels_differ(old: Decision, new: Decision, valid: NDArray[np.bool_]) -> Metric | None:
    if not valid.any():
        return None
    differ = (old.label.cpu() != new.label.cpu()).numpy()[valid]
    return clopper_pearson(int(differ.sum()), int(valid.sum()))


def _confidence_difference(old: Decision, new: Decision, valid: NDArray[np.bool_]) -> Metric | None:
    if not valid.any():
        return None
    one, other = (decision.confidence.cpu().to(torch.float64).numpy() for decision in (old, new))
    return mean(other[valid] - one[valid])


def _accuracy(decision: Decision, labels: NDArray[np.int64] | None) -> Metric | None:
    accepted = decision.accept.cpu().numpy()
    if labels is None or not accepted.any():
        return None
    right = decision.label.cpu().numpy()[accepted] == labels[accepted]
    return clopper_pearson(int(right.sum()), int(accepted.sum()))
