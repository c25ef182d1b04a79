"""A running mean of the weights, which is what is evaluated and returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ebm_guard.errors import InvalidInputError


class WeightAverage:
    """Average the trained weights over the updates, without the bias of a start at zero.

    s_t = d s_{t-1} + (1 - d) w_t with s_0 = 0, and the mean is s_t / (1 - d^t): after t updates the
    weights of update t - k count in proportion to d^k, and those before the first update not at
    all. With d = 0 it is the last weights.

    Args:
        net: whose parameters with ``requires_grad`` are averaged.
        decay: d in [0, 1).

    References:
        Polyak and Juditsky, SIAM J. Control and Optimization 1992; the correction is that of Kingma
        and Ba, Adam, ICLR 2015, section 3.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> average = WeightAverage(layer, 0.9)
        >>> average.update()
        >>> bool(torch.isclose(average.mean()["weight"], layer.weight).all())
        True
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InvalidInputError(f"got ema={decay}; needed a decay in [0, 1), 0 for no average")
        self.decay, self.updates = decay, 0
        self._trained = {name: part for name, part in net.named_parameters() if part.requires_grad}
        self._sums = {name: torch.zeros_like(part) for name, part in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        self.updates += 1
        for name, part in self._trained.items():
            self._sums[name].mul_(self.decay).add_(part.detach(), alpha=1 - self.decay)

    def mean(self) -> dict[str, Tensor]:
        """Return the mean by parameter name; the present weights before the first update."""
        if not self.updates:
            return {name: part.detach().clone() for name, part in self._trained.items()}
        share = 1 - self.decay**self.updates
        return {name: part / share for name, part in self._sums.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the mean into the net, and the present weights back afterwards."""
        present = {name: part.detach().clone() for name, part in self._trained.items()}
        self._write(self.mean())
        try:
            yield
        finally:
            self._write(present)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and their number, as copies."""
        sums = {name: part.clone() for name, part in self._sums.items()}
        return {"updates": self.updates, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.updates = int(state["updates"])
        for name, part in state["sums"].items():
            self._sums[name].copy_(part)

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, part in weights.items():
            self._trained[name].copy_(part)
