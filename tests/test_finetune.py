"""Fine-tuning from end to end: the user's model, the winner, its guard, and the story."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from finetune_cases import Normed, demo_sets, images_for, images_of, quick, same, weights_of
from torch import nn

from ebm_guard import EnergyClassifier, Guard, wrap
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.errors import DataError, InvalidInputError, UnsupportedModelError
from ebm_guard.model.loading import load_weights
from ebm_guard.training import LossTerms, finetune, split_validation
from ebm_guard.training.images import TrainingImages


@pytest.fixture(scope="module")
def accepted():
    return quick(updates=24, evaluate_every=8)


def test_margin_raises_the_auroc_and_is_accepted(accepted):
    assert accepted.status == "accepted"
    assert accepted.accepted
    first, *rest = [line for line in accepted.history if line["kind"] == "evaluation"]
    assert max(line["mean_auroc"] for line in rest) > first["mean_auroc"]
    assert accepted.model is accepted.candidate
    assert accepted.story[-1] == accepted.reason
    assert not accepted.model.training


def test_history_has_the_promised_lines(accepted):
    updates = [line for line in accepted.history if line["kind"] == "update"]
    assert [line["update"] for line in updates] == list(range(24))
    assert {"loss", "parts", "gradient_norm", "gap", "energy_data", "energy_negatives"} <= set(
        updates[0]
    )
    assert updates[0]["loss"] == pytest.approx(sum(updates[0]["parts"].values()), rel=1e-5)
    evaluations = [line for line in accepted.history if line["kind"] == "evaluation"]
    assert [line["update"] for line in evaluations] == [0, 8, 16, 24]
    assert set(evaluations[0]["auroc"]) == {
        "rotation",
        "paste",
        "pixel_shuffle",
        "gaussian_noise",
        "uniform_noise",
    }


def test_the_result_is_saved_and_loads_into_the_users_model(accepted, tmp_path):
    accepted.save(tmp_path)
    model = demo_classifier()
    load_weights(model, tmp_path / "weights.safetensors")
    assert same(weights_of(model), weights_of(accepted.model))
    guard = Guard.load(tmp_path / "guard.safetensors", model)
    assert guard.threshold.n == len(accepted.parts.refit)
    facts = json.loads((tmp_path / "finetune.json").read_text())
    assert facts["status"] == "accepted"
    assert facts["settings"]["objective"]["m_in"] is not None
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert len(lines) == len(accepted.history)


def test_parts_of_the_validation_rows_are_disjoint_and_stratified(accepted):
    rows = accepted.parts.rows
    joined = np.concatenate(list(rows.values()))
    assert len(set(joined.tolist())) == len(joined) == 450
    assert {name: len(part) for name, part in rows.items()} == pytest.approx(
        {"selection": 112, "acceptance": 226, "refit": 112}, abs=2
    )
    counts = np.bincount(accepted.parts.acceptance.labels.numpy())
    assert np.ptp(counts) <= 8


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("objective", ["margin", "jem"])
def test_the_users_model_is_never_changed(objective, train_mode):
    model = Normed().train(train_mode)
    model.fc.bias.requires_grad_(False)
    before, state = weights_of(model), torch.get_rng_state()
    with warnings.catch_warnings():
        # A model in train mode is told of; that is not what is tested.
        warnings.simplefilter("ignore")
        result = quick(
            model, images_of(64), images_of(320, seed=1), objective=objective, learning_rate=1e-3
        )
    assert result.start is model
    assert same(before, weights_of(model))
    assert all(part.training == train_mode for part in model.modules())
    assert all(part.grad is None for part in model.parameters())
    flags = [name for name, part in model.named_parameters() if not part.requires_grad]
    assert flags == ["fc.bias"]
    assert torch.equal(state, torch.get_rng_state())


def test_batch_norm_statistics_stay_and_affine_weights_move():
    model = Normed().eval()
    result = quick(
        model,
        images_for(model, 64),
        images_for(model, 320, seed=1),
        learning_rate=1e-3,
        max_acc_drop=0.9,
        max_nll_rise=9.0,
        max_ece_rise=1.0,
    )
    before, after = weights_of(Normed()), weights_of(result.candidate)
    assert torch.equal(before["norm.running_mean"], after["norm.running_mean"])
    assert torch.equal(before["norm.running_var"], after["norm.running_var"])
    assert not torch.equal(before["norm.weight"], after["norm.weight"])
    assert all(part.requires_grad for part in result.candidate.parameters())


def test_a_destructive_run_ends_with_the_start_returned_and_a_story():
    model = demo_classifier()
    result = quick(
        model,
        objective="jem",
        objective_settings={"weight_x": 1.0, "alpha": 0.0, "clip": None, "warm_up": 0.0},
        learning_rate=1.0,
        updates=12,
        batch_size=32,
    )
    assert result.status == "start returned"
    assert result.model is model
    assert result.candidate is None
    assert result.acceptance is None
    events = [line["text"] for line in result.history if line["kind"] == "event"]
    assert sum("learning rate halved" in text for text in events) == 3
    assert any("stopped after 4 attempts" in text for text in events)
    assert "every attempt ended badly" in result.reason
    assert result.guard.threshold is not None


def test_an_attempt_without_a_good_state_is_made_again_at_half_the_rate():
    def unlearn(context, batch):
        return -nn.functional.cross_entropy(context.logits(batch.pixels), batch.labels)

    result = quick(
        max_nll_rise=1e-9, attempts=1, objective=unlearn, learning_rate=3e-2, evaluate_every=6
    )
    updates = [line for line in result.history if line["kind"] == "update"]
    assert [line["update"] for line in updates] == [*range(6), *range(6)]
    first, second = (
        [line["learning_rate"] for line in part] for part in (updates[:6], updates[6:])
    )
    assert second == pytest.approx([rate / 2 for rate in first])
    assert updates[0]["loss"] != updates[6]["loss"]
    assert "every attempt ended badly" in result.reason
    assert result.status == "start returned"


def test_a_fitted_guard_comes_back_as_it_was_where_the_start_is_returned():
    guard = wrap(demo_classifier())
    _, validation = demo_sets()
    images = TrainingImages.of_arrays(*validation)
    guard.fit([(guard.classifier.pixels(images.all_pixels()), images.labels)])
    result = quick(guard, max_nll_rise=1e-9)
    assert result.status == "start returned"
    assert result.guard is guard


def test_the_new_guard_has_the_settings_of_the_old_one():
    guard = wrap(demo_classifier())
    rows = load_demo("evaluation")
    inputs = guard.classifier.pixels(TrainingImages.of_arrays(rows.images).all_pixels())
    labels = torch.from_numpy(rows.labels)
    guard.fit([(inputs, labels)], score="mahalanobis", false_reject_rate=0.1, assurance=0.9)
    result = quick(guard, updates=24, evaluate_every=8)
    assert result.status == "accepted"
    new = result.guard
    assert new is not guard
    assert new.classifier.model is result.model
    assert (new.score.name, new.threshold.false_reject_rate) == ("mahalanobis", 0.1)
    assert new.threshold.assurance == 0.9
    assert new.threshold.n == len(result.parts.refit)
    assert new.facts["fit"]["n"] == len(demo_sets()[0][0])


def test_a_loader_of_normalised_inputs_equals_pixels():
    classifier = EnergyClassifier(demo_classifier())

    def loader(pair):
        images = TrainingImages.of_arrays(*pair)
        inputs = classifier.pixels(images.all_pixels())
        return list(zip(inputs.split(50), images.labels.split(50), strict=True))

    train, validation = demo_sets()
    plain = quick(seed=5)
    loaded = quick(classifier, loader(train), loader(validation), seed=5)
    assert same(weights_of(plain.candidate), weights_of(loaded.candidate))


def test_a_users_function_is_an_objective_and_sees_both_streams():
    seen = []

    def objective(context, batch):
        seen.append((batch.pixels, batch.augmented))
        logits = context.logits(batch.augmented)
        return LossTerms(nn.functional.cross_entropy(logits, batch.labels))

    quick(objective=objective, augment="flip_crop", updates=2)
    pixels, augmented = seen[0]
    assert pixels.shape == augmented.shape
    assert not torch.equal(pixels, augmented)


def test_given_outliers_join_or_replace_the_synthetic_ones():
    outliers = load_demo("far_ood").images
    joined = quick(outliers=outliers, updates=2).settings["objective"]["negatives"]
    alone = quick(outliers=outliers, outlier_share=1.0, updates=2).settings["objective"]
    third = quick(outliers=outliers, outlier_share=0.25, updates=2).settings["objective"]
    assert [part["share"] for part in joined["parts"]] == [0.5, 0.5]
    assert alone["negatives"]["negatives"] == "outliers"
    assert third["negatives"]["parts"][0]["share"] == 0.25


def test_the_users_ood_validation_is_halved_between_choice_and_acceptance():
    result = quick(ood_validation={"photos": load_demo("far_ood").images})
    evaluation = next(line for line in result.history if line["kind"] == "evaluation")
    assert "photos" in evaluation["auroc"]
    assert result.acceptance.auroc["photos"]["role"] == "given"
    assert result.acceptance.auroc["rotation"]["role"] == "guard"


def test_kinds_that_are_trained_on_choose_nothing():
    from ebm_guard.training.negatives import Synthetic
    from ebm_guard.training.objectives import make_objective

    objective = make_objective("margin", negatives=Synthetic(kinds=("rotation", "blend")))
    result = quick(objective=objective, updates=2)
    evaluation = next(line for line in result.history if line["kind"] == "evaluation")
    assert "rotation" not in evaluation["auroc"]
    assert "paste" in evaluation["auroc"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (weights_of(quick(seed=seed).candidate) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_a_model_without_normalisation_is_refused():
    with pytest.raises(InvalidInputError, match="normalisation is not known"):
        finetune(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), *demo_sets())


def test_a_loader_that_does_not_lead_back_to_pixels_is_refused():
    batch = torch.randn(32, 1, 8, 8) * 20
    with pytest.raises(InvalidInputError, match=r"undoing the normalisation.*\(pixels, labels\)"):
        quick(train=[(batch, torch.zeros(32, dtype=torch.int64))])


def test_too_few_validation_rows_are_refused_before_the_work():
    with pytest.raises(InvalidInputError, match="needs 299, even where nothing changes"):
        quick(max_acc_drop=0.01)


def test_train_and_validation_must_differ():
    train, _ = demo_sets()
    with pytest.raises(DataError, match="train and validation share"):
        quick(validation=train)


def test_unlabelled_training_images_are_refused():
    with pytest.raises(DataError, match="has no labels"):
        quick(train=demo_sets()[0][0])


def test_a_model_that_cannot_be_copied_is_refused():
    class Stubborn(type(demo_classifier())):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    model = demo_classifier()
    model.__class__ = Stubborn
    with pytest.raises(UnsupportedModelError, match=r"cannot be copied.*no copies"):
        quick(model)


def test_a_copy_that_shares_weights_is_refused():
    class Shared(type(demo_classifier())):
        def __deepcopy__(self, memo):
            return copy.copy(self)

    model = demo_classifier()
    model.__class__ = Shared
    before = weights_of(model)
    with pytest.raises(UnsupportedModelError, match="shares weights"):
        quick(model)
    assert same(before, weights_of(model))


def test_half_precision_weights_and_plain_callables_are_refused():
    with pytest.raises(UnsupportedModelError, match="bfloat16 weights"):
        quick(demo_classifier().bfloat16())
    classifier = EnergyClassifier(
        lambda x: x.flatten(1)[:, :8], preprocessing=EnergyClassifier(Normed()).preprocessing
    )
    with pytest.raises(UnsupportedModelError, match=r"needs an nn\.Module"):
        quick(classifier)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 0}, "updates=0"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"scope": "heads"}, "known are all, last_block"),
        ({"augment": "mixup"}, "known are none, flip_crop"),
        ({"objective": "marginal"}, "margin"),
        ({"resume": True}, "needed its folder"),
        ({"objective_settings": {"wait": 1.0}}, "weight"),
        ({"max_acc_drop": 0.0}, "max_acc_drop"),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        quick(**settings)


def test_epochs_are_passes_over_the_training_images():
    train, _ = demo_sets()
    result = quick(epochs=0.1, batch_size=16)
    assert result.settings["updates"] == round(0.1 * len(train[0]) / 16)


def test_split_validation_counts_an_image_once():
    images = images_of(40)
    twice = TrainingImages(torch.cat([images.all_pixels()] * 2), torch.cat([images.labels] * 2))
    assert sum(split_validation(twice).sizes().values()) == 40
