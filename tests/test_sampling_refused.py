"""Settings and images that no chain can run on are refused, with what is needed instead."""

import math

import pytest
import torch
from test_sampling import HALF, case, small_net
from torch import nn

import ebm_guard
from ebm_guard import EnergyClassifier, sample
from ebm_guard.errors import InvalidInputError, ModelOutputError
from ebm_guard.sampling import SGLD, UniformStart


def test_settings_are_checked():
    for settings in (
        {"num_steps": -1},
        {"num_steps": 2.5},
        {"step_size": 0.0},
        {"noise_std": -1.0},
        {"clip": 0.0},
        {"box": (1.0, 0.0)},
        {"boundary": "wrap"},
        {"num_steps": "ten"},
        {"step_size": "a"},
        {"noise_std": None},
        {"clip": "x"},
        {"box": "ab"},
        {"box": 3},
    ):
        with pytest.raises(InvalidInputError, match=next(iter(settings))):
            SGLD(**settings)
    with pytest.raises(InvalidInputError, match="temperature"):
        SGLD.langevin(0.1, 0.0)


def test_what_does_not_fit_is_refused():
    classifier, images = case()
    size = {"image_size": (8, 8)}
    for call, message in [
        (lambda: sample(classifier), "image_size="),
        (lambda: sample(EnergyClassifier(small_net()), **size), "mean= and std="),
        (lambda: sample(classifier, start="data", **size), "needs images="),
        (lambda: sample(classifier, start="noise", **size), "known are gaussian"),
        (lambda: sample(classifier, start=UniformStart((3, 4, 4)), **size), "start of shape"),
        (lambda: sample(classifier, classes=[5], **size), r"classes are 0\.\.4"),
        (lambda: sample(classifier, classes=[1, 1], **size), "none twice"),
        (lambda: sample(classifier, per_class=0, **size), "per_class=0"),
        (lambda: sample(classifier, per_class="2", **size), "per_class='2'; needed a whole"),
        (lambda: sample(classifier, seed=None, **size), "seed=None"),
        (lambda: sample(classifier, num_steps=1.5, **size), "num_steps=1.5"),
        (lambda: sample(classifier, classes=["²"], **size), r"classes are 0\.\.4"),
        (lambda: sample(classifier, classes=3, **size), "classes=3; needed a list"),
        (lambda: sample(classifier, sampler=3, **size), "a int as sampler"),
        (lambda: sample(classifier, image_size=8), "image_size=8; needed"),
        (lambda: sample(classifier, images=images, image_size=(9, 9)), "give one of the two"),
        (lambda: sample(classifier, image_size=("a", 8)), "image_size='a'"),
        (
            lambda: sample(
                classifier, images=images[:4], labels=torch.arange(5), start="data", per_class=1
            ),
            "4 images and 5 labels",
        ),
        (lambda: sample(classifier, images=images, labels=[1, 2]), "labels as list"),
        (lambda: sample(classifier, images=images * 255), "divide by 255"),
        (lambda: sample(ebm_guard.Guard(), **size), "holds no model"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            call()


def test_energies_that_are_not_finite_are_an_error():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        net[1].weight[0, 0] = math.nan
    classifier = EnergyClassifier(net, preprocessing=HALF)
    with pytest.raises(ModelOutputError, match="not finite"):
        sample(classifier, image_size=(2, 2), num_steps=1)
