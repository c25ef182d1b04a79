"""Guards on any score: features, detectors, splits, and the choice on synthetic outliers."""

import json

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from toys import Pixels, inputs_of, linear, logits_with

import ebm_guard
from ebm_guard import EnergyClassifier, Guard, Predictions, predict
from ebm_guard.errors import (
    ArtifactError,
    DataError,
    EbmGuardError,
    EbmGuardWarning,
    InvalidInputError,
    NotFittedError,
    TooFewRowsError,
    UnsupportedModelError,
)
from ebm_guard.gate import INVALID, choose_score, synthetic_outliers
from ebm_guard.ood import as_score, combine, make_score
from ebm_guard.registry import methods

FITTED = [method.name for method in methods("feature_score")]


def net(seed=0, classes=3):
    """Features are what the last layer takes: 12 values >= 0."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def rows_of(model, n, seed, batch=50):
    """(inputs, labels), a fifth of them wrong."""
    x = inputs_of(n, seed=seed)
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3
    return list(zip(x.split(batch), labels.split(batch), strict=True))


def same(first, second):
    for name in ("status", "label", "confidence", "energy", "score", "p_value"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.reason == second.reason


@pytest.mark.parametrize("score", FITTED)
def test_a_feature_score_from_fit_to_file_and_back(score, tmp_path):
    model = net()
    train, held_out = rows_of(model, 400, seed=2), rows_of(model, 300, seed=3)
    guard = ebm_guard.wrap(model).fit(held_out, fit_data=train, score=score)
    assert guard.score.name == score
    assert guard.threshold.n == 300
    assert guard.facts["fit"]["n"] == 400
    assert guard.facts["rows"] == {"calibration": 300}
    x = torch.cat([inputs_of(40, seed=9), inputs_of(20, seed=10) * 9])
    found = guard(x)
    assert torch.equal(found.logits, model(x))
    # By hand: the same detector on the same rows, and its score of the same features.
    parts = [
        predict(EnergyClassifier(model), part, features=True) for part in (train, held_out, [x])
    ]
    detector = make_score(score).fit(parts[0])
    assert float(guard.threshold.cut) == np.sort(detector.of(parts[1]))[guard.threshold.rank - 1]
    assert np.allclose(found.score.numpy(), detector.of(parts[2]), rtol=1e-5)
    features = torch.from_numpy(np.array(parts[2].features))
    same(guard.decide(torch.from_numpy(np.array(parts[2].logits)), features), found)
    same(guard.decide_stored(parts[2]), found)
    path = guard.save(tmp_path / "guard.safetensors")
    again = Guard.load(path, model)
    same(again(x), found)
    assert again.summary().splitlines()[:-1] == guard.summary().splitlines()[:-1]
    assert "fitted on 400 rows" in guard.summary()
    same(Guard.load(path).decide_stored(parts[2]), found)
    # One row is enough for the first call, also where there is no canary.
    bare = ebm_guard.wrap(net()).fit(held_out, fit_data=train, score=score, canary=False)
    again = Guard.load(bare.save(tmp_path / "bare.safetensors"), net())
    assert again.classifier.head is None
    assert float(again(x[:1]).score) == pytest.approx(float(found.score[0]), rel=1e-5)


def test_a_logit_score_uses_all_rows_and_runs_without_features():
    model = net()
    guard = ebm_guard.wrap(model).fit(rows_of(model, 200, seed=2))
    assert guard.facts["rows"] == {"calibration": 200}
    assert guard.facts["features"] is None
    assert guard.classifier.head is None


def test_without_fit_data_each_half_has_one_part():
    model = net()
    rows = rows_of(model, 300, seed=2)
    guard = ebm_guard.wrap(model).fit(rows, score="knn")
    assert guard.facts["rows"] == {"calibration": 150, "fit": 150}
    assert guard.threshold.n == 150
    assert guard.score.settings()["fit"]["n"] == 150
    assert "150 for calibration, 150 for fit" in guard.summary()
    other = ebm_guard.wrap(model).fit(rows, score="knn", seed=1)
    assert not torch.equal(other.threshold.scores, guard.threshold.scores)


def test_a_fitted_score_is_taken_as_it_is():
    model = net()
    train = predict(EnergyClassifier(model), rows_of(model, 300, seed=2), features=True)
    held_out = rows_of(model, 200, seed=3)
    score = make_score("mahalanobis").fit(train)
    guard = ebm_guard.wrap(model).fit(held_out, score=score)
    assert guard.threshold.n == 200
    assert guard.score.settings()["fit"]["n"] == 300
    named = ebm_guard.wrap(model).fit(held_out, fit_data=train, score="mahalanobis")
    assert torch.equal(named.threshold.cut, guard.threshold.cut)


def test_settings_and_combinations(tmp_path):
    model = net()
    train, held_out = rows_of(model, 300, seed=2), rows_of(model, 200, seed=3)
    for score in (make_score("knn", k=3), combine("energy", "knn", "mahalanobis")):
        guard = ebm_guard.wrap(model).fit(held_out, fit_data=train, score=score)
        again = Guard.load(guard.save(tmp_path / "guard.safetensors"), model)
        assert again.score.settings() == score.settings()
        same(again(inputs_of(30, seed=9)), guard(inputs_of(30, seed=9)))


def test_a_foreign_detector_gates_and_cannot_be_saved(tmp_path):
    class Norm:
        def predict_features(self, features):
            return features.norm(dim=1)

    model = net()
    guard = ebm_guard.wrap(model).fit(rows_of(model, 200, seed=2), score=as_score(Norm(), "norm"))
    found = guard(inputs_of(30, seed=9))
    assert len(set(found.status.tolist())) == 2
    assert any("norm" in reason for reason in found.reason)
    with pytest.raises(InvalidInputError, match="cannot be saved"):
        guard.save(tmp_path / "guard.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- refusals


def test_rows_of_the_detector_are_refused_for_the_threshold():
    model = net()
    rows = rows_of(model, 300, seed=2)
    with pytest.raises(DataError, match="share 200 rows"):
        ebm_guard.wrap(model).fit(rows, fit_data=rows[:4], score="knn")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fit_data": logits_with(200)}, "nothing to fit; leave fit_data out"),
        ({"outliers": {"a": logits_with(50)}}, "not 'auto'"),
        ({"score": "knn"}, "knn cannot be fitted on 100 rows .*needs features.*energy, msp"),
        ({"score": "auto"}, "no images to make outliers from; give outliers="),
        ({"simultaneous": True}, "without per_class=True"),
        ({"per_class": True, "threshold": "marginal"}, "Use threshold='pac'"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(EbmGuardError, match=words):
        Guard().fit(logits_with(200, seed=3), **settings)


def test_too_few_rows_after_the_split_are_explained():
    model = net()
    with pytest.raises(TooFewRowsError, match=r"got 40 calibration rows.*at least 59") as caught:
        ebm_guard.wrap(model).fit(rows_of(model, 80, seed=2), score="mahalanobis")
    assert "The 80 rows were split: 40 for calibration, 40 for fit" in str(caught.value)
    assert "fit_data= spares" in str(caught.value)


def test_decide_says_what_is_missing():
    model = net()
    guard = ebm_guard.wrap(model).fit(rows_of(model, 300, seed=2), score="vim")
    logits = model(inputs_of(5)).detach()
    with pytest.raises(InvalidInputError, match=r"vim needs features \(B, D\).*guard\(x\)"):
        guard.decide(logits)
    good = torch.zeros(5, 12)
    for bad in (good[:4], good[:, :7], good[0], good.long(), [[0.0] * 12] * 5, good[None]):
        with pytest.raises(InvalidInputError, match=r"got .*; .*needed"):
            guard.decide(logits, bad)
    broken = good.clone()
    broken[2, 3] = float("nan")
    found = guard.decide(logits, broken)
    assert found.status[2] == INVALID
    assert (found.status[[0, 1, 3, 4]] != INVALID).all()
    with pytest.raises(DataError, match="needs features"):
        guard.decide_stored(logits_with(9, classes=3))


def test_a_model_without_a_head():
    model = linear()

    def function(x):
        return model(x)

    with pytest.raises(DataError, match="needs features, and a loader has none"):
        ebm_guard.wrap(function).fit([inputs_of(300)], score="knn")
    rows = rows_of(net(), 300, seed=2)
    guard = ebm_guard.wrap(net()).fit(rows, score="knn")
    guard.classifier = EnergyClassifier(net().forward)
    with pytest.raises(UnsupportedModelError, match="knn needs the features of the last linear"):
        guard(inputs_of(3))


def test_a_guard_of_stored_rows_needs_a_model_for_a_loader():
    with pytest.raises(NotFittedError, match="holds no model"):
        Guard().fit([inputs_of(100)])


# --- the choice on synthetic outliers


def image_rows(n=600, seed=0, size=8):
    """Images whose left half is bright or dark by class, with texture."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.2 + 0.3 * torch.rand(n, 3, size, size, generator=generator)
    labels = torch.arange(n) % 3
    pixels[labels == 1, :, :, : size // 2] += 0.4
    pixels[labels == 2, 1, : size // 2] += 0.4
    return pixels, labels


class Conv(nn.Module):
    """Two layers with pooled features, and a pretrained_cfg."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.fc = nn.Linear(64, 3)
        self.pretrained_cfg = Pixels().pretrained_cfg
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.eval()

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


@pytest.fixture(scope="module")
def images():
    model = Conv()
    guard = ebm_guard.wrap(model)
    pixels, labels = image_rows()
    x = guard.classifier.pixels(pixels)
    with torch.no_grad():
        labels = torch.where(torch.arange(len(x)) % 4 == 0, labels, model(x).argmax(1))
    return model, list(zip(x.split(100), labels.split(100), strict=True))


def test_auto_chooses_on_rows_of_its_own(images, tmp_path):
    model, rows = images
    guard = ebm_guard.wrap(model).fit(rows, score="auto", false_reject_rate=0.1)
    facts = guard.facts
    assert facts["rows"] == {"calibration": 200, "fit": 200, "choice": 200}
    auto = facts["auto"]
    names = [row["name"] for row in auto["candidates"]]
    means = [row["mean_auroc"] for row in auto["candidates"]]
    assert auto["chosen"] == names[0] == guard.score.name
    assert means == sorted(means, reverse=True)
    assert auto["margin"] == pytest.approx(means[0] - means[1])
    assert set(auto["outliers"]) == {
        "rotation", "paste", "pixel_shuffle", "gaussian_noise", "uniform_noise"
    }  # fmt: skip
    assert set(names) | set(auto["not_run"]) == {
        row.name for family in ("score", "feature_score") for row in methods(family)
    } - {"combine"}
    for row in auto["candidates"]:
        assert row["mean_auroc"] == pytest.approx(np.mean(list(row["aurocs"].values())))
    assert auto["sentence"] in guard.summary()
    assert f"{guard.score.name} was chosen" in auto["sentence"]
    json.dumps(facts, allow_nan=False)
    again = Guard.load(guard.save(tmp_path / "guard.safetensors"), model)
    same(again(rows[0][0]), guard(rows[0][0]))
    assert again.facts == facts


def test_auto_with_fit_data_and_a_certificate_has_four_parts(images):
    model, rows = images
    guard = ebm_guard.wrap(model).fit(rows[2:], fit_data=rows[:2], score="auto", risk=0.6)
    assert guard.facts["rows"] == {"calibration": 134, "certificate": 133, "choice": 133}
    assert guard.facts["fit"]["n"] == 200


def test_auto_on_stored_rows_takes_outliers(images):
    model, rows = images
    classifier = EnergyClassifier(model)
    stored = predict(classifier, rows, features=True)
    noise = torch.from_numpy(oracles.generator("noise").random((60, 3, 8, 8))).float()
    outliers = {"noise": predict(classifier, [classifier.pixels(noise)], features=True)}
    guard = Guard(classifier).fit(stored, score="auto", outliers=outliers)
    assert guard.facts["rows"] == {"calibration": 200, "fit": 200, "choice": 200}
    assert list(guard.facts["auto"]["outliers"]) == ["noise"]
    # Without features only the scores of the logits can be tried, and no rows are spent on a fit.
    bare = Predictions(stored.logits, labels=stored.labels)
    guard = Guard().fit(bare, score="auto", outliers={"a": Predictions(outliers["noise"].logits)})
    assert guard.facts["rows"] == {"calibration": 300, "choice": 300}
    assert len(guard.facts["auto"]["candidates"]) == 4
    assert "needs features" in guard.facts["auto"]["not_run"]["knn"]


def test_a_choice_made_before_keeps_its_rows_apart(images):
    model, rows = images
    classifier = EnergyClassifier(model)
    parts = [predict(classifier, part, features=True) for part in (rows[:2], rows[2:4], rows[4:])]
    outliers = synthetic_outliers(classifier, torch.cat([x for x, _ in rows[:2]]))
    choice = choose_score(parts[0], outliers, parts[1])
    guard = Guard(classifier).fit(parts[2], score=choice)
    assert guard.score.settings() == choice.score.settings()
    assert guard.facts["auto"] == choice.to_dict()
    assert guard.threshold.n == 200
    with pytest.raises(DataError, match="the rows on which the score was chosen"):
        Guard(classifier).fit(parts[0], score=choice)
    with pytest.raises(DataError, match="share 200 rows"):
        choose_score(parts[0], outliers, parts[0])
    with pytest.raises(InvalidInputError, match="no outliers to choose"):
        choose_score(parts[0], {})


def test_the_best_score_on_the_outliers_is_the_one_chosen():
    """Outliers that only one score can see."""
    rng = oracles.generator("choice")
    inside = rng.normal(0, 1, (300, 4)) + 10 * np.eye(4)[rng.integers(0, 4, 300)]
    # The same softmax, and so the same msp and gen, but a large energy and a small maximum.
    moved = inside[:150] - 8
    choice = choose_score(Predictions(inside), {"moved": Predictions(moved)})
    ours = {row.name: row.mean_auroc for row in choice.candidates}
    assert choice.score.name in ("energy", "maxlogit")
    assert ours["msp"] == pytest.approx(oracles.auroc(
        make_score("msp").of(Predictions(inside)), make_score("msp").of(Predictions(moved))
    ))  # fmt: skip
    assert ours["msp"] < 0.6 < 0.95 < ours["energy"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x * 9, "instead of [0, 1]"),
        (lambda x: x.flatten(1), "no normalised images"),
        (lambda x: x[:, :1], "no normalised images"),
    ],
)
def test_inputs_that_are_no_images(images, change, words):
    classifier = EnergyClassifier(images[0])
    with pytest.raises(InvalidInputError) as caught:
        synthetic_outliers(classifier, change(images[1][0][0]))
    assert words in str(caught.value)
    assert "outliers=" in str(caught.value)
    with pytest.raises(InvalidInputError, match="normalisation of this model is not known"):
        synthetic_outliers(EnergyClassifier(linear()), images[1][0][0])


def test_images_that_a_kind_leaves_alone_are_left_out(images):
    classifier = EnergyClassifier(images[0])
    x = images[1][0][0][:6].clone()
    x[2] = x[2].mean(dim=(1, 2), keepdim=True)
    found = synthetic_outliers(classifier, x, features=False)
    assert len(found["rotation"]) == len(found["pixel_shuffle"]) == 5
    assert len(found["uniform_noise"]) == 6
    assert found["rotation"].features is None


def test_outliers_depend_on_the_seed_alone(images):
    classifier = EnergyClassifier(images[0])
    x = images[1][0][0][:20]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = (synthetic_outliers(classifier, x, seed=5)["paste"] for _ in range(2))
    assert np.array_equal(first.logits, again.logits)
    assert torch.equal(torch.get_rng_state(), before)
    other = synthetic_outliers(classifier, x, seed=6)["paste"]
    assert not np.array_equal(first.logits, other.logits)


def test_an_unlabelled_guard_on_features():
    model = net()
    rows = [x for x, _ in rows_of(model, 300, seed=2)]
    with pytest.warns(EbmGuardWarning, match="no labels"):
        guard = ebm_guard.wrap(model).fit(rows, score="knn")
    assert guard.calibrator is None
    assert guard.threshold.n == 150


def test_a_model_of_other_features_is_refused(tmp_path):
    """The weights are hidden from the hash by a callable, so only the features can tell."""
    model = net()
    guard = ebm_guard.wrap(model).fit(rows_of(model, 300, seed=2), score="knn")
    path = guard.save(tmp_path / "guard.safetensors")
    with pytest.raises(ArtifactError, match="weights"):
        Guard.load(path, net(seed=1))
