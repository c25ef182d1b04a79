"""The guard in use: three lines, decisions, refusals."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from toys import Moody, Pixels, inputs_of, labelled, linear, logits_with, unlabelled

import ebm_guard
from ebm_guard import ACCEPT, INVALID, REJECT, EnergyClassifier, Guard, Preprocessing, predict
from ebm_guard.data.images import to_input
from ebm_guard.errors import (
    DataError,
    EbmGuardWarning,
    InvalidInputError,
    ModelOutputError,
    NotFittedError,
    UnsupportedModelError,
)
from ebm_guard.registry import methods

SCORES = [method.name for method in methods("score")]


def fitted(model=None, **settings):
    model = model or linear()
    return ebm_guard.wrap(model).fit(labelled(model), **settings)


def same(first, second):
    for name in ("status", "label", "confidence", "energy", "score", "p_value", "logits"):
        assert torch.equal(
            torch.nan_to_num(getattr(first, name)), torch.nan_to_num(getattr(second, name))
        ), name
    assert first.reason == second.reason


# --- three lines


def test_three_lines():
    model = linear()
    guard = ebm_guard.wrap(model)
    assert guard.fit(labelled(model)) is guard
    x = torch.cat([inputs_of(20), torch.zeros(3, 4)])
    decision = guard(x)
    assert torch.equal(decision.logits, model(x))
    assert torch.equal(decision.label, model(x).argmax(1))
    assert torch.equal(decision.energy, -model(x).logsumexp(1))
    assert torch.equal(decision.score, decision.energy.double())
    assert torch.equal(decision.accept, decision.score <= guard.threshold.cut)
    assert torch.equal(decision.accept, decision.status == ACCEPT)
    temperature = float(guard.calibrator.temperature)
    assert torch.allclose(decision.confidence, (model(x) / temperature).softmax(1).amax(1))
    assert guard.calibrator.status == "converged"
    for row, (status, reason) in enumerate(
        zip(decision.status.tolist(), decision.reason, strict=True)
    ):
        assert (reason == "") == (status == ACCEPT)
        if status == REJECT:
            assert "energy" in reason
            assert f"{float(guard.threshold.cut):.6g}" in reason
            assert f"{float(decision.score[row]):.6g}" in reason


def test_a_quiet_input_is_refused():
    guard = fitted()
    quiet = -float(guard.threshold.scores[-1]) - 5
    decision = guard.decide(torch.tensor([[quiet] * 3, [50.0, 0.0, 0.0]]))
    assert decision.status.tolist() == [REJECT, ACCEPT]


def test_fields_and_dtypes():
    decision = fitted()(inputs_of(5))
    assert len(decision) == 5
    assert decision.status.dtype == torch.int8
    assert decision.label.dtype == torch.int64
    assert decision.confidence.dtype == torch.float32
    assert decision.energy.dtype == torch.float32
    assert decision.score.dtype == decision.p_value.dtype == torch.float64
    assert decision.accept.dtype == torch.bool
    assert not decision.energy.requires_grad
    for name in ("status", "label", "confidence", "energy", "score", "p_value", "accept"):
        assert getattr(decision, name).shape == (5,)
    assert (decision.p_value > 0).all()
    assert (decision.p_value <= 1).all()


def test_rows_are_json_ready():
    import json

    guard = fitted()
    logits = guard.classifier(inputs_of(4)).detach()
    logits[1, 0] = float("nan")
    logits[2, 1] = float("inf")
    rows = guard.decide(logits).rows(ids=list("abcd"))
    assert [row["id"] for row in rows] == list("abcd")
    assert [row["status"] for row in rows][1:3] == ["INVALID", "INVALID"]
    assert rows[1]["energy"] is None
    assert rows[2]["score"] is None
    assert "NaN" not in json.dumps(rows, allow_nan=False)


def test_p_value_counts_calibration_scores():
    guard = fitted()
    scores = guard.threshold.scores
    decision = guard.decide(torch.tensor([[0.0, 0.0, 0.0], [9.0, 1.0, 0.0]]))
    for score, p in zip(decision.score, decision.p_value, strict=True):
        expected = (1 + int((scores >= score).sum())) / (len(scores) + 1)
        assert float(p) == pytest.approx(expected, abs=1e-12)


# --- what fit takes


def test_all_ways_to_give_labelled_rows_agree():
    model = linear()
    pairs = labelled(model)
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    ways = {
        "pairs": pairs,
        "lists": [[a, b] for a, b in pairs],
        "generator": ((a, b) for a, b in pairs),
        "mappings": [{"pixel_values": a, "labels": b} for a, b in pairs],
        "other keys": [{"inputs": a, "label": b} for a, b in pairs],
        "DataLoader": torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=50
        ),
        "predictions": predict(EnergyClassifier(model), pairs),
    }
    cuts, temperatures = [], []
    for data in ways.values():
        guard = ebm_guard.wrap(model).fit(data)
        assert guard.threshold.n == 200
        cuts.append(float(guard.threshold.cut))
        temperatures.append(float(guard.calibrator.temperature))
    # Batches of another size may round otherwise.
    assert cuts == pytest.approx([cuts[0]] * len(ways), rel=1e-5)
    assert temperatures == pytest.approx([temperatures[0]] * len(ways), rel=1e-5)


def test_all_ways_to_give_unlabelled_rows_agree():
    model = linear()
    rows = unlabelled(model)
    ways = [rows, torch.cat(rows), [(x,) for x in rows], [{"inputs": x} for x in rows]]
    for data in ways:
        guard = ebm_guard.wrap(model)
        with pytest.warns(EbmGuardWarning, match=r"no labels.*no temperature.*gate itself needs"):
            guard.fit(data)
        assert guard.calibrator is None
        assert float(guard.threshold.cut) == pytest.approx(float(fitted(model).threshold.cut))
        x = inputs_of(6)
        assert torch.allclose(guard(x).confidence, model(x).softmax(1).amax(1))


def test_refit_forgets_the_first_fit():
    model = linear()
    guard = ebm_guard.wrap(model).fit(labelled(model), score="msp")
    with pytest.warns(EbmGuardWarning, match="no labels"):
        guard.fit(unlabelled(model, n=300))
    assert guard.calibrator is None
    assert guard.score.name == "energy"
    assert guard.threshold.n == 300
    assert "calibrator.temperature" not in guard.state_dict()


def test_failed_refit_leaves_the_guard_as_it_was():
    guard = fitted()
    before = guard(inputs_of(9))
    with pytest.raises(InvalidInputError, match="needs at least"):
        guard.fit(labelled(guard.classifier.model, n=20), score="msp")
    same(guard(inputs_of(9)), before)


@pytest.mark.parametrize(
    "bad",
    [["text"], [(inputs_of(3), "text", 1)], [{"image": inputs_of(3)}], [np.zeros((3, 4))], [3]],
    ids=["text", "triple", "keys", "numpy", "number"],
)
def test_other_batches_are_refused(bad):
    with pytest.raises(DataError, match=r"got a batch of type .*needed a tensor.*pair.*mapping"):
        ebm_guard.wrap(linear()).fit(bad)


@pytest.mark.parametrize(
    "labels", [torch.zeros(3), torch.zeros(2, dtype=torch.long), torch.zeros(3, 2).long()]
)
def test_labels_of_the_wrong_form_are_refused(labels):
    with pytest.raises(DataError, match=r"got labels of shape.*needed one integer class per input"):
        ebm_guard.wrap(linear()).fit([(inputs_of(3), labels)])


@pytest.mark.parametrize("label", [3, -1])
def test_label_out_of_range(label):
    model = linear()
    pairs = labelled(model)
    pairs[2][1][5] = label
    with pytest.raises(DataError) as caught:
        ebm_guard.wrap(model).fit(pairs)
    message = str(caught.value)
    assert "1 of 200 labels" in message
    assert f"row 69 has {label}" in message
    assert "the model has 3 classes" in message
    assert "classes=" in message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("n", "settings", "needed"),
    [
        (58, {}, 59),
        (18, {"threshold": "marginal"}, 19),
        (298, {"false_reject_rate": 0.01}, 299),
        (89, {"assurance": 0.99}, 90),
    ],
)
def test_too_few_rows_names_the_number_needed(n, settings, needed):
    model = linear()
    with pytest.raises(InvalidInputError) as caught:
        ebm_guard.wrap(model).fit(labelled(model, n=n), **settings)
    message = str(caught.value)
    assert f"got {n} calibration rows" in message
    assert f"needs at least {needed}" in message
    assert "false_reject_rate" in message
    assert caught.value.exit_code == 2
    guard = ebm_guard.wrap(model).fit(labelled(model, n=needed), **settings)
    assert guard.threshold.n == needed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"score": "enrgy"}, ["'enrgy'", "did you mean 'energy'"]),
        ({"threshold": "pca"}, ["'pca'", "did you mean 'pac'"]),
        ({"false_reject_rate": 0.0}, ["false_reject_rate", "(0, 1)"]),
        ({"assurance": 1.0}, ["assurance", "(0, 1)"]),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(InvalidInputError) as caught:
        fitted(**settings)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_fit_refuses_a_broken_row_and_names_it(value):
    model = linear()
    pairs = labelled(model)
    pairs[1][0][7, 2] = value
    with pytest.raises(ModelOutputError) as caught:
        ebm_guard.wrap(model).fit(pairs)
    message = str(caught.value)
    assert "1 of 200 rows" in message
    assert "first: 39" in message
    assert "overflow in half precision" in message
    assert caught.value.exit_code == 4


def test_fit_refuses_probabilities():
    model = torch.nn.Sequential(linear(), torch.nn.Softmax(1)).eval()
    guard = ebm_guard.wrap(model)
    with pytest.raises(UnsupportedModelError, match=r"probabilities.*remove the final Softmax"):
        guard.fit([inputs_of(100)])
    assert guard.threshold is None


# --- validity


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_one_bad_logit_refuses_its_row_and_no_other(score, value, column):
    guard = fitted(score=score)
    logits = guard.classifier(inputs_of(6)).detach()
    clean = guard.decide(logits)
    broken = logits.clone()
    broken[3, column] = value
    decision = guard.decide(broken)
    assert decision.status[3] == INVALID
    assert decision.label[3] == -1
    assert decision.confidence[3] == 0
    assert decision.p_value[3] == 0
    assert not decision.accept[3]
    assert decision.reason[3] == "non-finite logits, features or score"
    others = [0, 1, 2, 4, 5]
    assert torch.equal(decision.status[others], clean.status[others])
    assert torch.equal(decision.score[others], clean.score[others])
    assert torch.equal(decision.confidence[others], clean.confidence[others])


@pytest.mark.parametrize("score", SCORES)
def test_huge_logits_never_give_a_wrong_accept(score):
    guard = fitted(score=score)
    big = torch.finfo(torch.float32).max
    decision = guard.decide(torch.tensor([[big, -big, 0.0], [big, big, big]]))
    finite = torch.isfinite(decision.score)
    assert (decision.status[~finite] == INVALID).all()
    assert not torch.isnan(decision.confidence).any()


def test_features_count_for_validity():
    guard = fitted()
    logits = guard.classifier(inputs_of(3)).detach()
    features = torch.ones(3, 2)
    features[1, 0] = float("nan")
    assert guard.decide(logits, features).status[1] == INVALID
    assert guard.decide(logits).status[1] != INVALID


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(2, 5), torch.zeros(3), torch.zeros(2, 3, dtype=torch.long), [[0.0, 1.0, 2.0]]],
)
def test_decide_refuses_what_is_no_batch_of_its_logits(logits):
    with pytest.raises(InvalidInputError, match=r"got .*(classes|logits must be)"):
        fitted().decide(logits)


def test_an_exception_of_the_model_passes_through():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fitted()(torch.zeros(2, 9))


# --- pixels and images


def pixel_guard():
    model = Pixels()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(200, 3, 8, 8, generator=generator)
    guard = ebm_guard.wrap(model)
    x = guard.classifier.pixels(pixels)
    return guard.fit([(x, model(x).argmax(1).roll(1) % 3)]), pixels[:10]


@pytest.fixture(scope="module")
def seeing():
    import warnings

    with warnings.catch_warnings():
        # Random labels: that no temperature fits them is beside the point.
        warnings.simplefilter("ignore", EbmGuardWarning)
        return pixel_guard()


def test_pixels_fold_the_normalisation_in(seeing):
    guard, pixels = seeing
    cfg = guard.classifier.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    same(guard.pixels(pixels), guard((pixels - mean) / std))


@pytest.mark.parametrize(
    ("change", "guess"),
    [
        (lambda p: (p - 0.45) / 0.225, "normalised already"),
        (lambda p: p * 255, "divide by 255"),
        (lambda p: p * 1.02, "clamp"),
        (lambda p: (p * 255).to(torch.uint8), "divide uint8 images by 255"),
        (lambda p: p[0], "(B, 3, H, W)"),
        (lambda p: p[:, :1], "takes 3"),
        (lambda p: p.numpy(), "ndarray"),
    ],
    ids=["normalised", "0..255", "overshoot", "uint8", "one image", "grey", "numpy"],
)
def test_pixels_refuses_what_is_no_pixel(seeing, change, guess):
    guard, pixels = seeing
    with pytest.raises(InvalidInputError) as caught:
        guard.pixels(change(pixels))
    assert str(caught.value).startswith("got ")
    assert guess in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_refuses_what_is_not_finite(seeing, value):
    guard, pixels = seeing
    pixels = pixels.clone()
    pixels[0, 0, 0, 0] = value
    with pytest.raises(InvalidInputError, match=r"got pixels .*(NaN|infinite).*needed \[0, 1\]"):
        guard.pixels(pixels)


def test_predict_equals_the_steps_by_hand(seeing, tmp_path):
    guard, _ = seeing
    generator = np.random.default_rng(0)
    images = [
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8))
        for size in ((8, 8, 3), (20, 31, 3), (31, 20), (16, 8, 4))
    ]
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    preprocessing = guard.classifier.preprocessing
    rows = [torch.from_numpy(to_input(image, preprocessing)) for image in images]
    expected = guard(torch.stack(rows))
    same(guard.predict(paths), expected)
    same(guard.predict([str(path) for path in paths], batch_size=2), expected)
    same(guard.predict(images), expected)
    assert guard.predict(paths[1]).score.tolist() == expected.score[1:2].tolist()

    # By hand: short side to 8, bilinear, centre crop, the alpha channel dropped.
    wide = images[1].resize((12, 8), Image.Resampling.BILINEAR).crop((2, 0, 10, 8))
    pixels = torch.from_numpy(np.asarray(wide, dtype=np.float32) / 255).permute(2, 0, 1)
    assert torch.allclose(guard.pixels(pixels[None]).score, expected.score[1:2])


def test_predict_turns_photographs_as_their_exif_says(seeing, tmp_path):
    guard, _ = seeing
    generator = np.random.default_rng(1)
    image = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "a.png", exif=exif)
    expected = guard.predict(image.rotate(180))
    same(guard.predict(tmp_path / "a.png"), expected)
    with Image.open(tmp_path / "a.png") as opened:
        same(guard.predict(opened), expected)
    # 16-bit grey is scaled as everywhere else, not clipped to white.
    deep = Image.fromarray(np.full((8, 8), 257 * 40, dtype=np.uint16))
    same(guard.predict(deep), guard.predict(Image.new("L", (8, 8), 40)))


def test_predict_names_the_image_that_it_cannot_read(seeing, tmp_path):
    guard, _ = seeing
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n no image")
    for path in (bad, tmp_path / "none.png", tmp_path):
        with pytest.raises(DataError, match=r"cannot read image .*" + path.name):
            guard.predict([path])


def test_predict_needs_images_and_preprocessing(seeing):
    with pytest.raises(InvalidInputError, match=r"got no images; needed at least one"):
        seeing[0].predict([])
    with pytest.raises(InvalidInputError, match=r"prepare images.*mean=, std=.*guard\(x\)"):
        fitted().predict(["a.png"])
    with pytest.raises(InvalidInputError, match=r"no pretrained_cfg.*mean=.*std="):
        fitted().pixels(torch.zeros(1, 3, 8, 8))


def test_wrap_settings():
    model = linear(3)
    with pytest.raises(InvalidInputError, match="only one of mean and std"):
        ebm_guard.wrap(model, mean=(0.5,))
    for bad in (
        {"mean": (0.5,) * 3, "std": (0.5,) * 2},
        {"mean": (0.5,) * 3, "std": (0.0,) * 3},
        {"mean": (0.5,) * 2, "std": (0.5,) * 2},
    ):
        with pytest.raises(InvalidInputError, match="got "):
            ebm_guard.wrap(model, **bad)
    guard = ebm_guard.wrap(Pixels(), mean=(0, 0, 0), std=(1, 1, 1), image_size=(4, 4))
    assert guard.classifier.preprocessing == Preprocessing(
        (0.0,) * 3, (1.0,) * 3, image_size=(4, 4)
    )


# --- not fitted


@pytest.mark.parametrize(
    "use",
    [
        lambda guard, path: guard(inputs_of(2)),
        lambda guard, path: guard.decide(torch.zeros(2, 3)),
        lambda guard, path: guard.pixels(torch.zeros(1, 3, 8, 8)),
        lambda guard, path: guard.predict([path]),
        lambda guard, path: guard.save(path / "guard.safetensors"),
        lambda guard, path: guard.state(),
    ],
)
def test_not_fitted(use, tmp_path):
    guard = ebm_guard.wrap(linear())
    with pytest.raises(NotFittedError, match=r"not fitted.*guard\.fit\(validation_loader\)"):
        use(guard, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "not fitted" in guard.summary()


def test_a_guard_of_logits_alone():
    guard = Guard().fit(logits_with(300))
    logits = torch.tensor([[-99.0] * 4, [99.0] * 4])
    assert guard.decide(logits).status.tolist() == [REJECT, ACCEPT]
    for use in (lambda: guard(inputs_of(2)), lambda: guard.predict(["a.png"])):
        with pytest.raises(NotFittedError, match=r"holds no model.*Guard\.load.*guard\.decide"):
            use()
    assert "stored logits" in guard.summary()


def test_summary_says_the_promise():
    text = fitted().summary()
    assert "at least 0.95" in text
    assert "200" in text
    assert "Linear" in text


# --- a module that leaves the model alone


def test_state_holds_nothing_of_the_model():
    guard = fitted(Moody().eval())
    assert set(guard.state_dict()) == {
        "threshold.scores",
        "threshold.cut",
        "calibrator.temperature",
    }
    assert list(guard.parameters()) == []


def test_half_keeps_the_threshold_and_the_model():
    model = linear()
    guard = fitted(model)
    before = guard(inputs_of(9))
    cut = guard.threshold.cut.clone()
    guard.half()
    assert guard.threshold.cut.dtype == torch.float64
    assert torch.equal(guard.threshold.cut, cut)
    assert guard.calibrator.temperature.dtype == torch.float64
    assert model.weight.dtype == torch.float32
    same(guard(inputs_of(9)), before)
    guard.train()
    assert not model.training


@pytest.mark.parametrize("score", SCORES)
def test_batch_size_does_not_matter(score):
    model = linear(dtype=torch.float64)
    guard = ebm_guard.wrap(model).fit(labelled(model), score=score, false_reject_rate=0.3)
    x = inputs_of(128, seed=7, dtype=torch.float64)
    whole = guard(x)
    assert len(set(whole.status.tolist())) == 2
    for size in (1, 32):
        parts = [guard(part) for part in x.split(size)]
        assert torch.equal(torch.cat([part.status for part in parts]), whole.status)
        assert torch.equal(torch.cat([part.label for part in parts]), whole.label)


def test_eight_threads_through_one_guard():
    model = Moody().eval()
    guard = fitted(model)
    expected = [guard(inputs_of(16, seed=i)) for i in range(8)]
    errors = []
    start = threading.Barrier(8)

    def work(index):
        try:
            start.wait(30)
            for _ in range(20):
                same(guard(inputs_of(16, seed=index)), expected[index])
        except BaseException as error:  # noqa: BLE001 - it is raised again below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_three_lines_work_in_train_mode():
    evaluated = fitted(Moody().eval())
    training = Moody().train()
    guard = ebm_guard.wrap(training).fit(labelled(Moody().eval()))
    same(guard(inputs_of(9)), evaluated(inputs_of(9)))
    assert all(part.training for part in training.modules())


def test_no_gradient_is_kept():
    model = linear()
    decision = fitted(model)(inputs_of(4).requires_grad_())
    assert not decision.logits.requires_grad
    assert model.weight.grad is None
