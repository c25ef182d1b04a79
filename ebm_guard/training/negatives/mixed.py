"""Negatives of several sources in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling.checks import check_number
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives.base import Negatives


class Mixed(Negatives):
    """Fill the negatives from several sources, each with its share.

    Every source draws for the whole batch, and the rows that are not wanted are dropped. Which
    rows of a source stay is the same for every update; sources draw in random order themselves.

    Args:
        parts: (negatives, share), shares > 0; they are divided by their sum.

    Raises:
        InvalidInputError: no part, or a share that is not positive.

    Example:
        >>> from ebm_guard.training.negatives import Outliers, Synthetic
        >>> Mixed([(Outliers(torch.rand(8, 1, 4, 4)), 1), (Synthetic(), 1)]).shares
        (0.5, 0.5)
    """

    name = "mixed"

    def __init__(self, parts: Sequence[tuple[Negatives, float]]) -> None:
        pairs = tuple(parts) if isinstance(parts, Iterable) else ()
        if not pairs or not all(map(_is_pair, pairs)):
            raise InvalidInputError(
                f"got parts {parts!r}; needed (negatives, share) pairs with shares > 0"
            )
        shares = [check_number("share", share, open_low=True) for _, share in pairs]
        self.parts = tuple(part for part, _ in pairs)
        self.shares = tuple(share / sum(shares) for share in shares)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the synthetic kinds of all parts."""
        return tuple(dict.fromkeys(kind for part in self.parts for kind in part.kinds))

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Prepare all parts."""
        for part in self.parts:
            part.begin(context, batch)

    def draw(self, context: Context, batch: TrainingBatch) -> Tensor:
        """Draw from every part; as many rows altogether as the largest part gives."""
        drawn = [part.draw(context, batch) for part in self.parts]
        wanted = max(map(len, drawn))
        ends = np.rint(np.cumsum(self.shares) * wanted).astype(int)
        counts = np.diff(ends, prepend=0)
        rows = [
            pixels[torch.arange(int(count), device=pixels.device) % len(pixels)]
            for pixels, count in zip(drawn, counts, strict=True)
        ]
        return torch.cat(rows)

    def observe(self, energy_data: Tensor, energy_negatives: Tensor) -> None:
        """Show every part the energies of its own rows."""
        ends = np.rint(np.cumsum(self.shares) * len(energy_negatives)).astype(int).tolist()
        for part, first, last in zip(self.parts, [0, *ends[:-1]], ends, strict=True):
            if last > first:
                part.observe(energy_data, energy_negatives[first:last])

    def saturation(self) -> float | None:
        """Return the largest share among the parts that were moved."""
        found = [part.saturation() for part in self.parts]
        return max((share for share in found if share is not None), default=None)

    def rolled_back(self, context: Context) -> None:
        """Let all parts start afresh."""
        for part in self.parts:
            part.rolled_back(context)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        parts = [
            {"share": share, **part.settings()}
            for part, share in zip(self.parts, self.shares, strict=True)
        ]
        return {"negatives": self.name, "parts": parts}

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given."""
        parts = [
            {"share": share, **part.identity()}
            for part, share in zip(self.parts, self.shares, strict=True)
        ]
        return {"negatives": self.name, "parts": parts}

    def state_dict(self) -> dict[str, Any]:
        """Return what the parts remember."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what the parts remember."""
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)


def _is_pair(part: Any) -> bool:
    return isinstance(part, Sequence) and len(part) == 2 and isinstance(part[0], Negatives)
