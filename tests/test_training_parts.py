"""The parts of the loop, each by itself: average, schedule, scope, safeguard, images."""

import math

import numpy as np
import pytest
import torch
from finetune_cases import Normed, images_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ebm_guard import EnergyClassifier, Preprocessing
from ebm_guard.data import open_source
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.errors import DataError, InvalidInputError, UnsupportedModelError
from ebm_guard.training.augment import augmented, flip_crop
from ebm_guard.training.context import PixelNet
from ebm_guard.training.ema import WeightAverage
from ebm_guard.training.images import TrainingImages, as_training_images
from ebm_guard.training.options import FineTuneOptions, learning_rate_at
from ebm_guard.training.safeguard import Safeguard, harm, within_limits
from ebm_guard.training.scope import set_scope
from ebm_guard.training.selection import Evaluation, Look, make_panel


def rows(*numbers):
    return np.array(numbers, dtype=np.int64)


# The running mean of the weights


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_average_equals_the_weighted_mean_by_hand(decay):
    layer = nn.Linear(3, 2)
    average = WeightAverage(layer, decay)
    seen = []
    for step in range(7):
        with torch.no_grad():
            layer.weight.fill_(float(step) ** 2)
        average.update()
        seen.append(float(step) ** 2)
    shares = np.array([decay ** (6 - step) for step in range(7)])
    expected = float((shares * seen).sum() / shares.sum())
    assert average.mean()["weight"][0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_average_is_applied_and_taken_back_also_after_an_exception():
    layer = nn.Linear(2, 2)
    average = WeightAverage(layer, 0.9)
    average.update()
    with torch.no_grad():
        layer.weight.add_(1)
    now = layer.weight.detach().clone()

    def fail():
        with average.applied():
            assert torch.allclose(layer.weight, now - 1)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert torch.equal(layer.weight, now)


# The schedule


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0, 1))
def test_schedule_rises_once_and_falls_once(updates, warm_up):
    rates = [learning_rate_at(update, updates, 2.0, warm_up) for update in range(updates)]
    top = int(np.argmax(rates))
    assert all(0 <= rate <= 2 + 1e-12 for rate in rates)
    assert all(np.diff(rates[: top + 1]) >= -1e-12)
    assert all(np.diff(rates[top:]) <= 1e-12)
    assert max(rates) == pytest.approx(2.0)


def test_schedule_is_a_rise_and_half_a_cosine():
    assert [learning_rate_at(update, 10, 1.0, 0.2) for update in range(10)] == pytest.approx(
        [0.5, 1.0] + [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    )


# The scope


def scoped(model, scope, probe=None):
    classifier = EnergyClassifier(model)
    probe = images_of(8).all_pixels() if probe is None else probe
    return set_scope(PixelNet(classifier), classifier, scope, probe)


def test_scopes_of_a_plain_net():
    model = demo_classifier()
    assert scoped(demo_classifier(), "head") == ["fc.weight", "fc.bias"]
    assert scoped(demo_classifier(), "last_block") == [
        "conv3.weight",
        "conv3.bias",
        "fc.weight",
        "fc.bias",
    ]
    assert scoped(demo_classifier(), "regex:conv[12]") == [
        f"conv{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")
    ]
    assert len(scoped(model, "all")) == 8
    assert model.conv1.weight.requires_grad


def test_the_norm_behind_the_last_block_belongs_to_it():
    names = scoped(Normed().eval(), "last_block")
    assert {name.split(".")[0] for name in names} == {"body", "norm", "fc"}


def test_last_block_goes_by_use_and_looks_inside_a_single_child():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 3)
            self.features = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16)
            )
            self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}

        def forward(self, x):
            return self.head(self.features(x))

    names = scoped(Wrapped().eval(), "last_block")
    assert names == ["head.weight", "head.bias", "features.3.weight", "features.3.bias"]


def test_weights_that_no_gradient_reaches_stay_out():
    class Idle(Normed):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

    assert not any("unused" in name for name in scoped(Idle().eval(), "all"))


def test_a_pattern_that_matches_nothing_names_the_weights():
    with pytest.raises(InvalidInputError, match=r"matches none of 8 weights: conv1\.weight"):
        scoped(demo_classifier(), "regex:layer4")


def test_a_model_that_detaches_is_refused():
    class Detached(Normed):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(UnsupportedModelError, match="no gradient reaches"):
        scoped(Detached().eval(), "all")


