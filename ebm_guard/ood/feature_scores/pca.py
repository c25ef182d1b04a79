"""The energy of what the principal directions of the features leave over."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.ood.feature_scores.base import FeatureScore, Rows, unit
from ebm_guard.ood.feature_scores.moments import Moments
from ebm_guard.predictions import Predictions

# A residual variance of this share of all variance is rounding of float32 features.
_NO_RESIDUAL = 1e-10


class PCAEnergy(FeatureScore):
    """Score by the squared distance to the principal subspace of the ID features.

    s(x) = ||(h - m) R||^2 = min_z ||h - m - P z||^2, where m is the mean of the features, P (D, d)
    spans the largest eigenvectors of their covariance, and R (D, D-d) the others: the energy of a
    linear autoencoder, its code z the latent variable that is minimised over.

    Args:
        dimension: d in 0..D-1; None takes the fewest directions that hold ``explained`` of the
            variance, at most D-1.
        explained: share of the variance, in (0, 1).
        normalize: scale features to length 1 first.

    References:
        LeCun, Chopra, Hadsell, Ranzato and Huang, A Tutorial on Energy-Based Learning, 2006
        (energies with latent variables); the residual alone of Wang et al., ViM, CVPR 2022, which
        adds the logits and takes its origin from the head. Needs neither head nor labels.

    Example:
        >>> import numpy as np
        >>> features = np.random.default_rng(0).normal(size=(200, 4)) * [3, 3, 0.1, 0.1]
        >>> score = PCAEnergy(normalize=False).fit(Predictions(features[:, :2], features=features))
        >>> on, off = score(torch.zeros(2, 2), torch.tensor([[9.0, -9, 0, 0], [0.0, 0, 0, 2]]))
        >>> bool(on < 0.2), bool(off > 3)
        (True, True)
    """

    name = "pca_energy"
    from_probabilities = True
    tensors = ("origin", "residual")
    origin: Tensor
    residual: Tensor

    def __init__(
        self, dimension: int | None = None, explained: float = 0.9, normalize: bool = True
    ) -> None:
        whole = dimension is None or (isinstance(dimension, int) and dimension >= 0)
        if not whole or not 0 < explained < 1:
            raise InvalidInputError(
                f"got dimension {dimension!r} and explained {explained!r}; needed a whole number "
                ">= 0 (or None), and a share of the variance in (0, 1)"
            )
        super().__init__()
        self.dimension, self.explained, self.normalize = dimension, explained, normalize

    def options(self) -> dict[str, Any]:
        """Return the dimension, the share of the variance, and whether lengths are set to 1."""
        return {
            "dimension": self.dimension,
            "explained": self.explained,
            "normalize": self.normalize,
        }

    def _reset(self) -> None:
        super()._reset()
        self._moments: Moments | None = None
        self._used_dimension = 0

    def _add(self, rows: Rows) -> None:
        if self._moments is None:
            self._moments = Moments.empty(1, self._width)
        self._moments.add(self._points(rows.features), torch.zeros_like(rows.classes))

    def _join(self, other: Self) -> None:
        if other._moments is None:
            return
        if self._moments is None:
            self._moments = Moments.empty(1, self._width)
        self._moments.join(other._moments)

    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        moments = self._moments
        if moments is None:
            raise DataError(f"{self.name} has no rows to be fitted on")
        values, vectors = torch.linalg.eigh(moments.scatter / moments.n)
        dimension = self._chosen(values.flip(0))
        rest = values[: self._width - dimension].clamp_min(0)
        if not float(rest.sum()) > _NO_RESIDUAL * float(values.sum()):
            raise DataError(
                f"{self.name} cannot be fitted: beyond {dimension} principal directions nothing is "
                "left of the features. Give more rows than that, or a smaller dimension"
            )
        self._used_dimension = dimension
        residual = vectors[:, : self._width - dimension].contiguous()
        return {"origin": moments.mean, "residual": residual}

    def _found(self) -> dict[str, Any]:
        return {"dimension": self._used_dimension}

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        outside = (self._points(features) - self.origin) @ self.residual
        return outside.square().sum(dim=1)

    def _points(self, features: Tensor) -> Tensor:
        features = features.double()
        return unit(features) if self.normalize else features

    def _chosen(self, descending: Tensor) -> int:
        """Return d for the variances of the principal directions, the largest first."""
        if self.dimension is not None:
            if self.dimension >= self._width:
                raise InvalidInputError(
                    f"got dimension {self.dimension} for features of width {self._width}; needed "
                    "less"
                )
            return self.dimension
        held = descending.clamp_min(0).cumsum(0)
        fewest = int((held < self.explained * held[-1]).sum()) + 1
        return min(fewest, self._width - 1)
