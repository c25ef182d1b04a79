"""Free energy over prototypes, PCA residual and Gaussian mixture against slow loops."""

import json
import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from test_feature_scores import clusters, naive_lse, naive_unit

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.ood import GMMEnergy, KMeansEnergy, PCAEnergy
from ebm_guard.ood.feature_scores import free_energy as module
from ebm_guard.ood.feature_scores.free_energy import free_energy, likelihood_beta, log_density
from ebm_guard.ood.feature_scores.shrinkage import oas_rho
from ebm_guard.predictions import Predictions


def points(rows, *, normalize):
    return np.array([naive_unit(row) if normalize else row.astype(float) for row in rows.features])


def mixture_rows(key, n, centres, variance):
    """Draw rows of equally likely Gaussians around centres (K, D); labels are the centres."""
    rng = oracles.generator("mixture", key)
    labels = rng.integers(0, len(centres), size=n)
    features = centres[labels] + math.sqrt(variance) * rng.normal(size=(n, centres.shape[1]))
    return Predictions(np.eye(len(centres))[labels], features=features, labels=labels)


# --- free energy


@given(
    st.lists(st.floats(0, 1e4), min_size=1, max_size=12),
    st.floats(1e-3, 1e3),
)
@oracles.QUICK
def test_free_energy_is_a_brute_force_sum_between_its_bounds(squared, beta):
    found = float(free_energy(torch.tensor([squared], dtype=torch.float64), beta))
    assert found == pytest.approx(-naive_lse([-beta * d for d in squared]) / beta, abs=1e-9)
    assert min(squared) - math.log(len(squared)) / beta - 1e-9 <= found <= min(squared) + 1e-9


def test_free_energy_tends_to_the_hard_minimum():
    squared = torch.from_numpy(oracles.generator("limit").gamma(2, 3, size=(50, 7)))
    hard = free_energy(squared, math.inf)
    assert torch.equal(hard, squared.min(dim=1).values)
    gaps = [float((hard - free_energy(squared, 10.0**power)).max()) for power in range(6)]
    assert gaps == sorted(gaps, reverse=True)
    for power, gap in enumerate(gaps):
        assert 0 <= gap <= math.log(7) / 10.0**power
    # And beta -> 0 leaves the mean and the count of prototypes.
    soft = free_energy(squared, 1e-6)
    assert torch.allclose(soft, squared.mean(dim=1) - math.log(7) / 1e-6, atol=1e-3)


def test_the_density_is_the_mixture_of_gaussians():
    rng = oracles.generator("density")
    centres, rows, beta = rng.normal(size=(5, 3)), rng.normal(size=(20, 3)), 1.7
    squared = ((rows[:, None] - centres[None]) ** 2).sum(axis=2)
    truth = np.log(
        np.mean(
            [multivariate_normal.pdf(rows, centre, np.eye(3) / (2 * beta)) for centre in centres],
            axis=0,
        )
    )
    found = log_density(torch.from_numpy(squared), beta, 3).numpy()
    assert np.allclose(found, truth, rtol=1e-10)
    # It integrates to 1: a sum over a fine line, in one dimension.
    line = np.linspace(-9, 9, 4001)
    squared = (line[:, None] - np.array([[-1.0, 0.5, 2.0]])) ** 2
    density = log_density(torch.from_numpy(squared), beta, 1).exp().numpy()
    assert np.trapezoid(density, line) == pytest.approx(1, abs=1e-9)


def test_beta_is_the_best_on_a_fine_grid():
    squared = torch.from_numpy(oracles.generator("beta").gamma(1, 2, size=(200, 6)))
    beta = likelihood_beta(squared, 4)
    best = float(log_density(squared, beta, 4).mean())
    for other in beta * np.geomspace(1e-3, 1e3, 2001):
        assert float(log_density(squared, float(other), 4).mean()) <= best + 1e-12
    # One prototype has the answer in closed form.
    one = squared[:, :1]
    assert likelihood_beta(one, 4) == pytest.approx(2 / float(one.mean()), rel=1e-6)
    with pytest.raises(DataError, match="no best value"):
        likelihood_beta(torch.zeros(3, 2).double(), 4)


