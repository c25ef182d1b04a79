"""What negatives are: images off the data whose energy is to rise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ebm_guard.training.context import Context, TrainingBatch


class Negatives(ABC):
    """A source of negatives.

    Attributes:
        name: the registered name.
    """

    name: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the synthetic outlier kinds among them."""
        return ()

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Prepare on a first batch, once, before the first update."""
        del context, batch

    @abstractmethod
    def draw(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Return negatives (M, C, H, W) in [0, 1] for this update, detached."""

    def observe(self, energy_data: Tensor, energy_negatives: Tensor) -> None:
        """Look at the energies (B,) and (M,) of an update, detached: a curriculum learns here."""
        del energy_data, energy_negatives

    def saturation(self) -> float | None:
        """Return how many values of the last draw a sampler or a walk left on the edge of [0, 1].

        A share of all values. None for negatives that nothing has moved: black and white images
        lie on the edge as they are, and that says nothing about the net.
        """
        return None

    def rolled_back(self, context: Context) -> None:
        """Start afresh after a rollback."""
        del context

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given, as JSON types: nothing measured or made since.

        See :meth:`ebm_guard.training.objectives.base.Objective.identity`.
        """
        return self.settings()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered: tensors, numbers, text, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        del state


def on_edge(pixels: Tensor, start: Tensor | None = None) -> float:
    """Return the share of values that lie on the edge of [0, 1] and did not start there.

    Args:
        pixels: (B, C, H, W).
        start: (B, C, H, W) where they started; default: nowhere on the edge.

    Example:
        >>> import torch
        >>> on_edge(torch.tensor([[0.0, 0.5, 1.0, 1.0]]), torch.tensor([[0.0, 0.5, 0.5, 0.5]]))
        0.5
    """
    edge = (pixels <= 0) | (pixels >= 1)
    if start is not None:
        edge &= (start > 0) & (start < 1)
    return float(edge.float().mean())
