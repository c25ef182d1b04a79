"""Bounds on metrics: ``ece<=0.05``, ``ood.svhn.scores.energy.auroc>=0.9``, and their verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.report.record import Requirement

_FORM = re.compile(r"^\s*(?P<path>[A-Za-z0-9_.\-]+)\s*(?P<operator><=|>=|<|>)\s*(?P<bound>\S+)\s*$")
_AFTER = ("accuracy", "nll", "brier", "ece", "overconfidence")
_WORST = {"auroc": min, "fpr95": max, "fpr95_ood_positive": max}


@dataclass(frozen=True)
class Bound:
    """A parsed requirement.

    Args:
        text: as the user wrote it.
        path: metric path or short form.
        operator: ``<=``, ``>=``, ``<`` or ``>``.
        bound: finite.
    """

    text: str
    path: str
    operator: str
    bound: float


def parse_requirement(text: str) -> Bound:
    """Parse a requirement such as ``ece<=0.05``.

    Raises:
        InvalidInputError: not of the form PATH OPERATOR NUMBER.

    Example:
        >>> parse_requirement("ece <= 0.05").bound
        0.05
    """
    match = _FORM.match(text)
    try:
        bound = float(match["bound"]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or not math.isfinite(bound):
        raise InvalidInputError(
            f"got requirement {text!r}; needed METRIC OPERATOR NUMBER, such as 'ece<=0.05', "
            "'auroc>=0.9' or 'ood.NAME.scores.energy.fpr95<=0.3'"
        )
    return Bound(text.strip(), match["path"], match["operator"], bound)


def judge(bounds: Sequence[Bound], report: Mapping[str, Any]) -> list[Requirement]:
    """Judge requirements on a report.

    Short forms: ``ece``, ``nll``, ``brier``, ``accuracy`` are the deployed calibrator's;
    ``auroc``, ``fpr95`` are the gate's score on its worst OOD set; ``coverage`` is the gate's.

    Args:
        bounds: parsed requirements.
        report: the report as JSON types.

    Returns:
        One record each: ``met`` or ``failed`` when the whole 95 % interval lies on one side of the
        bound, ``unclear`` when the bound is inside it. A metric that was not run fails.

    Raises:
        InvalidInputError: a path that no report has.
    """
    return [_judged(bound, report) for bound in bounds]


def exit_code(requirements: Sequence[Requirement], *, allow_unclear: bool = False) -> int:
    """Return 0 when all requirements are met, else 1."""
    good = ("met", "unclear") if allow_unclear else ("met",)
    return 0 if all(item.status in good for item in requirements) else 1


def _judged(bound: Bound, report: Mapping[str, Any]) -> Requirement:
    path, metric, missing = _find(bound, report)
    if metric is None or metric["value"] is None:
        message = f"{path} was not measured: {missing or 'no value'}"
        return Requirement(
            bound.text, path, bound.operator, bound.bound, None, None, None, "failed", message
        )
    value = metric["value"]
    low = value if metric["low"] is None else metric["low"]
    high = value if metric["high"] is None else metric["high"]
    holds = [_holds(end, bound.operator, bound.bound) for end in (value, low, high)]
    if all(holds):
        status, words = "met", "the whole 95 % interval meets the bound"
    elif not any(holds):
        status, words = "failed", "the whole 95 % interval misses the bound"
    else:
        side = "meets" if holds[0] else "misses"
        status, words = "unclear", f"the value {side} the bound, which lies inside the interval"
    message = f"{path} = {value:.4g} [{low:.4g}, {high:.4g}]: {words}"
    return Requirement(
        bound.text, path, bound.operator, bound.bound, value, low, high, status, message
    )


def _holds(value: float, operator: str, bound: float) -> bool:
    if operator == "<=":
        return value <= bound
    if operator == ">=":
        return value >= bound
    return value < bound if operator == "<" else value > bound


def _find(
    bound: Bound, report: Mapping[str, Any]
) -> tuple[str, Mapping[str, Any] | None, str | None]:
    """Return the full path, the metric or None, and why it is missing."""
    path = bound.path
    if path in _AFTER:
        path = f"calibration.after.{path}"
    elif path == "coverage":
        path = "gate.coverage"
    elif path in _WORST:
        worst = _worst_set(path, report)
        if worst is None:
            return path, None, "no OOD set was given, or the gate's score was not run"
        path = worst
    node: Any = report
    walked: list[str] = []
    for key in path.split("."):
        if isinstance(node, Mapping) and "not_run" in node:
            return path, None, str(node["not_run"])
        if not isinstance(node, Mapping) or key not in node:
            known = list(node) if isinstance(node, Mapping) else []
            where = ".".join(walked) or "the report"
            raise InvalidInputError(
                f"got requirement {bound.text!r}; {where} has no {key!r}{suggest(key, known)}; it "
                f"has {', '.join(map(str, known)) or 'no parts'}"
            )
        node = node[key]
        walked.append(key)
    if node is None:
        return path, None, "there were no rows to measure it on"
    if isinstance(node, Mapping) and "not_run" in node:
        return path, None, str(node["not_run"])
    if not isinstance(node, Mapping) or "value" not in node:
        raise InvalidInputError(
            f"got requirement {bound.text!r}; {path} is not a metric with a value; "
            f"it has {', '.join(map(str, node)) if isinstance(node, Mapping) else node!r}"
        )
    return path, node, None


def _worst_set(metric: str, report: Mapping[str, Any]) -> str | None:
    score = report["gate"].get("score", "energy")
    values = {
        f"ood.{name}.scores.{score}.{metric}": part["scores"][score][metric]["value"]
        for name, part in report["ood"].items()
        if metric in part["scores"].get(score, {})
    }
    return _WORST[metric](values, key=lambda path: values[path]) if values else None
