"""What every registered method must do; it runs over the registry, so new rows are covered."""

import json
import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch

from ebm_guard import registry
from ebm_guard.calibration import row_statistics
from ebm_guard.errors import InvalidInputError, NotFittedError
from ebm_guard.gate import ACCEPT, INVALID, REJECT, Guard
from ebm_guard.ood import make_score
from ebm_guard.predictions import LinearHead, Predictions

SCORES = [method.name for method in registry.methods("score")]
FITTED = [method.name for method in registry.methods("feature_score")]
ROWS = [pytest.param(method, id=f"{method.family}-{method.name}") for method in registry.methods()]


def toy(name, rows=400, classes=5):
    """ID rows name a class clearly, OOD rows are small and flat."""
    rng = oracles.generator("toy", name)
    inside = rng.normal(size=(rows, classes))
    inside[np.arange(rows), rng.integers(0, classes, rows)] += 8
    outside = rng.normal(0, 0.5, size=(rows, classes))
    return inside.astype(np.float32), outside.astype(np.float32)


@pytest.fixture(scope="module")
def guards():
    """One guard for each score, fitted on stored logits; the label noise makes T finite."""
    inside, _ = toy("fit")
    predictions = Predictions(
        inside, labels=oracles.draw_labels(inside / 4, oracles.generator("y"))
    )
    return {name: Guard().fit(predictions, score=name) for name in SCORES}


@pytest.mark.parametrize("name", SCORES)
def test_higher_is_more_out_of_distribution(name):
    inside, outside = (make_score(name)(torch.from_numpy(part)) for part in toy("sign"))
    assert outside.mean() > inside.mean()
    assert oracles.auroc(inside[:100].tolist(), outside[:100].tolist()) > 0.95


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_shape_and_independence_of_the_batch(name, classes):
    logits = torch.from_numpy(oracles.generator("batch").normal(0, 5, size=(32, classes))).float()
    score = make_score(name)
    together = score(logits)
    assert together.shape == (32,)
    one_by_one = torch.cat([score(logits[row : row + 1]) for row in range(32)])
    assert torch.allclose(together, one_by_one, rtol=1e-6, atol=1e-6)
    order = torch.from_numpy(oracles.generator("order").permutation(32))
    assert torch.allclose(score(logits[order]), together[order], rtol=1e-6, atol=1e-6)
    assert score(logits[:0]).shape == (0,)


