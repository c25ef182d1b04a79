"""Losses of the difference between the correct energy and the wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_guard.sampling.checks import check_choice, check_positive
from ebm_guard.training.class_losses.base import ClassLoss, PairLoss, labelled


class Hinge(PairLoss):
    """Keep the most offending wrong energy at least m above the correct one.

    L_i = max(0, m + E_C - E_I) with E_C = E(x, y) and E_I = min over y' != y of E(x, y').

    Args:
        m: the margin > 0, in units of the logits: at a gap of m the odds of the label against the
            runner-up are e^m to 1.

    Raises:
        InvalidInputError: m is not positive.

    References:
        LeCun et al., 2006, section 2.2.3. The multi-class hinge of Crammer and Singer, JMLR 2001,
        with energies for scores.

    Example:
        >>> Hinge(m=1.0)(torch.tensor([[0.5, 0.0]]), torch.tensor([0]))
        tensor(0.5000)
    """

    name = "hinge"
    margin = "m"

    def __init__(self, m: float = 1.0) -> None:
        self.m = check_positive("m", m)

    def pair(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from E_C and E_I, all (n,)."""
        return F.relu(self.m + own - offending)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"class_loss": self.name, "m": self.m}


class Log(PairLoss):
    """Push the worst wrong energy above the correct one, ever less: a hinge without its corner.

    L_i = log(1 + exp(E_C - E_I)). It falls for ever as the gap grows: any margin. With two classes
    it is cross-entropy.

    References:
        LeCun et al., 2006, section 2.2.3.

    Example:
        >>> Log()(torch.zeros(1, 3), torch.tensor([0]))
        tensor(0.6931)
    """

    name = "log"
    margin = "positive"

    def pair(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from E_C and E_I, all (n,)."""
        return -F.logsigmoid(offending - own)


class Lvq2(PairLoss):
    """Cut the difference of the perceptron off at a cap.

    L_i = min(M, max(0, E_C - E_I)), in [0, M]. Rows that are wrong by more than M have no gradient
    and are given up as outliers: robust to wrong labels, not convex, margin 0.

    Args:
        cap: M > 0, in units of the logits.

    Raises:
        InvalidInputError: cap is not positive.

    References:
        LeCun et al., 2006, table 1. Versions that divide the difference by an energy cap the ratio
        of two positive distances; joint energies have either sign, where a ratio means nothing.

    Example:
        >>> Lvq2(cap=2.0)(torch.tensor([[0.0, 9.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        tensor(1.5000)
    """

    name = "lvq2"
    margin = "0"
    caution = (
        "the class loss lvq2 has margin 0: equal energies for all classes cost nothing, and rows "
        "that are wrong by more than its cap are not corrected"
    )

    def __init__(self, cap: float = 10.0) -> None:
        self.cap = check_positive("cap", cap)

    def pair(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from E_C and E_I, all (n,)."""
        # The minimum shares its gradient at a tie, so a net that starts with equal outputs moves.
        gap = own - torch.minimum(own, offending)
        return gap - F.relu(gap - self.cap)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"class_loss": self.name, "cap": self.cap}


class MinimumClassificationError(PairLoss):
    """Count errors smoothly: MCE.

    L_i = 1 / (1 + exp(-(E_C - E_I))), in [0, 1]: 0 for a row that is right by far, 1 for one that
    is wrong by far. Neither has a gradient left: it refines a net that is good already.

    References:
        LeCun et al., 2006, section 2.2.3; Juang, Hou and Lee, Minimum Classification Error Rate
        Methods for Speech Recognition, 1997.

    Example:
        >>> MinimumClassificationError()(torch.zeros(1, 3), torch.tensor([0]))
        tensor(0.5000)
    """

    name = "mce"
    margin = "positive"

    def pair(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from E_C and E_I, all (n,)."""
        return torch.sigmoid(own - offending)


def _hinge(gap: Tensor, m: float) -> Tensor:
    return F.relu(m - gap)


def _squared_hinge(gap: Tensor, m: float) -> Tensor:
    return F.relu(m - gap).square()


def _log(gap: Tensor, m: float) -> Tensor:
    return -F.logsigmoid(gap - m)


# H as a function of the gap E(x, y') - E(x, y), with the margin that each has.
FORMS: Mapping[str, tuple[Callable[[Tensor, float], Tensor], str]] = {
    "hinge": (_hinge, "m"),
    "squared_hinge": (_squared_hinge, "m"),
    "log": (_log, "positive"),
}


class AdditiveMargin(ClassLoss):
    """Keep every wrong energy, not the lowest alone, at least m above the correct one.

    L_i = sum over y' != y of H(E(x, y), E(x, y'), m), with H rising in the first and falling in
    the second energy::

        hinge            max(0, m + E(x, y) - E(x, y'))
        squared_hinge    max(0, m + E(x, y) - E(x, y'))^2
        log              log(1 + exp(m + E(x, y) - E(x, y')))

    It is a sum, so with C classes it may be C - 1 times as steep as the hinge of one pair.

    Args:
        m: the margin > 0, in units of the logits; one for all pairs of classes.
        form: H: ``hinge``, ``squared_hinge`` or ``log``, which has any margin.

    Raises:
        InvalidInputError: settings out of range.

    References:
        LeCun and Canziani, Deep Learning, NYU, 2020 and 2021, week 11 (general additive margin
        loss; the margin may there be another one for each pair of classes). With the hinge it is
        the multi-class support vector machine of Weston and Watkins, 1999.

    Example:
        >>> AdditiveMargin(m=1.0)(torch.zeros(1, 3), torch.tensor([0]))
        tensor(2.)
    """

    name = "additive_margin"

    def __init__(self, m: float = 1.0, form: str = "hinge") -> None:
        self.m = check_positive("m", m)
        self.form = check_choice("form", form, tuple(FORMS))
        self._of_gap, self.margin = FORMS[self.form]

    def rows(self, energies: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each labelled row, (n,)."""
        own, wrong = labelled(energies, labels)
        # The row's own place holds infinity: at an infinite gap each H is 0.
        return self._of_gap(wrong - own[:, None], self.m).sum(dim=1)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"class_loss": self.name, "m": self.m, "form": self.form}
