"""The same numbers from the libraries that we measure ourselves against, where they are installed.

`pip install netcal torchmetrics pytorch-ood` (the `bench` extra) runs these.
"""

import warnings

import numpy as np
import oracles
import pytest
import torch
from scipy import special

from ebm_guard.calibration import TemperatureScaling, row_statistics
from ebm_guard.calibration.metrics import RowStatistics, ece, mce
from ebm_guard.errors import InvalidInputError
from ebm_guard.ood import make_score, ood_metrics

# What these libraries deprecate or import is not ours to judge.
pytestmark = pytest.mark.filterwarnings("ignore")


def optional(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            module, reason=f"{module.partition('.')[0]} is not installed: see the `bench` extra"
        )


def sample(classes=5, n=3000):
    rng = oracles.generator("bench", classes)
    logits = rng.normal(0, 3, size=(n, classes))
    return logits, oracles.draw_labels(logits / 2, rng)


def value_of(logits, labels):
    return ece(row_statistics(logits, labels), draws=1).value


@pytest.mark.parametrize("classes", [3, 10])
def test_ece_equals_netcal(classes):
    netcal = optional("netcal.metrics")
    logits, labels = sample(classes)
    theirs = netcal.ECE(15).measure(special.softmax(logits, axis=1), labels)
    assert value_of(logits, labels) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("classes", [3, 10])
def test_ece_equals_torchmetrics_below_confidence_one(classes):
    functional = optional("torchmetrics.functional.classification")
    logits, labels = sample(classes)
    p = torch.from_numpy(special.softmax(logits, axis=1))
    assert p.max() < 1
    theirs = functional.multiclass_calibration_error(
        p, torch.from_numpy(labels), num_classes=classes, n_bins=15, norm="l1"
    )
    assert value_of(logits, labels) == pytest.approx(theirs.item(), abs=1e-6)


def test_torchmetrics_has_a_sixteenth_bin_for_confidence_one():
    """Up to 1.9 a confidence of exactly 1.0 gets a bin of its own beyond the last one.

    When this fails, the library has been repaired (issue 3510): then say so in the docs.
    """
    functional = optional("torchmetrics.functional.classification")
    # Last bin: one wrong row at 1.0 (+1) and ten right rows at 0.95 (-0.05 each). The row at 0.5
    # is there because netcal wants to see every class among the labels.
    p = torch.tensor([[1, 0, 0]] + [[0.95, 0.05, 0]] * 10 + [[0.3, 0.2, 0.5]], dtype=torch.float64)
    labels = torch.tensor([1] + [0] * 10 + [2])
    theirs = functional.multiclass_calibration_error(p, labels, num_classes=3, n_bins=15)
    confidence, correct = p.amax(1).numpy(), (p.argmax(1) == labels).numpy()
    nothing = np.zeros(12)
    rows = RowStatistics(confidence, nothing.astype(np.int64), correct, nothing, nothing)
    assert ece(rows, draws=1).value == pytest.approx((0.5 + 0.5) / 12)
    assert ece(rows, draws=1).value == pytest.approx(oracles.ece(confidence, correct))
    assert theirs.item() == pytest.approx((1.5 + 0.5) / 12)
    netcal = optional("netcal.metrics")
    assert netcal.ECE(15).measure(p.numpy(), labels.numpy()) == pytest.approx((0.5 + 0.5) / 12)


@pytest.mark.parametrize("classes", [3, 10])
def test_mce_equals_netcal_and_torchmetrics_where_every_bin_has_a_row(classes):
    netcal = optional("netcal.metrics")
    functional = optional("torchmetrics.functional.classification")
    logits, labels = sample(classes)
    p = special.softmax(logits, axis=1)
    ours = mce(row_statistics(logits, labels), min_count=1, draws=2).value
    assert ours == pytest.approx(netcal.MCE(15).measure(p, labels), abs=1e-9)
    theirs = functional.multiclass_calibration_error(
        torch.from_numpy(p), torch.from_numpy(labels), num_classes=classes, n_bins=15, norm="max"
    )
    assert ours == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_nan_gives_numbers_elsewhere_and_an_error_here(share):
    """When one of these raises, the library has been repaired: then say so in the docs."""
    functional = optional("torchmetrics.functional.classification")
    netcal = optional("netcal.metrics")
    logits, labels = sample(3)
    p = special.softmax(logits, axis=1)
    bad = np.arange(len(p)) < share * len(p)
    p[bad] = np.nan
    logits[bad] = np.nan
    theirs = functional.multiclass_calibration_error(
        torch.from_numpy(p), torch.from_numpy(labels), num_classes=3, n_bins=15
    )
    assert torch.isfinite(theirs)
    assert np.isfinite(netcal.ECE(15).measure(p, labels))
    with pytest.raises(InvalidInputError, match=f"{bad.sum()} rows with NaN"):
        row_statistics(logits, labels)


