"""Risk-coverage curves and certificates: naive loops, and simulations that a wrong rule fails."""

import json
import math

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ebm_guard.calibration import TemperatureScaling, row_statistics
from ebm_guard.calibration.certificates import Certificate, Order, certify, declare
from ebm_guard.calibration.certified_cuts import least_rows, rows_needed
from ebm_guard.calibration.selective import risk_coverage
from ebm_guard.errors import InvalidInputError

DELTA = 0.1
ROWS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=60)


def columns(rows):
    return np.array([row[0] for row in rows], dtype=float), np.array([row[1] for row in rows])


def naive_curve(order, errors, weights):
    """(cut, coverage, risk) for every distinct order, by loops."""
    found = []
    for cut in sorted(set(order)):
        inside = [i for i, value in enumerate(order) if value <= cut]
        mass = math.fsum(weights[i] for i in inside)
        lost = math.fsum(weights[i] for i in inside if errors[i])
        found.append((cut, mass / math.fsum(weights), lost / mass))
    return found


# Curves


@oracles.QUICK
@given(ROWS)
def test_the_curve_equals_a_loop(rows):
    order, errors = columns(rows)
    curve = risk_coverage(order, errors)
    truth = naive_curve(order, errors, [1.0] * len(rows))
    assert np.allclose(np.stack([curve.cut, curve.coverage, curve.risk], 1), truth, atol=1e-12)
    assert curve.accepted[-1] == len(rows)
    assert curve.errors[-1] == errors.sum()


@oracles.QUICK
@given(ROWS, st.integers(0, 100))
def test_weights_equal_a_loop_and_whole_weights_equal_repeated_rows(rows, seed):
    order, errors = columns(rows)
    rng = np.random.default_rng(seed)
    weights = rng.random(len(rows)) + 0.1
    curve = risk_coverage(order, errors, weights)
    truth = naive_curve(order, errors, weights)
    assert np.allclose(np.stack([curve.cut, curve.coverage, curve.risk], 1), truth, atol=1e-12)
    times = rng.integers(0, 3, len(rows))
    if times.any():
        weighted = risk_coverage(order, errors, times)
        repeated = risk_coverage(np.repeat(order, times), np.repeat(errors, times))
        assert np.allclose(weighted.risk, repeated.risk, atol=1e-12)
        assert np.allclose(weighted.coverage, repeated.coverage, atol=1e-12)


@oracles.QUICK
@given(ROWS, st.integers(0, 100))
def test_row_order_does_not_matter(rows, seed):
    order, errors = columns(rows)
    shuffle = np.random.default_rng(seed).permutation(len(rows))
    one, two = risk_coverage(order, errors), risk_coverage(order[shuffle], errors[shuffle])
    assert one.to_dict() == two.to_dict()
    for risk in (0.05, 0.3):
        pairs = [(order, errors), (order[shuffle], errors[shuffle])]
        found = [certify(Order("s", s), e, risk=risk).to_dict() for s, e in pairs]
        assert found[0] == found[1]


def test_curves_that_let_the_row_order_decide_among_ties_fail_that_test():
    order, errors = np.zeros(4), np.array([True, False, False, False])

    def by_row(order, errors):
        return (np.cumsum(errors[np.argsort(order, kind="stable")]) / np.arange(1, 5)).tolist()

    assert by_row(order, errors) != by_row(order, errors[::-1])
    assert risk_coverage(order, errors).risk.tolist() == [0.25]


def test_area_under_the_curve_equals_the_mean_of_the_selective_risks():
    rng = oracles.generator("area")
    order, errors = rng.permutation(500).astype(float), rng.random(500) < 0.2
    curve = risk_coverage(order, errors)
    naive = np.mean([errors[order <= cut].mean() for cut in order])
    assert math.isclose(np.mean(curve.risk), naive, abs_tol=1e-12)


