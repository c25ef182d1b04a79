"""The lean copy of a net: the same energies and gradients, fresh weights, never another net."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ebm_guard import EnergyClassifier, Preprocessing
from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.sampling import SamplingNet, energy_and_gradient
from ebm_guard.sampling.norms import fold_norms

EXAMPLES = Path(__file__).parents[1] / "examples"
HALF = Preprocessing((0.5,) * 3, (0.5,) * 3)


def shaken(model, seed=0):
    """Give a net random weights and running statistics, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "running_var" in name:
                value.copy_(noise.abs() + 0.2)
            elif value.ndim > 1:
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            else:
                value.copy_(noise * 0.5 + ("weight" in name))
    return model.eval()


class Residual(nn.Module):
    """Shortcut, two norms in a row of layers, a norm that stands alone, and a linear one."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8, affine=False, eps=1e-2)
        self.alone = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8, 16, bias=False)
        self.bn3 = nn.BatchNorm1d(16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = F.relu(self.alone(x)).mean(dim=(2, 3))
        return self.fc2(F.relu(self.bn3(self.fc1(x))))


class Shared(nn.Module):
    """One norm layer after two convolutions, and one convolution read by two: nothing to fold."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.bn, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.other, self.last = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        x = self.bn(self.conv2(self.bn(self.conv1(x))))
        y = self.other(x)
        return self.fc((self.last(y) + y).tanh().mean(dim=(2, 3)))


