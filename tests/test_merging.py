"""Evidence of many replicas: adjusters by their integral, the level by simulation, exact counts."""

import json
import math

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from ebm_guard.errors import ArtifactError, InvalidInputError
from ebm_guard.gate.drift import DriftMonitor, merge_evidence
from ebm_guard.gate.drift.evidence import adjusted
from ebm_guard.gate.drift.martingale import Bettor

DELTA = 0.05
FALSE_ALARM = 1e-3  # a test of a true guarantee fails this often


def within_level(alarms, runs, delta=DELTA):
    return stats.binomtest(alarms, runs, delta, alternative="greater").pvalue > FALSE_ALARM


# ---- the adjuster


@pytest.mark.parametrize("y", [1.0, 1.00001, 1.01, 2.0, 20.0, 1e4, 1e9])
def test_the_adjuster_is_the_mixture_of_the_papers_powers(y):
    mixture, _ = integrate.quad(lambda k: k * y ** (1 - k), 0, 1, epsabs=0, epsrel=1e-12)
    assert adjusted(np.array([y]), lone=1e12)[0] == pytest.approx(mixture / 10, rel=1e-7)


@pytest.mark.parametrize("lone", [40.0, 4e4])
def test_the_adjuster_integrates_to_one(lone):
    """The integral of A(y) / y^2 over y >= 1, with y = exp(z)."""

    def integrand(z):
        return float(adjusted(np.array([math.exp(z)]), lone)[0]) * math.exp(-z)

    jump = math.log(lone)
    total = integrate.quad(integrand, 0, jump)[0] + integrate.quad(integrand, jump, 300)[0]
    # Beyond z the smooth part, a tenth, still holds 0.1 / z: it falls as 1 / z^2.
    assert total + 0.1 / 300 == pytest.approx(1, abs=1e-4)


@given(st.lists(st.floats(0, 1e100), min_size=2, max_size=20), st.floats(2, 1e6))
@oracles.QUICK
def test_the_adjuster_never_falls(values, lone):
    rising = adjusted(np.sort(values), lone)
    assert (np.diff(rising) >= -1e-9 * rising[1:]).all()
    assert np.isfinite(rising).all()
    assert (rising >= 0).all()


# ---- merging numbers


def naive(highest, wealth, delta, replicas):
    total = 0.0
    for top in highest:
        y = max(top, 1.0)
        log = math.log(y)
        total += 0.1 * (0.5 if log == 0 else (y - 1 - log) / log**2)
        if y >= replicas / delta / 0.9:
            total += replicas / delta
    return total / replicas, sum(wealth) / replicas


@given(
    st.lists(st.tuples(st.floats(1.01, 1e8), st.floats(0, 1)), min_size=1, max_size=12),
    st.sampled_from([0.01, 0.05, 0.5]),
    st.integers(0, 5),
)
@oracles.QUICK
def test_merged_evidence_is_the_formula_and_has_no_order(pairs, delta, silent):
    highest, wealth = zip(*[(top, top * part) for top, part in pairs], strict=True)
    count = len(pairs) + silent
    merged = merge_evidence(highest, wealth, delta=delta, replicas=count)
    expected = naive(highest, wealth, delta, count)
    np.testing.assert_allclose((merged.mean_adjusted, merged.mean_wealth), expected, rtol=1e-9)
    assert merged == merge_evidence(highest[::-1], wealth[::-1], delta=delta, replicas=count)
    assert merged.alarm_at_any_time == (merged.mean_adjusted >= 1 / delta)
    assert (merged.replicas, merged.reported) == (count, len(pairs))
    assert merged.alarms == sum(top >= 1 / delta for top in highest)
    json.dumps(merged.to_dict(), allow_nan=False)


def test_one_replica_far_gone_and_many_a_little_both_alarm():
    one = merge_evidence([1.12 * 1000 / DELTA] + [0.5] * 999, [0.5] * 1000)
    many = merge_evidence([20_500.0] * 1000, [0.5] * 1000)
    assert one.alarm_at_any_time
    assert many.alarm_at_any_time
    assert not merge_evidence([25.0] * 10 + [0.5] * 990, [0.5] * 1000).alarm_at_any_time


def test_silent_replicas_keep_their_weight():
    """Leaving out replicas that stopped would be choosing: the last one would need only 1/delta."""
    alone = merge_evidence([5000.0], [1.0])
    assert alone.alarm_at_any_time
    among = merge_evidence([5000.0], [1.0], replicas=1000)
    assert not among.alarm_at_any_time
    assert "999 of them silent" in among.sentence