@oracles.QUICK
@given(ROWS, st.sampled_from([0.05, 0.5, 0.8, 0.9, 0.95, 1.0]))
def test_accuracy_at_a_coverage(rows, coverage):
    order, errors = columns(rows)
    found = risk_coverage(order, errors).accuracy_at(coverage)
    cuts = [cut for cut in sorted(order) if (order <= cut).mean() >= coverage - 1e-12]
    inside = order <= cuts[0]
    assert found.cut == cuts[0]
    assert found.realised == pytest.approx(inside.mean())
    assert found.accuracy.value == pytest.approx(1 - errors[inside].mean())
    assert found.accuracy.n == inside.sum()
    interval = stats.binomtest(int((~errors[inside]).sum()), int(inside.sum()))
    low, high = interval.proportion_ci(method="wilson")
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((low, high))


def test_19_of_20_rows_are_95_percent():
    found = risk_coverage(np.arange(20.0), np.zeros(20, dtype=bool)).accuracy_at(0.95)
    assert found.realised == 0.95
    assert found.cut == 18


def test_sums_of_weights_do_not_ask_for_one_row_more():
    for n in range(2, 60):
        curve = risk_coverage(np.arange(float(n)), np.zeros(n), np.full(n, 0.1))
        for k in range(1, n + 1):
            assert curve.accuracy_at(k / n).cut == k - 1


def test_the_thinned_curve_is_exact_and_keeps_its_end():
    rng = oracles.generator("thin")
    order, errors = rng.normal(size=5000), rng.random(5000) < 0.1
    curve = risk_coverage(order, errors)
    thin = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert len(thin["risk"]) == 200
    assert thin["coverage"][-1] == 1
    for accepted, wrong, coverage, risk in zip(
        thin["accepted"], thin["errors"], thin["coverage"], thin["risk"], strict=True
    ):
        assert coverage == accepted / 5000
        assert risk == wrong / accepted
    assert all(
        low <= risk <= high
        for low, risk, high in zip(thin["low"], thin["risk"], thin["high"], strict=True)
    )


def test_weighted_intervals_use_fewer_rows():
    rng = oracles.generator("kish")
    order, errors = rng.normal(size=400), rng.random(400) < 0.3
    weights = np.where(rng.random(400) < 0.1, 10.0, 0.1)
    plain = risk_coverage(order, errors).accuracy_at(1.0).accuracy
    weighted = risk_coverage(order, errors, weights).accuracy_at(1.0).accuracy
    assert weighted.low <= weighted.value <= weighted.high
    assert weighted.high - weighted.low > 2 * (plain.high - plain.low)
    assert "Kish" in weighted.method


@pytest.mark.parametrize(
    ("order", "errors", "weights", "message"),
    [
        ([], [], None, "N >= 1"),
        ([1.0], [True, False], None, "shape"),
        ([1.0, math.nan], [0, 1], None, "1 of 2 orders that are not finite"),
        ([1.0, 2.0], [0, 2], None, "errors beside 0 and 1"),
        ([1.0, 2.0], [0, 1], [1.0, -1.0], "each >= 0"),
        ([1.0, 2.0], [0, 1], [0.0, 0.0], "all 0"),
    ],
)
def test_bad_rows_are_refused(order, errors, weights, message):
    with pytest.raises(InvalidInputError, match=message):
        risk_coverage(
            np.array(order), np.array(errors), None if weights is None else np.array(weights)
        )


# Certificates


def naive_sgr(order, errors, risk, delta):
    """Geifman and El-Yaniv's search, with its bound by bisection on the binomial tail."""
    n, low, high, found = len(order), 0, len(order), None
    level = delta / math.ceil(math.log2(n + 1))
    while low < high:
        middle = (low + high + 1) // 2
        inside = order <= sorted(order)[middle - 1]
        below, above = 0.0, 1.0
        for _ in range(60):
            bound = (below + above) / 2
            tail = stats.binom.cdf(errors[inside].sum(), inside.sum(), bound)
            below, above = (bound, above) if tail > level else (below, bound)
        if above <= risk + 1e-12:
            low, found = middle, inside
        else:
            high = middle - 1
    return found


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("ties", [True, False])
def test_sgr_equals_the_search_with_the_bound_of_the_paper(number, ties):
    rng = oracles.generator("sgr", number)
    n = int(rng.integers(150, 900))
    order = rng.random(n)
    errors = rng.random(n) < order**2 * 0.4
    if ties:
        order = np.round(order, 1)
    risk = float(rng.choice([0.05, 0.1, 0.2]))
    truth = naive_sgr(order, errors, risk, 0.05)
    found = certify(Order("s", order), errors, risk=risk)
    assert found.certified == (truth is not None)
    assert np.array_equal(found.accept(order), truth if truth is not None else np.zeros(n, bool))
    assert found.accepted == found.accept(order).sum()
    assert found.errors == errors[found.accept(order)].sum()


