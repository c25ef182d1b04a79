"""What all class losses share: rows without label, shifts, extremes, names and refusals."""

import json
import math

import pytest
import torch
from class_loss_cases import CASES, every_case, every_name, random_rows, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ebm_guard import registry
from ebm_guard.errors import InvalidInputError
from ebm_guard.training.class_losses import MARGINS, ClassLoss, make_class_loss

# --- Rows without label, shifts, extremes ---------------------------------------------------------


@every_name
def test_unlabelled_rows_have_no_part_but_as_candidates(name):
    logits, labels = random_rows()
    logits.requires_grad_()
    loss = make_class_loss(name)
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    unlabelled = labels == -1
    if name == "info_nce":
        assert bool((gradient[unlabelled] != 0).any())
        return
    assert bool((gradient[unlabelled] == 0).all())
    assert torch.equal(value, loss(logits[~unlabelled], labels[~unlabelled]))


@every_name
@pytest.mark.parametrize("count", [0, 3])
def test_without_any_label_a_loss_is_zero_with_a_graph(name, count):
    logits = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = make_class_loss(name)(logits, torch.full((count,), -1))
    assert float(value.detach()) == 0.0
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


@settings(max_examples=150, deadline=None)
@given(case=st.sampled_from(CASES), drawn=rows(), shift=st.sampled_from([-300.0, -1.0, 40.0]))
def test_what_a_number_added_to_all_logits_changes(case, drawn, shift):
    """The classes of a row compare energies; the absolute losses pin them, centre and all."""
    (name, given_settings), (logits, labels) = case, drawn
    loss = make_class_loss(name, **given_settings)
    shifted = loss(logits + shift, labels)
    if name == "energy":
        expected = loss(logits, labels) - (shift if bool((labels >= 0).any()) else 0)
    elif "centre" in loss.settings():
        centre = loss.settings()["centre"] + shift
        expected = make_class_loss(name, **(given_settings | {"centre": centre}))(logits, labels)
    else:
        expected = loss(logits, labels)
    assert torch.allclose(shifted, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=150, deadline=None)
@given(case=st.sampled_from(CASES), drawn=rows())
def test_all_but_the_energy_loss_are_bounded_below(case, drawn):
    name, given_settings = case
    loss = make_class_loss(name, **given_settings)
    values = loss.rows(-drawn[0], drawn[1])
    if name == "energy":
        assert bool((loss.rows(-drawn[0] - 1e6, drawn[1]) == values - 1e6).all())
        return
    assert bool((values >= 0).all())
    bound = {"mce": 1.0, "mee": 1.0, "lvq2": loss.settings().get("cap")}.get(name, math.inf)
    assert bool((values <= bound).all())


@every_case
def test_extreme_logits_stay_finite(name, given_settings):
    loss, labels = make_class_loss(name, **given_settings), torch.tensor([0, 0, 0, 1, 1, -1])
    for classes in (2, 1000):
        logits = torch.zeros(6, classes)
        logits[0, 0], logits[1, 1], logits[2, 0] = 1e4, 1e4, -1e4
        logits[3] = -1e4
        logits[4] = 1e4
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            given_logits = logits.to(dtype).requires_grad_()
            value = loss(given_logits, labels)
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert bool(torch.isfinite(value))
            (gradient,) = torch.autograd.grad(value, given_logits)
            # The range of half precision ends at 65,504.
            assert dtype == torch.float16 or bool(torch.isfinite(gradient).all())


@every_name
def test_at_a_tie_of_all_classes_every_loss_pulls_the_correct_energy_down(name):
    """A head that starts at zero can leave; the absolute losses lift the wrong classes there."""
    logits = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    value = make_class_loss(name)(logits, torch.tensor([0, 1, 2, 0]))
    (gradient,) = torch.autograd.grad(value, logits)
    own = gradient.gather(1, torch.tensor([[0], [1], [2], [0]]))
    if name in ("square_square", "square_exponential", "bromley"):
        assert bool((own == 0).all())
        assert float(gradient.sum()) > 0
    else:
        assert bool((own < 0).all())


