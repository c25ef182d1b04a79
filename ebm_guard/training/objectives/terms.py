"""Terms that several objectives are sums of."""

from __future__ import annotations

from torch import Tensor

from ebm_guard.training.class_losses import UNLABELLED
from ebm_guard.training.context import Context


def warmed_up(context: Context, share: float) -> float:
    """Return the factor of an energy term: from 0 to 1 over the first ``share`` of the run.

    The first update counts already: its factor is 1 / (share * updates), never 0.
    """
    return min(1.0, (context.update + 1) / max(1.0, share * context.updates))


def item(value: Tensor) -> float:
    """Return a scalar as a number, without its graph."""
    return float(value.detach())


__all__ = ["UNLABELLED", "item", "warmed_up"]
