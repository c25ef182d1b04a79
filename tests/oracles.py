"""Independent truths: slow loops written from the papers' equations, on the standard library.

Nothing here imports ebm_guard. Decimal arithmetic with 60 digits is the reference for whatever
saturates or cancels in floats.
"""

import math
import zlib
from decimal import Decimal, localcontext

import numpy as np
from hypothesis import settings
from scipy import stats

DIGITS = 60
# Shared machines stall at times; a deadline would fail a test for that.
QUICK = settings(deadline=None, max_examples=50)


def generator(*key):
    """Return a random generator that is seeded by a name, so that nobody can pick a lucky seed."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def _digits(row):
    """Digits that 1 - p needs where p is within exp(-spread) of 1."""
    return DIGITS + math.ceil((max(row) - min(row)) / math.log(10))


def _exact(row):
    return [Decimal(float(value)) for value in row]


def _logsumexp(values):
    return sum((value.exp() for value in values), Decimal(0)).ln()


def energy(logits, temperature=1.0):
    """E(x) = -T log sum_y exp(f_y / T)."""
    with localcontext(prec=DIGITS):
        t = Decimal(float(temperature))
        return np.array(
            [float(-t * _logsumexp([value / t for value in _exact(row)])) for row in logits]
        )


def log_softmax(logits, temperature=1.0):
    """log p_y = f_y / T - log sum_k exp(f_k / T)."""
    with localcontext(prec=DIGITS):
        t = Decimal(float(temperature))
        rows = []
        for row in logits:
            scaled = [value / t for value in _exact(row)]
            total = _logsumexp(scaled)
            rows.append([float(value - total) for value in scaled])
        return np.array(rows)


def log_odds(logits):
    """log((1 - p_max) / p_max) from the softmax probabilities themselves."""
    found = []
    for row in logits:
        with localcontext(prec=_digits(row)):
            weights = [value.exp() for value in _exact(row)]
            top = max(weights) / sum(weights)
            found.append(float(((1 - top) / top).ln()))
    return np.array(found)


def max_logit(logits):
    """-max_k f_k."""
    return np.array([-max(float(value) for value in row) for row in logits])


def log_gen(logits, gamma=0.1, top=100):
    """log sum over the M largest p of p^gamma (1 - p)^gamma (GEN, eq. 2, without its sign)."""
    found = []
    for row in logits:
        with localcontext(prec=_digits(row)):
            weights = [value.exp() for value in _exact(row)]
            total = sum(weights)
            kept = sorted((weight / total for weight in weights), reverse=True)[:top]
            products = [p * (1 - p) for p in kept]
        with localcontext(prec=DIGITS):
            power = Decimal(str(gamma))
            found.append(float(sum((power * item.ln()).exp() for item in products).ln()))
    return np.array(found)


def auroc(id_scores, ood_scores):
    """Count pairs; a tie is half a win."""
    wins = 0.0
    for ood in ood_scores:
        for inside in id_scores:
            wins += 1.0 if ood > inside else 0.5 if ood == inside else 0.0
    return wins / (len(id_scores) * len(ood_scores))


def _kernel(ood, inside):
    return 1.0 if ood > inside else 0.5 if ood == inside else 0.0


def delong(id_columns, ood_columns):
    """DeLong et al. 1988: AUROCs of several scores on the same rows, and their covariance.

    Args:
        id_columns: one sequence (N,) for each score.
        ood_columns: one sequence (M,) for each score.

    Returns:
        AUROCs (K,), S10 / M (the part of the OOD rows) and S01 / N (the part of the ID rows).
    """
    ood_parts, id_parts = [], []
    for inside, outside in zip(id_columns, ood_columns, strict=True):
        ood_parts.append(
            [sum(_kernel(ood, row) for row in inside) / len(inside) for ood in outside]
        )
        id_parts.append(
            [sum(_kernel(ood, row) for ood in outside) / len(outside) for row in inside]
        )
    areas = [sum(part) / len(part) for part in ood_parts]

    def covariance(parts):
        n = len(parts[0])
        return np.array(
            [
                [
                    sum((parts[r][i] - areas[r]) * (parts[s][i] - areas[s]) for i in range(n))
                    / (n - 1)
                    / n
                    for s in range(len(parts))
                ]
                for r in range(len(parts))
            ]
        )

    return np.array(areas), covariance(ood_parts), covariance(id_parts)


def average_precision(positive, negative, weight=1.0):
    """Sum over distinct cuts of precision times gained recall; positives have high scores."""
    area, before = 0.0, 0.0
    for cut in sorted({*positive, *negative}, reverse=True):
        true = sum(score >= cut for score in positive)
        false = weight * sum(score >= cut for score in negative)
        recall = true / len(positive)
        area += (recall - before) * true / (true + false)
        before = recall
    return area


def fpr95(id_scores, ood_scores):
    """Share of OOD accepted at the smallest cut that accepts 95 % of ID."""
    for cut in sorted({*id_scores, *ood_scores}):
        # 20 a >= 19 n is a / n >= 0.95 in whole numbers.
        if 20 * sum(score <= cut for score in id_scores) >= 19 * len(id_scores):
            return sum(score <= cut for score in ood_scores) / len(ood_scores)
    raise AssertionError("the largest score accepts everything")


def fpr95_ood_positive(id_scores, ood_scores):
    """Share of ID refused at the largest cut that catches 95 % of OOD."""
    for cut in sorted({*id_scores, *ood_scores}, reverse=True):
        if 20 * sum(score >= cut for score in ood_scores) >= 19 * len(ood_scores):
            return sum(score >= cut for score in id_scores) / len(id_scores)
    raise AssertionError("the smallest score catches everything")


def ece(confidence, correct, n_bins=15):
    """Loop over the bins (i/B, (i+1)/B]; 0.0 belongs to the first."""
    total = 0.0
    for index in range(n_bins):
        low, high = index / n_bins, (index + 1) / n_bins
        inside = [
            (c, float(right))
            for c, right in zip(confidence, correct, strict=True)
            if low < c <= high or (index == 0 and c == 0.0)
        ]
        if inside:
            mean_confidence = math.fsum(c for c, _ in inside) / len(inside)
            accuracy = math.fsum(right for _, right in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean_confidence)
    return total


def softmax(logits, temperature=1.0):
    """Probabilities in float64, row by row."""
    return np.exp(log_softmax(logits, temperature))


def draw_labels(logits, rng):
    """Draw one label a row from softmax(logits), by inverting the distribution function."""
    from scipy.special import softmax as scipy_softmax

    cumulative = scipy_softmax(np.asarray(logits, dtype=np.float64), axis=1).cumsum(axis=1)
    cumulative[:, -1] = 1.0
    return (rng.random(len(cumulative))[:, None] > cumulative).sum(axis=1).astype(np.int64)


def fails_guarantee(failures, trials, delta, level=1e-3):
    """Whether the exact binomial test rejects "the failure rate is at most delta"."""
    return stats.binomtest(int(failures), trials, delta, alternative="greater").pvalue < level