def test_the_check_reader():
    """Right on 50 %, refuses 49 %, errs on 1 %: 1.96 % of its answers are wrong."""
    order = np.repeat([0.0, 1.0], [5100, 4900])
    errors = np.repeat([False, True], [5000, 5000])
    found = certify(Order("distance", order), errors, risk=0.03)
    assert found.coverage.value == 0.51
    assert (found.accepted, found.errors) == (5100, 100)
    assert "about 51.0%" in found.sentence
    assert not certify(Order("distance", order), errors, risk=0.0196).certified


def slope(rng, n):
    """P(error | s) = 0.5 s^3: the risk below a cut c is c^3 / 8, safe at 0.05 up to c = 0.737."""
    order = rng.random(n)
    return order, rng.random(n) < 0.5 * order**3


def slope_risk(cut):
    return min(cut, 1.0) ** 3 / 8


SHARES, RATES = np.array([0.3, 0.2, 0.2, 0.3]), np.array([0.01, 0.015, 0.153, 0.3])


def steps(rng, n):
    """Four levels: the risk up to the second is 0.012, up to the third 0.0523."""
    level = rng.choice(4, size=n, p=SHARES)
    return level.astype(float), rng.random(n) < RATES[level]


def steps_risk(cut):
    inside = np.arange(4) < cut
    return (SHARES * RATES)[inside].sum() / max(SHARES[inside].sum(), 1e-12)


def flat(rng, n):
    """No ranking at all, and a risk just above the target."""
    return rng.random(n), rng.random(n) < 0.0505


def flat_risk(cut):
    return 0.0505


def plug_in(order, errors, risk):
    """The wrong rule: the largest coverage whose measured risk is at most the target."""
    curve = risk_coverage(order, errors)
    good = np.flatnonzero(curve.risk <= risk)
    if not len(good):
        return None
    return math.inf if good[-1] + 1 == len(curve.cut) else curve.cut[good[-1] + 1]


def ours(method):
    def rule(order, errors, risk):
        found = certify(Order("s", order), errors, risk=risk, assurance=1 - DELTA, method=method)
        if not found.certified:
            return None
        return math.inf if found.rule[0].cut is None else found.rule[0].cut

    return rule


def declared_rule(other):
    def rule(order, errors, risk):
        found = certify(
            Order("s", order),
            errors,
            risk=risk,
            assurance=1 - DELTA,
            method="fixed_sequence",
            declared=declare(Order("s", other)),
        )
        if not found.certified:
            return None
        return math.inf if found.rule[0].cut is None else found.rule[0].cut

    return rule


def broken_promises(rule, world, true_risk, n, draws=600):
    rng = oracles.generator("promise", world.__name__, n)
    cuts = [rule(*world(rng, n), 0.05) for _ in range(draws)]
    kept = [cut for cut in cuts if cut is not None]
    return sum(true_risk(cut) > 0.05 for cut in kept), draws, len(kept)


WORLDS = [
    pytest.param(slope, slope_risk, id="slope"),
    pytest.param(steps, steps_risk, id="ties"),
    pytest.param(flat, flat_risk, id="flat"),
]


@pytest.mark.parametrize(("world", "true_risk"), WORLDS)
@pytest.mark.parametrize("method", ["sgr", "bonferroni", "fixed_sequence"])
def test_certificates_keep_their_promise(world, true_risk, method):
    other = world(oracles.generator("other"), 300)[0]
    rule = declared_rule(other) if method == "fixed_sequence" else ours(method)
    broken, draws, kept = broken_promises(rule, world, true_risk, 800)
    assert not oracles.fails_guarantee(broken, draws, DELTA)
    # A rule that never certifies anything keeps every promise.
    assert world is flat or kept > draws / 2


