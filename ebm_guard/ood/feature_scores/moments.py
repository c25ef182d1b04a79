"""Means and scatter of rows in float64: exact to merge, and stable far from the origin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Counts and means of each class, and the pooled scatter around the class means.

    Two parts join by the pairwise update: with d_c the difference of the means of class c, the
    scatter gains sum_c n1_c n2_c / (n1_c + n2_c) d_c d_c'. Nothing is squared before it is
    centred, so a large common mean costs no digits.

    Args:
        counts: (K,) float64.
        means: (K, D) float64, zeros for classes without rows.
        scatter: (D, D) float64, sum over rows of (x - mean_y)(x - mean_y)'.

    References:
        Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances, 1979.

    Example:
        >>> moments = Moments.empty(1, 2)
        >>> moments.add(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))
        >>> moments.scatter.diagonal()
        tensor([2., 0.], dtype=torch.float64)
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, classes: int, width: int) -> Moments:
        """Return the moments of no rows."""
        return cls(
            torch.zeros(classes, dtype=torch.float64),
            torch.zeros(classes, width, dtype=torch.float64),
            torch.zeros(width, width, dtype=torch.float64),
        )

    @property
    def n(self) -> float:
        """Number of rows."""
        return float(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        """Mean of all rows (D,)."""
        return self.counts @ self.means / self.counts.sum()

    def add(self, values: Tensor, classes: Tensor) -> None:
        """Add rows (B, D) of classes (B,)."""
        values = values.double()
        part = Moments.empty(len(self.counts), values.shape[1])
        part.counts.index_add_(0, classes, torch.ones(len(values), dtype=torch.float64))
        part.means.index_add_(0, classes, values)
        part.means /= part.counts.clamp_min(1)[:, None]
        centred = values - part.means[classes]
        part.scatter = centred.T @ centred
        self.join(part)

    def join(self, other: Moments) -> None:
        """Add the moments of other rows."""
        total = self.counts + other.counts
        both = (self.counts > 0) & (other.counts > 0)
        gap = other.means[both] - self.means[both]
        weight = self.counts[both] * other.counts[both] / total[both]
        self.scatter = self.scatter + other.scatter + gap.T @ (gap * weight[:, None])
        share = (other.counts / total.clamp_min(1))[:, None]
        self.means = self.means + (other.means - self.means) * share
        self.counts = total

    def total_scatter(self, origin: Tensor | None = None) -> Tensor:
        """Return the scatter of all rows about their mean, or about another point, (D, D)."""
        point = self.mean if origin is None else origin
        gap = (self.means - point)[self.counts > 0]
        return self.scatter + gap.T @ (gap * self.counts[self.counts > 0, None])
