"""What is refused before any training, and models of other kinds: wrapped, frozen, in float64."""

import threading
from dataclasses import replace

import pytest
import torch
from finetune_cases import Normed, demo_sets, images_for, images_of, quick, same, weights_of
from safetensors.torch import load_file
from torch import nn

from ebm_guard import EnergyClassifier, Preprocessing
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.distributed import check_own_device, local_device
from ebm_guard.errors import (
    DataError,
    InvalidInputError,
    ModelOutputError,
    UnsupportedModelError,
)
from ebm_guard.model.loading import load_weights
from ebm_guard.training import TrainingImages
from ebm_guard.training.options import FineTuneOptions, described
from ebm_guard.training.selection import half
from ebm_guard.training.sets import Sets, checked_sets

LOOSE = {"max_acc_drop": 0.9, "max_nll_rise": 50.0, "max_ece_rise": 1.0, "learning_rate": 1e-3}


def refused(error, match, **settings):
    """A run is refused before its first line of history."""
    lines = []
    with pytest.raises(error, match=match):
        quick(**settings, on_event=lines.append)
    assert not lines


def pixels_of(role):
    return TrainingImages.of_arrays(load_demo(role).images)


# Images


@pytest.mark.parametrize("n", [1, 3])
def test_an_ood_set_that_is_too_small_is_named(n):
    few = pixels_of("far_ood").all_pixels()[:n]
    # Many copies of few images are few images.
    refused(
        InvalidInputError,
        rf"OOD set photos .*{n} are different; needed at least 4",
        ood_validation={"photos": few.repeat(20, 1, 1, 1)},
    )


def test_four_different_ood_images_are_enough():
    result = quick(ood_validation={"photos": pixels_of("far_ood").all_pixels()[:4]}, updates=1)
    evaluation = next(line for line in result.history if line["kind"] == "evaluation")
    assert "photos" in evaluation["auroc"]


def test_no_image_is_in_both_halves_of_an_ood_set():
    five = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = TrainingImages(five.repeat(20, 1, 1, 1))
    first, second = (half(images, 0, which) for which in (0, 1))
    assert not set(first.hashes().tolist()) & set(second.hashes().tolist())
    assert len(first) + len(second) == 5


@pytest.mark.parametrize("role", ["outliers", "ood_validation"])
@pytest.mark.parametrize("other", ["train", "validation"])
def test_outliers_and_ood_sets_must_not_be_the_data(role, other):
    given = dict(zip(("train", "validation"), demo_sets(), strict=True))
    refused(DataError, rf"{other} and {role} share", **{role: given[other][0]})


def test_outliers_and_ood_sets_must_differ_from_each_other():
    far = pixels_of("far_ood").all_pixels()
    refused(DataError, "outliers and a share", outliers=far, ood_validation={"a": far[:50]})
    refused(DataError, "a and b share", ood_validation={"a": far, "b": far[:50]})


def test_a_few_duplicates_are_noted():
    (train, labels), validation = demo_sets()
    train = TrainingImages.of_arrays(train, labels)
    pixels = torch.cat([train.all_pixels(), TrainingImages.of_arrays(*validation).all_pixels()[:2]])
    joined = TrainingImages(pixels, torch.cat([train.labels, train.labels[:2]]))
    result = quick(train=joined, updates=2)
    assert any("Train and validation share 2 identical rows" in line for line in result.story)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotation", "kind of synthetic outliers"),
        ("blend", "kind of synthetic outliers"),
        ("train", "names of other sets"),
        ("evaluation", "names of other sets"),
        ("", "needed a word"),
    ],
)
def test_names_that_stand_for_something_else_are_refused(name, message):
    refused(InvalidInputError, message, ood_validation={name: torch.rand(30, 1, 8, 8)})