@pytest.mark.parametrize(("world", "true_risk"), WORLDS)
def test_the_measured_risk_sold_as_a_certificate_fails_the_same_test(world, true_risk):
    broken, draws, _ = broken_promises(plug_in, world, true_risk, 800)
    assert oracles.fails_guarantee(broken, draws, DELTA)


def every_rank_at_full_delta(order, errors, risk):
    """The wrong rule: as many tests as there are rows, each at delta."""
    curve = risk_coverage(order, errors)
    good = np.flatnonzero(stats.binom.cdf(curve.errors, curve.accepted, risk) <= DELTA)
    if not len(good):
        return None
    return math.inf if good[-1] + 1 == len(curve.cut) else curve.cut[good[-1] + 1]


def test_testing_every_rank_without_a_correction_fails_the_same_test():
    broken, draws, _ = broken_promises(every_rank_at_full_delta, flat, flat_risk, 800)
    assert oracles.fails_guarantee(broken, draws, DELTA)


def pair(rng, n):
    """P(error | u, v) = 0.4 u^3 + 0.04 v: the risk in a rectangle is 0.1 a^3 + 0.02 b."""
    u, v = rng.random((2, n))
    return u, v, rng.random(n) < 0.4 * u**3 + 0.04 * v


def pair_risk(u, v):
    return 0.1 * min(u, 1) ** 3 + 0.02 * min(v, 1)


def joint_breaks(find, draws=300, n=1500):
    rng, broken, kept = oracles.generator("joint"), 0, 0
    for _ in range(draws):
        rule = find(*pair(rng, n))
        if rule is not None:
            kept += 1
            broken += pair_risk(*rule) > 0.08
    return broken, draws, kept


def joint_ours(method, declared=None):
    def find(u, v, errors):
        found = certify(
            [Order("u", 1 - u, "high"), Order("v", v)],
            errors,
            risk=0.08,
            assurance=1 - DELTA,
            method=method,
            declared=declared,
        )
        if not found.certified:
            return None
        first, second = (cut.cut for cut in found.rule)
        return 1.0 if first is None else 1 - first, 1.0 if second is None else second

    return find


def joint_plug_in(u, v, errors):
    best, rule = 0, None
    for a in np.linspace(0.05, 1, 20):
        for b in (0.8, 0.9, 0.95, 0.98, 1.0):
            inside = (u < a) & (v < b)
            if inside.sum() > best and errors[inside].mean() <= 0.08:
                best, rule = inside.sum(), (a, b)
    return rule


@pytest.mark.parametrize("method", ["bonferroni", "fixed_sequence"])
def test_joint_certificates_keep_their_promise(method):
    u, v, _ = pair(oracles.generator("other"), 500)
    cuts = declare([Order("u", 1 - u, "high"), Order("v", v)])
    broken, draws, kept = joint_breaks(
        joint_ours(method, cuts if method == "fixed_sequence" else None)
    )
    assert not oracles.fails_guarantee(broken, draws, DELTA)
    assert kept > draws / 2


def test_the_best_measured_pair_sold_as_a_certificate_fails_the_same_test():
    broken, draws, _ = joint_breaks(joint_plug_in)
    assert oracles.fails_guarantee(broken, draws, DELTA)


@pytest.mark.parametrize("method", ["bonferroni", "fixed_sequence"])
def test_learn_then_test_equals_loops_over_the_grid(method):
    rng = oracles.generator("loops")
    u, v, errors = pair(rng, 2000)
    orders = [Order("u", u), Order("v", v)]
    other = pair(rng, 700)
    grid = declare([Order("u", other[0]), Order("v", other[1])])
    assert grid.shape == (5, 20, 2)
    delta = 0.05 / (100 if method == "bonferroni" else 15)
    truth = {}
    for chain in range(5):
        starts = range(20) if method == "bonferroni" else (3, 9, 15)
        for start in starts:
            for at in range(start, 20):
                inside = (u < grid[chain, at, 0]) & (v < grid[chain, at, 1])
                if stats.binom.cdf(errors[inside].sum(), inside.sum(), 0.08) > delta:
                    break
                truth[chain, at] = int(inside.sum())
                if method == "bonferroni":
                    break
    found = certify(orders, errors, risk=0.08, method=method, declared=grid)
    assert found.accepted == max(truth.values())
    assert found.accept(u, v).sum() == found.accepted
    assert found.tests == (100 if method == "bonferroni" else 15)


