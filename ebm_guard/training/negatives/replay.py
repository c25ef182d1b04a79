"""Negatives from persistent chains, kept in a replay buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebm_guard.errors import NotFittedError
from ebm_guard.sampling import ReplayBuffer, Sampler
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives.chains import (
    ChainNegatives,
    Drawn,
    check_start_name,
    fitted_start,
    seed_of,
    spread_labels,
)


class Replay(ChainNegatives):
    """Go on with chains where earlier updates left them; a share of them starts anew.

    The buffer is made on the first batch, on the CPU; each process has one of its own. After a
    rollback all chains start anew.

    Args:
        sampler: see :class:`~ebm_guard.training.negatives.chains.ChainNegatives`.
        conditional: follow E(x, y) of a chain's class; the buffer then keeps the classes apart.
        start: of a new chain: ``gaussian`` (class Gaussians of the first batch) or ``uniform``.
        capacity: chains in the buffer; default: 10,000, or what 256 MiB hold.
        reinit_prob: probability that a chain starts anew.
        dtype: of the buffer, ``uint8`` or ``float16``.

    Raises:
        InvalidInputError: settings out of range.

    References:
        Tieleman, Training Restricted Boltzmann Machines using Approximations to the Likelihood
        Gradient, ICML 2008 (persistent chains); Du and Mordatch, NeurIPS 2019, section 3.2 (the
        buffer); Yang and Ji, JEM++, ICCV 2021 (class-Gaussian starts).

    Example:
        >>> Replay(capacity=100).settings()["reinit_prob"]
        0.05
    """

    name = "replay"

    def __init__(
        self,
        sampler: Sampler | None = None,
        conditional: bool = False,
        start: str = "gaussian",
        capacity: int | None = None,
        reinit_prob: float = 0.05,
        dtype: str = "uint8",
    ) -> None:
        super().__init__(sampler, conditional)
        # Settings are refused now, not when the run has begun.
        ReplayBuffer((1, 1, 1), capacity=capacity, reinit_prob=reinit_prob, dtype=dtype)
        self._kind = check_start_name(start)
        self._capacity, self._reinit_prob, self._dtype = capacity, float(reinit_prob), dtype
        self.buffer: ReplayBuffer | None = None
        self._slots = torch.empty(0, dtype=torch.int64)

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Make the buffer, and fit where new chains start."""
        start = fitted_start(self._kind, context, batch)
        self.buffer = ReplayBuffer(
            start.shape,
            capacity=self._capacity,
            num_classes=context.num_classes if self.conditional else None,
            dtype=self._dtype,
            start=start,
            reinit_prob=self._reinit_prob,
            seed=seed_of(context, f"buffer, conditional {self.conditional}"),
            rank=context.rank,
        )

    def _start(self, context: Context, batch: TrainingBatch) -> Drawn:
        if self.buffer is None:
            raise NotFittedError(
                "these chains have no buffer yet; call begin(context, batch) first"
            )
        labels = spread_labels(context, len(batch)) if self.conditional else None
        drawn = self.buffer.draw(len(batch), labels)
        self._slots = drawn.slots
        return Drawn(drawn.points, labels)

    def _stopped(self, points: Tensor) -> None:
        if self.buffer is not None:
            self.buffer.store(self._slots, points)

    def rolled_back(self, context: Context) -> None:
        """Let all chains start anew."""
        if self.buffer is not None:
            self.buffer.reseed(context.attempt)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            **super().settings(),
            "start": self._kind,
            "capacity": self._capacity if self.buffer is None else self.buffer.capacity,
            "reinit_prob": self._reinit_prob,
            "dtype": self._dtype,
        }

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given: a capacity only where it was."""
        return {**self.settings(), "capacity": self._capacity}

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer with its start."""
        return {} if self.buffer is None else {"buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the buffer."""
        self.buffer = ReplayBuffer.from_state(state["buffer"]) if state else None
