"""The robustness section: what attacks and corruptions do, in words that do not flatter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebm_guard.intervals import Metric
from ebm_guard.report.record import ATTENTION, BAD, GOOD, UNCLEAR, NotRun, Record, Verdict, plain
from ebm_guard.robustness.records import EpsilonResult, NormResult, Robustness

NOT_ASKED = "no attack and no corruption was asked for; add --attacks quick"
# Shares of the clean accuracy that the verdict's words stand for.
_KEPT, _SOME = 0.8, 0.5
_METRIC = ("value", "low", "high", "n", "method")


@dataclass(frozen=True)
class RobustnessSection(Record):
    """What an attacker can do, and what bad pictures do.

    Args:
        verdict: in plain words.
        robust_accuracy: worst case over all attacks, at the reference epsilon of the first norm.
        gated_accuracy: share not wrong *and accepted* there, by an attacker who knows the gate.
        corrupted_accuracy: mean over the corruptions, or None.
        found: the whole evaluation.
    """

    verdict: Verdict
    robust_accuracy: Metric | None
    gated_accuracy: Metric | None
    corrupted_accuracy: Mapping[str, Any] | None
    found: Robustness

    def to_dict(self) -> dict[str, Any]:
        """Return the sums first, then all that was found."""
        return {
            "verdict": plain(self.verdict),
            "robust_accuracy": plain(self.robust_accuracy),
            "gated_accuracy": plain(self.gated_accuracy),
            "corrupted_accuracy": plain(self.corrupted_accuracy),
            **self.found.to_dict(),
        }


def robustness_section(found: Robustness | None) -> RobustnessSection | NotRun:
    """Sum up an evaluation of robustness, or say that there was none."""
    if found is None:
        return NotRun(NOT_ASKED)
    norm, row = reference(found)
    # Of the reference or of nothing: a bound must not be met at a smaller epsilon.
    asked = norm.at(norm.reference)
    gated = None if asked.gated is None else asked.gated.aware
    table = found.corruptions
    return RobustnessSection(
        verdict=_verdict(found, norm, row),
        robust_accuracy=_lowest(found, asked),
        gated_accuracy=gated,
        corrupted_accuracy=None if table is None else table["summary"]["accuracy"],
        found=found,
    )


def _lowest(found: Robustness, row: EpsilonResult) -> Metric | None:
    """Return the robust accuracy after all attacks, a foreign implementation among them."""
    other = found.reference
    if row.worst_case is None or other is None or not other["fooled"]:
        return row.worst_case
    values = {name: other["robust_accuracy"][name] for name in _METRIC}
    return Metric(**values)


def reference(found: Robustness) -> tuple[NormResult, EpsilonResult | None]:
    """Return the first norm, and its row at the reference epsilon, or the largest that ran."""
    norm = found.norms[0]
    whole = [row for row in norm.epsilons if row.worst_case is not None]
    chosen = norm.at(norm.reference)
    if chosen.worst_case is not None:
        return norm, chosen
    return norm, whole[-1] if whole else None


def _verdict(found: Robustness, norm: NormResult, row: EpsilonResult | None) -> Verdict:
    if row is None or row.worst_case is None:
        return Verdict(
            UNCLEAR,
            "The time budget allowed no whole attack",
            "No robust accuracy is given: a part of the attacks would be a weaker number.",
        )
    if not found.clean.value:
        return Verdict(
            UNCLEAR,
            "Nothing was right, so there was nothing to attack",
            f"None of the {found.n} images is named rightly without attack. Check labels and "
            "normalisation.",
        )
    at_reference = row.text == norm.reference
    worst = (_lowest(found, row) if at_reference else None) or row.worst_case
    clean = found.clean
    raised = [flag for flag in found.flags if flag["status"] == "raised"]
    status, headline = _words(worst, clean)
    names = [item.label for item in row.attacks]
    names += ["pyautoattack"] if at_reference and found.reference is not None else []
    attacks = ", ".join(names)
    sentence = "" if at_reference else f"The reference {norm.reference} was not run: budget. "
    sentence += (
        f"Robust accuracy at {norm.norm} {row.text}: {_percent(worst.value)} "
        f"({_percent(worst.low or 0)} to {_percent(worst.high or 0)}, n = {worst.n}) against "
        f"{attacks}; {_percent(clean.value)} without attack. An upper bound: a stronger attack may "
        "find more."
    )
    gated = row.gated
    if gated is not None and gated.aware is not None:
        sentence += (
            f" With the gate, {_percent(1 - gated.aware.value)} of the images can be made wrong "
            "and accepted by an attacker who knows it"
        )
        if gated.plain is not None:
            first = _percent(1 - gated.plain.value)
            sentence += f" ({first} by one who stops at the first flip)"
        sentence += "."
    sentence += _purified(found)
    if found.label_source != "true labels":
        sentence += " Without labels, right means: as the model says without attack."
    if raised and status != BAD:
        status = ATTENTION
        headline = "The attacks may be blinded: do not trust the robust accuracy"
    if raised:
        sentence += f" Flags raised: {', '.join(flag['name'] for flag in raised)}."
    table = found.corruptions
    if table is not None:
        mean = table["summary"]["accuracy"]["value"]
        sentence += f" On corrupted images ({table['source']}): {_percent(mean)} on average."
    for table in found.published:
        mean = table["summary"]["accuracy"]["value"]
        sentence += f" On {table['source']}: {_percent(mean)} on average."
    return Verdict(status, headline, sentence)


def _purified(found: Robustness) -> str:
    """Say what purification changes: the worst of its gradients, never the best."""
    result = found.purification
    if result is None or result.worst_case is None:
        return ""
    return (
        f" With purification ({result.settings['num_steps']} SGLD steps): "
        f"{_percent(result.worst_case.value)} at {result.norm} {result.text}, the worst of "
        f"{len(result.modes)} gradients on {result.n} images; {_percent(result.clean.value)} "
        "without attack."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _words(worst: Metric, clean: Metric) -> tuple[str, str]:
    low, high = worst.low or 0.0, worst.high or 0.0
    if high < _SOME * clean.value or not worst.value:
        if worst.value <= 0.02:
            return BAD, "No protection against deliberate attack, as in any ordinary net"
        return BAD, "Deliberate attacks break most of what it gets right"
    if low >= _KEPT * clean.value:
        return GOOD, "It withstands the attacks that were tried"
    return ATTENTION, "It withstands a part of the attacks"
