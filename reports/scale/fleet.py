"""Many drift monitors at once: the wealth of R replicas that share one reference, as arrays.

The same numbers as R objects of ``ebm_guard.gate.DriftMonitor`` (tests/test_merging_fleet.py), some
hundred times faster, for continuous scores within one epoch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ebm_guard.gate.drift.martingale import bets

Floats = NDArray[np.float64]
CAPITAL = 0.5  # of the first epoch, 1 / (1 * 2)
JUMP = 0.01
CHUNK = 100  # replicas whose scores are compared at once


def p_values(reference: Floats, scores: Floats, draws: Floats) -> tuple[Floats, Floats]:
    """Return p and 1 - p of each replica's own online ranks.

    Args:
        reference: (n,), shared by all.
        scores: (R, T), a row for each replica.
        draws: (T,) or (R, T) uniform, what breaks ties with oneself.
    """
    held = np.sort(reference)
    below = held.searchsorted(scores).astype(np.float64)
    earlier = np.tri(scores.shape[1], k=-1, dtype=bool)
    for start in range(0, len(scores), CHUNK):
        part = scores[start : start + CHUNK]
        below[start : start + CHUNK] += ((part[:, None, :] < part[:, :, None]) & earlier).sum(2)
    before = len(held) + np.arange(scores.shape[1])
    return (before - below + draws) / (before + 1), (below + 1 - draws) / (before + 1)


def wealth(p: Floats, q: Floats) -> Floats:
    """Return the wealth (R, T) after each p-value, as ``Bettor`` computes it."""
    replicas, steps = p.shape
    factors = bets(p.ravel(), q.ravel()).reshape(replicas, steps, -1)
    kinds = factors.shape[2]
    reserve = CAPITAL / (1.0 + np.arange(steps + 1)) ** 0.25
    stakes = np.zeros((replicas, kinds))
    found = np.empty((replicas, steps))
    for step in range(steps):
        given = reserve[step] - reserve[step + 1] + JUMP * stakes.sum(axis=1, keepdims=True)
        stakes = (stakes * (1 - JUMP) + given / kinds) * factors[:, step]
        found[:, step] = reserve[step + 1] + stakes.sum(axis=1)
    return found


def play(reference: Floats, scores: Floats, generator: np.random.Generator) -> Floats:
    """Return the wealth (R, T) of replicas that all draw with one seed, as servers do."""
    draws = np.maximum(generator.random(scores.shape[1]), 2.0**-54)
    return wealth(*p_values(reference, scores, draws))
