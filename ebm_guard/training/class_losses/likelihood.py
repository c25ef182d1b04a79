"""Losses of the whole distribution over classes: negative log-likelihood and expected error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_guard.sampling.checks import check_positive
from ebm_guard.training.class_losses.base import UNLABELLED, ClassLoss


class NegativeLogLikelihood(ClassLoss):
    """Raise the probability of the label: cross-entropy where beta = 1.

    L_i = E(x, y) + 1/beta log sum_k exp(-beta E(x, k)) = -1/beta log p_beta(y|x). Every wrong
    energy is pushed up, by its probability. Maximum mutual information (MMI) is the same loss.

    Args:
        beta: inverse temperature > 0 of p_beta(y|x) = softmax(beta f(x)); for other values than 1
            the temperature that calibrates the net moves with it.

    Raises:
        InvalidInputError: beta is not positive.

    References:
        LeCun et al., 2006, section 2.2.4.

    Example:
        >>> NegativeLogLikelihood()(torch.zeros(2, 2), torch.tensor([0, -1]))
        tensor(0.6931)
    """

    name = "nll"
    margin = "positive"

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = check_positive("beta", beta)

    def rows(self, energies: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each labelled row, (n,)."""
        known = labels != UNLABELLED
        values = -self.beta * energies[known]
        return F.cross_entropy(values, labels[known], reduction="none") / self.beta

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"class_loss": self.name, "beta": self.beta}


class MinimumEmpiricalError(ClassLoss):
    """Lower the expected error of a draw from p(y|x): MEE.

    L_i = 1 - p_beta(y|x) = 1 - exp(-beta E(x, y)) / sum_k exp(-beta E(x, k)), in [0, 1]: a wrong
    label costs 1 at most, so single wrong labels weigh little, and a row that is far on the wrong
    side has no gradient left to come back by.

    Args:
        beta: inverse temperature > 0.

    Raises:
        InvalidInputError: beta is not positive.

    References:
        LeCun et al., 2006, section 2.2.4 (minimum empirical error).

    Example:
        >>> MinimumEmpiricalError()(torch.zeros(1, 4), torch.tensor([0]))
        tensor(0.7500)
    """

    name = "mee"
    margin = "positive"

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = check_positive("beta", beta)

    def rows(self, energies: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each labelled row, (n,)."""
        known = labels != UNLABELLED
        values = -self.beta * energies[known]
        # From the logarithm: 1 - p keeps its digits where p is close to 1.
        return -torch.expm1(-F.cross_entropy(values, labels[known], reduction="none"))

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"class_loss": self.name, "beta": self.beta}
