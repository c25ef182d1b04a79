"""Temperature scaling: cases with a known answer, golden values, and what it must refuse."""

import math

import numpy as np
import oracles
import pytest
import torch
from scipy import optimize, special

from ebm_guard.calibration import TemperatureScaling, row_statistics
from ebm_guard.calibration.calibrators import base
from ebm_guard.calibration.calibrators import temperature as temperature_module
from ebm_guard.calibration.metrics import accuracy, ece, nll
from ebm_guard.errors import EbmGuardWarning, InvalidInputError, NotFittedError

KNOWN = (0.05, 2.0, 4.0, 8.0, 20.0)
BOUND = math.log(1e3) + 1e-9


def drawn(temperature, n=2000, classes=5, name="drawn"):
    """Logits whose labels are drawn from softmax(logits / temperature)."""
    rng = oracles.generator(name)
    honest = rng.normal(0, 2, size=(n, classes))
    return temperature * honest, oracles.draw_labels(honest, rng)


def mean_nll(log_t, logits, labels):
    log_p = special.log_softmax(logits / math.exp(log_t), axis=1)
    return -log_p[np.arange(len(labels)), labels].mean()


def slope(log_t, logits, labels):
    """d NLL / d(1/T) = E[E_p f - f_y], the same root as d NLL / d log T."""
    p = special.softmax(logits / math.exp(log_t), axis=1)
    return ((p * logits).sum(axis=1) - logits[np.arange(len(labels)), labels]).mean()


def true_root(logits, labels):
    arguments = (logits, labels)
    return math.exp(optimize.brentq(slope, -BOUND, BOUND, args=arguments, xtol=1e-14, rtol=1e-14))


def fitted(logits, labels):
    return TemperatureScaling().fit(logits, labels)


@pytest.mark.parametrize("temperature", KNOWN)
def test_equals_scipy(temperature):
    logits, labels = drawn(temperature)
    found = fitted(logits, labels)
    assert found.status == "converged"
    assert found.temperature.dtype == torch.float64
    assert float(found.temperature) == pytest.approx(true_root(logits, labels), rel=1e-9)
    # Minimising the loss is right to the square root of rounding only.
    by_loss = optimize.minimize_scalar(
        mean_nll,
        bounds=(-6.9, 6.9),
        args=(logits, labels),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert float(found.temperature) == pytest.approx(math.exp(by_loss.x), rel=1e-6)
    # It is the truth of the draw, within four standard errors.
    assert abs(float(found.temperature) - temperature) < 4 * found.standard_error


@pytest.mark.parametrize("temperature", KNOWN)
def test_few_gradient_steps_on_t_do_not_get_there(temperature):
    """The 2017 recipe (steps of 0.01 on T itself, 50 of them) fails the same comparison."""
    logits, labels = drawn(temperature)
    t = 1.5
    for _ in range(50):
        # d NLL / dT = -slope / T^2.
        t -= 0.01 * -slope(math.log(t), logits, labels) / t**2
    truth = true_root(logits, labels)
    assert t != pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("temperature", KNOWN)
def test_equals_scikit_learn(temperature):
    frozen = pytest.importorskip("sklearn.frozen", reason="scikit-learn < 1.6: no FrozenEstimator")
    import sklearn
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV

    if tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8):
        pytest.skip("scikit-learn < 1.8 has no temperature scaling")

    class Logits(ClassifierMixin, BaseEstimator):
        def fit(self, x, y):
            self.classes_ = np.arange(x.shape[1])
            return self

        def decision_function(self, x):
            return x

        def predict(self, x):
            return x.argmax(axis=1)

    logits, labels = drawn(temperature)
    estimator = frozen.FrozenEstimator(Logits().fit(logits, labels))
    theirs = CalibratedClassifierCV(estimator, method="temperature").fit(logits, labels)
    ours = fitted(logits, labels)
    assert np.allclose(
        theirs.predict_proba(logits), np.exp(ours.transform(logits)), rtol=1e-6, atol=1e-9
    )
    (calibrated,) = theirs.calibrated_classifiers_
    beta = float(calibrated.calibrators[0].beta_)
    assert float(ours.temperature) == pytest.approx(1 / beta, rel=1e-6)


