"""The formula sheet: a classifier's logits read as energies (Grathwohl et al. 2020, JEM).

At temperature T, with logits f(x) of C classes::

    E(x, y) = -f(x)[y]                         joint energy
    E(x)    = -T logsumexp_y(f(x)[y] / T)      energy; higher = more out-of-distribution
    p(y|x)  = softmax(f(x) / T)

All functions are pure, differentiable, and compute in float32 or better whatever autocast says.
Cross-entropy is blind to a function c(x) added to all logits, so the energy of an ordinarily
trained classifier is a score and not a density, until an energy term has trained it.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError

# Beyond this temperature T log C swamps the differences between rows in float32.
_LARGE_TEMPERATURE = 100.0


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the energy E(x) = -T logsumexp(f(x)/T); higher = more out-of-distribution.

    T -> 0 gives -max f, T -> inf gives -mean f (minus the constant T log C): the order of rows
    changes with T. This T is the *energy temperature*, never the calibrated one.

    Args:
        logits: (B, C), any floating dtype, finite or not.
        temperature: T > 0.

    Returns:
        (B,), float32, or float64 for float64 logits and for T > 100.

    Raises:
        InvalidInputError: logits are not a floating (B, C) tensor, or T is not positive.

    References:
        Grathwohl et al., Your Classifier is Secretly an Energy Based Model, ICLR 2020, section 3;
        Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020, eq. 4.
        Differs from both papers' code, which call +logsumexp the score.

    Example:
        >>> energy(torch.tensor([[0.0, 0.0]]))
        tensor([-0.6931])
    """
    _check_temperature(temperature)
    logits = _upcast(logits, double=temperature > _LARGE_TEMPERATURE)
    with _autocast_off(logits):
        return -temperature * torch.logsumexp(logits / temperature, dim=-1)


def joint_energy(logits: Tensor) -> Tensor:
    """Compute the joint energy E(x, y) = -f(x)[y].

    Args:
        logits: (B, C).

    Returns:
        (B, C), float32 or float64; lower = the pair (x, y) is more likely.

    References:
        Grathwohl et al., ICLR 2020, section 3.

    Example:
        >>> joint_energy(torch.tensor([[1.0, -2.0]]))
        tensor([[-1.,  2.]])
    """
    return -_upcast(logits)


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute log p(y|x) = log softmax(f(x)/T).

    Args:
        logits: (B, C).
        temperature: T > 0.

    Returns:
        (B, C), float32 or float64, each row's logsumexp is 0.

    Raises:
        InvalidInputError: see :func:`energy`.

    Example:
        >>> log_probabilities(torch.tensor([[0.0, 0.0]])).exp()
        tensor([[0.5000, 0.5000]])
    """
    _check_temperature(temperature)
    logits = _upcast(logits)
    with _autocast_off(logits):
        return torch.log_softmax(logits / temperature, dim=-1)


def log_odds(logits: Tensor) -> Tensor:
    """Compute the log-odds against the top class: logsumexp of the other logits - max logit.

    It is log((1 - p_max) / p_max): a strictly decreasing function of the maximum softmax
    probability that does not saturate where the softmax rounds to 1.

    Args:
        logits: (B, C), C >= 2.

    Returns:
        (B,), float32 or float64; higher = less sure.

    Example:
        >>> log_odds(torch.tensor([[50.0, 0.0]]))
        tensor([-50.])
    """
    logits = _upcast(logits)
    with _autocast_off(logits):
        top, where = logits.max(dim=-1, keepdim=True)
        others = logits.scatter(-1, where, -math.inf)
        return torch.logsumexp(others, dim=-1) - top.squeeze(-1)


def check_logits(logits: Tensor) -> None:
    """Refuse what cannot be a batch of logits.

    Raises:
        InvalidInputError: not a floating tensor of shape (B, C) with C >= 2.

    Example:
        >>> check_logits(torch.zeros(4, 10))
    """
    if not isinstance(logits, Tensor):
        raise InvalidInputError(f"got {type(logits).__name__}; logits must be a torch tensor")
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise InvalidInputError(
            f"got a {logits.dtype} tensor of shape {tuple(logits.shape)}; logits must be floating, "
            "of shape (B, C) with C >= 2 classes. A one-logit (binary) head can be given as two "
            "logits: torch.cat([torch.zeros_like(f), f], dim=1)"
        )


def _check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise InvalidInputError(f"got temperature {temperature!r}; it must be a finite number > 0")


def _upcast(logits: Tensor, *, double: bool = False) -> Tensor:
    check_logits(logits)
    if double:
        return logits.double()
    return logits if logits.dtype == torch.float64 else logits.float()


def _autocast_off(logits: Tensor) -> torch.autocast | nullcontext[None]:
    kind = logits.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
