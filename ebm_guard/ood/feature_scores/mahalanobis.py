"""Mahalanobis distance to the nearest class mean, plain and relative."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from ebm_guard.errors import DataError, InvalidInputError, suggest
from ebm_guard.ood.feature_scores.base import FeatureScore, Rows, each_block, unit
from ebm_guard.ood.feature_scores.moments import Moments
from ebm_guard.ood.feature_scores.shrinkage import (
    ESTIMATORS,
    RIDGE,
    ROWS_PER_FEATURE,
    ledoit_wolf_rho,
    oas_rho,
    ridged,
    shrunk,
    squared_length,
    whitening,
)
from ebm_guard.predictions import Predictions


class Mahalanobis(FeatureScore):
    """Score by the squared Mahalanobis distance to the nearest class mean.

    s(x) = min_c (h - m_c)' S^-1 (h - m_c), S = 1/N sum_i (h_i - m_{y_i})(h_i - m_{y_i})' with
    shrinkage; ``relative`` subtracts (h - m)' S_0^-1 (h - m), with the mean m and covariance S_0
    of all rows. Distances are taken between whitened points in float64, so they are never
    negative, and right with fewer rows than features. Classes without rows are left out.

    Args:
        relative: subtract the distance to the one Gaussian of all rows; better on near OOD.
        normalize: scale features to length 1 first (Mahalanobis++).
        shrinkage: ``auto`` (a ridge of 1e-6 trace(S)/D with at least 10 rows per feature,
            Ledoit-Wolf otherwise), ``ledoit_wolf``, ``oas``, or a number gamma >= 0 for
            S + gamma trace(S)/D I. Ledoit-Wolf needs a second pass over the rows.

    References:
        Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples and
        Adversarial Attacks, NeurIPS 2018, eq. 2; Ren et al., A Simple Fix to Mahalanobis Distance
        for Improving Near-OOD Detection, 2021 (relative); Mueller and Hein, Mahalanobis++, ICML
        2025 (normalize). The last layer alone and no input perturbation, unlike Lee et al.

    Example:
        >>> import numpy as np
        >>> generator = np.random.default_rng(0)
        >>> labels = np.arange(400) % 2
        >>> features = generator.normal(size=(400, 3)) + 5 * labels[:, None]
        >>> rows = Predictions(features[:, :2], features=features, labels=labels)
        >>> score = Mahalanobis(normalize=False).fit(rows)
        >>> near, far = score.score(torch.zeros(2, 2), torch.tensor([[5.0] * 3, [9.0] * 3]))
        >>> bool(near < 0.1), bool(far > 30)
        (True, True)
    """

    name = "mahalanobis"
    from_probabilities = True
    needs_labels = True
    min_per_class = 10
    tensors = ("origin", "whiten", "pull", "lengths", "background")
    origin: Tensor
    whiten: Tensor
    pull: Tensor
    lengths: Tensor
    background: Tensor

    def __init__(
        self,
        relative: bool = False,
        normalize: bool = True,
        shrinkage: str | float = "auto",
    ) -> None:
        _check_shrinkage(shrinkage)
        super().__init__()
        self.relative, self.normalize, self.shrinkage = relative, normalize, shrinkage

    def options(self) -> dict[str, Any]:
        """Return whether it is relative and normalised, and the shrinkage."""
        return {
            "relative": self.relative,
            "normalize": self.normalize,
            "shrinkage": self.shrinkage,
        }

    def _names(self) -> tuple[str, ...]:
        return self.tensors if self.relative else self.tensors[:4]

    def _reset(self) -> None:
        super()._reset()
        self._moments: Moments | None = None
        self._estimators: dict[str, Any] = {}

    def _add(self, rows: Rows) -> None:
        if self._moments is None:
            self._moments = Moments.empty(self._num_classes, self._width)
        self._moments.add(self._points(rows.features), rows.classes)

    def _join(self, other: Self) -> None:
        if other._moments is None:
            return
        if self._moments is None:
            self._moments = Moments.empty(self._num_classes, self._width)
        self._moments.join(other._moments)

    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        moments = self._moments
        if moments is None:
            raise DataError(f"{self.name} has no rows to be fitted on")
        origin, seen = moments.mean, moments.counts > 0
        within = self._whitening("within", moments.scatter, moments.means, parts)
        centres = (moments.means[seen] - origin) @ within
        found = {
            "origin": origin,
            "whiten": within,
            "pull": within @ centres.T,
            "lengths": centres.square().sum(dim=1),
        }
        if self.relative:
            means = origin.expand_as(moments.means)
            total = moments.total_scatter()
            found["background"] = self._whitening("background", total, means, parts)
        return found

    def _found(self) -> dict[str, Any]:
        return {"estimators": self._estimators}

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        centred = self._points(features) - self.origin
        # |z - c|^2 = |z|^2 - 2 z c + |c|^2, with z c = x (P c) for z = x P.
        apart = torch.addmm(self.lengths, centred, self.pull, alpha=-2.0).amin(dim=1)
        nearest = (apart + squared_length(centred, self.whiten)).clamp_min(0)
        if not self.relative:
            return nearest
        return nearest - squared_length(centred, self.background)

    def _points(self, features: Tensor) -> Tensor:
        features = features.double()
        return unit(features) if self.normalize else features

    def _whitening(
        self, key: str, scatter: Tensor, means: Tensor, parts: tuple[Predictions, ...]
    ) -> Tensor:
        """Return the whitening of a shrunk covariance, and note the estimator under ``key``."""
        n = float(self._counts.sum())
        covariance = scatter / n
        if not float(covariance.trace()) > 0:
            raise DataError(
                f"{self.name} cannot be fitted: the features of each class are all equal, so there "
                "is no covariance"
            )
        name: str | float = self.shrinkage
        if name == "auto":
            enough = n >= ROWS_PER_FEATURE * len(covariance)
            name = RIDGE if enough else "ledoit_wolf"
        if isinstance(name, (int, float)):
            self._estimators[key] = {"name": "ridge", "gamma": float(name)}
            return whitening(ridged(covariance, float(name)))
        if name == "oas":
            rho = oas_rho(covariance, n)
        else:
            rho = ledoit_wolf_rho(covariance, self._centred(means, n, parts), n)
        self._estimators[key] = {"name": name, "rho": rho}
        return whitening(shrunk(covariance, rho))

    def _centred(self, means: Tensor, n: float, parts: tuple[Predictions, ...]) -> Iterator[Tensor]:
        if sum(map(len, parts)) != n:
            raise InvalidInputError(
                f"the Ledoit-Wolf estimator needs a second pass over the {n:.0f} rows: call "
                "finish(*parts) with the predictions that were added, or choose shrinkage='oas'"
            )
        for part in parts:
            for rows in each_block(part):
                yield self._points(rows.features) - means[rows.classes]


def _check_shrinkage(shrinkage: str | float) -> None:
    if isinstance(shrinkage, str):
        if shrinkage in ESTIMATORS:
            return
        hint = suggest(shrinkage, ESTIMATORS)
    else:
        if 0 <= shrinkage < float("inf"):
            return
        hint = ""
    raise InvalidInputError(
        f"got shrinkage {shrinkage!r}; needed {', '.join(ESTIMATORS)} or a number >= 0{hint}"
    )
