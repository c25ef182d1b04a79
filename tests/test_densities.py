"""Known densities against torch.distributions, scipy and scikit-learn, and their closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.covariance import ledoit_wolf
from sklearn.mixture import GaussianMixture as Reference
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.sampling.densities import (
    GaussianMixture,
    TruncatedNormalMixture,
    density_from_state,
)


def mixture(dim=3, components=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    scale = torch.linalg.cholesky(root @ root.T / dim + torch.eye(dim) / 4)
    weights = torch.rand(components, generator=generator, dtype=torch.float64) + 0.1
    means = 2 * torch.randn(components, dim, generator=generator, dtype=torch.float64)
    return GaussianMixture(weights, means, scale)


def truncated(seed=0, shape=(1, 1, 2), components=2):
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(components, *shape, generator=generator, dtype=torch.float64)
    stds = torch.rand(means.shape, generator=generator, dtype=torch.float64) + 0.05
    return TruncatedNormalMixture(torch.arange(1, components + 1), means, stds)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_a_gaussian_mixture_equals_torch_and_scikit_learn(dim, components, seed):
    q = mixture(dim, components, seed)
    points = 3 * torch.randn(20, dim, generator=torch.Generator().manual_seed(seed)).double()
    own = q.log_density(points)
    normal = MultivariateNormal(q.means, scale_tril=q.scale_tril)
    expected = MixtureSameFamily(Categorical(q.weights), normal).log_prob(points)
    assert torch.allclose(own, expected, rtol=1e-9, atol=1e-9)
    reference = Reference(components, covariance_type="tied")
    covariance = (q.scale_tril @ q.scale_tril.T).numpy()
    reference.weights_, reference.means_ = q.weights.numpy(), q.means.numpy()
    reference.covariances_ = covariance
    reference.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(covariance))
    # scikit-learn wants U with U U' = S^-1, upper or lower alike.
    assert np.allclose(own.numpy(), reference.score_samples(points.numpy()), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("q", [mixture(), truncated()], ids=lambda q: q.name)
def test_draws_follow_the_density(q):
    """Mean of a bounded function under draws against numerical weights: a z-test at 1e-4."""
    points = q.draw(4000, torch.Generator().manual_seed(3))
    other = q.draw(4000, torch.Generator().manual_seed(3))
    assert torch.equal(points, other)
    # By components: the probability integral transform of each value is uniform.
    if isinstance(q, GaussianMixture):
        deviation = q.scale_tril.square().sum(1).sqrt()
        parts = torch.distributions.Normal(q.means, deviation).cdf(points[:, None])
    else:
        normal = torch.distributions.Normal(q.means, q.stds)
        low, high = normal.cdf(torch.zeros_like(q.means)), normal.cdf(torch.ones_like(q.means))
        parts = (normal.cdf(points[:, None]) - low) / (high - low)
        assert bool(((points >= 0) & (points <= 1)).all())
    weights = q.weights.view(-1, *[1] * (parts.ndim - 2))
    uniform = (parts * weights).sum(dim=1).flatten(1).numpy()
    for column in uniform.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
        assert stats.kstest(column**1.2, "uniform").pvalue < 1e-4


def test_the_truncated_mixture_equals_scipy_and_integrates_to_one():
    q = truncated()
    grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    points = torch.cartesian_prod(grid, grid).view(-1, 1, 1, 2)
    logs = q.log_density(points)
    assert float(logs.exp().mean()) == pytest.approx(1, abs=1e-3)
    each = []
    for weight, mean, std in zip(q.weights, q.means.flatten(1), q.stds.flatten(1), strict=True):
        ends = -mean / std, (1 - mean) / std
        one = stats.truncnorm(*(end.numpy() for end in ends), loc=mean, scale=std)
        each.append(np.log(float(weight)) + one.logpdf(points.flatten(1).numpy()).sum(axis=1))
    assert np.allclose(logs.numpy(), np.logaddexp(*each), rtol=1e-9)
    outside = torch.full((1, 1, 1, 2), 1.01)
    assert float(q.log_density(outside)) == -math.inf


def test_a_tilt_is_normalised_in_closed_form():
    q = mixture(2, 3)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    log_z, tilted = q.tilted(weight, bias)

    def log_tilt(points):
        return torch.logsumexp(points @ weight.T + bias, dim=1)

    points = tilted.draw(50, generator)
    assert torch.allclose(
        tilted.log_density(points), q.log_density(points) + log_tilt(points) - log_z, atol=1e-9
    )
    # The integral itself, on a grid that holds nearly all of the mass.
    axis = torch.linspace(-30, 30, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = (q.log_density(grid) + log_tilt(grid)).exp().sum() * 0.1**2
    assert float(mass.log()) == pytest.approx(log_z, abs=1e-6)


def test_whitening_changes_the_coordinates_alone():
    q = mixture()
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    volume = q.scale_tril.diagonal().log().sum()
    moved = q.log_density(z @ q.scale_tril.T) + volume
    assert torch.allclose(q.whitened().log_density(z), moved, atol=1e-9)


def test_a_fit_finds_class_means_and_the_shrunk_covariance_within_classes():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 3, 300))
    points = torch.from_numpy(rng.normal(0, [1, 5, 0.1], (300, 3))) + 4 * labels[:, None]
    points[:, 2] = 7.0  # a dead feature
    labels[:10] = -1
    q = GaussianMixture.fit(points, labels)
    kept, known = points[10:], labels[10:]
    means = torch.stack([kept[known == label].mean(dim=0) for label in range(3)])
    assert torch.allclose(q.means, means)
    assert torch.allclose(q.weights, torch.bincount(known).double() / 290)
    centred = (kept - means[known]).numpy()[:, :2]
    spread = np.sqrt((centred**2).mean(axis=0))
    covariance = (q.scale_tril @ q.scale_tril.T).numpy()
    by_hand = ledoit_wolf(centred / spread, assume_centered=True)[0] * np.outer(spread, spread)
    by_hand *= 290 / 287  # three means were estimated
    assert np.allclose(covariance[:2, :2], by_hand, rtol=1e-9)
    assert covariance[2, 2] > 0
    assert not covariance[2, :2].any()
    one = GaussianMixture.fit(points, labels, components="one")
    assert torch.allclose(one.means[0], kept.mean(dim=0))
    assert torch.equal(one.scale_tril, q.scale_tril)


def test_the_fitted_spread_has_no_bias_where_classes_have_few_rows():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 50
    means = 3 * torch.randn(50, 20, generator=generator, dtype=torch.float64)
    points = means[labels] + torch.randn(200, 20, generator=generator, dtype=torch.float64)
    found = GaussianMixture.fit(points, labels).scale_tril.square().sum(dim=1).mean()
    # A mean over 20 variances of 150 degrees of freedom each; 150/200 would be the biased one.
    assert abs(float(found) - 1) < 4 * math.sqrt(2 / (20 * 150))


@pytest.mark.parametrize("unit", [1e-4, 0.009, 1e3])
def test_no_features_unit_decides(unit):
    """A density of u h is that of h over u, whatever the other features' units are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (400,), generator=generator)
    points = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    points[:, 0] += 4 * labels
    units = torch.tensor([unit, 1.0], dtype=torch.float64)
    plain = GaussianMixture.fit(points, labels)
    scaled = GaussianMixture.fit(points * units, labels)
    expected = plain.log_density(points) - math.log(unit)
    assert torch.allclose(scaled.log_density(points * units), expected, atol=1e-8)


