"""The attack engine: what it refuses, what it leaves untouched, whom it asks and how it counts."""

import itertools
import math

import numpy as np
import pytest
import torch
from attack_cases import EPSILON, RULES, case, name_of, small_net
from scipy import stats
from torch import nn

from ebm_guard import EnergyClassifier
from ebm_guard.attacks import (
    APGD,
    PGD,
    Examples,
    Misclassify,
    Query,
    TargetedMisclassify,
    climb,
    pixel_forward,
)
from ebm_guard.attacks.engine import differentiate, image_generators
from ebm_guard.errors import InvalidInputError
from ebm_guard.model.classifier import ClassifierOutput


class Counting:
    """Count forward passes and gradients of each image, known as the nearest clean one."""

    def __init__(self, forward, examples):
        self.forward, self.pixels = forward, examples.pixels
        self.forwards = torch.zeros(len(examples), dtype=torch.int64)
        self.gradients = torch.zeros(len(examples), dtype=torch.int64)
        self.asked_of_fooled = 0
        self.fooled = torch.zeros(len(examples), dtype=torch.bool)

    def __call__(self, pixels):
        distances = (pixels.detach()[:, None] - self.pixels[None]).abs().flatten(2).amax(dim=2)
        rows = distances.argmin(dim=1)
        self.asked_of_fooled += int(self.fooled[rows].sum())
        self.forwards += torch.bincount(rows, minlength=len(self.pixels))
        if pixels.requires_grad:
            self.gradients += torch.bincount(rows, minlength=len(self.pixels))
        return self.forward(pixels)


@pytest.mark.parametrize(
    ("pixels", "guess"),
    [
        (torch.linspace(-2.1, 2.6, 48), "look normalised already"),
        (torch.linspace(0, 255, 48), "divide by 255"),
        (torch.full((48,), math.nan), "look for NaN"),
        (torch.linspace(0, 1.01, 48), "Clamp them"),
        (torch.arange(48, dtype=torch.uint8), "divide uint8 images by 255"),
    ],
)
def test_pixels_outside_the_box_are_refused_with_a_guess(pixels, guess):
    with pytest.raises(InvalidInputError, match=guess):
        Examples.of(pixels.reshape(1, 3, 4, 4), torch.tensor([0]))


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.0]), torch.tensor([0, 1]), [0], np.array([0]), torch.tensor([-1])]
)
def test_labels_and_ids_that_are_no_numbers_for_each_image_are_refused(labels):
    with pytest.raises(InvalidInputError, match="got labels"):
        Examples.of(torch.zeros(1, 3, 4, 4), labels)
    with pytest.raises(InvalidInputError, match="got ids"):
        Examples.of(torch.zeros(1, 3, 4, 4), torch.tensor([0]), labels)


def test_settings_out_of_range_are_refused():
    forward, examples = case(n=2)
    query = Query(forward, Misclassify())
    for epsilon in (-0.1, math.nan, math.inf):
        with pytest.raises(InvalidInputError, match="epsilon"):
            climb(PGD(2), query, examples, epsilon)
    with pytest.raises(InvalidInputError, match="until"):
        climb(PGD(2), query, examples, 0.1, until="first")
    with pytest.raises(InvalidInputError, match="at least 1"):
        Query(forward, Misclassify(), success_draws=0)
    for wrong in (lambda: PGD(0), lambda: PGD(2, math.nan), lambda: APGD(0), lambda: APGD(rho=0)):
        with pytest.raises(InvalidInputError, match="needed"):
            wrong()
    with pytest.raises(InvalidInputError, match="did you mean 'linf'"):
        PGD(norm="inf")
    with pytest.raises(InvalidInputError, match="normalisation is not known"):
        pixel_forward(EnergyClassifier(small_net()))


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_each_image_is_attacked_as_if_alone(rule):
    forward, examples = case()
    epsilon = EPSILON if rule.norm == "linf" else 10 * EPSILON
    found = {
        size: climb(rule, Query(forward, Misclassify(), batch_size=size), examples, epsilon)
        for size in (1, 7, 64)
    }
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]
    some = climb(rule, Query(forward, Misclassify()), examples.select(order), epsilon)
    whole = found[64].success
    assert 0 < whole.sum() < 64, "an attack that always or never succeeds would hide a difference"
    for size in (1, 7):
        assert (found[size].success == whole).float().mean() >= 0.99
        torch.testing.assert_close(found[size].objective, found[64].objective, atol=1e-3, rtol=1e-3)
    assert (some.success == whole[order]).float().mean() >= 0.95


