"""The logit scores against loops in decimal arithmetic, and where the usual code ties."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ebm_guard.errors import InvalidInputError
from ebm_guard.ood import GEN, MSP, Energy, MaxLogit, make_score

TRUTHS = {
    "energy": oracles.energy,
    "msp": oracles.log_odds,
    "maxlogit": oracles.max_logit,
    "gen": oracles.log_gen,
}

logits64 = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
    elements=st.floats(-50, 50, width=32),
)


def confident(name, margin, rows=5000, classes=10):
    """Normal logits with one class raised by a margin: a saturated softmax."""
    rng = oracles.generator(name, margin)
    logits = rng.normal(size=(rows, classes))
    logits[np.arange(rows), rng.integers(0, classes, rows)] += margin
    return torch.from_numpy(logits).float()


def auroc(inside, outside):
    from sklearn.metrics import roc_auc_score

    truth = np.repeat([0, 1], [len(inside), len(outside)])
    return roc_auc_score(truth, np.concatenate([inside.double(), outside.double()]))


def clamped_gen(logits, gamma=0.1):
    """What common code does: clamp the probabilities before the powers."""
    p = logits.softmax(dim=1).clamp(1e-7, 1 - 1e-7)
    return (p**gamma * (1 - p) ** gamma).sum(dim=1)


@pytest.mark.parametrize("name", TRUTHS)
@oracles.QUICK
@given(values=logits64)
def test_score_equals_decimal_arithmetic(name, values):
    found = make_score(name)(torch.from_numpy(values))
    assert np.allclose(found.numpy(), TRUTHS[name](values), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("top", [2, 3, 5, 1000])
def test_gen_keeps_the_largest_probabilities(gamma, top):
    logits = oracles.generator("gen", gamma, top).normal(0, 4, size=(40, 8))
    found = GEN(gamma=gamma, top=top)(torch.from_numpy(logits))
    assert np.allclose(found.numpy(), oracles.log_gen(logits, gamma, top), rtol=1e-10)


@pytest.mark.parametrize("margin", [20.0, 80.0, 300.0])
def test_gen_is_right_where_the_softmax_is_one(margin):
    logits = confident("gen exact", margin, rows=50)
    truth = oracles.log_gen(logits.numpy())
    assert np.allclose(GEN()(logits).numpy(), truth, rtol=1e-5)
    assert np.allclose(GEN()(logits.double()).numpy(), truth, rtol=1e-11)


def test_gen_of_a_saturated_net_ranks_and_the_clamped_one_ties():
    inside, outside = confident("gen", 25.0), confident("gen", 20.0)
    right = auroc(GEN()(inside), GEN()(outside))
    wrong = auroc(clamped_gen(inside), clamped_gen(outside))
    # The margins differ by 5 with sd 1 on each: 0.9995 in exact arithmetic.
    exact = auroc(
        *(torch.from_numpy(oracles.log_gen(part[:500].numpy())) for part in (inside, outside))
    )
    assert right == pytest.approx(0.9995, abs=0.0005)
    assert right == pytest.approx(exact, abs=0.002)
    assert wrong < 0.6
    assert len(GEN()(inside).unique()) > 4900
    assert len(clamped_gen(inside).unique()) < 200


def test_msp_orders_as_the_softmax_where_that_does_not_tie():
    logits = torch.from_numpy(oracles.generator("msp").normal(0, 2, size=(2000, 10)))
    probability = logits.softmax(dim=1).amax(dim=1)
    assert len(probability.unique()) == len(logits)
    assert torch.equal(MSP()(logits).argsort(), probability.argsort(descending=True))


def test_msp_has_no_ties_where_the_softmax_has():
    logits = confident("msp ties", 25.0)
    assert len(logits.softmax(dim=1).amax(dim=1).unique()) == 1
    assert len(MSP()(logits).unique()) > 4900
    truth = oracles.log_odds(logits[:50].double().numpy())
    assert np.allclose(MSP()(logits[:50]).numpy(), truth, rtol=1e-5)


def test_energy_uses_its_own_temperature():
    logits = torch.from_numpy(oracles.generator("T").normal(0, 5, size=(20, 6)))
    for temperature in (0.5, 2.0, 200.0):
        found = Energy(energy_temperature=temperature)(logits)
        assert np.allclose(found.numpy(), oracles.energy(logits.numpy(), temperature), rtol=1e-12)


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_at_least_float32(name, dtype):
    logits = torch.from_numpy(oracles.generator("dtype").normal(0, 5, size=(50, 10))).to(dtype)
    found = make_score(name)(logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = TRUTHS[name](logits.double().numpy())
    assert np.allclose(found.double().numpy(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", TRUTHS)
def test_shift_of_a_row_changes_only_scores_that_need_logits(name):
    score = make_score(name)
    logits = torch.from_numpy(oracles.generator("shift").normal(0, 5, size=(50, 10)))
    same = torch.allclose(score(logits + 7), score(logits), atol=1e-10)
    assert same == score.from_probabilities
    if not same:
        assert torch.allclose(score(logits + 7), score(logits) - 7)


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize(
    "value",
    [torch.zeros(3), torch.zeros(3, 1), torch.zeros(2, 3, dtype=torch.int64), np.zeros((2, 3))],
)
def test_what_is_not_a_batch_of_logits_is_refused(name, value):
    with pytest.raises(InvalidInputError):
        make_score(name)(value)


@pytest.mark.parametrize(
    "settings", [{"gamma": 0.0}, {"gamma": -1}, {"gamma": 1.5}, {"top": 1}, {"top": 0}]
)
def test_gen_refuses_impossible_settings(settings):
    with pytest.raises(InvalidInputError, match=r"gamma in.*top >= 2"):
        GEN(**settings)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_energy_refuses_impossible_temperatures(temperature):
    with pytest.raises(InvalidInputError, match="temperature"):
        Energy(energy_temperature=temperature)


def test_make_score_names_what_is_wrong():
    with pytest.raises(InvalidInputError, match="did you mean 'energy'"):
        make_score("enrgy")
    with pytest.raises(InvalidInputError, match="'maxlogit' does not take"):
        make_score("maxlogit", temperature=2.0)
    assert isinstance(make_score("maxlogit"), MaxLogit)
