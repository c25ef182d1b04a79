"""Thresholds on a score, from ID rows alone, with the promise that each can keep.

With n exchangeable ID scores and the cut at the k-th smallest, the true share of ID accepted is
distributed as Beta(k, n + 1 - k) for continuous scores; ties only raise it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard import registry
from ebm_guard.errors import InvalidInputError, TooFewRowsError
from ebm_guard.intervals import Array
from ebm_guard.precision import KeepDouble


def pac_rank(n: int, false_reject_rate: float, assurance: float) -> int:
    """Compute the smallest k with P(Beta(k, n+1-k) >= 1 - false_reject_rate) >= assurance.

    Args:
        n: calibration rows.
        false_reject_rate: target a in (0, 1) for the share of ID refused.
        assurance: probability 1 - delta over calibration sets that the target is met.

    Returns:
        k in 1..n, or n + 1 where no finite cut can promise it.

    References:
        Vovk, Conditional Validity of Inductive Conformal Predictors, ACML 2012: validity given the
        training set, by the binomial bound.

    Example:
        >>> [pac_rank(n, 0.05, 0.95) for n in (58, 59, 100, 1000)]
        [59, 59, 99, 962]
    """
    from scipy.stats import binom

    # P(Beta(k, n+1-k) >= 1-a) = P(Binomial(n, 1-a) <= k-1).
    k = int(binom.ppf(assurance, n, 1 - false_reject_rate)) + 1
    while k > 1 and binom.cdf(k - 2, n, 1 - false_reject_rate) >= assurance:
        k -= 1
    while k <= n and binom.cdf(k - 1, n, 1 - false_reject_rate) < assurance:
        k += 1
    return k


def marginal_rank(n: int, false_reject_rate: float, assurance: float | None = None) -> int:
    """Compute k = ceil((n+1)(1 - false_reject_rate)), which holds on average over sets.

    Args:
        n: calibration rows.
        false_reject_rate: target a in (0, 1).
        assurance: not used; the marginal rule promises nothing for one calibration set.

    Returns:
        k, n + 1 where no finite cut can promise it.

    Example:
        >>> marginal_rank(100, 0.05)
        96
    """
    del assurance
    # The tolerance keeps 20 * 0.95 from rounding up to 19.000000000000004.
    return math.ceil((n + 1) * (1 - false_reject_rate) - 1e-9)


def minimum_rows(method: str, false_reject_rate: float, assurance: float = 0.95) -> int:
    """Compute the fewest calibration rows with which a rule can promise anything.

    Example:
        >>> minimum_rows("pac", 0.05), minimum_rows("marginal", 0.05)
        (59, 19)
    """
    if method == "pac":
        n = math.ceil(math.log(1 - assurance) / math.log(1 - false_reject_rate) - 1e-9)
    else:
        n = math.ceil(1 / false_reject_rate - 1e-9) - 1
    return max(n, 1)


class Threshold(KeepDouble):
    """A cut on a score: accept iff score <= cut.

    Attributes:
        cut: () float64, the k-th smallest calibration score.
        scores: (n,) float64, sorted calibration scores, for p-values.

    References:
        See :func:`pac_rank` and :func:`marginal_rank`.

    Example:
        >>> threshold = Threshold.fit(np.arange(100.0))
        >>> float(threshold.cut), threshold.rank
        (98.0, 99)
    """

    cut: Tensor
    scores: Tensor

    def __init__(
        self,
        scores: Tensor,
        rank: int,
        method: str,
        false_reject_rate: float,
        assurance: float | None,
    ) -> None:
        super().__init__()
        self.register_buffer("scores", scores.double())
        self.register_buffer("cut", self.scores[rank - 1].clone())
        self.rank, self.method = rank, method
        self.false_reject_rate, self.assurance = false_reject_rate, assurance

    @classmethod
    def fit(
        cls,
        scores: Array,
        method: str = "pac",
        false_reject_rate: float = 0.05,
        assurance: float = 0.95,
    ) -> Threshold:
        """Choose the cut from the scores of held-out ID rows.

        Args:
            scores: (n,), finite.
            method: ``pac`` or ``marginal``.
            false_reject_rate: target for the share of ID refused, in (0, 1).
            assurance: for ``pac``, the probability that the target is met, in (0, 1).

        Raises:
            TooFewRowsError: too few rows for the promise; the error names the number needed.
            InvalidInputError: non-finite scores, or rates out of range.
        """
        rule = registry.get("threshold", method).load()
        check_rates(false_reject_rate, assurance)
        values = np.sort(finite_scores(scores))
        n = len(values)
        rank = rule(n, false_reject_rate, assurance)
        needed = minimum_rows(method, false_reject_rate, assurance)
        if n < needed or rank > n:
            promise = f" with assurance {assurance:g}" if method == "pac" else ""
            raise TooFewRowsError(
                f"got {n} calibration rows; a {method} threshold for a false reject rate of "
                f"{false_reject_rate:g}{promise} needs at least {needed}. Give more ID rows, or "
                "allow a higher false_reject_rate"
            )
        kept = assurance if method == "pac" else None
        return cls(torch.from_numpy(values), rank, method, false_reject_rate, kept)

    @property
    def n(self) -> int:
        """Number of calibration rows."""
        return len(self.scores)

    @property
    def guarantee(self) -> str:
        """The promise, in words."""
        share = f"{1 - self.false_reject_rate:.4g}"
        if self.assurance is not None:
            return (
                f"With probability {self.assurance:g} over the draw of the {self.n:,} calibration "
                f"rows, at least {share} of exchangeable in-distribution inputs are accepted. "
                "Nothing is promised about how many OOD inputs are refused."
            )
        return (
            f"On average over calibration sets of {self.n:,} rows, at least {share} of "
            "exchangeable in-distribution inputs are accepted; for this one set it may be less. "
            "Nothing is promised about how many OOD inputs are refused."
        )

    def cuts(self, classes: Tensor) -> Tensor:
        """Return the cut of each row, (B,) float64: here the same for all.

        Args:
            classes: (B,) int64, the class of the largest logit.
        """
        return self.cut.to(classes.device).expand(len(classes))

    def accept(self, score: Tensor, classes: Tensor | None = None) -> Tensor:
        """Compare scores (B,) with the cut; NaN is never accepted.

        Args:
            score: (B,).
            classes: not used: one cut serves all classes.
        """
        del classes
        return score.double() <= self.cut.to(score.device)

    def p_value(self, score: Tensor, classes: Tensor | None = None) -> Tensor:
        """Compute the marginal conformal p-value (1 + #{s_i >= s(x)}) / (n + 1).

        It is uniform or larger for exchangeable ID rows, on average over calibration sets. It does
        not decide ``accept``: the PAC cut is stricter about what it promises.

        Args:
            score: (B,), finite.
            classes: not used: one set of scores serves all classes.

        Returns:
            (B,) float64 in [1/(n+1), 1].

        References:
            Bates et al., Testing for Outliers with Conformal P-values, 2021.
        """
        del classes
        scores = self.scores.to(score.device)
        below = torch.searchsorted(scores, score.double(), right=False)
        return (1 + self.n - below).double() / (self.n + 1)

    def settings(self) -> dict[str, Any]:
        """Return what, with the sorted scores, rebuilds the threshold."""
        return {
            "method": self.method,
            "rank": self.rank,
            "false_reject_rate": self.false_reject_rate,
            "assurance": self.assurance,
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Threshold:
        """Rebuild a fitted threshold."""
        scores, cut = tensors["scores"], tensors["cut"]
        if scores.ndim != 1 or cut.ndim != 0 or not 1 <= int(settings["rank"]) <= len(scores):
            raise ValueError(
                f"threshold of rank {settings['rank']} in {tuple(scores.shape)} scores"
            )
        assurance = settings["assurance"]
        threshold = cls(
            scores,
            int(settings["rank"]),
            registry.get("threshold", str(settings["method"])).name,
            float(settings["false_reject_rate"]),
            None if assurance is None else float(assurance),
        )
        check_rates(threshold.false_reject_rate, 0.5 if assurance is None else float(assurance))
        check_sorted(threshold.scores)
        if not torch.equal(threshold.cut, cut.double()):
            raise ValueError(f"a cut of {float(cut)} where the scores give {float(threshold.cut)}")
        return threshold


def finite_scores(scores: Array) -> NDArray[np.float64]:
    """Return calibration scores as float64.

    Raises:
        InvalidInputError: some are not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InvalidInputError(
            f"got {bad} of {len(values)} calibration scores that are not finite; a threshold "
            "cannot be chosen on rows that the gate itself would refuse. Remove their cause"
        )
    return values


def check_sorted(scores: Tensor) -> None:
    """Refuse stored calibration scores that are not finite and ascending.

    Raises:
        ValueError: they are not; a cut among them would mean nothing.
    """
    if not bool(torch.isfinite(scores).all()) or bool((scores.diff() < 0).any()):
        raise ValueError("calibration scores that are not finite and ascending")


def check_rates(false_reject_rate: float, assurance: float) -> None:
    """Refuse rates outside (0, 1).

    Raises:
        InvalidInputError: with the one that is wrong.
    """
    for name, value in (("false_reject_rate", false_reject_rate), ("assurance", assurance)):
        if not 0 < value < 1:
            raise InvalidInputError(f"got {name} {value!r}; needed a number in (0, 1)")
