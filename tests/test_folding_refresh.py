"""Tensors that are no parameters: plain attributes and constants of the traced copy."""

import pytest
import torch
from test_folding import HALF, Residual, check_equal, exact, pixels_of, shaken
from torch import nn
from training_cases import batch_of, context_of

from ebm_guard import EnergyClassifier
from ebm_guard.sampling import SamplingNet
from ebm_guard.training.objectives import make_objective


class PlainNormalised(Residual):
    """Mean and standard deviation as plain tensors, as many models hold them."""

    def __init__(self):
        super().__init__()
        self.mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
        self.std = torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)

    def forward(self, x):
        return super().forward((x - self.mean) / self.std)


class InnerPlain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = PlainNormalised()

    def forward(self, x):
        return self.inner(x)


class Constant(Residual):
    def forward(self, x):
        return super().forward(x * torch.tensor(2.0) - torch.tensor([0.1, 0.0, 0.1]).view(3, 1, 1))


class Unsaved(Residual):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return super().forward(x * self.scale)


class MadeOfWeights(Residual):
    """The sum runs while the net is traced: it becomes a constant, which weights outgrow."""

    def forward(self, x):
        size = sum(part.square().sum() for part in self._modules["fc2"]._parameters.values())
        return super().forward(x) / size.sqrt()


@pytest.mark.parametrize("build", [PlainNormalised, InnerPlain, Constant, Unsaved])
def test_tensors_outside_of_the_state_dict_are_no_obstacle(build):
    classifier = EnergyClassifier(shaken(build()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    assert net.folded == 3
    shaken(classifier.model, seed=1)
    assert (net.energy(pixels_of()) - exact(classifier)(pixels_of())).abs().max() > 0.1
    net.refresh()
    check_equal(net, classifier, pixels_of(9, seed=5))


def test_plain_attributes_are_kept_in_step():
    classifier = EnergyClassifier(shaken(PlainNormalised()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    classifier.model.mean = torch.tensor([0.3, 0.1, 0.9]).view(1, 3, 1, 1)
    classifier.model.std.mul_(1.5)
    assert (net.energy(pixels_of()) - exact(classifier)(pixels_of())).abs().max() > 0.01
    net.refresh()
    check_equal(net, classifier, pixels_of())


def test_a_constant_made_of_weights_is_found_out():
    model = shaken(MadeOfWeights())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classifier = EnergyClassifier(model, preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    assert net.note.startswith("not folded, run as it is: _tensor_constant0 would not follow")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    shaken(classifier.model, seed=1)
    net.refresh()
    check_equal(net, classifier, pixels_of(), atol=0)


class Gained(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten()
        self.layers = nn.Sequential(*layers, nn.Linear(16, 3))
        self.gain = torch.tensor(1.5)

    def forward(self, x):
        return self.layers(x * self.gain)


@pytest.mark.parametrize("name", ["jem", "adversarial", "dat"])
def test_updates_run_on_the_lean_copy_of_such_a_net(name):
    model, batch = shaken(Gained()), batch_of(dtype=torch.float32)
    context = context_of(model)
    net = SamplingNet(context.net._classifier, batch.pixels)
    assert net.folded == 1
    context.forward = net
    objective = make_objective(name)
    objective.begin(context, batch)
    for _ in range(2):
        terms = objective.loss(context, batch)
        weights = list(model.parameters())
        for part, slope in zip(weights, torch.autograd.grad(terms.total, weights), strict=True):
            part.data -= 0.01 * slope
        net.refresh()
    check_equal(net, context.net._classifier, batch.pixels)
