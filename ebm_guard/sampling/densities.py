"""Densities that are known exactly and drawn from directly: the noise and the base of NCE and AIS.

Everything is computed in float64: differences of log densities are what logistic losses and
importance weights are made of.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ebm_guard.errors import DataError, InvalidInputError

# Smallest standard deviation within the classes, as a share of the feature's own over all rows: a
# feature that its class settles would make a covariance singular. Features that never change (dead
# units) have no spread of their own, and take this share of the typical one.
_LEAST_SHARE = 0.01
# Spread that rounding leaves on a feature that never changes, as a share of its size.
_ROUNDING = 1e-6
# Weights that are this near to a sum of 1 are taken as they are: a stored density stays the same.
_UNIT = 1e-12
# Smallest standard deviation of a pixel: that of a mixture's component must cover its neighbours.
_LEAST_PIXEL_STD = 0.05


class KnownDensity(ABC):
    """A normalised density q(x) on points (N, ...), with exact draws.

    Attributes:
        name: in files and settings.
        box: (low, high) that holds all points, or None.
    """

    name: str = ""
    box: tuple[float, float] | None = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one point."""

    @property
    def dim(self) -> int:
        """Number D of values of one point."""
        return math.prod(self.shape)

    @abstractmethod
    def log_density(self, points: Tensor) -> Tensor:
        """Compute log q(x) in nats, (N,) float64, differentiable; -inf outside of the box."""

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points, (n, ...) float64, on the device of the generator."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return its tensors."""

    def settings(self) -> dict[str, Any]:
        """Return what it is, as JSON types."""
        return {"density": self.name, "dim": self.dim}


