"""Energies along an attack, against a walk written out by hand."""

import json

import numpy as np
import pytest
import torch

from ebm_guard.attacks import Examples
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate.deciding import Parts, decide
from ebm_guard.gate.thresholds import Threshold
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.ood import as_score, make_score
from ebm_guard.robustness.energy_path import QUANTILES, energy_path

WEIGHT = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 4


def forward(pixels):
    """Energies of a linear net fall without end along the attack, as those of ordinary nets do."""
    return ClassifierOutput((pixels.flatten(1) - 0.5) @ WEIGHT.T, None)


def examples_of(n=40, flips=4):
    pixels = torch.rand(n, 1, 2, 4, generator=torch.Generator().manual_seed(1))
    labels = forward(pixels).logits.argmax(dim=1)
    labels[:flips] = (labels[:flips] + 1) % 3
    return Examples.of(pixels, labels)


def gate(rate=0.3):
    pixels = torch.rand(500, 1, 2, 4, generator=torch.Generator().manual_seed(2))
    energies = -torch.logsumexp(forward(pixels).logits, dim=1)
    threshold = Threshold.fit(energies.numpy(), false_reject_rate=rate)
    return Parts(make_score("energy"), threshold)


def walk(examples, epsilon, num_steps):
    """Sign steps of 2.5 epsilon / K on the cross-entropy from the image; all iterates."""
    x, path = examples.pixels.clone(), []
    for _ in range(num_steps + 1):
        path.append(x)
        leaf = x.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(
            forward(leaf).logits, examples.labels, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        x = x + 2.5 / num_steps * epsilon * gradient.sign()
        x = torch.minimum(torch.maximum(x, examples.pixels - epsilon), examples.pixels + epsilon)
        x = x.clamp(0, 1)
    return path


@pytest.mark.parametrize("epsilon", [0.05, 0.2])
@pytest.mark.parametrize("gated", [False, True])
def test_path_is_the_walk(epsilon, gated):
    parts, examples = gate() if gated else None, examples_of()
    found = energy_path(forward, examples, epsilon, parts, num_steps=8, batch_size=7)
    logits = forward(examples.pixels).logits
    kept = logits.argmax(dim=1) == examples.labels
    if gated:
        accepted = decide(parts, logits).accept
        assert not accepted.all()
        kept &= accepted
    followed = examples.select(kept)
    path = walk(followed, epsilon, 8)
    outputs = [forward(x).logits for x in path]
    energies = np.stack([-torch.logsumexp(item, dim=1).numpy() for item in outputs])
    wrong = np.stack([(item.argmax(dim=1) != followed.labels).numpy() for item in outputs])
    assert np.allclose(found.clean, energies[0], atol=1e-5)
    assert np.allclose(found.end, energies[-1], atol=1e-5)
    assert np.allclose(found.quantiles, np.quantile(energies, QUANTILES, axis=1).T, atol=1e-5)
    stops = path[-1].clone()
    for row in range(len(followed)):
        steps = np.flatnonzero(wrong[:, row])
        if len(steps):
            assert found.first_flip[row] == pytest.approx(energies[steps[0], row], abs=1e-5)
            stops[row] = path[steps[0]][row]
        else:
            assert np.isnan(found.first_flip[row])
    for reached, pixels in ((found.plain, path[-1]), (found.stop_at_flip, stops)):
        mistaken = forward(pixels).logits.argmax(dim=1) != followed.labels
        assert reached.n == len(followed)
        assert reached.fooled == int(mistaken.sum())
        if gated:
            decision = decide(parts, forward(pixels).logits)
            assert reached.accepted == int((mistaken & decision.accept).sum())
        else:
            assert reached.accepted is None
    assert found.plain.fooled > 0
    assert (found.gate_aware is None) == (not gated)


def test_stopping_at_the_flip_flatters_the_gate():
    found = energy_path(forward, examples_of(200, 0), 0.3, gate(), num_steps=20)
    assert found.plain.fooled == found.stop_at_flip.fooled > 0.9 * found.plain.n
    assert found.stop_at_flip.accepted < found.plain.accepted <= found.gate_aware.accepted
    assert np.median(found.end) < np.nanmedian(found.first_flip)


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.15])
def test_who_knows_the_gate_does_no_worse(epsilon):
    found = energy_path(forward, examples_of(), epsilon, gate(0.5), num_steps=10)
    assert found.gate_aware.accepted >= max(found.plain.accepted, found.stop_at_flip.accepted)


class Foreign:
    def predict_logits(self, logits):
        return -torch.logsumexp(logits, dim=1)


def test_score_without_gradient_is_climbed_by_the_energy():
    parts = gate()
    hidden = Parts(as_score(Foreign(), "foreign"), parts.threshold)
    known = energy_path(forward, examples_of(), 0.2, parts, num_steps=8)
    found = energy_path(forward, examples_of(), 0.2, hidden, num_steps=8, gradient="surrogate")
    assert found.gate_aware.accepted == known.gate_aware.accepted
    assert (
        energy_path(forward, examples_of(), 0.2, hidden, num_steps=8, gradient="none").gate_aware
        is None
    )


def test_record_is_json():
    found = energy_path(forward, examples_of(), 0.02, gate(), num_steps=3)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["n"] == len(found.clean) == found.plain.n
    assert len(record["quantiles"]) == 4
    assert record["levels"] == [0.05, 0.25, 0.5, 0.75, 0.95]
    assert None in record["energy"]["first_flip"]
    shares = record["plain"]
    assert shares["fooled"]["value"] == found.plain.fooled / found.plain.n
    assert shares["fooled_and_accepted"]["low"] is not None
    assert record["gate_aware"]["median_energy"] == found.gate_aware.median_energy


def test_refusals():
    examples = examples_of(10, 10)
    with pytest.raises(InvalidInputError, match="10 images is right without"):
        energy_path(forward, examples, 0.1)
    with pytest.raises(InvalidInputError, match="right and accepted"):
        energy_path(forward, examples, 0.1, gate())
    with pytest.raises(InvalidInputError, match="epsilon 0"):
        energy_path(forward, examples, 0)
