"""Two nets on the same rows: every figure and difference against oracles."""

import numpy as np
import pytest
from finetune_examples import C, N, energy, pair, report, rows, sides
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ebm_guard.errors import InvalidInputError
from ebm_guard.intervals import Metric, proportion
from ebm_guard.report.paired import Pair, compare_ood, compare_rows, mean_auroc, unpaired


def test_pairs_must_be_pairs():
    one, two = pair(1), pair(2)
    with pytest.raises(InvalidInputError, match="same rows"):
        Pair(one.start, two.candidate)
    with pytest.raises(InvalidInputError, match="80 rows of the start and 79"):
        Pair(one.start, one.candidate.select(slice(0, 79)))
    with pytest.raises(InvalidInputError, match="other labels"):
        Pair(one.start, rows(one.candidate.logits))


def test_rows_with_nan_leave_both_sides():
    one = pair(1)
    logits = one.candidate.logits.copy()
    logits[3, 1] = np.nan
    broken = Pair(one.start, rows(logits, one.start.labels))
    assert broken.broken == 1
    kept = broken.finite()
    assert len(kept) == N - 1
    np.testing.assert_array_equal(kept.start.logits, np.delete(one.start.logits, 3, axis=0))
    found = report(both=sides(evaluation=broken))
    assert (found["comparison"]["n"], found["comparison"]["broken"]) == (N - 1, 1)


def test_figures_of_both_nets_equal_naive_ones():
    both, (t_start, t_candidate) = pair(3, gain=0.7), (1.5, 0.7)
    before, after = compare_rows(both, (t_start, t_candidate), 0)
    labels = both.start.labels
    for table, temperatures in ((before, (1, 1)), (after, (t_start, t_candidate))):
        losses, squares = [], []
        for part, temperature in zip((both.start, both.candidate), temperatures, strict=True):
            logits = part.logits / temperature
            probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            losses.append(-np.log(probabilities[np.arange(N), labels]))
            squares.append(((probabilities - np.eye(C)[labels]) ** 2).sum(axis=1))
        for name, values in (("nll", losses), ("brier", squares)):
            item = table[name]
            assert item.start.value == pytest.approx(values[0].mean())
            assert item.candidate.value == pytest.approx(values[1].mean())
            change = values[1] - values[0]
            assert item.difference.value == pytest.approx(change.mean())
            # Student's t over the paired differences, and not over the two sides.
            half = 1.990450 * change.std(ddof=1) / np.sqrt(N)
            assert item.difference.low == pytest.approx(change.mean() - half, abs=1e-5)
    right = [(part.logits.argmax(axis=1) == labels).mean() for part in (both.start, both.candidate)]
    assert before["accuracy"].difference.value == pytest.approx(right[1] - right[0])
    assert "accuracy" not in after, "a temperature changes no prediction"
    assert set(after) == {"nll", "ece", "brier"}


def test_a_net_against_itself_changes_nothing():
    same = Pair(pair(4).start, pair(4).start)
    before, after = compare_rows(same, (1.2, 1.2), 0)
    ood = compare_ood(same, {"x": ("unseen", Pair(pair(5).start, pair(5).start))}, 0)
    for item in [*before.values(), *after.values(), ood["x"].auroc, ood["x"].fpr95]:
        assert item.difference.value == 0
        assert item.better is None


def test_ood_figures_equal_sklearn_and_the_sign_is_better():
    known, other = pair(6), pair(7, labels=False, shift=-2.0)
    found = compare_ood(known, {"x": ("unseen", other)}, 0)["x"]
    truth = np.repeat([0, 1], N)
    for item, side in ((found.auroc.start, "start"), (found.auroc.candidate, "candidate")):
        scores = [energy(getattr(part, side).logits) for part in (known, other)]
        assert item.value == pytest.approx(roc_auc_score(truth, np.concatenate(scores)))
    # All logits of the unknown images fell: their energy rose, and they are told apart.
    assert found.auroc.better is True
    turned = compare_ood(
        Pair(known.candidate, known.start), {"x": ("unseen", Pair(other.candidate, other.start))}, 0
    )["x"]
    assert turned.auroc.better is False
    assert turned.auroc.difference.value == pytest.approx(-found.auroc.difference.value)
    assert turned.auroc.difference.low == pytest.approx(-found.auroc.difference.high)


def test_fpr95_is_better_where_it_falls():
    known, other = pair(6), pair(7, labels=False, shift=-6.0)
    item = compare_ood(known, {"x": ("unseen", other)}, 0)["x"].fpr95
    assert item.candidate.value < item.start.value
    assert item.better is True


def test_the_mean_over_sets_is_the_mean_of_the_differences():
    known, others = pair(1), [pair(seed, labels=False, shift=-1) for seed in (2, 3)]
    alone = [compare_ood(known, {"x": ("unseen", part)}, 0)["x"].auroc for part in others]
    item = mean_auroc(known, others)
    assert item.difference.value == pytest.approx(
        np.mean([each.difference.value for each in alone])
    )
    assert item.start.value == pytest.approx(np.mean([each.start.value for each in alone]))
    assert item.difference.method.startswith("paired DeLong")


@given(st.integers(0, 50), st.integers(0, 70))
def test_unpaired_differences_turn_round_and_hold_their_value(first, second):
    one, two = proportion(first, 50), proportion(second, 70)
    item, turned = unpaired(one, two).difference, unpaired(two, one).difference
    assert item.low <= item.value <= item.high
    assert (turned.low, turned.value, turned.high) == pytest.approx(
        (-item.high, -item.value, -item.low)
    )


def test_without_intervals_there_is_no_verdict():
    bare = Metric(0.5, None, None, 10, "none")
    item = unpaired(bare, proportion(9, 10))
    assert item.better is None
    assert item.difference.low is None
