"""Terms that several objectives are sums of."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ebm_guard.training.context import Context

# Label of an image whose class is not known.
UNLABELLED = -1


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean of -log p(y|x) over the labelled rows; 0 where no row is labelled.

    Args:
        logits: (B, C).
        labels: (B,) int64; -1 marks a row without label.

    Example:
        >>> import torch
        >>> class_loss(torch.zeros(2, 2), torch.tensor([0, -1]))
        tensor(0.6931)
    """
    labelled = int((labels != UNLABELLED).sum())
    summed = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
    return summed / max(1, labelled)


def warmed_up(context: Context, share: float) -> float:
    """Return the factor of an energy term: from 0 to 1 over the first ``share`` of the run.

    The first update counts already: its factor is 1 / (share * updates), never 0.
    """
    return min(1.0, (context.update + 1) / max(1.0, share * context.updates))


def item(value: Tensor) -> float:
    """Return a scalar as a number, without its graph."""
    return float(value.detach())
