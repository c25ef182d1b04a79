"""Free energy over prototypes: the index of the nearest one is a latent variable, summed out."""

from __future__ import annotations

import math
import warnings
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.ood.feature_scores.base import FeatureScore, Rows, unit
from ebm_guard.ood.feature_scores.sample import BalancedSample
from ebm_guard.predictions import Predictions

# Bounds that keep a fit within seconds: prototypes in all, and rows that judge beta.
_MOST_PROTOTYPES = 1024
_MOST_HELD_OUT = 1000
# A prototype stands for at least this many rows.
_ROWS_EACH = 5
# One row in this many is held out to choose beta.
_HELD_OUT = 5
_GRID = 33
# A squared distance of this share of the features' squared length is rounding of float32 features.
_ROUNDING = 1e-13


def free_energy(squared: Tensor, beta: float) -> Tensor:
    """Compute F_beta = -(1/beta) log sum_k exp(-beta d_k), the soft minimum over prototypes.

    beta -> inf gives min_k d_k; for K prototypes min d - log(K)/beta <= F_beta <= min d.

    Args:
        squared: (B, K), squared distances d_k >= 0.
        beta: inverse temperature > 0; ``math.inf`` gives the minimum itself.

    Returns:
        (B,).

    References:
        LeCun, Chopra, Hadsell, Ranzato and Huang, A Tutorial on Energy-Based Learning, 2006 (the
        free energy of a latent variable).

    Example:
        >>> free_energy(torch.tensor([[1.0, 1.0]]), 1.0)
        tensor([0.3069])
        >>> free_energy(torch.tensor([[1.0, 2.0]]), math.inf)
        tensor([1.])
    """
    if math.isinf(beta):
        return squared.amin(dim=1)
    return -torch.logsumexp(-beta * squared, dim=1) / beta


def log_density(squared: Tensor, beta: float, width: int) -> Tensor:
    """Compute log p(h) = -beta F_beta(h) + (D/2) log(beta/pi) - log K.

    The density of K equally likely Gaussians with covariance I/(2 beta): exp(-beta |h - w|^2)
    integrates to (pi/beta)^(D/2).

    Args:
        squared: (B, K), squared distances to the prototypes.
        beta: finite inverse temperature > 0.
        width: D.

    Returns:
        (B,), nats.

    Example:
        >>> log_density(torch.zeros(1, 1), math.pi, 3)
        tensor([0.])
    """
    normaliser = width / 2 * math.log(beta / math.pi) - math.log(squared.shape[1])
    return normaliser - beta * free_energy(squared, beta)


def likelihood_beta(squared: Tensor, width: int) -> float:
    """Find the beta of the highest mean :func:`log_density` on held-out rows.

    Where the slope is zero, beta = D / (2 mean_i sum_k r_ik d_ik) with the responsibilities
    r_ik = softmax_k(-beta d_ik), so beta lies in [D / (2 mean d), D / (2 mean_i min_k d)]: a grid
    over this range in log beta, and Brent's method around the best point.

    Args:
        squared: (N, K), squared distances of held-out rows.
        width: D.

    Raises:
        DataError: all rows lie on prototypes, so the likelihood has no maximum.

    Example:
        >>> likelihood_beta(torch.tensor([[1.0], [3.0]]).double(), 8)
        2.0
    """
    from scipy.optimize import minimize_scalar

    nearest = float(squared.amin(dim=1).mean())
    if not nearest > 0:
        raise DataError(
            "beta has no best value: all held-out features lie on a prototype (equal rows?). Give "
            "a number for beta, or rows that differ"
        )
    low, high = (math.log(width / 2 / gap) for gap in (float(squared.mean()), nearest))
    if high - low < 1e-12:
        return math.exp(high)

    def loss(log_beta: float) -> float:
        return -float(log_density(squared, math.exp(log_beta), width).mean())

    step = (high - low) / (_GRID - 1)
    best = min((low + place * step for place in range(_GRID)), key=loss)
    around = (max(low, best - step), min(high, best + step))
    found = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-9})
    return math.exp(min(best, float(found.x), key=loss))