def test_random_numbers_hang_on_the_image_alone():
    _, examples = case()
    for norm, seed in itertools.product(("linf", "l2"), ((0,), (3, 1))):
        rule = PGD(3, norm=norm)

        def begin(rows, rule=rule, seed=seed):
            return rule.begin(examples.select(rows), 0.1, None, seed).pixels

        whole = begin(slice(None))
        for size in (1, 7):
            parts = [begin(slice(start, start + size)) for start in range(0, 64, size)]
            assert torch.equal(torch.cat(parts), whole)
        rows = torch.tensor([40, 3, 17])
        assert torch.equal(begin(rows), whole[rows])
        assert not torch.equal(rule.begin(examples, 0.1, None, (9,)).pixels, whole)
    draws = [generator.random() for generator in image_generators(examples.ids, (0,))]
    assert len(set(draws)) == len(examples)


def test_the_gradient_is_that_of_the_sum_whatever_the_batch():
    forward, examples = case(n=12)

    class Mean(Misclassify):
        def gradient(self, output, pixels, examples):
            objective = self.objective(output, examples)
            return objective.detach(), differentiate(objective.mean(), pixels)

    def gap(goal):
        one, all_ = (
            Query(forward, goal, batch_size=size).answer(examples.pixels, examples, gradient=True)
            for size in (1, 12)
        )
        return float((one.gradient - all_.gradient).norm() / one.gradient.norm())

    assert gap(Misclassify()) < 1e-5
    assert gap(Mean()) > 0.5


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_epsilon_zero_is_clean_accuracy(rule):
    forward, examples = case()
    labels = examples.labels.clone()
    labels[::4] = (labels[::4] + 1) % 5
    examples = Examples.of(examples.pixels, labels)
    outcome = climb(rule, Query(forward, Misclassify()), examples, 0.0)
    assert torch.equal(outcome.success, forward(examples.pixels).logits.argmax(dim=1) != labels)
    assert int(outcome.success.sum()) == 16
    assert torch.equal(outcome.pixels, examples.pixels)


def naive_pgd(forward, examples, epsilon, num_steps, start):
    """Plain PGD from the formula: all iterates, with cross-entropy and wrongness of each."""
    x, iterates = start, []
    for _ in range(num_steps + 1):
        leaf = x.clone().requires_grad_()
        logits = forward(leaf).logits
        losses = nn.functional.cross_entropy(logits, examples.labels, reduction="none")
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
        iterates.append((x, losses.detach(), logits.argmax(dim=1) != examples.labels))
        x = x + 2.5 / num_steps * epsilon * slope.sign()
        x = torch.min(torch.max(x, examples.pixels - epsilon), examples.pixels + epsilon)
        x = x.clamp(0, 1)
    return [torch.stack(part) for part in zip(*iterates, strict=True)]