def test_a_fixed_sequence_stops_at_the_first_cut_that_fails():
    order = np.repeat([0.0, 1.0, 2.0], [200, 60, 3000])
    cuts = np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1)  # 0 % wrong, 23 %, 2 %
    accepted = {
        method: certify(
            Order("s", order), order == 1, risk=0.05, method=method, declared=cuts
        ).accepted
        for method in ("fixed_sequence", "bonferroni")
    }
    assert accepted == {"fixed_sequence": 200, "bonferroni": 3260}


def test_an_energy_that_knows_more_than_the_confidence_certifies_more():
    rng = oracles.generator("more")
    n = 5000
    confidence, energy = rng.random((2, n))
    errors = rng.random(n) < np.where(energy > 0.9, 0.8, 0.02)
    first = Order("confidence", confidence, "high")
    alone = certify(first, errors, risk=0.05)
    both = certify([first, Order("energy", energy)], errors, risk=0.05)
    assert not alone.certified
    assert both.coverage.value > 0.8
    assert both.rule[1].cut == pytest.approx(0.9, abs=0.02)
    assert "energy < 0.8" in both.sentence or "energy < 0.9" in both.sentence


@oracles.QUICK
@given(
    st.integers(0, 10_000),
    st.floats(0.02, 0.4),
    st.floats(0.02, 0.4),
    st.sampled_from(["sgr", "bonferroni", "fixed_sequence"]),
    st.booleans(),
)
def test_a_smaller_risk_or_more_assurance_never_certifies_more(seed, one, two, method, ties):
    rng = np.random.default_rng(seed)
    order = rng.random(400)
    errors = rng.random(400) < order * 0.5
    if ties:
        order = np.round(order, 1)
    grid = declare(Order("s", rng.random(300))) if method == "fixed_sequence" else None
    small, large = sorted((one, two))

    def accepted(risk, assurance):
        return certify(
            Order("s", order),
            errors,
            risk=risk,
            assurance=assurance,
            method=method,
            declared=grid,
        ).accepted

    assert accepted(small, 0.9) <= accepted(large, 0.9)
    assert accepted(large, 0.99) <= accepted(large, 0.9)


@pytest.mark.parametrize(("risk", "delta"), [(0.01, 0.05), (0.05, 0.05), (0.2, 0.01), (0.9, 0.5)])
def test_rows_needed_is_the_fewest(risk, delta):
    m = rows_needed(risk, delta)
    assert stats.binom.cdf(0, m, risk) <= delta
    assert m == 1 or stats.binom.cdf(0, m - 1, risk) > delta


@pytest.mark.parametrize("method", ["sgr", "bonferroni"])
@pytest.mark.parametrize("risk", [0.01, 0.05, 0.3])
def test_the_rows_needed_are_enough_and_one_fewer_is_not(method, risk):
    n = least_rows(risk, 0.05, 100, method)
    right = np.zeros(n, dtype=bool)
    enough = certify(Order("s", np.arange(float(n))), right, risk=risk, method=method)
    assert enough.coverage.value == 1
    assert enough.rule[0].cut is None
    assert enough.sentence.startswith("Answer everything")
    assert enough.accept(np.array([1e9, math.nan])).tolist() == [True, False]
    short = certify(Order("s", np.arange(n - 1.0)), right[1:], risk=risk, method=method)
    assert not short.certified
    assert f"at least {n:,} are needed" in short.why
    assert short.needed == n