class KMeansEnergy(FeatureScore):
    """Score by the free energy of the features over k-means prototypes.

    s(x) = F_beta(h) = -(1/beta) log sum_k exp(-beta ||h - w_k||^2), with prototypes w_k found by
    k-means in each class (label, or predicted class where there are no labels) or in all rows
    together. The index k is a latent variable: beta = inf takes the best one (the k-means energy
    min_k ||h - w_k||^2), a finite beta sums them out.

    The fit keeps a class-balanced sample of at most ``sample_size`` rows. For
    ``beta="likelihood"`` every fifth of these is held out from k-means, and beta maximises the
    mean log-density (D/2) log(beta/pi) - log K - beta F_beta(h) on (at most 1,000 of) them. There
    are at most 1,024 prototypes, and at least 5 rows for each.

    Args:
        beta: ``"likelihood"``, ``"inf"`` (or ``math.inf``), or a number > 0.
        prototypes: k-means centres per class; with ``per_class=False`` as many in all as this
            gives for the classes seen.
        per_class: run k-means in each class by itself.
        normalize: scale features to length 1 first.
        sample_size: most rows kept for the fit.
        seed: of the sample and of k-means.

    References:
        LeCun et al., A Tutorial on Energy-Based Learning, 2006 (latent variables, and k-means as
        an energy); scikit-learn's KMeans (k-means++, the best of four starts).

    Example:
        >>> import numpy as np
        >>> labels = np.arange(200) % 2
        >>> features = np.random.default_rng(0).normal(size=(200, 3)) + 9 * labels[:, None]
        >>> rows = Predictions(features[:, :2], features=features, labels=labels)
        >>> score = KMeansEnergy(prototypes=1, normalize=False).fit(rows)
        >>> 0.4 < score.settings()["fit"]["beta"] < 0.6  # the variance is 1 = 1/(2 beta)
        True
        >>> near, between = score.score(torch.zeros(2, 2), torch.tensor([[9.0] * 3, [4.5] * 3]))
        >>> bool(near < 1), bool(between > 50)
        (True, True)
    """

    name = "kmeans_energy"
    from_probabilities = True
    tensors = ("origin", "centres", "lengths")
    origin: Tensor
    centres: Tensor
    lengths: Tensor

    def __init__(
        self,
        beta: str | float = "likelihood",
        prototypes: int = 4,
        per_class: bool = True,
        normalize: bool = True,
        sample_size: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.beta = _checked_beta(beta)
        for setting, value, least in (
            ("prototypes", prototypes, 1),
            ("sample_size", sample_size, _ROWS_EACH),
            ("seed", seed, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidInputError(
                    f"got {setting}={value!r}; needed a whole number >= {least}"
                )
        self.prototypes, self.per_class, self.normalize = prototypes, per_class, normalize
        self.sample_size, self.seed = sample_size, seed

    def options(self) -> dict[str, Any]:
        """Return beta, the number of prototypes, how they are found, and the seed."""
        return {
            "beta": self.beta,
            "prototypes": self.prototypes,
            "per_class": self.per_class,
            "normalize": self.normalize,
            "sample_size": self.sample_size,
            "seed": self.seed,
        }

    def _reset(self) -> None:
        super()._reset()
        self._sample: BalancedSample | None = None
        self._fit: dict[str, Any] = {}

    def _require_sample(self) -> BalancedSample:
        if self._sample is None:
            self._sample = BalancedSample(self.sample_size, self.seed)
        return self._sample

    def _add(self, rows: Rows) -> None:
        points = self._points(rows.features).float()
        self._require_sample().add(points, rows.classes, rows.hashes)

    def _join(self, other: Self) -> None:
        self._require_sample().join(other._require_sample())

    def _finish(self, parts: tuple[Predictions, ...]) -> dict[str, Tensor]:
        values, classes = _in_order(*self._require_sample().rows())
        values = values.double()
        held = torch.zeros(len(values), dtype=torch.bool)
        if self.beta == "likelihood":
            # The rows are in order of class: every class gives its share.
            held[_HELD_OUT - 1 :: _HELD_OUT] = True
        kept = values[~held]
        origin = kept.mean(dim=0)
        centres = self._centres(kept - origin, classes[~held])
        found = {
            "origin": origin,
            "centres": centres,
            "lengths": centres.square().sum(dim=1),
        }
        beta = self.beta
        if beta == "likelihood":
            judged = values[held]
            judged = judged[:: math.ceil(len(judged) / _MOST_HELD_OUT)] - origin
            squared = _squared(judged, centres, found["lengths"])
            rounding = _ROUNDING * float(values.square().sum(dim=1).mean())
            beta = likelihood_beta(squared.where(squared > rounding, 0), self._width)
        self._fit = {
            "beta": beta,
            "prototypes": len(centres),
            "rows_clustered": len(kept),
            "rows_held_out": int(held.sum()),
        }
        return found

    def _found(self) -> dict[str, Any]:
        return self._fit

    def _score(self, logits: Tensor, features: Tensor) -> Tensor:
        centred = self._points(features) - self.origin
        squared = _squared(centred, self.centres, self.lengths)
        return free_energy(squared, float((self._facts or {})["beta"]))

    def _points(self, features: Tensor) -> Tensor:
        features = features.double()
        return unit(features) if self.normalize else features

    def _centres(self, values: Tensor, classes: Tensor) -> Tensor:
        """Return the prototypes (K, D) of centred rows (N, D)."""
        names = torch.unique(classes)
        most = max(1, _MOST_PROTOTYPES // len(names))
        each = min(self.prototypes, most)
        if not self.per_class:
            wanted = min(self.prototypes * len(names), _MOST_PROTOTYPES)
            return _kmeans(values, wanted, self.seed)
        return torch.cat([_kmeans(values[classes == name], each, self.seed) for name in names])


def _in_order(values: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Order rows by class and then by value: k-means and beta hang on the order.

    The sample comes in the order of the rows' hashes, which differ where the same features are
    read from images and from stored logits.
    """
    order = np.lexsort((*values.T.numpy()[::-1], classes.numpy()))
    return values[order], classes[order]


def _kmeans(values: Tensor, wanted: int, seed: int) -> Tensor:
    """Return at most ``wanted`` different centres of rows (N, D), each of 5 rows or more."""
    count = max(1, min(wanted, len(values) // _ROWS_EACH))
    if count == 1:
        return values.mean(dim=0, keepdim=True)
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # Threads add up in an order of their own; one of them gives the same centres every time.
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than centres
        found = KMeans(count, n_init=4, random_state=seed).fit(values.numpy())
    centres: Tensor = torch.unique(torch.from_numpy(found.cluster_centers_).double(), dim=0)
    return centres


def _squared(centred: Tensor, centres: Tensor, lengths: Tensor) -> Tensor:
    """Return the squared distances (B, K) of rows (B, D) to centres (K, D)."""
    own = centred.square().sum(dim=1, keepdim=True)
    return (torch.addmm(lengths, centred, centres.T, alpha=-2.0) + own).clamp_min(0)


def _checked_beta(beta: str | float) -> str | float:
    if isinstance(beta, (str, float)) and beta in ("likelihood", "inf", math.inf):
        return "inf" if beta == math.inf else beta
    if isinstance(beta, (int, float)) and not isinstance(beta, bool) and 0 < beta < math.inf:
        return float(beta)
    raise InvalidInputError(
        f"got beta {beta!r}; needed 'likelihood', 'inf', or a number greater than 0"
    )
