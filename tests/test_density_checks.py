"""What the checks of a density tell, and what they cannot."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from density_cases import correlated, rows, toy_context, truth
from torch import nn

from ebm_guard.model.head import Head
from ebm_guard.sampling.densities import GaussianMixture
from ebm_guard.training.density.checks import check_density
from ebm_guard.training.density.contrast import FittedConstant
from ebm_guard.training.density.heads import set_discriminant
from ebm_guard.training.density.spaces import FeatureSpace, dequantised
from ebm_guard.training.objectives import make_objective


@cache
def checked(shift=0.0, moved=0.0, scale=1.0, held=1500):
    """Checks of the discriminant's head, with its energies shifted, or on other held-out rows."""
    space, density = FeatureSpace(), truth()
    middle = density.weights @ density.means
    space._noise = density
    space._base = GaussianMixture(torch.ones(1), middle[None], density.scale_tril)
    weight = scale * (density.means - middle)
    squares = density.means.square().sum(1) - middle.square().sum()
    bias = density.weights.log() - scale * squares / 2 + shift

    def energy(points):
        return -torch.logsumexp(points @ weight.T + bias, dim=1)

    generator = torch.Generator().manual_seed(0)
    train, held_out = (rows(n, seed)[0] + moved for n, seed in ((1500, 1), (held, 2)))
    return check_density(space, energy, train, held_out, generator, head=(weight, bias))


def test_checks_agree_with_the_truth_and_follow_a_constant():
    plain, shifted = checked(), checked(shift=7.0)
    assert plain.problems() == shifted.problems() == []
    assert plain.exact == pytest.approx(0, abs=1e-9)
    assert shifted.exact == pytest.approx(7)
    assert shifted.learned.value == pytest.approx(7 + plain.learned.value, abs=0.2)
    assert abs(plain.difference.value) < 0.05
    # Nothing was learned beyond the noise, and that is said of what is offered.
    assert plain.accuracy.value == plain.expected == 0.5
    assert plain.notes() == shifted.notes()
    assert "no more than its noise" in plain.notes()[0]


def test_too_few_rows_agree_with_nothing():
    """100 rows leave the interval so wide that a wrong energy would lie in it."""
    problems = checked(scale=0.5, held=100).problems()
    assert "too few held-out rows to tell (100)" in problems[0]


def test_a_bad_sampler_does_not_excuse_a_constant_where_log_z_is_known():
    plain = checked()
    learned = FittedConstant(plain.exact + 0.4, 0.03)
    wide = replace(plain.annealed, low=-1.0, high=1.0)
    assert replace(plain, annealed=wide).problems() == []
    problems = replace(plain, learned=learned, annealed=wide).problems()
    assert "in closed form log Z is 0.000, 0.400 apart where 0.160 is allowed" in problems[0]
    unknown = replace(plain, learned=replace(learned, standard_error=0.3))
    assert "standard error of 0.300 nats" in unknown.problems()[0]
    far = replace(plain.annealed, log_z=0.5, low=0.4, high=0.6)
    assert "sampled log Z is 0.500 nats where" in replace(plain, annealed=far).problems()[0]


def test_a_density_that_its_noise_beats_is_not_offered():
    plain = checked()
    for low, high, refused in [(0.01, 0.03, True), (-0.01, 0.03, False), (-0.03, -0.01, False)]:
        excess = replace(plain.bits, value=(low + high) / 2, low=low, high=high)
        found = replace(plain, excess_noise=excess)
        assert any("noise is better" in each for each in found.problems()) == refused
    told = replace(plain, expected=0.6, excess_noise=excess, excess_base=replace(excess, high=0.01))
    assert told.notes() == ["it is not shown to be better than q alone"]


def test_a_density_of_other_data_is_only_ever_said_to_be_its_noise():
    """Each class fills the corners of a cube: Gaussians are no density of it, and all agrees."""
    generator = torch.Generator().manual_seed(0)

    def corners(n):
        labels = torch.randint(0, 3, (n,), generator=generator)
        noise = 0.15 * torch.randn(n, 8, generator=generator, dtype=torch.float64)
        points = noise + torch.randint(0, 2, (n, 8), generator=generator) * 2 - 1
        points[:, :3] += 4 * nn.functional.one_hot(labels, 3)
        return points, labels

    space = FeatureSpace()
    space._noise = mixture = GaussianMixture.fit(*corners(500))
    space._base = base = GaussianMixture(
        torch.ones(1), (mixture.weights @ mixture.means)[None], mixture.scale_tril
    )
    head = nn.Linear(8, 3).double()
    set_discriminant(Head((head,), ("fc",), ""), base, mixture, 3)
    weights = head.weight.detach(), head.bias.detach()

    def energy(points):
        return -torch.logsumexp(points @ weights[0].T + weights[1], dim=1)

    train, held_out = corners(1000)[0], corners(600)[0]
    found = check_density(space, energy, train, held_out, generator, head=weights)
    assert found.problems() == []
    assert "no more than its noise" in found.notes()[0]


@pytest.mark.slow
def test_a_density_of_pixels_is_offered_where_it_learned_something():
    """Two pixels that go together: no product over pixels can say it, a small net can."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 3)).eval()
    generator, updates = torch.Generator().manual_seed(0), 150
    with torch.no_grad():
        for part, size in zip(net.parameters(), (0.5, 0.5, 0.1, 0.1), strict=True):
            part.copy_(size * torch.randn(part.shape, generator=generator))
    context = toy_context(net, updates=updates)
    objective = make_objective("nce", space="pixels", weight=10.0, warm_up=0.0)
    objective.begin(context, correlated(2000, 1))
    optimizer = torch.optim.Adam(net.parameters())
    for number in range(updates):
        context.update = number
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - number / updates)
        optimizer.zero_grad()
        objective.loss(context, correlated(256, 100 + number)).total.backward()
        optimizer.step()
    train, held_out = (dequantised(correlated(n, n).pixels, generator) for n in (1500, 1400))
    for part in net.parameters():
        part.requires_grad_(False)
    energy = objective.space.energy(context.classifier)
    found = check_density(objective.space, energy, train, held_out, generator)
    assert found.problems() == found.notes() == []
    assert found.constant == found.learned.value
    assert found.excess_noise.high < 0


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_an_energy_that_is_no_density_of_these_data_is_told(scale):
    problems = checked(scale=scale).problems()
    assert problems[0].startswith("it tells held-out data from noise in")
    assert scale < 1 or "apart where" in problems[1]
    assert scale < 1 or "in closed form" in problems[1]
    assert "the known density of the noise is better" in problems[-1]


def test_the_checks_are_of_the_normaliser_and_blind_to_data_that_lie_elsewhere():
    """A density that is its own noise passes; bits per dimension tell the two sets apart."""
    here, there = checked(), checked(moved=1.0)
    assert there.problems() == []
    assert there.bits.low > here.bits.high