class GaussianMixture(KnownDensity):
    """Mix Gaussians that share one covariance: q(h) = sum_k w_k N(h; m_k, S), S = L L'.

    Args:
        weights: (K,), > 0; they are divided by their sum where it is not 1.
        means: (K, D).
        scale_tril: L (D, D), lower triangular with a positive diagonal, zeros above it.

    Raises:
        InvalidInputError: shapes that do not fit, or values that make no density.

    Example:
        >>> normal = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2))
        >>> round(float(normal.log_density(torch.zeros(1, 2))), 4)  # -log 2 pi
        -1.8379
    """

    name = "gaussian_mixture"

    def __init__(self, weights: Tensor, means: Tensor, scale_tril: Tensor) -> None:
        weights, means, scale_tril = (part.double() for part in (weights, means, scale_tril))
        _check_mixture(weights, means)
        fits = scale_tril.shape == (means.shape[1],) * 2 and bool(torch.isfinite(scale_tril).all())
        lower = fits and torch.equal(scale_tril, scale_tril.tril())
        if not lower or not bool((scale_tril.diagonal() > 0).all()):
            raise InvalidInputError(
                f"got scale_tril {tuple(scale_tril.shape)} for means {tuple(means.shape)}; needed "
                "a finite lower triangle (D, D), zeros above its diagonal, and a positive diagonal"
            )
        self.weights, self.means, self.scale_tril = _shares(weights), means, scale_tril

    @classmethod
    def fit(
        cls,
        points: Tensor,
        labels: Tensor,
        *,
        components: str = "classes",
        counts: Tensor | None = None,
    ) -> Self:
        """Fit means and the covariance within the classes, shrunk as Ledoit and Wolf propose.

        S = sum_i (h_i - m_y)(h_i - m_y)' / (N - K), without bias, before it is shrunk.

        Args:
            points: (N, D).
            labels: (N,) classes; rows with -1 have none and are left out.
            components: ``classes``: one Gaussian for each class; ``one``: a single one at their
                common mean, as wide as a class.
            counts: (C,) how often each class occurs where the rows were drawn class by class; the
                weights of the classes are their shares. Default: as often as among the rows.

        Raises:
            InvalidInputError: no more labelled rows than classes, or values that are not finite.

        References:
            Ledoit and Wolf, A Well-Conditioned Estimator for Large-Dimensional Covariance
            Matrices, 2004 (scikit-learn's). Differs: values are standardised before it, so that
            no feature's unit decides. A feature's standard deviation is at least 1 % of its own
            over all rows; one that never changes is taken to be independent, with 1 % of the
            typical spread.
        """
        from sklearn.covariance import ledoit_wolf

        rows, present, own = _labelled(points, labels)
        if len(rows) <= len(present):
            raise InvalidInputError(
                f"got {len(rows)} labelled points of {len(present)} classes; needed more points "
                "than classes for the spread within them"
            )
        numbers = torch.bincount(own).double()
        means = rows.new_zeros(len(present), rows.shape[1]).index_add_(0, own, rows)
        means = means / numbers[:, None]
        weights = numbers if counts is None else counts.double().cpu()[present]
        centred = rows - means[own]
        plain = centred.square().mean(dim=0).sqrt()
        live, least = _floors(rows, plain)
        shrunk = torch.eye(len(plain), dtype=torch.float64)
        if bool(live.any()):
            standard = (centred / plain)[:, live].numpy()
            found = torch.from_numpy(ledoit_wolf(standard, assume_centered=True)[0])
            shrunk[live.nonzero(), live.nonzero().T] = found
        spread = (plain * math.sqrt(len(rows) / (len(rows) - len(present)))).maximum(least)
        scale = spread[:, None] * torch.linalg.cholesky(shrunk)
        if components == "one":
            return cls(torch.ones(1), _shares(weights)[None] @ means, scale)
        return cls(weights, means, scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.means.shape[1],)

    def log_density(self, points: Tensor) -> Tensor:
        """Compute log q(h), (N,) float64, for points (N, D)."""
        scale, means = self.scale_tril.to(points.device), self.means.to(points.device)
        middle = means.mean(dim=0)
        # One product of matrices for all components; around the middle, so that little cancels.
        rows = _whitened(points.double() - middle, scale)
        centres = _whitened(means - middle, scale)
        squares = rows.square().sum(1, keepdim=True) + centres.square().sum(1)
        distances = squares - 2 * rows @ centres.T
        size = self.dim * math.log(2 * math.pi) / 2 + scale.diagonal().log().sum()
        logs = self.weights.to(points.device).log() - distances / 2
        return torch.logsumexp(logs, dim=1) - size

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points, (n, D) float64."""
        place = generator.device
        chosen = torch.multinomial(self.weights.to(place), n, replacement=True, generator=generator)
        normal = torch.randn(n, self.dim, generator=generator, device=place, dtype=torch.float64)
        return self.means.to(place)[chosen] + normal @ self.scale_tril.to(place).T

    def whitened(self) -> GaussianMixture:
        """Return the density of z with h = L z: components N(L^-1 m_k, I)."""
        eye = torch.eye(self.dim, dtype=torch.float64)
        return GaussianMixture(self.weights, _whitened(self.means, self.scale_tril), eye)

    def tilted(self, weight: Tensor, bias: Tensor) -> tuple[float, GaussianMixture]:
        """Normalise q(h) sum_j exp(u_j h + b_j) in closed form: a linear head's exp(-E(h)).

        log Z = logsumexp over j, k of log w_k + b_j + u_j m_k + u_j S u_j / 2, and the tilted
        density is the mixture of N(m_k + S u_j, S) with these terms as its log weights.

        Args:
            weight: u (C, D).
            bias: b (C,).

        Returns:
            log Z, and the density: K C components.
        """
        weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
        turned = weight @ self.scale_tril
        logs = bias[:, None] + weight @ self.means.T + turned.square().sum(1, keepdim=True) / 2
        logs = logs + self.weights.log()
        means = self.means + (turned @ self.scale_tril.T)[:, None]
        log_z = torch.logsumexp(logs.flatten(), dim=0)
        shares = (logs.flatten() - log_z).exp()
        # Components that no draw would ever come from carry weights that underflow.
        kept = shares > 0
        mixture = GaussianMixture(shares[kept], means.flatten(0, 1)[kept], self.scale_tril)
        return float(log_z), mixture

    def state_dict(self) -> dict[str, Tensor]:
        """Return weights, means and the triangle of the covariance."""
        return {
            "weights": self.weights.clone(),
            "means": self.means.clone(),
            "scale_tril": self.scale_tril.clone(),
        }


class TruncatedNormalMixture(KnownDensity):
    """Mix products of normals cut off at the edges of [0, 1]: a density on a box of pixels.

    q(x) = sum_k w_k prod_d N(x_d; m_kd, s_kd) / (Phi((1 - m_kd)/s_kd) - Phi(-m_kd/s_kd)) inside
    the box, 0 outside. Pixels are independent given the component.

    Args:
        weights: (K,), > 0; they are divided by their sum where it is not 1.
        means: (K, ...), in [0, 1].
        stds: (K, ...), > 0.

    Raises:
        InvalidInputError: shapes that do not fit, means outside [0, 1], or stds not above 0.

    Example:
        >>> flat = TruncatedNormalMixture(torch.ones(1), torch.full((1, 2), 0.5),
        ...                               torch.full((1, 2), 1e3))
        >>> abs(float(flat.log_density(torch.rand(1, 2)))) < 1e-5  # nearly uniform
        True
    """

    name = "truncated_normal_mixture"
    box = (0.0, 1.0)

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor) -> None:
        weights, means, stds = (part.double() for part in (weights, means, stds))
        _check_mixture(weights, means)
        inside = bool(((means >= 0) & (means <= 1)).all())
        wide = stds.shape == means.shape and bool(((stds > 0) & torch.isfinite(stds)).all())
        if not wide or not inside:
            raise InvalidInputError(
                f"got means {tuple(means.shape)} and stds {tuple(stds.shape)}; needed means in "
                "[0, 1] and stds above 0, of one shape (K, ...)"
            )
        self.weights, self.means, self.stds = _shares(weights), means, stds

    @classmethod
    def fit(cls, points: Tensor, labels: Tensor, *, counts: Tensor | None = None) -> Self:
        """Fit mean and standard deviation of each pixel of each class.

        The moments are those of the rows, not of the cut-off normals: what counts for noise is
        that its density is known, not that it is the best of its kind.

        Args:
            points: (N, ...) in [0, 1].
            labels: (N,) classes; rows with -1 have none and are left out.
            counts: (C,) how often each class occurs; default: as often as among the rows.

        Raises:
            InvalidInputError: no labelled row, or values outside [0, 1].
        """
        rows, present, own = _labelled(points, labels)
        if not len(rows) or not bool(((rows >= 0) & (rows <= 1)).all()):
            raise InvalidInputError(
                f"got {len(rows)} labelled points; needed one or more, with values in [0, 1]"
            )
        parts = [rows[own == number] for number in range(len(present))]
        stds = torch.stack([part.std(dim=0, correction=0) for part in parts])
        return cls(
            torch.bincount(own) if counts is None else counts.cpu()[present],
            torch.stack([part.mean(dim=0) for part in parts]),
            stds.clamp(min=_LEAST_PIXEL_STD),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one point, such as (C, H, W)."""
        return tuple(self.means.shape[1:])

    def log_density(self, points: Tensor) -> Tensor:
        """Compute log q(x), (N,) float64; -inf outside of the box."""
        values = points.double()
        logs = []
        # One component at a time: all of them at once are N K D values.
        means, stds = self.means.to(values.device), self.stds.to(values.device)
        for weight, mean, std in zip(self.weights, means, stds, strict=True):
            low, high = _masses(mean, std)
            squares = ((values - mean) / std).square() + math.log(2 * math.pi)
            each = -squares / 2 - std.log() - (high - low).log()
            logs.append(each.flatten(1).sum(dim=1) + weight.log().to(values.device))
        inside = ((values >= 0) & (values <= 1)).flatten(1).all(dim=1)
        return torch.logsumexp(torch.stack(logs), dim=0).masked_fill(~inside, -math.inf)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points, (n, ...) float64, by the inverse of the distribution function."""
        place = generator.device
        chosen = torch.multinomial(self.weights.to(place), n, replacement=True, generator=generator)
        means, stds = self.means.to(place)[chosen], self.stds.to(place)[chosen]
        low, high = _masses(means, stds)
        uniform = torch.rand(low.shape, generator=generator, device=place, dtype=torch.float64)
        drawn: Tensor = means + stds * torch.special.ndtri(low + uniform * (high - low))
        return drawn.clamp(0, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return weights, means and standard deviations."""
        return {
            "weights": self.weights.clone(),
            "means": self.means.clone(),
            "stds": self.stds.clone(),
        }


