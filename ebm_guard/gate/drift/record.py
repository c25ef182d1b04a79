"""What a drift monitor says: its state after each update, its report, and several in one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ebm_guard.gate.drift.distances import KS, PSI
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
            side = "above" if self.psi.value > self.psi.null95 else "within"
            parts.append(
                f"PSI of recent scores is {self.psi.value:.3g}, {side} what chance gives "
                f"({self.psi.expected:.2g} on average, {self.psi.null95:.2g} in 95 % of cases)."
            )
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
        monitors: how many.
        n: scores seen by all; the counts add up exactly.
        refused: of them, refused.
        invalid: of them, not finite.
        false_reject_rate: what the gate promises.
        delta: chance of a false alarm.
        reject_rate: share refused, or None without scores.
        psi: of all traffic together, or None without finite scores.
        mean_wealth: average of the monitors' wealth now.
        alarm_at_this_look: the average is at least 1 / delta.
        alarm_at_any_time: some monitor's wealth once reached monitors / delta.
    """

    monitors: int
    n: int
    refused: int
    invalid: int
    false_reject_rate: float
    delta: float
    reject_rate: Metric | None
    psi: PSI | None
    mean_wealth: float
    alarm_at_this_look: bool
    alarm_at_any_time: bool

    @property
    def sentence(self) -> str:
        """What the merged figures say, and which of them holds when."""
        rate = "" if self.reject_rate is None else f" {_share(self.reject_rate)} were refused."
        return (
            f"{self.monitors} monitors, {self.n:,} scores.{rate} Their average wealth is "
            f"{self.mean_wealth:.3g}; at 1/delta = {1 / self.delta:g} it is an alarm that is false "
            f"with probability at most {self.delta:g} at one look planned beforehand (Markov), "
            "not at every look. For looking all the time each monitor alarms at "
            f"{self.monitors / self.delta:g}: "
            f"{'one did' if self.alarm_at_any_time else 'none did'}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "monitors": self.monitors,
            "n": self.n,
            "refused": self.refused,
            "invalid": self.invalid,
            "false_reject_rate": self.false_reject_rate,
            "delta": self.delta,
            "reject_rate": _dict(self.reject_rate),
            "psi": _dict(self.psi),
            "mean_wealth": self.mean_wealth,
            "alarm_at_this_look": self.alarm_at_this_look,
            "alarm_at_any_time": self.alarm_at_any_time,
            "sentence": self.sentence,
        }


def _dict(record: Metric | PSI | KS | None) -> dict[str, Any] | None:
    return None if record is None else record.to_dict()


def _share(rate: Metric) -> str:
    low, high = rate.low or 0.0, 1.0 if rate.high is None else rate.high
    return f"{rate.value:.1%} [{low:.1%}, {high:.1%}]" if math.isfinite(rate.value) else "-"
