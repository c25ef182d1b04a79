"""Scores on features against slow float64 loops written from the papers' equations."""

import json
import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ebm_guard import registry
from ebm_guard.errors import (
    DataError,
    InvalidInputError,
    NotFittedError,
    TooFewRowsError,
    UnsupportedModelError,
)
from ebm_guard.model import EnergyClassifier
from ebm_guard.ood import (
    FDBD,
    KNN,
    EnergyReAct,
    EnergyScale,
    Mahalanobis,
    NNGuide,
    ViM,
    approximate_mass,
    as_score,
    make_score,
)
from ebm_guard.ood.feature_scores import activations
from ebm_guard.ood.feature_scores.moments import Moments
from ebm_guard.ood.feature_scores.sample import BalancedSample
from ebm_guard.ood.feature_scores.shrinkage import ledoit_wolf_rho, oas_rho
from ebm_guard.predictions import LinearHead, Predictions

NAMES = [row.name for row in registry.methods("feature_score") if row.name != "combine"]
VARIANTS = {
    **{name: {} for name in NAMES},
    "knn": {"k": 5},
    "relative": {"relative": True, "normalize": False},
    "ledoit_wolf": {"relative": True, "shrinkage": "ledoit_wolf"},
    "oas": {"shrinkage": "oas"},
    "gmm_tied": {"covariance": "tied", "normalize": False},
    "kmeans_pooled": {"per_class": False, "beta": "inf", "normalize": False},
}


def build(variant):
    others = {"gmm_tied": "gmm_energy", "kmeans_pooled": "kmeans_energy"}
    name = variant if variant in NAMES else others.get(variant, "mahalanobis")
    return make_score(name, **VARIANTS[variant])


def clusters(key, n=300, classes=4, width=12, spread=1.0, bias=True, dtype=np.float32, seen=None):
    """Positive features around class means, with the head and the logits that belong to them."""
    world = oracles.generator("world", classes, width)
    means = world.gamma(2.0, 1.0, size=(classes, width)) + 0.5
    weight = (means - means.mean(axis=0)).astype(dtype)
    head = LinearHead(weight, world.normal(size=classes).astype(dtype) if bias else None)
    rng = oracles.generator("rows", key)
    labels = rng.integers(0, seen or classes, size=n)
    features = np.abs(means[labels] + spread * rng.normal(size=(n, width))).astype(dtype)
    logits = head.logits(features).astype(dtype)
    return Predictions(logits, features=features, labels=labels.astype(np.int64), head=head)


def tensors(predictions):
    return torch.from_numpy(predictions.logits), torch.from_numpy(predictions.features)


# Oracles: loops over rows in float64, nothing shared with the package.


def naive_lse(row):
    top = max(row)
    return top + math.log(sum(math.exp(value - top) for value in row))


def naive_unit(row):
    length = math.sqrt(sum(float(value) ** 2 for value in row))
    return np.array([float(value) / length if length else 0.0 for value in row])


def naive_linear(head, row):
    bias = np.zeros(len(head.weight)) if head.bias is None else head.bias
    return [
        sum(float(w) * float(x) for w, x in zip(line, row, strict=True)) + float(b)
        for line, b in zip(head.weight, bias, strict=True)
    ]


def naive_react(fit, rows, percentile=90):
    values = sorted(float(value) for row in fit.features for value in row)
    place = percentile / 100 * (len(values) - 1)
    low = math.floor(place)
    clip = values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])
    return [
        -naive_lse(naive_linear(fit.head, [min(float(x), clip) for x in row]))
        for row in rows.features
    ]


def naive_scale(fit, rows, percentile=85):
    found = []
    for row in rows.features:
        values = [float(x) for x in row]
        kept = len(values) - round(len(values) * percentile / 100)
        ratio = sum(values) / sum(sorted(values, reverse=True)[:kept])
        found.append(-naive_lse(naive_linear(fit.head, [x * math.exp(ratio) for x in values])))
    return found


