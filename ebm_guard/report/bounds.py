"""One bound on one metric of a report, such as ``ece<=0.05@upper``, and whether it is met."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.report.record import Report, Requirement

_FORM = re.compile(
    r"^\s*(?P<path>[^\s<>=@]+)\s*(?P<operator><=|>=|<|>)\s*(?P<bound>[^\s@]+)\s*"
    r"(?:@\s*(?P<compare>\w*))?\s*$"
)
INTERVAL, VALUE, UPPER, LOWER = "interval", "value", "upper", "lower"
_ENDS = {UPPER: "high", LOWER: "low"}
# Short forms of the deployed calibrator's figures.
_AFTER = (
    "accuracy",
    "nll",
    "brier",
    "brier_top_label",
    "miscalibration",
    "ece",
    "ece_adaptive",
    "smooth_ece",
    "overconfidence",
    "aurc",
    "e_aurc",
)
_ROBUSTNESS = ("robust_accuracy", "gated_accuracy", "corrupted_accuracy")
_WORST = {"auroc": min, "fpr95": max, "fpr95_ood_positive": max}
_SECTIONS = tuple(name for name in Report.__dataclass_fields__ if name != "rows")


@dataclass(frozen=True)
class Bound:
    """A parsed bound.

    Args:
        text: as the user wrote it.
        path: metric path or short form.
        operator: ``<=``, ``>=``, ``<`` or ``>``.
        bound: finite.
        compare: what the bound is compared with: the whole ``interval``, the ``value`` alone, or
            the ``upper`` or ``lower`` end of the interval.
    """

    text: str
    path: str
    operator: str
    bound: float
    compare: str = INTERVAL


def parse_bound(text: str) -> Bound:
    """Parse a bound such as ``ece<=0.05`` or ``auroc>=0.9@lower``.

    Raises:
        InvalidInputError: not of the form PATH OPERATOR NUMBER[@upper|@lower|@value], or a path
            that begins with no section of a report.

    Example:
        >>> parse_bound("ece <= 0.05 @upper")
        Bound(text='ece <= 0.05 @upper', path='ece', operator='<=', bound=0.05, compare='upper')
    """
    match = _FORM.match(text)
    try:
        bound = float(match["bound"]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or not math.isfinite(bound):
        raise InvalidInputError(
            f"got requirement {text!r}; needed METRIC OPERATOR NUMBER, such as 'ece<=0.05', "
            "'auroc>=0.9@lower' or 'ood.NAME.scores.energy.fpr95<=0.3'"
        )
    compare = INTERVAL if match["compare"] is None else match["compare"]
    if match["compare"] is not None and compare not in (VALUE, UPPER, LOWER):
        raise InvalidInputError(
            f"got requirement {text!r}; behind @ needed value, upper or lower"
            f"{suggest(compare, (VALUE, UPPER, LOWER))}, or no @ for the whole interval"
        )
    _check_start(text, match["path"])
    return Bound(text.strip(), match["path"], match["operator"], bound, compare)


def judge_bound(bound: Bound, report: Mapping[str, Any]) -> Requirement:
    """Judge one bound on a report.

    Short forms: ``accuracy``, ``nll``, ``brier``, ``brier_top_label``, ``miscalibration``, ``ece``,
    ``ece_adaptive``, ``smooth_ece``, ``overconfidence``, ``aurc`` and ``e_aurc`` are the deployed
    calibrator's; ``auroc``, ``fpr95`` and ``fpr95_ood_positive`` are the gate's score on its worst
    OOD set; ``coverage`` is the gate's; ``robust_accuracy``, ``gated_accuracy`` and
    ``corrupted_accuracy`` are those of the robustness section.

    Args:
        bound: the parsed bound.
        report: the report as JSON types.

    Returns:
        ``met`` or ``failed`` when value and interval lie on one side of the bound, ``unclear`` when
        the bound is inside the interval. ``@value``, ``@upper`` and ``@lower`` compare one number,
        and are never unclear. A metric that was not run fails.

    Raises:
        InvalidInputError: a path that this report does not have, or an end that the metric lacks.
    """
    path, metric, missing = _find(bound, report)
    if metric is None or metric["value"] is None:
        return not_measured(bound, path, missing or "no value")
    value, low, high = (metric[key] for key in ("value", "low", "high"))
    shown = f"{path} = {value:.4g}"
    if low is not None and high is not None:
        shown += f" [{low:.4g}, {high:.4g}]"
    status, words = _status(bound, path, metric)
    return Requirement(
        bound.text,
        path,
        bound.operator,
        bound.bound,
        value,
        value if low is None else low,
        value if high is None else high,
        status,
        f"{shown}: {words}{_null_warning(bound, metric)}",
    )


def not_measured(bound: Bound, path: str, reason: str) -> Requirement:
    """Return the failed requirement on a metric that the report does not have."""
    return Requirement(
        bound.text,
        path,
        bound.operator,
        bound.bound,
        None,
        None,
        None,
        "failed",
        f"{path} was not measured: {reason}",
    )


def _status(bound: Bound, path: str, metric: Mapping[str, Any]) -> tuple[str, str]:
    """Return the status, and why in words."""
    value = metric["value"]
    if bound.compare != INTERVAL:
        what = "value" if bound.compare == VALUE else f"{bound.compare} end of the 95 % interval"
        number = value if bound.compare == VALUE else metric[_ENDS[bound.compare]]
        if number is None:
            raise InvalidInputError(
                f"got requirement {bound.text!r}; {path} has no {what} ({metric['method']}), only "
                f"the value {value:.4g}. Leave @{bound.compare} out, or use @value"
            )
        if _holds(number, bound):
            return "met", f"the {what} meets the bound"
        return "failed", f"the {what} misses the bound"
    ends = [value if metric[key] is None else metric[key] for key in ("low", "high")]
    holds = [_holds(number, bound) for number in (value, *ends)]
    what = "value" if metric["low"] is None else "whole 95 % interval"
    if all(holds):
        return "met", f"the {what} meets the bound"
    if not any(holds):
        return "failed", f"the {what} misses the bound"
    side = "meets" if holds[0] else "misses"
    return "unclear", f"the value {side} the bound, which lies inside the interval"


def _null_warning(bound: Bound, metric: Mapping[str, Any]) -> str:
    null = metric.get("null95")
    if null is None or bound.operator[0] != "<" or bound.bound >= null:
        return ""
    return (
        f". Warning: even a perfect model would show up to {null:.4g} on {metric['n']:,} rows, so "
        "this bound asks for more than they can tell"
    )


def _holds(value: float, bound: Bound) -> bool:
    if bound.operator == "<=":
        return value <= bound.bound
    if bound.operator == ">=":
        return value >= bound.bound
    return value < bound.bound if bound.operator == "<" else value > bound.bound


def _check_start(text: str, path: str) -> None:
    """Refuse a typo before the work, not after it."""
    known = (*_SECTIONS, *_AFTER, *_WORST, "coverage", *_ROBUSTNESS)
    start = path.split(".", maxsplit=1)[0]
    if start not in known:
        raise InvalidInputError(
            f"got requirement {text!r}; the report has no {start!r}{suggest(start, known)}; it has "
            f"{', '.join(_SECTIONS)}, and the short forms {', '.join(known[len(_SECTIONS) :])}"
        )


def _find(
    bound: Bound, report: Mapping[str, Any]
) -> tuple[str, Mapping[str, Any] | None, str | None]:
    """Return the full path, the metric or None, and why it is missing."""
    path = bound.path
    if path in _AFTER:
        path = f"calibration.after.{path}"
    elif path == "coverage":
        path = "gate.coverage"
    elif path in _ROBUSTNESS:
        path = f"robustness.{path}"
    elif path in _WORST:
        worst = _worst_set(path, report)
        if worst is None:
            return path, None, "no OOD set was given, or the gate's score was not run"
        path = worst
    node: Any = report
    keys = path.split(".")
    while keys:
        if isinstance(node, Mapping) and "not_run" in node:
            return path, None, str(node["not_run"])
        node, keys = _step(bound, node, keys, path)
    if node is None:
        if path.startswith("robustness."):
            return path, None, "a part of it was not run for the time budget, or there is no gate"
        return path, None, "there were no rows to measure it on"
    if isinstance(node, Mapping) and "not_run" in node:
        return path, None, str(node["not_run"])
    if not isinstance(node, Mapping) or "value" not in node:
        raise InvalidInputError(
            f"got requirement {bound.text!r}; {path} is not a metric with a value; "
            f"it has {', '.join(_children(node)) or repr(node)}"
        )
    return path, node, None


def _step(bound: Bound, node: Any, keys: list[str], path: str) -> tuple[Any, list[str]]:
    """Go one level down; a key may hold dots, as the name of a group or a coverage does."""
    children = _children(node)
    for stop in range(1, len(keys) + 1):
        key = ".".join(keys[:stop])
        if key in children:
            return children[key], keys[stop:]
    where = path.removesuffix(".".join(keys)).rstrip(".") or "the report"
    raise InvalidInputError(
        f"got requirement {bound.text!r}; {where} has no {keys[0]!r}{suggest(keys[0], children)}; "
        f"it has {', '.join(children) or 'no parts'}"
    )


def _children(node: Any) -> Mapping[str, Any]:
    """List what is below a node; the items of a list go by their name, or else their number."""
    if isinstance(node, Mapping):
        return node
    if not isinstance(node, list):
        return {}
    named = {
        str(item["name"]): item for item in node if isinstance(item, Mapping) and "name" in item
    }
    return named or {str(number): item for number, item in enumerate(node)}


def _worst_set(metric: str, report: Mapping[str, Any]) -> str | None:
    score = report["gate"].get("score", "energy")
    values = {
        f"ood.{name}.scores.{score}.{metric}": part["scores"][score][metric]["value"]
        for name, part in report["ood"].items()
        # Shifted sets hold familiar images: a gate should accept them.
        if part.get("role") != "shifted" and metric in part["scores"].get(score, {})
    }
    return _WORST[metric](values, key=lambda path: values[path]) if values else None
