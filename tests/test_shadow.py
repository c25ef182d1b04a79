"""Two guards on the same traffic."""

import json
import math

import numpy as np
import oracles
import pytest
import torch
from scipy import stats
from test_guard_scores import net, rows_of
from toys import inputs_of, logits_with

import ebm_guard
from ebm_guard import Guard, Predictions
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.gate import compare
from ebm_guard.gate.shadow import mcnemar, paired_difference


def guards():
    rows = logits_with(600)
    first = Guard().fit(rows)
    return first, first.recalibrate(logits_with(500, seed=3, scale=2.0))


def test_every_figure_is_a_count_of_the_two_decisions():
    old, new = guards()
    traffic = logits_with(2000, seed=8)
    logits = traffic.logits.copy()
    logits[5, 1] = math.nan
    traffic = Predictions(logits, labels=traffic.labels, ids=tuple(f"r{i}" for i in range(2000)))
    found = compare(old, new, traffic, shown=4)
    one, other = old.decide_stored(traffic), new.decide_stored(traffic)
    a, b = one.accept.numpy(), other.accept.numpy()
    assert found.table["ACCEPT"] == {
        "REJECT": int((a & ~b).sum()), "ACCEPT": int((a & b).sum()), "INVALID": 0
    }  # fmt: skip
    assert found.table["INVALID"]["INVALID"] == 1
    assert sum(sum(row.values()) for row in found.table.values()) == found.n == 2000
    assert (found.only_old, found.only_new) == (int((a & ~b).sum()), int((~a & b).sum()))
    assert found.only_old + found.only_new > 10
    assert found.reject_rate_old.value == pytest.approx((~a).mean())
    assert found.reject_rate_new.value == pytest.approx((~b).mean())
    assert found.difference.value == pytest.approx((~b).mean() - (~a).mean())
    assert found.difference.low < found.difference.value < found.difference.high
    changed = np.flatnonzero(a != b)
    assert [row.id for row in found.changed] == [f"r{i}" for i in changed[:4]]
    for row, place in zip(found.changed, changed, strict=False):
        refuser = other if a[place] else one
        assert row.reason == refuser.reason[place] != ""
    valid = np.arange(2000) != 5
    moved = (other.confidence - one.confidence).numpy()[valid]
    assert found.confidence_difference.value == pytest.approx(moved.mean(), abs=1e-6)
    assert found.labels_differ.value == 0
    right = one.label.numpy() == traffic.labels
    assert found.accuracy_old.value == pytest.approx(right[a].mean())
    assert found.accuracy_new.value == pytest.approx(right[b].mean())
    json.dumps(found.to_dict(), allow_nan=False)
    for words in ("2,000 inputs", f"{found.only_old:,} inputs would be refused", "is right"):
        assert words in found.sentence


def test_a_loader_a_tensor_and_stored_rows_agree():
    model = net()
    rows = rows_of(model, 300, seed=2)
    old = ebm_guard.wrap(model).fit(rows)
    new = ebm_guard.wrap(model).fit(rows, score="knn", seed=1)
    x = inputs_of(100, seed=5) * 2
    whole = compare(old, new, x)
    parts = compare(old, new, list(x.split(30)))
    assert whole.to_dict() == parts.to_dict()
    assert whole.accuracy_old is None
    labels = model(x).argmax(1)
    named = compare(old, new, list(zip(x.split(30), labels.split(30), strict=True)))
    assert named.accuracy_old.value == 1
    assert named.table == whole.table
    with pytest.raises(DataError, match="needs features"):
        compare(old, new, logits_with(20, classes=3))
    with pytest.raises(InvalidInputError, match="got no traffic"):
        compare(old, new, [])


def test_a_guard_against_itself_changes_nothing():
    old, _ = guards()
    found = compare(old, old, logits_with(400, seed=8))
    assert found.changed == ()
    assert found.p_value == 1
    assert found.difference.value == 0
    assert found.difference.low < 0 < found.difference.high
    broken = compare(old, old, Predictions(np.full((3, 4), math.nan)))
    assert broken.labels_differ is None
    assert broken.confidence_difference is None
    assert broken.reject_rate_new.value == 1


@pytest.mark.parametrize("pair", [(0, 0), (3, 5), (0, 10), (40, 12), (7, 7)])
def test_mcnemar_is_the_binomial_test(pair):
    expected = stats.binomtest(pair[0], sum(pair), 0.5).pvalue if sum(pair) else 1
    assert mcnemar(*pair) == pytest.approx(min(1, expected))


def test_the_paired_interval_covers_and_an_unpaired_one_of_the_same_level_does_not_fit():
    """Two gates that nearly agree: treating the rows as unpaired is many times too wide."""
    rng = oracles.generator("paired")
    draws, n = 2000, 400
    cells = rng.multinomial(n, [0.03, 0.01, 0.96], size=draws)
    missed, width, unpaired = 0, [], []
    for b, c, _ in cells:
        found = paired_difference(int(b), int(c), n)
        missed += not found.low <= 0.02 <= found.high
        width.append(found.high - found.low)
        unpaired.append(2 * 1.96 * math.sqrt(2 * 0.3 * 0.7 / n))
    assert not oracles.fails_guarantee(missed, draws, 0.055)
    assert np.mean(width) < np.mean(unpaired) / 2
    # A wrong rule: no half rows, which collapses at few changes.
    cells = rng.multinomial(40, [0.02, 0.0, 0.98], size=draws)

    def plain(b, c, n):
        spread = 1.96 * math.sqrt((b + c) - (b - c) ** 2 / n) / n
        return not (b - c) / n - spread <= 0.02 <= (b - c) / n + spread

    ours = sum(
        not (m := paired_difference(int(b), int(c), 40)).low <= 0.02 <= m.high for b, c, _ in cells
    )
    assert not oracles.fails_guarantee(ours, draws, 0.055)
    assert oracles.fails_guarantee(sum(plain(b, c, 40) for b, c, _ in cells), draws, 0.055)


def test_scores_stay_on_the_traffic_alone():
    old, new = guards()
    traffic = logits_with(50, seed=8)
    before = traffic.logits.copy()
    compare(old, new, traffic)
    assert np.array_equal(traffic.logits, before)
    assert torch.equal(old.threshold.scores, old.threshold.scores.sort().values)
