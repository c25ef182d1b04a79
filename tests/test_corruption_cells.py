"""Cells, summaries and mCE against slow loops."""

import json
import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
from corruption_cases import (
    SEVERITIES,
)
from scipy import stats

from ebm_guard import Guard
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.ood.metrics import auroc
from ebm_guard.predictions import Predictions
from ebm_guard.robustness import corruptions
from ebm_guard.robustness.corruptions import alexnet, extra, measure


def toy(name, n=120, classes=4, width=3.0):
    rng = oracles.generator("toy corruption", name)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(0, 1, (n, classes))
    logits[np.arange(n), labels] += width
    return Predictions(logits.astype(np.float32), labels=labels, source=name)


@pytest.fixture(scope="module")
def gates():
    """A guard with a temperature, and one that may change the predicted class."""
    fit = toy("fit", 400)
    # Class 0 is named too often, which the vector calibrator learns to undo.
    skewed = replace(fit, logits=fit.logits + np.float32([3, 0, 0, 0]), hashes=None)
    return {
        "temperature": Guard().fit(fit, calibrator="temperature"),
        "vector": Guard().fit(skewed, calibrator="vector"),
    }


@pytest.mark.parametrize("calibrator", [None, "temperature", "vector"])
def test_cell_equals_slow_loops(gates, calibrator):
    clean, worse = toy("clean"), replace(toy("clean"), logits=toy("worse", width=1.0).logits)
    parts = None if calibrator is None else gates[calibrator]._parts()
    before, after = (measure.deployed_rows(part, parts) for part in (clean, worse))
    cell = measure.corruption_cell("fog", 3, after, before)
    if parts is None:
        log_p = oracles.log_softmax(worse.logits)
        label = worse.logits.argmax(axis=1)
    else:
        log_p = parts.calibrator.transform(worse.logits)
        label = (worse.logits if calibrator == "temperature" else log_p).argmax(axis=1)
    changed = (label != worse.logits.argmax(axis=1)).any()
    assert changed == (calibrator == "vector")
    right = label == worse.labels
    assert cell.n == 120
    assert cell.accuracy.value == pytest.approx(right.mean())
    assert cell.nll.value == pytest.approx(-log_p[np.arange(120), worse.labels].mean())
    confidence = np.exp(log_p[np.arange(120), label])
    gaps = [
        abs((confidence - right)[(confidence > low / 15) & (confidence <= (low + 1) / 15)].sum())
        for low in range(15)
    ]
    assert cell.ece.value == pytest.approx(sum(gaps) / 120, abs=1e-6)
    energies = [oracles.energy(part.logits) for part in (clean, worse)]
    assert cell.energy_auroc.value == pytest.approx(oracles.auroc(*map(list, energies)), abs=1e-6)
    if parts is None:
        assert (cell.coverage, cell.score_auroc, cell.accuracy_accepted) == (None, None, None)
        return
    accept = energies[1] <= float(parts.threshold.cut)
    assert cell.coverage.value == pytest.approx(accept.mean())
    assert cell.accuracy_accepted.value == pytest.approx(right[accept].mean())
    assert cell.accuracy_accepted.n == accept.sum()
    assert cell.score_auroc.value == cell.energy_auroc.value
    for name in ("accuracy", "nll", "energy_auroc", "coverage", "accuracy_accepted"):
        metric = getattr(cell, name)
        assert metric.low < metric.value < metric.high, name


def test_invalid_rows_are_wrong_refused_and_counted(gates):
    clean = toy("clean")
    logits = clean.logits.copy()
    logits[:7, 1] = math.nan
    logits[7, 2] = math.inf
    broken = replace(clean, logits=logits, hashes=None)
    parts = gates["temperature"]._parts()
    for gate in (None, parts):
        before, after = (measure.deployed_rows(part, gate) for part in (clean, broken))
        cell = measure.corruption_cell("fog", 1, after, before)
        assert cell.invalid == 8
        assert cell.n == 120
        assert cell.accuracy.value == pytest.approx(before.correct[8:].sum() / 120)
        assert cell.ece.n == cell.energy_auroc.n == 112
        # The other rows are the same in both.
        assert cell.energy_auroc.value == 0.5
    assert not after.accept[:8].any()
    all_broken = replace(clean, logits=np.full_like(logits, np.nan), hashes=None)
    table = corruptions.corruption_table(clean, [("fog", 1, all_broken)], parts, source="mine")
    cell = table.cells[0]
    assert cell.accuracy.value == cell.coverage.value == 0
    assert (cell.ece, cell.nll, cell.energy_auroc, cell.accuracy_accepted) == (None,) * 4
    assert (table.summary.ece, table.summary.nll, table.summary.energy_auroc) == (None,) * 3
    json.dumps(table.to_dict(), allow_nan=False)


