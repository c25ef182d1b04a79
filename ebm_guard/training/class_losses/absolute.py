"""Losses that pin energies to fixed values: square-square, square-exponential and Bromley's pair.

Cross-entropy is blind to a number added to all logits of a row; these are not. They hold the
correct energy at or below a centre and a wrong one above it, which makes E(x, y) itself mean
something. Start from a net whose energies lie around the centre, or set it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_guard.sampling.checks import check_choice, check_number, check_positive
from ebm_guard.training.class_losses.base import PairLoss

# How a signed energy becomes a non-negative one.
FORMS = ("relu", "softplus")


class AbsolutePairLoss(PairLoss):
    """A pair loss of energies above a centre.

    With e = E - c, the correct energy enters as [e_C]+ and the wrong one as e_I (``relu``), or
    both as softplus(e) (``softplus``).
    """

    def __init__(self, form: str, centre: float) -> None:
        self.form = check_choice("form", form, FORMS)
        self.centre = check_number("centre", centre, low=-math.inf)

    def pair(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from E_C and E_I, all (n,)."""
        own, offending = own - self.centre, offending - self.centre
        if self.form == "relu":
            return self.above(F.relu(own), offending)
        return self.above(_softplus(own), _softplus(offending))

    @abstractmethod
    def above(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from e_C >= 0 and e_I, all (n,)."""


class SquareSquare(AbsolutePairLoss):
    """Pull the correct energy to the centre and push the worst wrong one above m.

    L_i = ([e_C]+)^2 + (max(0, m - e_I))^2, e = E - c; or with softplus(e) for both energies.

    The equation is one of distances. The square of a joint energy, which may be negative, would
    pull the true logit back to zero, and max(0, m - [e_I]+) would not push a wrong energy below
    the centre at all: so the first is cut at zero and the second is not.

    Args:
        m: the margin > 0, in units of the logits.
        form: ``relu``; or ``softplus``, smooth, under which a wrong energy far below the centre
            has hardly any gradient left.
        centre: c: where energies are counted from.

    Raises:
        InvalidInputError: settings out of range.

    References:
        LeCun et al., 2006, section 2.2.3. Table 1 there and slides after it print a minus between
        the squares, which rewards low wrong energies; the sign is plus. The cut is that of LeCun
        and Canziani, NYU, week 11; Chopra, Hadsell and LeCun, CVPR 2005, train on distances.

    Example:
        >>> SquareSquare(m=1.0)(torch.tensor([[5.0, 0.5]]), torch.tensor([0]))
        tensor(2.2500)
    """

    name = "square_square"
    margin = "m"

    def __init__(self, m: float = 1.0, form: str = "relu", centre: float = 0.0) -> None:
        super().__init__(form, centre)
        self.m = check_positive("m", m)

    def above(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from e_C >= 0 and e_I, all (n,)."""
        return own.square() + F.relu(self.m - offending).square()

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "class_loss": self.name,
            "m": self.m,
            "form": self.form,
            "centre": self.centre,
        }


class SquareExponential(AbsolutePairLoss):
    """Pull the correct energy to the centre and push the worst wrong one up for ever.

    L_i = ([e_C]+)^2 + gamma exp(-e_I), e = E - c; or with softplus(e) for both energies. Below the
    centre the exponential goes on as its tangent, gamma (1 - e_I): it equals the equation on
    non-negative energies, and stays finite where exp would overflow.

    Args:
        gamma: weight > 0 of the push.
        form: ``relu``, or ``softplus``; see :class:`SquareSquare`.
        centre: c: where energies are counted from.

    Raises:
        InvalidInputError: settings out of range.

    References:
        LeCun et al., 2006, section 2.2.3; Osadchy, Miller and LeCun, NIPS 2004.

    Example:
        >>> SquareExponential()(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        tensor(1.)
    """

    name = "square_exponential"
    margin = "positive"

    def __init__(self, gamma: float = 1.0, form: str = "relu", centre: float = 0.0) -> None:
        super().__init__(form, centre)
        self.gamma = check_positive("gamma", gamma)

    def above(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from e_C >= 0 and e_I, all (n,)."""
        below = offending < 0
        # Filled before exp: what overflows there would turn the gradient into NaN.
        decay = torch.exp(-offending.masked_fill(below, 0.0))
        push = torch.where(below, 1.0 - offending, decay)
        return own.square() + self.gamma * push

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "class_loss": self.name,
            "gamma": self.gamma,
            "form": self.form,
            "centre": self.centre,
        }


class Bromley(PairLoss):
    """Pull the correct energy down to the centre and push the worst wrong one to m, linearly.

    L_i = [e_C]+ + [m - e_I]+, e = E - c. The two energies are pushed on their own, by equal
    forces, until each is where it should be.

    Args:
        m: the margin > 0, in units of the logits.
        centre: c: where energies are counted from.

    Raises:
        InvalidInputError: settings out of range.

    References:
        LeCun and Canziani, Deep Learning, NYU, week 11, who name it after Bromley et al.,
        Signature Verification using a Siamese Time Delay Neural Network, NIPS 1993; that paper
        drives the cosine of two outputs to a high and a low target.

    Example:
        >>> Bromley(m=1.0)(torch.tensor([[5.0, 0.5]]), torch.tensor([0]))
        tensor(1.5000)
    """

    name = "bromley"
    margin = "m"

    def __init__(self, m: float = 1.0, centre: float = 0.0) -> None:
        self.m = check_positive("m", m)
        self.centre = check_number("centre", centre, low=-math.inf)

    def pair(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from E_C and E_I, all (n,)."""
        return F.relu(own - self.centre) + F.relu(self.m - (offending - self.centre))

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"class_loss": self.name, "m": self.m, "centre": self.centre}


def _softplus(values: Tensor) -> Tensor:
    """Compute log(1 + e^v): F.softplus turns to v above a threshold, a step in its gradient."""
    return -F.logsigmoid(-values)
