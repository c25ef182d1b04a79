"""MALA and HMC follow exp(-E/T): judged by exact distributions, which wrong rules fail."""

import math
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from scipy import stats

from ebm_guard.errors import InvalidInputError, ModelOutputError
from ebm_guard.sampling import HMC, MALA, SGLD, Chains, energy_and_gradient
from ebm_guard.sampling.mcmc import bounce
from ebm_guard.sampling.sgld import reflect

SHAPE = (3, 4, 4)
LEVEL = 1e-3


def generator(*names):
    seed = int(oracles.generator(*names).integers(2**62))
    return torch.Generator().manual_seed(seed)


class Bell:
    """A Gaussian with a mean and a width of its own for each value."""

    def __init__(self):
        rng = oracles.generator("bell")
        self.mean = torch.from_numpy(rng.normal(size=SHAPE))
        self.std = torch.from_numpy(rng.uniform(0.7, 1.3, size=SHAPE))

    def __call__(self, x):
        return ((x - self.mean) / self.std).square().flatten(1).sum(dim=1) / 2

    def p_values(self, points, temperature=1.0):
        """Of means, of squares, and of the chains' energies."""
        z = ((points - self.mean) / self.std).flatten(1).numpy() / math.sqrt(temperature)
        squares = stats.chi2.cdf((z**2).sum(), z.size)
        means = stats.chi2.sf(len(z) * (z.mean(axis=0) ** 2).sum(), z.shape[1])
        energies = stats.kstest((z**2).sum(axis=1), stats.chi2(z.shape[1]).cdf).pvalue
        return {"means": means, "squares": 2 * min(squares, 1 - squares), "energies": energies}


class NoRatio(MALA):
    """The rule without the densities q."""

    def log_ratio(self, here, momentum, there, arrived):
        return here.energy.double() - there.energy.double()


class LastDimension(HMC):
    """The kinetic energy of a part of the values."""

    def log_ratio(self, here, momentum, there, arrived):
        part = [each.flatten(1)[:, -SHAPE[-1] :] for each in (momentum, arrived)]
        return super().log_ratio(here, part[0], there, part[1])


class Unadjusted(MALA):
    """No test at all."""

    def log_ratio(self, here, momentum, there, arrived):
        return torch.zeros(len(momentum), dtype=torch.float64)


class OldMomentum(HMC):
    """A leapfrog without its last half kick."""

    def leapfrog(self, energy, here, momentum):
        there, arrived = super().leapfrog(energy, here, momentum)
        return there, arrived + self.leapfrog_size / 2 * there.gradient


RIGHT = [MALA(120, 0.3), HMC(30, 0.5, 3)]
WRONG = [
    NoRatio(120, 0.3),
    Unadjusted(120, 0.3),
    LastDimension(30, 0.5, 3),
    OldMomentum(30, 0.5, 3),
]


def ends(sampler, energy, start, *names):
    return sampler.run(energy, start, generator(type(sampler).__name__, *names))


