"""Losses without a margin: the energy loss and the perceptron loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ebm_guard.training.class_losses.base import UNLABELLED, ClassLoss, labelled


class EnergyLoss(ClassLoss):
    """Pull down the correct energy and do nothing else.

    L_i = E(x, y). Nothing holds up the wrong energies and nothing ends the fall: with free logits
    the loss has no lower bound. It is here as the control that the table starts with.

    References:
        LeCun et al., 2006, section 2.2.1.

    Example:
        >>> EnergyLoss()(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
        tensor(-3.)
    """

    name = "energy"
    margin = "none"
    caution = (
        "the class loss energy has no margin and no lower bound: nothing keeps wrong classes apart "
        "from the right one"
    )

    def rows(self, energies: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each labelled row, (n,)."""
        return labelled(energies, labels)[0]


class Perceptron(ClassLoss):
    """Push until no wrong class has a lower energy than the label, and not further.

    L_i = E(x, y) - min_k E(x, k), k over all classes, >= 0. Equal energies cost nothing, so a net
    whose outputs are all the same is a solution (margin 0). At a tie the gradient of the minimum
    is shared among the tied classes, so a net that starts with equal outputs does move.

    References:
        LeCun et al., 2006, section 2.2.2.

    Example:
        >>> Perceptron()(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]))
        tensor(1.)
    """

    name = "perceptron"
    margin = "0"
    caution = (
        "the class loss perceptron has margin 0: equal energies for all classes cost nothing, so "
        "it stops pushing as soon as a row is right"
    )

    def rows(self, energies: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each labelled row, (n,)."""
        known = labels != UNLABELLED
        own, _ = labelled(energies, labels)
        return own - torch.amin(energies[known], dim=1)
