"""Scores of the logits alone: nothing to fit, higher = more out-of-distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebm_guard.energy import check_logits, energy, log_odds, log_probabilities
from ebm_guard.errors import InvalidInputError
from ebm_guard.ood.score import Score, make_score

__all__ = ["GEN", "MSP", "Energy", "MaxLogit", "Score", "make_score"]


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

    def options(self) -> dict[str, Any]:
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

    def options(self) -> dict[str, Any]:
        """Return gamma and the number of classes kept."""
        return {"gamma": self.gamma, "top": self.top}