# The safeguard


def calm(guard, updates=10):
    for _ in range(updates):
        assert guard.judge(1.0, 2.0, 3.0, 0.1) is None


def test_a_loss_or_gradient_that_is_not_finite_ends_the_attempt_at_once():
    assert Safeguard(1.0).judge(math.nan, 1.0, None, None) == "the loss is not finite"
    assert Safeguard(1.0).judge(1.0, math.inf, None, None) == "the gradient is not finite"
    assert Safeguard(1.0).judge(1.0, 1.0, math.nan, None) == "the energies are not finite"


@pytest.mark.parametrize(
    ("wild", "word"),
    [
        ((1.0, 2.0, -31.0, 0.1), "gap"),
        ((1.0, 201.0, 3.0, 0.1), "gradient norm"),
        ((1.0, 2.0, 3.0, 0.51), "edge"),
    ],
)
def test_three_wild_updates_in_a_row_end_it_and_two_do_not(wild, word):
    guard = Safeguard(1.0)
    calm(guard)
    for _ in range(2):
        assert guard.judge(*wild) is None
    assert guard.judge(1.0, 2.0, 3.0, 0.1) is None
    assert guard.judge(*wild) is None
    assert guard.judge(*wild) is None
    assert word in guard.judge(*wild)


def test_the_limits_themselves_are_no_runaway():
    guard = Safeguard(1.0)
    calm(guard)
    for _ in range(5):
        assert guard.judge(1.0, 200.0, 30.0, 0.5) is None


def test_images_with_empty_borders_may_have_negatives_like_them():
    guard = Safeguard(1.0)
    for _ in range(5):
        assert guard.judge(1.0, 1.0, 1.0, 0.85, 0.8) is None


def test_a_safeguard_goes_on_where_it_was():
    first, second = Safeguard(1.0), Safeguard(1.0)
    calm(first)
    for _ in range(2):
        first.judge(1.0, 2.0, 99.0, 0.1)
    second.load_state_dict(first.state_dict())
    assert "gap" in second.judge(1.0, 2.0, 99.0, 0.1)


def look_with(wrong, n=200):
    labels = np.arange(n) % 2
    logits = np.where(labels[:, None] == np.arange(2), 2.0, -2.0)
    logits[:wrong] *= -1
    return Look(logits, labels, np.zeros(n), {"a": np.ones(4)})


def test_harm_is_what_chance_cannot_explain():
    options = FineTuneOptions(max_acc_drop=0.01, max_nll_rise=0.5)
    start = look_with(20)
    assert harm(start, look_with(20), options) is None
    # Two points lost: not chosen, but the run may come back.
    assert harm(start, look_with(24), options) is None
    assert not within_limits(Evaluation.of(start), Evaluation.of(look_with(24)), options)
    assert "accuracy" in harm(start, look_with(60), options)


def test_a_rise_of_the_nll_is_harm():
    options = FineTuneOptions(max_acc_drop=0.9, max_nll_rise=0.01)
    assert "NLL" in harm(look_with(20), look_with(60), options)


# Images


def test_bytes_and_floats_on_the_grid_are_one_set():
    whole = images_of(5)
    floats = TrainingImages(whole.all_pixels(), whole.labels)
    assert np.array_equal(whole.hashes(), floats.hashes())
    assert torch.equal(whole.pixels(rows(3, 1)), floats.pixels(rows(3, 1)))
    assert whole.select(rows(4, 0)).labels.tolist() == whole.labels[[4, 0]].tolist()


def test_floats_off_the_grid_are_kept_exactly():
    pixels = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TrainingImages(pixels).all_pixels(), pixels)


def test_a_decoded_source_equals_the_arrays():
    source = open_source("demo:", "validation")
    lazy = TrainingImages.of_source(source, Preprocessing((0.3,), (0.4,)))
    known = TrainingImages.of_arrays(load_demo("calibration").images)
    assert not lazy.in_memory
    assert np.array_equal(lazy.hashes(rows(0, 7)), known.hashes(rows(0, 7)))
    chosen = lazy.select(rows(5, 2))
    assert torch.allclose(chosen.all_pixels(), known.pixels(rows(5, 2)), atol=1e-6)
    assert chosen.labels.tolist() == source.labels[[5, 2]].tolist()


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(3, 8, 8),
        torch.full((2, 1, 8, 8), 2.0),
        torch.zeros(2, 1, 8, 8, dtype=torch.int64),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64)),
        torch.zeros(2, 3, 8, 8),
        5,
    ],
)
def test_malformed_images_are_refused(given):
    with pytest.raises(InvalidInputError):
        as_training_images(given, EnergyClassifier(Normed()), "train")


