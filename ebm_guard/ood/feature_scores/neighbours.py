"""Scores by the nearest ID rows: their distance (kNN), or how they back the energy (NNGuide)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError, TooFewRowsError
from ebm_guard.ood.feature_scores.base import FeatureScore, Rows, unit
from ebm_guard.ood.feature_scores.sample import BalancedSample
from ebm_guard.ood.score import blocks
from ebm_guard.predictions import Predictions

# Similarities held at a time: 16 MiB in float32.
_SIMILARITIES = 1 << 22


class NeighbourScore(FeatureScore):
    """Base of the scores on a bounded, class-balanced bank of ID rows.

    The bank holds at most ``bank_size`` rows, as many of each class (label, or predicted class
    where there are no labels) as there are rows for, drawn by the rows' content and the seed: the
    same in any order, any batches, any shards.

    Args:
        k: neighbours.
        bank_size: most rows in the bank.
        seed: of the draw.
    """

    tensors = ("bank",)
    bank: Tensor

    def __init__(self, k: int, bank_size: int, seed: int) -> None:
        if not 1 <= k <= bank_size:
            raise InvalidInputError(
                f"got k {k} and bank_size {bank_size}; needed 1 <= k <= bank_size"
            )
        super().__init__()
        self.k, self.bank_size, self.seed = k, bank_size, seed

    @abstractmethod
    def _stored(self, rows: Rows) -> Tensor:
        """Return what the bank keeps of rows, (B, D) float32."""

    @abstractmethod
    def _near(self, points: Tensor) -> Tensor:
        """Return the score's part of the bank for points of length 1, (B,) float64."""

    def options(self) -> dict[str, Any]:
        """Return k, the size of the bank and the seed."""
        return {"k": self.k, "bank_size": self.bank_size, "seed": self.seed}

    def _reset(self) -> None:
        super()._reset()
        self._sample: BalancedSample | None = None

    def _require_sample(self) -> BalancedSample:
        if self._sample is None:
            self._sample = BalancedSample(self.bank_size, self.seed)
        return self._sample

    def _add(self, rows: Rows) -> None:
        self._require_sample().add(self._stored(rows), rows.classes, rows.hashes)

    def _join(self, other: Self) -> None:
        self._require_sample().join(other._require_sample())

    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        bank = self._require_sample().rows()[0]
        if len(bank) < self.k:
            raise TooFewRowsError(
                f"{self.name} with k = {self.k} needs at least {self.k} rows, got {len(bank)}; "
                "give more rows or a smaller k"
            )
        return {"bank": bank}

    def _found(self) -> dict[str, Any]:
        return {"bank_rows": len(self.bank)}

    def _search(self, features: Tensor) -> Tensor:
        points = unit(features.double())
        rows = blocks(len(points), len(self.bank), _SIMILARITIES)
        return torch.cat([self._near(points[part]) for part in rows])

    def _similar(self, points: Tensor) -> Tensor:
        """Return the products with the bank (B, M); this order is the faster for few rows."""
        return (self.bank @ points.float().T).T.contiguous()


class KNN(NeighbourScore):
    """Score by the distance to the k-th nearest ID row, between features of length 1.

    s(x) = ||h/|h| - h_(k)/|h_(k)|||, in [0, 2]. Neighbours are found by float32 similarities in
    blocks, and the k-th distance is then taken in float64. A zero vector stays zero, at distance 1
    of every other. A row of the bank finds itself first: never evaluate on fit rows.

    Args:
        k: neighbours; 50 in the paper for CIFAR-10. At most half of the bank's rows per class are
            used (``k_used`` in :meth:`settings`): with more, the k-th neighbour of a familiar row
            is of another class, and the score turns round.
        bank_size: most rows in the bank; memory is ``bank_size`` x D x 4 bytes.
        seed: of the draw.

    References:
        Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022, eq. 4.
        The bank is balanced over classes, and k has the bound above.

    Example:
        >>> import numpy as np
        >>> angle = np.linspace(0, 0.1, 50)
        >>> features = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        >>> score = KNN(k=1).fit(Predictions(features, features=features))
        >>> score(torch.zeros(1, 2), torch.tensor([[0.0, -7.0]])).round(decimals=3)
        tensor([1.4140], dtype=torch.float64)
    """

    name = "knn"
    from_probabilities = True

    def __init__(self, k: int = 50, bank_size: int = 50_000, seed: int = 0) -> None:
        super().__init__(k, bank_size, seed)

    def _stored(self, rows: Rows) -> Tensor:
        return unit(rows.features.double()).float()

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        return self._search(features)

    def _near(self, points: Tensor) -> Tensor:
        # Sorted, because the last of the k is the one that counts.
        found = self._similar(points).topk(self._k_used(), dim=1).indices[:, -1]
        apart: Tensor = torch.linalg.vector_norm(points - self.bank[found].double(), dim=1)
        return apart

    def _k_used(self) -> int:
        return self.k if self._facts is None else int(self._facts["k_used"])

    def _found(self) -> dict[str, Any]:
        seen = int((self._counts > 0).sum())
        return super()._found() | {"k_used": max(1, min(self.k, len(self.bank) // (2 * seen)))}


class NNGuide(NeighbourScore):
    """Score by the energy, guided by ID rows that are near and sure.

    s(x) = -g(x) L(x), L = logsumexp_k f_k(x), g = the mean of the k largest cos(h, h_i) L(x_i)
    over the bank.

    Args:
        k: neighbours.
        bank_size: most rows in the bank; memory is ``bank_size`` x D x 4 bytes.
        seed: of the draw.

    References:
        Park et al., Nearest Neighbor Guidance for Out-of-Distribution Detection, ICCV 2023, eq. 6
        to 8 (k = 10). The paper's score is high for ID. The bank is balanced over classes.

    Example:
        >>> import numpy as np
        >>> features = np.tile([[1.0, 0.0]], (20, 1))
        >>> score = NNGuide().fit(Predictions(5 * features, features=features))
        >>> toward, away = score(torch.ones(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> bool(toward < away)
        True
    """

    name = "nnguide"

    def __init__(self, k: int = 10, bank_size: int = 50_000, seed: int = 0) -> None:
        super().__init__(k, bank_size, seed)

    def _stored(self, rows: Rows) -> Tensor:
        sure = torch.logsumexp(rows.logits.double(), dim=1, keepdim=True)
        return (unit(rows.features.double()) * sure).float()

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        return -self._search(features) * torch.logsumexp(logits.double(), dim=1)

    def _near(self, points: Tensor) -> Tensor:
        near = self._similar(points).topk(self.k, dim=1, sorted=False)
        return near.values.double().mean(dim=1)
