"""Scores of the logits alone: nothing to fit, higher = more out-of-distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard import registry
from ebm_guard.energy import check_logits, energy, log_odds, log_probabilities
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.precision import KeepDouble
from ebm_guard.predictions import Predictions, chunks


class Score(KeepDouble, ABC):
    """Base of the scores: a function of one row, higher = more out-of-distribution.

    Attributes:
        name: the registered name.
        from_probabilities: whether the score is unchanged when a constant is added to a row's
            logits, so that log-probabilities serve as well.
    """

    name = ""
    from_probabilities = False

    @abstractmethod
    def score(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Score rows.

        Args:
            logits: (B, C).
            features: (B, D), for scores that need them.

        Returns:
            (B,), float32 or float64; non-finite for a row with a non-finite logit is allowed, the
            gate refuses such rows by their logits.
        """

    def forward(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Score rows; see :meth:`score`."""
        return self.score(logits, features)

    def check_kind(self, predictions: Predictions) -> None:
        """Refuse stored probabilities where the score needs logits.

        Raises:
            DataError: with the way out.
        """
        if predictions.kind == "probs" and not self.from_probabilities:
            raise DataError(
                f"{self.name} is not available on {predictions.source}: needs logits, got "
                "probabilities. Store the logits, or use msp or gen"
            )

    @torch.no_grad()
    def of(self, predictions: Predictions) -> NDArray[np.float64]:
        """Score all rows of stored predictions, (N,) float64.

        Raises:
            DataError: the score needs logits, and only probabilities were stored.
        """
        self.check_kind(predictions)
        parts = [
            self.score(torch.from_numpy(np.array(part))).double().numpy()
            for part in chunks(predictions.logits)
        ]
        return np.concatenate(parts)

    def settings(self) -> dict[str, Any]:
        """Return the settings that rebuild the score."""
        return {}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Score:
        """Rebuild a score from its tensors and settings."""
        del tensors
        return cls(**settings)


class Energy(Score):
    """Score by the energy E(x) = -T logsumexp(f(x)/T).

    Args:
        energy_temperature: T > 0, unrelated to the calibrated temperature.

    References:
        Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020, eq. 4. The paper
        scores with -E and calls low values OOD; here the score is E.

    Example:
        >>> Energy().score(torch.zeros(1, 2))
        tensor([-0.6931])
    """

    name = "energy"

    def __init__(self, energy_temperature: float = 1.0) -> None:
        super().__init__()
        energy(torch.zeros(1, 2), energy_temperature)
        self.energy_temperature = energy_temperature

    def score(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the energy (B,)."""
        return energy(logits, self.energy_temperature)

    def settings(self) -> dict[str, Any]:
        """Return the energy temperature."""
        return {"energy_temperature": self.energy_temperature}


class MSP(Score):
    """Score by the maximum softmax probability, as log-odds.

    s(x) = log((1 - p_max) / p_max) = logsumexp of the other logits - max logit: the order of
    1 - p_max without the ties where the softmax rounds to 1.

    References:
        Hendrycks and Gimpel, ICLR 2017.

    Example:
        >>> MSP().score(torch.tensor([[30.0, 0.0]]))
        tensor([-30.])
    """

    name = "msp"
    from_probabilities = True

    def score(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the log-odds against the top class (B,)."""
        return log_odds(logits)


class MaxLogit(Score):
    """Score by the negative maximum logit, s(x) = -max_k f_k(x).

    References:
        Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, ICML 2022.

    Example:
        >>> MaxLogit().score(torch.tensor([[3.0, 1.0]]))
        tensor([-3.])
    """

    name = "maxlogit"

    def score(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the negative maximum logit (B,)."""
        check_logits(logits)
        return -logits.to(torch.promote_types(logits.dtype, torch.float32)).amax(dim=-1)


class GEN(Score):
    """Score by the generalised entropy of the top probabilities, in log space.

    s(x) = log sum_{k in top M} (p_k (1 - p_k))^gamma. The paper's score is the negative of the sum
    and high for ID; the logarithm keeps its order and does not round to ties.

    Args:
        gamma: exponent in (0, 1].
        top: M, the number of largest probabilities; all classes when C <= M.

    References:
        Liu et al., GEN, CVPR 2023 (gamma = 0.1, M = 100).

    Example:
        >>> bool(GEN().score(torch.zeros(1, 3)) > GEN().score(torch.tensor([[9.0, 0.0, 0.0]])))
        True
    """

    name = "gen"
    from_probabilities = True

    def __init__(self, gamma: float = 0.1, top: int = 100) -> None:
        super().__init__()
        if not 0 < gamma <= 1 or top < 2:
            raise InvalidInputError(
                f"got gamma {gamma} and top {top}; needed gamma in (0, 1] and top >= 2"
            )
        self.gamma, self.top = gamma, top

    def score(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the log generalised entropy (B,)."""
        log_p = log_probabilities(logits)
        log_p = log_p.topk(min(self.top, log_p.shape[-1]), dim=-1).values
        # log(1 - p) is exact for small p; for the top class it is the log-odds plus log p.
        log_not_p = torch.cat(
            [(log_odds(logits) + log_p[..., 0])[..., None], torch.log1p(-log_p[..., 1:].exp())],
            dim=-1,
        )
        return torch.logsumexp(self.gamma * (log_p + log_not_p), dim=-1)

    def settings(self) -> dict[str, Any]:
        """Return gamma and the number of classes kept."""
        return {"gamma": self.gamma, "top": self.top}


def make_score(name: str, **settings: Any) -> Score:
    """Build a registered score by name.

    Raises:
        InvalidInputError: unknown name (near names are suggested) or setting.

    Example:
        >>> make_score("energy", energy_temperature=2.0).settings()
        {'energy_temperature': 2.0}
    """
    score_class = registry.get("score", name).load()
    try:
        score = score_class(**settings)
    except TypeError as error:
        raise InvalidInputError(f"score {name!r} does not take {settings}: {error}") from None
    if not isinstance(score, Score):
        raise InvalidInputError(f"the registry names {score_class!r} for {name!r}, not a Score")
    return score