# --- Names, settings, refusals --------------------------------------------------------------------


@every_case
def test_settings_make_the_same_loss_again(name, given_settings):
    loss = make_class_loss(name, **given_settings)
    kept = json.loads(json.dumps(loss.settings()))
    assert kept.pop("class_loss") == name == loss.name
    assert set(given_settings.items()) <= set(kept.items())
    again = make_class_loss(name, **kept)
    assert again.settings() == loss.settings() == loss.identity()
    assert torch.equal(again(*random_rows()), loss(*random_rows()))


def test_a_ready_loss_is_taken_as_it_is():
    class Brier(ClassLoss):
        name = "brier"

        def rows(self, energies, labels):
            known = labels >= 0
            target = F.one_hot(labels[known], energies.shape[1])
            return ((-energies[known]).softmax(dim=1) - target).square().sum(dim=1)

    own = Brier()
    assert make_class_loss(own) is own
    assert float(own(torch.zeros(2, 2), torch.tensor([0, -1]))) == pytest.approx(0.5)
    with pytest.raises(InvalidInputError, match=r"m beside a ready class loss"):
        make_class_loss(own, m=1.0)


@pytest.mark.parametrize(
    ("name", "given_settings", "message"),
    [
        ("hing", {}, "did you mean"),
        (3, {}, "got a int as class loss"),
        ("hinge", {"margin": 1.0}, "margin=1.0 for the class loss 'hinge'; it takes m"),
        ("log", {"m": 1.0}, "it takes no settings"),
        ("hinge", {"m": 0.0}, "m=0.0; needed a finite number > 0"),
        ("nll", {"beta": -1}, "beta=-1"),
        ("lvq2", {"cap": math.inf}, "cap=inf"),
        ("square_square", {"form": "square"}, "known are relu, softplus"),
        ("bromley", {"centre": math.nan}, "centre=nan"),
        ("additive_margin", {"form": "square"}, "known are hinge, squared_hinge, log"),
        ("info_nce", {"temperature": 0}, "temperature=0"),
    ],
    ids=str,
)
def test_what_is_refused_by_name(name, given_settings, message):
    with pytest.raises(InvalidInputError, match=message):
        make_class_loss(name, **given_settings)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), "whole numbers of shape"),
        (torch.zeros(3, 2), torch.zeros(3), "labels torch.float32"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool), "labels torch.bool"),
        (torch.zeros(3, 2), [0, 1, 0], "whole numbers"),
        (torch.zeros(3, 2), torch.tensor([0, 2, 1]), "from 0 to 2 for 2 classes"),
        (torch.zeros(3, 2), torch.tensor([0, -2, 1]), "from -2 to 1"),
        (torch.zeros(3), torch.tensor([0, 1, 1]), r"of shape \(B, C\)"),
    ],
    ids=str,
)
def test_what_is_refused_of_a_batch(logits, labels, message):
    for name in ("nll", "hinge", "info_nce"):
        with pytest.raises(InvalidInputError, match=message):
            make_class_loss(name)(logits, labels)


def test_small_label_types_are_taken():
    loss, logits = make_class_loss("hinge"), random_rows(3, 300)[0]
    labels = torch.tensor([0, 200, 7])
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))


@every_case
def test_the_registry_says_the_margin_that_the_loss_says(name, given_settings):
    loss = make_class_loss(name, **given_settings)
    assert loss.margin in MARGINS
    assert bool(loss.caution) == (loss.margin in ("none", "0"))
    assert not loss.caution or f"class loss {name} " in loss.caution
    if given_settings.get("form") != "log":
        said = "any positive" if loss.margin == "positive" else loss.margin
        assert registry.get("class_loss", name).equation.endswith(f"margin: {said}")