def test_an_unlucky_sample_certifies_nothing_and_says_so():
    errors = np.zeros(5000, dtype=bool)
    errors[::2] = True
    found = certify(Order("confidence", np.linspace(0, 1, 5000), "high"), errors)
    assert not found.certified
    assert found.rule == ()
    assert found.coverage is None
    assert "2,500 of 5,000 rows are wrong" in found.sentence
    assert not found.accept(np.ones(3)).any()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["certified"] is False


def test_confidences_of_exactly_one_are_one_group():
    confidence = np.repeat([1.0, 0.9], 2500)
    errors = np.repeat([False, True], 2500)
    for method in ("sgr", "bonferroni"):
        found = certify(Order("confidence", confidence, "high"), errors, method=method)
        assert found.accepted == 2500
        assert found.rule[0].cut == 0.9
        assert found.rule[0].words == "confidence > 0.9"
        assert found.accept(np.array([1.0, 0.9, 0.95])).tolist() == [True, False, True]
    everything = certify(Order("confidence", np.ones(2500), "high"), errors[:2500])
    assert everything.rule[0].cut is None


def test_a_certificate_is_not_bought_with_weights():
    with pytest.raises(InvalidInputError, match="drawn like the inputs to come"):
        certify(Order("s", np.arange(9.0)), np.zeros(9), sample_weight=np.ones(9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"risk": 0.0}, "risk"),
        ({"risk": 1.0}, "risk"),
        ({"assurance": math.nan}, "assurance"),
        ({"method": "sgrr"}, "did you mean 'sgr'"),
        ({"method": "fixed_sequence"}, "do not depend on these rows"),
        ({"declared": np.zeros((1, 3, 1))}, "leave them out"),
        ({"declared": np.zeros((3, 1)), "method": "bonferroni"}, "declared cuts of shape"),
        ({"orders": []}, "0 orders"),
        ({"orders": [Order("s", np.arange(9.0))] * 2, "method": "sgr"}, "2 orders for sgr"),
        ({"orders": Order("s", np.arange(9.0), "up")}, "'low' or 'high'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    orders = settings.pop("orders", Order("s", np.arange(9.0)))
    with pytest.raises(InvalidInputError, match=message):
        certify(orders, np.zeros(9), **settings)


def test_a_rule_of_two_cuts_wants_two_columns():
    orders = [Order("u", np.arange(900.0)), Order("v", np.arange(900.0))]
    found = certify(orders, np.zeros(900), risk=0.05)
    assert isinstance(found, Certificate)
    with pytest.raises(InvalidInputError, match="needs 2: u, v"):
        found.accept(np.arange(3.0))


# Real nets: log p of stored probabilities, halves by a seeded permutation.

CERTIFIED = {
    "densenet_bc100_cifar100": 0.5338,
    "wrn16_4_cifar10": 0.8988,
    "wrn16_4_cifar100": 0.4880,
}


@pytest.mark.parametrize("name", CERTIFIED)
def test_certificates_of_real_nets(data_dir, name):
    stored = np.load(data_dir / f"softmax_{name}.npz")
    probs, labels = stored["probs"].astype(np.float64), stored["labels"]
    logits = np.log(np.maximum(probs, np.finfo(np.float32).tiny))
    fit, test = np.split(np.random.default_rng(0).permutation(10_000), 2)
    calibrator = TemperatureScaling().fit(logits[fit], labels[fit])
    rows = row_statistics(logits[test], labels[test], transform=calibrator.transform)
    order = Order("confidence", rows.confidence, "high")
    found = certify(order, ~rows.correct, risk=0.05)
    assert found.coverage.value == pytest.approx(CERTIFIED[name], abs=0.005)
    # The promise on rows that neither calibrator nor certificate has seen.
    first, second = rows.select(np.arange(2500)), rows.select(np.arange(2500, 5000))
    half = certify(Order("confidence", first.confidence, "high"), ~first.correct, risk=0.05)
    inside = half.accept(second.confidence)
    assert inside.sum() > 500
    wrong = int((~second.correct[inside]).sum())
    assert stats.binomtest(wrong, int(inside.sum()), 0.05, alternative="greater").pvalue > 1e-3
