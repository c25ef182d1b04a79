"""The gate's promises by simulation, each with a deliberately wrong rule that fails the test."""

import json
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from toys import logits_with

from ebm_guard import Guard, Predictions
from ebm_guard.errors import DataError, InvalidInputError, TooFewRowsError
from ebm_guard.gate import (
    ACCEPT,
    REJECT,
    ClassConditionalThreshold,
    RiskRule,
    Threshold,
    minimum_rows,
    screen_batch,
)

DRAWS = 2000
REJECTED = 0.05

# --- acceptance follows the Beta law


def acceptance_of(draw, fresh_share, n, rank=None, strict=False):
    """True acceptance of ID rows under the cut of each of 2,000 calibration sets."""
    rng = oracles.generator("beta", n, draw.__name__)
    found = np.empty(DRAWS)
    for place in range(DRAWS):
        scores = draw(rng, n)
        cut = float(Threshold.fit(scores).cut) if rank is None else np.sort(scores)[rank - 1]
        found[place] = fresh_share(cut, strict)
    return found


def uniform(rng, n):
    return rng.random(n)


def uniform_share(cut, strict):
    return cut


# Six values hold everything: a cut always falls on a tie of many rows.
SHARES = np.array([0.3, 0.25, 0.2, 0.15, 0.06, 0.04])


def tied(rng, n):
    return rng.choice(6, size=n, p=SHARES).astype(np.float64)


def tied_share(cut, strict):
    return float(SHARES[: int(cut) + (not strict)].sum())


@pytest.mark.parametrize("n", [100, 400])
def test_acceptance_follows_the_beta_law(n):
    found = acceptance_of(uniform, uniform_share, n)
    k = Threshold.fit(np.arange(float(n))).rank
    assert stats.kstest(found, stats.beta(k, n + 1 - k).cdf).pvalue > 1e-3
    wrong = acceptance_of(uniform, uniform_share, n, rank=k - 1)
    assert stats.kstest(wrong, stats.beta(k, n + 1 - k).cdf).pvalue < 1e-3


@pytest.mark.parametrize("n", [100, 400])
def test_heavy_ties_only_raise_the_acceptance(n):
    k = Threshold.fit(np.arange(float(n))).rank
    levels = np.cumsum(SHARES)[:-1] + 1e-9

    def too_low(found):
        return any(
            oracles.fails_guarantee(
                (found <= level).sum(), DRAWS, stats.beta(k, n + 1 - k).cdf(level)
            )
            for level in levels
        )

    assert not too_low(acceptance_of(tied, tied_share, n))
    assert too_low(acceptance_of(tied, tied_share, n, strict=True))


# --- thresholds by predicted class

# Three large classes, and four small ones that share a group; scores of different place and width.
MIX = np.array([0.4, 0.3, 0.2, 0.04, 0.03, 0.02, 0.01])
PLACE = np.array([0.0, 1.0, 3.0, 0.5, 2.0, 4.0, -1.0])
WIDTH = np.array([1.0, 0.5, 1.5, 1.0, 0.3, 1.0, 2.0])


def draw_classes(rng, n=1000):
    classes = rng.choice(len(MIX), size=n, p=MIX)
    return rng.normal(PLACE[classes], WIDTH[classes]), classes


def coverages(threshold_cuts, classes):
    """True acceptance of each large class, and of the small ones mixed as they were drawn."""
    inside = stats.norm.cdf((threshold_cuts - PLACE) / WIDTH)
    counts = np.bincount(classes, minlength=len(MIX))[3:]
    return [*inside[:3], float((counts * inside[3:]).sum() / counts.sum())]


def group_failures(cuts_of, draws=500):
    rng = oracles.generator("groups")
    found = np.array([coverages(cuts_of(*drawn), drawn[1]) for drawn in
                      (draw_classes(rng) for _ in range(draws))])  # fmt: skip
    low = found < 1 - REJECTED
    return low.sum(axis=0), low.any(axis=1).sum(), draws


def by_class(simultaneous):
    def cuts(scores, classes):
        threshold = ClassConditionalThreshold.fit(
            scores, classes, len(MIX), simultaneous=simultaneous
        )
        return threshold.cuts(torch.arange(len(MIX))).numpy()

    return cuts


def test_each_group_keeps_the_promise_by_itself_or_all_at_once():
    each, _, draws = group_failures(by_class(False))
    assert not any(oracles.fails_guarantee(count, draws, 0.05) for count in each)
    each, together, draws = group_failures(by_class(True))
    assert not oracles.fails_guarantee(together, draws, 0.05)


