"""GuardedClassifier: the guard's own numbers, behind scikit-learn's interface."""

import warnings

import numpy as np
import pytest
import torch
from faces_cases import net
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.metrics import get_scorer
from sklearn.model_selection import cross_val_predict, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import ebm_guard
from ebm_guard.errors import (
    DataError,
    InvalidInputError,
    ModelOutputError,
    TooFewRowsError,
    UnsupportedModelError,
)
from ebm_guard.faces import GuardedClassifier
from ebm_guard.predictions import Predictions


def table(n=300, classes=3, seed=0, shift=0.0):
    generator = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = generator.normal(size=(n, 4)) + shift
    x[:, 0] += 1.5 * y
    return x, y


@pytest.fixture(scope="module")
def torch_net():
    """Trained a little, so that the gate has something to say."""
    model = net()
    x, y = map(torch.from_numpy, table(400, seed=9))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the dropout
        for _ in range(60):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x.float()), y).backward()
            optimiser.step()
    return model.eval()


def test_it_says_what_the_guard_says(torch_net):
    x, y = table()
    guard = ebm_guard.wrap(torch_net)
    guard.fit([(torch.from_numpy(x).float(), torch.from_numpy(y))], seed=0)
    new, _ = table(500, seed=1)
    truth = guard(torch.from_numpy(new).float())
    one = GuardedClassifier(torch_net, reject_label=-1, batch_size=64).fit(x, y)
    assert one.guard_.threshold.cut == guard.threshold.cut
    assert np.array_equal(one.accept(new), truth.accept.numpy())
    assert np.array_equal(one.score_samples(new), -truth.score.numpy())
    expected = np.where(truth.accept.numpy(), truth.label.numpy(), -1)
    assert np.array_equal(one.predict(new), expected)
    assert 0 < (expected == -1).sum() < 500
    logits = torch_net(torch.from_numpy(new).float()).double().detach().numpy()
    scaled = np.exp(logits / float(guard.calibrator.temperature))
    proba = scaled / scaled.sum(axis=1, keepdims=True)
    assert one.predict_proba(new) == pytest.approx(proba, abs=1e-7)
    assert np.array_equal(
        clone(one).set_params(reject_label=None).fit(x, y).predict(new), truth.label.numpy()
    )


def test_a_fitted_guard_is_taken_as_it_is(torch_net):
    x, y = table()
    guard = ebm_guard.wrap(torch_net)
    guard.fit([(torch.from_numpy(x).float(), torch.from_numpy(y))])
    cut = guard.threshold.cut
    one = GuardedClassifier(guard, classes=["a", "b", "c"], reject_label="far away")
    found = one.predict(x)
    assert set(found) == {"a", "b", "c", "far away"}
    one.fit(x[:70], np.array(["a", "b", "c"])[y[:70]])
    assert one.guard_ is guard
    assert guard.threshold.cut == cut
    assert np.array_equal(found, one.predict(x))
    with pytest.raises(InvalidInputError, match="false_reject_rate beside a fitted guard"):
        GuardedClassifier(guard, false_reject_rate=0.2).fit(x, y)
    with pytest.raises(InvalidInputError, match="not fitted"):
        GuardedClassifier(ebm_guard.wrap(torch_net)).fit(x, y)


LOGITS = (
    LogisticRegression(),
    LinearDiscriminantAnalysis(),
    HistGradientBoostingClassifier(max_iter=5),
)
PROBABILITIES = (
    GaussianNB(),
    SGDClassifier(loss="log_loss", random_state=0),
    OneVsRestClassifier(LogisticRegression()),
    MLPClassifier((4,), max_iter=300, solver="lbfgs", random_state=0),
    CalibratedClassifierCV(RidgeClassifier(), cv=2),
)


@pytest.mark.parametrize("inner", LOGITS, ids=lambda inner: type(inner).__name__)
def test_logits_where_the_decision_function_is_a_softmax(inner):
    x, y = table()
    one = GuardedClassifier(inner).fit(x, y)
    assert one.guard_.score.name == "energy"
    new, _ = table(40, seed=1)
    logits = one.model_.decision_function(new)
    energy = -np.log(np.exp(logits).sum(axis=1))
    assert one.score_samples(new) == pytest.approx(-energy, abs=1e-6)


