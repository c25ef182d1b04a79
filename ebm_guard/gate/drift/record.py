"""What a drift monitor says: its state after each update, its report, and several in one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ebm_guard.gate.drift.distances import KS, PSI
from ebm_guard.gate.drift.evidence import MergedEvidence
from ebm_guard.intervals import Metric


@dataclass(frozen=True)
class DriftState:
    """Where a monitor stands after an update; cheap, so that it can be asked for each score.

    Args:
        n: scores seen.
        refused: of them, refused by the gate: above the cut, or invalid.
        invalid: of them, not finite.
        wealth: of the martingale now.
        highest: largest wealth so far.
        line: wealth at which it alarms, 1 / delta.
        delta: chance of ever alarming while nothing drifts.
        alarm: whether it has alarmed; it stays so.
        alarm_at: number of the score at which it did, from 1, or None.
        direction: what the scores look like if they have drifted, such as ``higher``.
        epoch: number of the epoch, from 1.
    """

    n: int
    refused: int
    invalid: int
    wealth: float
    highest: float
    line: float
    delta: float
    alarm: bool
    alarm_at: int | None
    direction: str
    epoch: int

    @property
    def sentence(self) -> str:
        """The state in plain words."""
        if self.alarm:
            return (
                f"Drift: an alarm at score {self.alarm_at:,}. Scores look {self.direction} than "
                f"the reference; chance of a false alarm, ever: at most {self.delta:g}."
            )
        return (
            f"No alarm after {self.n:,} scores: the evidence for drift is {self.highest:.3g} at "
            f"its highest, and the alarm is at {self.line:g}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "n": self.n,
            "refused": self.refused,
            "invalid": self.invalid,
            "wealth": self.wealth,
            "highest": self.highest,
            "line": self.line,
            "delta": self.delta,
            "alarm": self.alarm,
            "alarm_at": self.alarm_at,
            "direction": self.direction,
            "epoch": self.epoch,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class DriftReport:
    """Everything a monitor can say at one look.

    Args:
        state: counts and martingale.
        false_reject_rate: the share of refused ID inputs that the gate promises.
        reject_rate: share of all traffic that was refused, or None before the first score.
        recent_reject_rate: the same of the window.
        psi: of the window's finite scores, or None where there are none.
        ks: likewise.
        total_psi: PSI of all traffic.
    """

    state: DriftState
    false_reject_rate: float
    reject_rate: Metric | None
    recent_reject_rate: Metric | None
    psi: PSI | None
    ks: KS | None
    total_psi: PSI | None

    @property
    def refuses_too_much(self) -> bool:
        """Whether the window's whole interval lies above the promised rate."""
        rate = self.recent_reject_rate
        return rate is not None and rate.low is not None and rate.low > self.false_reject_rate

    @property
    def sentence(self) -> str:
        """The report in plain words, for an operator."""
        parts = [self.state.sentence]
        if self.recent_reject_rate is not None:
            parts.append(
                f"{_share(self.recent_reject_rate)} of the last {self.recent_reject_rate.n:,} "
                f"inputs were refused, and the gate promises at most {self.false_reject_rate:.1%} "
                f"of in-distribution inputs: {self._verdict()}."
            )
        if self.state.invalid:
            parts.append(f"{self.state.invalid:,} scores were not finite and count as refused.")
        if self.psi is not None:
            parts.append(f"{_psi_words(self.psi, 'of recent scores')}.")
        return " ".join(parts)

    def _verdict(self) -> str:
        return "more than promised" if self.refuses_too_much else "not shown to be more"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "state": self.state.to_dict(),
            "false_reject_rate": self.false_reject_rate,
            "reject_rate": _dict(self.reject_rate),
            "recent_reject_rate": _dict(self.recent_reject_rate),
            "refuses_too_much": self.refuses_too_much,
            "psi": _dict(self.psi),
            "ks": _dict(self.ks),
            "total_psi": _dict(self.total_psi),
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class MergedDrift:
    """Several monitors of one gate, such as one a server.

    Args:
        n: scores seen by all; the counts add up exactly.
        refused: of them, refused.
        invalid: of them, not finite.
        false_reject_rate: what the gate promises.
        reject_rate: share refused, or None without scores.
        psi: of all traffic together, or None without finite scores; for one look.
        evidence: of the martingales together.
    """

    n: int
    refused: int
    invalid: int
    false_reject_rate: float
    reject_rate: Metric | None
    psi: PSI | None
    evidence: MergedEvidence

    @property
    def monitors(self) -> int:
        """Monitors that were merged."""
        return self.evidence.reported

    @property
    def mean_wealth(self) -> float:
        """Average of the monitors' wealth now."""
        return self.evidence.mean_wealth

    @property
    def alarm_at_this_look(self) -> bool:
        """Whether the average wealth is an alarm, at one look that was planned beforehand."""
        return self.evidence.alarm_at_this_look

    @property
    def alarm_at_any_time(self) -> bool:
        """Whether the adjusted evidence is an alarm, however often one looks."""
        return self.evidence.alarm_at_any_time

    @property
    def sentence(self) -> str:
        """The verdict in plain words, and which figure holds when."""
        parts = [self.evidence.sentence]
        if self.reject_rate is not None:
            parts.append(
                f"{_share(self.reject_rate)} of {self.n:,} scores were refused; the gate promises "
                f"at most {self.false_reject_rate:.1%} of in-distribution inputs."
            )
        if self.psi is not None:
            parts.append(f"{_psi_words(self.psi, 'of all traffic')}.")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "n": self.n,
            "refused": self.refused,
            "invalid": self.invalid,
            "false_reject_rate": self.false_reject_rate,
            "reject_rate": _dict(self.reject_rate),
            "psi": _dict(self.psi),
            "evidence": self.evidence.to_dict(),
            "sentence": self.sentence,
        }


def _psi_words(value: PSI, what: str) -> str:
    side = "above" if value.value > value.null95 else "within"
    return (
        f"PSI {what} is {value.value:.3g}, {side} what chance gives ({value.expected:.2g} on "
        f"average, {value.null95:.2g} in 95 % of cases)"
    )


def _dict(record: Metric | PSI | KS | None) -> dict[str, Any] | None:
    return None if record is None else record.to_dict()


def _share(rate: Metric) -> str:
    low, high = rate.low or 0.0, 1.0 if rate.high is None else rate.high
    return f"{rate.value:.1%} [{low:.1%}, {high:.1%}]" if math.isfinite(rate.value) else "-"