def test_one_cut_for_all_fails_the_test_of_each_group():
    def one_cut(scores, classes):
        return np.full(len(MIX), float(Threshold.fit(scores).cut))

    each, _, draws = group_failures(one_cut)
    assert oracles.fails_guarantee(each[2], draws, 0.05)
    assert oracles.fails_guarantee(each[3], draws, 0.05)


def test_cuts_by_themselves_fail_the_test_of_all_at_once():
    _, together, draws = group_failures(by_class(False))
    assert oracles.fails_guarantee(together, draws, 0.05)


def test_marginal_ranks_fail_the_test_of_each_group():
    def marginal(scores, classes):
        group = np.minimum(classes, 3)
        cuts = [
            float(Threshold.fit(scores[group == number], "marginal").cut) for number in range(4)
        ]
        return np.array([*cuts[:3], *[cuts[3]] * 4])

    each, _, draws = group_failures(marginal)
    assert all(oracles.fails_guarantee(count, draws, 0.05) for count in each)


@oracles.QUICK
@given(st.lists(st.integers(0, 150), min_size=1, max_size=12), st.booleans())
def test_groups_by_count(counts, simultaneous):
    classes = np.repeat(np.arange(len(counts)), counts)
    scores = oracles.generator("counts").normal(size=len(classes))
    if len(classes) < 59:
        with pytest.raises(TooFewRowsError, match="at least 59 in a group"):
            ClassConditionalThreshold.fit(scores, classes, len(counts), simultaneous=simultaneous)
        return
    threshold = ClassConditionalThreshold.fit(
        scores, classes, len(counts), simultaneous=simultaneous
    )
    together = threshold.own + threshold.shared + threshold.unseen
    assert sorted(together) == list(range(len(counts)))
    assert all(counts[label] == 0 for label in threshold.unseen)
    level = 1 - 0.05 / threshold.groups if simultaneous else 0.95
    assert min(threshold.sizes) >= minimum_rows("pac", 0.05, level)
    assert sum(threshold.sizes) == len(classes)
    # The smallest classes are the ones that share.
    if threshold.own and threshold.shared:
        assert min(counts[c] for c in threshold.own) >= max(counts[c] for c in threshold.shared)
    cuts = threshold.cuts(torch.arange(len(counts)))
    for label in threshold.own:
        alone = Threshold.fit(scores[classes == label], assurance=max(level, 0.95))
        assert float(cuts[label]) >= float(alone.cut) or simultaneous
        if not simultaneous:
            assert float(cuts[label]) == float(alone.cut)
    accepted = threshold.accept(torch.from_numpy(scores), torch.from_numpy(classes))
    assert accepted.double().mean() >= 0.95
    again = ClassConditionalThreshold.from_state(
        dict(threshold.state_dict()), json.loads(json.dumps(threshold.settings()))
    )
    assert again.settings() == threshold.settings()
    assert again.guarantee == threshold.guarantee
    assert torch.equal(again.cuts(torch.arange(len(counts))), cuts)


def test_p_values_are_those_of_the_group():
    rng = oracles.generator("p")
    scores, classes = draw_classes(rng)
    threshold = ClassConditionalThreshold.fit(scores, classes, len(MIX))
    fresh, of = draw_classes(rng, 200)
    found = threshold.p_value(torch.from_numpy(fresh), torch.from_numpy(of))
    group = np.minimum(classes, 3)
    for p, score, label in zip(found.tolist(), fresh, np.minimum(of, 3), strict=True):
        members = scores[group == label]
        assert p == pytest.approx((1 + (members >= score).sum()) / (len(members) + 1))
    with pytest.raises(InvalidInputError, match="without classes"):
        threshold.accept(torch.from_numpy(fresh))


def predicted_rows(n=900, seed=0):
    """Four classes; logits of the last are flat, so its energies are high."""
    rng = oracles.generator("predicted", seed)
    labels = rng.choice(4, size=n, p=[0.5, 0.3, 0.17, 0.03])
    logits = rng.normal(size=(n, 4))
    logits[np.arange(n), labels] += np.array([9.0, 7.0, 5.0, 4.0])[labels]
    noisy = np.where(rng.random(n) < 0.1, (labels + 1) % 4, labels)
    return Predictions(logits.astype(np.float32), labels=noisy)


