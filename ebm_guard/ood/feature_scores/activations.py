"""Energy of reshaped features: clipped (ReAct) or scaled (SCALE)."""

from __future__ import annotations

from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.energy import energy
from ebm_guard.errors import InvalidInputError
from ebm_guard.ood.feature_scores.base import FeatureScore, Rows, head_tensors
from ebm_guard.ood.feature_scores.sample import BalancedSample
from ebm_guard.predictions import Predictions

# Up to 8.4 million values (32 MiB) the percentile is exact; of more, a sample of rows is held.
_SAMPLED_VALUES = 1 << 23


class EnergyReAct(FeatureScore):
    """Score by the energy after clipping features at a percentile of the ID features.

    s(x) = -logsumexp(W min(h, c) + b), where c is one number: the percentile of all values of all
    fit rows (exact up to 8.4 million values, then of a seeded sample of rows).

    Args:
        percentile: of the fit rows' feature values, in (0, 100).
        seed: of the sample.

    References:
        Sun et al., ReAct: Out-of-distribution Detection With Rectified Activations, NeurIPS 2021,
        eq. 2 (p = 90). On the pooled features, the input of the last layer.

    Example:
        >>> import numpy as np
        >>> from ebm_guard.predictions import LinearHead
        >>> features = np.linspace(0, 1, 40).reshape(20, 2)
        >>> head = LinearHead(np.eye(2))
        >>> score = EnergyReAct().fit(Predictions(features, features=features, head=head))
        >>> round(float(score.clip), 3)
        0.9
    """

    name = "energy_react"
    from_probabilities = True
    needs_head = True
    non_negative = True
    tensors = ("weight", "bias", "clip")
    weight: Tensor
    bias: Tensor
    clip: Tensor

    def __init__(self, percentile: float = 90.0, seed: int = 0) -> None:
        if not 0 < percentile < 100:
            raise InvalidInputError(f"got percentile {percentile}; needed a number in (0, 100)")
        super().__init__()
        self.percentile, self.seed = percentile, seed

    def options(self) -> dict[str, Any]:
        """Return the percentile and the seed of the sample."""
        return {"percentile": self.percentile, "seed": self.seed}

    def _reset(self) -> None:
        super()._reset()
        self._sample: BalancedSample | None = None

    def _add(self, rows: Rows) -> None:
        self._require_sample().add(rows.features, torch.zeros_like(rows.classes), rows.hashes)

    def _join(self, other: Self) -> None:
        self._require_sample().join(other._require_sample())

    def _require_sample(self) -> BalancedSample:
        if self._sample is None:
            self._sample = BalancedSample(max(1, _SAMPLED_VALUES // self._width), self.seed)
        return self._sample

    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        weight, bias = head_tensors(self._head)
        values = self._require_sample().rows()[0].numpy().reshape(-1)
        clip = torch.tensor(_percentile(values, self.percentile), dtype=torch.float64)
        return {"weight": weight, "bias": bias, "clip": clip}

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        clipped = torch.minimum(features, self.clip.to(features.dtype))
        return energy(_linear(clipped, self.weight, self.bias))


class EnergyScale(FeatureScore):
    """Score by the energy after scaling features by how much their largest values hold.

    s(x) = -logsumexp(W (e^r h) + b), r = s1 / s2, s1 = sum_j h_j, s2 = the sum of the
    D - round(p D / 100) largest h_j. For features >= 0, 1 <= r <= D / (number summed), so that
    nothing overflows; a zero vector has r = 1.

    Args:
        percentile: p in [0, 100), the share of values left out of s2.

    References:
        Xu et al., Scaling for Training Time and Post-hoc Out-of-distribution Detection
        Enhancement, ICLR 2024, eq. 5 and 6. On the pooled features, the input of the last layer.
        pytorch-ood 0.4 takes p = 65.

    Example:
        >>> import numpy as np
        >>> from ebm_guard.predictions import LinearHead
        >>> features = np.linspace(0, 1, 40).reshape(20, 2)
        >>> head = LinearHead(np.eye(2))
        >>> score = EnergyScale(50).fit(Predictions(features, features=features, head=head))
        >>> sharp, flat = score(torch.zeros(2, 2), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> bool(flat < sharp)
        True
    """

    name = "energy_scale"
    from_probabilities = True
    needs_head = True
    non_negative = True
    tensors = ("weight", "bias")
    weight: Tensor
    bias: Tensor

    def __init__(self, percentile: float = 85.0) -> None:
        if not 0 <= percentile < 100:
            raise InvalidInputError(f"got percentile {percentile}; needed a number in [0, 100)")
        super().__init__()
        self.percentile = percentile

    def options(self) -> dict[str, Any]:
        """Return the percentile."""
        return {"percentile": self.percentile}

    def _add(self, rows: Rows) -> None:
        """Only the head and the sign of the features matter, and both were looked at."""

    def _join(self, other: Self) -> None:
        """See :meth:`_add`."""

    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        weight, bias = head_tensors(self._head)
        return {"weight": weight, "bias": bias}

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        width = features.shape[1]
        kept = max(1, width - round(width * self.percentile / 100))
        total = features.sum(dim=1)
        largest = features.topk(kept, dim=1, sorted=False).values.sum(dim=1)
        # A later row may go negative where the fit rows did not; the bound of r holds it in.
        ratio = torch.where(largest > 0, total / largest, 1.0).clamp(0, width / kept)
        return energy(_linear(features * ratio.exp()[:, None], self.weight, self.bias))


def _percentile(values: NDArray[Any], percentile: float) -> float:
    """Interpolate between order statistics in float64; the values are partitioned in place."""
    place = percentile / 100 * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    values.partition((low, high))
    return float(values[low]) + (place - low) * (float(values[high]) - float(values[low]))


def _linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = torch.promote_types(features.dtype, weight.dtype)
    return torch.addmm(bias.to(dtype), features.to(dtype), weight.to(dtype).T)