@pytest.mark.parametrize("name", SCORES)
def test_order_of_classes_does_not_matter(name):
    logits = torch.from_numpy(oracles.generator("classes").normal(0, 5, size=(32, 12)))
    order = torch.from_numpy(oracles.generator("order").permutation(12))
    score = make_score(name)
    assert torch.allclose(score(logits[:, order]), score(logits), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(name, dtype):
    logits = torch.from_numpy(toy("half")[0]).to(dtype)
    score = make_score(name).half()
    assert score(logits).dtype == torch.float32
    assert torch.equal(score(logits), make_score(name)(logits.float()))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("entries", ["one", "top", "all"])
def test_the_guard_refuses_exactly_the_row_with_a_non_finite_entry(guards, name, bad, entries):
    inside, outside = toy("bad")
    logits = torch.from_numpy(np.concatenate([inside[:10], outside[:10]]))
    guard = guards[name]
    clean = guard.decide(logits)
    assert (clean.status != INVALID).all()
    assert (clean.status == ACCEPT).any()
    assert (clean.status == REJECT).any()
    accepted = int((clean.status == ACCEPT).nonzero()[0])
    broken = logits.clone()
    where = {
        "one": broken[accepted].argmin(),
        "top": broken[accepted].argmax(),
        "all": slice(None),
    }[entries]
    broken[accepted, where] = bad
    decision = guard.decide(broken)
    assert decision.status[accepted] == INVALID
    assert not decision.accept[accepted]
    assert decision.label[accepted] == -1
    assert decision.confidence[accepted] == 0
    assert decision.p_value[accepted] == 0
    assert "non-finite" in decision.reason[accepted]
    others = torch.arange(len(logits)) != accepted
    for column in ("status", "label", "confidence", "energy", "score", "p_value", "logits"):
        assert torch.equal(getattr(decision, column)[others], getattr(clean, column)[others])
    json.dumps(decision.rows(), allow_nan=False)


@pytest.mark.parametrize("name", SCORES)
def test_a_gate_that_looks_at_the_score_alone_would_accept_a_broken_row(guards, name):
    # -inf in a losing class leaves every logit score finite, so the rule needs the logits.
    inside, _ = toy("bad")
    guard = guards[name]
    decision = guard.decide(torch.from_numpy(inside))
    row = torch.from_numpy(inside[decision.accept.numpy()][:1].copy())
    row[0, row.argmin()] = -math.inf
    score = guard.score(row)
    wrong = torch.isfinite(score) & guard.threshold.accept(score)
    right = guard.decide(row)
    assert right.status[0] == INVALID
    if torch.isfinite(score).all():
        assert wrong.all()


@pytest.mark.parametrize("name", SCORES)
def test_accept_is_score_at_most_cut(guards, name):
    logits = torch.from_numpy(np.concatenate(toy("cut")))
    decision = guards[name].decide(logits)
    cut = float(guards[name].threshold.cut)
    assert decision.accept.tolist() == [score <= cut for score in decision.score.tolist()]
    assert decision.score.dtype == torch.float64
    assert all(bool(text) != ok for text, ok in zip(decision.reason, decision.accept, strict=True))


@pytest.mark.parametrize("name", SCORES)
def test_settings_rebuild_the_score(name):
    score = make_score(name)
    rebuilt = type(score).from_state(
        dict(score.state_dict()), json.loads(json.dumps(score.settings()))
    )
    assert rebuilt.settings() == score.settings()
    assert score.name == name
    logits = torch.from_numpy(toy("state")[0])
    assert torch.equal(rebuilt(logits), score(logits))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("energy", {"energy_temperature": 3.0}), ("gen", {"gamma": 0.5, "top": 3})],
)
def test_other_settings_survive_the_round_trip(name, settings):
    score = make_score(name, **settings)
    assert score.settings() == settings
    rebuilt = type(score).from_state({}, score.settings())
    logits = torch.from_numpy(toy("state")[0])
    assert torch.equal(rebuilt(logits), score(logits))
    assert not torch.equal(rebuilt(logits), make_score(name)(logits))


@pytest.mark.parametrize("name", SCORES)
def test_scoring_stored_predictions_equals_scoring_tensors(name):
    inside, _ = toy("stored")
    score = make_score(name)
    found = score.of(Predictions(inside))
    assert found.dtype == np.float64
    assert np.array_equal(found, score(torch.from_numpy(inside)).double().numpy())


def featured(name, rows=400, classes=4, width=10):
    """ID rows lie around their class's features, OOD rows anywhere; with the head's logits."""
    world = oracles.generator("head", classes, width)
    means = world.gamma(2.0, 2.0, size=(classes, width))
    head = LinearHead((means - means.mean(axis=0)) / 4)
    rng = oracles.generator("featured", name)
    labels = np.arange(rows) % classes
    inside = np.abs(means[labels] + rng.normal(0, 0.4, size=(rows, width)))
    outside = rng.exponential(1.5, size=(rows, width))
    return [
        Predictions(
            head.logits(part).astype(np.float32),
            features=part.astype(np.float32),
            labels=labels,
            head=head,
        )
        for part in (inside, outside)
    ]


@pytest.fixture(scope="module")
def fitted_scores():
    """Every score that is fitted, on the same ID rows."""
    return {name: make_score(name).fit(featured("fit")[0]) for name in FITTED}


def columns(predictions):
    return torch.from_numpy(predictions.logits), torch.from_numpy(predictions.features)


