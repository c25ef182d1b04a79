"""The evaluation on corrupted images as a whole."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from corruption_cases import (
    NOISES,
    likely,
    write_cifar,
    write_imagenet,
)
from hypothesis import given
from hypothesis import strategies as st

from ebm_guard import Guard
from ebm_guard.attacks import Examples
from ebm_guard.data.sources import ArraySource, open_source
from ebm_guard.errors import DataError, EbmGuardWarning, InvalidInputError
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.predictions import Predictions
from ebm_guard.robustness import corruptions
from ebm_guard.robustness.corruptions import published


@given(
    n=st.integers(1, 400),
    classes=st.integers(1, 12),
    limit=st.integers(1, 300),
    seed=st.integers(0, 50),
)
@oracles.QUICK
def test_chosen_rows_are_stratified(n, classes, limit, seed):
    labels = oracles.generator("rows", n, classes).integers(0, classes, n)
    rows = corruptions.choose_rows(labels, limit, seed)
    assert len(rows) == len(set(rows.tolist())) == min(n, limit)
    assert np.array_equal(rows, np.sort(rows))
    assert np.array_equal(rows, corruptions.choose_rows(labels, limit, seed))
    for label in range(classes):
        share = (labels == label).sum() * len(rows) / n
        assert abs((labels[rows] == label).sum() - share) < 1 + 1e-9


def test_every_row_is_chosen_equally_often():
    labels = np.repeat([0, 1, 2], [5, 11, 24])
    counts = np.zeros(40, int)
    for seed in range(600):
        counts[corruptions.choose_rows(labels, 10, seed)] += 1
    assert all(likely(count, 600, 0.25) for count in counts)
    # A class of 5 rows has a share of 5 * 10 / 40: one row, and in a quarter of cases two.
    extra_rows = sum(
        int((labels[corruptions.choose_rows(labels, 10, seed)] == 0).sum() - 1)
        for seed in range(600)
    )
    assert likely(extra_rows, 600, 0.25)


def forward(pixels):
    """Name the brighter half: left is class 0, right is class 1."""
    half = pixels.shape[3] // 2
    left, right = (part.mean(dim=(1, 2, 3)) for part in pixels.split(half, dim=3))
    logits = torch.stack([left - right, right - left, -torch.ones_like(left)], dim=1) * 10
    return ClassifierOutput(logits, pixels.flatten(1)[:, :6])


def examples(n=40, key="halves"):
    rng = oracles.generator(key)
    labels = torch.from_numpy(rng.integers(0, 2, n))
    pixels = torch.from_numpy(rng.integers(60, 130, (n, 1, 12, 12))).float()
    for row, label in enumerate(labels.tolist()):
        pixels[row, :, :, 6 * label : 6 * label + 6] += 70
    return Examples.of(pixels / 255, labels, torch.arange(n) + 100)


def test_plan_counts_forwards():
    calls = []

    def counted(pixels):
        calls.append(len(pixels))
        return forward(pixels)

    names = ["jpeg", "contrast"]
    plan = corruptions.plan_corruptions(40, names, (5, 1, 1), limit=15)
    table = corruptions.evaluate_corruptions(counted, examples(), names, (5, 1), limit=15)
    assert plan.severities == (1, 5)
    assert plan.forwards == sum(calls) == table.forwards == 15 * 5
    assert plan.to_dict()["forwards"] == 75
    assert corruptions.plan_corruptions(1000).forwards == 200 * (8 * 3 + 1)
    for change in ({"names": []}, {"severities": []}, {"limit": 0}, {"available": 0}):
        with pytest.raises(InvalidInputError, match="at least one"):
            corruptions.plan_corruptions(**({"available": 10} | change))
    with pytest.raises(InvalidInputError, match="severity 7"):
        corruptions.plan_corruptions(10, severities=(7,))


def test_table_does_not_depend_on_the_batch_or_the_order():
    whole = corruptions.evaluate_corruptions(forward, examples(), NOISES, limit=None)
    small = corruptions.evaluate_corruptions(forward, examples(), NOISES, limit=None, batch_size=3)
    order = torch.from_numpy(oracles.generator("order").permutation(40))
    shuffled = corruptions.evaluate_corruptions(
        forward, examples().select(order), NOISES, limit=None
    )
    assert whole.to_dict() == small.to_dict()
    for cell, other in zip(whole.cells, shuffled.cells, strict=True):
        assert cell.accuracy == other.accuracy
        assert cell.energy_auroc.value == pytest.approx(other.energy_auroc.value)
    assert whole.clean.accuracy.value == 1
    assert whole.source == "built-in set, not ImageNet-C"
    again = corruptions.evaluate_corruptions(forward, examples(), NOISES, limit=None, seed=1)
    assert again.to_dict() != whole.to_dict()


def test_all_cells_are_of_the_same_chosen_images():
    seen = []

    def watching(pixels):
        seen.append(pixels)
        return forward(pixels)

    # A black image stays black under shot noise, so the images can be told.
    given_ones = examples()
    dark = given_ones.pixels.clone()
    dark[::2] = 0
    dark = Examples(dark, given_ones.labels, given_ones.ids)
    corruptions.evaluate_corruptions(watching, dark, ["shot_noise"], limit=12)
    blacks = {tuple((part.flatten(1).amax(dim=1) == 0).tolist()) for part in seen}
    assert len(seen) == 4
    assert len(blacks) == 1
    assert 0 < sum(next(iter(blacks))) < 12


def test_evaluation_with_a_gate_on_features():
    chosen = examples()
    fit, bank = (
        corruptions.predict_corrupted(forward, examples(80, key)) for key in ("fit", "bank")
    )
    assert fit.ids[0] == "100"
    assert fit.features.shape == (80, 6)
    unlabelled = replace(fit, labels=None)
    with pytest.warns(EbmGuardWarning, match="no labels"):
        guard = Guard().fit(unlabelled, score="knn", false_reject_rate=0.2, fit_data=bank)
    table = corruptions.evaluate_corruptions(
        forward, chosen, ["brightness"], parts=guard._parts(), progress=True
    )
    assert (table.score, table.probabilities) == ("knn", "softmax")
    last, after = table.cells[-1], corruptions.predict_corrupted(forward, chosen, "brightness", 5)
    assert last.score_auroc.value != last.energy_auroc.value
    assert last.coverage.value == guard.decide_stored(after).accept.double().mean()


def test_half_precision_logits_become_floats():
    def half(pixels):
        return ClassifierOutput(forward(pixels).logits.bfloat16(), None)

    assert corruptions.predict_corrupted(half, examples()).logits.dtype == np.float32


def darkness(source):
    """Predict by the red value of the first pixel, which the fake sets are marked with."""
    values = np.array([np.asarray(source.load(row))[0, 0, 0] for row in range(len(source))])
    logits = np.zeros((len(values), 10), np.float32)
    logits[np.arange(len(values)), values // 10 % 10] = 5
    return Predictions(logits, labels=source.labels, ids=source.ids)


def test_evaluation_of_a_published_set(tmp_path):
    some = corruptions.open_cifar10_c(write_cifar(tmp_path / "c"), ["fog", "snow"], (1, 2))
    numbers = np.arange(3, dtype=np.int64)
    images = np.zeros((3, 32, 32, 3), np.uint8)
    images += (10 * numbers[:, None, None, None]).astype(np.uint8)
    clean = ArraySource("clean", images, numbers, numbers, None)
    table = corruptions.evaluate_published(some, darkness, clean)
    assert table.source == "CIFAR-10-C"
    assert table.n == 3
    assert table.clean.accuracy.value == 1
    # The images at severity s say class s, and their labels are 0, 1, 2.
    assert [cell.accuracy.value for cell in table.cells] == [1 / 3] * 4
    assert table.summary.mce is None
    limited = corruptions.evaluate_published(some, darkness, clean, limit=2)
    assert limited.n == 2
    with pytest.raises(DataError, match="has no labels"):
        corruptions.evaluate_published(some, darkness, clean.without_labels())
    foreign = ArraySource("other", images[:1], numbers[:1] + 20_000, numbers[:1], None)
    with pytest.raises(DataError, match="has no image '20000'"):
        corruptions.evaluate_published(some, darkness, foreign)


def test_evaluation_of_folders_of_the_same_names(tmp_path):
    folder = write_imagenet(tmp_path / "c", ["fog"])
    clean = open_source(f"folder:{folder / 'fog' / '1'}")
    table = corruptions.evaluate_published(
        published.open_imagenet_c(folder, ["fog"], [1, 5]), darkness, clean
    )
    assert table.n == 2
    assert table.cells[0].accuracy == table.clean.accuracy
    assert "1,000" in table.summary.mce_note
