"""Entropy of the predicted classes: unlabelled images belong to one class, whichever it is."""

from __future__ import annotations

from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.training.class_losses import UNLABELLED
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.regularisers.base import Regulariser


class Entropy(Regulariser):
    """Make the net sure of images without a label: mean over them of H = -sum_y p(y|x) log p(y|x).

    Without unlabelled images in the batch, it is 0. It is a bet: where the net is wrong about an
    image, it grows surer of the wrong class, and calibration suffers for it.

    Args:
        weight: w >= 0.
        warm_up: share of the run over which the weight rises from 0.

    References:
        Grandvalet and Bengio, Semi-supervised Learning by Entropy Minimization, NIPS 2004.

    Example:
        >>> Entropy().settings()
        {'regulariser': 'entropy', 'weight': 0.1, 'warm_up': 0.1}
    """

    name = "entropy"
    needs_unlabelled = True

    def __init__(self, weight: float = 0.1, warm_up: float = 0.1) -> None:
        super().__init__(weight, warm_up)

    def penalty(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Compute the mean entropy, in nats, of the rows without a label."""
        rows = batch.labels == UNLABELLED
        # One row at least: every process needs a graph to the weights.
        pixels = batch.pixels[rows] if bool(rows.any()) else batch.pixels[:1]
        log_p = formulas.log_probabilities(context.logits(pixels))
        entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
        return entropy if bool(rows.any()) else 0 * entropy
