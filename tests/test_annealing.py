"""Annealed importance sampling against closed forms, and its intervals against their promise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from test_densities import mixture, truncated

from ebm_guard.errors import InvalidInputError, ModelOutputError
from ebm_guard.sampling import HMC, MALA, SGLD
from ebm_guard.sampling.annealing import annealed_log_z
from ebm_guard.sampling.densities import GaussianMixture

NORMAL = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2))
# Of interval misses: the promise is 5 %, and the delta method is allowed 15.
ALLOWED = 0.15


def bowl(points, strength=3.0):
    return strength * points.square().sum(dim=1) / 2


LOG_BOWL = -math.log(4.0)  # (1 + strength)^(-D/2) with D = 2


def estimate(seed, *, energy=bowl, base=NORMAL, sampler=None, **settings):
    sampler = HMC(0, 0.7, 2) if sampler is None else sampler
    settings = {"num_chains": 64, "num_temperatures": 8} | settings
    generator = torch.Generator().manual_seed(seed)
    return annealed_log_z(base, energy, generator, sampler=sampler, **settings)


@pytest.mark.parametrize(
    "sampler", [None, pytest.param(MALA(0, 0.5), marks=pytest.mark.slow)], ids=["hmc", "mala"]
)
def test_intervals_hold_the_closed_form(sampler):
    """An exact binomial test over independent seeds; half a nat off fails it."""
    found = [estimate(seed, sampler=sampler) for seed in range(24)]

    def rejected(shift):
        wrong = sum(not each.low + shift <= LOG_BOWL <= each.high + shift for each in found)
        return stats.binomtest(wrong, len(found), ALLOWED, alternative="greater").pvalue < 1e-3

    assert not rejected(0)
    assert rejected(0.5)
    assert rejected(-0.5)


def test_more_temperatures_make_the_weights_even():
    few, many = (estimate(0, num_temperatures=count) for count in (1, 24))
    assert many.standard_error < few.standard_error / 2
    assert many.effective_chains > few.effective_chains
    assert few.num_temperatures == 1


def test_one_temperature_is_plain_importance_sampling():
    found = estimate(4, num_temperatures=1)
    points = NORMAL.draw(64, torch.Generator().manual_seed(4))
    logs = -bowl(points)
    assert torch.allclose(found.log_weights, logs)
    assert found.log_z == pytest.approx(float(logs.exp().mean().log()))
    weights = logs.exp()
    error = float(weights.std() / weights.mean()) / 8
    assert found.standard_error == pytest.approx(error)
    assert found.high - found.log_z == pytest.approx(stats.t.ppf(0.975, 63) * error)
    assert found.effective_chains == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum()))


def test_a_linear_tilt_of_a_mixture_and_its_own_step_size():
    q = mixture(3, 2)
    weight = torch.tensor([[0.5, 0.0, -0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([0.3, -1.0], dtype=torch.float64)
    exact, tilted = q.tilted(weight, bias)

    def tilt(points):
        return -torch.logsumexp(points @ weight.T + bias, dim=1)

    found = annealed_log_z(q, tilt, torch.Generator().manual_seed(0), num_chains=200)
    assert abs(found.log_z - exact) < 5 * found.standard_error
    assert found.standard_error < 0.3
    assert found.acceptance > 0.5
    # With their weights the ends are draws of the tilted density.
    shares = (found.log_weights - found.log_weights.max()).exp()
    mean = (shares[:, None] * found.points).sum(dim=0) / shares.sum()
    expected = tilted.weights @ tilted.means
    spread = tilted.draw(2000, torch.Generator().manual_seed(1)).std(dim=0)
    assert bool(((mean - expected).abs() < 6 * spread / found.effective_chains**0.5).all())


def test_a_box_is_kept():
    q = truncated()

    def slope(points):
        return -2 * points.flatten(1).sum(dim=1)

    found = annealed_log_z(
        q, slope, torch.Generator().manual_seed(0), num_chains=128, num_temperatures=16
    )
    grid = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    points = torch.cartesian_prod(grid, grid).view(-1, 1, 1, 2)
    exact = float((q.log_density(points) - slope(points)).exp().mean().log())
    assert abs(found.log_z - exact) < 5 * found.standard_error
    assert bool(((found.points >= 0) & (found.points <= 1)).all())


@pytest.mark.parametrize("spread", [0.9, 1.3, 1.7])
def test_an_interval_that_is_believed_is_seldom_wrong(spread):
    """Lognormal weights, as in the limit of many steps: the true log Z is 0."""
    plain, runs, chains = estimate(0), 2000, 256
    logs = np.random.default_rng(0).normal(-(spread**2) / 2, spread, (runs, chains))
    weights = np.exp(logs)
    half = stats.t.ppf(0.975, chains - 1) * weights.std(axis=1, ddof=1) / weights.mean(axis=1)
    missed = abs(np.log(weights.mean(axis=1))) > half / math.sqrt(chains)
    effective = weights.sum(axis=1) ** 2 / (weights**2).sum(axis=1)
    believed = [
        replace(plain, num_chains=chains, effective_chains=float(each)).reliable
        for each in effective
    ]
    wrong = int((missed & np.array(believed)).sum())
    assert stats.binomtest(wrong, runs, 0.06, alternative="greater").pvalue > 1e-3
    # Were all of them believed, the promise would break where the weights are uneven.
    if spread > 1.5:
        assert stats.binomtest(int(missed.sum()), runs, 0.06, alternative="greater").pvalue < 1e-3


def test_few_chains_that_carry_everything_are_not_believed():
    found = estimate(0, energy=lambda x: bowl(x - 6.0, 20.0), num_temperatures=1)
    assert not found.reliable
    assert found.effective_chains < 20
    assert estimate(0, num_temperatures=16).reliable
    assert set(found.to_dict()) >= {"log_z", "low", "high", "effective_chains", "reliable"}


def test_seeds_repeat_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, second = estimate(7), estimate(7)
    assert torch.equal(first.log_weights, second.log_weights)
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_annealed_is_refused():
    generator = torch.Generator()
    with pytest.raises(InvalidInputError, match="HMC or MALA"):
        annealed_log_z(NORMAL, bowl, generator, sampler=SGLD.langevin(1))
    with pytest.raises(InvalidInputError, match="those of the base"):
        annealed_log_z(NORMAL, bowl, generator, sampler=HMC(0, temperature=2.0))
    with pytest.raises(InvalidInputError, match="those of the base"):
        annealed_log_z(NORMAL, bowl, generator, sampler=HMC(0, box=(0, 1)))
    with pytest.raises(ModelOutputError, match="not finite"):
        estimate(0, energy=lambda x: bowl(x) / 0)