def naive_vim(fit, rows, dimension):
    features = fit.features.astype(np.float64)
    weight = fit.head.weight.astype(np.float64)
    origin = features.mean(axis=0)
    if fit.head.bias is not None:
        # The rows of this head sum to zero, but for the rounding of its dtype.
        cut = 1e-5 if fit.head.weight.dtype == np.float32 else 1e-13
        origin = -np.linalg.lstsq(weight, fit.head.bias.astype(np.float64), rcond=cut)[0]
    # Right singular vectors of the rows: another way to the eigenvectors of their scatter.
    basis = np.linalg.svd(features - origin, full_matrices=True)[2][dimension:]

    def residual(row):
        return math.sqrt(sum(float(line @ (row - origin)) ** 2 for line in basis))

    alpha = np.mean([max(map(float, row)) for row in fit.logits])
    alpha /= np.mean([residual(row) for row in features])
    return [
        alpha * residual(row.astype(np.float64)) - naive_lse([float(v) for v in logits])
        for row, logits in zip(rows.features, rows.logits, strict=True)
    ]


def naive_mahalanobis(fit, rows, *, normalize, relative, ridge=1e-6):
    def prepared(values):
        return np.array([naive_unit(row) if normalize else row.astype(float) for row in values])

    points, labels = prepared(fit.features), fit.labels
    width = points.shape[1]
    means = {c: points[labels == c].mean(axis=0) for c in set(labels.tolist())}

    def precision(centred):
        total = np.zeros((width, width))
        for row in centred:
            total += np.outer(row, row)
        total /= len(centred)
        return np.linalg.inv(total + ridge * np.trace(total) / width * np.eye(width))

    inner = precision([row - means[int(c)] for row, c in zip(points, labels, strict=True)])
    centre = points.mean(axis=0)
    outer = precision([row - centre for row in points])
    found = []
    for row in prepared(rows.features):
        nearest = min((row - m) @ inner @ (row - m) for m in means.values())
        found.append(nearest - relative * ((row - centre) @ outer @ (row - centre)))
    return found


def naive_knn(fit, rows, k):
    bank = [naive_unit(row) for row in fit.features]
    return [
        sorted(math.dist(naive_unit(row), other) for other in bank)[k - 1] for row in rows.features
    ]


def naive_nnguide(fit, rows, k):
    bank = [
        naive_unit(row) * naive_lse([float(v) for v in logits])
        for row, logits in zip(fit.features, fit.logits, strict=True)
    ]
    found = []
    for row, logits in zip(rows.features, rows.logits, strict=True):
        point = naive_unit(row)
        best = sorted((float(point @ other) for other in bank), reverse=True)[:k]
        found.append(-naive_lse([float(v) for v in logits]) * sum(best) / k)
    return found


def naive_fdbd(fit, rows):
    mean = fit.features.astype(np.float64).mean(axis=0)
    weight = fit.head.weight.astype(np.float64)
    found = []
    for row, logits in zip(rows.features, rows.logits.astype(np.float64), strict=True):
        top = int(logits.argmax())
        others = [c for c in range(len(logits)) if c != top]
        margin = [(logits[top] - logits[c]) / math.dist(weight[top], weight[c]) for c in others]
        found.append(-sum(margin) / len(others) / math.dist(row.astype(np.float64), mean))
    return found


