"""One verdict from the drift evidence of many replicas, whatever ties their traffic together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ebm_guard.errors import InvalidInputError
from ebm_guard.gate.drift.ranks import Floats
from ebm_guard.intervals import Array

# Of the bet, what is on replicas that drift together; the rest is on a single one. The highest of
# many wealths is far ahead of the others even where all drift, so the rest finds most drifts first.
_TOGETHER = 0.1


def adjusted(highest: Array, lone: float) -> Floats:
    """Turn the highest wealth that a replica ever had into evidence that may be averaged.

    With y = max(highest, 1),
    A(y) = 1/10 (y - 1 - ln y) / (ln y)^2 + 9/10 lone [y >= lone].

    A never falls and integrates to 1 against y^(-2) over y >= 1. Under no drift the wealth ever
    reaches y with probability <= 1/y (Ville), hence E[A] <= 1 although y is a *maximum*.

    Args:
        highest: (...,) >= 0, such as ``DriftState.highest``.
        lone: > 1, the wealth at which one replica counts for ``0.9 lone`` at once.

    References:
        Shafer, Shen, Vereshchagin and Vovk, Test Martingales, Bayes Factors and p-Values,
        Statistical Science 2011 (adjusters); Choe and Ramdas, Combining Evidence Across
        Filtrations, 2024 (why evidence is adjusted before it is averaged).

    Differs:
        The mixture over k of the adjusters k y^(1-k) finds a drift of all replicas; the step at
        ``lone``, an adjuster too, adds that of one.

    Example:
        >>> adjusted(np.array([0.5, 1.0, 100.0, 1e5]), lone=4e4).round(2).tolist()
        [0.05, 0.05, 0.45, 36075.44]
    """
    y = np.maximum(np.asarray(highest, dtype=np.float64), 1.0)
    # Near 1 the quotient is 0 / 0; its series is 1/2 + ln(y) / 6.
    log = np.log(y)
    safe = np.where(log < 1e-4, 1.0, log)
    smooth = np.where(log < 1e-4, 0.5 + log / 6, (y - 1 - log) / np.square(safe))
    return _TOGETHER * smooth + (1 - _TOGETHER) * lone * (y >= lone)


@dataclass(frozen=True)
class MergedEvidence:
    """What the martingales of several replicas say together.

    Args:
        replicas: how many there are, those that said nothing included.
        reported: of them, those whose evidence is in.
        delta: chance of a false alarm, of each of the two alarms here.
        highest: the highest wealth that any replica ever had.
        alarms: replicas whose own monitor has reached 1 / delta. Not a verdict: with many replicas
            some do while nothing drifts.
        mean_wealth: average wealth now, silent replicas counted as 0.
        mean_adjusted: average of :func:`adjusted`, silent replicas counted as 0.
    """

    replicas: int
    reported: int
    delta: float
    highest: float
    alarms: int
    mean_wealth: float
    mean_adjusted: float

    @property
    def line(self) -> float:
        """Where both averages alarm, 1 / delta."""
        return 1 / self.delta

    @property
    def alarm_at_any_time(self) -> bool:
        """Whether the adjusted average alarms: right however often one looks."""
        return self.mean_adjusted >= self.line

    @property
    def alarm_at_this_look(self) -> bool:
        """Whether the average wealth alarms: right at one look that was planned beforehand."""
        return self.mean_wealth >= self.line

    @property
    def sentence(self) -> str:
        """The verdict in plain words, and which figure holds when."""
        verdict = "Drift: an alarm" if self.alarm_at_any_time else "No alarm"
        silent = self.replicas - self.reported
        return (
            f"{verdict} of {self.replicas:,} replicas together"
            f"{f' ({silent:,} of them silent)' if silent else ''}: their adjusted evidence is "
            f"{self.mean_adjusted:.3g}, and the alarm is at {self.line:g}; false with probability "
            f"at most {self.delta:g}, however often one looks. {self.alarms:,} of them have "
            f"alarmed alone; up to {self.delta * self.replicas:,.3g} are expected to while nothing "
            f"drifts. Their average wealth is {self.mean_wealth:.3g}: an alarm at {self.line:g} "
            "if this one look was planned beforehand (Markov), not at every look."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return asdict(self) | {
            "line": self.line,
            "alarm_at_any_time": self.alarm_at_any_time,
            "alarm_at_this_look": self.alarm_at_this_look,
            "sentence": self.sentence,
        }


def merge_evidence(
    highest: Sequence[float],
    wealth: Sequence[float],
    *,
    delta: float = 0.05,
    replicas: int | None = None,
) -> MergedEvidence:
    """Merge what the monitors of R replicas found into one alarm of level delta.

    mean_adjusted = 1/R sum_r A(max_t M_r(t)) >= 1/delta is an alarm at any time;
    mean_wealth = 1/R sum_r M_r(t) >= 1/delta is one at a single look.

    Each wealth M_r is a martingale in the filtration of *its own* p-values, if the reference and
    the traffic of replica r are exchangeable. In the joint filtration it is none: the replicas
    share one reference, and what one of them sees of it foretells the p-values of the others. So
    the plain average is an e-value where each M_r is read at a time that was fixed beforehand or
    that stops by its own history alone, and is none at a time chosen by looking at all of them.
    E[A(max_t M_r(t))] <= 1 holds for the whole future of each replica, and an average of such
    numbers has it too, whatever they have to do with each other: shared reference, mirrored
    traffic, one seed. By Markov the alarm is false with probability <= delta, ever.

    The weights 1/R have to be set before the evidence is seen. Give as ``replicas`` how many will
    ever have run: one that restarts without its saved state is a new one, and leaving out those
    that stopped would be choosing. A product M_1 M_2 ... is valid only for independent evidence,
    and a shared reference or mirrored traffic is enough to break that.

    Args:
        highest: highest wealth of each replica so far, ``DriftState.highest``.
        wealth: wealth of each now, in the same order.
        delta: chance of a false alarm, in (0, 1).
        replicas: R, at least ``len(highest)``, which is the default.

    Raises:
        InvalidInputError: no evidence, numbers that no wealth can be, or too small R.

    References:
        Vovk and Wang, E-values: Calibration, Combination and Applications, Annals of Statistics
        2021 (averages); Choe and Ramdas, Combining Evidence Across Filtrations, 2024 (adjusters).

    Example:
        >>> merge_evidence([30.0, 2.0, 1.5], [1.0, 0.5, 0.4]).alarm_at_any_time
        False
        >>> merge_evidence([90.0, 2.0, 1.5], [1.0, 0.5, 0.4]).alarm_at_any_time
        True
    """
    top = np.asarray(highest, dtype=np.float64)
    now = np.asarray(wealth, dtype=np.float64)
    if top.ndim != 1 or not len(top) or now.shape != top.shape:
        raise InvalidInputError(
            f"got highest of shape {top.shape} and wealth of shape {now.shape}; needed one of "
            "each for every replica, and at least one replica"
        )
    numbers = np.concatenate([top, now])
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise InvalidInputError("got wealth that is negative or not finite; needed numbers >= 0")
    if not 0 < delta < 1:
        raise InvalidInputError(f"got delta {delta!r}; needed (0, 1)")
    count = len(top) if replicas is None else replicas
    if count < len(top):
        raise InvalidInputError(
            f"got evidence of {len(top)} replicas and replicas={count}; needed the number of all "
            "that have ever run"
        )
    lone = count / delta / (1 - _TOGETHER)
    return MergedEvidence(
        replicas=count,
        reported=len(top),
        delta=delta,
        highest=float(top.max()),
        alarms=int((top >= 1 / delta).sum()),
        mean_wealth=math.fsum(now) / count,
        mean_adjusted=math.fsum(adjusted(top, lone)) / count,
    )
