"""An ensemble of energies: its formula, and that it works like one model."""

import copy
import math

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from toys import Moody, Pixels, inputs_of, labelled, linear

import ebm_guard
from ebm_guard import EnergyClassifier, Guard, Preprocessing, predict
from ebm_guard.errors import (
    ArtifactError,
    DataError,
    EbmGuardWarning,
    InvalidInputError,
    NotFittedError,
    UnsupportedModelError,
)
from ebm_guard.model import EnergyEnsemble
from ebm_guard.ood import make_score
from ebm_guard.sampling import sample


def pair(**settings):
    return EnergyEnsemble([linear(seed=0), linear(seed=1)], **settings)


def fitted(**settings):
    return pair(**settings).fit([inputs_of(100), inputs_of(60, seed=2)])


def pixel_pair(**settings):
    """Members with other normalisations."""
    other = Pixels()
    other.fc = linear(3, 3, seed=6)
    other.pretrained_cfg = other.pretrained_cfg | {"mean": (0.1, 0.2, 0.9), "std": (0.5, 0.6, 0.7)}
    return EnergyEnsemble([Pixels(), other], **settings)


def pixels_of(n, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def naive(ensemble, rows, weights, temperatures):
    """Loops over rows, members and classes in float64, from the formula."""
    with torch.no_grad():
        calibration = torch.cat([inputs_of(100), inputs_of(60, seed=2)])
        members = list(ensemble.members)
        known = [np.array(oracles.energy(member(calibration).tolist())) for member in members]
        logits = [member(rows).tolist() for member in members]
    found = []
    for row in range(len(rows)):
        standardised = []
        for m, part in enumerate(logits):
            scale = (oracles.energy([part[row]])[0] - known[m].mean()) / known[m].std(ddof=1)
            log_p = oracles.log_softmax([part[row]], temperatures[m])[0]
            standardised.append([-value + scale for value in log_p])
        classes = range(len(standardised[0]))
        if ensemble.combine == "product":
            found.append(
                [
                    -sum(w * e[y] for w, e in zip(weights, standardised, strict=True))
                    for y in classes
                ]
            )
        else:
            shares = [w / sum(weights) for w in weights]
            parts = zip(shares, standardised, strict=True)
            parts = list(parts)
            found.append([math.log(sum(s * math.exp(-e[y]) for s, e in parts)) for y in classes])
    return found


@pytest.mark.parametrize("combine", ["product", "mixture"])
@pytest.mark.parametrize(
    ("weights", "temperatures"), [(None, None), ([0.5, 2.0], [1.7, 0.6]), ([3.0, 3.0], None)]
)
def test_the_logits_are_the_formula(combine, weights, temperatures):
    ensemble = fitted(combine=combine, weights=weights, temperatures=temperatures)
    rows = inputs_of(20, seed=5)
    truth = naive(ensemble, rows, weights or [1.0, 1.0], temperatures or [1.0, 1.0])
    assert np.allclose(ensemble(rows).detach().numpy(), truth, rtol=1e-4, atol=1e-4)


def test_offset_and_unit_of_a_members_energy_do_not_matter():
    """f + c is the same classifier; its energies are shifted, and standardising undoes it."""
    plain = fitted()
    moved = pair()
    with torch.no_grad():
        moved.members[1].bias += 50
    moved.fit([inputs_of(100), inputs_of(60, seed=2)])
    rows = inputs_of(20, seed=5)
    assert torch.allclose(moved(rows), plain(rows), atol=1e-4)
    assert float(moved.energy_mean[1]) == pytest.approx(float(plain.energy_mean[1]) - 50, rel=1e-5)


def test_the_energy_of_a_product_is_the_members_and_their_disagreement():
    ensemble = fitted()
    rows = inputs_of(50, seed=5)
    with torch.no_grad():
        parts = [member(rows).double() for member in ensemble.members]
        energy = -torch.logsumexp(ensemble(rows).double(), dim=1)
    units = [
        (-torch.logsumexp(part, dim=1) - mean) / std
        for part, mean, std in zip(parts, ensemble.energy_mean, ensemble.energy_std, strict=True)
    ]
    agree = torch.stack([part.softmax(dim=1) for part in parts]).prod(dim=0).sum(dim=1)
    assert torch.allclose(energy, sum(units) - agree.log(), atol=1e-4)
    assert (agree.log() <= 0).all()


def test_a_mixture_of_one_model_twice_is_that_model_standardised():
    model = linear()
    ensemble = EnergyEnsemble([model, model], combine="mixture").fit([inputs_of(100)])
    rows = inputs_of(20, seed=5)
    assert torch.allclose(ensemble(rows).softmax(dim=1), model(rows).softmax(dim=1), atol=1e-6)
    ours, theirs = (-torch.logsumexp(part, dim=1) for part in (ensemble(rows), model(rows)))
    assert torch.equal(ours.argsort(), theirs.argsort())


def test_members_normalise_for_themselves():
    ensemble = pixel_pair().fit([pixels_of(40), (pixels_of(40, 1), torch.zeros(40).long())])
    pixels = pixels_of(6, 2)
    assert ebm_guard.wrap(ensemble).classifier.preprocessing.mean == (0.0, 0.0, 0.0)
    assert EnergyClassifier(ensemble).preprocessing.image_size == (8, 8)
    by_hand = [member(member_input(member, pixels)) for member in ensemble.members]
    assert all(
        torch.equal(found, hand)
        for found, hand in zip(ensemble.member_logits(pixels), by_hand, strict=True)
    )
    assert torch.equal(ensemble(pixels), ensemble.compose(by_hand))
    stored = pixel_pair().fit_logits(
        ensemble.member_logits(torch.cat([pixels_of(40), pixels_of(40, 1)]))
    )
    assert torch.allclose(stored.energy_std, ensemble.energy_std, rtol=1e-6)


def member_input(member, pixels):
    config = member.pretrained_cfg
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return (pixels - mean) / std


@pytest.mark.parametrize("combine", ["product", "mixture"])
def test_it_is_calibrated_gated_saved_and_loaded_like_one_model(combine, tmp_path):
    ensemble = fitted(combine=combine)
    rows = labelled(linear(), 300, seed=7)
    guard = ebm_guard.wrap(ensemble).fit(rows)
    x = inputs_of(30, seed=9)
    found = guard(x)
    assert torch.equal(found.logits, ensemble(x))
    assert torch.allclose(found.energy, -torch.logsumexp(ensemble(x), dim=1))
    again = Guard.load(guard.save(tmp_path / "guard.safetensors"), ensemble)
    assert torch.equal(again(x).status, found.status)
    # The weights hash covers what was measured: another fit is another model.
    other = pair(combine=combine).fit([inputs_of(100, seed=4)])
    with pytest.raises(ArtifactError, match="weights"):
        Guard.load(tmp_path / "guard.safetensors", other)
    part = predict(EnergyClassifier(ensemble), rows, features=True)
    for name in ("msp", "maxlogit", "gen"):
        assert np.isfinite(make_score(name).of(part)).all()
    assert part.features is None
    assert "features" in make_score("knn").why_not_fit(part)


def test_its_state_is_loaded_again_and_survives_copies_and_half():
    ensemble = fitted()
    rows = inputs_of(20, seed=5)
    again = pair()
    assert not again.fitted
    again.load_state_dict(ensemble.state_dict())
    copied = copy.deepcopy(ensemble)
    assert torch.equal(again(rows), ensemble(rows))
    with torch.no_grad():
        ensemble.members[0].bias += 1
    assert not torch.equal(ensemble(rows), again(rows))
    # The copy's classifiers are of the copy's modules.
    assert torch.equal(copied(rows), again(rows))
    assert copied.classifiers[0].model is copied.members[0]
    assert copied.half().energy_mean.dtype == torch.float64


def test_gradients_reach_the_pixels_and_nothing_of_the_members_moves():
    ensemble = pixel_pair().fit([pixels_of(40)])
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    pixels = pixels_of(2, 2)[..., :2, :2].double().requires_grad_()
    double = copy.deepcopy(ensemble).double()
    assert torch.autograd.gradcheck(double, pixels, atol=1e-4)
    sample(ensemble, num_steps=2, per_class=2)
    for name, value in ensemble.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in ensemble.parameters())