@pytest.mark.parametrize("role", ["validation", "outliers", "ood_validation"])
def test_all_sets_have_one_shape(role):
    other = torch.rand(50, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    given = (other, torch.zeros(50, dtype=torch.int64)) if role == "validation" else other
    refused(InvalidInputError, rf"different shapes .*{role} \(1, 9, 9\)", **{role: given})


def test_decoded_sets_are_compared_by_a_part():
    class Counting(TrainingImages):
        looked = 0

        @property
        def in_memory(self):
            return False

        def pixels(self, rows):
            Counting.looked += len(rows)
            return super().pixels(rows)

    big = images_of(7000, seed=5)
    lazy = Counting(big.all_pixels())
    sets, _ = checked_sets(Sets(images_of(50), images_of(50, seed=1), ood={"a": lazy}), 10, 0)
    assert len(sets.ood["a"]) == 5000
    assert Counting.looked <= 2 * 5000 + 2


def test_unlabelled_images_among_the_validation_rows_are_refused():
    images, labels = demo_sets()[1]
    labels = labels.copy()
    labels[3] = -1
    refused(DataError, "1 of .* labels are -1.*Only training", validation=(images, labels))


# Models


def wrapped(kind):
    model = Normed().eval()
    if kind == "parallel":
        return nn.DataParallel(model).eval(), model
    return torch.compile(model, backend="eager"), model


@pytest.mark.parametrize("kind", ["parallel", "compiled"])
def test_weights_load_into_the_users_wrapped_model(kind, tmp_path):
    model, inner = wrapped(kind)
    classifier = EnergyClassifier(model, preprocessing=Preprocessing((0.3,), (0.4,)))
    sets = images_for(inner, 64), images_for(inner, 320, seed=1)
    result = quick(classifier, *sets, objective="cross_entropy", updates=2, **LOOSE)
    assert result.start is model
    for winner, known in ((result.candidate, result.candidate), (model, inner)):
        # Whichever of them was returned.
        replace(result, model=winner).save(tmp_path)
        assert load_file(tmp_path / "weights.safetensors").keys() == Normed().state_dict().keys()
        for make in (lambda: wrapped(kind), lambda: (Normed(),) * 2):
            target, plain = make()
            with torch.no_grad():
                plain.fc.bias.add_(1)
            load_weights(target, tmp_path / "weights.safetensors")
            assert same(weights_of(plain), weights_of(known))


def test_prefixes_are_undone_but_a_part_called_module_stays(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    source, target = Own(), Own()
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    nested = {f"module._orig_mod.{name}": value for name, value in source.state_dict().items()}
    torch.save(nested, tmp_path / "nested.pt")
    for name in ("plain", "nested"):
        target = Own()
        load_weights(nn.DataParallel(target), tmp_path / f"{name}.pt")
        assert same(weights_of(source), weights_of(target))


@pytest.mark.parametrize("objective", ["margin", "jem"])
def test_a_model_in_float64_is_trained_and_its_guard_fitted(objective):
    model = Normed().double().eval()
    train, validation = images_for(Normed().eval(), 64), images_for(Normed().eval(), 320, seed=1)
    result = quick(model, train, validation, objective=objective, updates=2)
    assert {part.dtype for part in result.model.parameters()} == {torch.float64}
    assert result.guard.threshold is not None


def test_a_model_in_float16_is_refused_with_the_way_out():
    refused(UnsupportedModelError, r"float16 weights.*model\.float\(\)", model=Normed().half())


class Mixing(Normed):
    """Subtracts the mean of the batch."""

    def forward(self, x):
        logits = super().forward(x)
        return logits - logits.mean(dim=0)


def test_models_whose_rows_see_each_other_are_refused():
    without = Normed().eval()
    without.norm = nn.BatchNorm2d(8, track_running_stats=False)
    sets = {"train": images_of(64), "validation": images_of(320, seed=1)}
    refused(UnsupportedModelError, r"\(norm\).*track_running_stats=True", model=without, **sets)
    refused(UnsupportedModelError, "depend on the other images", model=Mixing().eval(), **sets)
    alone = Normed().eval()
    # By the image, and not by the batch: harmless.
    alone.norm = nn.InstanceNorm2d(8).eval()
    assert quick(alone, **sets, updates=2).status in ("accepted", "start returned")


def test_a_start_that_is_not_finite_is_refused():
    model = demo_classifier()
    with torch.no_grad():
        model.fc.bias[2] = float("inf")
    refused(ModelOutputError, "not finite", model=model)


def test_weights_that_the_user_froze_stay():
    model = Normed().eval()
    for part in model.stem.parameters():
        part.requires_grad_(False)
    sets = images_for(model, 64), images_for(model, 320, seed=1)
    result = quick(model, *sets, **LOOSE)
    before, after = weights_of(model), weights_of(result.candidate)
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    assert result.settings["trained_weights"] == 8
    assert any("2 weights of the model are frozen" in line for line in result.story)
    named = quick(model, *sets, **LOOSE, scope="regex:stem")
    assert not torch.equal(before["stem.weight"], weights_of(named.candidate)["stem.weight"])
    assert any("trains 2 of them" in line for line in named.story)
    # Frozen as a whole: prepared for inference, and no choice of weights.
    whole = quick(model.requires_grad_(False), *sets, **LOOSE)
    assert whole.settings["trained_weights"] == 10
    assert not any(part.requires_grad for part in model.parameters())


# Settings


def test_objects_of_the_user_are_not_copied():
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, pixels, generator):
            return pixels

    settings = FineTuneOptions(augment=Locked(), objective_settings={"x": Locked()}).to_dict()
    assert settings["augment"] == "Locked"
    assert settings["objective_settings"] == {"x": "Locked"}
    assert settings["updates"] == 200


def test_settings_are_described_as_they_were_given():
    class Measuring:
        def settings(self):
            return {"measured": 3.0}

        def identity(self):
            return {"measured": None}

    assert described({"x": Measuring()}) == {"x": {"measured": None}}


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    any_gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert local_device(any_gpu) == any_gpu
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_device(any_gpu) == torch.device("cuda:2")
    assert local_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert local_device(cpu) == cpu
    check_own_device(torch.device("cuda:2"))
    check_own_device(cpu)
    with pytest.raises(InvalidInputError, match=r'process 2 .*model\.to\("cuda:2"\)'):
        check_own_device(torch.device("cuda:0"))
    # One GPU is all that the process sees.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert local_device(any_gpu) == torch.device("cuda:0")
    check_own_device(torch.device("cuda:0"))


def test_a_finetune_call_without_labels_for_all_images_says_so():
    images, _ = demo_sets()[0]
    with pytest.raises(DataError, match="has no labels"):
        quick(train=torch.from_numpy(images)[:, None])
