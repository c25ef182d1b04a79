"""Distance to the decision boundaries, relative to the distance from the ID mean."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from ebm_guard.errors import DataError
from ebm_guard.ood.feature_scores.base import EPS, FeatureScore, Rows, head_tensors
from ebm_guard.predictions import Predictions

# Distances of equal rows come out as sqrt(rounding) of their length.
_SAME = 1e-7


class FDBD(FeatureScore):
    """Score by the mean distance to the decision boundaries, regularised.

    s(x) = -1/(C-1) sum_{c != y} (f_y - f_c) / ||w_y - w_c|| / ||h - m||, with y = argmax f and m
    the mean of the fit rows. Classes with equal weights have no boundary and count 0.

    References:
        Liu and Qin, Fast Decision Boundary based Out-of-Distribution Detector, ICML 2024, eq. 5
        and 6. The paper's score is high for ID. Weight distances are taken between the predicted
        classes and all others, without a (C, C, D) tensor.

    Example:
        >>> import numpy as np
        >>> from ebm_guard.predictions import LinearHead
        >>> head = LinearHead(np.eye(2))
        >>> features = np.tile([[4.0, 0.0], [0.0, 4.0]], (10, 1))
        >>> rows = Predictions(head.logits(features), features=features, head=head)
        >>> row = torch.tensor([[4.0, 0.0]])
        >>> round(float(FDBD().fit(rows)(row, row)), 6)
        -1.0
    """

    name = "fdbd"
    from_probabilities = True
    needs_head = True
    tensors = ("weight", "mean")
    weight: Tensor
    mean: Tensor

    def _reset(self) -> None:
        super()._reset()
        self._sum: Tensor | None = None

    def _add(self, rows: Rows) -> None:
        total = rows.features.double().sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total

    def _join(self, other: Self) -> None:
        if other._sum is not None:
            self._sum = other._sum if self._sum is None else self._sum + other._sum

    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        if self._sum is None:
            raise DataError(f"{self.name} has no rows to be fitted on")
        weight = head_tensors(self._head)[0].double()
        return {"weight": weight, "mean": self._sum / float(self._counts.sum())}

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        logits = logits.double()
        away: Tensor = torch.linalg.vector_norm(features.double() - self.mean, dim=1)
        mean = self._margins(logits) / (logits.shape[1] - 1)
        return -mean / away.clamp_min(EPS)

    def _margins(self, logits: Tensor) -> Tensor:
        """Sum the distances to the boundaries, (B,)."""
        top, label = logits.max(dim=1, keepdim=True)
        named, place = torch.unique(label.squeeze(1), return_inverse=True)
        apart = torch.cdist(self.weight[named], self.weight)
        # The class itself, and classes with the same weights, have no boundary.
        length = torch.linalg.vector_norm(self.weight, dim=1).amax()
        apart = torch.where(apart > _SAME * length, apart, torch.inf)
        return ((top - logits) / apart[place]).sum(dim=1)
