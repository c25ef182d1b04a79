"""The formula sheet against 60-digit decimal arithmetic, its symmetries, and its refusals."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ebm_guard.energy import check_logits, energy, joint_energy, log_odds, log_probabilities
from ebm_guard.errors import InvalidInputError

FUNCTIONS = (energy, joint_energy, log_probabilities, log_odds)
EPS32 = float(np.finfo(np.float32).eps)

logits64 = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
    elements=st.floats(-60, 60, width=32),
)


def drawn(name, rows=64, classes=10, scale=5.0, dtype=torch.float64):
    values = oracles.generator(name).normal(0, scale, size=(rows, classes))
    return torch.from_numpy(values).to(dtype)


@oracles.QUICK
@given(logits64, st.sampled_from([0.05, 0.5, 1.0, 3.0, 50.0]))
def test_energy_equals_decimal_arithmetic(values, temperature):
    truth = oracles.energy(values, temperature)
    assert np.allclose(
        energy(torch.from_numpy(values), temperature).numpy(), truth, rtol=1e-13, atol=1e-11
    )


@oracles.QUICK
@given(logits64, st.sampled_from([0.5, 1.0, 3.0, 1000.0]))
def test_log_probabilities_equal_decimal_arithmetic(values, temperature):
    found = log_probabilities(torch.from_numpy(values), temperature).numpy()
    assert np.allclose(found, oracles.log_softmax(values, temperature), rtol=1e-12, atol=1e-12)
    assert np.allclose(np.exp(found).sum(axis=1), 1, rtol=1e-12)


@oracles.QUICK
@given(logits64)
def test_log_odds_equal_decimal_arithmetic(values):
    found = log_odds(torch.from_numpy(values)).numpy()
    assert np.allclose(found, oracles.log_odds(values), rtol=1e-12, atol=1e-11)


def test_log_odds_at_a_tie_of_two_classes_is_zero():
    assert log_odds(torch.tensor([[3.0, 3.0]])).item() == 0.0
    assert log_odds(torch.tensor([[3.0, 3.0, 3.0]])).item() == pytest.approx(math.log(2))


@oracles.QUICK
@given(logits64)
def test_joint_energy_is_minus_the_logits_and_sums_to_the_energy(values):
    logits = torch.from_numpy(values)
    joint = joint_energy(logits)
    assert torch.equal(joint, -logits)
    # E(x) = -log sum_y exp(-E(x, y)).
    assert torch.allclose(energy(logits), -torch.logsumexp(-joint, dim=1))


@oracles.QUICK
@given(logits64, st.floats(-1e3, 1e3), st.sampled_from([0.5, 1.0, 10.0]))
def test_shift(values, shift, temperature):
    logits = torch.from_numpy(values)
    moved = logits + shift
    close = {"rtol": 1e-9, "atol": 1e-9}
    assert torch.allclose(energy(moved, temperature), energy(logits, temperature) - shift, **close)
    assert torch.allclose(
        log_probabilities(moved, temperature), log_probabilities(logits, temperature), **close
    )
    assert torch.allclose(log_odds(moved), log_odds(logits), **close)


@oracles.QUICK
@given(logits64, st.randoms(use_true_random=False))
def test_order_of_classes_does_not_matter(values, random):
    order = list(range(values.shape[1]))
    random.shuffle(order)
    logits = torch.from_numpy(values)
    assert torch.allclose(energy(logits[:, order]), energy(logits), rtol=1e-12, atol=1e-12)
    assert torch.allclose(log_odds(logits[:, order]), log_odds(logits), rtol=1e-12, atol=1e-12)
    assert torch.equal(joint_energy(logits[:, order]), joint_energy(logits)[:, order])


def ranks(values):
    return np.argsort(np.argsort(np.asarray(values), kind="stable"), kind="stable")


@pytest.mark.parametrize("temperature", [100.5, 1e4, 1e6])
def test_large_temperatures_keep_the_order_of_rows(temperature):
    logits = drawn("large T", rows=500, dtype=torch.float32)
    truth = oracles.energy(logits, temperature)
    found = energy(logits, temperature)
    assert found.dtype == torch.float64
    assert np.array_equal(ranks(found), ranks(truth))
    # T log C is constant; what is left tends to minus the mean logit.
    rest = found.numpy() + temperature * math.log(logits.shape[1])
    assert np.allclose(rest, -logits.double().mean(dim=1), atol=200 / temperature + 1e-6)


def test_the_float32_formula_loses_the_order_at_large_temperature():
    logits = drawn("large T", rows=500, dtype=torch.float32)
    naive = -1e6 * torch.logsumexp(logits / 1e6, dim=1)
    assert not np.array_equal(ranks(naive), ranks(oracles.energy(logits, 1e6)))
    assert len(naive.unique()) < 250


def test_small_temperature_gives_minus_the_largest_logit():
    logits = drawn("small T")
    assert torch.allclose(energy(logits, 1e-4), -logits.amax(dim=1), atol=1e-3)


@pytest.mark.parametrize("size", [90.0, 1e4, -1e4, 1e30])
def test_huge_logits_do_not_overflow(size):
    logits = torch.tensor([[size, size - 1, size - 3]])
    shifted = logits.double() - logits.double().amax()
    expected = oracles.energy(shifted) - logits.double().amax().item()
    for values in (logits, logits.double()):
        assert energy(values).item() == pytest.approx(expected[0], rel=1e-6)
        assert torch.isfinite(log_probabilities(values)).all()
        assert torch.isfinite(log_odds(values)).all()
    if size > 0:
        assert not torch.isfinite(-torch.log(torch.exp(logits).sum(dim=1))).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision_is_computed_in_float32(function, dtype):
    logits = drawn("half", scale=10).to(dtype)
    found = function(logits)
    assert found.dtype == torch.float32
    assert torch.equal(found, function(logits.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_logsumexp_is_far_off(dtype):
    logits = drawn("half", scale=10).to(dtype)
    truth = oracles.energy(logits.double().numpy())
    tolerance = 8 * EPS32 * np.abs(truth).max()
    assert np.abs(energy(logits).numpy() - truth).max() < tolerance
    wrong = -torch.logsumexp(logits, dim=1)
    assert np.abs(wrong.double().numpy() - truth).max() > 100 * tolerance


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_has_no_effect(function, dtype):
    logits = drawn("autocast", dtype=dtype)
    outside = function(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function(logits)
        assert torch.is_autocast_enabled("cpu")
    assert inside.dtype == outside.dtype == dtype
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0, 1000.0])
def test_gradient_of_the_energy_is_minus_the_softmax(temperature):
    logits = drawn("gradient").requires_grad_()
    (gradient,) = torch.autograd.grad(energy(logits, temperature).sum(), logits)
    truth = -oracles.softmax(logits.detach().numpy(), temperature)
    assert np.allclose(gradient.numpy(), truth, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_right_by_finite_differences(function):
    logits = drawn("gradcheck", rows=3, classes=4).requires_grad_()
    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_and_inf_show_in_their_row_only(function, bad):
    logits = drawn("non-finite", rows=5)
    broken = logits.clone()
    broken[2, 3] = bad
    found = function(broken).reshape(5, -1)
    assert not torch.isfinite(found[2]).all()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], function(logits).reshape(5, -1)[others])


def test_minus_infinity_is_an_impossible_class_and_leaves_the_energy_finite():
    # The gate has to refuse such a row by its logits: the score cannot show it.
    logits = torch.tensor([[1.0, -math.inf, 2.0]])
    assert energy(logits).item() == pytest.approx(oracles.energy([[1.0, 2.0]])[0])
    assert log_odds(logits).item() == pytest.approx(-1.0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_are_not_changed_and_empty_batches_work(function):
    logits = drawn("kept")
    before = logits.clone()
    function(logits)
    assert torch.equal(logits, before)
    assert len(function(torch.zeros(0, 3))) == 0


@pytest.mark.parametrize("function", [*FUNCTIONS, check_logits])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4, dtype=torch.float32), r"shape \(4,\).*\(B, C\)"),
        (torch.zeros(2, 3, 4), r"shape \(2, 3, 4\)"),
        (torch.zeros(4, 1), "one-logit.*two logits"),
        (torch.zeros(4, 0), "C >= 2"),
        (torch.zeros(4, 3, dtype=torch.int64), "torch.int64.*floating"),
        (torch.zeros(4, 3, dtype=torch.complex64), "floating"),
        (np.zeros((4, 3)), "ndarray.*torch tensor"),
        ([[0.0, 1.0]], "list.*torch tensor"),
        (None, "NoneType"),
    ],
)
def test_what_is_not_a_batch_of_logits_is_refused(function, value, message):
    with pytest.raises(InvalidInputError, match=message):
        function(value)


@pytest.mark.parametrize("function", [energy, log_probabilities])
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.inf, math.nan, "1", None])
def test_impossible_temperatures_are_refused(function, temperature):
    with pytest.raises(InvalidInputError, match=r"temperature.*finite number > 0"):
        function(torch.zeros(1, 2), temperature)
