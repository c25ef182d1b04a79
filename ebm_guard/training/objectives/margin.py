"""Hinge margins on energies: the default objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling.checks import check_number
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives import Negatives, make_negatives
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.terms import item, warmed_up


class Margin(Objective):
    """Keep data below one energy and negatives above another.

    L = L_class + w (mean relu(E(x+) - m_in)^2 + mean relu(m_out - E(x-))^2) / (m_out - m_in)^2,
    with L_class the class loss (cross-entropy by default) on the augmented images, x+ the batch as
    it is, x- negatives.
    Both hinges are 0 once the margins hold, so the loss is bounded below and nothing runs away.

    An energy means nothing by itself: a constant on all logits shifts it. So the margins start
    from the given net's own figures, m_in = E0 + inside s and m_out = E0 + outside s, with E0 and
    s the mean and standard deviation of its energies on training images; and the hinges are
    measured in units of the gap between the margins, so that one weight fits every net.

    Args:
        weight: w >= 0.
        inside: m_in in units of s from E0.
        outside: m_out in units of s from E0; above ``inside``.
        m_in: the margin of the data as an energy, instead of ``inside``.
        m_out: the margin of the negatives as an energy, instead of ``outside``.
        negatives: a source of negatives, or its registered name.
        warm_up: share of the run over which the weight rises from 0.

    Raises:
        InvalidInputError: settings out of range, or ``m_in`` not below ``m_out``.

    References:
        Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020, eq. 8 and 9; LeCun et
        al., A Tutorial on Energy-Based Learning, 2006, section 2.2 (square-square loss). Differs:
        margins are measured, where the paper copies -23 (or -27) and -5 to every net; the weight
        is scale-free; batch-norm statistics stay fixed, where the released code mixes data and
        outliers in them.

    Example:
        >>> Margin(weight=0.25).negative_kinds
        ('patch_shuffle', 'blend', 'smooth_noise')
    """

    name = "margin"

    def __init__(
        self,
        weight: float = 0.5,
        inside: float = 0.0,
        outside: float = 2.0,
        m_in: float | None = None,
        m_out: float | None = None,
        negatives: str | Negatives = "synthetic",
        warm_up: float = 0.1,
    ) -> None:
        self.weight = check_number("weight", weight)
        self.warm_up = check_number("warm_up", warm_up, high=1.0)
        self.inside = check_number("inside", inside, low=-math.inf)
        self.outside = check_number("outside", outside, low=-math.inf)
        if m_in is None and m_out is None and not self.inside < self.outside:
            raise InvalidInputError(
                f"got inside={inside} and outside={outside}; data belong below the negatives: "
                "inside must be less than outside"
            )
        self._given = self.m_in, self.m_out = _energy("m_in", m_in), _energy("m_out", m_out)
        self.negatives = make_negatives(negatives)

    @property
    def negative_kinds(self) -> tuple[str, ...]:
        """Names of the synthetic kinds among the negatives."""
        return self.negatives.kinds

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Set the margins from the measured energies."""
        self._set_margins(context)
        self.negatives.begin(context, batch)

    def _set_margins(self, context: Context) -> tuple[float, float]:
        start, unit = context.measured.mean, context.measured.std
        m_in = start + self.inside * unit if self._given[0] is None else self._given[0]
        m_out = start + self.outside * unit if self._given[1] is None else self._given[1]
        if not m_in < m_out:
            raise InvalidInputError(
                f"got m_in {m_in:.4g} and m_out {m_out:.4g}; m_in must lie below m_out. The data "
                f"of this net have energies {start:.4g} +- {unit:.3g}"
            )
        self.m_in, self.m_out = float(m_in), float(m_out)
        return self.m_in, self.m_out

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute the class loss and both hinges from one forward pass."""
        negatives = self.negatives.draw(context, batch)
        logits = context.together(augmented=batch.augmented, data=batch.pixels, negatives=negatives)
        data, off = (formulas.energy(logits[name]) for name in ("data", "negatives"))
        if self.m_in is None or self.m_out is None:
            m_in, m_out = self._set_margins(context)
        else:
            m_in, m_out = self.m_in, self.m_out
        weight = self.weight * warmed_up(context, self.warm_up) / (m_out - m_in) ** 2
        terms = {
            "class": context.class_loss(logits["augmented"], batch.labels),
            "data": weight * hinge(data - m_in),
            "negatives": weight * hinge(m_out - off),
        }
        energies = data.detach(), off.detach()
        self.negatives.observe(*energies)
        return LossTerms(
            terms["class"] + terms["data"] + terms["negatives"],
            {name: item(term) for name, term in terms.items()},
            *energies,
            saturation=self.negatives.saturation(),
        )

    def rolled_back(self, context: Context) -> None:
        """Let the negatives start afresh; the margins stay."""
        self.negatives.rolled_back(context)

    def settings(self) -> dict[str, Any]:
        """Return the settings, margins included, as JSON types."""
        return {
            "objective": self.name,
            "weight": self.weight,
            "inside": self.inside,
            "outside": self.outside,
            "m_in": self.m_in,
            "m_out": self.m_out,
            "warm_up": self.warm_up,
            "negatives": self.negatives.settings(),
        }

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given: margins only where they were."""
        m_in, m_out = self._given
        given = {"m_in": m_in, "m_out": m_out, "negatives": self.negatives.identity()}
        return {**self.settings(), **given}

    def state_dict(self) -> dict[str, Any]:
        """Return the margins and what the negatives remember."""
        return {"m_in": self.m_in, "m_out": self.m_out, "negatives": self.negatives.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back margins and negatives."""
        self.m_in, self.m_out = state["m_in"], state["m_out"]
        self.negatives.load_state_dict(state["negatives"])


def _energy(name: str, value: float | None) -> float | None:
    return None if value is None else check_number(name, value, low=-math.inf)


def hinge(excess: Tensor) -> Tensor:
    """Compute mean relu(e)^2.

    Example:
        >>> import torch
        >>> hinge(torch.tensor([-1.0, 2.0]))
        tensor(2.)
    """
    return excess.clamp(min=0).square().mean()