def test_paired_auroc_equals_its_definition():
    rng = oracles.generator("paired")
    before = rng.integers(0, 6, 25).astype(float)
    after = before + rng.integers(-1, 4, 25)
    found = measure.paired_auroc(before, after)
    wins = np.array([[(a > b) + (a == b) / 2 for a in after] for b in before])
    assert found.value == pytest.approx(wins.mean())
    parts = wins.mean(axis=1) + wins.mean(axis=0)
    deviation = math.sqrt(parts.var(ddof=1) / 25)
    scale = found.value * (1 - found.value)
    centre = math.log(found.value / (1 - found.value))
    for end, sign in ((found.low, -1), (found.high, 1)):
        wanted = centre + sign * stats.norm.ppf(0.975) * deviation / scale
        assert math.log(end / (1 - end)) == pytest.approx(wanted)
    assert found.value == auroc(before, after).value


def test_paired_interval_covers_and_is_narrower_than_the_unpaired_one():
    runs, covered, narrower = 400, 0, 0
    # after = before + 1 + noise: P(after_j > before_i) for two different images.
    truth = stats.norm.cdf(1 / math.sqrt(2 + 0.25))
    rng = oracles.generator("coverage")
    for _ in range(runs):
        before = rng.normal(size=150)
        after = before + 1 + rng.normal(0, 0.5, 150)
        found, unpaired = measure.paired_auroc(before, after), auroc(before, after)
        covered += found.low <= truth <= found.high
        narrower += found.high - found.low < unpaired.high - unpaired.low
    assert stats.binomtest(covered, runs, 0.95).pvalue > 1e-4
    assert narrower == runs


def test_paired_auroc_at_its_ends():
    rows = np.arange(30.0)
    same = measure.paired_auroc(rows, rows)
    assert (same.low, same.high) == pytest.approx((0.5, 0.5))
    top = measure.paired_auroc(rows, rows + 100)
    assert (top.value, top.low, top.high) == (1.0, 0.9, 1.0)
    low = measure.paired_auroc(rows + 100, rows)
    assert (low.value, low.low, low.high) == (0.0, 0.0, 0.1)
    assert measure.paired_auroc(rows[:1], rows[:1]).low is None


@pytest.mark.parametrize("between", [0.0, 1.0], ids=["independent cells", "equal cells"])
def test_mean_share_covers(between):
    runs, covered, images, cells = 400, 0, 100, 12
    rng = oracles.generator("share", between)
    for _ in range(runs):
        own = rng.random((1, images)) < 0.7
        each = rng.random((cells, images)) < 0.7
        hits = np.where(rng.random((1, images)) < between, own, each)
        found = measure.mean_share(hits)
        assert found.value == pytest.approx(hits.mean())
        covered += found.low <= 0.7 <= found.high
    assert stats.binomtest(covered, runs, 0.95).pvalue > 1e-4
    assert found.n == images


def test_mean_share_at_its_ends():
    found = measure.mean_share(np.ones((5, 20), bool))
    assert found.value == found.high == 1
    # As many rows as images, not as cells: all cells of an image may stand or fall together.
    assert found.low == pytest.approx(20 / (20 + stats.norm.ppf(0.975) ** 2))
    assert measure.mean_share(np.array([[True], [False]])).low < 0.5


def test_summary_equals_slow_loops(gates):
    clean = toy("clean")
    made = {
        (name, severity): replace(
            clean, logits=toy((name, severity), width=3 - severity / 2).logits
        )
        for name in ("snow", "fog")
        for severity in (1, 5)
    }
    rows = [(*key, replace(part, hashes=None)) for key, part in made.items()]
    table = corruptions.corruption_table(
        clean, rows, gates["temperature"]._parts(), source="mine", facts={"seed": 0}
    )
    summary = table.summary
    assert table.names == ("snow", "fog")
    assert table.severities == (1, 5)
    assert (table.probabilities, table.score, table.n) == ("temperature", "energy", 120)
    assert table.forwards == 120 * 5
    for name in ("accuracy", "ece", "nll", "energy_auroc", "score_auroc", "coverage"):
        cells = [getattr(cell, name).value for cell in table.cells]
        assert getattr(summary, name).value == pytest.approx(np.mean(cells)), name
    for severity, metric in summary.accuracy_by_severity.items():
        cells = [table.cell(name, severity).accuracy.value for name in table.names]
        assert metric.value == pytest.approx(np.mean(cells))
    for name, metric in summary.accuracy_by_name.items():
        cells = [table.cell(name, severity).accuracy.value for severity in (1, 5)]
        assert metric.value == pytest.approx(np.mean(cells))
    assert table.cell(*summary.worst).accuracy.value == min(
        cell.accuracy.value for cell in table.cells
    )
    assert summary.mce is None
    assert "ImageNet-C's own files" in summary.mce_note
    assert table.clean.energy_auroc is None
    assert table.clean.coverage.value > 0.8
    json.dumps(table.to_dict(), allow_nan=False)
    with pytest.raises(KeyError, match="hail at severity 1"):
        table.cell("hail", 1)


