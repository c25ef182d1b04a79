"""Covariance estimators that stay invertible, also with fewer rows than features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ESTIMATORS = ("auto", "ledoit_wolf", "oas")
# With this many rows per feature the sample covariance needs no help but a little ridge.
ROWS_PER_FEATURE = 10
RIDGE = 1e-6
# Columns of a block of the whitening triangle.
_COLUMNS = 128


def ridged(covariance: Tensor, gamma: float) -> Tensor:
    """Return S + gamma trace(S)/D I.

    Example:
        >>> ridged(torch.eye(2), 0.5)
        tensor([[1.5000, 0.0000],
                [0.0000, 1.5000]])
    """
    return covariance + gamma * _scale(covariance) * _eye(covariance)


def shrunk(covariance: Tensor, rho: float) -> Tensor:
    """Return (1 - rho) S + rho trace(S)/D I.

    Example:
        >>> shrunk(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 1.0)
        tensor([[2., 0.],
                [0., 2.]])
    """
    return (1 - rho) * covariance + rho * _scale(covariance) * _eye(covariance)


def ledoit_wolf_rho(covariance: Tensor, centred: Iterable[Tensor], n: float) -> float:
    """Estimate the best rho of :func:`shrunk` from the rows' fourth moments.

    rho = min(b, d) / d with d = ||S - m I||^2, m = trace(S)/D and
    b = 1/n^2 sum_i ||x_i x_i' - S||^2 = 1/n (1/n sum_i ||x_i||^4 - ||S||^2).

    Args:
        covariance: S (D, D) = 1/n sum_i x_i x_i'.
        centred: blocks of the centred rows x_i (B, D).
        n: number of rows.

    Returns:
        rho in [0, 1].

    References:
        Ledoit and Wolf, A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices,
        Journal of Multivariate Analysis 2004, section 3.3.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
        >>> ledoit_wolf_rho(rows.T @ rows / 2, [rows], 2)
        0.0
    """
    fourth = sum(float((block.square().sum(dim=1) ** 2).sum()) for block in centred)
    size = float(covariance.square().sum())
    spread = float((covariance - _scale(covariance) * _eye(covariance)).square().sum())
    noise = max(0.0, (fourth / n - size) / n)
    return min(noise, spread) / spread if spread > 0 else 1.0


def oas_rho(covariance: Tensor, n: float) -> float:
    """Estimate rho of :func:`shrunk` for Gaussian rows, from S alone (so that parts merge).

    rho = min(1, ((1 - 2/D) tr(S^2) + tr(S)^2) / ((n + 1 - 2/D) (tr(S^2) - tr(S)^2/D))).

    References:
        Chen, Wiesel, Eldar and Hero, Shrinkage Algorithms for MMSE Covariance Estimation, IEEE
        Transactions on Signal Processing 2010, eq. 23.

    Example:
        >>> oas_rho(torch.eye(3), 10)
        1.0
    """
    width = len(covariance)
    square, trace = float(covariance.square().sum()), float(covariance.trace())
    spread = (n + 1 - 2 / width) * (square - trace**2 / width)
    numerator = (1 - 2 / width) * square + trace**2
    return 1.0 if spread <= 0 else max(0.0, min(1.0, numerator / spread))


def whitening(covariance: Tensor) -> Tensor:
    """Return a lower triangular P (D, D) with P P' = covariance^-1.

    ||x P||^2 is the squared distance. By eigenvalues, which stay above rounding, and then turned
    into the triangle, which saves half of the products in :func:`squared_length`.

    Example:
        >>> whitening(4 * torch.eye(2).double()).abs().diagonal()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(covariance)
    floor = values[-1] * torch.finfo(torch.float64).eps
    root = vectors / values.clamp_min(floor).sqrt()
    triangle: Tensor = torch.linalg.qr(root.T).R
    return triangle.T.contiguous()


def squared_length(rows: Tensor, whiten: Tensor) -> Tensor:
    """Return ||x P||^2 of rows x (B, D), without the products with P's zeros, (B,).

    Example:
        >>> lengths = squared_length(torch.ones(1, 2), torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        >>> round(float(lengths), 4)
        18.0
    """
    total = rows.new_zeros(len(rows))
    for start in range(0, whiten.shape[1], _COLUMNS):
        part = rows[:, start:] @ whiten[start:, start : start + _COLUMNS]
        total = total + torch.linalg.vector_norm(part, dim=1).square()
    return total


def _scale(covariance: Tensor) -> float:
    return float(covariance.trace()) / len(covariance)


def _eye(covariance: Tensor) -> Tensor:
    return torch.eye(len(covariance), dtype=covariance.dtype)