# Table 4a of the field's errors: what the labels are, what is done to the logits, the right answer.
CASES = {
    "T=2": (2.0, "drawn", 0.0, np.float64, "converged"),
    "T=4": (4.0, "drawn", 0.0, np.float64, "converged"),
    "T=8": (8.0, "drawn", 0.0, np.float64, "converged"),
    "T=20": (20.0, "drawn", 0.0, np.float64, "converged"),
    "T=0.05": (0.05, "drawn", 0.0, np.float64, "converged"),
    "T=2 and 10,000 added": (2.0, "drawn", 1e4, np.float64, "converged"),
    "T=2 float32": (2.0, "drawn", 0.0, np.float32, "converged"),
    "T=2 float16": (2.0, "drawn", 0.0, np.float16, "converged"),
    "T=20 float32 and 10,000 added": (20.0, "drawn", 1e4, np.float32, "converged"),
    "argmin": (1.0, "argmin", 0.0, np.float64, "worse_than_uniform"),
    "argmin float32": (1.0, "argmin", 0.0, np.float32, "worse_than_uniform"),
    "separable": (1.0, "argmax", 0.0, np.float64, "separable"),
    "separable and 10,000 added": (1.0, "argmax", 1e4, np.float64, "separable"),
    "against chance": (1.0, "against", 0.0, np.float64, "worse_than_uniform"),
    "T=1e-5": (1e-5, "drawn", 0.0, np.float64, "at_bound"),
    "T=1e5": (1e5, "drawn", 0.0, np.float64, "at_bound"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cases_that_others_get_wrong(case):
    temperature, kind, offset, dtype, status = CASES[case]
    logits, labels = drawn(temperature, name="table 4a")
    if kind == "against":
        # Random labels, with the sign at which the best T is infinite.
        labels = oracles.generator("random labels of 4a").integers(0, 5, len(logits))
        gain = (logits[np.arange(len(labels)), labels] - logits.mean(axis=1)).mean()
        logits = logits if gain < 0 else -logits
    elif kind != "drawn":
        labels = getattr(logits, kind)(axis=1)
    given = (logits + offset).astype(dtype)
    if status != "converged":
        with pytest.warns(EbmGuardWarning, match=f"{status}.*T = 1 is kept"):
            found = fitted(given, labels)
        assert (found.status, float(found.temperature)) == (status, 1.0)
        return
    found = fitted(given, labels)
    assert found.status == status
    exact = given.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    assert float(found.temperature) == pytest.approx(true_root(exact, labels), rel=1e-8)
    assert abs(float(found.temperature) - temperature) < 4 * found.standard_error


@pytest.mark.parametrize("start", ["few", "all"])
def test_many_rows_start_from_few_and_end_the_same(monkeypatch, start):
    logits, labels = drawn(3.0, n=5000)
    monkeypatch.setattr(temperature_module, "_MANY", 1000 if start == "few" else 10**9)
    monkeypatch.setattr(temperature_module, "_FEW", 500)
    passes = []
    derivatives = temperature_module._derivatives
    monkeypatch.setattr(
        temperature_module,
        "_derivatives",
        lambda rows, b: (passes.append(len(rows)), derivatives(rows, b))[1],
    )
    found = fitted(logits, labels)
    assert float(found.temperature) == pytest.approx(true_root(logits, labels), rel=1e-9)
    # From 500 rows the start is within a few percent, and Newton squares the error.
    assert passes.count(5000) <= (3 if start == "few" else 6)


def test_integer_weights_are_repeated_rows():
    logits, labels = drawn(3.0, n=600)
    weights = oracles.generator("weights").integers(0, 4, 600)
    repeated = np.repeat(np.arange(600), weights)
    weighted = TemperatureScaling().fit(logits, labels, weights)
    assert float(weighted.temperature) == pytest.approx(
        float(fitted(logits[repeated], labels[repeated]).temperature), rel=1e-9
    )
    assert weighted.n == (weights > 0).sum()
    # Only the ratios count.
    scaled = TemperatureScaling().fit(logits, labels, 1e300 * weights)
    assert float(scaled.temperature) == pytest.approx(float(weighted.temperature), rel=1e-12)
    assert scaled.standard_error == pytest.approx(weighted.standard_error, rel=1e-9)
    equal = TemperatureScaling().fit(logits, labels, np.full(600, 7.0))
    assert float(equal.temperature) == float(fitted(logits, labels).temperature)
    assert equal.standard_error == pytest.approx(fitted(logits, labels).standard_error, rel=1e-12)


def test_standard_error_with_weights_equals_the_spread_of_repeated_draws():
    rng = oracles.generator("weighted bootstrap")
    honest = rng.normal(0, 2, size=(1000, 5))
    # Large weights on the rows that say least, so that taking them for equal is far off.
    weights = np.exp(-2 * honest.max(axis=1))
    found = [
        TemperatureScaling().fit(3.0 * honest, oracles.draw_labels(honest, rng), weights)
        for _ in range(150)
    ]
    spread = np.std([float(each.temperature) for each in found], ddof=1)
    promised = np.mean([each.standard_error for each in found])
    assert promised == pytest.approx(spread, rel=0.25)
    plain = fitted(3.0 * honest, oracles.draw_labels(honest, rng)).standard_error
    assert plain != pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"shape \(3,\) for 4 rows"),
        (np.array([1.0, -1.0, 1.0, np.nan]), "2 weights that are negative or not finite"),
        (np.array([1.0, np.inf, 1.0, 1.0]), "1 weights that are negative or not finite"),
        (np.zeros(4), "only zero weights"),
        (np.array([0.0, 1.0, 0.0, 0.0]), "1 row of positive weight.*at least 2"),
    ],
)
def test_weights_that_say_nothing_are_refused(weights, message):
    with pytest.raises(InvalidInputError, match=message):
        TemperatureScaling().fit(np.eye(4), np.array([0, 1, 2, 0]), weights)


