"""Attacks leave nothing behind in the user's model, and work in whatever state it is."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from attack_cases import EPSILON, HALF, RULES, case, name_of, pixels_of, small_net
from foreign import convnet
from torch import nn

from ebm_guard import EnergyClassifier
from ebm_guard.attacks import (
    APGD,
    PGD,
    Examples,
    Misclassify,
    Query,
    climb,
    pixel_forward,
    untouched,
)
from ebm_guard.errors import EbmGuardWarning, InvalidInputError


def trace(model):
    """Everything an attack might leave behind."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [part.training for part in model.modules()],
        "flags": [part.requires_grad for part in model.parameters()],
        "grads": [part.grad for part in model.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, value in before["values"].items():
        assert torch.equal(value, after["values"][key]), key
    for key in ("modes", "flags", "grads"):
        assert before[key] == after[key], key
    assert torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"], after["numpy"])


class Raising(nn.Module):
    """A net with dropout and batch norm whose forward fails at a given call."""

    def __init__(self, fails_at):
        super().__init__()
        self.net, self.fails_at, self.calls = convnet(), fails_at, 0
        self.net[0].bias.requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of luck")
        return self.net(x)


@pytest.mark.parametrize("fails_at", [None, 3], ids=["to-the-end", "raising"])
@pytest.mark.parametrize("rule", RULES[1:4], ids=name_of)
def test_nothing_of_the_model_changes(rule, fails_at):
    model = Raising(fails_at).train()
    model.net[1].eval()
    forward = pixel_forward(EnergyClassifier(model, preprocessing=HALF))
    examples = Examples.of(pixels_of(20), torch.zeros(20, dtype=torch.int64))
    before = trace(model)

    def attack():
        expected = pytest.raises(RuntimeError, match="out of luck") if fails_at else nullcontext()
        with expected, untouched(model):
            climb(rule, Query(forward, Misclassify(), batch_size=8), examples, 0.01, until="last")

    with pytest.warns(EbmGuardWarning, match="train mode"):
        attack()
    assert_same(before, trace(model))
    assert model.calls > 2


def test_a_trace_would_be_seen():
    model = Raising(None).train()
    before = trace(model)
    model(pixels_of(4)).sum().backward()
    with pytest.raises(AssertionError):
        assert_same(before, trace(model))


def test_a_model_in_train_mode_gives_the_verdicts_of_eval_mode():
    model = convnet()
    forward, examples = case(model)
    outcomes = []
    query = Query(forward, Misclassify())
    with untouched(model):
        outcomes.append(climb(PGD(5), query, examples, EPSILON))

    def in_train_mode():
        with untouched(model.train()):
            return climb(PGD(5), query, examples, EPSILON)

    with pytest.warns(EbmGuardWarning, match="train mode"):
        outcomes.append(in_train_mode())
    assert torch.equal(outcomes[0].pixels, outcomes[1].pixels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_models_in_half_precision_run(rule, dtype):
    forward, examples = case(small_net().to(dtype), n=16)
    outcome = climb(rule, Query(forward, Misclassify("margin")), examples, 0.05, until="best")
    assert outcome.pixels.dtype == outcome.objective.dtype == torch.float32
    clean = Query(forward, Misclassify("margin")).answer(examples.pixels, examples, gradient=False)
    assert (outcome.objective > clean.objective).float().mean() > 0.9


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(context):
    forward, examples = case()
    plain = climb(APGD(6), Query(forward, Misclassify()), examples, EPSILON)
    with context():
        again = Examples.of(examples.pixels.clone(), examples.labels.clone())
        found = climb(APGD(6), Query(forward, Misclassify()), again, EPSILON)
    assert torch.equal(plain.pixels, found.pixels)


@pytest.mark.parametrize("how", ["detach", "no_grad"])
def test_a_model_that_lets_no_gradient_through_is_told_so(how):
    model = small_net()

    def cut(x):
        if how == "detach":
            return model(x.detach()).detach()
        with torch.no_grad():
            return model(x)

    forward = pixel_forward(EnergyClassifier(cut, preprocessing=HALF))
    examples = Examples.of(pixels_of(2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match="detaches its input or runs under no_grad"):
        climb(PGD(2), Query(forward, Misclassify()), examples, 0.1, until="last")
