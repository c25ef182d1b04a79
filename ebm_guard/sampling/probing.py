"""How long a gradient with respect to pixels takes."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ebm_guard.sampling.sampler import EnergyFunction, energy_and_gradient

_ROUNDS = 3


def seconds_per_gradient(energy: EnergyFunction, pixels: Tensor) -> float:
    """Measure one gradient of a batch, as the least of three after one that is not counted.

    Args:
        energy: (B, ...) to (B,); may move the pixels to another device.
        pixels: (B, ...).

    Example:
        >>> seconds_per_gradient(lambda x: x.square().sum(dim=1), torch.ones(2, 3)) > 0
        True
    """
    taken = []
    for _ in range(_ROUNDS + 1):
        _wait()
        start = time.perf_counter()
        energy_and_gradient(energy, pixels)
        _wait()
        taken.append(time.perf_counter() - start)
    return max(min(taken[1:]), 1e-9)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