def test_a_large_offset_changes_nothing():
    logits, labels = drawn(2.0)
    plain = fitted(logits, labels)
    moved = fitted(logits + 1e4, labels)
    assert float(moved.temperature) == pytest.approx(float(plain.temperature), rel=1e-9)
    each = logits + oracles.generator("offsets").uniform(-1e4, 1e4, size=(len(logits), 1))
    assert float(fitted(each, labels).temperature) == pytest.approx(
        float(plain.temperature), rel=1e-8
    )


def test_scaling_the_logits_scales_the_temperature():
    logits, labels = drawn(1.0)
    one = float(fitted(logits, labels).temperature)
    for factor in (1e-2, 0.3, 7.0, 300.0):
        assert float(fitted(factor * logits, labels).temperature) == pytest.approx(
            factor * one, rel=1e-9
        )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_precision_of_the_logits(dtype):
    logits, labels = drawn(4.0)
    stored = logits.astype(dtype)
    found = float(fitted(stored, labels).temperature)
    assert found == float(fitted(stored.astype(np.float64), labels).temperature)
    assert found == pytest.approx(true_root(stored.astype(np.float64), labels), rel=1e-9)
    assert found == pytest.approx(
        float(fitted(logits, labels).temperature), rel=20 * float(np.finfo(dtype).eps)
    )


@pytest.mark.parametrize("chunk", [5, 777, 9999])
def test_chunks_equal_one_go(monkeypatch, chunk):
    logits, labels = drawn(2.0)
    whole = fitted(logits, labels)
    monkeypatch.setattr(base, "CHUNK", chunk)
    parts = fitted(logits, labels)
    assert float(parts.temperature) == pytest.approx(float(whole.temperature), rel=1e-10)
    assert parts.standard_error == pytest.approx(whole.standard_error, rel=1e-10)


def test_random_labels_have_an_optimum_for_the_logits_or_for_their_negative():
    # At T = inf the slope is E[mean f - f_y]; its sign flips with the logits, so exactly one of
    # the two has a finite optimum. Neither may give a negative T.
    rng = oracles.generator("random labels")
    for _ in range(5):
        logits, labels = rng.normal(0, 2, size=(500, 5)), rng.integers(0, 5, 500)
        gain = logits[np.arange(500), labels].mean() - logits.mean()
        good, bad = (logits, -logits) if gain > 0 else (-logits, logits)
        with pytest.warns(EbmGuardWarning, match="no better than chance"):
            found = fitted(bad, labels)
        assert found.status == "worse_than_uniform"
        assert float(found.temperature) == 1.0
        assert found.standard_error is None
        assert slope(6.9, bad, labels) > 0
        if slope(math.log(1e3), good, labels) >= 0:
            with pytest.warns(EbmGuardWarning, match="at_bound"):
                assert float(fitted(good, labels).temperature) == 1.0
        else:
            found = fitted(good, labels)
            assert found.status == "converged"
            assert float(found.temperature) == pytest.approx(true_root(good, labels), rel=1e-8)
            assert float(found.temperature) > 5


