"""What the tests of other people's models share: a small net, and the promises kept for it."""

import math

import numpy as np
import torch
from torch import nn
from toys import inputs_of

import ebm_guard

CLASSES = 5
ROWS = 40


def redrawn(model, seed=0):
    """Redraw weights and statistics from a generator of their own, and go to eval mode.

    Signals keep their size through many layers, so that logits differ well between rows.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * (2 / parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(0.1 * drawn + (0 if name.endswith("bias") else 1))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def convnet(seed=0):
    """A net whose train mode gives other logits, with a head behind dropout."""
    return redrawn(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 16),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(16, CLASSES),
        ),
        seed,
    )


def images(n=ROWS, size=8, seed=1, dtype=torch.float32):
    """Noise around a colour per image, so that logits differ well between rows."""
    noise = inputs_of(n * 3, size * size, seed=seed).reshape(n, 3, size, size)
    return (noise + 3 * inputs_of(n, 3, seed=seed + 1)[:, :, None, None]).to(dtype)


def condition(model):
    """Return what wrapping must leave as it was."""
    if not isinstance(model, nn.Module):
        return None
    parts = list(model.modules())
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in parts)
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [getattr(part, "training", None) for part in parts],
        [] if scripted else [(len(p._forward_pre_hooks), len(p._forward_hooks)) for p in parts],
    )


def assert_same_condition(before, model):
    after = condition(model)
    if before is None:
        assert after is None
        return
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), f"{name} changed"
    assert before[1:] == after[1:]


def keeps_its_promises(model, x, expected, path, *, names=None, message="", tolerance=1e-4):
    """Check all that a wrapped model promises; return the guard that was loaded back.

    Args:
        model: what the user has.
        x: a batch for it.
        expected: the logits that the model itself gives in eval mode.
        path: where the artefact goes.
        names: the layers of the head; None where there is none.
        message: words of the message where there is no head.
        tolerance: of the head, relative to the largest logit.
    """
    before = condition(model)
    guard = ebm_guard.wrap(model)
    classifier = guard.classifier
    with torch.no_grad():
        # First the plain call, then the probe, then both again: none may disturb the others.
        assert torch.equal(classifier(x), expected)
        head = classifier.probe_head(x)
        output = classifier.forward(x, features=True)
        assert torch.equal(output.logits, expected)
        assert torch.equal(classifier(x), expected)
        if names is None:
            assert not head.found
            assert message in head.message
            assert "logit scores work" in head.message or "not an nn.Module" in head.message
            assert output.features is None
        else:
            assert head.names == names, head.message
            rebuilt = output.features.double() @ head.weight.double().T + head.bias.double()
            error = (rebuilt - expected.double()).abs().max()
            assert error <= tolerance * expected.double().abs().max()
    assert_same_condition(before, model)

    labels = expected.argmax(dim=1)
    labels[::4] = (labels[::4] + 1) % expected.shape[1]
    guard.fit([(x, labels)], false_reject_rate=0.2, threshold="marginal")
    assert guard.canary is not None
    assert torch.equal(guard.canary.inputs, x[:8])
    decision = guard(x)
    assert torch.equal(decision.logits, expected)
    energy = -torch.logsumexp(expected.float(), dim=1)
    assert torch.allclose(decision.energy.float(), energy, atol=1e-5)
    # The cut is the score of this rank; more rows are accepted only where scores tie.
    rank = math.ceil(0.8 * (len(x) + 1))
    assert rank <= int(decision.accept.sum()) < len(x)
    guard.save(path)
    loaded = ebm_guard.Guard.load(path, model)
    again = loaded(x)
    assert torch.equal(again.status, decision.status)
    assert np.array_equal(again.score.numpy(), decision.score.numpy())
    assert_same_condition(before, model)
    return loaded
