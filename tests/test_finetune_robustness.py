"""Robustness before and after: the same images, compared image by image."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from ebm_guard import AttackOptions, evaluate_robustness
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.errors import InvalidInputError
from ebm_guard.report.finetune_robustness import compare_robustness
from ebm_guard.report.paired import paired_shares
from ebm_guard.robustness.threat import Threat


@pytest.fixture(scope="module")
def evaluations():
    """The demo net, and the same net with a head that knows less."""
    demo = load_demo("evaluation")
    pixels = torch.from_numpy(demo.images[:24, None]).float() / 255
    labels = torch.from_numpy(demo.labels[:24])
    weak = demo_classifier()
    with torch.no_grad():
        list(weak.parameters())[-1][0] += 4.0
    options = AttackOptions(threats=(Threat.of("linf", ["0.05"]),), corruptions="none")
    return [
        evaluate_robustness(net, pixels, labels, options=options)
        for net in (demo_classifier(), weak)
    ]


def test_images_are_kept_and_never_written(evaluations):
    for found in evaluations:
        row = found.norms[0].epsilons[0]
        assert np.mean(row.standing) == row.worst_case.value
        assert np.mean(found.right) == found.clean.value
        # An image that stands under attack is right without one.
        assert all(right for right, stands in zip(found.right, row.standing, strict=True) if stands)
        content = found.to_dict()
        assert "standing" not in content["norms"][0]["epsilons"][0]
        json.dumps(content, allow_nan=False)
        assert "right" not in content


def test_the_difference_is_counted_image_by_image(evaluations):
    start, candidate = evaluations
    item = compare_robustness(start, candidate).norms[0]["rows"][0]["worst_case"]
    one, two = (np.array(found.norms[0].epsilons[0].standing) for found in evaluations)
    assert item.difference.method == "Tango, paired"
    assert item.difference.value == pytest.approx(two.mean() - one.mean())
    assert item.difference.low <= item.difference.value <= item.difference.high


def test_without_the_images_of_both_the_intervals_are_unpaired(evaluations):
    start, candidate = evaluations
    fewer = dataclasses.replace(candidate, right=())
    assert compare_robustness(start, fewer).clean.difference.method == "Newcombe, unpaired"


def test_the_interval_covers_and_is_narrower_where_nets_agree():
    rng = np.random.default_rng(7)
    missed, runs = 0, 400
    for _ in range(runs):
        one = rng.random(150) < 0.6
        two = np.where(rng.random(150) < 0.1, rng.random(150) < 0.3, one)
        found = paired_shares(one.tolist(), two.tolist()).difference
        # P(two) = 0.9 * 0.6 + 0.1 * 0.3.
        missed += not found.low <= 0.57 - 0.6 <= found.high
    from scipy import stats

    assert stats.binomtest(missed, runs, 0.05, alternative="greater").pvalue > 1e-3


def test_other_images_are_no_pairs():
    with pytest.raises(InvalidInputError, match="needed the same"):
        paired_shares([True], [True, False])
