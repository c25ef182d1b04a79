"""Virtual-logit matching: the part of the features that the main directions do not hold."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.ood.feature_scores.base import FeatureScore, Rows, each_block
from ebm_guard.ood.feature_scores.moments import Moments
from ebm_guard.predictions import LinearHead, Predictions

# A residual of this share of the features' length is rounding of float32 features.
_NO_RESIDUAL = 1e-5


def principal_dimension(width: int) -> int:
    """Return the paper's dimension of the main space: 1000, 512 or D/2, at most D/2.

    Example:
        >>> [principal_dimension(width) for width in (64, 1280, 2048)]
        [32, 512, 1000]
    """
    rule = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
    return min(rule, width // 2)


class ViM(FeatureScore):
    """Score by a virtual logit of the feature residual against the other logits.

    s(x) = a ||(h - u) R|| - logsumexp_k f_k(x), where R (D, D-d) spans the smallest eigenvectors
    of 1/N sum_i (h_i - u)(h_i - u)', u = -pinv(W) b (the mean of the features where the head has no
    bias), and a = mean_i max_k f_k / mean_i ||(h_i - u) R||. The same order as the paper's
    probability of the virtual class.

    Args:
        dimension: d in 0..D-1, the dimension of the main space; None takes the paper's rule capped
            at D/2.

    References:
        Wang et al., ViM: Out-Of-Distribution with Virtual-logit Matching, CVPR 2022, eq. 3 to 6.
        ``eigh`` in float64; refused where the residual is rounding, for then a means nothing.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> features = np.abs(generator.normal(size=(200, 4))) * [3, 3, 0.1, 0.1]
        >>> head = LinearHead(np.eye(2, 4))
        >>> rows = Predictions(head.logits(features), features=features, head=head)
        >>> score = ViM().fit(rows)
        >>> inside, outside = torch.tensor([[3.0, 3, 0, 0], [3.0, 3, 3, 3]])
        >>> logits = torch.tensor([[3.0, 3.0]])
        >>> bool(score(logits, outside[None]) > score(logits, inside[None]))
        True
    """

    name = "vim"
    needs_head = True
    tensors = ("origin", "residual", "alpha")
    origin: Tensor
    residual: Tensor
    alpha: Tensor

    def __init__(self, dimension: int | None = None) -> None:
        if dimension is not None and dimension < 0:
            raise InvalidInputError(f"got dimension {dimension}; needed 0 or more, or None")
        super().__init__()
        self.dimension = dimension

    def options(self) -> dict[str, Any]:
        """Return the dimension of the main space."""
        return {"dimension": self.dimension}

    def _reset(self) -> None:
        super()._reset()
        self._moments: Moments | None = None
        self._max_logits = 0.0
        self._used_dimension = 0

    def _add(self, rows: Rows) -> None:
        if self._moments is None:
            self._moments = Moments.empty(1, self._width)
        self._moments.add(rows.features, torch.zeros_like(rows.classes))
        self._max_logits += float(rows.logits.double().amax(dim=1).sum())

    def _join(self, other: Self) -> None:
        if other._moments is None:
            return
        if self._moments is None:
            self._moments = Moments.empty(1, self._width)
        self._moments.join(other._moments)
        self._max_logits += other._max_logits

    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        moments = self._moments
        if moments is None or self._head is None:
            raise DataError(f"{self.name} has no rows to be fitted on")
        rule = principal_dimension(self._width)
        dimension = rule if self.dimension is None else self.dimension
        if dimension >= self._width:
            raise InvalidInputError(
                f"got dimension {dimension} for features of width {self._width}; needed less"
            )
        origin = _origin(self._head, moments.mean)
        vectors = torch.linalg.eigh(moments.total_scatter(origin) / moments.n).eigenvectors
        residual = vectors[:, : self._width - dimension].contiguous()
        length, whole = self._lengths(origin, residual, moments.n, parts)
        if not length > _NO_RESIDUAL * whole:
            raise DataError(
                f"vim cannot be fitted: beyond {dimension} main directions nothing is left of the "
                f"features (mean residual {length:.2g} of {whole:.2g}), so alpha would be "
                "rounding. Give more rows than that, or a smaller dimension"
            )
        top = self._max_logits / moments.n
        if not top > 0:
            raise DataError(
                f"vim cannot be fitted: the mean maximum logit is {top:.3g}, and a virtual logit "
                "of this sign would call large residuals normal"
            )
        self._used_dimension = dimension
        alpha = torch.tensor(top / length, dtype=torch.float64)
        return {"origin": origin, "residual": residual, "alpha": alpha}

    def _found(self) -> dict[str, Any]:
        return {"dimension": self._used_dimension}

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        outside = (features.double() - self.origin) @ self.residual
        virtual: Tensor = self.alpha * torch.linalg.vector_norm(outside, dim=1)
        return virtual - torch.logsumexp(logits.double(), dim=1)

    def _lengths(
        self, origin: Tensor, residual: Tensor, n: float, parts: tuple[Predictions, ...]
    ) -> tuple[float, float]:
        """Return the mean length of the residual, and of the centred features."""
        if sum(map(len, parts)) != n:
            raise InvalidInputError(
                f"vim's alpha needs a second pass over the {n:.0f} rows: call finish(*parts) with "
                "the predictions that were added"
            )
        inside = whole = 0.0
        for part in parts:
            for rows in each_block(part):
                centred = rows.features.double() - origin
                inside += float(torch.linalg.vector_norm(centred @ residual, dim=1).sum())
                whole += float(torch.linalg.vector_norm(centred, dim=1).sum())
        return inside / n, whole / n


def _origin(head: LinearHead, mean: Tensor) -> Tensor:
    if head.bias is None:
        return mean
    # Trained heads often have rows that sum to zero: what float32 left of that direction is
    # rounding, and its inverse would throw the origin millions of lengths away.
    rounding = max(head.weight.shape) * float(np.finfo(head.weight.dtype).eps)
    inverse = np.linalg.pinv(head.weight.astype(np.float64), rcond=rounding)
    return torch.from_numpy(-inverse @ head.bias.astype(np.float64))