def test_fit_takes_eval_outputs_of_members_in_train_mode():
    members = [Moody(), Moody()]
    with torch.no_grad():
        members[1].last.bias += torch.tensor([0.0, 1.0, 2.0])
    state = copy.deepcopy(members[0].state_dict())
    ensemble = EnergyEnsemble(members)
    assert ensemble.training
    with pytest.warns(EbmGuardWarning, match="train mode"):
        ensemble.fit([inputs_of(50)])
    assert members[0].training
    assert all(torch.equal(value, state[name]) for name, value in members[0].state_dict().items())
    calm = EnergyEnsemble([member.eval() for member in members]).fit([inputs_of(50)])
    assert not calm.training
    assert torch.equal(calm.energy_mean, ensemble.energy_mean)


def test_nothing_is_said_before_the_fit():
    with pytest.raises(NotFittedError, match=r"call ensemble\.fit"):
        pair()(inputs_of(3))
    with pytest.raises(NotFittedError):
        ebm_guard.wrap(pair()).fit(labelled(linear(), 100))


class Named(torch.nn.Module):
    def __init__(self, names):
        super().__init__()
        self.fc = linear(4, len(names))
        self.pretrained_cfg = {"label_names": names}

    def forward(self, x):
        return self.fc(x)


def sized(size, channels=3):
    return EnergyClassifier(
        linear(),
        preprocessing=Preprocessing((0.5,) * channels, (0.5,) * channels, image_size=(size, size)),
    )


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: EnergyEnsemble([linear()]), InvalidInputError, "two or more"),
        (lambda: pair(combine="sum"), InvalidInputError, "product or mixture"),
        (lambda: pair(weights=[1.0]), InvalidInputError, "needed 2 finite numbers"),
        (lambda: pair(weights=[1.0, -1.0]), InvalidInputError, "needed 2 finite numbers"),
        (lambda: pair(temperatures=[0.0, 1.0]), InvalidInputError, "got temperatures"),
        (
            lambda: EnergyEnsemble([linear(), linear().forward]),
            UnsupportedModelError,
            "needed an nn.Module",
        ),
        (
            lambda: EnergyEnsemble([Named(["a", "b"]).eval(), Named(["b", "a"]).eval()]),
            InvalidInputError,
            "another order",
        ),
        (lambda: EnergyEnsemble([Pixels(), linear()]), InvalidInputError, "is not known"),
        (lambda: EnergyEnsemble([sized(8), sized(9)]), InvalidInputError, "same pixels"),
        (lambda: EnergyEnsemble([sized(8), sized(8, 1)]), InvalidInputError, "same pixels"),
        (
            lambda: EnergyEnsemble([linear(), linear(classes=4)]).fit([inputs_of(9)]),
            UnsupportedModelError,
            "same classes",
        ),
        (lambda: pair().fit([]), DataError, "no batches"),
        (lambda: pair().fit([inputs_of(1)]), DataError, "needed two or more"),
        (lambda: pair().fit([inputs_of(1).repeat(5, 1)]), DataError, "the same energy"),
        (lambda: pair().fit([inputs_of(5) * math.nan]), DataError, "not finite"),
        (lambda: pair().fit([["a"]]), InvalidInputError, "needed a tensor"),
        (lambda: pair().fit_logits([torch.eye(3)]), UnsupportedModelError, "needed one "),
        (lambda: pixel_pair().fit([pixels_of(4) * 255]), InvalidInputError, "divide by 255"),
    ],
)
def test_what_makes_no_ensemble_is_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_probabilities_are_refused():
    soft = torch.nn.Sequential(linear(), torch.nn.Softmax(dim=1)).eval()
    with pytest.raises(UnsupportedModelError, match="probabilities"):
        EnergyEnsemble([linear(), soft]).fit([inputs_of(20)])


def test_class_names_are_taken_over():
    ensemble = EnergyEnsemble([Named(["a", "b"]).eval(), Named(["a", "b"]).eval()])
    assert EnergyClassifier(ensemble).classes == ("a", "b")
    assert EnergyClassifier(ensemble).name == "product of Named, Named"
    assert "fitted=False" in repr(ensemble)


def test_the_state_of_another_combination_is_refused():
    members = [nn.Linear(4, 3).eval(), nn.Linear(4, 3).eval()]
    fitted = EnergyEnsemble(members).fit([torch.randn(20, 4)])
    other = EnergyEnsemble(members, combine="mixture")
    with pytest.raises(InvalidInputError, match="state of a product for a mixture"):
        other.load_state_dict(fitted.state_dict())
    hashes = [
        EnergyClassifier(each).weights_hash() for each in (fitted, other.fit([torch.randn(20, 4)]))
    ]
    assert hashes[0] != hashes[1]


def test_one_model_is_no_list_of_members():
    with pytest.raises(InvalidInputError, match="needed a list of two or more"):
        EnergyEnsemble(nn.Linear(4, 3).eval())
