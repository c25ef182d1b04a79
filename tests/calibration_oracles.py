"""Calibration metrics as slow loops from the papers' equations, and worlds with a known truth.

Nothing here imports ebm_guard.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
from scipy import optimize


def mass_bins(confidence, weights, n_bins):
    """Bins of equal mass: cut b is the smallest value v with F(v) >= b / n_bins."""
    total = sum(Fraction(w) for w in weights)
    cuts = []
    for b in range(1, n_bins):
        for value in sorted(set(confidence)):
            mass = sum(Fraction(w) for c, w in zip(confidence, weights, strict=True) if c <= value)
            if mass >= Fraction(b, n_bins) * total:
                cuts.append(value)
                break
    return [sum(cut < c for cut in cuts) for c in confidence]


def ece_of_bins(confidence, correct, bins, weights):
    """sum_b |sum_{i in b} w_i (conf_i - correct_i)| / sum_i w_i."""
    total = 0.0
    for b in set(bins):
        inside = [i for i, bin_ in enumerate(bins) if bin_ == b]
        total += abs(math.fsum(weights[i] * (confidence[i] - correct[i]) for i in inside))
    return total / math.fsum(weights)


def debiased_l2(confidence, correct, bins):
    """Kumar et al. 2019: mean squared gap minus its own sampling variance, bin by bin."""
    members = [[i for i, bin_ in enumerate(bins) if bin_ == b] for b in set(bins)]
    members = [inside for inside in members if len(inside) > 1]
    n, total = sum(map(len, members)), 0.0
    for inside in members:
        gaps = [confidence[i] - correct[i] for i in inside]
        mean = math.fsum(gaps) / len(gaps)
        variance = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
        total += len(gaps) / n * (mean**2 - variance / len(gaps))
    return math.sqrt(max(total, 0.0)) if members else math.nan


def mce(confidence, correct, bins, min_count):
    """Largest |mean gap| of the bins with enough rows."""
    found = []
    for b in set(bins):
        gaps = [c - y for c, y, bin_ in zip(confidence, correct, bins, strict=True) if bin_ == b]
        if len(gaps) >= min_count:
            found.append(abs(math.fsum(gaps) / len(gaps)))
    return max(found, default=math.nan)


def aurc(confidence, correct, weights):
    """Weighted mean over rows i of the risk of {j: conf_j >= conf_i}."""
    total = 0.0
    for c, w in zip(confidence, weights, strict=True):
        kept = [j for j, other in enumerate(confidence) if other >= c]
        covered = math.fsum(weights[j] for j in kept)
        wrong = math.fsum(weights[j] for j in kept if not correct[j])
        total += w * wrong / covered if covered else 0.0
    return total / math.fsum(weights)


def best_aurc(correct):
    """AURC when confidence puts every right row before every wrong one, without ties."""
    ranking = sorted(correct, reverse=True)
    return aurc(list(range(len(ranking), 0, -1)), ranking, [1.0] * len(ranking))


def smooth_error(confidence, gaps, width, points=4001):
    """Integral over [0, 1] of |mean_i K(t, conf_i) gap_i|, K the Gaussian reflected at 0 and 1."""
    t = np.linspace(0, 1, points)
    smoothed = np.zeros(points)
    for c, gap in zip(confidence, gaps, strict=True):
        for shift in range(-4, 5):
            for image in (2 * shift + c, 2 * shift - c):
                smoothed += gap * np.exp(-0.5 * ((t - image) / width) ** 2)
    smoothed /= width * math.sqrt(2 * math.pi) * len(gaps)
    return float(np.trapezoid(np.abs(smoothed), t))


def smooth_ece(confidence, correct):
    """The width at which the smooth error equals the width."""
    gaps = [c - y for c, y in zip(confidence, correct, strict=True)]
    return optimize.brentq(lambda s: smooth_error(confidence, gaps, s) - s, 2e-3, 1, xtol=1e-10)


def poisson_binomial(chances):
    """P(X = k) of a sum of Bernoulli variables, over all outcomes."""
    masses = [0.0] * (len(chances) + 1)
    for outcome in itertools.product([0, 1], repeat=len(chances)):
        terms = [p if hit else 1 - p for p, hit in zip(chances, outcome, strict=True)]
        masses[sum(outcome)] += math.prod(terms)
    return masses


WORLDS = (
    "perfect",
    "over by 1 point",
    "over by 2 points",
    "over by 5 points",
    "under",
    "wave",
    "error in one bin",
    "spike at 1.0",
    "large error",
)


def world(name, n, rng):
    """Draw confidences (n,) and the true accuracy at each (n,)."""
    c = 0.1 + 0.9 * rng.beta(6, 1.2, n)
    if name.startswith("over by"):
        return c, np.clip(c - int(name.split()[2]) / 100, 0, 1)
    if name == "under":
        return c, c + 0.16 * c * (1 - c)
    if name == "wave":
        return c, np.clip(c + 0.06 * np.sin(25 * c), 0, 1)
    if name == "error in one bin":
        return c, np.where((c > 12 / 15) & (c <= 13 / 15), c - 0.2, c)
    if name == "spike at 1.0":
        at_one = rng.random(n) < 0.3
        return np.where(at_one, 1.0, c), np.where(at_one, 0.97, c)
    return (c, 0.75 * c) if name == "large error" else (c, c)


def truths(name, n_bins=15, n=400_000):
    """What the metrics are in a world, from its true accuracies at many confidences."""
    rng = np.random.default_rng(1)
    c, a = world(name, n, rng)
    order = np.argsort(c, kind="stable")
    c, a = c[order], a[order]
    gap = c - a
    where = np.clip(np.ceil(c * n_bins).astype(int) - 1, 0, n_bins - 1)
    rank = np.searchsorted(c, c) * n_bins // n
    sums, counts = np.bincount(rank, gap), np.bincount(rank)
    recalibrated = optimize.isotonic_regression(a).x
    from_top = np.arange(n, 0, -1)
    risk = np.cumsum((1 - a)[::-1])[::-1] / from_top
    return {
        "ece": np.abs(np.bincount(where, gap)).sum() / n,
        "ece_adaptive": np.abs(sums).sum() / n,
        "ece_l2_debiased": math.sqrt((sums**2 / np.maximum(counts, 1)).sum() / n),
        "smooth_ece": _smooth_truth(c, gap),
        "miscalibration": np.mean(gap**2) - np.mean((recalibrated - a) ** 2),
        # Ties share the risk of their whole group, which the first of them has.
        "aurc": float(risk[np.searchsorted(c, c)].mean()),
    }


def _smooth_truth(c, gap, cells=1000):
    """The fixed point from 1,000 points of mass."""
    where = np.minimum((c * cells).astype(int), cells)
    mass = np.bincount(where, gap, minlength=cells + 1) / len(c)
    points = np.append((np.arange(cells) + 0.5) / cells, 1.0)
    t = np.linspace(0, 1, 1001)

    def error(width):
        images = [2 * k + sign * points for k in (-1, 0, 1) for sign in (1, -1)]
        kernel = sum(np.exp(-0.5 * ((t[:, None] - at) / width) ** 2) for at in images)
        return np.trapezoid(np.abs(kernel @ mass), t) / (width * math.sqrt(2 * math.pi))

    if error(2e-3) <= 2e-3:
        return 0.0
    return optimize.brentq(lambda s: error(s) - s, 2e-3, 1, xtol=1e-4)
