"""Composed energies against closed forms, and the order of labels by their energies."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from ebm_guard.composition import (
    class_energy,
    conjunction,
    disjunction,
    mixture,
    negation,
    product,
)
from ebm_guard.energy import joint_energy
from ebm_guard.errors import InvalidInputError
from ebm_guard.inference import label_density, lowest_energy_labels, rank_labels

LINE = torch.linspace(-40, 40, 16_001, dtype=torch.float64)
STEP = float(LINE[1] - LINE[0])


def gaussian(mean, variance):
    """Energy of a Gaussian on LINE, its normaliser left out: an energy need not know it."""
    return (LINE - mean).square() / (2 * variance)


def moments(energy):
    """Mean and variance of exp(-E), by a sum over the line."""
    density = torch.softmax(-energy, dim=0)
    mean = float(density @ LINE)
    return mean, float(density @ (LINE - mean).square())


NUMBERS = st.floats(-3, 3)
VARIANCES = st.floats(0.2, 4)


@given(st.lists(st.tuples(NUMBERS, VARIANCES, st.floats(0.3, 3)), min_size=1, max_size=4))
@oracles.QUICK
def test_a_product_of_gaussians_is_the_precision_weighted_gaussian(experts):
    energy = product([gaussian(m, v) for m, v, _ in experts], [w for *_, w in experts])
    precision = sum(w / v for _, v, w in experts)
    mean, variance = moments(energy)
    assert mean == pytest.approx(sum(w * m / v for m, v, w in experts) / precision, abs=1e-6)
    assert variance == pytest.approx(1 / precision, rel=1e-6)


@given(st.tuples(NUMBERS, VARIANCES), st.tuples(NUMBERS, VARIANCES), st.floats(0.1, 9))
@oracles.QUICK
def test_a_mixture_of_gaussians_has_their_mean_density(first, second, weight):
    energies = [gaussian(m, v) + math.log(math.sqrt(2 * math.pi * v)) for m, v in (first, second)]
    share = weight / (weight + 3)
    density = mixture(energies, [weight, 3.0]).neg().exp()
    truth = share * norm.pdf(LINE, first[0], math.sqrt(first[1]))
    truth += (1 - share) * norm.pdf(LINE, second[0], math.sqrt(second[1]))
    assert np.allclose(density.numpy(), truth, rtol=1e-9, atol=1e-300)
    assert float(density.sum()) * STEP == pytest.approx(1, abs=1e-9)
    mean, _ = moments(mixture(energies, [weight, 3.0]))
    assert mean == pytest.approx(share * first[0] + (1 - share) * second[0], abs=1e-6)


def test_a_negation_moves_the_mean_away():
    """N(0, 1) without N(m, v)^alpha: precision 1 - alpha/v, closed form while that is positive."""
    mean, variance = moments(negation(gaussian(0.0, 1.0), gaussian(1.5, 2.0), alpha=0.8))
    precision = 1 - 0.8 / 2
    assert variance == pytest.approx(1 / precision, rel=1e-6)
    assert mean == pytest.approx(-0.8 * 1.5 / 2 / precision, abs=1e-6)


def test_and_or_not_of_densities():
    rng = oracles.generator("and or")
    first, second = (torch.from_numpy(rng.normal(0, 3, size=(5, 4))) for _ in range(2))
    densities = [energy.neg().exp() for energy in (first, second)]
    both = densities[0] * densities[1]
    assert torch.allclose(conjunction(first, second).neg().exp(), both)
    assert torch.allclose(disjunction(first, second).neg().exp(), densities[0] + densities[1])
    ratio = densities[0] / densities[1].sqrt()
    assert torch.allclose(negation(first, second, alpha=0.5).neg().exp(), ratio)
    assert torch.equal(disjunction(first), first)
    # A mixture of one energy with itself is that energy; of equal weights, log 2 above "or".
    assert torch.allclose(mixture([first, first]), first)
    gap = mixture([first, second]) - disjunction(first, second)
    assert torch.allclose(gap, torch.full_like(gap, math.log(2)))


def test_mixtures_stay_finite_at_large_energies():
    energies = [torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])]
    assert torch.isfinite(mixture(energies)).all()
    assert torch.isfinite(disjunction(*energies)).all()


@pytest.mark.parametrize("call", [product, mixture])
def test_the_gradient_is_the_derivative(call):
    rng = oracles.generator("gradient")
    energies = [torch.from_numpy(rng.normal(size=(2, 3))).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *parts: call(parts, [0.5, 1.0, 2.0]), energies)


def test_a_question_about_classes_is_the_sum_of_its_parts():
    logits = torch.from_numpy(oracles.generator("question").normal(0, 3, size=(6, 5)))
    found = class_energy(logits, all_of=[0, 3], any_of=[1, 2], none_of=[4], alpha=0.7)
    for row, energy in zip(logits.tolist(), found.tolist(), strict=True):
        odds = math.exp(row[0]) * math.exp(row[3]) * (math.exp(row[1]) + math.exp(row[2]))
        assert energy == pytest.approx(-math.log(odds / math.exp(row[4]) ** 0.7))
    assert torch.equal(class_energy(logits, all_of=[2]), joint_energy(logits)[:, 2])
    # Any of all classes is the energy of the input itself.
    assert torch.allclose(class_energy(logits, any_of=range(5)), -torch.logsumexp(logits, dim=1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: product([]), "needed one or more of one shape"),
        (lambda: mixture([torch.zeros(2), torch.zeros(3)]), "of one shape"),
        (lambda: product([torch.zeros(2)], [1.0, 2.0]), "needed 1 finite numbers"),
        (lambda: mixture([torch.zeros(2)] * 2, [1.0, 0.0]), "needed 2 numbers > 0"),
        (lambda: negation(torch.zeros(2), torch.zeros(2), alpha=0.0), "number > 0"),
        (lambda: class_energy(torch.zeros(2, 3), none_of=[1]), "at least one"),
        (lambda: class_energy(torch.zeros(2, 3), all_of=[3]), "labels in 0..2"),
        (lambda: lowest_energy_labels(torch.zeros(2, 3), 4), "needed 1 to 3"),
        (lambda: lowest_energy_labels(torch.zeros(2, 3), 0), "needed 1 to 3"),
        (lambda: rank_labels(torch.zeros(2, 3), [0, 3]), "needed labels in 0..2"),
        (lambda: rank_labels(torch.zeros(2, 3), []), "needed integers"),
        (lambda: rank_labels(torch.zeros(2, 3), torch.zeros(3, 1).long()), "needed integers"),
        (lambda: rank_labels(torch.zeros(2, 3), torch.zeros(2, 1)), "needed integers"),
        (lambda: label_density(torch.zeros(2, 3), 0.0), "temperature"),
    ],
)
def test_what_cannot_be_composed_or_ranked_is_refused(call, words):
    with pytest.raises(InvalidInputError, match=words):
        call()


# --- inference

ROWS = st.lists(st.integers(-4, 4), min_size=2, max_size=7)


@given(ROWS, st.data())
@oracles.QUICK
def test_the_lowest_energies_come_in_order_and_ties_by_label(row, data):
    k = data.draw(st.integers(1, len(row)))
    found = lowest_energy_labels(torch.tensor([row], dtype=torch.float32), k)
    truth = sorted(range(len(row)), key=lambda label: (-row[label], label))[:k]
    assert found.labels.tolist() == [truth]
    assert found.energies.tolist() == [[-row[label] for label in truth]]


@given(ROWS, st.data())
@oracles.QUICK
def test_given_labels_are_ranked_by_their_energy_alone(row, data):
    labels = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1, max_size=5))
    logits = torch.tensor([row, row[::-1]], dtype=torch.float64)
    found = rank_labels(logits, labels)
    for values, place in zip(logits.tolist(), range(2), strict=True):
        truth = sorted(labels, key=lambda label: -values[label])  # stable, as ours
        assert found.labels[place].tolist() == truth
        assert found.energies[place].tolist() == [-values[label] for label in truth]
    # The same labels, given for each row.
    again = rank_labels(logits, torch.tensor([labels, labels]))
    assert torch.equal(again.labels, found.labels)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=7), st.floats(0.05, 50))
@oracles.QUICK
def test_the_density_over_labels_is_the_gibbs_formula(row, temperature):
    found = label_density(torch.tensor([row], dtype=torch.float64), temperature)[0].tolist()
    weights = [math.exp((value - max(row)) / temperature) for value in row]
    truth = [weight / sum(weights) for weight in weights]
    assert found == pytest.approx(truth, rel=1e-9, abs=1e-300)
    assert sum(found) == pytest.approx(1)


def test_the_density_has_its_limits():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert torch.allclose(label_density(logits, 1e-3), torch.tensor([[0.0, 1.0, 0.0]]))
    assert torch.allclose(label_density(logits, 1e6), torch.full((1, 3), 1 / 3))


def test_classes_may_be_a_tensor_an_array_or_a_range():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = class_energy(logits, all_of=[1], any_of=[0])
    for listed in (torch.tensor([0]), np.array([0]), range(1), (0,)):
        assert torch.equal(class_energy(logits, all_of=[1], any_of=listed), expected)


@pytest.mark.parametrize("given", [[1.7], 1, ["a"], [True], torch.tensor(1)])
def test_classes_that_are_no_labels_are_refused(given):
    with pytest.raises(InvalidInputError, match="needed a list of labels in"):
        class_energy(torch.zeros(2, 3), all_of=given)


def test_whole_numbers_are_no_energies():
    with pytest.raises(InvalidInputError, match="floating"):
        product([torch.tensor([1]), torch.tensor([2])], [0.5, 0.5])
