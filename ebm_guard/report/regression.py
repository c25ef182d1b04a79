"""How much worse than a baseline is too much: ``max-regression ece=0.005``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.report.bounds import Bound, judge_bound, not_measured
from ebm_guard.report.comparison import DIRECTION
from ebm_guard.report.record import Requirement

PREFIX = "max-regression"
_FORM = re.compile(r"^\s*(?P<metric>[^\s=<>]+)\s*=\s*(?P<amount>\S+)\s*$")
_OOD = ("auroc", "fpr95")
_SEVERITY = {"met": 0, "unclear": 1, "failed": 2}


@dataclass(frozen=True)
class MaxRegression:
    """A parsed limit on the change against a baseline.

    Args:
        text: ``max-regression`` and what the user wrote.
        metric: short form, or the path of a change inside the report's comparison.
        amount: the largest change in the bad direction, >= 0, in the units of the metric.
    """

    text: str
    metric: str
    amount: float


def parse_regression(text: str) -> MaxRegression:
    """Parse a limit such as ``ece=0.005``.

    METRIC is ``accuracy``, ``nll``, ``brier`` or ``ece`` (the deployed calibrator's),
    ``before.ece``, ``after.ece`` and their like, ``auroc`` or ``fpr95`` (every OOD set that both
    reports saw), or ``ood.NAME.auroc`` for one set.

    Raises:
        InvalidInputError: not METRIC=AMOUNT, a metric that is not compared, or an amount that is
            negative or not finite.

    Example:
        >>> parse_regression("ece = 0.005")
        MaxRegression(text='max-regression ece=0.005', metric='ece', amount=0.005)
    """
    match = _FORM.match(text)
    try:
        amount = float(match["amount"]) if match else math.nan
    except ValueError:
        amount = math.nan
    if match is None or not math.isfinite(amount) or amount < 0:
        raise InvalidInputError(
            f"got --max-regression {text!r}; needed METRIC=AMOUNT with an amount >= 0 in the units "
            "of the metric, such as 'ece=0.005' or 'accuracy=0.01'"
        )
    _check_metric(text, match["metric"])
    return MaxRegression(f"{PREFIX} {match['metric']}={match['amount']}", match["metric"], amount)


def judge_regression(limit: MaxRegression, report: Mapping[str, Any]) -> Requirement:
    """Judge the change of one metric, paired on the rows that both reports saw.

    Args:
        limit: the parsed limit.
        report: the report as JSON types, with its comparison.

    Returns:
        ``met`` when the whole 95 % interval of the change stays within the amount, ``failed`` when
        the whole interval exceeds it, else ``unclear``: the rule of every bound. Of several OOD
        sets the one that fares worst. What could not be paired fails, with the reason.

    Raises:
        InvalidInputError: an OOD set that this report does not have.
    """
    comparison = report["comparison"]
    missing = comparison.get("not_run")
    if missing is not None:
        return not_measured(_bound(limit, limit.metric), f"comparison.{limit.metric}", missing)
    paths = _paths(limit.metric, comparison)
    if not paths:
        reason = _why_not_compared(limit, report)
        return not_measured(_bound(limit, limit.metric), f"comparison.{limit.metric}", reason)
    judged = [_judged(limit, path, report) for path in paths]
    return max(judged, key=lambda item: (_SEVERITY[item.status], _excess(item)))


def _judged(limit: MaxRegression, path: str, report: Mapping[str, Any]) -> Requirement:
    item = judge_bound(_bound(limit, path), report)
    change: Any = report["comparison"]
    for key in path.split("."):
        change = change[key]
    moved = f"{path} went from {change['baseline']:.4g} to {change['value']:.4g}, by "
    return replace(item, message=moved + item.message.partition(" = ")[2])


def _bound(limit: MaxRegression, path: str) -> Bound:
    """Bound the change in the metric's own sign, so that its path shows what was judged."""
    larger_is_better = DIRECTION[path.rsplit(".", 1)[-1]] > 0
    operator, bound = (">=", 0.0 - limit.amount) if larger_is_better else ("<=", limit.amount)
    return Bound(limit.text, f"comparison.{path}.difference", operator, bound)


def _paths(metric: str, comparison: Mapping[str, Any]) -> list[str]:
    """List the changes that a metric stands for, those that were compared."""
    if metric in _OOD:
        return [
            f"ood.{name}.{metric}" for name, part in comparison["ood"].items() if metric in part
        ]
    sides = ("after", "before") if "." not in metric else (metric.split(".", maxsplit=1)[0],)
    if sides == ("ood",):
        _, name, metric = metric.split(".")
        return [f"ood.{name}.{metric}"] if metric in comparison["ood"].get(name, {}) else []
    metric = metric.rsplit(".", 1)[-1]
    return [f"{side}.{metric}" for side in sides if metric in comparison[side]][:1]


def _why_not_compared(limit: MaxRegression, report: Mapping[str, Any]) -> str:
    metric = limit.metric
    if metric.startswith("ood."):
        name = metric.split(".")[1]
        if name not in report["ood"]:
            raise InvalidInputError(
                f"got {limit.text!r}; this report has no OOD set {name!r}"
                f"{suggest(name, report['ood'])}; it has {', '.join(report['ood']) or 'none'}"
            )
        return f"{name} has no rows in common with a set of that name in the baseline"
    if metric in _OOD:
        return "no OOD set has rows in common with a set of the same name in the baseline"
    if metric.endswith("accuracy"):
        return "one of the reports has no labels, or the calibrators change no prediction"
    return "one of the reports has no labels, or fitted no calibrator"


def _check_metric(text: str, metric: str) -> None:
    start, _, rest = metric.partition(".")
    plain = tuple(name for name in DIRECTION if name not in _OOD)
    fine = (
        metric in DIRECTION
        or (start in ("before", "after") and rest in plain)
        or (start == "ood" and rest.count(".") == 1 and rest.split(".")[1] in _OOD)
    )
    if not fine:
        known = (*DIRECTION, *(f"{side}.{name}" for side in ("before", "after") for name in plain))
        raise InvalidInputError(
            f"got --max-regression {text!r}; {metric!r} is not compared with a baseline"
            f"{suggest(metric, known)}; compared are {', '.join(known)}, ood.NAME.auroc and "
            "ood.NAME.fpr95"
        )


def _excess(item: Requirement) -> float:
    """Return how far the value lies on the bad side of the bound."""
    value = math.inf if item.value is None else item.value
    return item.bound - value if item.operator == ">=" else value - item.bound
