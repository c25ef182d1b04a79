"""NCE and FCE: losses against naive loops, and densities that are known recovered."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from density_cases import batch, linear_net, rows, toy_context, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from training_cases import batch_of, context_of, tiny_net

from ebm_guard.errors import InvalidInputError, UnsupportedModelError
from ebm_guard.sampling.densities import GaussianMixture, TruncatedNormalMixture
from ebm_guard.training.context import TrainingBatch
from ebm_guard.training.density.contrast import contrastive_loss, fit_constant
from ebm_guard.training.density.spaces import PixelSpace, dequantised
from ebm_guard.training.objectives import flow, make_objective
from ebm_guard.training.objectives.flow import FlowDensity

# --- The logistic loss and its constant -----------------------------------------------------------


def naive(data, noise):
    total = sum(-math.log(1 / (1 + math.exp(-u))) for u in data)
    total += sum(-math.log(1 - 1 / (1 + math.exp(-v))) for v in noise)
    return total / (len(data) + len(noise))


numbers = st.lists(st.floats(-8, 8), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(numbers, numbers)
def test_the_loss_is_that_of_the_paper_and_its_constant_the_minimum(data, noise):
    u, v = (torch.tensor(part, dtype=torch.float64) for part in (data, noise))
    assert float(contrastive_loss(u, v)) == pytest.approx(naive(data, noise))
    found = fit_constant(u, v)

    def loss(c):
        return float(contrastive_loss(u - c, v - c))

    best = optimize.minimize_scalar(loss, bracket=(found.value - 1, found.value + 1)).fun
    assert loss(found.value) <= best + 1e-9
    curvature = (loss(found.value + 1e-2) + loss(found.value - 1e-2) - 2 * best) / 1e-4
    error = (len(data) + len(noise)) * curvature
    assert found.standard_error == pytest.approx(error**-0.5, rel=1e-2)


def ratios(seed, log_ratio=1.0):
    """Log ratios of two normals whose constant is log_ratio: u = x - 1/2 + log_ratio."""
    rng = np.random.default_rng(seed)
    data, noise = rng.normal(1, 1, 400), rng.normal(0, 1, 400)
    return (torch.from_numpy(part - 0.5 + log_ratio) for part in (data, noise))


def test_a_known_normaliser_is_found_within_its_standard_error():
    """z-scores over independent seeds; half a standard error of bias would fail."""
    found = [fit_constant(*ratios(seed)) for seed in range(200)]
    scores = np.array([(each.value - 1.0) / each.standard_error for each in found])
    # Two samples of fixed size tell more than as many Bernoulli trials: the error is an upper one.
    assert abs(scores.mean()) < 4 / math.sqrt(200)
    wrong = int((abs(scores) > 1.96).sum())
    assert stats.binomtest(wrong, 200, 0.05, alternative="greater").pvalue > 1e-3
    assert abs((scores + 0.5).mean()) > 4 / math.sqrt(200)


# --- The objective --------------------------------------------------------------------------------


def test_the_objectives_loss_equals_a_loop_over_rows():
    net = tiny_net()
    context, given_batch = context_of(net, scope="head"), batch_of()
    objective = make_objective("nce", weight=0.7, ratio=2, head="given")
    objective.begin(context, batch_of(60, seed=5))
    terms = objective.loss(context, given_batch)
    # Again by hand: the same noise, c as it was before its step.
    drawn = objective.space.noise.draw(24, context.torch_generator("noise"))
    features = net[:-1](given_batch.pixels)
    weight, bias = net[-1].weight, net[-1].bias
    first, second = weight.detach(), bias.detach()

    def u(point):
        energy = -torch.logsumexp(first @ point + second, dim=0)
        q, n = (
            part.log_density(point[None])[0]
            for part in (objective.space.base, objective.space.noise)
        )
        return float(q - energy - n)

    data, noise = [u(point) for point in features], [u(point) for point in drawn]
    constant = fit_constant(torch.tensor(data), torch.tensor(noise)).value - math.log(2)
    shift = constant + math.log(2)
    expected = 0.7 * naive([x - shift for x in data], [x - shift for x in noise])
    assert terms.parts["contrast"] == pytest.approx(expected, rel=1e-6)
    # The gradient reaches the head, and nothing else.
    terms.total.backward()
    assert float(weight.grad.abs().sum()) > 0
    assert all(part.grad is None for part in net[:-1].parameters())
    assert objective.constant != constant


def learned(name, updates, seed=0, **settings):
    """Train a linear head on a known mixture, and return what the objective then says."""
    net = linear_net(seed=seed)
    context = toy_context(net, updates=updates, seed=seed)
    objective = make_objective(name, base="gaussian", head="given", warm_up=0.0, **settings)
    objective.begin(context, batch(512, seed=1000 + seed))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for number in range(updates):
        context.update = number
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - number / updates) + 0.002
        optimizer.zero_grad()
        objective.loss(context, batch(256, seed=10_000 * (seed + 1) + number)).total.backward()
        optimizer.step()
    head = net[1].weight.detach(), net[1].bias.detach()
    exact, model = objective.space.base.tilted(*head)
    return objective, exact, model


def check_recovered(objective, exact, model, tolerance):
    """c is log Z, and the log densities are those of the data, within a stated error in nats."""
    assert abs(objective.constant - exact) < tolerance
    points = truth().draw(2000, torch.Generator().manual_seed(9))
    gap = truth().log_density(points) - model.log_density(points)
    # Mean gap is the Kullback-Leibler divergence from the truth.
    assert abs(float(gap.mean())) < 0.05
    assert float(gap.abs().mean()) < 2 * tolerance


def test_nce_recovers_a_known_mixture_and_its_normaliser():
    objective, exact, model = learned("nce", 120, ratio=2)
    check_recovered(objective, exact, model, 0.15)
    # A head that was not trained is no density of these data.
    points = truth().draw(500, torch.Generator().manual_seed(9))
    start = linear_net()
    _, other = objective.space.base.tilted(start[1].weight, start[1].bias)
    assert float((truth().log_density(points) - other.log_density(points)).mean()) > 0.3


@pytest.mark.slow
def test_nce_recovers_it_from_seed_to_seed():
    """|c - log Z| < 0.1 nats in at least 80 % of runs, by an exact binomial test."""
    errors = [abs(found.constant - exact) for found, exact, _ in (
        learned("nce", 200, seed=seed, ratio=2) for seed in range(12))]  # fmt: skip
    wrong = sum(error > 0.1 for error in errors)
    assert stats.binomtest(wrong, len(errors), 0.2, alternative="greater").pvalue > 1e-3
    assert np.median(errors) < 0.05


def test_fce_recovers_a_known_mixture_and_its_normaliser():
    pytest.importorskip("zuko")
    objective, exact, model = learned("fce", 120, flow_steps=5)
    check_recovered(objective, exact, model, 0.15)


def test_with_the_discriminants_head_the_model_is_the_mixture():
    net = linear_net()
    context, first = toy_context(net), batch(512, seed=3)
    objective = make_objective("nce", base="gaussian")
    objective.begin(context, first)
    exact, model = objective.space.base.tilted(net[1].weight, net[1].bias)
    points, _, _ = rows(200, seed=4)
    noise = objective.space.noise
    assert exact == pytest.approx(0, abs=1e-5)
    assert torch.allclose(model.log_density(points), noise.log_density(points), atol=1e-4)
    # Bayes' rule for Gaussians that share a covariance.
    each = torch.stack(
        [GaussianMixture(torch.ones(1), mean[None], noise.scale_tril).log_density(points)
         for mean in noise.means], dim=1)  # fmt: skip
    posterior = torch.softmax(each + noise.weights.log(), dim=1)
    found = torch.softmax(net[1](points.float()), dim=1)
    assert torch.allclose(found.double(), posterior, atol=1e-4)
    assert objective.loss(context, first).parts["contrast"] == pytest.approx(
        -(0.2 * math.log(0.2) + 0.8 * math.log(0.8)), abs=0.02
    )


def test_pixels_are_dequantised_and_only_small_images_are_taken():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 1, 4, 4), generator=generator).float() / 255
    points = dequantised(pixels, generator)
    assert bool(((points >= 0) & (points < 1)).all())
    assert torch.equal((points * 256).floor(), (pixels * 255).round().double())
    assert stats.kstest((points * 256).frac().flatten(), "uniform").pvalue > 1e-4
    objective = make_objective("nce", space="pixels")
    assert objective.default_scope == "all"
    # That of a whole net, not of a head alone.
    assert objective.default_learning_rate == make_objective("margin").default_learning_rate == 3e-4
    context = context_of()
    objective.begin(context, batch_of(30, seed=2))
    assert isinstance(objective.space.noise, TruncatedNormalMixture)
    calls, inner = [], context.net
    context.net = lambda x: (calls.append(len(x)), inner(x))[1]
    terms = objective.loss(context, batch_of())
    assert calls == [12 + 12 + 48]
    terms.total.backward()
    large = TrainingBatch(
        torch.zeros(4, 3, 32, 32), torch.arange(4), torch.zeros(1), torch.arange(4)
    )
    with pytest.raises(InvalidInputError, match=r"3,072 values; .* at most 1,024"):
        PixelSpace().begin(context, large)


def test_the_constant_is_fitted_anew_after_a_rollback():
    context = toy_context(linear_net())
    objective = make_objective("nce", head="given")
    objective.begin(context, batch(64, seed=0))
    objective.loss(context, batch(64, seed=1))
    objective.rolled_back(context)
    assert objective.constant is None
    objective.loss(context, batch(64, seed=1))
    assert objective.settings()["constant"] == objective.constant


def test_what_makes_no_sense_is_refused():
    for bad, match in [
        ({"space": "pixel"}, "did you mean"),
        ({"base": "gauss"}, "known are gaussian, mixture"),
        ({"ratio": 0}, "whole number >= 1"),
        ({"weight": -1}, ">= 0"),
        ({"base": "mixture", "head": "discriminant"}, "use base='gaussian'"),
        ({"space": "pixels", "head": "discriminant"}, "it is of features"),
        ({"space": "pixels", "base": "gaussian"}, "leave base out"),
    ]:
        with pytest.raises(InvalidInputError, match=match):
            make_objective("nce", **bad)
    with pytest.raises(InvalidInputError, match="4 weights outside of the head are trained"):
        make_objective("nce").begin(context_of(), batch_of(30))
    with pytest.raises(InvalidInputError, match="got 2 processes"):
        make_objective("nce").begin(toy_context(linear_net(), world=2), batch(32, seed=0))
    with pytest.raises(InvalidInputError, match="has no classifier"):
        make_objective("nce").begin(context_of(classifier=None), batch_of(30))
    labels = batch_of(30, labels=[0, 1] * 15)
    with pytest.raises(InvalidInputError, match="labels of 2 of 3 classes"):
        make_objective("nce", base="gaussian").begin(context_of(scope="head"), labels)
    hidden = context_of(torch.nn.Sequential(tiny_net(), torch.nn.Softplus()).eval())
    with pytest.raises(UnsupportedModelError, match="was not found"):
        make_objective("nce").begin(hidden, batch_of(30))


def test_without_zuko_fce_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(
        flow, "find_spec", lambda name: None if name == "zuko" else importlib.util.find_spec(name)
    )
    with pytest.raises(InvalidInputError, match=r'pip install "ebm-guard\[flow\]"'):
        make_objective("fce")
    with pytest.raises(InvalidInputError, match=r"needs zuko"):
        FlowDensity(truth())


# --- The flow -------------------------------------------------------------------------------------


@pytest.fixture
def made_flow():
    pytest.importorskip("zuko")
    return FlowDensity(truth(), seed=1)


def test_a_flow_starts_as_its_mixture_and_is_a_density_after_training(made_flow):
    points, _, _ = rows(400, seed=2)
    assert torch.allclose(made_flow.log_density(points), truth().log_density(points), atol=1e-4)
    bent = points.clone()
    bent[:, 1] += bent[:, 0].square() / 2
    before = float(made_flow.log_density(bent).detach().mean())
    state = torch.get_rng_state()
    made_flow.fit(bent, 150, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    assert float(made_flow.log_density(bent).detach().mean()) > before
    axis = torch.linspace(-14, 26, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = float(made_flow.log_density(grid).exp().sum()) * 0.1**2
    assert mass == pytest.approx(1, abs=0.02)


def test_flow_steps_make_data_harder_to_tell_from_draws(made_flow):
    """Against the true density, the flow is pulled to it: it raises the logistic loss."""
    generator = torch.Generator().manual_seed(0)
    data, _, _ = rows(400, seed=5)

    def model(points):
        return truth().log_density(points - 0.4)

    moved = data + 0.4

    def loss():
        drawn = made_flow.draw(2000, torch.Generator().manual_seed(3))
        with torch.no_grad():
            u, v = (model(part) - made_flow.log_density(part) for part in (moved, drawn))
        return float(contrastive_loss(u, v))

    before = loss()
    for _ in range(100):
        made_flow.contend(moved, model, 400, generator)
    assert loss() > before + 1e-4