def test_beta_finds_the_variance_that_rows_were_drawn_with():
    """1/(2 beta) over many draws: the standard error of log beta is sqrt(2/(n D))."""
    centres = 20 * np.eye(3, 6)
    inside = 0
    for draw in range(40):
        rows = mixture_rows(draw, 600, centres, variance=0.5)
        settings = {"prototypes": 1, "normalize": False}
        facts = KMeansEnergy(**settings).fit(rows).settings()["fit"]
        assert facts["prototypes"] == 3
        held = facts["rows_held_out"]
        assert (held, facts["rows_clustered"]) == (120, 480)
        # The centres are off by variance/160 per value, which shows as that much more variance.
        expected = 1 / (2 * 0.5 * (1 + 1 / 160))
        inside += abs(math.log(facts["beta"] / expected)) <= 1.96 * math.sqrt(2 / (held * 6))
    assert not oracles.fails_guarantee(40 - inside, 40, 0.05)


@pytest.mark.parametrize("beta", ["inf", 3.0, "likelihood"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_score_is_a_brute_force_sum_over_its_prototypes(beta, normalize):
    fit, rows = clusters("fit", dtype=np.float64), clusters("new", 30, spread=3)
    score = KMeansEnergy(beta=beta, normalize=normalize).fit(fit)
    used = float(score.settings()["fit"]["beta"])
    centres = (score.centres + score.origin).numpy()
    truth = []
    for row in points(rows, normalize=normalize):
        squared = [math.dist(row, centre) ** 2 for centre in centres]
        soft = min(squared) if used == math.inf else -naive_lse([-used * d for d in squared]) / used
        truth.append(soft)
    assert np.allclose(score.of(rows), truth, rtol=1e-9, atol=1e-9)


def test_one_prototype_per_class_is_the_class_mean():
    fit = clusters("fit", dtype=np.float64)
    score = KMeansEnergy(beta=math.inf, prototypes=1, normalize=False).fit(fit)
    means = np.stack([fit.features[fit.labels == c].mean(axis=0) for c in range(4)])
    assert score.options()["beta"] == "inf"
    # The sample is kept in float32.
    assert np.allclose(score.centres + score.origin, means, rtol=1e-6)


def test_prototypes_are_a_local_optimum_of_k_means():
    """Every prototype is the mean of the rows that are nearest to it."""
    fit = clusters("fit", n=500)
    score = KMeansEnergy(beta=1.0, prototypes=3, per_class=False, normalize=False).fit(fit)
    centres = (score.centres + score.origin).numpy()
    assert len(centres) == 12
    squared = ((fit.features[:, None] - centres[None]) ** 2).sum(axis=2)
    for k, centre in enumerate(centres):
        assert np.allclose(
            fit.features[squared.argmin(axis=1) == k].mean(axis=0), centre, rtol=0.02
        )


def test_prototypes_are_bounded_and_distinct(monkeypatch):
    fit = clusters("fit", n=200)
    monkeypatch.setattr(module, "_MOST_PROTOTYPES", 8)
    assert KMeansEnergy(prototypes=5).fit(fit).settings()["fit"]["prototypes"] == 8
    assert len(KMeansEnergy(prototypes=5, per_class=False).fit(fit).centres) == 8
    bounded = KMeansEnergy(sample_size=60).fit(fit).settings()["fit"]
    assert bounded["rows_clustered"] + bounded["rows_held_out"] == 60
    # Two different rows per class cannot make four prototypes.
    features = np.repeat(np.eye(8, 12), 25, axis=0)
    copies = replace(fit, features=features, labels=np.repeat(np.arange(4), 50), hashes=None)
    assert len(KMeansEnergy(beta=1.0, normalize=False).fit(copies).centres) == 8
    with pytest.raises(DataError, match="no best value"):
        KMeansEnergy(normalize=False).fit(copies)


def test_the_fit_is_the_same_twice_and_leaves_global_randomness_alone():
    fit, rows = clusters("fit", n=400), clusters("new", 30)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is checked
    first, again = KMeansEnergy(seed=3).fit(fit), KMeansEnergy(seed=3).fit(fit)
    assert np.array_equal(first.of(rows), again.of(rows))
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert not np.array_equal(KMeansEnergy(seed=4).fit(fit).of(rows), first.of(rows))
    json.dumps(KMeansEnergy(beta="inf").fit(fit).settings(), allow_nan=False)


# --- PCA


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dimension", [0, 3, None])
def test_pca_energy_is_the_error_of_the_best_point_of_the_subspace(normalize, dimension):
    fit, rows = clusters("fit", dtype=np.float64), clusters("new", 30, spread=3)
    score = PCAEnergy(dimension=dimension, normalize=normalize).fit(fit)
    known = points(fit, normalize=normalize)
    mean = known.mean(axis=0)
    _, singular, directions = np.linalg.svd(known - mean)
    if dimension is None:
        share = np.cumsum(singular**2) / np.sum(singular**2)
        dimension = next(d for d, held in enumerate(share, 1) if held >= 0.9)
    assert score.settings()["fit"]["dimension"] == dimension
    basis = directions[:dimension].T
    for found, row in zip(score.of(rows), points(rows, normalize=normalize), strict=True):
        code = np.linalg.lstsq(basis, row - mean, rcond=None)[0]  # min over the latent variable
        assert found == pytest.approx(((row - mean - basis @ code) ** 2).sum(), rel=1e-9)


def test_pca_energy_needs_something_beyond_the_subspace():
    fit = clusters("fit")
    flat = fit.features.copy()
    flat[:, 5:] = 1
    with pytest.raises(DataError, match="nothing is left"):
        PCAEnergy(dimension=5, normalize=False).fit(replace(fit, features=flat))
    with pytest.raises(InvalidInputError, match="width 12; needed less"):
        PCAEnergy(dimension=12).fit(fit)
    nearly_all = PCAEnergy(explained=1 - 1e-12).fit(fit)
    assert nearly_all.settings()["fit"]["dimension"] == 11


# --- Gaussian mixture


def naive_gmm(fit, rows, covariance):
    found = np.zeros((len(rows), 4))
    classes = range(4)
    means = [fit.features[fit.labels == c].mean(axis=0) for c in classes]
    centred = fit.features - np.array(means)[fit.labels]
    pooled = centred.T @ centred / len(fit)
    for c in classes:
        mine = centred[fit.labels == c]
        if covariance == "tied":
            rho = oas_rho(torch.from_numpy(pooled), len(fit))
            scale = np.trace(pooled) / len(pooled)
            matrix = (1 - rho) * pooled + (rho + 1e-6) * scale * np.eye(len(pooled))
        else:
            shared = np.diag(pooled) + 1e-6 * np.diag(pooled).mean()
            matrix = np.diag(((mine**2).sum(axis=0) + 10 * shared) / (len(mine) + 10))
        density = multivariate_normal.logpdf(rows.features, means[c], matrix)
        found[:, c] = density + math.log(len(mine) / len(fit))
    return [-naive_lse(row) for row in found]


@pytest.mark.parametrize("covariance", ["tied", "diagonal"])
def test_gmm_energy_is_the_log_density_of_scipy(covariance):
    fit = clusters("fit", dtype=np.float64)
    rows = clusters("new", 30, dtype=np.float64, spread=2)
    score = GMMEnergy(covariance, normalize=False)
    for part in (fit.select(slice(0, 90)), fit.select(slice(90, None))):
        score.partial_fit(part)
    found = score.finish().of(rows)
    assert np.allclose(found, naive_gmm(fit, rows, covariance), rtol=1e-9)


def test_gmm_energy_finds_the_density_that_rows_were_drawn_from():
    """Held-out rows: the mean of -log p is the entropy, up to its standard error and the fit."""
    centres = 20 * np.eye(3, 5)
    entropy = math.log(3) + 5 / 2 * math.log(2 * math.pi * math.e * 0.5)
    fit, rows = (mixture_rows(key, 4000, centres, variance=0.5) for key in ("fit", "new"))
    for covariance in ("tied", "diagonal"):
        found = GMMEnergy(covariance, normalize=False).fit(fit).of(rows)
        fitted = 45 / 2 / 4000  # parameters / (2 n), the expected cost of fitting them
        error = found.std() / math.sqrt(len(found))
        assert abs(found.mean() - entropy - fitted) < 4 * error + fitted


def test_gmm_energy_of_equal_rows_is_refused():
    fit = clusters("fit")
    for covariance in ("tied", "diagonal"):
        flat = replace(fit, features=np.ones_like(fit.features))
        with pytest.raises(DataError, match="all equal"):
            GMMEnergy(covariance, normalize=False).fit(flat)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (KMeansEnergy, {"beta": 0}),
        (KMeansEnergy, {"beta": math.nan}),
        (KMeansEnergy, {"beta": "soft"}),
        (KMeansEnergy, {"prototypes": 0}),
        (KMeansEnergy, {"sample_size": 4}),
        (PCAEnergy, {"dimension": -1}),
        (PCAEnergy, {"explained": 1.0}),
        (GMMEnergy, {"covariance": "diag"}),
    ],
)
def test_impossible_settings_are_refused(kind, settings):
    with pytest.raises(InvalidInputError, match="needed"):
        kind(**settings)
