"""A conformal test martingale: a bettor who gets rich only if traffic drifts.

**Why the reference grows.** The p-value of a score against a *fixed* reference of n scores is
uniform on average over references, and not for the one at hand: a reference that happens to lie
low makes all p-values small, for ever, and any bettor who learns finds that out. With 200
reference scores a martingale on such p-values alarms in about a third of all quiet streams at a
nominal 5 %. Here each new score is ranked among the reference *and all traffic before it*. If all
of them are exchangeable, these p-values are independent and exactly uniform, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebm_guard.gate.drift.ranks import Floats, OnlineRanks

BETS = (
    "higher",
    "lower",
    "more spread out",
    "less spread out",
    "far higher",
    "far lower",
)
_JUMP = 0.01
# A bettor this rich stops: a stopped martingale is one, and nothing overflows.
_RICH_ENOUGH = 1e100
_LEAST_UNIFORM = 2.0**-54


def smoothed_p_values(
    ranks: OnlineRanks, scores: Floats, generator: np.random.Generator
) -> tuple[Floats, Floats]:
    """Compute smoothed online conformal p-values, and let the scores join the others.

    p_t = (#{i < t: s_i > s_t} + u_t #{i <= t: s_i = s_t}) / t, with u_t uniform on (0, 1) and t
    counting the reference too.

    Args:
        ranks: the reference and all scores so far.
        scores: (B,) finite, in the order in which they came.
        generator: source of u_t; one draw a score, so batches of any size draw the same.

    Returns:
        p and 1 - p, (B,) each, in (0, 1]; 1 - p is computed from its own counts, because near
        p = 1 a difference would be 0.

    References:
        Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005, section 2.2
        (smoothed) and theorem 8.1 (independent and uniform).

    Example:
        >>> ranks = OnlineRanks(np.arange(99.0))
        >>> p, _ = smoothed_p_values(ranks, np.array([500.0]), np.random.default_rng(0))
        >>> bool(0 < p[0] < 0.01)
        True
    """
    start = len(ranks)
    above, equal, below = ranks.add(scores)
    draws = np.maximum(generator.random(len(scores)), _LEAST_UNIFORM)
    total = start + 1 + np.arange(len(scores))
    return (above + draws * (equal + 1)) / total, (below + (1 - draws) * (equal + 1)) / total


def bets(p: Floats, q: Floats) -> Floats:
    """Return by how much each bet multiplies its stake, (B, 6) in the order of ``BETS``.

    b(p) = 3/2 - p, 1/2 + p, 1/2 + 6 (p - 1/2)^2, 3/2 - 6 (p - 1/2)^2, p^(-3/4) / 4 and
    (1 - p)^(-3/4) / 4. Each is >= 0 and integrates to 1 over [0, 1], so that none gains on uniform
    p-values.

    Args:
        p: (B,) in (0, 1].
        q: (B,), 1 - p, in (0, 1].

    Example:
        >>> bets(np.array([0.5]), np.array([0.5])).round(3).tolist()
        [[1.0, 1.0, 0.5, 1.5, 0.42, 0.42]]
    """
    bend = 6 * np.square(p - 0.5)
    # Square roots are rounded alike on every machine and for every batch size; powers are not.
    root_p, root_q = np.sqrt(p), np.sqrt(q)
    return np.stack(
        [
            1.5 - p,
            0.5 + p,
            0.5 + bend,
            1.5 - bend,
            0.25 / (root_p * np.sqrt(root_p)),
            0.25 / (root_q * np.sqrt(root_q)),
        ],
        axis=1,
    )


@dataclass(frozen=True)
class Crossing:
    """Where a bettor's wealth reached a line.

    Args:
        place: of the p-value, in 0..B-1.
        direction: the bet that had won the most by then.
    """

    place: int
    direction: str


class Bettor:
    """Capital that is invested little by little in six bets against uniform p-values.

    At step t a share (t^(-1/4) - (t+1)^(-1/4)) of the first capital moves from the reserve to the
    bets, in equal parts; then each stake gives 1 % to the others, and then the bets are settled.
    Wealth = reserve + stakes is a non-negative martingale on independent uniform p-values, so it
    ever reaches capital / delta with probability <= delta (Ville).

    Args:
        capital: wealth before the first step.

    References:
        Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman, Retrain or Not Retrain:
        Conformal Test Martingales for Change-point Detection, COPA 2021 (Simple Jumper).

    Differs:
        Six bets in place of the linear ones, and the reserve: a Simple Jumper loses a constant
        share a step while nothing happens, so that after a long quiet stretch it has nothing left
        to win with. A reserve that is spent as t^(-1/4) is a mixture over the time of the change.

    Example:
        >>> bettor = Bettor()
        >>> p = np.full(30, 0.02)
        >>> bettor.play(p, 1 - p, line=20)
        Crossing(place=4, direction='far higher')
    """

    def __init__(self, capital: float = 1.0) -> None:
        self.capital = capital
        self.steps = 0
        self.stakes = [0.0] * len(BETS)
        self.wealth = capital
        self.highest = capital

    @property
    def strongest(self) -> str:
        """The bet that has won the most: what the scores look like, in a word of ``BETS``."""
        return BETS[self.stakes.index(max(self.stakes))]

    def play(self, p: Floats, q: Floats, line: float = math.inf) -> Crossing | None:
        """Bet on p-values in their order.

        Args:
            p: (B,) in (0, 1].
            q: (B,), 1 - p.
            line: wealth to look out for.

        Returns:
            Where the wealth first reached the line, or None.
        """
        crossing: Crossing | None = None
        for place, factors in enumerate(bets(p, q).tolist()):
            self._step(factors)
            if crossing is None and self.wealth >= line:
                crossing = Crossing(place, self.strongest)
        return crossing

    def _step(self, factors: list[float]) -> None:
        before, self.steps = self._reserve(), self.steps + 1
        if self.wealth >= _RICH_ENOUGH:
            return
        reserve = self._reserve()
        given = (before - reserve + _JUMP * sum(self.stakes)) / len(BETS)
        self.stakes = [
            (stake * (1 - _JUMP) + given) * factor
            for stake, factor in zip(self.stakes, factors, strict=True)
        ]
        self.wealth = reserve + sum(self.stakes)
        self.highest = max(self.highest, self.wealth)

    def _reserve(self) -> float:
        return self.capital / math.sqrt(math.sqrt(1 + self.steps))

    def settings(self) -> dict[str, Any]:
        """Return what rebuilds the bettor, as JSON types."""
        return {
            "capital": self.capital,
            "steps": self.steps,
            "stakes": list(self.stakes),
            "wealth": self.wealth,
            "highest": self.highest,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Bettor:
        """Rebuild a bettor.

        Raises:
            ValueError: another number of stakes, or a number that no bettor can have.
        """
        bettor = cls(float(settings["capital"]))
        bettor.steps = int(settings["steps"])
        bettor.stakes = [float(stake) for stake in settings["stakes"]]
        bettor.wealth, bettor.highest = float(settings["wealth"]), float(settings["highest"])
        numbers = [bettor.capital, bettor.wealth, bettor.highest, *bettor.stakes]
        if len(bettor.stakes) != len(BETS) or not all(0 <= x < math.inf for x in numbers):
            raise ValueError(f"stakes {bettor.stakes} of wealth {bettor.wealth}")
        return bettor
