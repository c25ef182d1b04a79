"""Class losses against loops written from their equations, finite differences and torch."""

import math

import numpy as np
import pytest
import torch
from class_loss_cases import every_case, naive, random_rows, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ebm_guard.training.class_losses import make_class_loss
from ebm_guard.training.objectives.hdge import contrastive

# --- Values and gradients -------------------------------------------------------------------------


@every_case
@settings(max_examples=10, deadline=None)
@given(drawn=rows())
def test_a_loss_equals_the_loop(name, given_settings, drawn):
    found = make_class_loss(name, **given_settings)(*drawn)
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(naive(name, *drawn, **given_settings), abs=1e-12)


@every_case
@pytest.mark.parametrize("classes", [2, 1000])
def test_a_loss_equals_the_loop_for_few_and_many_classes(name, given_settings, classes):
    drawn = random_rows(classes=classes, seed=classes)
    expected = naive(name, *drawn, **given_settings)
    loss = make_class_loss(name, **given_settings)
    assert float(loss(*drawn)) == pytest.approx(expected, rel=1e-10)
    assert float(loss(drawn[0].float(), drawn[1])) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@every_case
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_gradient_is_that_of_finite_differences(name, given_settings, scale):
    logits, labels = random_rows(5, 4, scale, seed=3)
    loss = make_class_loss(name, **given_settings)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


def test_nll_is_cross_entropy_and_log_is_it_for_two_classes():
    logits, labels = random_rows()
    expected = F.cross_entropy(logits, labels, ignore_index=-1)
    assert torch.allclose(make_class_loss()(logits, labels), expected, rtol=1e-14)
    halved, known = logits[:, :2], labels.clamp(max=1)
    pair = make_class_loss("log")(halved, known)
    assert torch.allclose(pair, make_class_loss("nll")(halved, known), rtol=1e-12)


def test_large_beta_turns_nll_into_the_perceptron_and_mee_into_a_count_of_errors():
    logits, labels = random_rows()
    labels[0] = logits[0].argmax()
    labels[2] = logits[2].argmin()
    perceptron = make_class_loss("perceptron")(logits, labels)
    assert torch.allclose(make_class_loss("nll", beta=1e4)(logits, labels), perceptron, atol=1e-3)
    known = labels >= 0
    errors = (logits.argmax(dim=1) != labels)[known].double().mean()
    assert 0 < errors < 1
    assert torch.allclose(make_class_loss("mee", beta=1e4)(logits, labels), errors)


def test_hinge_equals_torch_for_two_classes():
    logits, labels = random_rows()
    expected = F.multi_margin_loss(logits[labels >= 0], labels[labels >= 0], margin=1.5)
    found = make_class_loss("additive_margin", m=1.5)(logits, labels)
    # torch divides the sum over classes by C.
    assert torch.allclose(found / logits.shape[1], expected)


# --- InfoNCE --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(drawn=rows(), temperature=st.sampled_from([0.1, 1.0, 4.0]))
def test_info_nce_is_the_contrast_of_hdge_without_a_queue(drawn, temperature):
    found = make_class_loss("info_nce", temperature=temperature)(*drawn)
    expected = contrastive(*drawn, torch.empty(0, 0), temperature)
    assert torch.allclose(found, expected, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(drawn=rows(), seed=st.integers(0, 100))
def test_info_nce_does_not_see_the_offset_of_a_class(drawn, seed):
    logits, labels = drawn
    loss = make_class_loss("info_nce")
    offsets = torch.from_numpy(np.random.default_rng(seed).normal(0, 50, logits.shape[1]))
    assert torch.allclose(loss(logits + offsets, labels), loss(logits, labels), atol=1e-10)


def test_info_nce_ends_at_the_log_of_how_many_images_share_the_class():
    labels = torch.tensor([0, 0, 0, 1, 2])
    logits = 200.0 * F.one_hot(labels, 3).double()
    expected = 3 * math.log(3) / 5
    assert float(make_class_loss("info_nce")(logits, labels)) == pytest.approx(expected)
    assert float(make_class_loss("info_nce")(logits[:1], labels[:1])) == 0.0