class Doubling(nn.BatchNorm2d):
    """A kind of batch norm that does more than batch norm."""

    def forward(self, x):
        return super().forward(x) * 2


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm with an activation, under the names that timm gives its own."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Viewing(nn.Module):
    """Asks for contiguous memory, which channels last is not."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(216, 4)

    def forward(self, x):
        x = self.bn(self.conv(x)).tanh()
        return self.fc(x.view(x.shape[0], -1))


class Branching(nn.Module):
    """Control flow that hangs on values cannot be traced."""

    def __init__(self):
        super().__init__()
        self.inner = Residual()

    def forward(self, x):
        return self.inner(x) if x.sum() > -1e9 else -self.inner(x)


class Dropping(Residual):
    """A function looks at the flag while it is traced."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class Noisy(Residual):
    """Random inference: no copy gives the same energies."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


def sequential(norm=nn.BatchNorm2d):
    layers = nn.Conv2d(3, 6, 3), norm(6), nn.Tanh(), nn.Flatten(), nn.Linear(216, 4)
    return nn.Sequential(*layers)


def pixels_of(n=6, seed=3):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def exact(classifier):
    forward = pixel_forward(classifier)
    return lambda pixels: formulas.energy(forward(pixels).logits)


def check_equal(net, classifier, pixels, atol=1e-4):
    found, gradient = energy_and_gradient(net.energy, pixels)
    energy, wanted = energy_and_gradient(exact(classifier), pixels)
    assert (found - energy).abs().max() <= atol
    assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-5 + 1e-3 * wanted.abs().max())


CASES = {
    "residual": (Residual, 3, "3 of 4 norm layers folded, 1 left as they are, channels last"),
    "shared": (Shared, 0, "0 of 3 norm layers folded, 3 left as they are, channels last"),
    "sequential": (sequential, 1, "1 of 1 norm layers folded, channels last"),
    "subclass": (lambda: sequential(Doubling), 0, "0 of 1 norm layers folded, 1 left"),
    "with activation": (lambda: sequential(BatchNormAct2d), 1, "1 of 1 norm layers folded"),
    "viewing": (Viewing, 1, "1 of 1 norm layers folded"),
    "no statistics": (lambda: sequential(lambda n: nn.GroupNorm(2, n)), 0, "0 of 0 norm layers"),
}


@pytest.mark.parametrize("name", CASES)
def test_energies_and_gradients_are_those_of_the_net(name):
    build, folded, note = CASES[name]
    classifier = EnergyClassifier(shaken(build()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    assert net.traced
    assert net.folded == folded
    assert net.note.startswith(note)
    assert net.channels_last == (name != "viewing")
    check_equal(net, classifier, pixels_of(9, seed=4))
    # Other weights: what was folded before is wrong, until it is refreshed.
    shaken(classifier.model, seed=1)
    gap = (net.energy(pixels_of()) - exact(classifier)(pixels_of())).abs().max()
    assert gap > 0.1
    net.refresh()
    check_equal(net, classifier, pixels_of(9, seed=5))


@pytest.mark.parametrize(
    ("build", "note"),
    [
        (Branching, "not folded, run as it is: the model cannot be traced"),
        (Noisy, "not folded, run as it is: the folded copy's energies differ by"),
    ],
)
def test_a_net_that_cannot_be_copied_is_run_as_it_is(build, note):
    classifier = EnergyClassifier(shaken(build()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of(), precision="bfloat16")
    assert net.note.startswith(note)
    assert "its own precision" in net.note
    assert not net.traced
    assert (net.folded, net.precision, net.channels_last) == (0, "float32", False)
    torch.manual_seed(0)
    found = net(pixels_of()).logits
    torch.manual_seed(0)
    assert torch.equal(found, pixel_forward(classifier)(pixels_of()).logits)
    net.refresh()


def test_a_plain_callable_is_run_as_it_is():
    classifier = EnergyClassifier(lambda x: x.mean(dim=(2, 3)), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    assert net.note == "a plain callable (function) cannot be folded: run as it is"
    check_equal(net, classifier, pixels_of(), atol=0)


def test_a_wrong_fold_is_found_out(monkeypatch):
    from ebm_guard.sampling import norms

    def wrong(fold, live):
        weight, bias = right(fold, live)
        return weight, bias + 0.01

    right = norms.folded_weights
    monkeypatch.setattr(norms, "folded_weights", wrong)
    classifier = EnergyClassifier(shaken(Residual()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    assert "energies differ" in net.note
    check_equal(net, classifier, pixels_of(), atol=0)


def test_a_linear_norm_over_another_dimension_is_found_out():
    # (B, L, D) with L = D: BatchNorm1d normalises dimension 1, a folded linear layer dimension 2.
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn, self.out = nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Linear(24, 4)

        def forward(self, x):
            return self.out(self.bn(self.fc(x.flatten(1, 2))).tanh().mean(dim=1))

    classifier = EnergyClassifier(shaken(Tokens()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    assert "energies differ" in net.note
    check_equal(net, classifier, pixels_of(), atol=0)


def test_the_net_is_read_and_never_changed():
    model = shaken(Dropping()).train()
    model.fc2.weight.grad = torch.ones_like(model.fc2.weight)
    before = copy.deepcopy(model.state_dict())
    flags = [part.requires_grad for part in model.parameters()]
    classifier = EnergyClassifier(model, preprocessing=HALF)
    with pytest.warns(UserWarning, match="train mode"):
        net = SamplingNet(classifier, pixels_of())
    assert net.traced
    state = torch.get_rng_state()
    energy, _ = energy_and_gradient(net.energy, pixels_of())
    assert energy.std() > 0
    assert all(part.training for part in model.modules())
    assert [part.requires_grad for part in model.parameters()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model.fc2.weight.grad, torch.ones_like(model.fc2.weight))
    assert model.conv1.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gradient_goes_to_weights():
    classifier = EnergyClassifier(shaken(Residual()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    assert not net(pixels_of()).logits.requires_grad
    leaf = pixels_of().requires_grad_()
    net.energy(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert all(part.grad is None for part in classifier.model.parameters())


def test_training_and_refreshing_follow_an_optimiser():
    model = shaken(Residual())
    classifier = EnergyClassifier(model, preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    weights = list(model.parameters())
    for _ in range(3):
        loss = F.cross_entropy(model(pixels_of()), torch.arange(6) % 4)
        for part, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            part.data -= 0.05 * gradient
        net.refresh()
        check_equal(net, classifier, pixels_of(4, seed=9))


def test_refreshing_from_another_net_is_refused():
    classifier = EnergyClassifier(shaken(Residual()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    classifier.model.fc2 = nn.Linear(16, 7)
    with pytest.raises(InvalidInputError, match="make a new"):
        net.refresh()


def test_bfloat16_keeps_energies_in_float32_and_near():
    classifier = EnergyClassifier(shaken(Residual()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of(), precision="bfloat16")
    assert net.settings()["precision"] == "bfloat16"
    logits = net(pixels_of()).logits
    assert logits.dtype == torch.float32
    wanted, gradient = energy_and_gradient(exact(classifier), pixels_of())
    found, rough = energy_and_gradient(net.energy, pixels_of())
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert torch.cosine_similarity(gradient.flatten(1), rough.flatten(1)).min() > 0.95


def test_automatic_settings_repeat_on_a_cpu():
    classifier = EnergyClassifier(shaken(Residual()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of(), expected_steps=10**6)
    assert net.precision == "float32"
    assert not net.compiled
    for settings in ({"precision": "half"}, {"compile": "always"}):
        with pytest.raises(InvalidInputError, match=next(iter(settings))):
            SamplingNet(classifier, pixels_of(), **settings)


def test_the_users_way_to_the_logits_and_double_precision_are_kept():
    class Pair(Residual):
        def forward(self, x):
            return {"out": super().forward(x), "other": x.sum()}

    model = shaken(Pair().double())
    classifier = EnergyClassifier(model, logits=lambda out: out["out"], preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of())
    assert net.folded == 3
    assert net(pixels_of()).logits.dtype == torch.float64
    check_equal(net, classifier, pixels_of(), atol=1e-6)


def test_one_layer_under_two_names_is_not_folded():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.second = self.first
            self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            x = self.bn2(self.second(self.bn1(self.first(x)).relu()))
            return self.fc(x.mean(dim=(2, 3)))

    _, folds, norms = fold_norms(shaken(Tied()))
    assert (folds, norms) == ([], 2)


# torch.compile looks at the gradient of its input, and warns about itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_copy_is_the_same_net(monkeypatch, precision):
    # The backend that compiles nothing: the default one needs a C++ compiler and a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    classifier = EnergyClassifier(shaken(Residual()), preprocessing=HALF)
    net = SamplingNet(classifier, pixels_of(), precision=precision, compile=True)
    assert net.compiled
    assert "compiled (" in net.note
    if precision == "bfloat16":
        plain = SamplingNet(classifier, pixels_of(), precision=precision, compile=False)
        assert torch.equal(net(pixels_of()).logits, plain(pixels_of()).logits)
        return
    check_equal(net, classifier, pixels_of())
    shaken(classifier.model, seed=1)
    net.refresh()
    check_equal(net, classifier, pixels_of(4))


def test_resnet20_and_densenet_with_published_weights(data_dir):
    from ebm_guard.model.loading import load_model

    generator = torch.Generator().manual_seed(0)
    for name, n, folded in [
        ("cifar10_resnet20", 4, 19),
        ("mnist0to7_densenet_bc100_k12", 2, 48),
    ]:
        checkpoint = next(data_dir.glob(f"{name}*.safetensors"))
        model = load_model(f"{EXAMPLES / 'published_nets.py'}:{name}", checkpoint=checkpoint)
        classifier = EnergyClassifier(model.eval())
        preprocessing = classifier.preprocessing
        shape = (n, preprocessing.channels, *preprocessing.image_size)
        pixels = torch.rand(shape, generator=generator)
        net = SamplingNet(classifier, pixels)
        assert net.folded == folded, net.note
        check_equal(net, classifier, pixels)