@pytest.mark.parametrize("classes", [2, 5])
def test_always_wrong_logits_keep_t_at_one(classes):
    logits, _ = drawn(1.0, classes=classes)
    with pytest.warns(EbmGuardWarning, match="worse_than_uniform.*T = 1 is kept"):
        found = fitted(logits, logits.argmin(axis=1))
    assert found.status == "worse_than_uniform"
    assert float(found.temperature) == 1.0


def test_constant_logits_say_nothing():
    with pytest.warns(EbmGuardWarning, match="worse_than_uniform"):
        found = fitted(np.full((50, 3), 7.0), oracles.generator("constant").integers(0, 3, 50))
    assert float(found.temperature) == 1.0


@pytest.mark.parametrize("margin", [1e-3, 0.1, 1.0, 5.0, 50.0, 1e3, 1e5])
@pytest.mark.parametrize("classes", [2, 5])
def test_separable_rows_keep_t_at_one(margin, classes):
    """Every row is right, so the NLL falls for ever as T -> 0, even where float64 sees zero."""
    labels = np.arange(100) % classes
    logits = margin * np.eye(classes)[labels]
    with pytest.warns(EbmGuardWarning, match="separable.*T = 1 is kept"):
        found = fitted(logits, labels)
    assert found.status == "separable"
    assert float(found.temperature) == 1.0
    assert found.standard_error is None


def test_noisy_separable_rows_keep_t_at_one():
    logits, _ = drawn(1.0)
    with pytest.warns(EbmGuardWarning, match="separable"):
        assert fitted(logits, logits.argmax(axis=1)).status == "separable"


def test_rows_whose_label_ties_for_the_top_are_separable_too():
    # With the label among the largest logits everywhere, no row ever pulls T away from 0.
    logits = np.array([[2.0, 2.0, 0.0]] * 20 + [[0.0, 0.0, 9.0]] * 20)
    labels = np.array([0, 1] * 10 + [2] * 20)
    with pytest.warns(EbmGuardWarning, match="separable"):
        assert float(fitted(logits, labels).temperature) == 1.0


def test_one_wrong_row_makes_the_optimum_finite():
    labels = np.arange(100) % 4
    logits = 5.0 * np.eye(4)[labels]
    labels[0] = (labels[0] + 1) % 4
    found = fitted(logits, labels)
    # 99 of 100 right with equal margins m: p = .99 where exp(m/T) / (exp(m/T) + 3) = .99.
    assert found.status == "converged"
    assert float(found.temperature) == pytest.approx(5 / math.log(3 * 0.99 / 0.01), rel=1e-9)


@pytest.mark.parametrize("temperature", [1e-5, 1e5])
def test_an_optimum_outside_the_bounds_is_not_taken(temperature):
    logits, labels = drawn(temperature)
    with pytest.warns(EbmGuardWarning, match=r"at_bound.*outside \[0.001, 1000\]"):
        found = fitted(logits, labels)
    assert found.status == "at_bound"
    assert float(found.temperature) == 1.0


@pytest.mark.parametrize("temperature", [0.002, 0.3, 1.0, 30.0, 500.0])
def test_standard_error_is_the_curvature_of_the_likelihood(temperature):
    logits, labels = drawn(temperature, n=700)
    found = fitted(logits, labels)
    u, h = math.log(float(found.temperature)), 1e-4
    values = [mean_nll(u + step, logits, labels) for step in (-h, 0, h)]
    information = len(labels) * (values[0] - 2 * values[1] + values[2]) / h**2
    truth = float(found.temperature) / math.sqrt(information)
    assert found.standard_error == pytest.approx(truth, rel=1e-4)


