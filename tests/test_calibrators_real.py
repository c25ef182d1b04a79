"""Calibrators on stored outputs of published nets: Guo's pattern, and what `auto` is worth."""

import math

import numpy as np
import pytest
import torch
from scipy import special

from ebm_guard.calibration import row_statistics
from ebm_guard.calibration.calibrators import AutoCalibrator, TemperatureScaling, make_calibrator
from ebm_guard.calibration.metrics import ece

CIFAR10, DENSENET, HARD = (
    "wrn16_4_cifar10",
    "densenet_bc100_cifar100",
    "wrn16_4_cifar100",
)


def halves(data_dir, name):
    """Fit and test rows by the protocol of the golden values."""
    with np.load(data_dir / f"softmax_{name}.npz") as file:
        probs, labels = file["probs"], file["labels"].astype(np.int64)
    # No probability is 0 in these files, so the logarithm needs no floor.
    assert probs.min() > 0
    order = np.random.default_rng(0).permutation(10000)
    logits, labels = np.log(probs.astype(np.float64))[order], labels[order]
    return (logits[:5000], labels[:5000]), (logits[5000:], labels[5000:])


def paired(calibrator, other, test):
    """Mean NLL difference of two calibrators over test rows, with its 95 % interval."""
    logits, labels = test
    rows = np.arange(len(labels))
    difference = calibrator.transform(logits)[rows, labels] - other.transform(logits)[rows, labels]
    difference = -difference
    half = 1.96 * difference.std(ddof=1) / math.sqrt(len(rows))
    return difference.mean(), difference.mean() - half, difference.mean() + half


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gain"), [(CIFAR10, 0.033), (DENSENET, 0.011), (HARD, 0.033)])
def test_auto_beats_temperature(data_dir, name, gain):
    fit, test = halves(data_dir, name)
    found, plain = AutoCalibrator().fit(*fit), TemperatureScaling().fit(*fit)
    mean, _, high = paired(found, plain, test)
    assert found.chosen.name == "dirichlet"
    assert high < 0
    assert -mean == pytest.approx(gain, abs=0.003)
    # The cross-validated difference, from the fit rows alone, agrees with the test rows.
    row = next(row for row in found.candidates if row.name == "dirichlet")
    assert abs(row.difference - mean) < 4 * math.hypot(row.standard_error, (high - mean) / 1.96)


def test_vector_beats_temperature_where_temperature_leaves_four_percent(data_dir):
    fit, test = halves(data_dir, HARD)
    found, plain = make_calibrator("vector").fit(*fit), TemperatureScaling().fit(*fit)
    assert paired(found, plain, test)[2] < 0


@pytest.mark.parametrize("name", [DENSENET, HARD])
def test_isotonic_has_the_lowest_ece_and_pays_with_the_other_classes(data_dir, name):
    fit, test = halves(data_dir, name)
    found, plain = make_calibrator("isotonic").fit(*fit), TemperatureScaling().fit(*fit)
    label, confidence = (part.numpy() for part in found.predict(torch.from_numpy(test[0])))
    right = label == test[1]
    assert np.array_equal(label, test[0].argmax(axis=1))
    place = np.clip(np.ceil(confidence * 15) - 1, 0, 14).astype(int)
    own = abs(np.bincount(place, confidence - right, 15)).sum() / len(right)
    assert own < 0.02
    if name == DENSENET:
        # Raw proportions of an overconfident net: the NLL is worse than with one temperature.
        assert paired(found, plain, test)[1] > 0


def matrix_scaling(logits, labels, passes=100):
    """Guo's matrix scaling: all of W and b, no penalty."""
    values, of = torch.from_numpy(logits), torch.from_numpy(labels)
    weight = torch.eye(values.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(values.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=passes, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(values @ weight.T + bias, of)
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda rows: special.log_softmax(
        rows @ weight.detach().numpy().T + bias.detach().numpy(), axis=1
    )


@pytest.mark.parametrize("name", [pytest.param(DENSENET, marks=pytest.mark.slow), HARD])
def test_matrix_scaling_without_a_penalty_overfits_on_100_classes(data_dir, name):
    (logits, labels), (test, test_labels) = halves(data_dir, name)
    plain = TemperatureScaling().fit(logits, labels)
    matrix = matrix_scaling(logits, labels)
    raw = row_statistics(test, test_labels)
    after = row_statistics(test, test_labels, transform=plain.transform)
    overfit = row_statistics(test, test_labels, transform=matrix)
    at_fit = row_statistics(logits, labels, transform=matrix)
    # Guo et al., table 1: on CIFAR-100 temperature is far below raw, matrix scaling far above.
    assert ece(after, draws=1).value < ece(raw, draws=1).value
    assert ece(overfit, draws=1).value > 0.1 > 2 * ece(after, draws=1).value
    assert overfit.nll.mean() > 1.3 * after.nll.mean()
    assert at_fit.nll.mean() < 0.5 * after.nll.mean()