def test_classes_count_as_often_as_they_occur():
    """Rows drawn class by class: the weights are those of the whole set."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 2, 2, 2])
    points = torch.rand(6, 2, generator=generator, dtype=torch.float64)
    counts = torch.tensor([90, 0, 10])
    for q in (
        GaussianMixture.fit(points, labels, counts=counts),
        TruncatedNormalMixture.fit(points, labels, counts=counts),
    ):
        assert q.weights.tolist() == pytest.approx([0.9, 0.1])
    one = GaussianMixture.fit(points, labels, counts=counts, components="one")
    expected = 0.9 * points[:3].mean(dim=0) + 0.1 * points[3:].mean(dim=0)
    assert torch.allclose(one.means[0], expected)


def test_gradients_are_those_of_the_log_density():
    for q in (mixture(2, 2), truncated(shape=(2,))):
        points = q.draw(3, torch.Generator().manual_seed(0)).requires_grad_()
        assert torch.autograd.gradcheck(q.log_density, points)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10**6))
def test_a_state_gives_the_very_same_numbers_back(components, seed):
    q = mixture(2, components, seed)
    again = density_from_state(q.name, q.state_dict())
    assert all(torch.equal(part, again.state_dict()[key]) for key, part in q.state_dict().items())


@pytest.mark.parametrize("q", [mixture(), truncated()], ids=lambda q: q.name)
def test_a_state_gives_the_density_back(q):
    again = density_from_state(q.name, q.state_dict())
    points = q.draw(5, torch.Generator().manual_seed(0))
    assert torch.equal(again.log_density(points), q.log_density(points))
    assert q.settings() == {"density": q.name, "dim": q.dim}
    with pytest.raises(DataError, match="damaged"):
        density_from_state(q.name, {"weights": q.weights})
    with pytest.raises(DataError, match="known are gaussian_mixture"):
        density_from_state("flow", {})


def test_what_makes_no_density_is_refused():
    eye = torch.eye(2)
    for bad in (
        lambda: GaussianMixture(torch.zeros(1), torch.zeros(1, 2), eye),
        lambda: GaussianMixture(torch.ones(1), torch.zeros(1, 2), -eye),
        lambda: GaussianMixture(torch.ones(2), torch.zeros(1, 2), eye),
        lambda: GaussianMixture(torch.ones(1), torch.zeros(1, 2), eye + torch.ones(2, 2).triu(1)),
        lambda: GaussianMixture(torch.ones(1), torch.zeros(1, 2), eye * math.inf),
        lambda: GaussianMixture(torch.full((1,), math.inf), torch.zeros(1, 2), eye),
        lambda: GaussianMixture.fit(torch.eye(3), torch.arange(3)),
        lambda: TruncatedNormalMixture(torch.ones(1), torch.full((1, 2), 1.5), torch.ones(1, 2)),
        lambda: TruncatedNormalMixture(torch.ones(1), torch.zeros(1, 2), torch.zeros(1, 2)),
        lambda: GaussianMixture.fit(torch.ones(3, 2), torch.full((3,), -1)),
        lambda: TruncatedNormalMixture.fit(torch.full((3, 2), 2.0), torch.zeros(3).long()),
    ):
        with pytest.raises(InvalidInputError, match="got"):
            bad()
