"""Adversarial training: cross-entropy on images that an attack has moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_guard import energy as formulas
from ebm_guard.attacks.geometry import Ball, ball_of, per_image
from ebm_guard.sampling.checks import check_choice, check_number, check_whole
from ebm_guard.training.class_losses import ClassLoss
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.terms import UNLABELLED, item


class Attack:
    """PGD on the cross-entropy, for a share of the batch, whatever the class loss.

    Args:
        epsilon: radius of the ball, in [0, 1] pixels.
        num_steps: K >= 1; a step has length 2.5 epsilon / K.
        norm: ``linf`` or ``l2``.
        share: of the batch that is attacked, in (0, 1].

    Raises:
        InvalidInputError: settings out of range.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018,
        eq. 2.1. The last iterate is trained on, as there.

    Example:
        >>> Attack(epsilon=8 / 255).count(64)
        32
    """

    def __init__(
        self, epsilon: float = 4 / 255, num_steps: int = 3, norm: str = "linf", share: float = 0.5
    ) -> None:
        self.epsilon = check_number("epsilon", epsilon, open_low=True)
        self.share = check_number("share", share, high=1.0, open_low=True)
        self.num_steps = check_whole("num_steps", num_steps, 1)
        self.norm = check_choice("norm", norm, ("linf", "l2"))
        self._ball: Ball = ball_of(self.norm)

    def count(self, n: int) -> int:
        """Return how many of n rows are attacked: the first ones, at least one."""
        return max(1, round(self.share * n))

    def apply(self, context: Context, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return attacked images; rows without a label stay as they are.

        Args:
            context: gives the net, and random starts.
            pixels: (B, C, H, W) in [0, 1].
            labels: (B,).
        """
        rows = (labels != UNLABELLED).nonzero().flatten()
        if not len(rows):
            return pixels
        moved = pixels.clone()
        moved[rows] = self._climb(context, pixels[rows].detach(), labels[rows])
        return moved

    def _climb(self, context: Context, centre: Tensor, labels: Tensor) -> Tensor:
        generator = context.generator("attack")
        starts: list[np.random.Generator] = list(generator.spawn(len(centre)))
        points = self._ball.random(centre, self.epsilon, starts)
        length = per_image(2.5 * self.epsilon / self.num_steps, centre)
        for _ in range(self.num_steps):
            with torch.enable_grad():
                leaf = points.detach().clone().requires_grad_()
                logits = context.forward(leaf).logits.float()
                climbed = F.cross_entropy(logits, labels, reduction="sum")
                (gradient,) = torch.autograd.grad(climbed, leaf)
            points = points + length * self._ball.steepest(gradient)
            points = self._ball.project(points, centre, self.epsilon)
        return points.detach()

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "epsilon": self.epsilon,
            "num_steps": self.num_steps,
            "norm": self.norm,
            "share": self.share,
        }


class Adversarial(Objective):
    """Minimise -log p(y|x) with a share of the batch moved by PGD within a ball.

    It buys robust accuracy; no energy term does. The attack moves the augmented images.

    Args:
        epsilon: radius of the ball, in [0, 1] pixels; 4/255 by default.
        num_steps: steps of the attack.
        norm: ``linf`` or ``l2``.
        share: of the batch that is attacked; 1 is the paper's training.

    Raises:
        InvalidInputError: settings out of range.

    References:
        Madry et al., ICLR 2018, eq. 2.1; a share of clean images as in Goodfellow et al.,
        Explaining and Harnessing Adversarial Examples, ICLR 2015, section 6.

    Example:
        >>> Adversarial(share=1.0).settings()["num_steps"]
        3
    """

    name = "adversarial"

    def __init__(
        self, epsilon: float = 4 / 255, num_steps: int = 3, norm: str = "linf", share: float = 0.5
    ) -> None:
        self.attack = Attack(epsilon, num_steps, norm, share)

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute the mean over attacked and clean rows."""
        count = self.attack.count(len(batch))
        moved = self.attack.apply(context, batch.augmented[:count], batch.labels[:count])
        pixels = torch.cat([moved, batch.augmented[count:]])
        logits = context.logits(pixels)
        total = context.class_loss(logits, batch.labels)
        attacked = share_of_loss(context.class_loss, logits, batch.labels, count)
        parts = {"attacked": attacked, "clean": item(total) - attacked}
        return LossTerms(total, parts, energy_data=formulas.energy(logits.detach()))

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"objective": self.name, **self.attack.settings()}


@torch.no_grad()
def share_of_loss(loss: ClassLoss, logits: Tensor, labels: Tensor, count: int) -> float:
    """Return what the first ``count`` rows add to the mean class loss of all rows.

    A class loss that compares the rows of a batch with each other (``info_nce``) is taken over
    these rows alone.

    Example:
        >>> from ebm_guard.training.class_losses import make_class_loss
        >>> nll, labels = make_class_loss("nll"), torch.tensor([0, 1, 0, 1])
        >>> round(share_of_loss(nll, torch.zeros(4, 2), labels, 2), 4)
        0.3466
    """
    labelled = max(1, int((labels != UNLABELLED).sum()))
    known = max(0, int((labels[:count] != UNLABELLED).sum()))
    return item(loss(logits[:count], labels[:count])) * known / labelled
