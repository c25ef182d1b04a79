"""What a class loss is: logits and labels in, one number out; nothing is remembered."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError

# Label of an image whose class is not known.
UNLABELLED = -1

# What a margin may be; see ClassLoss.margin.
MARGINS = ("none", "0", "m", "positive")


class ClassLoss(ABC):
    """What fine-tuning minimises on labels: a function of the joint energies E(x, y) = -f(x)[y].

    L = 1/n sum over the n labelled rows of L_i; exactly 0, with a graph, where none is labelled.
    A class loss has no state and draws no random numbers.

    Attributes:
        name: the registered name.
        margin: by how much the correct energy E_C lies below the lowest wrong energy E_I where the
            loss is least: ``none`` (nothing is promised, not even E_C <= E_I), ``0``
            (E_C <= E_I: equal energies are enough), ``m`` (E_C + m <= E_I, m a setting), or
            ``positive`` (any: the loss falls for ever as the gap grows).
        caution: one sentence for the story of a run, or ''.

    References:
        LeCun, Chopra, Hadsell, Ranzato and Huang, A Tutorial on Energy-Based Learning, 2006,
        section 2.2 and table 1, where ``positive`` is written > 0.
    """

    name: str = ""
    margin: str = "none"
    caution: str = ""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean over the labelled rows.

        Args:
            logits: (B, C), any floating dtype; computed in float32 or better.
            labels: (B,) whole numbers 0 ... C - 1; -1 marks a row without label.

        Returns:
            Scalar, float32 or float64.

        Raises:
            InvalidInputError: wrong shapes, or labels out of range.
        """
        energies = formulas.joint_energy(logits)
        rows = self.rows(energies, checked_labels(labels, energies))
        return rows.sum() / max(1, len(rows))

    @abstractmethod
    def rows(self, energies: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each labelled row.

        Args:
            energies: joint energies (B, C).
            labels: (B,) int64, -1 where unlabelled.

        Returns:
            (n,), in the order of the labelled rows.
        """

    def settings(self) -> dict[str, Any]:
        """Return the name and the settings as JSON types."""
        return {"class_loss": self.name}

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint is bound to: the settings, since nothing is measured."""
        return self.settings()


class PairLoss(ClassLoss):
    """A class loss of two energies: the correct one and the most offending wrong one."""

    def rows(self, energies: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each labelled row, (n,)."""
        own, wrong = labelled(energies, labels)
        return self.pair(own, wrong.amin(dim=1))

    @abstractmethod
    def pair(self, own: Tensor, offending: Tensor) -> Tensor:
        """Compute the loss from E_C = E(x, y) and E_I = min over y' != y of E(x, y'), all (n,)."""


def labelled(energies: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split the energies of the labelled rows into the correct and the wrong ones.

    Returns:
        E(x, y), (n,); and (n, C) with infinity, which no gradient passes, in the place of E(x, y).

    Example:
        >>> own, wrong = labelled(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, -1]))
        >>> own, wrong
        (tensor([2.]), tensor([[1., inf]]))
    """
    known = labels != UNLABELLED
    energies, places = energies[known], labels[known][:, None]
    own = energies.gather(1, places).squeeze(1)
    return own, energies.scatter(1, places, math.inf)


def checked_labels(labels: Tensor, energies: Tensor) -> Tensor:
    """Return the labels as int64, or refuse what does not belong to these rows and classes.

    Raises:
        InvalidInputError: not whole numbers of shape (B,), below -1, or C and above.
    """
    count, classes = energies.shape
    whole = isinstance(labels, Tensor) and not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    )
    if not whole or labels.shape != (count,):
        came = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else labels
        raise InvalidInputError(
            f"got labels {came} for logits {(count, classes)}; needed whole numbers of shape "
            f"({count},)"
        )
    # First to int64: in uint8 neither -1 nor 1,000 classes can be compared with.
    labels = labels.long()
    if count and not bool(((labels >= UNLABELLED) & (labels < classes)).all()):
        raise InvalidInputError(
            f"got labels from {int(labels.min())} to {int(labels.max())} for {classes} classes; "
            f"needed 0 to {classes - 1}, or {UNLABELLED} for an image without label"
        )
    return labels
