"""Per-group figures: counts, order, flags, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ebm_guard.ood import make_score
from ebm_guard.predictions import Predictions
from ebm_guard.report import Settings, build_report
from ebm_guard.report.crossfit import fit_protocol
from ebm_guard.report.groups_section import groups_section
from ebm_guard.report.score_table import score_table


def grouped(n=2000, bad_share=0.3, labelled=True):
    """Three groups; in 'night' a share of the labels is wrong."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, n)
    groups = np.array(["day", "dusk", "night"])[generator.integers(0, 3, n)]
    logits = np.eye(3)[labels] * 4 + generator.normal(size=(n, 3))
    wrong = (groups == "night") & (generator.random(n) < bad_share)
    labels = np.where(wrong, (labels + 1) % 3, labels)
    return Predictions(logits, labels=labels if labelled else None, groups=groups)


def section(part):
    return build_report(part).to_dict()["groups"]


def test_figures_equal_a_count_by_hand():
    part = grouped()
    found = {group["name"]: group for group in section(part)["groups"]}
    for name in ("day", "dusk", "night"):
        rows = part.groups == name
        right = (part.logits.argmax(axis=1) == part.labels)[rows]
        assert found[name]["n"] == rows.sum()
        accuracy = found[name]["accuracy"]
        assert accuracy["value"] == pytest.approx(right.mean())
        ends = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        assert (accuracy["low"], accuracy["high"]) == pytest.approx((ends.low, ends.high))


@pytest.mark.slow
def test_the_worst_group_comes_first_and_is_flagged():
    found = section(grouped())
    assert found["groups"][0]["name"] == "night"
    assert found["groups"][0]["flagged"] == "accuracy"
    assert all(not group["flagged"] for group in found["groups"][1:])
    assert found["verdict"]["status"] == "attention"
    assert "night (accuracy)" in found["verdict"]["sentence"]


@pytest.mark.slow
def test_equal_groups_are_flagged_no_more_often_than_promised():
    # Groups drawn at random: at most 5 % of reports may flag any; tested exactly at 1e-3.
    generator = np.random.default_rng(1)
    flagged, trials = 0, 60
    part = grouped(n=1200, bad_share=0.0)
    for _ in range(trials):
        shuffled = Predictions(
            part.logits, labels=part.labels, groups=generator.integers(0, 8, len(part))
        )
        energy = score_table(shuffled, {}, None, make_score("energy"), 0).columns["energy"]
        fitted = fit_protocol(shuffled, None, None, energy, Settings())
        found = groups_section(shuffled, fitted, 0)
        flagged += any("accuracy" in group.flagged for group in found.groups)
    assert stats.binomtest(flagged, trials, 0.05, alternative="greater").pvalue > 1e-3


def test_without_labels_coverage_is_left():
    found = section(grouped(labelled=False))
    for group in found["groups"]:
        assert group["accuracy"] is None
        assert group["ece"] is None
        assert 0.8 < group["coverage"]["value"] <= 1


@pytest.mark.slow
def test_small_groups_show_no_ece():
    part = grouped(n=400)
    groups = part.groups.copy()
    groups[:20] = "rare"
    found = section(Predictions(part.logits, labels=part.labels, groups=groups))
    rare = next(group for group in found["groups"] if group["name"] == "rare")
    assert rare["n"] == 20
    assert rare["ece"] is None
    assert rare["overconfidence"] is not None


def test_no_groups_says_so():
    part = grouped()
    found = section(Predictions(part.logits, labels=part.labels))
    assert "names no groups" in found["not_run"]
