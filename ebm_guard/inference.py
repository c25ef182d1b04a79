"""Inference by energy: the labels of the lowest joint energy, ranks, and a density over labels.

Every answer is read off the joint energies E(x, y) = -f(x)[y]; nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_guard.energy import joint_energy, log_probabilities
from ebm_guard.errors import InvalidInputError


class RankedLabels(NamedTuple):
    """Labels in the order of their joint energies, the lowest first.

    Args:
        labels: (B, K) int64.
        energies: (B, K), E(x, label).
    """

    labels: Tensor
    energies: Tensor


def lowest_energy_labels(logits: Tensor, k: int = 1) -> RankedLabels:
    """Find the k labels of the lowest joint energy: argmin_y E(x, y), the next best, and so on.

    Of equal energies the lower label comes first.

    Args:
        logits: (B, C).
        k: labels per row, 1..C.

    Raises:
        InvalidInputError: k is not in 1..C, or the logits are not (B, C).

    References:
        LeCun et al., A Tutorial on Energy-Based Learning, 2006 (inference as the
        search for the lowest energy).

    Example:
        >>> lowest_energy_labels(torch.tensor([[1.0, 3.0, 2.0]]), 2).labels
        tensor([[1, 2]])
    """
    energies = joint_energy(logits)
    count = logits.shape[1]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= count:
        raise InvalidInputError(f"got k={k!r} for {count} classes; needed 1 to {count}")
    order = energies.argsort(dim=1, stable=True)[:, :k]
    return RankedLabels(order, energies.gather(1, order))


def rank_labels(logits: Tensor, labels: Tensor | Sequence[int]) -> RankedLabels:
    """Order given labels by their joint energies, the lowest first.

    Of equal energies the label that was named first comes first.

    Args:
        logits: (B, C).
        labels: the same L labels for every row, or (B, L) labels of each row.

    Raises:
        InvalidInputError: no labels, another shape, or labels outside 0..C-1.

    Example:
        >>> rank_labels(torch.tensor([[1.0, 3.0, 2.0]]), [0, 2]).labels
        tensor([[2, 0]])
    """
    energies = joint_energy(logits)
    try:
        wanted = torch.as_tensor(labels, device=logits.device)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"got labels {labels!r}: {error}; needed whole numbers") from None
    if wanted.ndim == 1:
        wanted = wanted.expand(len(logits), -1)
    right = wanted.ndim == 2 and len(wanted) == len(logits) and wanted.shape[1] > 0
    if not right or wanted.is_floating_point() or wanted.dtype == torch.bool:
        raise InvalidInputError(
            f"got labels of shape {tuple(wanted.shape)} and dtype {wanted.dtype}; needed integers "
            f"(L,) or ({len(logits)}, L)"
        )
    wanted = wanted.long()
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < logits.shape[1]:
        raise InvalidInputError(
            f"got labels in {int(wanted.min())}..{int(wanted.max())}; needed labels in "
            f"0..{logits.shape[1] - 1}"
        )
    found = energies.gather(1, wanted)
    order = found.argsort(dim=1, stable=True)
    return RankedLabels(wanted.gather(1, order), found.gather(1, order))


def label_density(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the Gibbs density over labels, p(y|x) = exp(-E(x,y)/T) / sum_k exp(-E(x,k)/T).

    T -> 0 puts all mass on the lowest energy, T -> inf spreads it evenly. At T = 1 it is the
    softmax; the calibrated temperature of a guard makes it a probability to rely on.

    Args:
        logits: (B, C).
        temperature: T > 0.

    Returns:
        (B, C), each row sums to 1.

    Raises:
        InvalidInputError: T is not positive, or the logits are not (B, C).

    References:
        LeCun et al., A Tutorial on Energy-Based Learning, 2006 (the Gibbs
        distribution, beta = 1/T).

    Example:
        >>> label_density(torch.tensor([[0.0, 0.0]]), temperature=3.0)
        tensor([[0.5000, 0.5000]])
    """
    return log_probabilities(logits, temperature).exp()
