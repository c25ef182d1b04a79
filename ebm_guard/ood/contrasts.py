"""Differences between scores on the same rows, with intervals that hold for all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import LEVEL, Array, Metric
from ebm_guard.ood.metrics import placements

_DRAWS = 20_000
Floats = NDArray[np.float64]


def auroc_contrasts(
    id_scores: Mapping[str, Array],
    ood_scores: Mapping[str, Sequence[Array]],
    against: str,
    seed: int = 0,
) -> dict[str, Metric]:
    """Compare the mean AUROC of every score with that of one, simultaneously.

    With DeLong's placements of each score on the same rows, the differences d_j have the estimated
    covariance S. The intervals d_j -+ c sqrt(S_jj) take c as the 95 % quantile of max_j |Z_j| with
    Z normal of the correlation of S, so that all of them hold together in 95 % of cases: choosing
    the best score afterwards is allowed. Bonferroni's c is larger, the more so the more alike the
    scores are.

    Args:
        id_scores: by score, (N,) values of the same ID rows.
        ood_scores: by score, the values of the same OOD sets in the same order.
        against: the score that is subtracted.
        seed: of the simulation of c.

    Returns:
        By score, all but ``against``: its mean AUROC over the sets minus that of ``against``.

    Raises:
        InvalidInputError: ``against`` is unknown, or there is no other score or no set.

    References:
        DeLong et al., Biometrics 1988; max-t: Hothorn, Bretz and Westfall, Biometrical J. 2008.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> ids, oods = rng.normal(size=200), rng.normal(1, 1, size=150)
        >>> found = auroc_contrasts({"a": ids, "b": -ids}, {"a": [oods], "b": [-oods]}, "a")
        >>> found["b"].high < 0
        True
    """
    rivals = [name for name in id_scores if name != against]
    if against not in id_scores or not rivals or not ood_scores[against]:
        raise InvalidInputError(
            f"got scores {', '.join(id_scores) or 'none'} to compare with {against!r}; needed it, "
            "another score, and at least one OOD set"
        )
    sets = range(len(ood_scores[against]))
    parts = {
        name: [placements(id_scores[name], ood_scores[name][at]) for at in sets]
        for name in id_scores
    }
    base = parts[against]
    # The ID rows are the same for every set, so their parts are averaged before the covariance.
    id_parts = np.stack(
        [np.mean([parts[name][at][0] - base[at][0] for at in sets], axis=0) for name in rivals]
    )
    covariance = _covariance_of_mean(id_parts)
    values = np.zeros(len(rivals))
    for at in sets:
        rows = np.stack([parts[name][at][1] - base[at][1] for name in rivals])
        values += rows.mean(axis=1) / len(sets)
        covariance += _covariance_of_mean(rows) / len(sets) ** 2
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    critical = max_t(covariance, seed)
    n = len(id_scores[against]) + sum(len(part) for part in ood_scores[against])
    method = "paired DeLong" + (f", max-t over {len(rivals)}" if len(rivals) > 1 else "")
    return {
        name: Metric(float(value), float(value - half), float(value + half), n, method)
        for name, value, half in zip(rivals, values, critical * deviation, strict=True)
    }


def max_t(covariance: Floats, seed: int = 0) -> float:
    """Return the 95 % quantile of max_j |Z_j|, Z normal with the correlation of ``covariance``.

    Example:
        >>> 1.9 < max_t(np.eye(1)) < 2.0 < max_t(np.eye(2))
        True
    """
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    moving = deviation > 0
    if not moving.any():
        return 0.0
    scaled = covariance[np.ix_(moving, moving)] / np.outer(deviation[moving], deviation[moving])
    values, vectors = np.linalg.eigh(scaled)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    draws = np.random.default_rng(seed).standard_normal((_DRAWS, len(scaled))) @ root.T
    return float(np.quantile(np.abs(draws).max(axis=1), LEVEL))


def _covariance_of_mean(rows: Floats) -> Floats:
    """Return the covariance (J, J) of the means of rows (J, N)."""
    if rows.shape[1] < 2:
        return np.zeros((len(rows), len(rows)))
    return np.asarray(np.atleast_2d(np.cov(rows)) / rows.shape[1], dtype=np.float64)
