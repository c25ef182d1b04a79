"""Telling data from noise of known density: the logistic loss, and its normaliser."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ROUNDS = 200


def contrastive_loss(data: Tensor, noise: Tensor) -> Tensor:
    """Compute the mean logistic loss of data and noise.

    L = - (sum_i log s(u_i) + sum_j log s(-v_j)) / (B + M), with s the sigmoid.

    Args:
        data: u (B,), log p(x) - log n(x) - log(M / B) of the data.
        noise: v (M,), the same of the noise.

    References:
        Gutmann and Hyvärinen, Noise-Contrastive Estimation of Unnormalized Statistical Models,
        JMLR 2012, section 2. Differs: the mean over all B + M rows, so that the weight of the
        term does not hang on how much noise there is.

    Example:
        >>> contrastive_loss(torch.zeros(2), torch.zeros(3))
        tensor(0.6931)
    """
    total = F.softplus(-data).sum() + F.softplus(noise).sum()
    return total / (len(data) + len(noise))


@dataclass(frozen=True)
class FittedConstant:
    """The normaliser that tells data from noise best.

    Args:
        value: c, nats.
        standard_error: by the curvature of the loss; infinite where data and noise are apart.
    """

    value: float
    standard_error: float


def fit_constant(data: Tensor, noise: Tensor) -> FittedConstant:
    """Find c that minimises the logistic loss of u - c: a one-dimensional regression.

    At the minimum sum_i s(c - u_i) = sum_j s(v_j - c): both kinds are mistaken equally often.
    The left side grows with c and the right one falls, so the root is one, and bisection finds it.

    Args:
        data: u (B,), log ratios of the data without c.
        noise: v (M,), those of the noise.

    Example:
        >>> found = fit_constant(torch.tensor([3.0, 2.0]), torch.tensor([3.0, 2.0]))
        >>> round(found.value, 6)
        2.5
    """
    data, noise = data.detach().double(), noise.detach().double()
    both = torch.cat([data, noise])
    low, high = float(both.min()) - 40, float(both.max()) + 40
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        excess = torch.sigmoid(middle - data).sum() - torch.sigmoid(noise - middle).sum()
        low, high = (middle, high) if float(excess) < 0 else (low, middle)
        if high - low < 1e-10:
            break
    value = (low + high) / 2
    shares = torch.sigmoid(both - value)
    # Of u - c each row is one Bernoulli trial.
    information = float((shares * (1 - shares)).sum())
    error = 1 / math.sqrt(information) if information > 0 else math.inf
    return FittedConstant(value, error)
