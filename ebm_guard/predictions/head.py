"""The last linear layer of a model, kept beside its predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import DataError
from ebm_guard.model.head import Head

# What a float32 layer may miss, relative to max |logits|, as in ebm_guard.model.head.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 1e-2
_CHECKED_ROWS = 1000


@dataclass(frozen=True, eq=False)
class LinearHead:
    """W and b of the last layer: logits = features @ W.T + b.

    Args:
        weight: W (C, D), float32 or float64.
        bias: b (C,) of the same dtype, or None for a layer without one.

    Raises:
        DataError: other shapes or dtypes, or values that are not finite.

    Example:
        >>> head = LinearHead(np.eye(2), np.zeros(2))
        >>> head.logits(np.ones((1, 2)))
        array([[1., 1.]])
    """

    weight: NDArray[Any]
    bias: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be a linear layer."""
        weight, bias = self.weight, self.bias
        good = weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
        if not good or not all(
            part is None or part.dtype in (np.float32, np.float64) for part in (weight, bias)
        ):
            found = "no bias" if bias is None else f"a bias {bias.shape} ({bias.dtype})"
            raise DataError(
                f"got a head of weight {weight.shape} ({weight.dtype}) and {found}; needed a "
                "weight (C, D) and a bias (C,), float32 or float64"
            )
        if not np.isfinite(weight).all() or not (bias is None or np.isfinite(bias).all()):
            raise DataError("the head holds NaN or infinite weights; no score can use it")

    @classmethod
    def of_model(cls, head: Head) -> LinearHead:
        """Copy a verified head from its model; half precision is kept exactly as float32."""
        weight = head.weight.detach().cpu()
        dtype = np.float64 if str(weight.dtype) == "torch.float64" else np.float32
        # A head without a bias reads as zeros, and a bias of zeros changes no logit.
        bias = head.bias.detach().cpu().double().numpy().astype(dtype)
        return cls(weight.double().numpy().astype(dtype), bias if bias.any() else None)

    def logits(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Compute features @ W.T + b in float64, (N, C)."""
        product = np.asarray(features, dtype=np.float64) @ self.weight.astype(np.float64).T
        return product if self.bias is None else product + self.bias

    def check(self, features: NDArray[Any], logits: NDArray[Any], source: str) -> None:
        """Refuse a head that does not turn the stored features into the stored logits.

        Raises:
            DataError: with the largest difference on up to 1,000 rows spread over the set.
        """
        rows = np.unique(np.linspace(0, len(logits) - 1, _CHECKED_ROWS).astype(np.int64))
        wanted = np.asarray(logits[rows], dtype=np.float64)
        error = float(np.abs(self.logits(features[rows]) - wanted).max())
        scale = float(np.abs(wanted).max())
        # Features stored in half precision are rounded once more.
        half = features.dtype == np.float16
        if not error <= (_HALF_TOLERANCE if half else _TOLERANCE) * scale:
            raise DataError(
                f"{source}: features @ head_weight.T + head_bias misses the logits by up to "
                f"{error:.3g} (largest logit {scale:.3g}); needed the layer and the features that "
                "gave these logits"
            )
