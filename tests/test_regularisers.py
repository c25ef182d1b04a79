"""Denoising score matching, entropy, and objectives that carry them."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from training_cases import CLASSES, batch_of, context_of, tiny_net

from ebm_guard import registry
from ebm_guard.energy import energy
from ebm_guard.errors import InvalidInputError
from ebm_guard.training.context import TrainingBatch
from ebm_guard.training.negatives import Denoising
from ebm_guard.training.objectives import make_objective
from ebm_guard.training.regularisers import (
    DenoisingScoreMatching,
    Entropy,
    make_regulariser,
    regularised,
)


class GaussianEnergy(nn.Module):
    """E(x) = |x - mean|^2 / (2 variance) - log 2, from two equal logits."""

    def __init__(self, mean=0.3, variance=0.5):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_variance = nn.Parameter(torch.tensor(math.log(variance), dtype=torch.float64))

    def forward(self, x):
        quadratic = -(x - self.mean).flatten(1).square().sum(dim=1) / (2 * self.log_variance.exp())
        return torch.stack([quadratic, quadratic], dim=1)


def gaussian_batch(n, mean=0.5, std=0.2, seed=3):
    pixels = torch.from_numpy(np.random.default_rng(seed).normal(mean, std, (n, 1, 2, 2)))
    return TrainingBatch(pixels, torch.zeros(n, dtype=torch.long), pixels, torch.arange(n))


def noise_of(context, batch):
    generator = context.torch_generator("score matching")
    return torch.randn(batch.pixels.shape, generator=generator, dtype=torch.float64)


def test_score_matching_has_the_gradient_of_matching_the_analytic_score():
    # Vincent's theorem: in expectation, the target (x - x~) / sigma^2 may be replaced by the score
    # of the blurred density, here -(x~ - 0.5) / (0.2^2 + sigma^2).
    net, sigma, n = GaussianEnergy().eval(), 0.3, 200_000
    context, batch = context_of(net), gaussian_batch(n)
    found = DenoisingScoreMatching(sigma=sigma).penalty(context, batch)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(found, parameters)

    noisy = (batch.pixels + sigma * noise_of(context, batch)).flatten(1)
    score = -(noisy - 0.5) / (0.2**2 + sigma**2)
    target = -noise_of(context, batch).flatten(1) / sigma

    def gap(wanted):
        own = -(noisy - net.mean) / net.log_variance.exp()
        return sigma**2 / 8 * (own - wanted).square().sum(dim=1)

    for parameter, gradient in zip(parameters, gradients, strict=True):
        (explicit,) = torch.autograd.grad(gap(score).mean(), parameter)
        # The two differ by sums of mean 0; their standard error comes from blocks of rows.
        blocks = [
            float(torch.autograd.grad(part.mean(), parameter, retain_graph=True)[0])
            for part in (gap(target) - gap(score)).split(n // 50)
        ]
        error = np.std(blocks, ddof=1) / math.sqrt(len(blocks))
        assert abs(float(gradient - explicit)) < 5 * error
        assert abs(float(explicit)) > 20 * error, "the test has no power"


def test_score_matching_is_least_at_the_blurred_density():
    context, sigma = context_of(GaussianEnergy().eval()), 0.3
    batch = gaussian_batch(50_000)

    def loss(mean, variance):
        context_of_it = context_of(GaussianEnergy(mean, variance).eval())
        return float(DenoisingScoreMatching(sigma=sigma).penalty(context_of_it, batch).detach())

    blurred = 0.2**2 + sigma**2
    best = loss(0.5, blurred)
    for mean, variance in ((0.45, blurred), (0.55, blurred), (0.5, 0.85 * blurred)):
        assert best < loss(mean, variance)
    assert best < loss(0.5, 1.15 * blurred)
    assert context.num_classes == CLASSES


def test_score_matching_equals_a_loop_over_the_images():
    net, sigma = tiny_net(), 0.2
    context, batch = context_of(net), batch_of(5)
    found = float(DenoisingScoreMatching(sigma=sigma).penalty(context, batch).detach())
    noise, expected = noise_of(context, batch), 0.0
    for image, xi in zip(batch.pixels, noise, strict=True):
        noisy = (image + sigma * xi)[None].requires_grad_()
        (gradient,) = torch.autograd.grad(energy(net(noisy)).sum(), noisy)
        away = gradient[0] - (noisy.detach()[0] - image) / sigma**2
        expected += sigma**2 / 2 * float(away.square().sum()) / image.numel() / len(batch)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("side", [2, 8])
def test_a_flat_energy_pays_one_half_whatever_its_size(side):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return torch.stack([self.scale * x.flatten(1).sum(dim=1)] * 2, dim=1)

    n = 4000
    pixels = torch.full((n, 1, side, side), 0.5, dtype=torch.float64)
    batch = TrainingBatch(pixels, torch.zeros(n, dtype=torch.long), pixels, torch.arange(n))
    found = float(DenoisingScoreMatching().penalty(context_of(Flat().eval()), batch).detach())
    # A chi-square mean over n side^2 values.
    assert abs(found - 0.5) < 5 * 0.5 * math.sqrt(2 / (n * side * side))


def test_score_matching_lowers_itself_by_a_step_on_the_weights():
    net = tiny_net()
    context, batch = context_of(net), batch_of(24)
    dsm = DenoisingScoreMatching(sigma=0.2)
    before = dsm.penalty(context, batch)
    before.backward()
    with torch.no_grad():
        for part in net.parameters():
            if part.grad is not None:
                part.sub_(1e-3 * part.grad)
    assert float(dsm.penalty(context, batch).detach()) < float(before.detach())


@pytest.mark.parametrize("labels", [[0, 1, -1, -1], [-1, -1, -1, -1], [0, 1, 2, 0]])
def test_entropy_is_the_mean_over_the_unlabelled(labels):
    net = tiny_net()
    batch = batch_of(4)
    batch = TrainingBatch(batch.pixels, torch.tensor(labels), batch.pixels, batch.rows)
    found = Entropy().penalty(context_of(net), batch)
    p = net(batch.pixels).softmax(dim=1).detach().numpy()
    rows = [row for row, label in zip(p, labels, strict=True) if label == -1]
    expected = np.mean([-(row * np.log(row)).sum() for row in rows]) if rows else 0.0
    assert float(found.detach()) == pytest.approx(expected, abs=1e-12)
    assert found.requires_grad


def test_regularised_adds_terms_and_keeps_what_is_the_objectives():
    objective = make_objective("margin")
    both = regularised(make_objective("margin"), ["entropy", DenoisingScoreMatching(weight=0.5)])
    batch = batch_of(12)
    batch = TrainingBatch(
        batch.pixels,
        torch.where(torch.arange(12) % 2 == 0, batch.labels, -1),
        batch.pixels,
        batch.rows,
    )
    found = both.loss(context_of(), batch)
    alone = objective.loss(context_of(), batch)
    dsm = DenoisingScoreMatching().penalty(context_of(), batch)
    entropy = Entropy().penalty(context_of(), batch)
    added = float((0.5 * dsm + 0.1 * entropy).detach())
    assert float(found.total.detach()) == pytest.approx(float(alone.total.detach()) + added)
    assert sum(found.parts.values()) == pytest.approx(float(found.total.detach()))
    assert set(found.parts) == {*alone.parts, "dsm", "entropy"}
    assert both.name == "margin"
    assert both.negative_kinds == objective.negative_kinds
    assert both.identity()["regularisers"] == [
        {"regulariser": "entropy", "weight": 0.1, "warm_up": 0.1},
        {"regulariser": "dsm", "weight": 0.5, "warm_up": 0.1, "sigma": 0.1},
    ]
    both.load_state_dict(both.state_dict())
    hdge = regularised(make_objective("jem"), "dsm")
    assert hdge.default_learning_rate == make_objective("jem").default_learning_rate


def test_every_registered_regulariser_can_be_made():
    for row in registry.methods("regulariser"):
        made = make_regulariser(row.name)
        assert made.name == row.name
        assert made.settings()["weight"] == made.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_regulariser("dsn"), "dsm"),
        (lambda: make_regulariser("dsm", sigmo=1), "sigma"),
        (lambda: make_regulariser("dsm", sigma=0), "> 0"),
        (lambda: make_regulariser("entropy", weight=-1), ">= 0"),
        (lambda: make_regulariser(3), "int"),
        (lambda: make_regulariser(Entropy(), weight=1), "ready"),
        (lambda: regularised(make_objective(), ["dsm", "dsm"]), "at most once"),
        (lambda: Denoising("blur"), "gaussian"),
        (lambda: Denoising(level=0), "> 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()


@pytest.mark.parametrize("corruption", ["gaussian", "mask", "salt_and_pepper"])
def test_denoising_negatives_are_the_batch_corrupted(corruption):
    batch = batch_of(40)
    context = context_of()
    before = batch.pixels.clone()
    found = Denoising(corruption, 0.3).draw(context, batch)
    assert found.shape == batch.pixels.shape
    assert torch.equal(batch.pixels, before)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert torch.equal(found, Denoising(corruption, 0.3).draw(context, batch))
    changed = (found != batch.pixels).double()
    if corruption == "gaussian":
        inside = (found > 0) & (found < 1)
        moved = (found - batch.pixels)[inside]
        assert changed.mean() > 0.99
        assert 0.1 < float(moved.std()) < 0.35
        return
    share, error = 0.3, math.sqrt(0.21 / changed.numel())
    assert abs(float(changed.mean()) - share) < 5 * error
    values = found[changed.bool()]
    assert set(values.tolist()) == ({0.0} if corruption == "mask" else {0.0, 1.0})