def test_a_guard_by_class(tmp_path):
    rows = predicted_rows()
    guard = Guard().fit(rows, per_class=True)
    threshold = guard.threshold
    assert threshold.own == [0, 1]
    assert threshold.shared == [2, 3]
    fresh = predicted_rows(seed=1)
    found = guard.decide_stored(fresh)
    classes = torch.from_numpy(fresh.logits.argmax(axis=1))
    assert torch.equal(found.cut, threshold.cuts(classes))
    assert torch.equal(found.accept, found.score <= found.cut)
    plain = Guard().fit(rows).decide_stored(fresh)
    third = classes == 2
    assert found.accept[third].double().mean() > plain.accept[third].double().mean() + 0.1
    text = guard.summary()
    for words in ("3 cuts from", "2 classes share one", "for each group by itself", "classes 2, 3"):
        assert words in text
    assert (
        "for all 3 groups at once" in Guard().fit(rows, per_class=True, simultaneous=True).summary()
    )
    again = Guard.load(guard.save(tmp_path / "guard.safetensors"))
    assert torch.equal(again.decide_stored(fresh).status, found.status)
    assert again.summary().splitlines()[:-1] == text.splitlines()[:-1]
    assert json.loads(json.dumps(guard.facts, allow_nan=False)) == guard.facts
    # Screening knows that the smallest group limits its p-values.
    few = guard.decide_stored(fresh.select(slice(0, 5)))
    assert guard.screen_batch(few).n == min(threshold.sizes)
    monitor = guard.drift_monitor(delta=0.01)
    assert monitor.cut == float(Threshold.fit(np.sort(threshold.scores.numpy())).cut)


def test_groups_are_by_the_logits_and_not_by_the_calibrator():
    rows = predicted_rows()
    # Most of what looks like class 2 is class 1, so a calibrator with offsets changes the label.
    named = np.where((rows.labels == 2) & (np.arange(len(rows)) % 8 > 0), 1, rows.labels)
    rows = Predictions(rows.logits, labels=named)
    guard = Guard().fit(rows, per_class=True, calibrator="vector")
    found = guard.decide_stored(rows)
    classes = torch.from_numpy(rows.logits.argmax(axis=1))
    assert (found.label != classes).any()
    assert torch.equal(found.cut, guard.threshold.cuts(classes))


def test_a_class_that_was_never_predicted_is_refused_and_says_so():
    rows = logits_with(400, classes=2)
    wide = Predictions(np.pad(rows.logits, ((0, 0), (0, 1)), constant_values=-30.0))
    with pytest.warns(match="no labels"):
        guard = Guard().fit(wide, per_class=True)
    assert guard.threshold.unseen == [2]
    assert "No calibration row was predicted as class 2: such inputs are refused" in guard.summary()
    found = guard.decide(torch.tensor([[0.0, 0.0, 50.0], [50.0, 0.0, 0.0]]))
    assert found.status.tolist() == [REJECT, ACCEPT]
    assert found.reason[0] == "no calibration row was predicted as this class"
    assert found.p_value[0] == 1


# --- the certificate on confidence and score


def world(rng, n):
    """Confidence, score, and P(wrong): overconfident, and worse where the score is high."""
    confidence = rng.beta(4, 0.8, n)
    score = rng.normal(size=n) - confidence
    chance = np.clip(0.9 * (1 - confidence) + 0.05 * (score > 0), 0, 1)
    return confidence, score, chance


RISK = 0.08
CUT = 0.5


def risk_failures(rule_of, draws=300):
    rng = oracles.generator("risk")
    confidence, score, chance = world(oracles.generator("population"), 100_000)
    passed = score <= CUT
    failures = 0
    for _ in range(draws):
        drawn = world(rng, 3000)
        wrong = rng.random(3000) < drawn[2]
        answered = passed & rule_of(drawn[0], drawn[1], wrong)(confidence, score)
        failures += bool(answered.any()) and chance[answered].mean() > RISK
    return failures, draws


def certified(confidence, score, wrong):
    rule = RiskRule.fit(confidence, score, wrong, score <= CUT, risk=RISK)
    return lambda c, s: rule.accept(torch.from_numpy(c), torch.from_numpy(s)).numpy()


