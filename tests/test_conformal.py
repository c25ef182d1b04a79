"""Prediction sets: naive loops over probabilities, and coverage that a wrong rule does not have."""

import json
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebm_guard.calibration.conformal import APS, LAC, conformal_rank, conformal_report
from ebm_guard.errors import InvalidInputError, NotFittedError, TooFewRowsError

KINDS = [pytest.param(LAC, id="lac"), pytest.param(APS, id="aps")]


def draw(key, n, classes=5, scale=2.0):
    """Log-probabilities that are too sure, and labels."""
    rng = oracles.generator("conformal", key, n, classes)
    logits = rng.normal(size=(n, classes)) * scale
    return log_softmax(1.7 * logits), oracles.draw_labels(logits, rng)


def log_softmax(logits):
    values = np.asarray(logits, dtype=np.float64)
    return torch.log_softmax(torch.from_numpy(values), 1).numpy()


def naive_lac(p):
    """1 - p_c for each class."""
    return [1 - value for value in p]


def naive_aps(p):
    """The mass of the classes that are likelier than c."""
    return [math.fsum(other for other in p if other > value) for value in p]


@pytest.mark.parametrize(("kind", "naive"), [(LAC, naive_lac), (APS, naive_aps)])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("miscoverage", [0.05, 0.1, 0.4])
def test_sets_equal_loops_over_probabilities(kind, naive, classes, miscoverage):
    values, labels = draw("loops", 150, classes, scale=1.0)
    fresh, _ = draw("fresh", 60, classes, scale=1.0)
    scores = sorted(naive(np.exp(row))[y] for row, y in zip(values, labels, strict=True))
    cut = scores[math.ceil(151 * (1 - miscoverage) - 1e-9) - 1]
    truth = [[score <= cut for score in naive(np.exp(row))] for row in fresh]
    sets = kind().fit(values, labels, miscoverage)
    found = sets.sets(torch.from_numpy(fresh))
    assert found.dtype == torch.bool
    assert found.tolist() == truth
    assert sets.size(torch.from_numpy(fresh)).tolist() == [sum(row) for row in truth]


def coverage_misses(kind, rank, n=20, draws=4000):
    """Rows left out, each by sets of their own calibration rows."""
    values, labels = draw("coverage", (n + 1) * draws, 4)
    scores = kind().label_scores(values, labels).reshape(draws, n + 1)
    cut = np.sort(scores[:, :n], axis=1)[:, rank(n) - 1]
    return int((scores[:, n] > cut).sum()), draws


@pytest.mark.parametrize("kind", KINDS)
def test_sets_keep_their_promise_on_average(kind):
    misses, draws = coverage_misses(kind, lambda n: conformal_rank(n, 0.1))
    assert not oracles.fails_guarantee(misses, draws, 0.1)