@pytest.mark.parametrize("name", FITTED)
def test_fitted_scores_are_higher_out_of_distribution(fitted_scores, name):
    inside, outside = (fitted_scores[name].of(part) for part in featured("sign"))
    assert outside.mean() > inside.mean()
    assert oracles.auroc(inside[:100].tolist(), outside[:100].tolist()) > 0.9


@pytest.mark.parametrize("name", FITTED)
def test_fitted_scores_do_not_depend_on_the_batch(fitted_scores, name):
    logits, features = columns(featured("batch", rows=32)[1])
    score = fitted_scores[name]
    together = score(logits, features)
    assert together.shape == (32,)
    single = [score(logits[row : row + 1], features[row : row + 1]) for row in range(32)]
    assert torch.allclose(together, torch.cat(single), rtol=1e-5, atol=1e-5)
    order = torch.from_numpy(oracles.generator("order").permutation(32))
    assert torch.allclose(score(logits[order], features[order]), together[order], rtol=1e-5)
    assert score(logits[:0], features[:0]).shape == (0,)


@pytest.mark.parametrize("name", FITTED)
def test_order_of_classes_does_not_matter_to_fitted_scores(fitted_scores, name):
    order = oracles.generator("class order").permutation(4)

    def reordered(part):
        return replace(
            part,
            logits=part.logits[:, order],
            labels=np.argsort(order)[part.labels],
            head=LinearHead(part.head.weight[order]),
        )

    inside, rows = featured("fit")[0], featured("rows", rows=40)[1]
    found = make_score(name).fit(reordered(inside)).of(reordered(rows))
    assert np.allclose(found, fitted_scores[name].of(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FITTED)
def test_fitted_scores_come_back_to_the_bit(fitted_scores, name):
    score, rows = fitted_scores[name], featured("state")[1]
    rebuilt = type(score).from_state(
        dict(score.state_dict()), json.loads(json.dumps(score.settings(), allow_nan=False))
    )
    assert rebuilt.settings() == score.settings()
    assert score.name == name
    assert np.array_equal(rebuilt.of(rows), score.of(rows))
    assert all(value.is_floating_point() for value in score.state_dict().values())


@pytest.mark.parametrize("name", FITTED)
def test_scores_before_their_fit_say_so(name):
    score, rows = make_score(name), featured("early", rows=40)[0]
    assert score.needs_fit
    assert score.why_not_fit(rows) is None
    with pytest.raises(NotFittedError):
        score.of(rows)


@pytest.mark.parametrize("name", [*SCORES, *FITTED])
def test_what_a_score_says_of_its_needs_is_true(name):
    score = make_score(name)
    rows = featured("needs")[0]
    lacking = {"features": "needs_features", "head": "needs_head", "labels": "needs_labels"}
    for column, need in lacking.items():
        # The head goes with the features: it is no use without them.
        without = replace(rows, **{column: None})
        reason = score.why_not_fit(without)
        assert (reason is not None) == getattr(score, need), (column, reason)
        if reason is None:
            assert np.isfinite(make_score(name).fit(without).of(without)).all()
    assert (score.why_not(replace(rows, kind="probs")) is None) == score.from_probabilities


@pytest.mark.parametrize("method", ROWS)
def test_row_of_the_registry_is_complete(method):
    assert method.family in registry.FAMILIES
    assert method.name == method.name.lower()
    assert method.name.isidentifier()
    for text in (method.paper, method.equation, *method.needs):
        assert text.strip()
    assert method.needs
    assert json.loads(json.dumps(method.to_dict()))["name"] == method.name


@pytest.mark.parametrize("method", ROWS)
def test_target_is_documented_code(method):
    target = method.load()
    assert callable(target)
    assert target.__module__ == method.target.partition(":")[0]
    first, *rest = target.__doc__.strip().splitlines()
    assert first.endswith(".")
    assert not rest or not rest[0].strip()
    verb = first.split()[0]
    # "Compute ...", never "Computes", "Computing", "The" or "A".
    assert verb[0].isupper()
    assert not verb.endswith(("s", "ing"))
    assert verb not in ("The", "A", "An")


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_families(family):
    names = [method.name for method in registry.methods(family)]
    assert names
    assert len(set(names)) == len(names)
    assert all(registry.get(family, name).name == name for name in names)


@pytest.mark.parametrize("family", ["score", "calibrator", "threshold"])
def test_one_default_where_something_is_chosen(family):
    assert sum(method.default for method in registry.methods(family)) == 1


@pytest.mark.parametrize(
    ("family", "name", "near"),
    [
        ("score", "enrgy", "energy"),
        ("score", "max_logit", "maxlogit"),
        ("feature_score", "mahalanobi", "mahalanobis"),
        ("calibrator", "temprature", "temperature"),
        ("threshold", "margin", "marginal"),
        ("ood_metric", "fpr_95", "fpr95"),
    ],
)
def test_near_names_are_suggested(family, name, near):
    with pytest.raises(InvalidInputError, match=f"did you mean .*{near}"):
        registry.get(family, name)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InvalidInputError, match="known are energy, msp, maxlogit, gen"):
        registry.get("score", "zzzz")
    with pytest.raises(InvalidInputError, match="did you mean 'score'"):
        registry.methods("scores")


