"""A second rule of the gate: how many of the accepted predictions may be wrong.

The threshold on the score promises how many ID inputs are *accepted*; it says nothing about how
many of those are right. This rule answers only where the confidence is high (and the score lower
still) enough that the share of wrong answers among the accepted is certified.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.calibration.certificates import Order, certify
from ebm_guard.errors import InvalidInputError, TooFewRowsError
from ebm_guard.intervals import proportion
from ebm_guard.precision import KeepDouble


class RiskRule(KeepDouble):
    """Answer iff confidence > its cut and score < its cut, both certified together.

    With fresh labelled rows, of which the score's threshold accepts m: given that threshold, these
    m are independent draws from the accepted inputs. Each of 100 declared pairs of ranks (20 of
    the confidence, 5 of the score) is tested by p = P(Binomial(answered, risk) <= errors) at
    (1 - assurance) / 100, and the pair that answers most is taken. Supposes nothing but
    independent rows that neither the calibrator, nor the detector, nor the threshold has seen.

    Attributes:
        cuts: (2,) float64: of the confidence (-inf: none), of the score (inf: none).

    References:
        Angelopoulos et al., Learn then Test, 2021, section 2 (Bonferroni over a declared grid);
        why ranks of the same rows may be declared: see
        :mod:`ebm_guard.calibration.certified_cuts`.

    Example:
        >>> confidence, score = np.linspace(0.5, 1, 2000), np.zeros(2000)
        >>> wrong = np.arange(2000) < 300
        >>> rule = RiskRule.fit(confidence, score, wrong, np.ones(2000, bool), risk=0.05)
        >>> rule.words
        'confidence > 0.574787'
    """

    cuts: Tensor

    def __init__(self, cuts: Tensor, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.register_buffer("cuts", cuts.double())
        self._facts = dict(facts)

    @classmethod
    def fit(
        cls,
        confidence: NDArray[Any],
        score: NDArray[Any],
        wrong: NDArray[np.bool_],
        accepted: NDArray[np.bool_],
        *,
        risk: float,
        assurance: float = 0.95,
        score_name: str = "score",
    ) -> RiskRule:
        """Certify the rule that answers most.

        Args:
            confidence: (n,) of fresh ID rows.
            score: (n,) of the same rows.
            wrong: (n,) whether the predicted label is wrong.
            accepted: (n,) whether the threshold on the score accepts the row.
            risk: largest share of wrong rows among the answered, in (0, 1).
            assurance: probability of that, over the draw of the rows.
            score_name: what the score is called.

        Raises:
            TooFewRowsError: even without an error these rows could certify nothing.
            InvalidInputError: nothing can be certified at this risk.
        """
        if not accepted.any():
            raise InvalidInputError(
                f"got {len(accepted)} rows for the certificate, and the threshold on {score_name} "
                "accepts none of them; give rows drawn like those the guard was fitted on"
            )
        orders = [
            Order("confidence", confidence[accepted], trusted="high"),
            Order(score_name, score[accepted]),
        ]
        found = certify(orders, wrong[accepted], risk=risk, assurance=assurance)
        if not found.certified or found.coverage is None:
            kind = TooFewRowsError if found.n < found.needed else InvalidInputError
            raise kind(
                f"nothing is certified at a risk of {risk:g} among accepted predictions: "
                f"{found.why}. Give more labelled rows, or allow a higher risk"
            )
        ends = (-math.inf, math.inf)
        cuts = [
            end if cut.cut is None else cut.cut for cut, end in zip(found.rule, ends, strict=True)
        ]
        facts = {
            "risk": risk,
            "assurance": assurance,
            "n": len(accepted),
            "passed": found.n,
            "answered": found.accepted,
            "errors": found.errors,
            "tests": found.tests,
            "coverage": proportion(found.accepted, len(accepted)).to_dict(),
            "score": score_name,
        }
        return cls(torch.tensor(cuts, dtype=torch.float64), facts)

    @property
    def risk(self) -> float:
        """Largest share of wrong predictions among the accepted."""
        return float(self._facts["risk"])

    @property
    def assurance(self) -> float:
        """Probability of that, over the draw of the rows."""
        return float(self._facts["assurance"])

    @property
    def n(self) -> int:
        """Rows that the certificate used."""
        return int(self._facts["n"])

    @property
    def words(self) -> str:
        """The rule in words."""
        confidence, score = self.cuts.tolist()
        sides = []
        if confidence > -math.inf:
            sides.append(f"confidence > {confidence:.6g}")
        if score < math.inf:
            sides.append(f"{self._facts['score']} < {score:.6g}")
        return " and ".join(sides) or "answer all that the threshold accepts"

    @property
    def guarantee(self) -> str:
        """The promise, in words, and what becomes of the threshold's."""
        facts = self._facts
        coverage = facts["coverage"]
        return (
            f"With probability {self.assurance:g} over the draw of {self.n:,} further rows, at "
            f"most {self.risk:.4g} of the accepted predictions are wrong, for inputs exchangeable "
            f"with those rows; the rule: {self.words}. It refuses more than the threshold alone: "
            f"{coverage['value']:.1%} of those rows are accepted ({coverage['low']:.1%} to "
            f"{coverage['high']:.1%}, an estimate and no promise), so the promise about the share "
            "of accepted inputs holds for the threshold on the score alone."
        )

    def accept(self, confidence: Tensor, score: Tensor) -> Tensor:
        """Apply the rule to rows (B,); NaN is never answered."""
        low, high = self.cuts.to(score.device).unbind()
        answered: Tensor = (confidence.double() > low) & (score.double() < high)
        return answered

    def settings(self) -> dict[str, Any]:
        """Return the facts of the certificate."""
        return dict(self._facts)

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> RiskRule:
        """Rebuild a certified rule.

        Raises:
            ValueError: cuts of another shape, or not a number.
        """
        cuts = tensors["cuts"]
        if cuts.shape != (2,) or bool(torch.isnan(cuts).any()):
            raise ValueError(f"cuts of shape {tuple(cuts.shape)}")
        rule = cls(cuts, settings)
        if not (0 < rule.risk < 1 and 0 < rule.assurance < 1 and rule.guarantee):
            raise ValueError("a risk or an assurance outside (0, 1)")
        return rule
