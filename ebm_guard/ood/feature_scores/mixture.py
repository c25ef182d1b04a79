"""The energy of a Gaussian mixture with one component for each class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ebm_guard.errors import DataError, InvalidInputError, suggest
from ebm_guard.ood.feature_scores.base import FeatureScore, Rows, unit
from ebm_guard.ood.feature_scores.moments import Moments
from ebm_guard.ood.feature_scores.shrinkage import (
    RIDGE,
    oas_rho,
    ridged,
    shrunk,
    squared_length,
    whitening,
)
from ebm_guard.predictions import Predictions

COVARIANCES = ("diagonal", "tied")
# The variance of a class counts as if this many rows of the pooled variance were among its own.
_POOLED_ROWS = 10.0


@dataclass
class ClassVariances:
    """Counts, means and squared deviations of each class, (K,), (K, D), (K, D), float64.

    Example:
        >>> found = ClassVariances.empty(2, 1)
        >>> found.add(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1]))
        >>> found.squares.flatten().tolist()
        [2.0, 0.0]
    """

    counts: Tensor
    means: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, classes: int, width: int) -> ClassVariances:
        """Return the statistics of no rows."""
        nothing = torch.zeros(classes, width, dtype=torch.float64)
        return cls(nothing[:, 0].clone(), nothing.clone(), nothing.clone())

    def add(self, values: Tensor, classes: Tensor) -> None:
        """Add rows (B, D) of classes (B,)."""
        values = values.double()
        part = ClassVariances.empty(*self.means.shape)
        part.counts.index_add_(0, classes, values.new_ones(len(values)))
        part.means.index_add_(0, classes, values)
        part.means /= part.counts.clamp_min(1)[:, None]
        part.squares.index_add_(0, classes, (values - part.means[classes]).square())
        self.join(part)

    def join(self, other: ClassVariances) -> None:
        """Add other rows by the pairwise update (Chan, Golub and LeVeque 1979)."""
        total = (self.counts + other.counts).clamp_min(1)[:, None]
        gap = other.means - self.means
        share = other.counts[:, None] / total
        self.squares = self.squares + other.squares + gap.square() * self.counts[:, None] * share
        self.means = self.means + gap * share
        self.counts = self.counts + other.counts


class GMMEnergy(FeatureScore):
    """Score by the energy of a Gaussian mixture: minus its log-density.

    s(x) = -log sum_c pi_c N(h; m_c, S_c), one component for each class (the label, or the
    predicted class where there are no labels), pi_c its share of the rows, m_c its mean. Unlike a
    Mahalanobis distance it sums over the classes and weighs them, and it is a density of h.
    There is no EM: the classes say which row belongs to which component.

    Args:
        covariance: ``diagonal``: S_c holds the variances of the class, as if 10 rows of the pooled
            variances were among its own; ``tied``: all S_c are
            S = 1/N sum_i (h_i - m_{y_i})(h_i - m_{y_i})', shrunk by the OAS estimator (which needs
            no second pass). The tied one orders rows almost as ``mahalanobis`` does.
        normalize: scale features to length 1 first. The density is then one of points in space
            that happen to lie on the sphere: an order of rows, and no density on the sphere.

    References:
        The generative classifier of Lee et al., NeurIPS 2018 (tied covariance); Chen
        et al., Shrinkage Algorithms for MMSE Covariance Estimation, 2010 (OAS).

    Example:
        >>> import numpy as np
        >>> labels = np.arange(400) % 2
        >>> features = np.random.default_rng(0).normal(size=(400, 3)) + 9 * labels[:, None]
        >>> rows = Predictions(features[:, :2], features=features, labels=labels)
        >>> score = GMMEnergy(normalize=False).fit(rows)
        >>> mean, between = score.score(torch.zeros(2, 2), torch.tensor([[9.0] * 3, [4.5] * 3]))
        >>> truth = 1.5 * math.log(2 * math.pi) + math.log(2)
        >>> abs(float(mean) - truth) < 0.3, bool(between > 20)
        (True, True)
    """

    name = "gmm_energy"
    from_probabilities = True
    min_per_class = 10
    tensors = ("origin", "whiten", "pull", "lengths", "log_weights")
    origin: Tensor
    whiten: Tensor
    pull: Tensor
    lengths: Tensor
    log_weights: Tensor

    def __init__(self, covariance: str = "diagonal", normalize: bool = True) -> None:
        if covariance not in COVARIANCES:
            raise InvalidInputError(
                f"got covariance {covariance!r}; needed {' or '.join(COVARIANCES)}"
                f"{suggest(covariance, COVARIANCES)}"
            )
        super().__init__()
        self.covariance, self.normalize = covariance, normalize

    def options(self) -> dict[str, Any]:
        """Return the kind of covariance, and whether lengths are set to 1."""
        return {"covariance": self.covariance, "normalize": self.normalize}

    def _reset(self) -> None:
        super()._reset()
        self._moments: Moments | ClassVariances | None = None
        self._shrinkage: dict[str, Any] = {}

    def _require(self) -> Moments | ClassVariances:
        if self._moments is None:
            kind = Moments if self.covariance == "tied" else ClassVariances
            self._moments = kind.empty(self._num_classes, self._width)
        return self._moments

    def _add(self, rows: Rows) -> None:
        self._require().add(self._points(rows.features), rows.classes)

    def _join(self, other: Self) -> None:
        self._require().join(other._require())  # type: ignore[arg-type]

    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        moments = self._require()
        seen, n = moments.counts > 0, moments.counts.sum()
        origin = moments.counts @ moments.means / n
        centres = moments.means[seen] - origin
        if isinstance(moments, Moments):
            whiten = self._tied(moments)
            pull = whiten @ (centres @ whiten).T
            volume = whiten.diagonal().abs().log().sum()
        else:
            whiten = self._precisions(moments)[seen].T.contiguous()
            pull = whiten * centres.T
            volume = whiten.log().sum(dim=0) / 2
        shares = (moments.counts[seen] / n).log()
        return {
            "origin": origin,
            "whiten": whiten,
            "pull": pull,
            "lengths": (pull * centres.T).sum(dim=0),
            "log_weights": shares + volume - self._width / 2 * math.log(2 * math.pi),
        }

    def _found(self) -> dict[str, Any]:
        return {"shrinkage": self._shrinkage}

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        centred = self._points(features) - self.origin
        # (z - c)' S^-1 (z - c) = z' S^-1 z - 2 z' S^-1 c + c' S^-1 c.
        apart = torch.addmm(self.lengths, centred, self.pull, alpha=-2.0)
        if self.covariance == "tied":
            own = squared_length(centred, self.whiten)[:, None]
        else:
            own = centred.square() @ self.whiten
        return -torch.logsumexp(self.log_weights - (apart + own).clamp_min(0) / 2, dim=1)

    def _points(self, features: Tensor) -> Tensor:
        features = features.double()
        return unit(features) if self.normalize else features

    def _tied(self, moments: Moments) -> Tensor:
        """Return the whitening (D, D) of the shared covariance."""
        covariance = moments.scatter / moments.n
        self._refuse_flat(float(covariance.trace()))
        rho = oas_rho(covariance, moments.n)
        self._shrinkage = {"name": "oas", "rho": rho}
        # A direction without any variance must not make every new row infinitely unlikely.
        return whitening(ridged(shrunk(covariance, rho), RIDGE))

    def _precisions(self, moments: ClassVariances) -> Tensor:
        """Return 1 / variance of each class and feature, (K, D)."""
        pooled = moments.squares.sum(dim=0) / moments.counts.sum()
        self._refuse_flat(float(pooled.sum()))
        pooled = pooled + RIDGE * pooled.mean()
        self._shrinkage = {"name": "pooled", "rows": _POOLED_ROWS}
        total = moments.squares + _POOLED_ROWS * pooled
        return (moments.counts + _POOLED_ROWS)[:, None] / total

    def _refuse_flat(self, trace: float) -> None:
        if not trace > 0:
            raise DataError(
                f"{self.name} cannot be fitted: the features of each class are all equal, so there "
                "is no covariance"
            )