@pytest.mark.parametrize("method", registry.methods("ood_metric"), ids=lambda item: item.name)
def test_ood_metrics_take_two_sets_of_scores(method):
    rng = oracles.generator("ood metric")
    metric = method.load()(rng.normal(size=50), rng.normal(1, 1, size=40))
    assert metric.low <= metric.value <= metric.high
    assert 0 <= metric.value <= 1
    assert metric.n == 90
    assert metric.method
    json.dumps(metric.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "method", registry.methods("calibration_metric"), ids=lambda item: item.name
)
def test_calibration_metrics_take_row_statistics(method):
    inside, _ = toy("calibration metric")
    labels = oracles.draw_labels(inside / 4, oracles.generator("y"))
    rows = row_statistics(inside, labels)
    if method.name == "class_table":
        table = method.load()(rows, inside.shape[1])
        assert sorted(row.index for row in table) == list(range(inside.shape[1]))
        assert sum(row.n for row in table) == len(inside)
        return
    # Classwise ECE looks at all probabilities, the others at the predicted class alone.
    classwise = method.name == "ece_classwise"
    metric = method.load()(inside, labels) if classwise else method.load()(rows)
    assert metric.low <= metric.value <= metric.high
    assert metric.n == len(inside)
    assert metric.method
    json.dumps(metric.to_dict(), allow_nan=False)


@pytest.mark.parametrize("method", registry.methods("threshold"), ids=lambda item: item.name)
def test_threshold_rules_give_a_rank(method):
    rule = method.load()
    for n in (100, 1000):
        assert 1 <= rule(n, 0.05, 0.95) <= n
    assert rule(3, 0.05, 0.95) == 4


@pytest.mark.parametrize("method", registry.methods("calibrator"), ids=lambda item: item.name)
def test_calibrators_fit_and_come_back(method):
    inside, _ = toy("calibrator")
    labels = oracles.draw_labels(inside / 2, oracles.generator("y"))
    calibrator = method.load()().fit(inside, labels)
    rebuilt = type(calibrator).from_state(
        dict(calibrator.state_dict()), json.loads(json.dumps(calibrator.settings()))
    )
    assert calibrator.name == method.name
    assert rebuilt.settings() == calibrator.settings()
    assert np.array_equal(rebuilt.transform(inside), calibrator.transform(inside))
    probabilities = np.exp(calibrator.transform(inside))
    assert np.allclose(probabilities.sum(axis=1), 1)
    predicted, confidence = (part.numpy() for part in calibrator.predict(torch.from_numpy(inside)))
    kept = inside if calibrator.keeps_prediction else probabilities
    assert np.array_equal(predicted, kept.argmax(axis=1))
    assert np.allclose(confidence, probabilities[np.arange(len(inside)), predicted])
