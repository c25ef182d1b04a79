"""The mean of calibrated ranks: against a loop, in the tails, and through storage."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_feature_scores import clusters, tensors

from ebm_guard.errors import DataError, InvalidInputError, NotFittedError, TooFewRowsError
from ebm_guard.ood import KNN, Combined, MaxLogit, combine, make_score
from ebm_guard.ood.combination import _curve
from ebm_guard.predictions import Predictions


def naive_rank(fit, value):
    """Mid-rank among the fit scores, straight between neighbours, log beyond the ends."""
    points = sorted(set(fit))
    level = {p: (sum(v < p for v in fit) + sum(v == p for v in fit) / 2) / len(fit) for p in points}
    low, high = np.quantile(fit, [0.25, 0.75])
    spread = high - low or points[-1] - points[0]
    if value > points[-1]:
        return level[points[-1]] + math.log1p((value - points[-1]) / spread)
    if value < points[0]:
        return level[points[0]] - math.log1p((points[0] - value) / spread)
    for left, right in pairwise(points):
        if left <= value <= right:
            share = (value - left) / (right - left)
            return level[left] + share * (level[right] - level[left])
    raise AssertionError(value)


class Given(MaxLogit):
    """The first logit as a score, so that any fit scores can be written down."""

    def score(self, logits, features=None):
        return logits[:, 0].double()


def ranked(fit_values, values, **settings):
    fit = Predictions(np.stack([fit_values, fit_values], axis=1))
    score = Combined([Given(), Given()], **settings).fit(fit)
    return score(torch.from_numpy(np.stack([values, values], axis=1))).numpy()


@given(
    st.lists(st.integers(-5, 5), min_size=2, max_size=40).filter(lambda v: len(set(v)) > 1),
    st.lists(st.floats(-20, 20), min_size=1, max_size=20),
)
@oracles.QUICK
def test_equals_the_loop_with_ties(fit, values):
    fit, values = [float(v) for v in fit], np.array(values)
    found = ranked(np.array(fit), values)
    assert np.allclose(found, [naive_rank(fit, v) for v in values], rtol=1e-12, atol=1e-12)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40).filter(lambda v: max(v) - min(v) > 1e-3)
)
@oracles.QUICK
def test_ranks_never_fall(fit):
    values = np.sort(np.concatenate([fit, np.linspace(min(fit) - 1e7, max(fit) + 1e7, 101)]))
    assert (np.diff(ranked(np.array(fit), values)) >= -1e-12).all()


def test_rows_beyond_all_fit_scores_are_still_ordered():
    fit = oracles.generator("tail").normal(size=1000)
    values = np.array([10.0, 11.0, 1e3, 1e6, 1e9])
    found = ranked(fit, values)
    assert (np.diff(found) > 0).all()
    assert (found > 1).all()
    assert (np.diff(ranked(fit, -values)) < 0).all()
    # A plain distribution function calls them all 1.
    assert len({float((fit <= value).mean()) for value in values}) == 1


def test_ranks_of_the_fit_rows_are_uniform():
    fit = oracles.generator("uniform").exponential(size=500)
    assert np.allclose(np.sort(ranked(fit, fit)), (np.arange(500) + 0.5) / 500)


def test_few_knots_stay_near_the_ranks():
    fit = oracles.generator("knots").normal(size=20_000)
    points, levels, _ = _curve(fit, 1000, "x")
    assert len(points) == len(levels) == 1000
    assert (points[0], points[-1]) == (fit.min(), fit.max())
    assert np.abs(ranked(fit, fit, knots=1000) - ranked(fit, fit, knots=20_000)).max() < 2e-3


def test_equals_the_mean_of_the_members():
    fit, rows = clusters("fit"), clusters("new", 30, spread=3)
    names = ["energy", "mahalanobis", "fdbd"]
    score = combine(*names).fit(fit)
    ranks = []
    for name in names:
        member = make_score(name).fit(fit)
        known = member.of(fit).tolist()
        ranks.append([naive_rank(known, value) for value in member.of(rows)])
    assert np.allclose(score.of(rows), np.mean(ranks, axis=0), rtol=1e-9)
    assert np.allclose(score(*tensors(rows)).numpy(), score.of(rows), rtol=1e-12)


def test_needs_are_those_of_the_members():
    assert not combine("energy", "msp").needs_features
    both = combine("energy", "mahalanobis")
    assert (both.needs_features, both.needs_labels, both.needs_head) == (True, True, False)
    assert combine("energy", "vim").needs_head
    assert combine("msp", "gen").from_probabilities
    assert not combine("msp", "energy").from_probabilities
    rows = clusters("fit", n=20)
    assert both.why_not_fit(replace(rows, labels=None)) == "mahalanobis: needs labels"
    assert "mahalanobis: needs features" in both.why_not(replace(rows, features=None))
    assert both.why_not(rows) is None
    with pytest.raises(TooFewRowsError):
        both.fit(rows)


def test_saved_equals_loaded_to_the_bit():
    fit, rows = clusters("fit"), clusters("new", 30)
    nested = combine("energy", KNN(k=7), combine("msp", "vim"), knots=50).fit(fit)
    settings = json.loads(json.dumps(nested.settings(), allow_nan=False))
    state = {name: value.clone() for name, value in nested.state_dict().items()}
    again = Combined.from_state(state, settings)
    assert again.settings() == nested.settings()
    assert np.array_equal(again.of(rows), nested.of(rows))
    assert np.array_equal(nested.half().of(rows), again.of(rows))
    with pytest.raises(KeyError):
        Combined.from_state({}, settings)


def test_broken_rows_stay_broken():
    score = combine("energy", "mahalanobis").fit(clusters("fit"))
    logits, features = tensors(clusters("new", 5))
    logits[1, 0] = math.nan
    features[2, 0] = math.inf
    assert torch.isfinite(score(logits, features)).tolist() == [True, False, False, True, True]


def test_what_cannot_be_combined():
    for wrong in (["energy"], "energy", []):
        with pytest.raises(InvalidInputError, match="two or more"):
            Combined(wrong)
    with pytest.raises(InvalidInputError, match="did you mean"):
        combine("energy", "mahalanobi")
    score = combine("energy", "msp")
    with pytest.raises(NotFittedError):
        score(torch.zeros(2, 3))
    same = Predictions(np.zeros((30, 3)))
    with pytest.raises(DataError, match="no ranks"):
        score.fit(same)
    broken = np.zeros((30, 3))
    broken[0] = np.nan
    with pytest.raises(DataError, match="not finite on 1 fit rows"):
        score.fit(Predictions(broken))
    for call in (lambda: score.partial_fit(same), lambda: score.merge(score)):
        with pytest.raises(InvalidInputError, match="all rows"):
            call()