def density_from_state(name: str, state: Mapping[str, Tensor]) -> KnownDensity:
    """Build a density from its name and tensors.

    Raises:
        DataError: no density of this name, or tensors that make none.

    Example:
        >>> state = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)).state_dict()
        >>> density_from_state("gaussian_mixture", state).dim
        2
    """
    made: dict[str, type[GaussianMixture] | type[TruncatedNormalMixture]] = {
        kind.name: kind for kind in (GaussianMixture, TruncatedNormalMixture)
    }
    if name not in made:
        raise DataError(f"got the state of a density {name!r}; known are {', '.join(made)}")
    try:
        return made[name](**state)
    except (TypeError, InvalidInputError) as error:
        raise DataError(f"the state of this {name} is damaged: {error}") from None


def _labelled(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows with a label, the classes that occur, and each row's place among these."""
    kept = labels >= 0
    rows, classes = points[kept].detach().double().cpu(), labels[kept].cpu()
    if points.ndim < 2 or not bool(torch.isfinite(rows).all()):
        raise InvalidInputError(
            f"got {len(rows)} labelled points of shape {tuple(points.shape)}; needed finite ones "
            "(N, ...)"
        )
    present, own = torch.unique(classes, return_inverse=True)
    return rows, present, own


def _floors(rows: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """Return which features' spread within the classes counts, and the least spread of each."""
    total = rows.std(dim=0, correction=0)
    dead = total <= _ROUNDING * rows.square().mean(dim=0).sqrt()
    typical = float(plain.square().mean().sqrt()) or 1.0
    least = _LEAST_SHARE * torch.where(dead, torch.full_like(total, typical), total)
    return (plain > least) & ~dead, least


def _shares(weights: Tensor) -> Tensor:
    total = weights.sum()
    return weights if abs(float(total) - 1) <= _UNIT else weights / total


def _masses(means: Tensor, stds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normal's distribution function at both ends of [0, 1]."""
    return torch.special.ndtr(-means / stds), torch.special.ndtr((1 - means) / stds)


def _whitened(rows: Tensor, scale_tril: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(scale_tril, rows.T, upper=False)
    return solved.T


def _check_mixture(weights: Tensor, means: Tensor) -> None:
    fine = weights.ndim == 1 and means.ndim >= 2 and len(weights) == len(means) > 0
    positive = bool(((weights > 0) & torch.isfinite(weights)).all())
    if not fine or not positive or not bool(torch.isfinite(means).all()):
        raise InvalidInputError(
            f"got weights {tuple(weights.shape)} and means {tuple(means.shape)}; needed positive "
            "weights (K,) and finite means (K, ...)"
        )