def test_labels_out_of_range_are_refused():
    images = TrainingImages(torch.zeros(2, 1, 8, 8), torch.tensor([0, 9]))
    with pytest.raises(DataError, match="9"):
        images.require_labels(8, "train")


def test_denormalize_undoes_normalize_and_refuses_other_inputs():
    preprocessing = Preprocessing((0.3, 0.4, 0.5), (0.2, 0.3, 0.4))
    pixels = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(preprocessing.denormalize(preprocessing.normalize(pixels)), pixels)
    with pytest.raises(InvalidInputError, match="prepares images otherwise"):
        preprocessing.denormalize(pixels * 50)
    with pytest.raises(InvalidInputError, match="no normalised images"):
        preprocessing.denormalize(pixels[:, :1])


# Augmentation


def test_flip_crop_only_moves_and_mirrors():
    pixels = images_of(200, side=16).all_pixels()
    made = flip_crop(pixels, np.random.default_rng(0))
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), mode="reflect")
    mirrored = 0
    for image, source in zip(made, padded, strict=True):
        found = [
            flip
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(
                image,
                source[:, top : top + 16, left : left + 16].flip(2)
                if flip
                else source[:, top : top + 16, left : left + 16],
            )
        ]
        assert len(found) == 1
        mirrored += found[0]
    assert 60 < mirrored < 140


@pytest.mark.parametrize(
    "function", [lambda x, g: x * 3 + 1, lambda x, g: x[:, :, 1:], lambda x, g: None]
)
def test_an_augmentation_that_leaves_pixel_space_is_refused(function):
    with pytest.raises(InvalidInputError, match="augmentation returned"):
        augmented(function, images_of(2).all_pixels(), np.random.default_rng(0))


# Panels


def test_a_panel_makes_its_outliers_once_and_caps_them():
    panel = make_panel(images_of(40), {}, ("rotation",), outlier_rows=10, seed=0)
    again = make_panel(images_of(40), {}, ("rotation",), outlier_rows=10, seed=0)
    assert "rotation" not in panel.outside
    assert all(len(part) == 10 for part in panel.outside.values())
    assert all(torch.equal(panel.outside[name], again.outside[name]) for name in panel.outside)


def test_evaluation_equals_the_metrics_of_the_report():
    from sklearn.metrics import roc_auc_score

    from ebm_guard.calibration import row_statistics
    from ebm_guard.calibration.metrics import ece

    classifier = EnergyClassifier(demo_classifier())
    rows_ = load_demo("evaluation")
    images = TrainingImages.of_arrays(rows_.images, rows_.labels)
    panel = make_panel(images, {}, (), outlier_rows=50, seed=0)
    from ebm_guard.model.isolation import pixel_forward

    look = panel.look(pixel_forward(classifier))
    found = Evaluation.of(look)
    statistics = row_statistics(look.logits, look.labels, found.temperature)
    assert found.accuracy == statistics.correct.mean()
    assert found.ece == pytest.approx(ece(statistics).value)
    for name, part in look.outside.items():
        truth = [0] * len(look.energies) + [1] * len(part)
        expected = roc_auc_score(truth, np.concatenate([look.energies, part]))
        assert found.auroc[name] == pytest.approx(expected)


def test_an_attempt_that_ends_without_a_good_state_is_in_vain():
    # No state can be chosen: the NLL must not rise at all, and the labels are wrong on purpose.
    from finetune_cases import demo_sets, quick

    (images, labels), _ = demo_sets()
    result = quick(
        train=(images, (labels + 1) % 8),
        objective="cross_entropy",
        learning_rate=1e-4,
        max_nll_rise=0.01,
        max_acc_drop=0.9,
        max_ece_rise=1e-9,
        attempts=1,
        evaluate_every=6,
    )
    events = [line["text"] for line in result.history if line["kind"] == "event"]
    assert "no state kept accuracy, NLL and ECE within their limits" in events[0]
