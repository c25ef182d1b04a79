"""Robustness before and after fine-tuning: both nets under the same attacks on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebm_guard.intervals import Metric
from ebm_guard.report.paired import Compared, paired_shares, unpaired
from ebm_guard.report.record import Record
from ebm_guard.robustness.records import EpsilonResult, Robustness

_METRIC = ("value", "low", "high", "n", "method")


@dataclass(frozen=True)
class RobustnessComparison(Record):
    """Both nets under the same attacks on the same images.

    Args:
        preset: of the attacks.
        n: attacked images.
        label_source: ``true labels`` or ``predicted labels``.
        clean: accuracy without attack, on these images.
        norms: for each norm its reference and its budgets, with the accuracy that all attacks left.
        corrupted: mean accuracy on corrupted images, and whose corruptions, or None.
        flags: signs of a blinded attack that were raised, by net.
        cost: gradients by net.
        note: what the intervals are.
        left_out: what was not run, and why.
    """

    preset: str
    n: int
    label_source: str
    clean: Compared | None
    norms: tuple[Mapping[str, Any], ...]
    corrupted: Mapping[str, Any] | None
    flags: Mapping[str, list[str]]
    cost: Mapping[str, int]
    note: str
    left_out: list[dict[str, str]]


def compare_robustness(start: Robustness, candidate: Robustness) -> RobustnessComparison:
    """Compare two evaluations of robustness on the same images.

    A budget counts as compared where all attacks ran on both nets.
    """
    norms = tuple(
        {
            "norm": one.norm,
            "reference": one.reference,
            "rows": [_budget(first, two.at(first.text)) for first in one.epsilons],
        }
        for one, two in zip(start.norms, candidate.norms, strict=True)
    )
    tables = (start.corruptions, candidate.corruptions)
    left_out = [
        {**item, "name": f"{name}: {item['name']}"}
        for name, found in (("start", start), ("candidate", candidate))
        for item in found.left_out
    ]
    return RobustnessComparison(
        preset=start.preset,
        n=start.n,
        label_source=start.label_source,
        clean=_shares(start.clean, candidate.clean, start.right, candidate.right),
        norms=norms,
        corrupted=None if None in tables else _corrupted(*tables),
        flags={"start": _raised(start), "candidate": _raised(candidate)},
        cost={
            name: int(found.cost["gradients"])
            for name, found in (("start", start), ("candidate", candidate))
        },
        note=(
            "The images are the same for both nets, and the intervals of the differences are "
            "paired; those of corrupted images are not, and so wider than they could be."
        ),
        left_out=left_out,
    )


def _budget(start: EpsilonResult, candidate: EpsilonResult) -> dict[str, Any]:
    whole = start.worst_case is not None and candidate.worst_case is not None
    reasons = [item.reason for row in (start, candidate) for item in row.attacks if item.reason]
    return {
        "epsilon": start.epsilon,
        "text": start.text,
        "attacks": [item.label for item in start.attacks],
        "worst_case": _shares(
            start.worst_case, candidate.worst_case, start.standing, candidate.standing
        ),
        "reason": "" if whole else next(iter(reasons), "not run"),
    }


def _shares(
    start: Metric | None,
    candidate: Metric | None,
    before: tuple[bool, ...],
    after: tuple[bool, ...],
) -> Compared | None:
    """Compare two shares of images, image by image where both evaluations kept the images."""
    if start is None or candidate is None:
        return None
    if before and len(before) == len(after):
        return paired_shares(before, after)
    return unpaired(start, candidate)


def _corrupted(start: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    sides = [
        Metric(**{name: table["summary"]["accuracy"][name] for name in _METRIC})
        for table in (start, candidate)
    ]
    return {"source": start["source"], "accuracy": unpaired(*sides)}


def _raised(found: Robustness) -> list[str]:
    return [flag["name"] for flag in found.flags if flag["status"] == "raised"]