@pytest.mark.parametrize("inner", PROBABILITIES, ids=lambda inner: type(inner).__name__)
def test_probabilities_elsewhere_and_no_energy_of_them(inner):
    x, y = table()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = GuardedClassifier(inner).fit(x, y)
        assert one.guard_.score.name == "msp"
        new, _ = table(40, seed=1)
        top = one.model_.predict_proba(new).max(axis=1)
        # The score is the log-odds against the top class.
        assert one.score_samples(new) == pytest.approx(np.log(top / (1 - top)), abs=1e-6)
        with pytest.raises(DataError, match="needs logits"):
            GuardedClassifier(inner, score_name="energy").fit(x, y)


def test_two_classes_have_no_energy():
    x, y = table(classes=2)
    one = GuardedClassifier(LogisticRegression()).fit(x, y)
    assert one.guard_.score.name == "msp"
    assert one.decision_function(x).shape == (300,)
    assert np.array_equal(one.decision_function(x) > 0, one.predict(x) == 1)


def test_without_probabilities_it_is_refused():
    with pytest.raises(UnsupportedModelError, match="CalibratedClassifierCV"):
        GuardedClassifier(RidgeClassifier()).fit(*table())


def test_the_classifier_and_the_gate_share_no_rows():
    x, y = table(200)
    one = GuardedClassifier(LogisticRegression(), holdout=0.4).fit(x, y)
    assert one.guard_.facts["n"] == 80
    taken = {hash(row.tobytes()) for row in np.asarray(x)}
    assert len(taken) == 200
    # The classifier is the one that the other 120 rows give.
    from ebm_guard.faces.scikit import _held_out

    held = _held_out(y, 0.4, 0)
    alone = LogisticRegression().fit(x[~held], y[~held])
    assert np.array_equal(one.model_.coef_, alone.coef_)
    assert np.array_equal(np.bincount(y[held]), [27, 27, 26])


def test_a_frozen_classifier_keeps_its_fit():
    inner = LogisticRegression().fit(*table(90, seed=4))
    weights = inner.coef_.copy()
    one = clone(GuardedClassifier(FrozenEstimator(inner))).fit(*table())
    assert one.guard_.facts["n"] == 300
    assert np.array_equal(inner.coef_, weights)
    assert np.array_equal(one.model_.estimator.coef_, weights)


def test_in_a_pipeline_and_cross_validation(torch_net):
    x, y = table()
    pipe = make_pipeline(StandardScaler(), GuardedClassifier(LogisticRegression(), reject_label=9))
    found = cross_val_predict(pipe, x, y, cv=3)
    assert 9 in found
    proba = cross_val_predict(pipe, x, y, cv=3, method="predict_proba")
    assert proba.sum(axis=1) == pytest.approx(1)
    one = GuardedClassifier(torch_net)
    whole = cross_val_predict(one, x, y, cv=3)
    with torch.no_grad():
        assert np.array_equal(whole, torch_net(torch.from_numpy(x).float()).argmax(1).numpy())
    scores = cross_val_score(one, x, y, cv=3, scoring="roc_auc_ovr", error_score="raise")
    assert (scores > 0.7).all()
    assert get_scorer("neg_log_loss")(one.fit(x, y), x, y) < 0
    # The model is copied for each fold, and the user's own is as it was.
    assert not any(part.training for part in torch_net.modules())


def test_text_labels_in_any_order():
    x, y = table()
    names = np.array(["cat", "ant", "bee"])
    one = GuardedClassifier(LogisticRegression(), reject_label="nothing known").fit(x, names[y])
    assert one.classes_.tolist() == ["ant", "bee", "cat"]
    assert "nothing known" in one.predict(x + 3 * (np.arange(300) % 2)[:, None])
    accepted = one.accept(x)
    assert (one.predict(x)[accepted] == names[y][accepted]).mean() > 0.5
    for wrong in (-1, "bee", ["x"]):
        with pytest.raises(InvalidInputError, match="reject_label"):
            clone(one).set_params(reject_label=wrong).fit(x, names[y])