def empirical(confidence, score, wrong):
    """The loosest cut on the confidence whose observed risk is within bounds: no certificate."""
    order = np.argsort(-confidence[score <= CUT])
    risk = np.cumsum(wrong[score <= CUT][order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero(risk <= RISK)
    cut = np.sort(confidence[score <= CUT])[::-1][good[-1]]
    return lambda c, s: c >= cut


@pytest.mark.slow
def test_the_certified_risk_is_kept():
    assert not oracles.fails_guarantee(*risk_failures(certified), 0.05)


def test_an_observed_risk_sold_as_certified_fails_the_same_test():
    assert oracles.fails_guarantee(*risk_failures(empirical), 0.05)


def confident_rows(n=3000, seed=0):
    rng = oracles.generator("confident", seed)
    logits = rng.normal(0, 3, size=(n, 5))
    labels = oracles.draw_labels(logits / 1.3, rng)
    return Predictions(logits.astype(np.float32), labels=labels, source=f"rows {seed}")


def test_a_guard_with_a_certificate(tmp_path):
    rows = confident_rows()
    guard = Guard().fit(rows, risk=0.1)
    assert guard.facts["rows"] == {"calibration": 1500, "certificate": 1500}
    plain = Guard().fit(rows.select(np.sort(np.arange(len(rows)))), canary=False)
    fresh = confident_rows(20_000, seed=1)
    found = guard.decide_stored(fresh)
    accepted = found.accept.numpy()
    right = found.label.numpy() == fresh.labels
    assert (~right[accepted]).mean() < 0.1 < (~right).mean()
    # Both rules, each with its own words.
    confidence_cut, score_cut = guard.rule.cuts.tolist()
    inside = (found.confidence.double() > confidence_cut) & (found.score < score_cut)
    assert torch.equal(found.certified, inside)
    assert torch.equal(found.accept, (found.score <= guard.threshold.cut) & inside)
    by_score = found.score > guard.threshold.cut
    for row in np.flatnonzero(~accepted)[:200]:
        expected = "above the threshold" if by_score[row] else "outside the certified rule"
        assert expected in found.reason[row]
    assert set(found.rows()[0]) == set(plain.decide_stored(fresh).rows()[0])
    # The promise on coverage is taken back in words, with the coverage that was measured.
    text = guard.summary()
    assert "promise about the share of accepted inputs holds for the threshold" in text
    assert "at most 0.1 of the accepted predictions are wrong" in text
    coverage = guard.rule.settings()["coverage"]
    assert coverage["low"] - 0.02 < accepted.mean() < coverage["high"] + 0.02
    again = Guard.load(guard.save(tmp_path / "guard.safetensors"))
    assert torch.equal(again.decide_stored(fresh).status, found.status)
    assert again.summary().splitlines()[:-1] == text.splitlines()[:-1]


def test_certify_gives_a_new_guard_and_leaves_the_old_one():
    rows, more = confident_rows(), confident_rows(seed=2)
    guard = Guard().fit(rows)
    before = guard.summary()
    second = guard.certify(more, risk=0.1)
    assert guard.rule is None
    assert guard.summary().splitlines()[:-1] == before.splitlines()[:-1]
    assert second.threshold is guard.threshold
    assert [entry["changed"] for entry in second.facts["lineage"]] == [
        ["score", "calibrator", "threshold"],
        ["rule"],
    ]
    assert "new rule on 3,000 rows of rows 2" in second.summary()
    # The same rows by hand.
    decision = guard.decide_stored(more)
    by_hand = RiskRule.fit(
        decision.confidence.numpy(),
        decision.score.numpy(),
        decision.label.numpy() != more.labels,
        decision.accept.numpy(),
        risk=0.1,
        score_name="energy",
    )
    assert torch.equal(by_hand.cuts, second.rule.cuts)


def test_what_cannot_be_certified():
    rows = confident_rows(200)
    guard = Guard().fit(rows)
    with pytest.raises(DataError, match="rows that this guard was fitted on"):
        guard.certify(rows, risk=0.1)
    with pytest.raises(DataError, match="has no labels"):
        guard.certify(Predictions(confident_rows(seed=5).logits), risk=0.1)
    with pytest.raises(TooFewRowsError, match=r"too few, at least \d+ are needed"):
        guard.certify(confident_rows(100, seed=5), risk=0.01)
    bad = confident_rows(900, seed=5)
    with pytest.raises(InvalidInputError, match=r"nothing is certified.*rows are wrong"):
        guard.certify(Predictions(bad.logits, labels=(bad.labels + 1) % 5), risk=0.1)
    low = np.full((300, 5), -30.0) + np.eye(5)[0]
    with pytest.raises(InvalidInputError, match="accepts none of them"):
        guard.certify(Predictions(low, labels=np.zeros(300, int)), risk=0.1)
    assert guard.rule is None


# --- batches and streams


def test_screen_batch_is_the_rule_on_the_p_values():
    guard = Guard().fit(logits_with(3000))
    x = torch.cat([torch.from_numpy(logits_with(40, seed=4).logits), torch.full((5, 4), -30.0)])
    decision = guard.decide(x)
    found = guard.screen_batch(decision, 0.1)
    assert found == pytest.approx(found)
    assert np.array_equal(found.mask, screen_batch(decision.p_value, 0.1, n=3000).mask)
    assert found.mask[-5:].all()
    assert found.n == 3000


def test_the_drift_monitor_is_that_of_the_threshold():
    guard = Guard().fit(logits_with(500))
    monitor = guard.drift_monitor(delta=0.02, window=50)
    assert monitor.cut == float(guard.threshold.cut)
    assert (monitor.delta, monitor.window) == (0.02, 50)
    decision = guard.decide(torch.zeros(200, 4))
    state = monitor.update(decision.score)
    assert state.refused == int((~decision.accept).sum())
    assert math.isfinite(state.wealth)