def test_netcal_does_not_move_float32_probabilities():
    """Up to 1.4 its temperature of float32 probabilities is 1, where 2 is right."""
    scaling = optional("netcal.scaling")
    rng = oracles.generator("netcal float32")
    logits = rng.normal(0, 3, (2000, 5))
    labels = oracles.draw_labels(logits / 2, rng)
    p = special.softmax(logits, axis=1)
    theirs = {}
    for dtype in (np.float32, np.float64):
        fitted = scaling.TemperatureScaling()
        fitted.fit(p.astype(dtype), labels)
        theirs[dtype] = 1 / float(np.ravel(fitted.temperature)[0])
    ours = float(TemperatureScaling().fit(logits, labels).temperature)
    assert theirs[np.float32] == pytest.approx(1, abs=1e-6)
    assert theirs[np.float64] == pytest.approx(ours, rel=0.01)
    assert ours == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("name", "theirs"), [("energy", "EnergyBased"), ("maxlogit", "MaxLogit")])
def test_scores_equal_pytorch_ood(name, theirs):
    detectors = optional("pytorch_ood.detector")
    logits = torch.from_numpy(sample(10)[0])
    assert torch.allclose(make_score(name)(logits), getattr(detectors, theirs).score(logits))


@pytest.mark.parametrize(("name", "theirs"), [("msp", "MaxSoftmax"), ("gen", "GEN")])
def test_scores_order_rows_as_pytorch_ood(name, theirs):
    detectors = optional("pytorch_ood.detector")
    # Small logits: theirs clamps at 1e-7 and ties where the softmax saturates.
    logits = torch.from_numpy(sample(10)[0]) / 3
    other = getattr(detectors, theirs).score(logits)
    assert torch.equal(make_score(name)(logits).argsort(), other.argsort())


def test_gen_of_a_saturated_net_ties_in_pytorch_ood():
    detectors = optional("pytorch_ood.detector")
    rng = oracles.generator("saturated")
    sets = []
    for margin in (25, 20):
        logits = rng.normal(size=(2000, 10))
        logits[np.arange(2000), rng.integers(0, 10, 2000)] += margin
        sets.append(torch.from_numpy(logits).float())
    ours = [make_score("gen")(part).double().numpy() for part in sets]
    theirs = [detectors.GEN.score(part).double().numpy() for part in sets]
    assert ood_metrics(*ours, draws=1).auroc.value > 0.998
    assert ood_metrics(*theirs, draws=1).auroc.value < 0.6


@pytest.mark.parametrize("decimals", [1, 12])
def test_ood_metrics_equal_pytorch_ood(decimals):
    metrics = optional("pytorch_ood.metrics")
    rng = oracles.generator("metrics", decimals)
    inside = rng.normal(size=900).round(decimals)
    outside = rng.normal(1.5, 1, size=700).round(decimals)
    judge = metrics.OODMetrics()
    # Their labels: >= 0 is ID, < 0 is OOD.
    judge.update(
        torch.from_numpy(np.concatenate([inside, outside])),
        torch.cat([torch.zeros(900), -torch.ones(700)]).long(),
    )
    theirs = judge.compute()
    found = ood_metrics(inside, outside, draws=1)
    assert found.auroc.value == pytest.approx(theirs["AUROC"], abs=1e-6)
    # They integrate by trapezoids, which is too good where scores tie; we sum steps (average
    # precision, as scikit-learn).
    if decimals > 1:
        assert found.aupr_in.value == pytest.approx(theirs["AUPR-IN"], abs=2e-3)
        assert found.aupr_out.value == pytest.approx(theirs["AUPR-OUT"], abs=2e-3)
    assert found.fpr95_ood_positive.value == pytest.approx(theirs["FPR95TPR"], abs=1e-6)
    assert found.fpr95.value != pytest.approx(theirs["FPR95TPR"], abs=1e-3)