@pytest.mark.parametrize("n", [20, 40])
def test_the_plain_quantile_fails_the_same_test(n):
    misses, draws = coverage_misses(LAC, lambda n: math.ceil(n * 0.9), n, 8000)
    assert oracles.fails_guarantee(misses, draws, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_through_fit_and_sets(kind):
    values, labels = draw("through", 21 * 400, 4)
    misses = 0
    for at in range(0, len(labels), 21):
        part, of = values[at : at + 21], labels[at : at + 21]
        sets = kind().fit(part[:20], of[:20])
        misses += not sets.sets(torch.from_numpy(part[20:]))[0, of[20]]
    assert not oracles.fails_guarantee(misses, 400, 0.1)


@oracles.QUICK
@given(
    st.integers(0, 1000), st.floats(0.02, 0.9), st.floats(0.02, 0.9), st.sampled_from([LAC, APS])
)
def test_sets_are_nested_in_the_miscoverage(seed, one, two, kind):
    values, labels = draw(seed, 80)
    fresh = torch.from_numpy(values)
    small, large = sorted((one, two))
    wide, narrow = (kind().fit(values, labels, rate).sets(fresh) for rate in (small, large))
    assert not (narrow & ~wide).any()


@oracles.QUICK
@given(st.integers(0, 1000), st.sampled_from([0.05, 0.1, 0.3]), st.sampled_from([LAC, APS]))
def test_p_values_hold_the_sets_of_every_level(seed, miscoverage, kind):
    values, labels = draw(seed, 99)
    sets = kind().fit(values, labels, miscoverage)
    fresh = torch.from_numpy(draw(f"fresh {seed}", 40)[0])
    p = sets.p_values(fresh)
    assert torch.equal(p > miscoverage + 1e-12, sets.sets(fresh))
    ambiguous = sets.ambiguity(fresh) > miscoverage + 1e-12
    assert torch.equal(ambiguous, sets.size(fresh) >= 2)
    assert p.min() >= 1 / 100
    assert p.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_alone(kind):
    values, labels = draw("alone", 300, 6)
    sets = kind().fit(values, labels)
    fresh = torch.from_numpy(values[:40])
    together = sets.sets(fresh)
    assert torch.equal(torch.cat([sets.sets(row[None]) for row in fresh]), together)
    order = torch.from_numpy(oracles.generator("classes").permutation(6))
    assert torch.equal(sets.sets(fresh[:, order]), together[:, order])
    assert sets.sets(fresh[:0]).shape == (0, 6)
    shuffle = oracles.generator("rows").permutation(300)
    assert torch.equal(kind().fit(values[shuffle], labels[shuffle]).cut, sets.cut)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_probabilities_are_in_or_out_together(kind):
    p = np.array([[0.5, 0.2, 0.2, 0.1], [0.25] * 4, [0.4, 0.4, 0.1, 0.1]])
    values, labels = draw("ties", 200, 4)
    scores = kind().class_scores(torch.from_numpy(np.log(p)))
    assert scores[0, 1] == scores[0, 2]
    assert len(set(scores[1].tolist())) == 1
    assert scores[2, 0] == scores[2, 1] < scores[2, 2] == scores[2, 3]
    mask = kind().fit(values, labels, 0.3).sets(torch.from_numpy(np.log(p)))
    assert mask[0, 1] == mask[0, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_of_probability_one_do_not_tie(kind):
    gaps = np.linspace(20, 80, 200)
    logits = np.stack([gaps, np.zeros(200), np.full(200, -3.0)], axis=1)
    values = torch.log_softmax(torch.from_numpy(logits).float(), 1)
    assert (values.exp()[:, 0] == 1).all()
    scores = kind().class_scores(values)
    # LAC tells the likeliest class apart, APS what comes after it.
    column = scores[:, 0 if kind is LAC else 1]
    assert len(np.unique(column.numpy())) == 200
    assert scores.dtype == torch.float64


def test_probabilities_that_tie_at_one_fail_that_test():
    logits = np.stack([np.linspace(20, 80, 200), np.zeros(200)], axis=1)
    p = torch.log_softmax(torch.from_numpy(logits).float(), 1).exp()
    assert len(np.unique((1 - p[:, 0]).numpy())) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_exactly_zero_and_one(kind):
    values = np.log(np.array([[1.0, 1e-300, 1e-300]] * 19))
    values[values < -600] = -math.inf
    right = kind().fit(values, np.zeros(19, dtype=np.int64))
    assert right.sets(torch.from_numpy(values[:1])).tolist() == [[True, False, False]]
    wrong = kind().fit(values, np.ones(19, dtype=np.int64))
    assert wrong.sets(torch.from_numpy(values[:1])).all()


def test_aps_always_holds_the_likeliest_class_and_lac_can_be_empty():
    values, labels = draw("empty", 500, 5)
    easy = values.argmax(axis=1)
    fresh = torch.from_numpy(values)
    assert (APS().fit(values, easy).size(fresh) == 1).all()
    assert (LAC().fit(values, easy).size(fresh) == 0).any()
    assert (APS().fit(values, labels).size(fresh) >= 1).all()


def test_two_classes_rank_by_confidence():
    values, labels = draw("binary", 200, 2)
    for kind in (LAC, APS):
        ambiguity = kind().fit(values, labels).ambiguity(torch.from_numpy(values)).numpy()
        order = np.argsort(-values.max(axis=1), kind="stable")
        assert (np.diff(ambiguity[order]) >= 0).all()


@pytest.mark.parametrize(("n", "miscoverage", "needed"), [(8, 0.1, 9), (0, 0.5, 1), (98, 0.01, 99)])
def test_too_few_rows_name_the_number_needed(n, miscoverage, needed):
    values, labels = draw("few", needed, 3)
    with pytest.raises(TooFewRowsError, match=f"got {n} calibration rows.*at least {needed}"):
        LAC().fit(values[:n], labels[:n], miscoverage)
    assert LAC().fit(values, labels, miscoverage).n == needed


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_other_wrong_inputs_are_refused(kind):
    values, labels = draw("refuse", 50, 3)
    with pytest.raises(InvalidInputError, match="50 rows that are not log-probabilities"):
        kind().fit(values + 1, labels)
    broken = values.copy()
    broken[7, 1] = math.nan
    with pytest.raises(InvalidInputError, match="1 rows that are not log-prob"):
        kind().fit(broken, labels)
    with pytest.raises(InvalidInputError, match=r"0\.\.2"):
        kind().fit(values, np.full(50, 3))
    with pytest.raises(InvalidInputError, match="C >= 2"):
        kind().fit(values[:, :1], np.zeros(50, dtype=np.int64))
    with pytest.raises(InvalidInputError, match="miscoverage"):
        kind().fit(values, labels, 1.0)
    with pytest.raises(NotFittedError, match="not fitted"):
        kind().sets(torch.from_numpy(values))
    with pytest.raises(InvalidInputError, match="C >= 2"):
        kind().fit(values, labels).sets(torch.from_numpy(values[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_and_halving_does_not_round(kind):
    values, labels = draw("state", 120, 4)
    sets = kind().fit(values, labels, 0.2)
    again = kind.from_state(dict(sets.state_dict()), json.loads(json.dumps(sets.settings())))
    fresh = torch.from_numpy(values)
    assert torch.equal(again.sets(fresh), sets.sets(fresh))
    assert torch.equal(again.p_values(fresh), sets.p_values(fresh))
    assert again.guarantee == sets.guarantee
    assert sets.half().cut.dtype == torch.float64
    with pytest.raises(ValueError, match="where the scores give"):
        kind.from_state({"scores": sets.scores, "cut": sets.cut + 1}, sets.settings())


def test_large_fits_are_chunked(monkeypatch):
    values, labels = draw("chunks", 300, 5)
    whole = {kind: kind().fit(values, labels) for kind in (LAC, APS)}
    monkeypatch.setattr("ebm_guard.calibration.conformal._CHUNK", 35)
    for kind, sets in whole.items():
        assert torch.equal(kind().fit(values, labels).scores, sets.scores)
        fresh = torch.from_numpy(values)
        small = sets.sets(fresh)
        monkeypatch.undo()
        assert torch.equal(small, sets.sets(fresh))
        monkeypatch.setattr("ebm_guard.calibration.conformal._CHUNK", 35)


def test_the_report_counts():
    values, labels = draw("report", 400, 5)
    sets = LAC().fit(values[:200], labels[:200])
    mask = sets.sets(torch.from_numpy(values[200:])).numpy()
    covered, sizes = mask[np.arange(200), labels[200:]], mask.sum(axis=1)
    report = conformal_report(sets, covered, sizes)
    assert report.coverage.value == covered.mean()
    assert report.coverage.low < report.coverage.value < report.coverage.high
    assert report.mean_size.value == pytest.approx(sizes.mean())
    shares = (report.empty.value, report.single.value, report.several.value)
    assert sum(shares) == pytest.approx(1)
    assert shares[1] == (sizes == 1).mean()
    assert report.right_when_single.value == covered[sizes == 1].mean()
    assert report.sizes.tolist() == [int((sizes == size).sum()) for size in range(sizes.max() + 1)]
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["n_calibration"] == 200
    assert "On average" in plain["guarantee"]
    with pytest.raises(InvalidInputError, match="N >= 1"):
        conformal_report(sets, covered[:0], sizes[:0])