@pytest.mark.parametrize(
    ("highest", "wealth", "settings", "words"),
    [
        ([], [], {}, "at least one"),
        ([1.0], [1.0, 2.0], {}, "shape"),
        ([math.nan], [1.0], {}, "finite"),
        ([1.0], [math.inf], {}, "finite"),
        ([-1.0], [1.0], {}, "negative"),
        ([1.0], [1.0], {"delta": 1.0}, "delta"),
        ([1.0, 1.0], [1.0, 1.0], {"replicas": 1}, "ever run"),
    ],
)
def test_impossible_evidence_is_refused(highest, wealth, settings, words):
    with pytest.raises(InvalidInputError, match=words):
        merge_evidence(highest, wealth, **settings)


# ---- the level


def test_a_product_over_mirrored_traffic_does_not_keep_the_level():
    """Twenty copies of one bettor are one bettor; their product takes its wealth to the 20th."""
    product = merged = 0
    runs = 200
    for run in range(runs):
        rng = oracles.generator("mirrored", run)
        p = rng.random(60)
        bettor, highest = Bettor(), 1.0
        for value in p:
            bettor.play(np.array([value]), np.array([1 - value]))
            highest = max(highest, bettor.wealth**20)
        product += highest >= 1 / DELTA
        merged += merge_evidence([bettor.highest] * 20, [bettor.wealth] * 20).alarm_at_any_time
    assert within_level(merged, runs)
    assert not within_level(product, runs), product


def test_the_bound_holds_where_the_wealth_climbs_as_far_as_it_may():
    """The worst case: P(highest >= y) = 1/y for all y, and all replicas the same, or independent.

    An average of the highest wealth itself, not adjusted, fails.
    """
    rng = oracles.generator("pareto")
    runs, replicas = 2000, 50
    for together in (True, False):
        alarms = raw = 0
        for _ in range(runs):
            tops = 1 / rng.random(1 if together else replicas) * np.ones(replicas)
            alarms += merge_evidence(tops, tops).alarm_at_any_time
            raw += tops.mean() >= 1 / DELTA
        assert within_level(alarms, runs), alarms
    assert not within_level(raw, runs), raw


# ---- monitors


def fleet_of(rng, replicas, n, **settings):
    reference, scores = rng.normal(size=200), rng.normal(0.1, 1, size=n)
    scores[rng.random(n) < 0.01] = np.nan
    which = rng.integers(0, replicas, n)
    monitors = [DriftMonitor(reference, cut=1.6, **settings) for _ in range(replicas)]
    for place, monitor in enumerate(monitors):
        monitor.update(scores[which == place])
    whole = DriftMonitor(reference, cut=1.6, **settings)
    whole.update(scores)
    return monitors, whole


def counted_alike(merged, whole):
    report = whole.report()
    assert (merged.n, merged.refused, merged.invalid) == (
        report.state.n,
        report.state.refused,
        report.state.invalid,
    )
    assert merged.reject_rate == report.reject_rate
    assert merged.psi == report.total_psi


def test_saved_monitors_of_many_replicas_are_one_stream(tmp_path):
    monitors, whole = fleet_of(oracles.generator("saved"), 30, 3000)
    paths = [m.save(tmp_path / f"{place}.safetensors") for place, m in enumerate(monitors)]
    merged = DriftMonitor.merge(map(DriftMonitor.load, paths))
    counted_alike(merged, whole)
    assert merged.to_dict() == DriftMonitor.merge(monitors).to_dict()
    states = [monitor.state for monitor in monitors]
    expected = merge_evidence([s.highest for s in states], [s.wealth for s in states])
    assert merged.evidence == expected
    assert merged.monitors == 30
    json.dumps(merged.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_a_thousand_monitors_are_one_stream():
    counted_alike(*_merged(*fleet_of(oracles.generator("thousand"), 1000, 60_000)))


def _merged(monitors, whole):
    return DriftMonitor.merge(monitors), whole


def test_the_highest_of_earlier_epochs_counts():
    rng = oracles.generator("epochs")
    monitor = DriftMonitor(rng.normal(size=100), cut=1.6, epoch_length=50)
    monitor.update(rng.normal(3, 1, size=50))
    top = monitor.state.highest
    monitor.update(rng.normal(size=50))
    assert DriftMonitor.merge([monitor]).evidence.highest == top > 100


def test_merging_monitors_refuses_too_few_replicas_and_broken_files(tmp_path):
    monitors, _ = fleet_of(oracles.generator("few"), 3, 90)
    with pytest.raises(InvalidInputError, match="ever run"):
        DriftMonitor.merge(monitors, replicas=2)
    assert DriftMonitor.merge(monitors, replicas=9).evidence.replicas == 9
    path = monitors[0].save(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        DriftMonitor.merge(map(DriftMonitor.load, [path]))