ORACLES = {
    "energy_react": naive_react,
    "energy_scale": naive_scale,
    "vim": lambda fit, rows: naive_vim(fit, rows, fit.features.shape[1] // 2),
    "mahalanobis": lambda fit, rows: naive_mahalanobis(fit, rows, normalize=True, relative=0),
    "relative": lambda fit, rows: naive_mahalanobis(fit, rows, normalize=False, relative=1),
    "knn": lambda fit, rows: naive_knn(fit, rows, 5),
    "fdbd": naive_fdbd,
    "nnguide": lambda fit, rows: naive_nnguide(fit, rows, 10),
}


@pytest.mark.parametrize("variant", ORACLES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("classes", "width"), [(4, 12), (2, 5)])
def test_equals_the_paper(variant, bias, classes, width):
    fit = clusters("fit", classes=classes, width=width, bias=bias, dtype=np.float64)
    rows = clusters("new", 40, classes=classes, width=width, bias=bias, dtype=np.float64, spread=3)
    found = build(variant).fit(fit).of(rows)
    # The bank of kNN and NNGuide is float32.
    tolerance = 1e-6 if variant in ("knn", "nnguide") else 1e-8
    assert np.allclose(found, ORACLES[variant](fit, rows), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", ORACLES)
def test_float32_rows_give_the_float64_answer(variant):
    fit, rows = clusters("fit"), clusters("new", 40, spread=3)
    assert np.allclose(build(variant).fit(fit).of(rows), ORACLES[variant](fit, rows), rtol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_far_rows_score_higher(variant):
    fit, inside = clusters("fit", spread=0.4), clusters("in", 100, spread=0.4)
    rng = oracles.generator("far")
    features = rng.gamma(1.0, 0.7, size=(100, 12)).astype(np.float32)
    outside = replace(
        inside, features=features, logits=fit.head.logits(features).astype(np.float32), hashes=None
    )
    score = build(variant).fit(fit)
    assert oracles.auroc(score.of(inside).tolist(), score.of(outside).tolist()) > 0.75


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_equals_loaded_to_the_bit(variant):
    fit, rows = clusters("fit"), clusters("new", 30)
    score = build(variant).fit(fit)
    settings = json.loads(json.dumps(score.settings(), allow_nan=False))
    again = type(score).from_state(dict(score.state_dict()), settings)
    assert again.settings() == score.settings()
    assert np.array_equal(again.of(rows), score.of(rows))
    assert settings["fit"]["n"] == 300
    assert settings["fit"]["dtype"] == "float32"
    blank = type(score).from_state({}, build(variant).settings())
    with pytest.raises(NotFittedError, match="call fit"):
        blank.of(rows)
    with pytest.raises(KeyError):
        type(score).from_state({}, settings)
    with pytest.raises(InvalidInputError, match="loaded from a file"):
        build(variant).merge(again)


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_rounds_nothing_that_was_fitted(variant):
    fit, rows = clusters("fit"), clusters("new", 30)
    score = build(variant).fit(fit)
    before = score.of(rows)
    assert np.array_equal(score.half().of(rows), before)
    assert np.array_equal(score.to(torch.bfloat16).of(rows), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_rows_are_scored_in_float32(variant):
    score = build(variant).fit(clusters("fit"))
    logits, features = (part.half() for part in tensors(clusters("new", 30)))
    found = score(logits, features)
    assert found.dtype in (torch.float32, torch.float64)
    assert torch.equal(found, score(logits.float(), features.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score(logits, features), found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_parts_equal_one_fit(variant):
    fit, rows = clusters("fit"), clusters("new", 50)
    whole = build(variant).fit(fit)
    cuts = [fit.select(slice(0, 7)), fit.select(slice(7, 200)), fit.select(slice(200, None))]
    parts = [build(variant).partial_fit(part) for part in cuts]
    merged = parts[0].merge(parts[2]).merge(parts[1]).finish(*cuts)
    streamed = build(variant)
    for part in cuts:
        streamed.partial_fit(part)
    streamed.finish(*cuts)
    for score in (merged, streamed):
        assert np.allclose(score.of(rows), whole.of(rows), rtol=1e-9, atol=1e-9)
        assert score.settings()["fit"]["n"] == 300
    if variant in ("knn", "nnguide", "energy_react", "energy_scale"):
        assert np.array_equal(merged.of(rows), whole.of(rows))


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_the_fit_rows_does_not_matter(variant):
    fit, rows = clusters("fit"), clusters("new", 50)
    order = oracles.generator("shuffle").permutation(len(fit))
    found = build(variant).fit(fit.select(order)).of(rows)
    assert np.allclose(found, build(variant).fit(fit).of(rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_statistics_make_a_score_stale(variant):
    fit = clusters("fit")
    score = build(variant).fit(fit).partial_fit(fit)
    with pytest.raises(NotFittedError):
        score.of(fit)
    # And fit begins anew.
    assert score.fit(fit).settings()["fit"]["n"] == 300


@pytest.mark.parametrize("name", ["vim", "ledoit_wolf"])
def test_a_second_pass_wants_the_rows_again(name):
    fit = clusters("fit")
    for parts in ((), (fit.select(slice(0, 100)),)):
        with pytest.raises(InvalidInputError, match="second pass over the 300 rows"):
            build(name).partial_fit(fit).finish(*parts)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("where", ["logits", "features"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_scores_nan_and_no_other_row_moves(variant, where, bad):
    score = build(variant).fit(clusters("fit"))
    logits, features = tensors(clusters("new", 20))
    clean = score(logits, features)
    assert torch.isfinite(clean).all()
    broken = {"logits": logits.clone(), "features": features.clone()}
    broken[where][3, 1] = bad
    broken[where][4] = bad
    found = score(broken["logits"], broken["features"])
    assert found[3:5].isnan().all()
    others = torch.arange(20).sub(3.5).abs() > 1
    assert torch.allclose(found[others], clean[others], rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("where", ["logits", "features"])
def test_broken_fit_rows_are_refused(variant, where):
    fit = clusters("fit")
    values = getattr(fit, where).copy()
    values[7, 0] = np.nan
    broken = replace(fit, **{where: values})
    assert "1 of 300 rows hold NaN" in build(variant).why_not_fit(broken)
    with pytest.raises(DataError, match="1 of 300 rows hold NaN"):
        build(variant).fit(broken)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_vectors_give_finite_scores(variant):
    fit = clusters("fit")
    features = fit.features.copy()
    features[:5] = 0
    logits = fit.head.logits(features).astype(np.float32)
    score = build(variant).fit(replace(fit, features=features, logits=logits))
    found = score(torch.from_numpy(logits[:1]), torch.zeros(1, 12))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_classes_are_allowed(variant):
    fit = clusters("absent", classes=6, seen=3)
    score = build(variant).fit(fit)
    assert np.isfinite(score.of(clusters("absent new", 20, classes=6))).all()
    assert score.settings()["fit"]["classes_seen"] == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_features_than_rows(variant):
    fit = clusters("wide", n=80, width=200)
    rows = clusters("wide new", 40, width=200)
    if variant == "vim":
        # 80 rows lie in 80 directions: beyond the first 100 nothing is left.
        with pytest.raises(DataError, match="nothing is left of the features"):
            build(variant).fit(fit)
        return
    found = build(variant).fit(fit).of(rows)
    assert np.isfinite(found).all()
    assert len(np.unique(found)) == 40


@pytest.mark.parametrize("variant", VARIANTS)
def test_too_few_images_per_class(variant):
    fit = clusters("fit", n=40, classes=8)
    one = fit.select(np.unique(fit.labels, return_index=True)[1])
    need = 10 if build(variant).name in ("mahalanobis", "gmm_energy") else 5
    seen = len(one)
    reason = build(variant).why_not_fit(one)
    assert reason == f"1 image per class ({seen} rows of {seen} classes), {need} are needed"
    with pytest.raises(TooFewRowsError, match="1 image per class"):
        build(variant).fit(one)
    assert build(variant).why_not_fit(clusters("fit")) is None


def test_without_labels_the_predicted_class_counts():
    fit = replace(clusters("fit", n=40, classes=8), labels=None)
    rows = fit.select(np.unique(fit.logits.argmax(axis=1), return_index=True)[1])
    assert "1 image per class" in KNN(k=2).why_not_fit(rows)
    with pytest.raises(TooFewRowsError):
        KNN(k=2).fit(rows)
    assert KNN(k=2).why_not_fit(fit) is None


def test_knn_needs_k_rows():
    with pytest.raises(TooFewRowsError, match="at least 50 rows, got 40"):
        KNN().fit(clusters("fit", n=40))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        *[(name, {"features": None, "head": None}, "needs features") for name in NAMES],
        *[
            (name, {"head": None}, "needs the head's weights")
            for name in ("vim", "energy_react", "energy_scale", "fdbd")
        ],
        ("mahalanobis", {"labels": None}, "needs labels"),
        ("vim", {"kind": "probs"}, "needs logits, got probabilities"),
        ("nnguide", {"kind": "probs"}, "needs logits, got probabilities"),
    ],
)
def test_what_is_missing_is_said(name, change, reason):
    rows = replace(clusters("fit"), **change)
    assert reason in make_score(name).why_not_fit(rows)
    with pytest.raises(DataError, match=reason):
        make_score(name).fit(rows)


@pytest.mark.parametrize("name", ["knn", "mahalanobis", "fdbd", "energy_react", "energy_scale"])
def test_probabilities_do_where_a_shift_of_the_logits_changes_nothing(name):
    fit, rows = clusters("fit", dtype=np.float64), clusters("new", 30, dtype=np.float64)

    def probabilities(part):
        total = np.array([[naive_lse(row)] for row in part.logits])
        return replace(part, logits=part.logits - total, kind="probs")

    plain, from_p = make_score(name).fit(fit), make_score(name).fit(probabilities(fit))
    assert np.allclose(plain.of(rows), from_p.of(probabilities(rows)), rtol=1e-9)


@pytest.mark.parametrize("name", ["energy_react", "energy_scale"])
def test_negative_features_are_refused(name):
    fit = clusters("fit", n=100)
    features = fit.features.copy()
    features[0, :3] = -0.1
    negative = replace(fit, features=features)
    assert "go negative (0.25 % of values)" in make_score(name).why_not_fit(negative)
    with pytest.raises(DataError, match="go negative"):
        make_score(name).fit(negative)


def test_scale_never_overflows():
    score = EnergyScale().fit(clusters("fit"))
    features = torch.tensor([[0.0] * 12, [1e-30] * 12, [-1.0] * 11 + [1e-6], [1e3] + [0.0] * 11])
    assert torch.isfinite(score(torch.zeros(4, 4), features)).all()


def test_react_samples_beyond_its_cap(monkeypatch):
    fit = clusters("many", n=4000)
    exact = float(EnergyReAct().fit(fit).clip)
    monkeypatch.setattr(activations, "_SAMPLED_VALUES", 1200 * 12)
    score = EnergyReAct().fit(fit)
    sampled = float(score.clip)
    assert len(score._sample.rows()[0]) == 1200
    assert sampled != exact
    # The share of values below the sampled clip: off by more than 4 standard errors never.
    share = (fit.features < sampled).mean()
    assert abs(share - 0.9) < 4 * math.sqrt(0.09 / 1200)
    halves = [EnergyReAct().partial_fit(fit.select(slice(a, a + 2000))) for a in (0, 2000)]
    assert float(halves[1].merge(halves[0]).finish().clip) == sampled
    assert float(EnergyReAct(seed=1).fit(fit).clip) != sampled


def test_vim_needs_a_residual_and_positive_logits():
    fit = clusters("fit")
    flat = fit.features.copy()
    flat[:, 6:] = 0
    with pytest.raises(DataError, match="nothing is left"):
        ViM().fit(replace(fit, features=flat, head=LinearHead(fit.head.weight)))
    with pytest.raises(DataError, match="mean maximum logit"):
        ViM().fit(replace(fit, logits=fit.logits - 1e4))
    with pytest.raises(InvalidInputError, match="width 12"):
        ViM(dimension=12).fit(fit)
    with pytest.raises(InvalidInputError, match="0 or more"):
        ViM(dimension=-1)
    assert ViM(dimension=2).fit(fit).settings()["fit"]["dimension"] == 2


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (EnergyReAct, {"percentile": 0}),
        (EnergyReAct, {"percentile": 100}),
        (EnergyScale, {"percentile": 100}),
        (EnergyScale, {"percentile": -1}),
        (KNN, {"k": 0}),
        (KNN, {"k": 10, "bank_size": 9}),
        (NNGuide, {"k": 0}),
        (Mahalanobis, {"shrinkage": "ledoit"}),
        (Mahalanobis, {"shrinkage": -1.0}),
        (Mahalanobis, {"shrinkage": math.nan}),
    ],
)
def test_impossible_settings_are_refused(kind, settings):
    with pytest.raises(InvalidInputError, match="needed"):
        kind(**settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_shapes_are_refused(variant):
    score = build(variant).fit(clusters("fit"))
    logits, features = tensors(clusters("new", 6))
    for wrong in (None, features[:, :5], features[:5], features.long(), features[0]):
        with pytest.raises(InvalidInputError, match="features"):
            score(logits, wrong)
    with pytest.raises(InvalidInputError, match="3 classes"):
        score(logits[:, :3], features)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_another_model_are_refused(variant):
    score = build(variant).partial_fit(clusters("fit"))
    for other in (clusters("x", width=13), clusters("x", classes=5)):
        with pytest.raises(DataError, match="one model"):
            score.partial_fit(other)
    if score.needs_head:
        fit = clusters("x")
        head = LinearHead(fit.head.weight * 2, fit.head.bias)
        with pytest.raises(DataError, match="one model"):
            score.partial_fit(replace(fit, head=head))
    with pytest.raises(InvalidInputError, match="same score"):
        score.merge(make_score("energy"))


def test_mahalanobis_is_right_with_fewer_rows_than_features():
    """A float64 oracle by Woodbury, no eigenvectors: sigma = (1-r) S + r m I of rank N plus I."""
    fit, rows = (clusters(key, n, width=300, spread=0.3) for key, n in (("a", 120), ("b", 60)))
    score = Mahalanobis(normalize=False).fit(fit)
    estimator = score.settings()["fit"]["estimators"]["within"]
    assert estimator["name"] == "ledoit_wolf"
    rho = estimator["rho"]
    features = fit.features.astype(np.float64)
    means = {c: features[fit.labels == c].mean(axis=0) for c in set(fit.labels.tolist())}
    centred = np.array([x - means[int(c)] for x, c in zip(features, fit.labels, strict=True)])
    floor = rho * (centred**2).sum() / len(fit) / 300
    scaled = centred * math.sqrt((1 - rho) / len(fit))
    inner = np.linalg.inv(floor * np.eye(len(fit)) + scaled @ scaled.T)
    truth = []
    for row in rows.features.astype(np.float64):
        gaps = [row - mean for mean in means.values()]
        truth.append(min((g @ g - (scaled @ g) @ inner @ (scaled @ g)) / floor for g in gaps))
    found = score.of(rows)
    assert np.allclose(found, truth, rtol=1e-8)
    assert (found >= 0).all()
    outside = replace(rows, features=rows.features[:, ::-1].copy())
    assert oracles.auroc(found.tolist(), score.of(outside).tolist()) > 0.99


def test_mahalanobis_is_never_negative_at_a_class_mean():
    fit = clusters("fit", n=400, width=6, dtype=np.float64)
    score = Mahalanobis(normalize=False).fit(fit)
    means = np.stack([fit.features[fit.labels == c].mean(axis=0) for c in range(4)])
    found = score(torch.zeros(4, 4), torch.from_numpy(means))
    assert (found >= 0).all()
    assert (found < 1e-12).all()


def test_moments_keep_their_digits_far_from_the_origin():
    rng = oracles.generator("far moments")
    rows = rng.normal(size=(500, 3))
    far = Moments.empty(1, 3)
    for part in np.array_split(rows + 1e8, 7):
        far.add(torch.from_numpy(part), torch.zeros(len(part), dtype=torch.int64))
    centred = rows - rows.mean(axis=0)
    assert np.allclose(far.scatter.numpy(), centred.T @ centred, rtol=1e-6)
    # The textbook sums lose all of it.
    wrong = (rows + 1e8).T @ (rows + 1e8) - 500 * np.outer(*[(rows + 1e8).mean(axis=0)] * 2)
    assert not np.allclose(wrong, centred.T @ centred, rtol=0.1)


@pytest.mark.parametrize("n", [10, 60, 1000])
def test_shrinkage_equals_scikit_learn(n):
    from sklearn.covariance import ledoit_wolf_shrinkage, oas

    rng = oracles.generator("shrinkage", n)
    rows = rng.normal(size=(n, 20)) @ rng.normal(size=(20, 20))
    rows -= rows.mean(axis=0)
    covariance = torch.from_numpy(rows.T @ rows / n)
    found = ledoit_wolf_rho(covariance, torch.from_numpy(rows).split(7), n)
    assert found == pytest.approx(ledoit_wolf_shrinkage(rows, assume_centered=True), rel=1e-9)
    _, theirs = oas(rows, assume_centered=True)
    # Theirs is Chen et al. with the terms 2/D dropped in another place: near, not equal.
    assert oas_rho(covariance, n) == pytest.approx(theirs, abs=0.02)


def test_fdbd_of_equal_weights_counts_no_boundary():
    fit = clusters("fit", dtype=np.float64)
    weight = fit.head.weight.copy()
    weight[1] = weight[0]
    head = LinearHead(weight, np.array([1.0, 0.0, 0.0, 0.0]))
    fit = replace(fit, head=head, logits=head.logits(fit.features))
    found = FDBD().fit(fit).of(fit)
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 100


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.integers(1, 30),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
@oracles.QUICK
def test_the_sample_is_balanced_bounded_and_free_of_order(names, limit, seed, random):
    classes = torch.tensor(names)
    values = torch.arange(len(names), dtype=torch.float32)[:, None]
    hashes = np.arange(len(names), dtype=np.uint64) * np.uint64(7919)
    whole = BalancedSample(limit, seed)
    whole.add(values, classes, hashes)
    order = list(range(len(names)))
    random.shuffle(order)
    cut = random.randrange(len(names) + 1)
    parts = []
    for rows in (order[:cut], order[cut:]):
        part = BalancedSample(limit, seed)
        for row in rows:
            part.add(values[[row]], classes[[row]], hashes[[row]])
        parts.append(part)
    parts[0].join(parts[1])
    kept, kept_classes = whole.rows()
    assert torch.equal(parts[0].rows()[0], kept)
    assert torch.equal(parts[0].rows()[1], kept_classes)
    assert len(kept) <= limit
    counts = {c: names.count(c) for c in set(names)}
    if len(counts) <= limit:
        quota = (
            max(
                q
                for q in range(1, len(names) + 1)
                if sum(min(n, q) for n in counts.values()) <= limit
            )
            if len(names) > limit
            else len(names)
        )
        for c, n in counts.items():
            assert int((kept_classes == c).sum()) == min(n, quota)


def test_the_sample_differs_with_the_seed_and_is_fair():
    hashes = oracles.generator("fair").integers(0, 2**63, size=20_000).astype(np.uint64)
    drawn = np.zeros(20_000)
    for seed in range(2):
        sample = BalancedSample(10_000, seed)
        values = torch.arange(20_000, dtype=torch.float32)[:, None]
        sample.add(values, torch.zeros(20_000, dtype=torch.int64), hashes)
        drawn[sample.rows()[0][:, 0].long().numpy()] += 1
    # Two independent halves share a quarter.
    assert abs((drawn == 2).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 20_000)


def test_the_bank_is_bounded_and_balanced():
    fit = clusters("fit", n=600)
    rare = np.flatnonzero(fit.labels == 0)[6:]
    fit = fit.select(np.setdiff1d(np.arange(600), rare))
    score = KNN(k=3, bank_size=100).fit(fit)
    assert score.bank.shape[0] <= 100
    assert score.settings()["fit"]["bank_rows"] == 6 + 3 * 31


class Mass(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(), nn.Flatten()
        )
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.net(x))


def test_approximate_mass_is_the_slope_of_the_energy():
    model = Mass().double().eval()
    classifier = EnergyClassifier(model)
    x = torch.from_numpy(oracles.generator("mass").normal(size=(3, 1, 4, 4)))
    found = approximate_mass(classifier, x)
    step = 1e-6
    for row in range(3):
        slope = 0.0
        for place in range(16):
            shift = torch.zeros(16, dtype=torch.float64)
            shift[place] = step
            shift = shift.view(1, 1, 4, 4)
            with torch.no_grad():
                rise = classifier.energy(x[row : row + 1] + shift)
                fall = classifier.energy(x[row : row + 1] - shift)
            slope += float((rise - fall) / (2 * step)) ** 2
        assert float(found[row]) == pytest.approx(math.sqrt(slope), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*train mode")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_approximate_mass_leaves_no_trace(training, context):
    model = Mass().train(training)
    model.fc.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 1, 4, 4)
    kept = x.clone()
    state = torch.random.get_rng_state()
    with context():
        found = approximate_mass(EnergyClassifier(model), x)
    assert found.shape == (4,)
    assert not found.requires_grad
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert x.grad is None
    assert not x.requires_grad
    assert all(part.training == training for part in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert not model.fc.weight.requires_grad
    assert all(p.grad is None for name, p in model.named_parameters() if name != "fc.weight")


def test_approximate_mass_refuses_what_has_no_slope():
    class Cut(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(UnsupportedModelError, match="no gradient"):
        approximate_mass(EnergyClassifier(Cut(2, 2).eval()), torch.ones(1, 2))
    with pytest.raises(InvalidInputError, match="floating"):
        approximate_mass(EnergyClassifier(nn.Linear(2, 2).eval()), torch.ones(1, 2).long())
    with pytest.raises(InvalidInputError, match="backward pass"):
        make_score("approximate_mass")


class Detector:
    requires_fit = True

    def fit_features(self, features, labels):
        self.mean = features[labels == 0].mean(dim=0)
        return self

    def predict_features(self, features):
        return (features - self.mean).norm(dim=1)


class LogitDetector:
    def predict_logits(self, logits):
        return -logits.amax(dim=1)


def test_a_foreign_detector_is_a_score():
    fit, rows = clusters("fit"), clusters("new", 20)
    score = as_score(Detector(), "centre")
    assert (score.name, score.needs_features, score.needs_fit) == ("centre", True, True)
    with pytest.raises(NotFittedError):
        score.of(rows)
    assert score.why_not_fit(replace(fit, labels=None)) == "needs labels"
    with pytest.raises(InvalidInputError, match="needs labels"):
        score.fit(replace(fit, labels=None))
    mean = fit.features[fit.labels == 0].mean(axis=0)
    truth = np.linalg.norm(rows.features - mean, axis=1)
    assert np.allclose(score.fit(fit).of(rows), truth, rtol=1e-5)
    assert not score.storable
    with pytest.raises(InvalidInputError, match="cannot be saved in an artefact"):
        score.state_dict()
    with pytest.raises(InvalidInputError, match="all rows at once"):
        score.partial_fit(fit)
    logit = as_score(LogitDetector())
    assert (logit.name, logit.needs_features, logit.needs_fit) == ("logitdetector", False, False)
    assert np.array_equal(logit.fit(fit).of(rows), make_score("maxlogit").of(rows))
    with pytest.raises(InvalidInputError, match="neither predict_features"):
        as_score(object())
    with pytest.raises(InvalidInputError, match="one number a row"):
        as_score(type("Bad", (), {"predict_logits": lambda _, x: x})()).of(rows)


def test_head_travels_with_the_predictions(tmp_path):
    rows = clusters("fit", n=20)
    again = Predictions.load(rows.save(tmp_path / "p"))
    assert np.array_equal(again.head.weight, rows.head.weight)
    assert np.array_equal(again.head.bias, rows.head.bias)
    assert again.select(slice(0, 3)).head is again.head
    bare = replace(rows, head=LinearHead(rows.head.weight))
    assert Predictions.load(bare.save(tmp_path / "q")).head.bias is None
    damaged = tmp_path / "p" / "head_weight.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"head_weight.npy was edited"):
        Predictions.load(tmp_path / "p")


def test_head_of_a_model_is_kept():
    from ebm_guard import predict

    for bias in (True, False):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=bias)).eval()
        x = torch.randn(30, 4)
        rows = predict(EnergyClassifier(model), [x[:10], x[10:]], features=True)
        assert np.array_equal(rows.head.weight, model[2].weight.detach().numpy())
        assert (rows.head.bias is not None) == bias
        assert np.allclose(rows.head.logits(rows.features), rows.logits, atol=1e-5)
        assert predict(EnergyClassifier(model), [x]).head is None
        half = predict(EnergyClassifier(model.half()), [x.half()], features=True)
        assert half.head.weight.dtype == np.float32


def test_head_of_a_file_is_verified(tmp_path):
    from ebm_guard.data import parse_spec
    from ebm_guard.predictions import stored_predictions

    rows = clusters("fit", n=50)
    columns = {"logits": rows.logits, "features": rows.features, "labels": rows.labels}
    good = {"head_weight": rows.head.weight, "head_bias": rows.head.bias}
    path = tmp_path / "rows.npz"
    np.savez(path, **columns, **good)
    read = stored_predictions(parse_spec(f"logits:{path}"))
    assert np.array_equal(read.head.weight, rows.head.weight)
    assert ViM().fit(read).of(read) == pytest.approx(ViM().fit(rows).of(rows))
    for wrong in (
        good | {"head_bias": rows.head.bias + 1},
        good | {"head_weight": rows.head.weight[:, ::-1]},
        {"head_weight": rows.head.weight},
    ):
        np.savez(path, **columns, **wrong)
        with pytest.raises(DataError, match="misses the logits"):
            stored_predictions(parse_spec(f"logits:{path}"))
    np.savez(path, **columns, **(good | {"head_weight": rows.head.weight[:3]}))
    with pytest.raises(DataError, match="needed a weight"):
        stored_predictions(parse_spec(f"logits:{path}"))
    np.savez(path, **columns, head_weight=rows.head.weight[:, :5], head_bias=rows.head.bias)
    with pytest.raises(DataError, match="got a head of weight"):
        stored_predictions(parse_spec(f"logits:{path}"))


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (np.zeros(3), None),
        (np.zeros((3, 2)), np.zeros(2)),
        (np.zeros((3, 2), dtype=np.float16), None),
        (np.zeros((3, 2), dtype=int), None),
        (np.full((3, 2), np.nan), None),
        (np.zeros((3, 2)), np.full(3, np.inf)),
    ],
)
def test_what_is_no_head_is_refused(weight, bias):
    with pytest.raises(DataError, match="head"):
        LinearHead(weight, bias)


@pytest.mark.parametrize(
    "features", [np.zeros(300), np.zeros((300, 0)), np.zeros((300, 2, 2)), np.zeros((300, 2), int)]
)
def test_what_are_no_features_is_refused(features):
    with pytest.raises(DataError, match="got features of shape"):
        Predictions(np.zeros((300, 2)), features=features)