@pytest.mark.parametrize("sampler", RIGHT, ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_gaussian_of_image_shape(sampler, temperature):
    # The dynamics of HMC are faster at a lower T, those of MALA are not.
    scale = math.sqrt(temperature) if type(sampler) is HMC else 1.0
    changed = {"temperature": temperature, "step_size": sampler.step_size * scale}
    sampler = type(sampler)(**_settings(sampler) | changed)
    bell = Bell()
    samples = ends(sampler, bell, torch.zeros(500, *SHAPE, dtype=torch.float64), "bell")
    assert 0.3 < samples.trace.acceptance.mean() < 0.99
    p_values = bell.p_values(samples.points, temperature)
    assert min(p_values.values()) > LEVEL / len(p_values), p_values


@pytest.mark.parametrize("sampler", WRONG, ids=lambda sampler: type(sampler).__name__)
def test_wrong_rules_fail_the_same_test(sampler):
    bell = Bell()
    samples = ends(sampler, bell, torch.zeros(500, *SHAPE, dtype=torch.float64), "bell")
    p_values = bell.p_values(samples.points)
    assert min(p_values.values()) < LEVEL / len(p_values), p_values


def _settings(sampler):
    return {key: value for key, value in sampler.settings().items() if key != "sampler"}


class TwoBells:
    """Shares .3 and .7, three widths apart along one direction of image shape."""

    def __init__(self):
        direction = torch.from_numpy(oracles.generator("two bells").normal(size=SHAPE))
        self.direction = direction / direction.norm()
        self.share, self.distance = 0.3, 3.0

    def __call__(self, x):
        along = (x * self.direction).flatten(1).sum(dim=1)
        rest = x.square().flatten(1).sum(dim=1) / 2
        # -log(.3 N(0, I) + .7 N(d u, I)), up to a constant.
        other = math.log(1 - self.share) + self.distance * along - self.distance**2 / 2
        return rest - torch.logaddexp(torch.full_like(along, math.log(self.share)), other)

    def cdf(self, along):
        near, far = stats.norm.cdf(along), stats.norm.cdf(along - self.distance)
        return self.share * near + (1 - self.share) * far


@pytest.mark.parametrize(
    ("sampler", "right"),
    [(MALA(250, 0.4), True), (HMC(60, 0.35, 6), True), (NoRatio(250, 0.4), False)],
    ids=["mala", "hmc", "no-ratio"],
)
def test_a_mixture_from_one_of_its_modes(sampler, right):
    bells = TwoBells()
    start = torch.zeros(400, *SHAPE, dtype=torch.float64)
    points = ends(sampler, bells, start, "mixture").points
    along = (points * bells.direction).flatten(1).sum(dim=1)
    rest = points - along[:, None, None, None] * bells.direction
    squares = rest.square().flatten(1).sum(dim=1).numpy()
    p_values = [
        stats.kstest(along.numpy(), bells.cdf).pvalue,
        stats.kstest(squares, stats.chi2(points[0].numel() - 1).cdf).pvalue,
    ]
    assert (min(p_values) > LEVEL / 2) == right, p_values


class Clamped(HMC):
    """A wall that stops what comes."""

    def leapfrog(self, energy, here, momentum):
        there, arrived = super().leapfrog(energy, here, momentum)
        points = there.points.clamp(*self.box)
        return Chains(points, *energy_and_gradient(energy, points)), arrived


@pytest.mark.parametrize(
    ("sampler", "right"),
    [
        (HMC(60, 0.15, 4, box=(0, 1), boundary="reflect"), True),
        (MALA(300, 0.05, box=(0, 1), boundary="reflect"), True),
        (HMC(80, 0.15, 3, box=(0, 1)), True),
        (MALA(300, 0.05, box=(0, 1)), True),
        (Clamped(60, 0.15, 4, box=(0, 1)), False),
    ],
    ids=["hmc-reflect", "mala-reflect", "hmc-reject", "mala-reject", "clamped"],
)
def test_walls_keep_the_distribution_on_the_box(sampler, right):
    rate = 2.0
    start = torch.full((1500, 1, 1, 2), 0.5, dtype=torch.float64)
    samples = ends(sampler, lambda x: rate * x.flatten(1).sum(dim=1), start, "box")
    values = samples.points.flatten().numpy()
    assert values.min() >= 0
    assert values.max() <= 1
    exact = stats.truncexpon(b=rate, scale=1 / rate).cdf
    assert (stats.kstest(values, exact).pvalue > LEVEL) == right


def test_langevin_has_the_variance_of_its_finite_step():
    # x' = (1 - a/2) x + sqrt(a T) xi has the variance T / (1 - a/4).
    a, temperature = 0.5, 0.7
    sampler = SGLD.langevin(a, temperature, num_steps=60, box=None)
    start = torch.zeros(300, *SHAPE, dtype=torch.float64)
    bowl = lambda x: x.square().flatten(1).sum(dim=1) / 2  # noqa: E731
    points = ends(sampler, bowl, start, "finite step").points

    def p_value(variance):
        below = stats.chi2.cdf(float(points.square().sum()) / variance, points.numel())
        return 2 * min(below, 1 - below)

    assert p_value(temperature / (1 - a / 4)) > LEVEL
    # The noise sqrt(2 a T), as if a were the step of the gradient.
    assert p_value(2 * temperature / (1 - a / 4)) < LEVEL


@pytest.mark.parametrize("boundary", ["reflect", "clamp"])
def test_reflection_keeps_the_uniform_distribution_and_clamping_does_not(boundary):
    sampler = SGLD(20, 0.1, 0.2, boundary=boundary)
    numbers = generator("uniform", boundary)
    start = torch.rand(2000, 1, dtype=torch.float64, generator=numbers)
    points = sampler.run(lambda x: 0 * x.sum(dim=1), start, numbers).points
    kept = stats.kstest(points.flatten().numpy(), "uniform").pvalue > LEVEL
    assert kept == (boundary == "reflect")


def quartic(x):
    return (x.pow(4) / 4 + x.square() / 2).flatten(1).sum(dim=1)


def test_mala_is_accepted_by_the_densities_of_its_proposal():
    a, temperature = 0.3, 0.8
    sampler = MALA(1, a, temperature=temperature)
    x = torch.from_numpy(oracles.generator("q").normal(size=(20, *SHAPE)))
    xi = torch.from_numpy(oracles.generator("xi").normal(size=(20, *SHAPE)))
    here = Chains(x, *energy_and_gradient(quartic, x))
    there, arrived = sampler.leapfrog(quartic, here, xi)
    force = x.pow(3) + x
    proposal = x - a / 2 * force + math.sqrt(a * temperature) * xi
    assert torch.allclose(there.points, proposal)

    def log_q(to, start):
        gap = to - (start - a / 2 * (start.pow(3) + start))
        return -gap.square().flatten(1).sum(dim=1) / (2 * a * temperature)

    naive = (quartic(x) - quartic(proposal)) / temperature
    naive = naive + log_q(x, proposal) - log_q(proposal, x)
    assert torch.allclose(sampler.log_ratio(here, xi, there, arrived), naive)


def test_acceptance_goes_to_one_with_the_step():
    start = torch.from_numpy(oracles.generator("small").normal(size=(200, *SHAPE)))
    for build in (lambda size: MALA(5, size**2), lambda size: HMC(5, size, 3)):
        shares = [
            float(ends(build(size), quartic, start, str(size)).trace.acceptance.mean())
            for size in (1.0, 0.3, 0.01)
        ]
        assert shares[0] < shares[1] < shares[2]
        assert shares[2] > 0.995


def test_the_error_of_the_energy_is_of_second_order():
    x = torch.from_numpy(oracles.generator("order").normal(size=(50, *SHAPE)))
    p = torch.from_numpy(oracles.generator("momentum").normal(size=(50, *SHAPE)))
    here = Chains(x, *energy_and_gradient(quartic, x))

    def error(steps):
        sampler = HMC(1, 0.4 / steps, steps)
        there, arrived = sampler.leapfrog(quartic, here, p)
        return float(sampler.log_ratio(here, p, there, arrived).abs().mean())

    errors = [error(steps) for steps in (20, 40, 80)]
    for coarse, fine in pairwise(errors):
        assert 3.8 < coarse / fine < 4.2


@pytest.mark.parametrize("boundary", ["none", "reflect"])
def test_the_leapfrog_can_be_run_back(boundary):
    box = None if boundary == "none" else (0.0, 1.0)
    sampler = HMC(1, 0.2, 7, box=box, boundary="reflect")
    x = torch.from_numpy(oracles.generator("back").uniform(size=(30, *SHAPE)))
    p = torch.from_numpy(oracles.generator("there").normal(size=(30, *SHAPE)))
    there, arrived = sampler.leapfrog(quartic, Chains(x), p)
    back, again = sampler.leapfrog(quartic, Chains(there.points), -arrived)
    assert (there.points - x).abs().max() > 0.3
    assert torch.allclose(back.points, x, atol=1e-10)
    assert torch.allclose(-again, p, atol=1e-10)


def test_bouncing_is_walking_between_mirrors():
    rng = oracles.generator("bounce")
    points, momentum = rng.uniform(-4, 5, 200), rng.normal(size=200)
    folded, turned = bounce(torch.from_numpy(points), torch.from_numpy(momentum), (0.0, 1.0))
    assert torch.allclose(reflect(torch.from_numpy(points), (0.0, 1.0)), folded)
    for start, p, y, q in zip(points, momentum, folded.tolist(), turned.tolist(), strict=True):
        x, sign = start, 1
        while not 0 <= x <= 1:
            x, sign = (-x if x < 0 else 2 - x), -sign
        assert y == pytest.approx(x)
        assert q == pytest.approx(sign * p)


def test_one_gradient_for_each_proposal_of_mala():
    calls = []

    def counted(x):
        calls.append(len(x))
        return quartic(x)

    MALA(7, 0.1).run(counted, torch.zeros(3, *SHAPE), torch.Generator())
    assert len(calls) == 8
    calls.clear()
    HMC(4, 0.1, 5).run(counted, torch.zeros(3, *SHAPE), torch.Generator())
    assert len(calls) == 21


def test_a_rejected_chain_stays_where_it_is():
    hostile = HMC(1, 0.1, box=(0.0, 1e-9))
    start = torch.zeros(5, *SHAPE)
    samples = hostile.run(quartic, start, torch.Generator())
    assert torch.equal(samples.points, start)
    assert samples.trace.acceptance.tolist() == [0.0]
    assert torch.equal(samples.energy, quartic(start))


@pytest.mark.parametrize("sampler", [HMC(30, 0.4, 4), MALA(30, 0.2)], ids=["hmc", "mala"])
@pytest.mark.parametrize("outside", ["energy", "gradient"])
def test_a_proposal_that_is_not_finite_is_rejected(sampler, outside):
    """E = -sum log x on x > 0: other chains go on, and none is ever where E is not finite."""

    def barrier(x):
        rows = x.flatten(1)
        if outside == "energy":
            return (rows - rows.log()).sum(dim=1)
        # Finite everywhere, but its gradient is NaN where the root is of less than 0.
        root = rows.sqrt()
        return (rows + torch.where(rows > 0, -root, 0.0)).sum(dim=1)

    start = torch.full((40, 2), 0.3)
    samples = sampler.run(barrier, start, generator("barrier", outside))
    assert bool((samples.points > 0).all())
    assert bool(torch.isfinite(samples.trace.energy).all())
    assert bool(torch.isfinite(samples.trace.gradient_norm).all())
    assert 0 < float(samples.trace.acceptance.mean()) < 1
    assert float((samples.points != start).flatten(1).any(dim=1).double().mean()) > 0.9


def test_settings_are_checked_and_energies_must_be_finite():
    for settings in ({"step_size": 0}, {"num_leapfrog": 0}, {"num_steps": 1.5}, {"boundary": "x"}):
        with pytest.raises(InvalidInputError, match=next(iter(settings))):
            HMC(**settings)
    with pytest.raises(InvalidInputError, match="temperature"):
        MALA(1, 0.1, temperature=math.nan)
    with pytest.raises(ModelOutputError, match="not finite"):
        HMC(1).run(lambda x: x.log().flatten(1).sum(dim=1), torch.zeros(2, 1), torch.Generator())
    assert "num_leapfrog" not in MALA().settings()
    assert np.isfinite(HMC().settings()["step_size"])