def test_images_and_integers_reach_the_model(torch_net):
    seen = []

    def model(batch):
        seen.append((batch.dtype, tuple(batch.shape)))
        return torch_net(batch.flatten(1)[:, :4].float())

    x = np.random.default_rng(0).integers(0, 4, size=(120, 3, 2, 2), dtype=np.uint8)
    with torch.no_grad():
        y = model(torch.from_numpy(x)).argmax(1).numpy()
    y[::5] = (y[::5] + 1) % 3
    GuardedClassifier(model, batch_size=50).fit(x, y)
    assert set(seen) >= {(torch.uint8, (50, 3, 2, 2)), (torch.uint8, (20, 3, 2, 2))}
    double = net().eval().double()
    one = GuardedClassifier(double).fit(*table(seed=3))
    assert one.predict_proba(table(5)[0].astype(np.float32)).shape == (5, 3)


def test_rows_without_a_class(torch_net):
    x, y = table()
    one = GuardedClassifier(torch_net).fit(x, y)
    bad = x[:4].copy()
    bad[2] = np.nan
    with pytest.raises(ModelOutputError, match="row 2 first"):
        one.predict(bad)
    assert one.accept(bad)[2] == False  # noqa: E712 - numpy's own bool
    again = GuardedClassifier(torch_net, reject_label=-1).fit(x, y)
    assert again.predict(bad)[2] == -1


def test_wrong_calls_say_what_to_do(torch_net):
    x, y = table()
    with pytest.raises(NotFittedError, match=r"call fit\(X, y\)"):
        GuardedClassifier(torch_net).predict(x)
    with pytest.raises(InvalidInputError, match=r"needed an nn\.Module"):
        GuardedClassifier().fit(x, y)
    with pytest.raises(InvalidInputError, match="does not know: 3"):
        GuardedClassifier(torch_net).fit(x, y + 1)
    with pytest.raises(InvalidInputError, match="one name for each"):
        GuardedClassifier(torch_net, classes=["a", "b"]).fit(x, y)
    with pytest.raises(InvalidInputError, match="X of shape"):
        GuardedClassifier(torch_net).fit(np.array([["a"]]), y[:1])
    with pytest.raises(InvalidInputError, match="holdout=1"):
        GuardedClassifier(LogisticRegression(), holdout=1).fit(x, y)
    with pytest.raises(InvalidInputError, match="are for torch models"):
        GuardedClassifier(LogisticRegression(), classes=[0, 1, 2]).fit(x, y)
    with pytest.raises(InvalidInputError, match="1 sample of the class"):
        GuardedClassifier(LogisticRegression()).fit(x, np.where(np.arange(300) == 0, 7, y))
    with pytest.raises(TooFewRowsError):
        GuardedClassifier(torch_net).fit(x[:20], y[:20])


def test_the_guard_inside_can_be_saved(torch_net, tmp_path):
    x, y = table()
    one = GuardedClassifier(torch_net).fit(x, y)
    path = one.guard_.save(tmp_path / "guard.safetensors")
    again = GuardedClassifier(ebm_guard.Guard.load(path, torch_net))
    assert np.array_equal(again.score_samples(x), one.score_samples(x))
    # That of a scikit-learn classifier decides on its logits.
    two = GuardedClassifier(LogisticRegression()).fit(x, y)
    path = two.guard_.save(tmp_path / "other.safetensors")
    logits = Predictions(two.model_.decision_function(x))
    assert np.array_equal(
        ebm_guard.Guard.load(path).decide_stored(logits).accept.numpy(), two.accept(x)
    )


def test_scikit_learns_own_checks():
    """With a promise so weak that the checks' few rows are enough for it."""
    one = GuardedClassifier(LogisticRegression(), false_reject_rate=0.8, assurance=0.5)
    failed = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(one, expected_failed_checks=failed, on_fail=None)
    wrong = {row["check_name"]: row["exception"] for row in found if row["status"] == "failed"}
    assert not wrong, wrong