def test_standard_error_equals_the_spread_of_repeated_draws():
    rng = oracles.generator("parametric bootstrap")
    honest = rng.normal(0, 2, size=(1000, 5))
    draws = [fitted(3.0 * honest, oracles.draw_labels(honest, rng)) for _ in range(150)]
    spread = np.std([float(draw.temperature) for draw in draws], ddof=1)
    promised = np.mean([draw.standard_error for draw in draws])
    # The sd of 150 draws is itself off by 6 %.
    assert promised == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_refused_with_their_number(bad):
    logits, labels = drawn(2.0)
    logits[[1, 5], [0, 3]] = bad
    with pytest.raises(InvalidInputError, match="2 rows with NaN or infinite"):
        fitted(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((1, 3)), [0], "1 row.*at least 2"),
        (np.zeros((0, 3)), [], "0 row.*at least 2"),
        (np.zeros((4, 3)), [0, 1, 2, 3], r"0\.\.3; needed 0\.\.2"),
        (np.zeros((4, 3)), [0, 1, 2, -1], r"-1\.\.2; needed 0\.\.2"),
        (np.zeros((4, 1)), [0, 0, 0, 0], "C >= 2"),
        (np.zeros(4), [0, 0, 0, 0], r"\(N, C\)"),
        (np.zeros((4, 3)), [0, 1], r"\(N,\)"),
    ],
)
def test_what_cannot_be_fitted_is_refused(logits, labels, message):
    with pytest.raises(InvalidInputError, match=message):
        fitted(logits, np.array(labels, dtype=np.int64))


def test_the_argmax_and_the_stored_logits_stay():
    logits, labels = drawn(4.0)
    before = logits.copy()
    calibrated = fitted(logits, labels).transform(logits)
    assert np.array_equal(logits, before)
    assert np.array_equal(calibrated.argmax(axis=1), logits.argmax(axis=1))
    assert np.allclose(np.exp(calibrated).sum(axis=1), 1, rtol=1e-12)


def test_transform_equals_row_statistics_at_that_temperature():
    logits, labels = drawn(4.0)
    found = fitted(logits, labels)
    direct = row_statistics(logits, labels, float(found.temperature))
    through = row_statistics(logits, labels, transform=found.transform)
    assert np.allclose(direct.nll, through.nll, rtol=1e-10)
    confidence = found.confidence(torch.from_numpy(logits)).numpy()
    assert np.allclose(confidence, direct.confidence, rtol=1e-12)


def test_it_must_be_fitted_first():
    with pytest.raises(NotFittedError, match="fit"):
        TemperatureScaling().log_probabilities(torch.zeros(1, 2))


def test_half_keeps_the_temperature_exact():
    logits, labels = drawn(2.0)
    found = fitted(logits, labels)
    before = float(found.temperature)
    assert float(found.half().temperature) == before
    assert found.temperature.dtype == torch.float64


def test_state_survives():
    for temperature in (2.0, 1e5):
        logits, labels = drawn(temperature)
        if temperature > 1e3:
            with pytest.warns(EbmGuardWarning):
                found = fitted(logits, labels)
        else:
            found = fitted(logits, labels)
        again = TemperatureScaling.from_state(dict(found.state_dict()), found.settings())
        assert again.settings() == found.settings()
        assert torch.equal(again.temperature, found.temperature)


@pytest.mark.parametrize(
    ("name", "temperature", "ece_raw", "ece_after", "nll_raw", "nll_after", "right"),
    [
        ("densenet_bc100_cifar100", 2.1178, 0.13991, 0.01392, 1.2263, 0.8756, 0.7580),
        ("wrn16_4_cifar10", 2.0674, 0.05121, 0.00945, 0.3571, 0.2603, 0.9152),
        ("wrn16_4_cifar100", 1.1233, 0.05652, 0.04247, 0.9576, 0.9509, 0.7534),
    ],
)
def test_published_networks(
    data_dir, name, temperature, ece_raw, ece_after, nll_raw, nll_after, right
):
    with np.load(data_dir / f"softmax_{name}.npz") as file:
        probs, labels = file["probs"], file["labels"]
    order = np.random.default_rng(0).permutation(10000)
    logits, labels = np.log(probs.astype(np.float64))[order], labels[order].astype(np.int64)
    found = fitted(logits[:5000], labels[:5000])
    assert float(found.temperature) == pytest.approx(temperature, abs=5e-5)
    assert float(found.temperature) == pytest.approx(
        true_root(logits[:5000], labels[:5000]), rel=1e-9
    )
    test = logits[5000:], labels[5000:]
    before, after = row_statistics(*test), row_statistics(*test, float(found.temperature))
    assert ece(before, draws=1).value == pytest.approx(ece_raw, abs=5e-6)
    assert ece(after, draws=1).value == pytest.approx(ece_after, abs=5e-6)
    assert nll(before).value == pytest.approx(nll_raw, abs=5e-5)
    assert nll(after).value == pytest.approx(nll_after, abs=5e-5)
    assert accuracy(before).value == accuracy(after).value == pytest.approx(right, abs=1e-9)