@pytest.mark.parametrize("until", ["last", "best", "success"])
def test_every_mode_judges_the_image_that_a_plain_loop_judges(until):
    forward, examples = case()
    start = (examples.pixels + 0.3 * EPSILON).clamp(0, 1)
    pixels, losses, fooled = naive_pgd(forward, examples, EPSILON, 8, start)
    outcome = climb(
        PGD(8), Query(forward, Misclassify()), examples, EPSILON, start=start, until=until
    )
    assert 0 < outcome.success.sum() < 64
    for row in range(64):
        step = 8 if until == "last" else int(losses[:, row].argmax())
        if until == "success" and fooled[:, row].any():
            step = int(fooled[:, row].float().argmax())
        assert outcome.step[row] == step
        assert outcome.success[row] == fooled[step, row]
        torch.testing.assert_close(outcome.pixels[row], pixels[step, row], atol=1e-6, rtol=0)
        torch.testing.assert_close(outcome.objective[row], losses[step, row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_a_fooled_image_is_never_asked_about_again_and_costs_are_exact(rule):
    forward, examples = case()
    epsilon = EPSILON if rule.norm == "linf" else 10 * EPSILON
    counting = Counting(forward, examples)

    def watch(step, rows, answer):
        counting.fooled[rows[answer.success]] = True

    outcome = climb(
        rule, Query(counting, Misclassify(), batch_size=9), examples, epsilon, observe=watch
    )
    assert 0 < outcome.success.sum() < 64
    assert counting.asked_of_fooled == 0
    assert torch.equal(counting.fooled, outcome.success)
    assert torch.equal(counting.gradients, outcome.gradients)
    assert torch.equal(counting.forwards, outcome.forwards)
    stood = outcome.gradients[~outcome.success]
    assert (stood == rule.num_steps).all()
    assert outcome.gradients.sum() < 64 * rule.num_steps or rule.num_steps == 1


@pytest.mark.parametrize(("eot", "draws"), [(1, 1), (3, 1), (1, 5), (3, 5)])
@pytest.mark.parametrize(
    "goal", [Misclassify(), TargetedMisclassify(2)], ids=lambda goal: goal.name
)
def test_costs_are_exact_with_averaged_gradients_votes_and_targets(eot, draws, goal):
    forward, examples = case(n=20)
    counting = Counting(forward, examples)
    query = Query(counting, goal, eot_samples=eot, success_draws=draws)
    outcome = climb(PGD(4), query, examples, EPSILON)
    assert torch.equal(counting.gradients, outcome.gradients)
    assert torch.equal(counting.forwards, outcome.forwards)


def test_rows_held_in_parts_are_numbered_through(monkeypatch):
    forward, examples = case()
    query = Query(forward, Misclassify(), batch_size=8)
    whole = climb(PGD(3), query, examples, EPSILON)
    monkeypatch.setattr("ebm_guard.attacks.engine._HELD", 1)
    seen = []
    parts = climb(
        PGD(3), query, examples, EPSILON, observe=lambda step, rows, answer: seen.append(rows)
    )
    assert torch.equal(whole.success, parts.success)
    torch.testing.assert_close(whole.pixels, parts.pixels, atol=1e-6, rtol=0)
    assert torch.equal(torch.cat(seen).unique(), torch.arange(64))


def flat_where(pixels, rows, value):
    """Logits (B, 2) whose slope is 0 or NaN for the named rows of the red channel."""
    slope = torch.where(rows[:, None], value, 1.0)
    first = (pixels.flatten(1) * slope).sum(dim=1)
    return ClassifierOutput(torch.stack([first, torch.zeros_like(first)], dim=1), None)


def test_zero_gradients_are_counted():
    pixels = torch.full((4, 3, 2, 2), 0.5)
    pixels[2:, 0] = 0.6
    examples = Examples.of(pixels, torch.zeros(4, dtype=torch.int64))

    def forward(x):
        return flat_where(x, x[:, 0, 0, 0] > 0.55, 0.0)

    outcome = climb(PGD(5, random_start=False), Query(forward, Misclassify()), examples, 0.01)
    assert outcome.zero_gradients.tolist() == [0, 0, 5, 5]


@pytest.mark.parametrize("rule", [PGD(5), PGD(5, norm="l2"), APGD(5), APGD(5, "l2")], ids=name_of)
def test_nan_gradients_do_not_spread(rule):
    forward, examples = case(n=8)

    class Poisoned(Misclassify):
        def gradient(self, output, pixels, rows):
            objective, gradient = super().gradient(output, pixels, rows)
            gradient[rows.ids == 3, 0] = math.nan
            gradient[rows.ids == 4] = math.inf
            return objective, gradient

    plain = climb(rule, Query(forward, Misclassify()), examples, 0.01, until="last")
    found = climb(rule, Query(forward, Poisoned()), examples, 0.01, until="last")
    assert found.pixels.isfinite().all()
    others = (examples.ids != 3) & (examples.ids != 4)
    assert torch.equal(found.pixels[others], plain.pixels[others])
    assert found.zero_gradients.tolist() == [0, 0, 0, 0, 5, 0, 0, 0]


class Noisy:
    """Logits of two classes: class 1 wins with probability ``chance``, afresh at every look."""

    def __init__(self, chance):
        self.chance, self.generator = chance, torch.Generator().manual_seed(0)

    def __call__(self, pixels):
        flips = torch.rand(len(pixels), generator=self.generator) < self.chance
        second = flips.float() * 2 - 1 + 0 * pixels.flatten(1).sum(dim=1)
        return ClassifierOutput(torch.stack([torch.zeros_like(second), second], dim=1), None)


@pytest.mark.parametrize("draws", [1, 4, 11, 41])
@pytest.mark.parametrize("gradient", [False, True])
def test_success_is_the_majority_of_fresh_draws_never_any(draws, gradient):
    examples = Examples.of(torch.zeros(500, 1, 1, 1), torch.zeros(500, dtype=torch.int64))
    query = Query(Noisy(0.4), Misclassify(), success_draws=draws)
    answer = query.answer(examples.pixels, examples, gradient=gradient)
    fooled = int(answer.success.sum())
    chance = stats.binom.sf(draws // 2, draws, 0.4)
    assert stats.binomtest(fooled, 500, chance).pvalue > 1e-6
    if draws > 1:
        any_draw = 1 - 0.6**draws
        assert stats.binomtest(fooled, 500, any_draw).pvalue < 1e-6


def test_the_gradient_is_averaged_over_the_draws():
    slopes = iter([1.0, 2.0, 6.0])

    def forward(pixels):
        second = pixels.flatten(1).sum(dim=1) * next(slopes)
        return ClassifierOutput(torch.stack([torch.zeros_like(second), second], dim=1), None)

    examples = Examples.of(torch.full((2, 1, 1, 1), 0.5), torch.zeros(2, dtype=torch.int64))
    answer = Query(forward, Misclassify("margin"), eot_samples=3).answer(
        examples.pixels, examples, gradient=True
    )
    torch.testing.assert_close(answer.gradient, torch.full((2, 1, 1, 1), 3.0))
    torch.testing.assert_close(answer.objective, torch.full((2,), 1.5))