def test_probabilities_are_named(gates):
    clean = toy("clean")
    plain = corruptions.corruption_table(clean, [("fog", 1, clean)], source="mine")
    assert (plain.probabilities, plain.score) == ("softmax", None)
    assert plain.cells[0].energy_auroc.value == 0.5
    vector = corruptions.corruption_table(
        clean, [("fog", 1, clean)], gates["vector"]._parts(), source="mine"
    )
    assert vector.probabilities == "vector"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((119, 4)), "labels": np.zeros(119, int)}, "got 119 rows, and 120"),
        ({"labels": np.zeros(120, int)}, "labels differ from those of the clean rows"),
        ({"ids": tuple(f"x{row}" for row in range(120))}, "the ids are not those"),
        ({"labels": None}, "has no labels"),
    ],
)
def test_other_images_are_refused(change, message):
    clean = replace(toy("clean"), ids=tuple(map(str, range(120))))
    other = replace(clean, **({"ids": None, "hashes": None} | change))
    with pytest.raises(DataError, match=message):
        corruptions.corruption_table(clean, [("fog", 1, other)], source="mine")


def test_nothing_to_measure_is_refused():
    with pytest.raises(InvalidInputError, match="no corrupted images"):
        corruptions.corruption_table(toy("clean"), [], source="mine")
    with pytest.raises(InvalidInputError, match="needed logits"):
        measure.deployed_rows(replace(toy("clean"), kind="probs"))


def thousand(name, rows=24):
    rng = oracles.generator("thousand", name)
    labels = np.arange(rows) * 7
    logits = rng.normal(size=(rows, 1000)).astype(np.float32)
    logits[rng.random(rows) < 0.6, :] *= 0.1
    logits[np.arange(rows), labels] += 3
    return Predictions(logits, labels=labels)


def test_mce_is_relative_to_alexnet():
    clean = thousand("clean")
    made = {(name, s): thousand((name, s)) for name in extra.IMAGENET_C for s in SEVERITIES}
    table = corruptions.corruption_table(
        clean, ((*key, part) for key, part in made.items()), source="ImageNet-C"
    )
    total = 0.0
    for name, error in alexnet.ALEXNET_ERRORS.items():
        errors = [1 - table.cell(name, severity).accuracy.value for severity in SEVERITIES]
        total += sum(errors) / (5 * error)
    assert table.summary.mce.value == pytest.approx(total / 15)
    assert table.summary.mce.low < table.summary.mce.value < table.summary.mce.high
    assert table.summary.mce.n == 24
    assert "AlexNet" in table.summary.mce_note


def test_alexnet_has_an_mce_of_one():
    assert tuple(alexnet.ALEXNET_ERRORS) == extra.IMAGENET_C
    # In percent, noise, blur, weather, digital.
    percent = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6]
    percent += [71.8, 60.7]
    assert [100 * error for error in alexnet.ALEXNET_ERRORS.values()] == pytest.approx(
        percent, abs=0.06
    )
    n = 10_000
    wrong = {
        (name, severity): np.arange(n) < round(error * n)
        for name, error in alexnet.ALEXNET_ERRORS.items()
        for severity in (1,)
    }
    wrong = {(name, s): wrong[name, 1] for name in extra.IMAGENET_C for s in SEVERITIES}
    assert alexnet.mean_corruption_error(wrong).value == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": "built-in set, not ImageNet-C"}, "own files alone"),
        ({"title": "CIFAR-10-C"}, "own files alone"),
        ({"names": extra.IMAGENET_C[1:]}, "all fifteen types"),
        ({"severities": (1, 2, 3, 5)}, "all five severities"),
        ({"num_classes": 100}, "100 classes"),
    ],
)
def test_no_mce_where_the_table_does_not_apply(change, message):
    whole = {
        "title": "ImageNet-C",
        "names": extra.IMAGENET_C,
        "severities": SEVERITIES,
        "num_classes": 1000,
    }
    assert alexnet.why_no_mce(**whole) == ""
    assert message in alexnet.why_no_mce(**(whole | change))
    with pytest.raises(InvalidInputError, match="all fifteen"):
        alexnet.mean_corruption_error({("fog", 1): np.ones(3, bool)})
